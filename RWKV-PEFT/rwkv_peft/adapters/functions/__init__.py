"""Computes y = x W'ᵀ + bias of a layer without keeping a merged weight: a file a form, over tokens.py."""
