"""Registration of Bone with the installed peft."""

import peft
from peft import mapping

from .config import BoneConfig
from .model import BoneModel
from .peft_type import add_member, check_version


def register(replace=False):
    """Make the installed peft know BONE, so that its own functions build, load and save it.

    Where peft has another Bone already, it is left alone unless `replace` is true. Calling this again
    changes nothing. Raises UserError for a version of peft on which this was not tried.
    """
    check_version()
    member = add_member("BONE")
    present = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if present is BoneConfig or (present is not None and not replace):
        return
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] = BoneConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] = BoneModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[member] = BoneModel.prefix
    peft.BoneConfig, peft.BoneModel = BoneConfig, BoneModel
