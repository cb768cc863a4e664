"""Measure how well a model answers: the command `rwkv-peft eval`, and a run's questions."""
