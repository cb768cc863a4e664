"""BONE as a method of the installed peft.

peft finds a method's classes by PeftType, a str Enum with one member a method, to which it lets nobody add. An Enum's
members are closed by design: a member is added in the three tables that the enum module uses for lookups (by name, by
value, in order), and the result is checked.
"""

import peft
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from ..cli.errors import UserError

FIRST_KNOWN, FIRST_UNKNOWN = (0, 19), (0, 22)  # older ones have a Bone of their own
SAVES_BIASES = (0, 21)  # those before save trained biases only for their own methods


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
    """PeftType.<name> with the value <name>, added unless it is there."""
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


def enter(config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Enter Bone's classes in peft's tables, unless they are there. Raises UserError as check_version does."""
    check_version()
    if peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(add_member("BONE")) is not config:
        register_peft_method(name="bone", config_cls=config, model_cls=model, prefix=model.prefix)
    peft.BoneConfig, peft.BoneModel = config, model
