"""The ranks of a run: their launcher, their process group, and the values that they must share."""
