"""RWKV as a causal language model of transformers, over the package's own models and kernels.

    from rwkv_peft.hf import RWKVForCausalLM, RWKVTokenizer
    model = RWKVForCausalLM.from_pth("rwkv7-g1-1.5b.pth", dtype=torch.bfloat16)
    tokenizer = RWKVTokenizer()

Its cache is the generation's State, under the name `state`. Padding takes part in nothing (rwkv_backbone.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils import ModelOutput

from ..errors import UserError
from ..files.adapters import AdapterSource
from ..files.base import Base, base_of, save_model
from ..generate.loading import merged_base
from ..models.state import State, split_time_states
from ..release.formats import read_hf_model
from .rwkv_backbone import Backbone
from .rwkv_config import RWKV6Config, RWKV7Config, RWKVConfig, config_of

PREFIX = "model."  # of the parameters' names, before the official key
# the name under which a search over beams reorders a cache: any that is listed, or in older versions this one alone
REORDERED = "past_key_values" if "past_key_values" in ALL_CACHE_NAMES else "state"
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class RWKVOutput(ModelOutput):
    """loss (a scalar, if labels were given), logits (B, T, V), and the State after the tokens if use_cache is set."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    state: State | None = None


class RWKVForCausalLM(PreTrainedModel, GenerationMixin):
    """An RWKV-6 or RWKV-7; model is the generation's own module, under the checkpoints' official names. from_pth and
    from_pretrained make one of the class of the generation that they find."""

    config_class = RWKVConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _is_stateful = True  # no token can be taken back
    model: Backbone

    def __init__(self, config: RWKVConfig) -> None:
        super().__init__(config)
        self.model = Backbone(config.family.build(config.model_config()))
        self.post_init()

    @classmethod
    def from_pth(
        cls, path: str | Path, adapters: Iterable[str | Path] = (), dtype: torch.dtype | None = None, **settings: Any
    ) -> "RWKVForCausalLM":
        """Load a .pth with adapters merged into it, in its own dtype (None) or another. settings are config entries,
        such as eos_token_id. Raises UserError for files that cannot be read or do not fit together."""
        base = merged_base(path, [AdapterSource(adapter) for adapter in adapters])
        refuse_states(base)
        with torch.device("meta"):
            model = class_of(config := config_of(base.config, **settings))(config)
        model.model = Backbone(base.family.load(base.tensors, base.config).to(dtype))
        model.config.dtype = model.dtype
        model.config._name_or_path = model.name_or_path = str(path)
        return model.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path | None, *args: Any, **settings: Any) -> "RWKVForCausalLM":
        """Load the folder of an RWKV model, or its name on the hub, in one of three layouts: that of save_pretrained
        and `rwkv-peft convert`, which is RWKV's own, or flash-linear-attention's. settings are those of transformers.
        Raises UserError for a folder that holds no complete model."""
        if folder is None or settings.get("state_dict") is not None:
            return super().from_pretrained(folder, *args, **settings)
        path = local(folder, settings)
        base = base_of(read_hf_model(path), path)
        refuse_states(base)
        told = settings.pop("config", None)
        if not isinstance(told, RWKVConfig):
            told = type(config_of(base.config)).from_pretrained(path)
        ends = {name: getattr(told, name) for name in ENDS if getattr(told, name, None) is not None}
        config = config_of(base.config, **ends, dtype=getattr(told, "dtype", None))
        state = {PREFIX + key: tensor for key, tensor in base.tensors.items()}
        model = super(RWKVForCausalLM, class_of(config)).from_pretrained(
            None, *args, config=config, state_dict=state, **settings
        )
        model.config._name_or_path = model.name_or_path = str(folder)
        return model

    def save_pretrained(self, folder: str | Path, *args: Any, **settings: Any) -> None:
        """Save config.json and .safetensors in the layout of RWKV's own folders, which `rwkv-peft convert` reads."""
        given = settings.pop("state_dict", None)
        state = self.state_dict() if given is None else given
        to_hf = self.config.family.to_hf
        named = {to_hf(key.removeprefix(PREFIX)): tensor for key, tensor in state.items()}
        super().save_pretrained(folder, *args, state_dict=named, **settings)

    def save_pth(self, path: str | Path) -> None:
        """Write a .pth under official names, as every RWKV runtime takes it. Raises UserError while adapters are in
        the model, and if the file cannot be written."""
        tensors = self.model.state_dict()
        shapes = self.config.family.shapes(self.model.config)
        if odd := next((key for key in tensors if key not in shapes), None):
            raise UserError(f"{odd} is no tensor of the model but an adapter's; call merge_and_unload() first")
        save_model(path, {key: tensors[key] for key in shapes})

    def get_input_embeddings(self) -> nn.Module:
        return self.model.emb

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.emb = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.model.head = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        state: State | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **settings: Any,
    ) -> RWKVOutput | tuple[Any, ...]:
        """Compute tokens (B, T), which go on from state -> RWKVOutput, of the last logits_to_keep tokens (0: of all) or
        of those with these indices.

        labels (B, T) are those of the same tokens, -100 if none counts. The other arguments are Backbone's.
        """
        found = self.model(input_ids, attention_mask, state, inputs_embeds, use_cache, **settings)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            count = {"num_items_in_batch": settings["num_items_in_batch"]} if "num_items_in_batch" in settings else {}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **count)
        output = RWKVOutput(loss, logits, found.state)
        return output if settings.get("return_dict") is not False else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        state: State | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        read: bool = False,
        **settings: Any,
    ) -> dict[str, Any]:
        """The inputs of a step of `generate`. Once the prompt was read, only the last token is new; a state that the
        caller gives is that before the prompt."""
        if read:
            state = settings.get("past_key_values", state)
            return {"input_ids": input_ids[:, -1:].contiguous(), "state": state, "use_cache": True}
        given: dict[str, Any] = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        kept = settings.get("logits_to_keep")
        given |= {"attention_mask": attention_mask, "state": state, "use_cache": use_cache}
        return given | ({} if kept is None else {"logits_to_keep": kept})

    def _update_model_kwargs_for_generation(
        self, outputs: RWKVOutput, model_kwargs: dict[str, Any], *args: Any, **settings: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **settings)
        if outputs.state is not None:
            model_kwargs |= {REORDERED: outputs.state, "read": True}
        return model_kwargs

    @classmethod
    def _supports_default_dynamic_cache(cls, *_: Any) -> bool:
        """Keep `generate` from making a cache of keys and values."""
        return False

    def _reorder_cache(self, state: State, rows: torch.Tensor) -> State:
        """The State of the sequences that a search over beams goes on with."""
        return state.selected(rows.to(state[0].wkv.device))

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **settings: Any) -> None:
        self.model.grad_checkpoint = enable

    def _init_weights(self, module: nn.Module) -> None:
        """Draw a new model as a whole by its generation's rule, once, when transformers asks for its first part."""
        if module is self.model.emb and not module.weight.is_meta:
            self.config.family.init_weights(self.model)


