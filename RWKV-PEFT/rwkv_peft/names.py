"""The names that flags take as values, so that flags are checked before torch is imported.

models/__init__.py, data/sources.py and evals/tasks.py hold the tables of the things themselves; tests/test_names.py
compares the names with them. Those of adapter methods are in config/methods.py.
"""

ADAPTER, MODEL = "adapter.safetensors", "rwkv.pth"  # the newest trained tensors in the folder of a run
METRICS = "metrics.jsonl"  # a line for each step of a run
RUN = "config.json"  # the settings of a run, and the meaning of its tokens
STATE = "state"  # a part of --train_parts, but no parameter of a model: the wkv states before the first token
SYSTEM_FIELDS = ("system", "system_prompt")  # fields of a row for a system text beside its question or its turns
NONE = "none"  # the method if no layer is adapted: the model itself trains, or whole tensors of it
GENERATIONS = (("RWKV-6", "x060"), ("RWKV-7", "x070"))  # (name, version)
DATALOADS = ("get", "pad", "only", "pack")
LOSS_MASKS = ("none", "pad", "qa", "se", "file")
# (flag, what is given here, other tools' values for it)
QUANTS = (("--quant", "--quant nf4", ("4bit", "4", "int4", "fp4")), ("--quant", "--quant int8", ("8bit", "8", "fp8")))
FINETUNE, INFCTX = "finetune", "infctx"
TRAIN_TYPES = (NONE, FINETUNE, STATE, INFCTX)  # as in RWKV-PEFT
AUTO = "auto"  # value of --lr_init: the rate is chosen
EVAL_TASKS = ("gsm8k", "math", "jsonl", "choices", "lambada")
WRITTEN = ("gsm8k", "math", "jsonl")  # the tasks whose answers the model writes
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")


def called(value: str, ours: str) -> str:
    """The note on a value that has another name in other tools."""
    return f"{value} of other tools is {ours} here"
