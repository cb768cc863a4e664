"""RWKV-7 with deep embeddings (x070a)."""
