"""Registration of Bone with the installed peft."""

import peft

from .config import BoneConfig
from .installed import add_member, check_version, configs, enter
from .model import BoneModel


def register(replace: bool = False) -> None:
    """Make the installed peft know BONE, so that its own functions build, load and save it.

    Where peft has a Bone of its own (0.14 to 0.18), that is left alone unless `replace` is true, and this
    BoneConfig refuses to be made meanwhile. Calling this again changes nothing. Raises UserError for a
    version of peft on which this was not tried.
    """
    check_version()
    member = add_member("BONE")
    present = configs().get(member)
    if present is BoneConfig or (present is not None and not replace):
        return
    enter(member, BoneConfig, BoneModel)
    peft.BoneConfig, peft.BoneModel = BoneConfig, BoneModel
