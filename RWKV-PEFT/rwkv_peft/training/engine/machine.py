"""Choose the device that a process of a run trains on."""

import torch

from ...cli import counted
from ...config import TrainConfig
from ...errors import UserError
from ...gpus import count_gpus


def resolve_accelerator(train: TrainConfig) -> str:
    """Return "cpu" or "gpu" by --accelerator. Raises UserError if the machine has fewer GPUs than --devices, or for
    --cuda_graphs on a CPU."""
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


def own_device(accelerator: str, local_rank: int) -> torch.device:
    """Return the device that a rank trains on, and make a GPU the current one, so that nothing is put on another."""
    if accelerator == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
