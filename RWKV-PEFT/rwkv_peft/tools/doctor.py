"""Report the abilities of this machine, missing parts, and the command that mends it.

    rwkv-peft doctor
    rwkv-peft doctor --model FILE
    rwkv-peft doctor --report [LOG]

Exit code 0 if training can run here, else 1. Nothing is changed, except that kernels which compile on first use are
compiled, because only that shows if they work. With --model the report is on the content of a file, and on the commands
that take it; exit code 1 if none does. With --report the report is JSON to paste into an issue, by the schema in
docs/reference/report.schema.json: without this user's name, folders and keys, and with the last lines of a LOG.
"""

import getpass
import importlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from .. import __version__
from ..checkpoints.atomic import room_at
from ..checkpoints.readable import require_readable
from ..cli.errors import summarize
from ..cli.installing import COMPILER, how_to_install, requirements_of
from ..cli.parser import Parser
from ..memory import main_memory

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

    from ..release.inspect import Contents

MARGIN = 1.3  # a product that takes so many times the fastest's time is told, because machines are busy
OK, NOTE, MISSING = "ok", "-", "MISSING"  # as it should be; good to know; training cannot run without it
LOG_LINES = 40  # of a log in a report
KEYS = re.compile(r"\b(?:hf_|sk-|ghp_)[\w-]{8,}|(?<=://)[^/\s@]+(?=@)")  # of hubs and services; of addresses
MODULES = MappingProxyType({"pyyaml": "yaml"})  # packages with modules of other names
OPTIONAL = MappingProxyType(
    {
        "transformers": "Hugging Face models",
        "peft": "Bone as a plug-in of Hugging Face peft",
        "bitsandbytes": "quantized bases, --optim adamw8bit",
        "math-verify": "train.py --reward math",
        "lm_eval": "rwkv-peft eval, tasks of the harness",
        "fastapi": "rwkv-peft serve and ui",
    }
)


CONVERSIONS = (
    ("bring it to Ai00", "rwkv-peft convert {} model.st"),
    ("bring it to llama.cpp", "rwkv-peft convert {} model.gguf"),
)
FROM_STATES = (
    ("talk to it", "rwkv-peft generate --model base.pth --state {} --chat"),
    ("make one model", "rwkv-peft merge --base_model base.pth --state_checkpoint {} --output merged.pth"),
)
# a file's content (release/inspect.py) -> (a purpose, the command); {} is the file
COMMANDS = MappingProxyType(
    {
        "model": (
            ("see what fits", "rwkv-peft plan --load_model {} --ctx_len 1024"),
            ("train on rows", "rwkv-peft train --load_model {} --data_file rows.jsonl --data_type sft --proj_dir out"),
            ("talk to it", "rwkv-peft generate --model {} --chat"),
            ("score it on rows", "rwkv-peft eval jsonl --model {} --data rows.jsonl"),
            *CONVERSIONS,
        ),
        "model of another tool": (("make it a base", "rwkv-peft convert {} base.pth"),),
        "adapter": (
            ("talk to it", "rwkv-peft generate --model base.pth --adapter {} --chat"),
            ("make one model", "rwkv-peft merge --base_model base.pth --peft_checkpoint {} --output merged.pth"),
        ),
        "states": (*FROM_STATES, ("bring it to Ai00", "rwkv-peft convert {} state.st")),
        "states with shifts": FROM_STATES,
    }
)
SHORT = ("kind", "dimensions", "method", "trained whole", "base", "parameters", "dtype", "states", "keys", "not read")


class Finding(NamedTuple):
    """One line of the report: the thing that was checked, its status, a text, and the remedy or ""."""

    name: str
    status: str
    text: str
    remedy: str = ""


