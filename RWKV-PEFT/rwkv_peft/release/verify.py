"""Compare every installed runtime with our model, for `rwkv-peft check --runtimes`.

Feeds one random token sequence to our model in float64 and to each runtime, and prints the largest differences of
their logits. Runtimes read a float32 copy of the file, so that their arithmetic is judged and not the file's dtype;
llama.cpp reads a GGUF of each type asked for. Needs memory for the model in float64.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpoints.atomic import scratch_folder
from ..checkpoints.base import Base, open_base
from ..checkpoints.state_file import read_states
from ..checkpoints.tensors import save_pth
from ..cli.errors import UserError, told
from ..config import ModelConfig
from ..data.tokenizer import WorldTokenizer
from ..models.state import is_time_state
from .gguf import write_gguf
from .runtimes import NOT_LOOKED_FOR, Runtime, all_runtimes, random_tokens, reference_logits
from .vocabulary import table_vocabulary

# The largest difference allowed between a format's logits and the reference, in standard deviations of the logits.
LIMITS = (("fp32", 1e-4), ("f32", 1e-3), ("f16", 2e-2), ("bf16", 1e-1), ("q8_0", 3e-1))


class Row(NamedTuple):
    """One line of the table; difference is None if the runtime was not asked or broke, and note says why."""

    runtime: str
    version: str
    form: str
    difference: float | None
    limit: float | None
    note: str
    broke: bool = False

    @property
    def failed(self) -> bool:
        return self.broke or (
            self.difference is not None and self.limit is not None and not self.difference <= self.limit
        )


def runtimes_agree(args: argparse.Namespace) -> bool:
    """Print the table of the model --merged; return False if a runtime disagrees or breaks. If no adapter explains its
    differences, the structure is compared with that of --base_model."""
    model = open_base(args.merged)
    if args.base_model and not args.bone_checkpoint:
        compare_structure(model, open_base(args.base_model))
        print(f"{args.merged} has the keys, order, shapes and dtypes of {args.base_model}")
    if args.state:
        states = read_states(args.state)
        states.check_base(model)
        model = states.added_to(model)
    if model.has_states and not model.family.states_in_model:
        print(NOT_LOOKED_FOR.format(model.family.name))
    rows = verify(model, args.tokens, tuple(args.gguf_types))
    print_table(rows)
    if not any(row.broke or row.difference is not None for row in rows):
        remedy = "install one of them" if any("pip install" in row.note for row in rows) else "none takes this model"
        raise UserError(f"no runtime was asked, for the reasons above; {remedy}")
    return not any(row.failed for row in rows)


def compare_structure(model: Base, base: Base) -> None:
    """Raise UserError unless two Bases agree in keys, order, shapes and dtypes; the model may have more time states."""
    added = [key for key in model.tensors if key not in base.tensors]
    own = [key for key in model.tensors if not (key in added and is_time_state(key))]
    if own != list(base.tensors):
        odd = sorted(set(own) ^ set(base.tensors)) or ["their order"]
        raise UserError(f"{model.path} and {base.path} differ in {len(odd)} keys, such as {odd[0]}")
    for key, tensor in base.tensors.items():
        found = model.tensors[key]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise UserError(
                f"{model.path}: {key} is {tuple(found.shape)} {found.dtype}, in {base.path} "
                f"{tuple(tensor.shape)} {tensor.dtype}"
            )


def verify(model: Base, length: int = 50, gguf_types: Sequence[str] = ("f32", "f16")) -> list[Row]:
    """Ask every runtime about a Base -> the table's rows."""
    config = model.config
    tokens = random_tokens(config.vocab_size, length)
    reference = reference_logits(model, tokens)
    rows = []
    with scratch_folder() as folder:
        for runtime in all_runtimes():
            without = "takes no initial state" if model.has_states and runtime.package != "rwkv" else ""
            reason = runtime.missing() or runtime.refuses(config) or without
            for form in ("fp32",) if runtime.form == "pth" else gguf_types:
                if reason:
                    rows.append(Row(runtime.name, "", form, None, None, f"not asked: {reason}"))
                else:
                    path = written(folder, form, model)
                    rows.append(ask(runtime, path, form, tokens, config, reference))
    return rows


def ask(
    runtime: Runtime, path: Path, form: str, tokens: torch.Tensor, config: ModelConfig, reference: torch.Tensor
) -> Row:
    """Ask one runtime about a file -> its Row, which notes an exception, so that the other runtimes are asked."""
    try:
        logits = runtime.logits(path, tokens, config)
        return Row(runtime.name, runtime.version(), form, *judge(logits, reference, form, runtime.shifted), "")
    except Exception as error:
        return Row(runtime.name, "", form, None, None, f"failed: {told(error, named=True)}", broke=True)


def written(folder: Path, form: str, model: Base) -> Path:
    """Return the path of a Base as fp32 .pth or as GGUF of a type; the file is written at the first request."""
    path = folder / (f"{form}.pth" if form == "fp32" else f"{form}.gguf")
    if path.exists():
        return path
    if form == "fp32":
        save_pth(path, model.tensors, dict.fromkeys(model.tensors, torch.float32))
    else:
        # any vocabulary will do, because the runtime is given token ids
        write_gguf(path, model, form, table_vocabulary(WorldTokenizer().token_bytes, model.config.vocab_size))
    return path


def judge(logits: torch.Tensor, reference: torch.Tensor, form: str, shifted: bool) -> tuple[float, float]:
    """Compare logits with the reference -> (largest absolute difference, largest allowed).

    If `shifted`, log-probabilities are compared, at the last positions only, as many as the runtime gives. They are
    normalized again in float64, because a float32 sum over a large vocabulary shifts all of them alike, which says
    nothing about the model. A NaN counts as an infinite difference.
    """
    logits = logits.double()
    if shifted:
        logits, reference = logits.log_softmax(-1), reference.log_softmax(-1)[-len(logits) :]
    difference = (logits - reference).abs().max().item()
    limit = dict(LIMITS)[form] * reference.std().item()
    return (float("inf") if difference != difference else difference), limit


def print_table(rows: Iterable[Row]) -> None:
    print(f"| {'runtime':<22} | {'version':<16} | {'format':<6} | max difference | allowed |")
    print(f"|{'-' * 24}|{'-' * 18}|{'-' * 8}|{'-' * 16}|{'-' * 9}|")
    for row in rows:
        found = row.note if row.note else f"{row.difference:14.1e}"
        limit = "" if row.limit is None else f"{row.limit:7.1e}" + ("  FAILED" if row.failed else "")
        print(f"| {row.runtime:<22} | {row.version:<16} | {row.form:<6} | {found:<14} | {limit:<7} |")
