"""The training loop: Lightning's Trainer over DeepSpeed ZeRO, on any device."""
