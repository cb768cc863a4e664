"""The command `rwkv-peft compare`: a fair comparison of adapter methods on one's own model and data."""
