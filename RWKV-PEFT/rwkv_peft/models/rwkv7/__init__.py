"""RWKV-7 ("Goose", x070)."""
