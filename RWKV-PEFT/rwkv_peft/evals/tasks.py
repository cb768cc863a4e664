"""The table of tasks by the names that `rwkv-peft eval` and --eval_task take."""

from types import MappingProxyType

from .choices import Choices
from .competition import Competition
from .exact import Exact
from .gsm8k import Gsm8k
from .lambada import Lambada
from .task import Task

TASKS: MappingProxyType[str, Task] = MappingProxyType(
    {"gsm8k": Gsm8k(), "math": Competition(), "jsonl": Exact(), "choices": Choices(), "lambada": Lambada()}
)
