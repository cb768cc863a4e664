"""Models, states and adapters in the formats of other tools: `python -m rwkv_peft.convert INPUT OUTPUT`.

What is converted follows from INPUT's content and OUTPUT's ending:

- model.pth -> .st or .safetensors (web-rwkv, Ai00), .gguf (llama.cpp), a folder (Hugging Face layout)
- .st, .safetensors or a Hugging Face folder -> model.pth
- a state file (.pth with time_state tensors alone) <-> .st, .state, .safetensors (Ai00)
- an adapter (train.py's .safetensors, a folder of peft, RWKV-PEFT's .pth) -> .pth for RWKV-PEFT, or .safetensors
"""

import json
from pathlib import Path

import torch

from .adapter_file import METADATA_KEY, adapter_parameter, read_adapter, save_adapter
from .atomic import atomic_write, check_output
from .checkpoint import check_state, expected_shapes, load_base, model_config_from_state
from .cli import Parser, alias
from .config import BONE_MODES, MODE_ALIASES
from .errors import UserError, exit_on_user_error
from .foreign import write_rwkv_peft
from .gguf_file import TYPES, write_gguf
from .names import from_hf, from_web, swapped_in_web, to_hf, to_web
from .pth import all_finite, read_state
from .pth_writer import TensorSpec, write_pth
from .safetensors_reader import read_safetensors
from .safetensors_writer import write_safetensors

SAFETENSORS = (".safetensors", ".st", ".state")
VOCABULARY = "rwkv_vocab_v20230424.txt"
HF_FILES = ("model.safetensors", "config.json", "tokenizer_config.json", VOCABULARY)


def build_parser():
    parser = Parser(prog="python -m rwkv_peft.convert", description=__doc__.split("\n\n")[0])
    parser.add_argument("input")
    parser.add_argument("output", help=".pth, .safetensors / .st / .state, .gguf, or the name of a folder")
    parser.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp16", "fp32"),
        help="dtype of the output's tensors; default fp16 for models in .st and .safetensors, which "
        "web-rwkv needs, else keep",
    )
    parser.add_argument(
        "--gguf_type", choices=TYPES, default="f16", help="type of a GGUF's large matrices (default f16)"
    )
    parser.add_argument(
        "--bone_parameter",
        choices=("disha", "bone"),
        default="disha",
        help="name of Bone's tensors in RWKV-PEFT's files: disha since 2025-02, bone before",
    )
    parser.add_argument(
        "--bone_mode",
        type=alias(MODE_ALIASES),
        choices=BONE_MODES,
        help="variant of a .bone file that does not tell it; bat is bat-in, as in RWKV-PEFT",
    )
    parser.add_argument(
        "--base_model",
        metavar="PTH",
        help="base of an adapter, whose shapes may tell the variant, and how wide bone-mini is as RWKV-PEFT's bone",
    )
    parser.add_argument("--lora_init", metavar="PTH", help="init file of RWKV-PEFT's PiSSA")
    parser.add_argument("--lora_alpha", type=float, help="alpha of RWKV-PEFT's LoRA")
    return parser


def main(argv):
    """argv -> exit code 0. Raises UserError for what cannot be read, or not be said in the other format."""
    args = build_parser().parse_args(argv)
    source, target = Path(args.input), Path(args.output)
    for file in [target / name for name in HF_FILES] if target.suffix == "" else [target]:
        check_output(
            "the output",
            file,
            (("the input", source), ("--base_model", args.base_model), ("--lora_init", args.lora_init)),
        )
    if is_adapter(source):
        written = convert_adapter(source, target, args)
    else:
        state = read_model(source)
        written = convert_state(state, source, target, args)
    for path in written:
        print(f"wrote {path}")
    return 0


def is_adapter(path):
    """Whether a file or folder holds an adapter; for what is unreadable, the reader that follows says so."""
    if path.is_dir():
        return (path / "adapter_config.json").is_file()
    if path.suffix in SAFETENSORS:
        return METADATA_KEY in read_safetensors(path)[1]
    return any(adapter_parameter(key) for key in read_state(path)) if path.suffix == ".pth" else False


def convert_adapter(source, target, args):
    base = load_base(args.base_model) if args.base_model else None
    adapter = read_adapter(source, args.bone_mode, base, args.lora_init, args.lora_alpha)
    if target.suffix == ".pth":
        paths = write_rwkv_peft(target, adapter, args.bone_parameter, base)
        print(remark_on_export(adapter.metadata, paths), end="")
        return paths
    if target.suffix == ".safetensors":
        save_adapter(target, adapter.tensors, adapter.metadata)
        return [target]
    raise UserError(
        f"{source} is an adapter, which {target.name} cannot hold: name a .pth (RWKV-PEFT) or a "
        ".safetensors; for other formats merge it with merge_bone.py first"
    )


def remark_on_export(metadata, paths):
    """A line on what merging the files of write_rwkv_peft takes besides them, or ""."""
    if metadata.variant == "lora":
        return (
            f"RWKV-PEFT's LoRA files do not hold alpha: it is {metadata.scale * metadata.rank:g}; give it to the "
            "merge, "
            "RWKV-PEFT's or merge_bone.py's (--lora_alpha)\n"
        )
    if len(paths) > 1:
        return (
            f"as PiSSA it is merged into the original base with {paths[1].name} as the init file "
            "(merge_bone.py --lora_init)\n"
        )
    return ""


