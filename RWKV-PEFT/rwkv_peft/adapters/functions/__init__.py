"""How layers compute y = x W'ᵀ + bias without a merged weight that lives on: a file a form, over tokens.py."""
