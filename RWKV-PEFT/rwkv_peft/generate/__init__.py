"""Text from a model: sampling, batched recurrent decoding, and the command `rwkv-peft generate`."""

from .decode import Step, generate, prefill
from .loading import load_model, read_state_file, save_state_file
from .sampling import Sampling
from .text import TextStream

__all__ = ["Sampling", "Step", "TextStream", "generate", "load_model", "prefill", "read_state_file", "save_state_file"]
