"""Shared by the programs of gpu_check.py: random models, made on the device; results; running out of memory."""

import json

import step as step_program
import torch
from gpu_check_steps import OUT_OF_MEMORY

from rwkv_peft.models import family_named

SHAPE = "2048x7168x24"  # channels, feed-forward channels, layers: of 1.6 G parameters
VOCABULARY = 65536


def tell(**entry):
    """Print a result as a line with a JSON object."""
    print(json.dumps(entry), flush=True)


def random_model(version, shape, vocabulary, device, dtype=torch.bfloat16):
    """(a Family, the dimensions, a state dict on the device) of a random model."""
    family = family_named(version)
    channels, ffn, layers = map(int, shape.split("x"))
    config = family.new_dimensions(layers, channels, vocabulary, dim_ffn=ffn)
    with torch.device(device):  # a processor's random numbers take longer than a step
        return family, config, step_program.random_weights(family, config, {"device": device, "dtype": dtype})


def without_room(work, **entry):
    """The exit code of work(); if memory does not suffice, print that with `entry`, so that the rest may go on."""
    try:
        return work() or 0
    except torch.cuda.OutOfMemoryError as error:
        tell(**entry, out_of_memory=str(error).splitlines()[0])
    torch.cuda.empty_cache()
    return OUT_OF_MEMORY


def peak_gib(device):
    """{"peak_gib"} of torch's allocator since the last reset, nothing on a CPU."""
    return {} if device == "cpu" else {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def reset_peak(device):
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait(device):
    if device != "cpu":
        torch.cuda.synchronize()
