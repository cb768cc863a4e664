"""RWKV-6 ("Finch", x060)."""
