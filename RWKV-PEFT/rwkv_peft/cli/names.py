"""Names of files and folders, values of flags that no table holds, and tests on numbers. True is not 1, as in JSON."""

import math
import os
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeGuard

ADAPTER, MODEL = "adapter.safetensors", "rwkv.pth"  # the newest trained tensors in the folder of a run
MERGED, TUNED = "merged.pth", "state.pth"  # the newest merged model and tuned states, likewise
LEARNED, LEARNED_ROWS = "learned", "learned.jsonl"  # the label of what feedback has taught; answers before and after
PICTURE, CARD = "loss.png", "README.md"
FORGETTING, FORGETTING_PICTURE = "forgetting.json", "forgetting.png"  # what a run bounded by --forget_at_most loses
METRICS = "metrics.jsonl"  # a line for each step of a run
RUN = "config.json"  # the settings of a run, and the meaning of its tokens
STATE = "state"  # a part of --train_parts, but no parameter of a model: the states before the first token
# value of --state_parts -> the ends of its keys in files: the wkv state, and the last input of each of a block's mixes
STATE_PARTS = MappingProxyType({"wkv": ("att.time_state",), "shift": ("att.shift", "ffn.shift")})
SYSTEM_FIELDS = ("system", "system_prompt")  # fields of a row for a system text beside its question or its turns
NONE = "none"  # the method if no layer is adapted: the model itself trains, or whole tensors of it
LOSS_MASKS = ("none", "pad", "qa", "se", "file")
# (flag, what is given here, other tools' values for it)
QUANTS = (("--quant", "--quant nf4", ("4bit", "4", "int4", "fp4")), ("--quant", "--quant int8", ("8bit", "8", "fp8")))
FINETUNE, INFCTX = "finetune", "infctx"
TRAIN_TYPES = (NONE, FINETUNE, STATE, INFCTX)  # as in RWKV-PEFT
TRACKERS = ("wandb", "trackio", "swanlab")  # each a package, and a flag that names a project
AUTO = "auto"  # value of --lr_init: the rate is chosen; of --turns_in_text
THINK_MODES = ("off", "minimal", "on", "low", "medium", "high")  # values of --think; data/chat.py has their prompts
LARGEST_SCALE = 100  # of an adapter's change, as of serve's adapter_scale
G1, HERMES = "g1", "hermes"  # values of --tool_form
DOCUMENT_ENDS = ("endoftext", "stars", "dashes")  # values of --document_end
# the helps of flags on texts, of preprocess and of train.py
ENCODING = (
    "the encoding of texts and tables that are not UTF-8 and have no byte order mark, such as gb18030, big5, shift_jis "
    "or cp1252 (default: recognised if the text is long enough, with a note)"
)
CUT = (
    "cut texts into documents: endoftext at each <|endoftext|>, stars at lines of ***, dashes at lines of hyphens "
    "(default: a text is one document)"
)
TURNS = (
    "auto lays texts and questions that hold turns (Human: … Assistant: …, ### Human:, <|im_start|>, [INST], …) out as "
    "chats, of which only the answers count (default: as one text)"
)
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")


def user_cache() -> Path | None:
    """rwkv_peft in the user's cache folder (by XDG's rules); None for a user without a home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv_peft"
    except RuntimeError:
        return None


def generation(version: str) -> str:
    """The name of a generation: "x060" -> "RWKV-6", "x070a" -> "RWKV-7a"."""
    return f"RWKV-{version[2]}{version[4:]}"


def called(value: str, ours: str) -> str:
    """The note on a value that has another name in other tools."""
    return f"{value} of other tools is {ours} here"


if TYPE_CHECKING:
    import torch


def is_whole(value: object, least: int | None = None) -> TypeGuard[int]:
    """True for a whole number, at least `least` if that is given."""
    return type(value) is int and (least is None or value >= least)


def is_scale(value: object) -> bool:
    """True for a number by which an adapter's change may be multiplied."""
    return is_finite(value) and 0 < abs(value) <= LARGEST_SCALE


def is_finite(value: object) -> TypeGuard[float]:
    """True for a number that a float can hold, neither NaN nor infinite."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def is_number(value: object) -> TypeGuard[float]:
    """True for a number that a float can hold, NaN and infinity included."""
    return isinstance(value, float) or is_finite(value)


def all_finite(tensor: "torch.Tensor") -> bool:
    """True if no element is NaN or Inf; takes little memory beside the tensor."""
    # a sum over NaN or Inf is not finite, and the sum is the faster test; it may also overflow over finite values
    parts = tensor.reshape(-1).split(1 << 20)
    return all(bool(part.sum().isfinite() or part.isfinite().all()) for part in parts)
