"""Hugging Face: importing this registers BONE with the installed peft, and RWKV with transformers' Auto classes.

    from rwkv_peft.hf import BoneConfig
    model = get_peft_model(model, BoneConfig(r=64, init_weights="bat-in"))

`peft.BoneConfig` is the same class afterwards. If peft has a Bone of its own (0.14 to 0.18), that stays in place until
`register(replace=True)` puts this one there; until then this BoneConfig refuses to be made.
"""

import peft
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from .config import BoneConfig
from .installed import add_member, check_version, configs, enter
from .layer import BoneLinear
from .model import BoneModel
from .rwkv import RWKVForCausalLM, RWKVForSequenceClassification, RWKVModel
from .rwkv_config import CONFIGS, RWKV6Config, RWKV7Config, read_configs_of_pth
from .rwkv_tokenizer import RWKVTokenizer

__all__ = [
    "BoneConfig",
    "BoneLinear",
    "BoneModel",
    "RWKV6Config",
    "RWKV7Config",
    "RWKVForCausalLM",
    "RWKVForSequenceClassification",
    "RWKVModel",
    "RWKVTokenizer",
    "register",
]
KINDS = (
    (AutoModel, RWKVModel),
    (AutoModelForCausalLM, RWKVForCausalLM),
    (AutoModelForSequenceClassification, RWKVForSequenceClassification),
)


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
    """Register RWKV-6 and RWKV-7, so that Auto classes and pipelines load their folders, and trl a .pth too."""
    for config in CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoTokenizer.register(config, fast_tokenizer_class=RWKVTokenizer, exist_ok=True)
    for auto, kinds in KINDS:
        for model in kinds.__subclasses__():
            auto.register(model.config_class, model, exist_ok=True)
            setattr(transformers, model.__name__, model)  # where trl looks for a folder's class
    read_configs_of_pth()


register()
register_rwkv()
