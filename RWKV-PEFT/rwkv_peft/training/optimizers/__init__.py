"""The optimizers of --optim, a file each, with what a checkpoint keeps of them."""
