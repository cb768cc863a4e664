"""The table of adapter methods, and how settings and files name one."""

from types import MappingProxyType
from typing import Any

from ..config import AdapterConfig
from ..names import NONE, forms
from .bat_in import BatIn
from .bat_in_scaled import BatInScaled
from .bat_out import BatOut
from .bone import Bone, BoneMini
from .bone_signed import BoneSigned
from .dora import Dora
from .lora import Lora, LoraPlus
from .lora_ga import LoraGa
from .method import Method
from .olora import Olora
from .pissa import Pissa
from .rslora import RsLora

METHODS: MappingProxyType[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Bone(),
            BoneMini(),
            BoneSigned(),
            BatIn(),
            BatInScaled(),
            BatOut(),
            Lora(),
            LoraPlus(),
            RsLora(),
            Dora(),
            Pissa(),
            Olora(),
            LoraGa(),
        )
    }
)
# tensor names by which other tools' files hold what METHODS know by theirs, or what none of them knows
FOREIGN_TENSORS = ("disha", "bone_block", "miss_block", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
TENSORS = (
    tuple(dict.fromkeys(name for method in METHODS.values() for name in (*method.parameters, *method.constants)))
    + FOREIGN_TENSORS
)


def method_of(config: AdapterConfig) -> Method | None:
    """The Method of an AdapterConfig; None where no layer is adapted. Raises KeyError for names of none."""
    if config.method == NONE:
        return None
    return METHODS[config.mode if len(forms(config.method)) > 1 else config.method]


def words_of(method: Method) -> dict[str, Any]:
    """{field: value} of the AdapterConfig fields that name a Method."""
    return {"method": method.peft} | ({"mode": method.name} if len(forms(method.peft)) > 1 else {})


def by_hf_name(init_weights: object) -> Method | None:
    """The Method that a value of init_weights means to Hugging Face peft, None for an unknown one; 1 is not True
    here."""
    same = ((method, value) for method in METHODS.values() for value in method.hf_names)
    return next((m for m, value in same if value == init_weights and type(value) is type(init_weights)), None)


def is_saved(name: str) -> bool:
    """Whether files' metadata may name this method, or NONE."""
    return name == NONE or (name in METHODS and METHODS[name].file_name == name)


def adapter_parameter(key: str) -> tuple[str, str] | None:
    """("blocks.0.att.key", "bone") for an adapter's own tensor, None for any other key."""
    parts = key.split(".")
    for position, part in enumerate(parts):
        if part in TENSORS:
            return ".".join(parts[:position]), part
    return None
