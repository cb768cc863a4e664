"""Files: all or nothing, never over an input, each way of being broken with its own words."""
