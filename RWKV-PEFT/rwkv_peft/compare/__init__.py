"""Adapter methods compared fairly on one's own model and data: the command `rwkv-peft compare`."""
