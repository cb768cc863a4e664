"""Measure how well a model answers: the commands `rwkv-peft eval` and `rwkv-peft lm_eval`, and a run's questions."""
