"""One new member for peft's PeftType, and the versions of peft that this is known to work with.

peft finds a method's classes by PeftType, a str Enum with one member a method, and has no entry point for
others. An Enum's members are closed by design: adding one means to do by hand what the class statement
does, in the three tables that the enum module documents for lookups (by name, by value, in order). That
is done here alone, checked afterwards, and refused for a version of peft on which nobody has tried it.
"""

import peft
from peft import PeftType

from ..errors import UserError

FIRST_KNOWN, FIRST_UNKNOWN = (0, 18), (0, 22)


def version():
    """The installed peft's version as (major, minor)."""
    return tuple(int(part) for part in peft.__version__.split(".")[:2])


def check_version():
    """Raises UserError for a peft on which Bone was not tried."""
    if not FIRST_KNOWN <= version() < FIRST_UNKNOWN:
        first, last = ".".join(map(str, FIRST_KNOWN)), f"{FIRST_UNKNOWN[0]}.{FIRST_UNKNOWN[1] - 1}"
        raise UserError(f"rwkv_peft.hf knows peft {first} to {last}, and {peft.__version__} is installed; "
                        f"pip install 'peft>={first},<{FIRST_UNKNOWN[0]}.{FIRST_UNKNOWN[1]}'")


def add_member(name):
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
        raise RuntimeError(f"PeftType could not be extended by {name}: this Python keeps the members of an Enum in "
                           "another way than 3.10 to 3.13 do")
    return member
