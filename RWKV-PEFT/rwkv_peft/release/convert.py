"""Convert models, states and adapters between the formats of tools: `rwkv-peft convert INPUT OUTPUT`.

INPUT's content and OUTPUT's ending choose the conversion: models and states by the table of formats.py, and with --to
hf or fla to a folder of transformers or flash-linear-attention; adapters to RWKV-PEFT's .pth and ours, with --to lora
to plain LoRA (lora.py), with --to lightning to rwkv_lightning_cuda's .pth.
"""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from ..adapters.methods import adapter_parameter
from ..checkpoints.adapter_file import METADATA_KEY, AdapterMetadata, save_adapter
from ..checkpoints.adapter_folders import (
    CONFIG,
    TENSORS,
    is_adapter_folder,
    is_lightning,
    write_lightning,
    write_lora_folder,
)
from ..checkpoints.adapters import product_of_run, source_of
from ..checkpoints.atomic import atomic_write, check_output
from ..checkpoints.base import base_of, open_base
from ..checkpoints.rwkv_peft_file import unwrapped, upstream_form, write_rwkv_peft
from ..checkpoints.state_file import is_own, read_states, write_states
from ..checkpoints.tensors import DTYPES, read_safetensors, read_tensors
from ..cli.errors import UserError, short, some
from ..cli.parser import counted
from ..data.recorded import chat_beside, find_tokenizer, recorded_beside
from ..models.state import check_time_states, is_time_state, split_time_states
from .compatibility import check_fit
from .flags import convert_flags
from .formats import FLA, FOLDER, GGUF_TYPE, HF, Wanted, cast, describe, format_of, write_gguf_lora
from .lora import describe_errors, lora_form

LIGHTNING = "lightning"  # a value of --to
FOREIGN = "model.layers."  # the prefix of the blocks' keys in transformers' models


def main(argv: list[str]) -> int:
    args = convert_flags(argv)
    source, target = product_of_run(args.input, tell=True), Path(args.output)
    args.ending = ending_of(args)
    flags = ("base_model", "lora_init", "tokenizer")
    inputs = [("the input", source), *((f"--{name}", getattr(args, name)) for name in flags)]
    form, adapted = format_of(args.ending), is_adapter(source)
    files = [target] if form is None else form.files(target)
    if adapted:
        files = [target] if args.ending else [target / CONFIG, target / TENSORS]
    for file in files:
        check_output("the output", file, inputs)
    given = Path(args.input)
    if given.is_dir() and target.resolve().is_relative_to(given.resolve()):  # it would hold two things for its readers
        raise UserError(f"the output {target} is inside the input {given}; name a place outside of it")
    if not args.ending and target.is_dir():
        refuse_strangers(target, {file.name for file in files})
    if args.to and adapted == (args.to in (FLA, HF)):
        kinds = "an adapter, and only models convert" if adapted else "no adapter, and only adapters convert"
        raise UserError(f"{source} holds {kinds} to {args.to}; leave --to {args.to} out")
    refuse_unread(args, target, adapted)
    written = convert_adapter(source, target, args) if adapted else convert_model(source, target, args)
    for line in written:
        print(f"wrote {line}")
    return 0


def ending_of(args: argparse.Namespace) -> str:
    """The ending that chooses the output's format; "" for a folder, by --to, a slash at the end or the disk, because a
    folder's name may have a dot. Raises UserError for the name of a file if --to writes a folder."""
    ending = Path(args.output).suffix
    if args.output.endswith("/") or Path(args.output).is_dir():
        return ""
    if args.to not in (FLA, HF):
        return ending
    if format_of(ending) not in (None, FOLDER):
        raise UserError(f"--to {args.to} writes a folder, and {args.output} names a {ending} file; leave that out")
    return ""


def refuse_strangers(folder: Path, expected: Collection[str]) -> None:
    """Raise UserError if a folder holds anything but the files of an earlier conversion, `expected`."""
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in expected and path.name[0] != ".")
    if strangers:
        raise UserError(
            f"the output {folder} is a folder that holds {some(strangers)}, and no earlier conversion wrote that; name "
            "a new folder, or an empty one"
        )