def main(argv: list[str]) -> int:
    """Print the report; -> 0 if nothing that training needs is missing, else 1."""
    parser = Parser(prog="rwkv-peft doctor", description="Show what this machine can do and what is missing.")
    parser.add_argument(
        "--model", metavar="FILE", help="show instead what this file or folder holds, and which commands suit it"
    )
    parser.add_argument(
        "--report",
        metavar="LOG",
        nargs="?",
        const="",
        help="print the report as JSON for an issue, without names, folders and keys of this machine, with the "
        "last lines of LOG, the output of a command that failed",
    )
    args = parser.parse_args(argv)
    if version_of("torch") is None:  # there is no environment yet, and little to look at
        print(f"no environment: this Python, {sys.executable}, has no torch; {how_to_install()}")
        return 1
    if args.model:
        return report_model(args.model)
    if args.report is not None:
        return print_report(args.report)
    missing = []
    for finding in examine():
        print(f"{finding.name:18} {finding.status:8} {finding.text}", flush=True)
        if finding.remedy:
            print(f"{'':18} {'':8} -> {finding.remedy}")
        if finding.status == MISSING:
            missing.append(finding.name)
    print(f"\ntraining cannot run here: see {', '.join(missing)} above" if missing else "\ntraining can run here")
    return 1 if missing else 0


