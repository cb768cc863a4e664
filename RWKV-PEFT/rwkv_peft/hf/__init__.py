"""Hugging Face: importing this registers BONE with the installed peft, and RWKV with transformers' Auto classes, but
for a generation that these know already: the class behind the name stays, for inference.

    from rwkv_peft.hf import BoneConfig
    model = get_peft_model(model, BoneConfig(r=64, init_weights="bat-in"))

`peft.BoneConfig` is the same class afterwards.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .config import BoneConfig
from .layer import BoneLinear
from .model import BoneModel
from .register import enter
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
]
KINDS = (
    (AutoModel, RWKVModel),
    (AutoModelForCausalLM, RWKVForCausalLM),
    (AutoModelForSequenceClassification, RWKVForSequenceClassification),
)


def register_rwkv() -> None:
    """Register RWKV-6 and RWKV-7, so that Auto classes and pipelines load their folders, and trl a .pth too."""
    import transformers  # only now: importing peft may put another module object in its place

    for config in CONFIGS:
        if config.model_type not in CONFIG_MAPPING:
            AutoConfig.register(config.model_type, config)
            AutoTokenizer.register(config, fast_tokenizer_class=RWKVTokenizer)
    for auto, kinds in KINDS:
        for model in kinds.__subclasses__():
            if CONFIG_MAPPING[model.config_class.model_type] is model.config_class:
                auto.register(model.config_class, model, exist_ok=True)
            setattr(transformers, model.__name__, model)  # where trl looks for a folder's class
    read_configs_of_pth()


enter(BoneConfig, BoneModel)
register_rwkv()
