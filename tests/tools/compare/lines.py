"""The command lines of the tests of comparisons."""

MODEL = ("--load_model", "base.pth", "--data_file", "data", "--ctx_len", "16", "--accelerator", "cpu")
TRAIN = (*MODEL, "--val_split", "0.2")
OWN = ("--methods", "bone", "lora", "--rank", "8", "--seeds", "7", "--steps", "2")
