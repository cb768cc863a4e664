"""Estimates of a run's memory and disk before it begins, and the flags that save most."""