def read_model(path):
    """Official state dict of a model, or of time states alone, from a .pth, .st, .safetensors or HF folder."""
    if path.is_dir():
        state = {}
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{path} is a folder without .safetensors files; is it a Hugging Face model?")
        for file in files:
            state |= {from_hf(key): tensor for key, tensor in read_safetensors(file)[0].items()}
    elif path.suffix in SAFETENSORS:
        state = {from_web(key): tensor for key, tensor in read_safetensors(path)[0].items()}
        state = {key: tensor.transpose(-1, -2) if swapped_in_web(key) else tensor for key, tensor in state.items()}
    elif path.suffix == ".gguf":
        raise UserError(f"{path}: GGUF files are written here and not read; give the .pth that it was made of")
    else:
        state = read_state(path)
    if not state:
        raise UserError(f"{path} holds no tensor; copy it again")
    if all(key.endswith(".att.time_state") for key in state):
        check_time_states(state, path)
        return state
    config = check_state(state, path)
    if path.suffix == ".pth":  # its own order is kept
        return state
    order = {key: place for place, key in enumerate(expected_shapes(config))}
    return {key: state[key] for key in sorted(state, key=lambda key: order.get(key, len(order)))}


def check_time_states(state, path):
    """Raise UserError unless a state file holds one time state (H, N, N) in floating point for each layer from 0 on."""
    missing = [key for key in (f"blocks.{i}.att.time_state" for i in range(len(state))) if key not in state]
    if missing:
        raise UserError(
            f"{path} holds {len(state)} time states and no {missing[0]}; a state file has one for every layer of the "
            "model, from 0 on: save them all"
        )
    first = next(iter(state.values()))
    for key, tensor in state.items():
        if tensor.dim() != 3 or tensor.shape[1] != tensor.shape[2] or tensor.shape != first.shape:
            raise UserError(
                f"{path}: {key} has shape {tuple(tensor.shape)}; a time state is (heads, head size, head size), the "
                "same in every layer"
            )
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise UserError(
                f"{path}: {key} is {str(tensor.dtype).removeprefix('torch.')}; bfloat16, float16 or float32 is due"
            )


def convert_state(state, source, target, args):
    """Write a model or time states under `target`'s format; returns the paths written."""
    is_model = "emb.weight" in state
    if target.suffix == ".gguf":
        if not is_model:
            raise UserError(
                f"{source} holds time states, for which GGUF has no place; give them to the runtime as .pth or .st"
            )
        config = model_config_from_state(state)
        with atomic_write(target) as temporary:
            write_gguf(temporary, state, config, args.gguf_type, vocabulary(config.vocab_size))
    elif target.suffix in SAFETENSORS:
        dtype = args.dtype or ("fp16" if is_model else "keep")
        tensors = {
            to_web(key): tensor.transpose(-1, -2) if swapped_in_web(key) else tensor for key, tensor in state.items()
        }
        _write(target, write_safetensors, tensors, dtype)
    elif target.suffix == ".pth":
        _write(target, write_pth, state, args.dtype or "keep")
    elif target.suffix == "" and is_model:
        return write_hf_folder(target, state, args.dtype or "keep")
    else:
        raise UserError(
            f"{target}: its ending names no format for {source}; known are .pth, .safetensors, .st, "
            ".state, .gguf, and a name without ending for a folder of a model"
        )
    return [target]


def write_hf_folder(folder, state, dtype):
    """A folder with the layout of the Hugging Face RWKV-6 models; returns the paths written."""
    config = model_config_from_state(state)
    settings = {
        "architectures": ["Rwkv6ForCausalLM"],
        "model_type": "rwkv6",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "attention_hidden_size": config.dim_att,
        "num_hidden_layers": config.n_layer,
        "head_size": config.head_size,
        "head_size_divisor": config.head_size_divisor,
        "intermediate_size": config.dim_ffn,
        "layer_norm_epsilon": 1e-5,
        "rescale_every": 0,
        "time_mix_extra_dim": config.maa_rank,
        "time_decay_extra_dim": config.decay_rank,
        "lora_rank_tokenshift": config.maa_rank,
        "lora_rank_decay": config.decay_rank,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    tensors = {to_hf(key): tensor for key, tensor in state.items()}
    _write(folder / "model.safetensors", write_safetensors, tensors, dtype)
    with atomic_write(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
    with atomic_write(folder / "tokenizer_config.json") as temporary:
        temporary.write_text(
            json.dumps(
                {
                    "tokenizer_class": "Rwkv6Tokenizer",
                    "bos_token": "<s>",
                    "eos_token": "<s>",
                    "unk_token": "<s>",
                    "add_prefix_space": False,
                },
                indent=2,
            )
            + "\n"
        )
    with atomic_write(folder / VOCABULARY) as temporary:
        temporary.write_bytes(world_vocabulary_file(config.vocab_size))
    return [folder / name for name in HF_FILES]


def vocabulary(size):
    """Bytes of the first `size` tokens of the World vocabulary, of which every RWKV-6 vocabulary here is a prefix."""
    from .data.tokenizer import WorldTokenizer

    return WorldTokenizer().token_bytes[:size]


def world_vocabulary_file(size):
    """The first tokens of the World vocabulary's file, whose lines are: id, literal, length."""
    from .data.tokenizer import WorldTokenizer

    lines = WorldTokenizer().path.read_bytes().replace(b"\r\n", b"\n").splitlines(keepends=True)
    return b"".join(line for line in lines if int(line.split(b" ", 1)[0]) < size)


def _write(path, writer, tensors, dtype):
    """Write tensors with write_pth or write_safetensors, cast to a dtype that holds every value."""
    dtype = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]

    def cast():
        for key, tensor in tensors.items():
            result = tensor.to(dtype or tensor.dtype)
            if not all_finite(result):
                raise UserError(f"{key} holds NaN, Inf or values beyond {result.dtype}; choose another --dtype")
            yield key, result

    with atomic_write(path) as temporary:
        writer(temporary, {key: TensorSpec.of(tensor, dtype) for key, tensor in tensors.items()}, cast())


if __name__ == "__main__":
    exit_on_user_error(main)
