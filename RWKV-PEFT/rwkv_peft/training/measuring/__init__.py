"""Measurements of a run: losses of held-out samples, answers to questions, and notes at its end."""
