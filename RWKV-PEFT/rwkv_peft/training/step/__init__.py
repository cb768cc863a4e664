"""A training step: the loss of a batch, its gradients, the rate, and the optimizer."""
