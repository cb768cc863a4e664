"""The optimizers of --optim, a file each, with their states in checkpoints."""
