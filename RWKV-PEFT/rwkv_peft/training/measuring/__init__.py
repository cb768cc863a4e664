"""Measurements while training: losses of held-out samples, answers to questions, whether rows were learned."""
