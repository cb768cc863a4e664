"""Reads and writes models, adapters and states: atomically, never over an input, with a clear error for damage."""
