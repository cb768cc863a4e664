"""`rwkv-peft serve`: OpenAI's HTTP interface to a model with its adapters and states."""
