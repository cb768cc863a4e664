"""From flags to a trained adapter: the loop, its engines, the loss of a step, the run itself."""