def refuse_unread(args: argparse.Namespace, target: Path, adapted: bool) -> None:
    """Raise UserError for a flag that has no effect on this output; adapted is True if the input is an adapter."""
    form, gguf = format_of(args.ending), args.ending == ".gguf"
    reason = "an adapter's tensors keep their dtypes" if adapted else "the type of a GGUF is --gguf_type's"
    for name, is_read, why in (
        ("dtype", not adapted and not gguf or args.dtype == "keep", reason),
        ("gguf_type", not adapted and gguf, "that is for a model's .gguf"),
        ("tokenizer", not adapted and form is not None and form.vocabulary, "that goes into a model's .gguf or folder"),
        ("bone_parameter", adapted and not args.to and args.ending == ".pth", "that is for an adapter's .pth"),
    ):
        if not is_read and (value := getattr(args, name)) is not None:
            raise UserError(f"--{name} {value} would change nothing of {target}: {why}; leave it out")


def is_adapter(path: Path) -> bool:
    """True if a file or folder holds an adapter, other than of time states only. Files of unknown endings hold none."""
    if path.is_dir():
        return is_adapter_folder(path) or is_lightning(path)
    if path.suffix in (".safetensors", ".st", ".state"):
        tensors, header = read_safetensors(path)
        return METADATA_KEY in header and not all(map(is_time_state, tensors))
    return path.suffix == ".pth" and (is_lightning(path) or any(map(adapter_parameter, read_tensors(path))))


def convert_adapter(source: Path, target: Path, args: argparse.Namespace) -> Sequence[Path | str]:
    """Write an adapter in the target's format; return the paths written, or lines about them."""
    base = open_base(args.base_model) if args.base_model else None
    tensors = None if base is None else base.tensors
    adapter = source_of(args, source).read(tensors)
    metadata = adapter.metadata
    if args.to and base is not None:
        metadata.require_base(source, base, "give its own base as --base_model")
    ending, remark = args.ending, ""
    if args.to == LIGHTNING:
        if base is None or ending != ".pth":
            raise UserError(
                f"--to {LIGHTNING} writes a .pth that names its base's file by digest: give --base_model, and a name "
                f"that ends in .pth for {target}"
            )
        check_fit(source, adapter, base)
        kind = write_lightning(target, adapter, base)
        layers = counted(len(adapter.modules()), "layer")
        return [f"{target}: D of {layers} in {kind}; rwkv_lightning_cuda serves it on {base.path} alone"]
    if args.to:
        adapter, errors = lora_form(adapter, tensors, args.lora_rank)
        assert metadata.method is not None  # lora_form needed it
        what = f"LoRA of rank {adapter.metadata.rank} of {counted(len(adapter.modules()), 'layer')}"
        quantized = "" if metadata.quant == "none" else f", for the base as --quant {metadata.quant} keeps it"
        remark = f": {what}, {describe_errors(metadata.method, errors)}{quantized}"
    if ending == "" and args.to:
        write_lora_folder(target, adapter, "" if base is None else str(base.path))
        return [f"{target}{remark}; Hugging Face peft loads it (PeftModel.from_pretrained)"]
    if ending == ".gguf" and args.to:
        if base is None:
            raise UserError(f"{target}: a GGUF names its model's generation; give --base_model")
        with atomic_write(target) as temporary:
            write_gguf_lora(temporary, base.family, adapter.modules())
        return [f"{target}{remark}; llama.cpp loads it beside the GGUF of its base (--lora)"]
    if ending == ".pth":
        paths = write_rwkv_peft(target, adapter, args.bone_parameter or "disha", tensors)
        print(remark_on_export(adapter.metadata, paths), end="")
        return [f"{paths[0]}{remark}", *paths[1:]]
    if ending == ".safetensors":
        save_adapter(target, adapter.tensors, adapter.metadata)
        return [f"{target}{remark}"]
    raise UserError(
        f"{source} is an adapter, which {target.name} cannot hold: name a .pth (RWKV-PEFT) or a .safetensors, with "
        "--to lora also a folder (peft) or a .gguf (llama.cpp); for other formats merge it with merge_bone.py first"
    )