class RWKV6ForCausalLM(RWKVForCausalLM):
    """An RWKV-6."""

    config_class = RWKV6Config


class RWKV7ForCausalLM(RWKVForCausalLM):
    """An RWKV-7."""

    config_class = RWKV7Config


MODELS = (RWKV6ForCausalLM, RWKV7ForCausalLM)


def class_of(config: RWKVConfig) -> type[RWKVForCausalLM]:
    """The class of a generation's models, by its config."""
    return next(kind for kind in MODELS if isinstance(config, kind.config_class))


def refuse_states(base: Base) -> None:
    """Raise UserError for a model with tuned time states, which have no place in transformers."""
    if split_time_states(base.tensors)[1]:
        raise UserError(
            f"{base.path} holds tuned time states, which a Hugging Face model has no place for; take the model without "
            "them, and give the state to its runtime"
        )


def local(folder: str | Path, settings: dict[str, Any]) -> Path:
    """The path of a model's folder, downloaded if it is a name on the hub; takes `subfolder` out of settings."""
    inside = settings.pop("subfolder", "")
    if Path(folder).exists():
        return Path(folder) / inside
    from huggingface_hub import snapshot_download

    known = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    given = {name: settings.pop(name) for name in known if settings.get(name) is not None}
    return Path(snapshot_download(str(folder), allow_patterns=["*.json", "*.safetensors", "*.txt"], **given)) / inside
