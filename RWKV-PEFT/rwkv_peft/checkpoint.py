"""RWKV-6 base checkpoints: reading one safely, its dimensions, its fingerprint.

The front door for files: adapter files (adapter_file.py) and atomic writing (atomic.py) are
re-exported here.
"""

import hashlib
import re
from pathlib import Path

import torch

from .adapter_file import (
    DTYPES,
    Adapter,
    AdapterMetadata,
    adapter_parameter,
    load_adapter_into,
    read_adapter,
    save_adapter,
)
from .atomic import atomic_write
from .config import ModelConfig
from .errors import UserError
from .pth import read_state
from .pth_writer import save_pth

__all__ = [
    "DTYPES",
    "Adapter",
    "AdapterMetadata",
    "atomic_write",
    "check_state",
    "expected_shapes",
    "fingerprint",
    "load_adapter_into",
    "load_base",
    "model_config_from_state",
    "read_adapter",
    "save_adapter",
    "save_model",
]

# (ending of a file's name, what it is)
OTHER_FORMATS = (
    (".safetensors", "a safetensors file"),
    (".st", "a safetensors file of web-rwkv"),
    (".gguf", "a GGUF file"),
)
WINDOWS, WINDOW = 4, 16  # the fingerprint reads this many runs of this many values in each tensor


def load_base(path):
    """The RWKV-6 checkpoint at `path`: a flat dict of memory-mapped tensors under official key names.

    Raises UserError: whatever read_state refuses; another format; another RWKV version; prefixed keys; adapter
    tensors that were never merged; missing, extra or misshapen tensors; a dtype that is not a float.
    """
    kind = next((kind for ending, kind in OTHER_FORMATS if str(path).endswith(ending)), None)
    if kind is None and (Path(path) / "config.json").is_file():
        kind = "a Hugging Face folder"
    if kind == "a GGUF file":
        raise UserError(f"{path} is {kind}, and a .pth is due here; give the .pth that it was made of")
    if kind:
        raise UserError(
            f"{path} is {kind}, and a .pth is due here; make one of a model with "
            f"`python -m rwkv_peft.convert {path} model.pth`"
        )
    state = read_state(path)
    check_state(state, path)
    return state


def save_model(path, tensors):
    """Write a model's {name: tensor} as a .pth, atomically. Raises UserError where the disk refuses."""
    with atomic_write(path) as temporary:
        save_pth(temporary, tensors)


def check_state(state, name="the checkpoint"):
    """Raise UserError unless `state` is a complete RWKV-6 state dict and nothing else; return its ModelConfig."""
    leftover = [key for key in state if adapter_parameter(key)]
    if leftover:
        whole = "emb.weight" in state
        raise UserError(
            f"{name} holds {len(leftover)} adapter tensors (such as {leftover[0]}), "
            + (
                "which were never merged and which runtimes ignore without a word; take the base model's own "
                "file, and merge the adapter with merge_bone.py"
                if whole
                else "so it is an adapter, not a base model; give it as --bone_checkpoint or --bone_load"
            )
        )
    _check_version(state, name)
    config = model_config_from_state(state, name)
    shapes = expected_shapes(config)
    states = expected_states(config)
    if any(key in state for key in states):
        shapes |= states
    missing = [key for key in shapes if key not in state]
    unexpected = [key for key in state if key not in shapes]
    if missing or unexpected:
        raise UserError(
            f"{name} is not a complete RWKV-6 model of {config.n_layer} layers: "
            + "; ".join(
                f"{len(keys)} {word} tensors ({_some(keys)})"
                for word, keys in (("missing", missing), ("unexpected", unexpected))
                if keys
            )
        )
    for key, shape in shapes.items():
        if tuple(state[key].shape) != shape:
            raise UserError(
                f"{name}: {key} has shape {tuple(state[key].shape)}, and {shape} is due in a model "
                f"of {config.n_embd} channels and {config.dim_att} attention channels"
            )
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise UserError(
                f"{name}: {key} is {str(tensor.dtype).removeprefix('torch.')}; weights must be "
                "bfloat16, float16 or float32, not quantized"
            )
    return config


def model_config_from_state(state, name="the checkpoint"):
    """ModelConfig read from the shapes of an RWKV-6 state dict. Raises UserError where one is unreadable."""
    try:
        n_layer = 1 + max(int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, state) if match)
        vocab_size, n_embd = state["emb.weight"].shape
        _, head_size = state["blocks.0.att.time_faaaa"].shape
        return ModelConfig(
            n_layer=n_layer,
            n_embd=n_embd,
            vocab_size=vocab_size,
            dim_att=state["blocks.0.att.receptance.weight"].shape[0],
            dim_ffn=state["blocks.0.ffn.key.weight"].shape[0],
            head_size=head_size,
            maa_rank=state["blocks.0.att.time_maa_w2"].shape[1],
            decay_rank=state["blocks.0.att.time_decay_w1"].shape[1],
        )
    except KeyError as error:
        raise UserError(f"{name} is not an RWKV-6 model: it has no tensor {error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise UserError(
            f"{name} is not an RWKV-6 model: emb.weight must be (vocabulary, channels) and time_faaaa "
            f"(heads, head size), and they are {tuple(state['emb.weight'].shape)} and "
            f"{tuple(state['blocks.0.att.time_faaaa'].shape)}"
        ) from error