def remark_on_export(metadata: AdapterMetadata, paths: Sequence[Path]) -> str:
    """Lines on the flags and files that merging needs besides those of write_rwkv_peft; "" if there are none."""
    note = ""
    if metadata.quant != "none":
        note = f"it was trained on a base quantized to {metadata.quant}, which the file does not record: merge it with "
        note += f"merge_bone.py --quant {metadata.quant}\n"
    if len(paths) > 1:
        return (
            f"as PiSSA it is merged into the original base with {paths[1].name} as the init file "
            f"(merge_bone.py --lora_init)\n{note}"
        )
    method = metadata.method
    return note + ("" if method is None else upstream_form(method).remark(metadata.rank, metadata.scale))


def read_model(path: Path) -> dict[str, torch.Tensor]:
    """Read a model, or time states only, from any format -> {official key: tensor}.

    The order is the file's, because two orders are official; from a format that sorts by name, it is RWKV-LM's.
    """
    tensors = read_any(path)
    if all(is_time_state(key) for key in tensors):
        check_time_states(tensors, path)
        return tensors
    if (foreign := next((key for key in tensors if key.startswith(FOREIGN)), None)) is not None:
        folder = "" if path.is_dir() else ", or give the whole folder of one in flash-linear-attention's layout"
        raise UserError(
            f"{path} is a model of another kind (it has {short(foreign)}), which is not read here; take the .pth that "
            f"an RWKV model was released as{folder}"
        )
    base = base_of(tensors, path)
    weights = list(split_time_states(tensors)[0])
    if path.suffix == ".pth" or (weights[0], weights[-1]) == ("emb.weight", "head.weight"):
        return tensors
    order = {key: place for place, key in enumerate(base.family.shapes(base.config))}
    return {key: tensors[key] for key in sorted(tensors, key=lambda key: order.get(key, len(order)))}


def read_any(path: Path) -> dict[str, torch.Tensor]:
    """Read a file or folder in any format -> {official key: tensor}, without a check of its kind."""
    if is_own(path):
        return read_states(path).tensors  # train.py's file: axes as in a .pth, unlike web-rwkv's .safetensors
    form = FOLDER if path.is_dir() else format_of(path.suffix)
    if form is None or path.suffix == ".pth":
        return unwrapped(read_tensors(path))
    return form.read(path)


def convert_model(source: Path, target: Path, args: argparse.Namespace) -> list[str]:
    """Write a model or time states in the target's format; return lines about the output."""
    tensors, form = read_model(source), format_of(args.ending, args.to)
    states = all(is_time_state(key) for key in tensors)
    if form is None or (states and not form.states):
        raise UserError(
            f"{target}: its ending names no format for {source}; known are .pth, .safetensors, .st, .state, and for a "
            "model .gguf, or for a folder of a model --to hf, a slash at the end of its name, or no ending"
        )
    dtype = None if states else form.dtype
    if args.dtype is not None:
        dtype = DTYPES.get(args.dtype)  # None for "keep"
    if states:
        write_states(target, dict(cast(tensors, dtype)))
        return [f"{target}: {describe(tensors, dtype)} (time states)"]
    base = base_of(tensors, source)
    tokenizer = None
    if form.vocabulary:
        tokenizer = find_tokenizer(args.tokenizer, base.config.vocab_size, recorded_beside(source), print)
    what = form.write_model(target, base, Wanted(dtype, args.gguf_type or GGUF_TYPE, tokenizer, chat_beside(source)))
    if base.has_states and not (form.states_in_model and not base.family.unread_states(tensors)):
        print(
            f"note: {target} holds tuned states, and its runtimes take those only as a separate file, if at all: the "
            "run's state.pth, or the file of merge_bone.py --state_output"
        )
    vocabulary = f", vocabulary {tokenizer.name}" if tokenizer else ""
    return [f"{target}: {what}{vocabulary}; {form.loaded_by}"]
