"""Checks of this machine, and their report."""
