"""Bone fine-tuning for RWKV: models, wkv kernels, adapters, data, training, release."""

__version__ = "0.1.0"
