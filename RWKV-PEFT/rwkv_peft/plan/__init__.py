"""What a run will take before it begins: memory by part and device, what fits, and what buys most."""