def expected_shapes(config):
    """Every key of an RWKV-6 checkpoint, in the order of official files, with its shape."""
    C, A, F, H, N = config.n_embd, config.dim_att, config.dim_ffn, config.n_head, config.head_size
    m, d = config.maa_rank, config.decay_rank
    shapes = {"emb.weight": (config.vocab_size, C)}
    for i in range(config.n_layer):
        for norm in ("ln1", "ln2") + (("ln0",) if i == 0 else ()):
            shapes |= {f"blocks.{i}.{norm}.weight": (C,), f"blocks.{i}.{norm}.bias": (C,)}
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        shapes |= {f"{att}time_maa_{x}": (1, 1, C) for x in "xwkvrg"}
        shapes |= {
            f"{att}time_maa_w1": (C, 5 * m),
            f"{att}time_maa_w2": (5, m, C),
            f"{att}time_decay": (1, 1, A),
            f"{att}time_decay_w1": (C, d),
            f"{att}time_decay_w2": (d, A),
            f"{att}time_faaaa": (H, N),
            f"{att}receptance.weight": (A, C),
            f"{att}key.weight": (A, C),
            f"{att}value.weight": (A, C),
            f"{att}output.weight": (C, A),
            f"{att}gate.weight": (A, C),
            f"{att}ln_x.weight": (A,),
            f"{att}ln_x.bias": (A,),
            f"{ffn}time_maa_k": (1, 1, C),
            f"{ffn}time_maa_r": (1, 1, C),
            f"{ffn}key.weight": (F, C),
            f"{ffn}receptance.weight": (C, C),
            f"{ffn}value.weight": (C, F),
        }
    return shapes | {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (config.vocab_size, C)}


def expected_states(config):
    """The keys and shapes of the time states, which a checkpoint has for every layer or for none."""
    shape = (config.n_head, config.head_size, config.head_size)
    return {f"blocks.{i}.att.time_state": shape for i in range(config.n_layer)}


def fingerprint(state):
    """A short name for a base model's weights, to tell that an adapter belongs to it.

    SHA-256 over each tensor's key, shape and four evenly spaced runs of 16 values as float32, whatever
    the order of the keys: a few pages of each tensor of a mapped file. The dtype does not enter, so that
    an exact float32 copy of a bfloat16 model has the same fingerprint. It guards against mistakes, not
    against forgery. `state` may be a dict or an iterable of (key, tensor) pairs.
    """
    digests = []
    for key, tensor in state.items() if isinstance(state, dict) else state:
        flat = tensor.detach().reshape(-1)
        last = max(flat.numel() - WINDOW, 0)
        runs = [flat[start : start + WINDOW] for start in (last * i // (WINDOWS - 1) for i in range(WINDOWS))]
        values = torch.cat(runs).float().cpu().numpy().tobytes()
        digests.append(hashlib.sha256(f"{key}|{tuple(tensor.shape)}|".encode() + values).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:32]


def _check_version(state, name):
    """Refuse other RWKV versions and other naming by what is typical of each."""
    keys = set(state)
    if "emb.weight" not in keys:
        prefixed = next((key for key in keys if key.endswith(".emb.weight")), None)
        if prefixed:
            prefix = prefixed.removesuffix("emb.weight")
            raise UserError(
                f"{name}: its keys start with {prefix!r}, which no runtime expects; save the state "
                f"dict of the model inside, without that prefix"
            )
        if any(key.startswith(("rwkv.", "model.")) for key in keys):
            raise UserError(
                f"{name} has the key names of a Hugging Face model; make a .pth of its folder with "
                "`python -m rwkv_peft.convert`"
            )
        raise UserError(f"{name} is not an RWKV model: it has no emb.weight (its first key is {next(iter(state))})")
    if "blocks.0.att.time_maa_w1" in keys:
        return
    signs = (
        ("blocks.0.att.x_r", "an RWKV-7 model"),
        ("blocks.0.att.w0", "an RWKV-7 model"),
        ("blocks.0.att.time_mix_x", "an RWKV-6 model under web-rwkv's names"),
        ("blocks.0.att.gate.weight", "an RWKV-5 model"),
        ("blocks.0.att.ln_x.weight", "an RWKV-5 model"),
        ("blocks.0.att.time_first", "an RWKV-4 model"),
    )
    version = next((what for key, what in signs if key in keys), "no RWKV version known here")
    raise UserError(
        f"{name} is {version}; this tool needs an RWKV-6 (x060) .pth under its official names "
        "(with blocks.0.att.time_maa_w1)"
    )


def _some(keys, limit=3):
    return ", ".join(keys[:limit]) + (", …" if len(keys) > limit else "")
