"""The adapter methods by name, and how settings and files name one.

config/adapter.py holds the table of their names and settings; a method's own file is called like it.
"""

from types import MappingProxyType
from typing import Any

from ..cli.names import NONE
from ..config import WORDS, AdapterConfig, Word, forms
from .method import Method, load_method

METHODS: MappingProxyType[str, Method] = MappingProxyType(
    {name: load_method(name) for word in WORDS for name in forms(word)}
)
# names in other tools' files for tensors that METHODS name otherwise, or do not have
FOREIGN_TENSORS = ("disha", "bone_block", "miss_block", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
TENSORS = (
    tuple(dict.fromkeys(name for method in METHODS.values() for name in (*method.parameters, *method.constants)))
    + FOREIGN_TENSORS
)


def method_of(config: AdapterConfig) -> Method | None:
    """The Method of an AdapterConfig; None if no layer is adapted. Raises KeyError for names of none."""
    if config.method == NONE:
        return None
    return METHODS[config.mode if len(forms(config.method)) > 1 else config.method]


def word_of(method: Method) -> Word:
    """The word of --peft that stands for a Method."""
    return next(word for word in WORDS.values() if method.name in word.forms)


def words_of(method: Method) -> dict[str, Any]:
    """{field: value} of the AdapterConfig fields that name a Method."""
    word = word_of(method)
    return {"method": word.name} | ({"mode": method.name} if len(word.forms) > 1 else {})


def by_hf_name(init_weights: object) -> Method | None:
    """The Method that a value of init_weights means to Hugging Face peft, None for an unknown one; 1 is not True."""
    same = ((method, value) for method in METHODS.values() if method.hf is not None for value in method.hf.names)
    return next((m for m, value in same if value == init_weights and type(value) is type(init_weights)), None)


def is_saved(name: str) -> bool:
    """True if files' metadata may name this method, or NONE."""
    return name == NONE or (name in METHODS and METHODS[name].file_name == name)


def adapter_parameter(key: str) -> tuple[str, str] | None:
    """("blocks.0.att.key", "bone") for an adapter's own tensor, None for any other key."""
    parts = key.split(".")
    for position, part in enumerate(parts):
        if part in TENSORS:
            return ".".join(parts[:position]), part
    return None
