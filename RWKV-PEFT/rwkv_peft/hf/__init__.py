"""Hugging Face: importing this registers BONE with the installed peft, and RWKV with transformers' Auto classes.

    from rwkv_peft.hf import BoneConfig
    model = get_peft_model(model, BoneConfig(r=64, init_weights="bat-in"))

`peft.BoneConfig` is the same class afterwards. If peft has a Bone of its own (0.14 to 0.18), that stays in place until
`register(replace=True)` puts this one there; until then this BoneConfig refuses to be made.
"""

from .config import BoneConfig
from .layer import BoneLinear
from .model import BoneModel
from .register import register, register_rwkv
from .rwkv import RWKVForCausalLM
from .rwkv_config import RWKV6Config, RWKV7Config
from .rwkv_tokenizer import RWKVTokenizer

__all__ = [
    "BoneConfig",
    "BoneLinear",
    "BoneModel",
    "RWKV6Config",
    "RWKV7Config",
    "RWKVForCausalLM",
    "RWKVTokenizer",
    "register",
]

register()
register_rwkv()
