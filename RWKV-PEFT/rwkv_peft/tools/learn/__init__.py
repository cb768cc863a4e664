"""`rwkv-peft learn`: go on from a run's adapter with corrected answers, and lose no more than allowed."""
