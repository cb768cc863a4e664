"""Merge, check, convert and push: files for other runtimes from a base and an adapter."""
