"""The number of GPUs that torch can use here, and the message if it cannot use those that there are."""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from .cli.errors import UserError, summarize
from .cli.parser import counted
from .config import TrainConfig

OLDER = (
    "update the driver, install a build of torch for an older CUDA (TORCH=cu126 sh scripts/setup.sh; TORCH=pip from a "
    "mirror of PyPI)"
)
ANEW = "install a build with CUDA, on a machine with the card (TORCH=auto sh scripts/setup.sh)"
DEVICES, WSL_DEVICE = Path("/dev"), Path("/dev/dxg")
WSL_DRIVER = Path("/usr/lib/wsl/lib/libcuda.so.1")  # Windows' NVIDIA driver puts it there; /dev/dxg serves any vendor
KERNEL = Path("/proc/sys/kernel/osrelease")
CODE = re.compile(r"(sm|compute)_(\d+)(\d)(\D?)")  # of torch.cuda.get_arch_list


def refusal() -> tuple[str, str]:
    """(reason, remedy) if torch cannot use this machine's GPUs, ("", "") if it can, or if there are none.

    torch counts GPUs without CUDA, and so also counts GPUs with a driver too old for its CUDA.
    """
    if not torch.cuda.device_count():
        if not unseen():
            return "", ""
        if torch.version.cuda is None:
            return "it is built without CUDA", ANEW
        return "the driver does not answer", "restart the machine if `nvidia-smi` fails as well"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return summarize(error), OLDER
    return without_code(0)


def unseen() -> list[Path]:
    """The devices of NVIDIA GPUs on this machine, unless the user hides them all, or a batch system hides one."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return []
    devices = [path for path in DEVICES.glob("nvidia*") if path.name[6:].isdigit()]
    if WSL_DEVICE.exists() and WSL_DRIVER.exists():
        devices.append(WSL_DEVICE)
    return [device for device in devices if may_open(device)]


def may_open(device: Path) -> bool:
    """False if a control group denies a device to this job, as Slurm does with those of other jobs: EPERM. EACCES is a
    user who lacks a group, which is a mistake to report."""
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError as error:
        return error.errno != errno.EPERM
    return True


def without_code(device: int) -> tuple[str, str]:
    """(reason, remedy) if this build of torch has no code for a GPU, else ("", "")."""
    known = torch.cuda.get_arch_list() if torch.version.cuda else []
    found = [(kind, (int(major), int(minor)), kin) for kind, major, minor, kin in CODE.findall(" ".join(known))]
    own = torch.cuda.get_device_capability(device)
    for kind, code, kin in found:  # code of a major version runs on its later minor ones, PTX on all later ones
        if code == own or code < own and kin != "a" and (kind == "compute" or code[0] == own[0]):
            return "", ""
    if not found:  # of AMD, or none is told
        return "", ""
    reason = f"{torch.cuda.get_device_name(device)} has compute capability {own[0]}.{own[1]}, and it has code for "
    older = own < min(code for _, code, _ in found)
    return reason + ", ".join(known), OLDER if older else "install a newer torch"


def count_gpus(instead: str) -> int:
    """Count the GPUs that torch can use. Raises UserError, with `instead` as the remedy, if there are others."""
    reason, remedy = refusal()
    count = torch.cuda.device_count()
    if reason:
        there = count or len(unseen())
        raise UserError(
            f"this machine has {counted(there, 'GPU')}, and torch {torch.__version__} cannot use "
            f"{'it' if there == 1 else 'them'}: {reason}; {remedy}, or {instead}"
        )
    return count


def resolve_accelerator(train: TrainConfig) -> str:
    """Return "cpu" or "gpu" by --accelerator. Raises UserError for too few GPUs."""
    gpus = 0 if train.accelerator == "cpu" else count_gpus("train with --accelerator cpu")
    accelerator = train.accelerator if train.accelerator != "auto" else "gpu" if gpus else "cpu"
    if accelerator == "gpu" and train.devices > gpus and not shows_one_gpu_each():
        raise UserError(
            f"--devices {train.devices} and this machine has {counted(gpus, 'GPU')}; lower --devices"
            + (", or use --accelerator cpu" if not gpus else "")
        )
    return accelerator


def gpu_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory, 0 for a CPU."""
    return 0 if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory


def grow_segments() -> None:
    """Let torch's allocator grow segments of a GPU's memory, unless the user has configured it. Rows of many lengths
    would else leave gaps that none of them fits. CUDA must not have started. In WSL older drivers fail on it."""
    in_wsl = KERNEL.is_file() and "microsoft" in KERNEL.read_text().lower()
    if not in_wsl and not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def shows_one_gpu_each(environment: Mapping[str, str] = os.environ) -> bool:
    """True if a launcher shows each of its processes one GPU, as Slurm does with --gpus-per-task 1."""
    launched = "LOCAL_RANK" in environment or environment.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    shown = environment.get("CUDA_VISIBLE_DEVICES", "")
    return launched and shown != "" and "," not in shown


def better_precision(precision: str, accelerator: str) -> str:
    """A note on a --precision that this machine, "cpu" or "gpu", multiplies slowly; "" if there is none to make."""
    if precision == "fp16" and accelerator == "cpu":
        return "note: CPUs compute fp16 slowly; --precision bf16 takes as much memory"
    if precision == "bf16" and accelerator == "gpu" and (card := slow_at_bf16()):
        return f"note: {card} multiplies bf16 slowly; --precision fp16 suits it"
    return ""


def slow_at_bf16() -> str:
    """The current GPU's name and compute capability if it multiplies bf16 slowly and fp16 fast, else "".

    Those from 7.0 on have tensor cores for fp16, and only those from 8.0 on for bf16 as well."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return ""
    capability = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} (compute capability {capability[0]}.{capability[1]})"
    return name if (7, 0) <= capability < (8, 0) else ""
