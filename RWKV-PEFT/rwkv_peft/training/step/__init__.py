"""What a training step does: the loss of a batch, its gradients, the rate, and the optimizer."""
