"""Estimates of a run's memory and disk before it begins: by part and device, what fits, and which flags save most."""
