"""RWKV-7 with deep embeddings and attention over them (x070b)."""
