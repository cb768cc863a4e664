"""How well a model answers: the command `rwkv-peft eval`."""
