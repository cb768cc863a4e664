"""The names that flags take as values, so that flags are checked before torch is imported.

adapters/methods.py, models/__init__.py, data/sources.py, training/step/schedule.py and evals/tasks.py hold the tables
of the things themselves; tests/test_names.py compares the names with them.
"""

from types import MappingProxyType
from typing import NamedTuple


class Word(NamedTuple):
    """A word of --peft: the methods that it stands for, and the flag that takes their settings as JSON."""

    forms: tuple[str, ...]
    json_flag: str


ADAPTER, MODEL = "adapter.safetensors", "rwkv.pth"  # the newest trained tensors in the folder of a run
METRICS = "metrics.jsonl"  # a line for each step of a run
RUN = "config.json"  # the settings of a run, and the meaning of its tokens
STATE = "state"  # a part of --train_parts, but no parameter of a model: the wkv states before the first token
SYSTEM_FIELDS = ("system", "system_prompt")  # fields of a row for a system text beside its question or its turns
NONE = "none"  # the method if no layer is adapted: the model itself trains, or whole tensors of it
WORDS = MappingProxyType(
    {
        "bone": Word(("bone", "bone-mini", "bone-signed", "bat-in", "bat-in-scaled", "bat-out"), "bone_config"),
        "lora": Word(("lora",), "lora_config"),
        "lora-plus": Word(("lora-plus",), "lora_config"),
        "rslora": Word(("rslora",), "lora_config"),
        "dora": Word(("dora",), "lora_config"),
        "pissa": Word(("pissa",), "pissa_config"),
        "olora": Word(("olora",), "lora_config"),
        "lora-ga": Word(("lora-ga",), "lora_config"),
    }
)
CHOICES = (*WORDS, NONE)  # the values of --peft
MINIS = ("bone-mini",)  # the methods that have a mini_rank
GENERATIONS = (("RWKV-6", "x060"), ("RWKV-7", "x070"))  # (name, version)
DATALOADS = ("get", "pad", "only", "pack")
LOSS_MASKS = ("none", "pad", "qa", "se", "file")
# (flag, what is given here, other tools' values for it)
QUANTS = (("--quant", "--quant nf4", ("4bit", "4", "int4", "fp4")), ("--quant", "--quant int8", ("8bit", "8", "fp8")))
FINETUNE, INFCTX = "finetune", "infctx"
TRAIN_TYPES = (NONE, FINETUNE, STATE, INFCTX)  # as in RWKV-PEFT
# --lr_schedule -> the rate at step s = 0 … S - 1 of a run of S steps, W of them warm-up, from a = lr_init to z =
# lr_final; clip keeps a number within 0 and 1, and W = 0 is no warm-up
SCHEDULES = MappingProxyType(
    {
        "cosine": "min(1, (s + 1) / W) * (z + (a - z) * (1 + cos(pi * clip((s - W) / (S - 1 - W)))) / 2)",
        "linear": "min(1, (s + 1) / W) * (a + (z - a) * clip((s - W) / (S - 1 - W)))",
        "constant": "min(1, (s + 1) / W) * a",
        "wsd": "min(1, (s + 1) / W) * (a + (z - a) * clip((s - D) / (S - 1 - D))), D = max(W, S - ceil(S / 10))",
        "exp": "min(1, 0.01 + 0.99 * s / W) * a * (z / a) ** clip((s - W + 1) / (S - W))",
        "rwkv-lm": "min(1, 0.01 + 0.99 * s / W) * (z + (a - z) * (1 + cos(pi * clip((s - W) / (S - W)))) / 2)",
        "rwkv-peft": "z + (a - z) * (1 + cos(pi * s / S)) / 2",
    }
)
AUTO = "auto"  # value of --lr_init: the rate is chosen
EVAL_TASKS = ("gsm8k", "math", "jsonl", "choices", "lambada")
WRITTEN = ("gsm8k", "math", "jsonl")  # the tasks whose answers the model writes
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")


def forms(peft: str) -> tuple[str, ...]:
    """The names of the methods that a word of --peft stands for; () for another word."""
    return WORDS[peft].forms if peft in WORDS else ()


def words_with(json_flag: str) -> tuple[str, ...]:
    """The words of --peft whose methods take their settings from a JSON flag."""
    return tuple(word for word, methods in WORDS.items() if methods.json_flag == json_flag)


def called(value: str, ours: str) -> str:
    """The note on a value that has another name in other tools."""
    return f"{value} of other tools is {ours} here"
