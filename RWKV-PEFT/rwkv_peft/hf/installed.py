"""The installed peft: the versions that Bone supports, their differences, and how BONE becomes one of its methods.

peft finds a method's classes by PeftType, a str Enum with one member a method, and has no entry point for others. An
Enum's members are closed by design: to add one by hand is the class statement's work, in the three tables that the enum
module uses for lookups (by name, by value, in order). Only this file does that; it checks the result, and refuses
versions of peft on which it has not been tried.

    0.14           keeps its four tables of methods in three modules; from 0.15 on all are in peft.mapping
    0.14 to 0.17   leave common work (freezing, merging, deleting …) to each method; BoneModel inherits it
                   from peft's own BoneModel. From 0.18 on BaseTuner does it for all
    0.14 to 0.18   have a Bone of their own, without bat-in, mini, dropout, and layers of bitsandbytes
    0.19 and newer have none
    0.14 to 0.20   save trained biases only for their own methods; 0.21 saves those of every method

tests/hf/versions.sh runs the tests under each of them.
"""

import peft
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..cli.errors import UserError

FIRST_KNOWN, FIRST_UNKNOWN = (0, 14), (0, 22)
TABLES_IN_ONE_PLACE, TUNER_DOES_ALL, WITHOUT_BONE, SAVES_BIASES = (0, 15), (0, 18), (0, 19), (0, 21)


def version() -> tuple[int, ...]:
    """The installed peft's version as (major, minor)."""
    return tuple(int(part) for part in peft.__version__.split(".")[:2])


def check_version() -> None:
    """Raise UserError for a version of peft on which Bone was not tried."""
    if not FIRST_KNOWN <= version() < FIRST_UNKNOWN:
        first, last = ".".join(map(str, FIRST_KNOWN)), f"{FIRST_UNKNOWN[0]}.{FIRST_UNKNOWN[1] - 1}"
        raise UserError(
            f"rwkv_peft.hf knows peft {first} to {last}, and {peft.__version__} is installed; "
            f"pip install 'peft>={first},<{FIRST_UNKNOWN[0]}.{FIRST_UNKNOWN[1]}'"
        )


def add_member(name: str) -> PeftType:
    """Add PeftType.<name> with the value <name>, unless it is there; -> the member."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType._member_names_)
        setattr(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    member = PeftType[name]
    if PeftType(name) is not member or getattr(PeftType, name) is not member or member not in list(PeftType):
        raise RuntimeError(
            f"PeftType could not be extended by {name}: this Python keeps the members of an Enum in "
            "another way than 3.10 to 3.14 do"
        )
    return member


def configs() -> dict[PeftType, type[PeftConfig]]:
    """peft's table of configuration classes, by PeftType."""
    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING


def enter(member: PeftType, config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Enter a method's classes in all of peft's tables."""
    if version() < TABLES_IN_ONE_PLACE:
        from peft.peft_model import PEFT_TYPE_TO_MODEL_MAPPING
        from peft.utils.constants import PEFT_TYPE_TO_PREFIX_MAPPING

        PEFT_TYPE_TO_MODEL_MAPPING[member] = model
    else:
        PEFT_TYPE_TO_PREFIX_MAPPING = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    configs()[member] = config
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] = model
    PEFT_TYPE_TO_PREFIX_MAPPING[member] = model.prefix


def tuner_for(layer: type[nn.Module]) -> type[BaseTuner]:
    """The class for BoneModel to extend, so that it works with layers of class `layer` as peft's models do."""
    if not FIRST_KNOWN <= version() < TUNER_DOES_ALL:
        return BaseTuner
    from peft.tuners.bone import BoneModel
    from peft.tuners.bone.layer import BoneLayer

    BoneLayer.register(layer)  # an abstract base class: our layers are instances of it from now on
    return BoneModel
