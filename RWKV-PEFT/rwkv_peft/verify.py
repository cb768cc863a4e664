"""Does every installed runtime compute what the file says? `python -m rwkv_peft.verify merged.pth [--base base.pth]`

Feeds one random token sequence to our model in float64 and to each runtime, and prints the largest differences of
their logits. Runtimes read a float32 copy of the file, so that their arithmetic is judged and not its dtype; llama.cpp
reads GGUF files of each type asked for. Needs memory for the model in float64.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoint import check_state, load_base
from .cli import Parser
from .convert import vocabulary
from .errors import UserError, exit_on_user_error
from .gguf_file import TYPES, write_gguf
from .pth_writer import TensorSpec, write_pth
from .runtimes import all_runtimes, reference_logits

# How far a format's logits may be from the reference, relative to the logits' spread (standard deviation).
LIMITS = (("fp32", 1e-4), ("f32", 1e-3), ("f16", 2e-2), ("bf16", 1e-1), ("q8_0", 3e-1))


class Row(NamedTuple):
    """One line of the table; difference is None where the runtime was not asked or broke, and note says why."""

    runtime: str
    version: str
    form: str
    difference: float | None
    limit: float | None
    note: str
    broke: bool = False

    @property
    def failed(self):
        return self.broke or (self.difference is not None and not self.difference <= self.limit)


def build_parser():
    parser = Parser(prog="python -m rwkv_peft.verify", description=__doc__.split("\n\n")[1])
    parser.add_argument("model", help="the .pth to verify")
    parser.add_argument("--base", metavar="PTH", help="also require the keys, order, shapes and dtypes of this base")
    parser.add_argument("--tokens", type=int, default=50, help="length of the sequence (default 50)")
    parser.add_argument(
        "--gguf_types",
        nargs="*",
        choices=TYPES,
        default=["f32", "f16"],
        help="types of GGUF for llama.cpp (default f32 f16; none: leave it out)",
    )
    return parser


def main(argv):
    """Print the table; 0 where all is well, 1 where a runtime disagrees or breaks. Raises UserError for an unusable
    file."""
    args = build_parser().parse_args(argv)
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: at least one is needed")
    state = load_base(args.model)
    if args.base:
        compare_structure(args.model, state, args.base, load_base(args.base))
        print(f"{args.model} has the keys, order, shapes and dtypes of {args.base}")
    rows = verify(state, args.tokens, tuple(args.gguf_types))
    print_table(rows)
    if not any(row.broke or row.difference is not None for row in rows):
        raise UserError("no runtime was asked, for the reasons above; pip install rwkv rwkv-simple xllamacpp gguf")
    return int(any(row.failed for row in rows))


def compare_structure(name, state, base_name, base):
    """Raise UserError unless two state dicts agree in all but their values (and time states that were added)."""
    added = [key for key in state if key not in base]
    own = [key for key in state if not (key in added and key.endswith("time_state"))]
    if own != list(base):
        odd = sorted(set(own) ^ set(base)) or ["their order"]
        raise UserError(f"{name} and {base_name} differ in {len(odd)} keys, such as {odd[0]}")
    for key, tensor in base.items():
        if state[key].shape != tensor.shape or state[key].dtype != tensor.dtype:
            raise UserError(
                f"{name}: {key} is {tuple(state[key].shape)} {state[key].dtype}, in {base_name} "
                f"{tuple(tensor.shape)} {tensor.dtype}"
            )


def verify(state, length=50, gguf_types=("f32", "f16")):
    """The table's rows for a state dict."""
    config = check_state(state)
    tokens = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    reference = reference_logits(state, tokens, config)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for runtime in all_runtimes():
            stateful = "blocks.0.att.time_state" in state and runtime.package != "rwkv"
            reason = runtime.missing() or runtime.refuses(config) or ("takes no initial state" if stateful else "")
            for form in ("fp32",) if runtime.form == "pth" else gguf_types:
                if reason:
                    rows.append(Row(runtime.name, "", form, None, None, f"not asked: {reason}"))
                else:
                    path = written(Path(folder), form, state, config)
                    rows.append(ask(runtime, path, form, tokens, config, reference))
    return rows


def ask(runtime, path, form, tokens, config, reference):
    """The Row of one runtime that reads the file at path; whatever it raises is told in the row, so that the others are
    asked all the same."""
    try:
        logits = runtime.logits(path, tokens, config)
        return Row(runtime.name, runtime.version(), form, *judge(logits, reference, form, runtime.shifted), "")
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return Row(runtime.name, "", form, None, None, f"failed: {words[:200]}", broke=True)


def written(folder, form, state, config):
    """Path of the model as fp32 .pth or as GGUF of a type, written at the first demand."""
    path = folder / (f"{form}.pth" if form == "fp32" else f"{form}.gguf")
    if path.exists():
        return path
    if form == "fp32":
        write_pth(
            path,
            {key: TensorSpec.of(tensor, torch.float32) for key, tensor in state.items()},
            ((key, tensor.float()) for key, tensor in state.items()),
        )
    else:
        write_gguf(path, state, config, form, vocabulary(config.vocab_size))
    return path


def judge(logits, reference, form, shifted):
    """(largest absolute difference, largest allowed); log-probabilities are compared for the last positions that a
    runtime gives. A NaN counts as an infinite difference."""
    if shifted:
        reference = reference.log_softmax(-1)[-len(logits) :]
    difference = (logits.double() - reference).abs().max().item()
    limit = dict(LIMITS)[form] * reference.std().item()
    return (float("inf") if difference != difference else difference), limit


def print_table(rows):
    print(f"| {'runtime':<22} | {'version':<16} | {'format':<6} | max difference | allowed |")
    print(f"|{'-' * 24}|{'-' * 18}|{'-' * 8}|{'-' * 16}|{'-' * 9}|")
    for row in rows:
        found = row.note if row.note else f"{row.difference:14.1e}"
        limit = "" if row.limit is None else f"{row.limit:7.1e}" + ("  FAILED" if row.failed else "")
        print(f"| {row.runtime:<22} | {row.version:<16} | {row.form:<6} | {found:<14} | {limit:<7} |")


if __name__ == "__main__":
    exit_on_user_error(main)
