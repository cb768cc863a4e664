"""Generate text with a model: sampling, batched recurrent decoding, and the command `rwkv-peft generate`."""
