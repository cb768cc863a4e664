"""A run's memory and files, by formulas: `rwkv-peft plan` prints them, a run on a GPU chooses its rows by them."""
