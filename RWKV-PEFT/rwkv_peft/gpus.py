"""The number of GPUs that torch can use here, and the message if it cannot use those that there are."""

import torch

from .cli import counted
from .config import TrainConfig
from .errors import UserError, told


def refusal() -> str:
    """The reason, in torch's words, why torch cannot use this machine's GPUs; "" if it can, or if there are none.

    torch counts GPUs without CUDA, and so counts those whose driver is too old for its CUDA, too.
    """
    if torch.cuda.device_count():
        try:
            torch.cuda.init()
        except RuntimeError as error:
            return told(error)
    return ""


def count_gpus(instead: str) -> int:
    """Count the GPUs that torch can use. Raises UserError, with what to do `instead`, if there are others."""
    count, words = torch.cuda.device_count(), refusal()
    if words:
        raise UserError(
            f"this machine has {counted(count, 'GPU')}, and torch {torch.__version__} cannot use "
            f"{'it' if count == 1 else 'them'}: {words}; update the driver, install a build of torch for an older "
            f"CUDA, or {instead}"
        )
    return count


def resolve_accelerator(train: TrainConfig) -> str:
    """Return "cpu" or "gpu" by --accelerator. Raises UserError for too few GPUs, and for --cuda_graphs on a CPU."""
    gpus = 0 if train.accelerator == "cpu" else count_gpus("train with --accelerator cpu")
    accelerator = train.accelerator if train.accelerator != "auto" else "gpu" if gpus else "cpu"
    if accelerator == "gpu" and train.devices > gpus:
        raise UserError(
            f"--devices {train.devices} and this machine has {counted(gpus, 'GPU')}; lower --devices"
            + (", or use --accelerator cpu" if not gpus else "")
        )
    if train.cuda_graphs and accelerator == "cpu":
        raise UserError("--cuda_graphs 1 records launches on a GPU, and this run is on a CPU; leave it out")
    return accelerator


def better_precision(precision: str, accelerator: str) -> str:
    """A note on a --precision that this machine, "cpu" or "gpu", multiplies slowly; "" if there is none to make."""
    if precision == "fp16" and accelerator == "cpu":
        return "note: CPUs compute fp16 slowly; --precision bf16 takes as much memory"
    if precision == "bf16" and accelerator == "gpu" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            name = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
            return f"note: {name} multiplies bf16 slowly; --precision fp16 suits it"
    return ""
