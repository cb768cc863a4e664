"""RWKV as a model of transformers, over the package's own models and kernels.

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

from ..checkpoints.adapters import AdapterSource
from ..checkpoints.base import Base, base_of, save_model
from ..checkpoints.hf_folder import read_hf_model
from ..cli.errors import UserError
from ..inference.loading import merged_base
from ..inference.speakers import DecodingCopy
from ..models.parts import LanguageModel
from ..models.state import State, split_time_states
from .rwkv_backbone import CACHES, Backbone, BackboneOutput, Cached, refuse_others
from .rwkv_config import RWKV6Config, RWKV7Config, RWKVConfig, config_of, config_of_base, is_pth

PREFIX = "model."  # of the parameters' names, before the official key
# the name under which a search over beams reorders a cache: any that is listed, or in older versions this one alone
REORDERED = "past_key_values" if "past_key_values" in ALL_CACHE_NAMES else "state"
SCORE = "score."  # of the name of a new head, in a saved folder too
# the entries of a folder's config.json that are not told by its tensors
KEPT = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "id2label", "label2id", "problem_type"),
    "output_hidden_states",
)


@dataclass
class RWKVOutput(Cached):
    """loss (a scalar, if labels were given), logits (B, T, V), the State after the tokens if use_cache is set, and
    hidden_states as in BackboneOutput."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    state: State | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class RWKVScores(ModelOutput):
    """loss (a scalar, if labels were given), logits (B, num_labels), and hidden_states as in BackboneOutput."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class RWKVPreTrainedModel(PreTrainedModel):
    """An RWKV-6 or RWKV-7; model is the generation's own module, under the checkpoints' official names. A class of no
    generation makes models of the class for theirs."""

    config_class = RWKVConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _is_stateful = True  # no token can be taken back
    model: Backbone

    def __init__(self, config: RWKVConfig) -> None:
        super().__init__(config)
        self.model = Backbone(config.family.build(config.model_config()))

    @classmethod
    def of(cls, config: RWKVConfig) -> Any:
        """The class for a config's generation. Raises UserError if this one is for another."""
        kinds = cls.__subclasses__() if cls.config_class is RWKVConfig else [cls]
        found = next((kind for kind in kinds if isinstance(config, kind.config_class)), None)
        if found is None:
            raise UserError(f"{cls.__name__} is for another generation than the model, which is {config.family.name}")
        return found

    @classmethod
    def from_pretrained(cls, folder: str | Path | None, *args: Any, **settings: Any) -> Any:
        """Load a .pth, the folder of an RWKV model, or its name on the hub, in one of three layouts: RWKV's own, as
        save_pretrained and `rwkv-peft convert` write it, or flash-linear-attention's. settings as in transformers.
        Raises UserError for a file or folder that holds no complete model."""
        if settings.get("quantization_config") or settings.get("load_in_8bit") or settings.get("load_in_4bit"):
            raise UserError(
                "quantization_config: transformers finds no layer to quantize in an RWKV, whose linear layers are its "
                "own; rp.load(path, weights='int8') computes with int8 or int4, and rp.add_adapter(model, quant='nf4') "
                "trains on a base in nf4 or int8"
            )
        if folder is None or settings.get("state_dict") is not None:
            return super().from_pretrained(folder, *args, **settings)
        given, others = settings.pop("config", None), {}
        if is_pth(folder):
            base = merged_base(folder)
            config = given if isinstance(given, RWKVConfig) else config_of_base(base)
        else:
            path = local(folder, settings)
            tensors = read_hf_model(path)
            others = {key: tensors.pop(key) for key in list(tensors) if key.startswith(SCORE)}
            base = base_of(tensors, path)
            config = given if isinstance(given, RWKVConfig) else type(config_of(base.config)).from_pretrained(path)
        refuse_states(base)
        kept = {name: getattr(config, name) for name in KEPT if getattr(config, name, None) is not None}
        config = config_of(base.config, **kept)
        dtype = {name: settings.pop(name) for name in ("dtype", "torch_dtype") if name in settings}
        config, settings = type(config).from_dict(config.to_dict(), return_unused_kwargs=True, **settings)
        state = {PREFIX + key: tensor for key, tensor in base.tensors.items()}
        model = super(RWKVPreTrainedModel, cls.of(config)).from_pretrained(
            None, *args, config=config, state_dict=state | others, **settings, **dtype
        )
        model.config._name_or_path = model.name_or_path = str(folder)
        model.model.head.requires_grad_(model.can_generate())
        return model

    def save_pretrained(self, folder: str | Path, *args: Any, **settings: Any) -> None:
        """Save config.json and .safetensors in the layout of RWKV's own folders, which `rwkv-peft convert` reads."""
        given = settings.pop("state_dict", None)
        state = self.state_dict() if given is None else given
        named = self.config.family.hf_tensors({key.removeprefix(PREFIX): tensor for key, tensor in state.items()})
        super().save_pretrained(folder, *args, state_dict=named, **settings)

    def with_defaults(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward, with output_hidden_states from the config if it is not given."""
        given = arguments.get("output_hidden_states")
        return arguments | {"output_hidden_states": self.config.output_hidden_states if given is None else given}

    def get_input_embeddings(self) -> nn.Module:
        return self.model.emb

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.emb = value

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **settings: Any) -> None:
        self.model.grad_checkpoint = enable

    def _init_weights(self, module: nn.Module) -> None:
        """Draw a new model as a whole by its generation's rule, once, at transformers' call for its first part."""
        if module is self.model.emb and not module.weight.is_meta:
            self.config.family.init_weights(self.model)


class RWKVModel(RWKVPreTrainedModel):
    """An RWKV without its head, for AutoModel; the head stays with it, frozen, so that a saved model is complete."""

    def __init__(self, config: RWKVConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(self, input_ids: torch.Tensor | None = None, **arguments: Any) -> BackboneOutput | tuple[Any, ...]:
        """Compute tokens (B, T) -> BackboneOutput; the arguments are Backbone's, and return_dict."""
        as_tuple = arguments.pop("return_dict", None) is False
        output = self.model(input_ids, **self.with_defaults(arguments))
        return output.to_tuple() if as_tuple else output


class RWKVForSequenceClassification(RWKVPreTrainedModel):
    """An RWKV with a new head over the last token of each row, for AutoModelForSequenceClassification, such as a reward
    model; the old head stays with it, frozen, so that a saved model is complete."""

    def __init__(self, config: RWKVConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **arguments: Any,
    ) -> RWKVScores | tuple[Any, ...]:
        """Compute rows of tokens (B, T) -> RWKVScores. labels (B) are classes or numbers; without a mask, the token
        that pads is left out. The other arguments are RWKVModel's."""
        as_tuple = arguments.pop("return_dict", None) is False
        arguments.pop("num_items_in_batch", None)  # of a trainer; the loss is a mean over rows
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        arguments["use_cache"] = False  # a row is read as a whole
        found = self.model(input_ids, attention_mask, **self.with_defaults(arguments))
        hidden = found.last_hidden_state
        last = hidden.new_full((len(hidden),), hidden.shape[1] - 1, dtype=torch.long)
        if attention_mask is not None:
            places = torch.arange(attention_mask.shape[1], device=hidden.device)
            last = (places * attention_mask).argmax(1)
        logits = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        output = RWKVScores(loss, logits, found.hidden_states)
        return output.to_tuple() if as_tuple else output

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.score:
            PreTrainedModel._init_weights(self, module)
        super()._init_weights(module)


class RWKVForCausalLM(RWKVPreTrainedModel, GenerationMixin):
    """An RWKV as a causal language model. from_pth and from_pretrained make one of the class of the generation that
    they find."""

    def __init__(self, config: RWKVConfig) -> None:
        super().__init__(config)
        self._decoding = DecodingCopy()
        self.post_init()

    @classmethod
    def from_pth(
        cls,
        path: str | Path,
        adapters: Iterable[str | Path] = (),
        dtype: torch.dtype | str | None = None,
        **settings: Any,
    ) -> "RWKVForCausalLM":
        """Load a .pth with adapters merged into it, in its own dtype (None or "auto") or another. settings are config
        entries, such as eos_token_id. Raises UserError for files that cannot be read or do not fit together."""
        wanted = dtype_named(dtype)
        base = merged_base(path, [AdapterSource(adapter) for adapter in adapters])
        refuse_states(base)
        config = config_of(base.config, **settings)
        with torch.device("meta"):
            model = cls.of(config)(config)
        model.model = Backbone(base.family.load(base.tensors, base.config).to(wanted))
        model.config.dtype = model.dtype
        model.config._name_or_path = model.name_or_path = str(path)
        return model.eval()

    def save_pth(self, path: str | Path) -> None:
        """Write a .pth under official names, as every RWKV runtime takes it. Raises UserError while adapters are in
        the model, and if the file cannot be written."""
        tensors = self.model.state_dict()
        shapes = self.config.family.shapes(self.model.config)
        if odd := next((key for key in tensors if key not in shapes), None):
            raise UserError(f"{odd} is no tensor of the model but an adapter's; call merge_and_unload() first")
        save_model(path, {key: tensors[key] for key in shapes})

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
        decoder: LanguageModel | None = None,
        **settings: Any,
    ) -> RWKVOutput | tuple[Any, ...]:
        """Compute tokens (B, T), which go on from state -> RWKVOutput, of the last logits_to_keep tokens (0: of all) or
        of those with these indices.

        labels (B, T) belong to the same tokens, -100 where none counts. `generate` gives a decoder that computes a
        token of each row. The other arguments are Backbone's.
        """
        settings = self.with_defaults(settings)
        if decoder is not None and input_ids is not None and not settings["output_hidden_states"]:
            return RWKVOutput(None, *decoder(input_ids, state))
        as_tuple = settings.pop("return_dict", None) is False
        count = {name: settings.pop(name) for name in ("num_items_in_batch",) if name in settings}  # of a trainer
        found = self.model(input_ids, attention_mask, state, inputs_embeds, use_cache, **settings)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **count)
        output = RWKVOutput(loss, logits, found.state, found.hidden_states)
        return output.to_tuple() if as_tuple else output

    def generate(self, *args: Any, **settings: Any) -> Any:
        """transformers' generate, which takes a State as state, past_key_values or cache."""
        caches = {name: settings.pop(name) for name in CACHES if name in settings}
        if (state := refuse_others(settings.get("state"), caches)) is not None:
            settings["state"] = state
        return super().generate(*args, **settings)

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
        given: dict[str, Any]
        if read:
            state = settings.get("past_key_values", state)
            given = {"input_ids": input_ids[:, -1:].contiguous(), "state": state, "use_cache": True}
            return given | {"decoder": settings.get("decoder")}
        given = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        kept = settings.get("logits_to_keep")
        given |= {"attention_mask": attention_mask, "state": state, "use_cache": use_cache}
        return given | ({} if kept is None else {"logits_to_keep": kept})

    def _update_model_kwargs_for_generation(
        self, outputs: RWKVOutput, model_kwargs: dict[str, Any], *args: Any, **settings: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **settings)
        if outputs.state is not None:
            if "read" not in model_kwargs:
                decoder = self._decoding.of(
                    self.model, Base(self.name_or_path, {}, self.config.family, self.model.config)
                )
                model_kwargs |= {"read": True, "decoder": None if decoder is self.model else decoder}
            model_kwargs |= {REORDERED: outputs.state}
        return model_kwargs

    @classmethod
    def _supports_default_dynamic_cache(cls, *_: Any) -> bool:
        """Keep `generate` from making a cache of keys and values."""
        return False

    def _reorder_cache(self, state: State, rows: torch.Tensor) -> State:
        """The State of the sequences that a search over beams goes on with."""
        return state.selected(rows.to(state[0].wkv.device))


class RWKV6Model(RWKVModel):
    """An RWKV-6 without its head."""

    config_class = RWKV6Config


class RWKV7Model(RWKVModel):
    """An RWKV-7 without its head."""

    config_class = RWKV7Config


class RWKV6ForCausalLM(RWKVForCausalLM):
    """An RWKV-6."""

    config_class = RWKV6Config


class RWKV7ForCausalLM(RWKVForCausalLM):
    """An RWKV-7."""

    config_class = RWKV7Config


class RWKV6ForSequenceClassification(RWKVForSequenceClassification):
    """An RWKV-6 with a head over the last token."""

    config_class = RWKV6Config


class RWKV7ForSequenceClassification(RWKVForSequenceClassification):
    """An RWKV-7 with a head over the last token."""

    config_class = RWKV7Config


def dtype_named(name: torch.dtype | str | None) -> torch.dtype | None:
    """The torch dtype of a name as transformers takes it, such as "bfloat16"; None for "auto". Raises UserError."""
    found = None if name == "auto" else getattr(torch, name, name) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype | None) or (found is not None and not found.is_floating_point):
        raise UserError(f"dtype={name!r} is no dtype of a model; give torch.bfloat16, torch.float16 or torch.float32")
    return found


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
