"""Command lines: one parser for every command, errors, the table of commands."""
