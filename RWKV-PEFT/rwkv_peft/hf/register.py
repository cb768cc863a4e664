"""Registration of Bone with the installed peft."""

import peft

from .config import BoneConfig
from .installed import add_member, check_version, configs, enter
from .model import BoneModel


def register(replace: bool = False) -> None:
    """Register BONE with the installed peft, so that peft's functions build, load and save it.

    A Bone of peft's own (0.14 to 0.18) stays in place unless `replace` is true; until it is replaced, this
    BoneConfig refuses to be made. A second call changes nothing. Raises UserError for a version of peft on
    which this was not tried.
    """
    check_version()
    member = add_member("BONE")
    present = configs().get(member)
    if present is BoneConfig or (present is not None and not replace):
        return
    enter(member, BoneConfig, BoneModel)
    peft.BoneConfig, peft.BoneModel = BoneConfig, BoneModel
