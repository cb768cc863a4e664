"""The config.json of an RWKV model for transformers: as in RWKV's own Hugging Face folders, with the exact sizes."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PretrainedConfig

from ..checkpoints.base import Base, open_base
from ..config import ModelConfig
from ..models import family_named
from ..models.family import Family

# a size of new_dimensions -> the settings that give it, in folders of any age
SIZES = MappingProxyType(
    {"dim_att": ("attention_hidden_size",), "dim_ffn": ("intermediate_size",), "head_size": ("head_size", "head_dim")}
)


class RWKVConfig(PretrainedConfig):
    """Settings of a generation's model: its sizes under the names of RWKV's own folders, and in `dimensions` under
    ours, which are exact. A config without dimensions describes a new model of the generation's usual widths."""

    version = ""  # the generation's key in GENERATIONS
    auto_map = MappingProxyType[str, str]({})  # trl looks for code of a folder's own in it
    keys_to_ignore_at_inference = ["state"]

    def __init__(self, dimensions: Mapping[str, Any] | None = None, **settings: Any) -> None:
        self.dimensions = None if dimensions is None else dict(dimensions)
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
        super().__init__(**(ends | {"tie_word_embeddings": False, "use_cache": True} | settings))

    @property
    def family(self) -> Family[Any, Any]:
        """The generation."""
        return family_named(self.version)

    def model_config(self) -> ModelConfig:
        """The dimensions of the model. Raises UserError for sizes that do not fit together."""
        if self.dimensions is not None:
            kind = type(self.family.new_dimensions(1, 64, 2))
            return kind(**(self.dimensions | {"vocab_size": self.vocab_size}))
        sizes = {
            name: next((size for setting in settings if (size := getattr(self, setting, None))), 0)
            for name, settings in SIZES.items()
        }
        if not sizes["head_size"] and (heads := getattr(self, "num_heads", None)):
            sizes["head_size"] = self.hidden_size // heads
        return self.family.new_dimensions(self.num_hidden_layers, self.hidden_size, self.vocab_size, **sizes)


class RWKV6Config(RWKVConfig):
    """Settings of an RWKV-6."""

    model_type = "rwkv6"
    version = "x060"
    __init__ = RWKVConfig.__init__  # transformers writes one for a class that has none of its own


class RWKV7Config(RWKVConfig):
    """Settings of an RWKV-7."""

    model_type = "rwkv7"
    version = "x070"
    __init__ = RWKVConfig.__init__


CONFIGS = (RWKV6Config, RWKV7Config)


def config_of(dimensions: ModelConfig, **settings: Any) -> RWKVConfig:
    """The RWKVConfig of a model's dimensions; settings such as eos_token_id replace the folders' own. Raises UserError
    for a generation that transformers has no form of."""
    told = family_named(dimensions.version).hf_settings(dimensions)
    kind = next(kind for kind in CONFIGS if kind.version == dimensions.version)
    told = {name: value for name, value in told.items() if name not in ("architectures", "model_type")}
    return kind(dimensions=asdict(dimensions), **(told | settings))


def config_of_base(base: Base, **settings: Any) -> RWKVConfig:
    """The RWKVConfig of a model in a .pth, as config_of has it, with the dtype of the file."""
    return config_of(base.config, dtype=base.tensors["emb.weight"].dtype, **settings)


def is_pth(name: object) -> bool:
    return Path(str(name)).suffix == ".pth"


def read_configs_of_pth() -> None:
    """Let transformers' AutoConfig read a .pth: trl loads a model by its name a second time, as a reference."""
    plain = PretrainedConfig.get_config_dict.__func__

    def get_config_dict(cls: type[PretrainedConfig], name: object, **settings: Any) -> Any:
        if not is_pth(name):
            return plain(cls, name, **settings)
        config = config_of_base(open_base(str(name)))
        config.architectures = [f"{config.model_type.upper()}ForCausalLM"]
        return config.to_dict(), settings

    PretrainedConfig.get_config_dict = classmethod(get_config_dict)
