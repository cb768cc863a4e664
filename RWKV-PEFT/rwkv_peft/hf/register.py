"""Registration of Bone with the installed peft, and of RWKV with the Auto classes of the installed transformers."""

import peft
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .config import BoneConfig
from .installed import add_member, check_version, configs, enter
from .model import BoneModel
from .rwkv import MODELS
from .rwkv_tokenizer import RWKVTokenizer


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


def register_rwkv() -> None:
    """Register RWKV-6 and RWKV-7, so that AutoModelForCausalLM, AutoTokenizer and pipelines load their folders."""
    for model in MODELS:
        config = model.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        AutoTokenizer.register(config, slow_tokenizer_class=RWKVTokenizer, exist_ok=True)