def print_report(log: str) -> int:
    """Print the findings as JSON, with the end of a log unless it is "" -> the exit code. Raises UserError for a log
    that cannot be read."""
    error = ""
    if log:
        require_readable(log, "no such file; name the output of a command that failed")
        error = "\n".join(Path(log).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
    findings = [finding._asdict() for finding in examine()]
    report = {
        "schema": 1,
        "rwkv_peft": __version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "findings": findings,
        "last_error": error,
    }
    print(redacted(json.dumps(report, indent=1, ensure_ascii=False)))
    return int(any(finding["status"] == MISSING for finding in findings))


def redacted(text: str) -> str:
    """A text without the current folder, this user's home and name, this machine's name, and keys."""
    secrets = {str(Path.cwd()): ".", str(Path.home()): "~", platform.node(): "HOST"}
    with suppress(OSError, KeyError, ImportError):  # a user without a name
        secrets[getpass.getuser()] = "USER"
    for secret, word in sorted(secrets.items(), key=lambda pair: -len(pair[0])):
        if len(secret) > 1:  # "/" as the current folder is no secret
            text = re.sub(rf"(?<![\w.-]){re.escape(secret)}(?![\w-])", word, text)
    return KEYS.sub("KEY", text)


def examine() -> Iterator[Finding]:
    """Yield every Finding, the cheap ones first; checks that need a missing package or a failing GPU are left out."""
    yield Finding("python", OK, f"{sys.version.split()[0]}, {sys.executable}")
    packages = [check_package(requirement) for requirement in requirements()]
    yield from packages
    yield from check_tools()
    yield check_processor()
    yield from check_driver()
    if Finding("torch", OK, version_of("torch") or "") in packages:
        devices = list(check_devices())
        yield from devices
        if all(finding.status != MISSING for finding in devices):
            yield from check_kernels()
    yield from check_memory()
    for name, use in OPTIONAL.items():
        version = version_of(name)
        yield Finding(name, OK, version) if version else Finding(name, NOTE, f"not installed ({use})")


def version_of(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> "list[Requirement]":
    """The requirements of training on this Python, from requirements.txt of the source tree, else from the installed
    package."""
    from packaging.requirements import Requirement  # an environment with torch has it

    path = Path(__file__).resolve().parents[3] / "requirements.txt"
    if path.is_file():
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        lines = requirements_of()
    found = [Requirement(line) for line in lines if line]
    return [requirement for requirement in found if requirement.marker is None or requirement.marker.evaluate()]


def check_package(requirement: "Requirement") -> Finding:
    """Check that a required package is installed, has a fitting version, and can be imported."""
    name, version = requirement.name, version_of(requirement.name)
    remedy = f"pip install '{name}{requirement.specifier}'"
    if version is None:
        return Finding(name, MISSING, "not installed", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, MISSING, f"{version}, and {requirement.specifier} is needed", remedy)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    except Exception as error:  # a broken install may raise anything, and the user must see it
        remedy = f"pip install --force-reinstall '{name}{requirement.specifier}'"
        return Finding(name, MISSING, f"{version} does not import: {summarize(error, named=True)}", remedy)
    return Finding(name, OK, version)


def check_tools() -> Iterator[Finding]:
    """Look for a C++ compiler and ninja."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler:
        yield Finding("compiler", OK, compiler)
    else:
        missing = "no C++ compiler: the fast CPU kernel and the offload strategies need one"
        yield Finding("compiler", NOTE, missing, COMPILER)
    if ninja := shutil.which("ninja"):
        yield Finding("ninja program", OK, ninja)
    elif version_of("deepspeed"):
        missing = "not in PATH: the offload strategies will not run, because DeepSpeed compiles their Adam with it"
        yield Finding("ninja program", NOTE, missing, "activate the environment, or pip install ninja")


def check_processor() -> Finding:
    """Name this machine's processor, by the system's name for it."""
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpus.read_text(errors="replace")) if cpus.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return Finding("processor", OK, f"{name}, {os.cpu_count()} logical cores")


def check_driver() -> Iterator[Finding]:
    """Name the version of NVIDIA's driver, or report its failure, if nvidia-smi is installed."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError):  # it is not installed
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
        except subprocess.TimeoutExpired:
            yield Finding("driver", NOTE, "nvidia-smi does not answer in a minute", "restart the machine")
            return
        lines = done.stdout.split("\n") + done.stderr.split("\n")
        first = next((line.strip() for line in lines if line.strip()), "nothing")
        if done.returncode:
            yield Finding("driver", NOTE, f"nvidia-smi fails: {first}", "install the driver, or restart the machine")
        else:
            yield Finding("driver", OK, first)


def check_devices() -> Iterator[Finding]:
    """Look for GPUs, and measure how fast this machine multiplies matrices in each precision."""
    import torch

    from ..gpus import refusal, without_code
    from ..ops.products import row

    reason, remedy = refusal()
    if reason:
        text = f"there is one, and torch {torch.__version__} cannot use it: {reason}"
        yield Finding("GPU", MISSING, text, f"{remedy}, or train with --accelerator cpu")
        return
    has_gpu = torch.cuda.is_available()
    for index in range(torch.cuda.device_count() if has_gpu else 0):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        text = f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}, torch's CUDA {torch.version.cuda}"
        lacking, remedy = without_code(index)
        if lacking:
            yield Finding(f"GPU {index}", NOTE, lacking, remedy)
        elif gpu.major < 8:
            yield Finding(f"GPU {index}", NOTE, f"{text}: it multiplies bf16 slowly", "--precision fp16")
        else:
            yield Finding(f"GPU {index}", OK, text)
    if not has_gpu:
        built = "" if torch.version.cuda else f", and torch {torch.__version__} is built without CUDA"
        remedy = "if there is one, `nvidia-smi` must list it, and torch must be a build with CUDA"
        yield Finding("GPU", NOTE, f"none{built}: training runs on the CPU", remedy)
    device = "cuda" if has_gpu else "cpu"
    try:
        fp32, bf16 = (matmul_speed(dtype, device) for dtype in (torch.float32, torch.bfloat16))
    except RuntimeError as error:  # no code for a card of this age, no memory left, another program's sole use, …
        remedy = (
            "end other programs that use it, take a build of torch with code for it, or train with --accelerator cpu"
        )
        yield Finding("GPU", MISSING, f"torch sees one and cannot compute on it: {summarize(error)}", remedy)
        return
    yield Finding("products", OK, f"on CPUs {row()} ({row().known})") if has_gpu else check_products()
    advice = "bf16 is faster and takes" if bf16 > fp32 else "fp32 is faster, bf16 takes"
    cores = f" on {torch.get_num_threads()} threads" if device == "cpu" else ""
    measured = f"matrix products: fp32 {fp32:,.0f}, bf16 {bf16:,.0f} GFLOP/s{cores}"
    yield Finding("--precision", OK, f"{advice} half the memory ({measured})")


def check_products() -> Finding:
    """Compare the row of the table by which this processor multiplies with what is measured."""
    import torch

    from ..ops.products import ProductRow, computing, row

    own, halves, singles = row(), {}, {}
    for choice in (True, False):
        with computing(ProductRow(choice, own.onednn)):
            halves[choice] = matmul_speed(torch.bfloat16, "cpu")
        if not choice or torch.backends.mkldnn.is_available():
            with computing(ProductRow(own.bf16, choice)):
                singles[choice] = matmul_speed(torch.float32, "cpu")
    choices = ((own.bf16, halves), (own.onednn, singles))
    bf16, onednn = (x if max(speeds.values()) <= MARGIN * speeds[x] else not x for x, speeds in choices)
    fastest = ProductRow(bf16, onednn)
    measured = f"bfloat16 as it is {halves[True]:,.0f}, in float32 {halves[False]:,.0f}; float32 by torch "
    measured += f"{singles[False]:,.0f}" + f", by oneDNN {singles[True]:,.0f}" * (True in singles) + " GFLOP/s"
    text = f"{own} ({own.known}; measured: {measured})"
    if fastest.recorded() == own.recorded():
        return Finding("products", OK, text)
    remedy = "the table in rwkv_peft/ops/products.py does not know this processor so; tell its maintainers this line"
    return Finding("products", NOTE, f"{text}: {fastest} is faster", remedy)


def matmul_speed(dtype: "torch.dtype", device: str, size: int = 1024) -> float:
    """Measure the GFLOP/s of a product of two (size, size) matrices, as models compute it."""
    import torch

    from ..ops.products import matmul

    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        matmul(a, a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def check_kernels() -> Iterator[Finding]:
    """Check the backends of each recurrence, and on a GPU the other kernels; those that can be compiled are."""
    import torch

    from ..models import FAMILIES
    from ..ops.cuda_kernels import KERNELS

    backends = {family.kernel: family.kernels() for family in FAMILIES}
    for kernel, found in backends.items():
        for name, reason in found.items():
            yield Finding(f"{kernel} {name}", OK if reason is None else NOTE, reason or "usable")
    for name, family in KERNELS if torch.cuda.is_available() else ():
        reason = family.unavailable()
        yield Finding(name, OK if reason is None else NOTE, reason or "usable")


def check_memory() -> Iterator[Finding]:
    """Look at main memory, and at the disk of the current folder."""
    total, free = main_memory()
    if total:
        yield Finding(
            "memory", OK, f"{total / 2**30:.1f} GiB" + (f", {free / 2**30:.1f} GiB available" if free else "")
        )
    disk = room_at(".")
    low = disk < 5 * 2**30
    need = ": a 7B model and its checkpoints need 30 GiB" if low else ""
    yield Finding("disk", NOTE if low else OK, f"{disk / 2**30:.0f} GiB free in {Path.cwd()}{need}")


def report_model(path: str) -> int:
    """Print the content of a file or folder, and its commands -> 0, or 1 if there are none. Raises UserError."""
    from ..checkpoints.adapters import AdapterSource
    from ..release.inspect import contents_of, formatted

    contents = contents_of(AdapterSource(path))
    print(formatted(line for line in contents.lines if line[0] in SHORT))
    commands = list(suited(path, contents))
    print(f"\n{formatted(commands)}" if commands else "\nno command of rwkv-peft takes it")
    return 0 if commands else 1


def suited(path: str, contents: "Contents") -> Iterator[tuple[str, str]]:
    """Yield (purpose, command) for a file or folder with these Contents."""
    from ..checkpoints.adapters import product_of_run
    from ..checkpoints.base import Base
    from ..data.recorded import flags_beside
    from ..models.layout import state_parts_flag

    kind, held = contents.what, contents.holds
    if kind == "model" and product_of_run(path).suffix != ".pth":
        kind = "model of another tool"
    only_pth, trains = isinstance(held, Base) and not held.family.gguf_architecture, ""
    if isinstance(held, Base) and held.has_states:  # which no other form of a model starts from
        only_pth, trains = True, f" --train_parts state{state_parts_flag(held.tensors)}"
    for purpose, command in COMMANDS.get(kind, ()):
        if not (only_pth and (purpose, command) in CONVERSIONS):
            command += trains if " train " in command else ""
            yield purpose, command.format(shlex.quote(str(Path(path)))).replace("--chat", flags_beside(path))
