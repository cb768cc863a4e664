"""Adapters that other tools wrote."""
