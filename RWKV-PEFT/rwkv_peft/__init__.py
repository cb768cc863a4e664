"""Bone fine-tuning for RWKV-6: model, wkv6 kernels, adapters, data, training and merge."""

__version__ = "0.1.0"
