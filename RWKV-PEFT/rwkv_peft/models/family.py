"""The interface of a generation of RWKV, through which everything else works on any generation.

A generation is a folder with one subclass of Family in it, and a line in GENERATIONS (tables.py). Everything that
holds only for one generation (keys, shapes, names in other formats, initialization) is in its folder.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from ..cli.errors import UserError, some
from ..cli.names import generation
from ..config import ModelConfig
from .layout import state_parts, time_state_shapes
from .state import split_time_states

WEIGHTS = "bfloat16, float16 or float32"
Config = TypeVar("Config", bound=ModelConfig)
Model = TypeVar("Model", bound=nn.Module)
# (name in the file, shape, function that makes the float tensor, True for a large matrix)
GgufTensor = tuple[str, tuple[int, ...], Callable[[], Tensor], bool]


class Family(ABC, Generic[Config, Model]):
    """One generation, over its own ModelConfig and model. version is its key in GENERATIONS (tables.py); sign is a key
    that only its checkpoints have; targets are the linear layers of a block that take adapters, as ends of their names;
    parts are the groups of other parameters that --train_parts names; rows_are_keys gives the axes of a wkv state in
    the model (state.py); states_in_model is True if the `rwkv` package looks for time states in a model's file.

    `class F(Family, of=modules)` takes each function that these modules have under the name of a method below.
    """

    model: type[nn.Module]  # called as model(config, grad_checkpoint)
    version: str
    sign: str
    targets: tuple[str, ...]
    parts: tuple[str, ...]
    rows_are_keys: bool
    states_in_model: bool
    kernel: str  # the name of its recurrence, for messages
    gguf_architecture = ""  # of a generation that has a form as GGUF
    tables: tuple[str, ...] = ()  # ends of the keys of its Tables (parts.py)

    def __init_subclass__(cls, of: Iterable[ModuleType] = ()) -> None:
        super().__init_subclass__()
        for module in of:
            for name in vars(Family).keys() & vars(module).keys():
                if callable(vars(module)[name]):
                    setattr(cls, name, staticmethod(vars(module)[name]))

    @property
    def name(self) -> str:
        """Its name for users."""
        return generation(self.version)

    @abstractmethod
    def dimensions(self, tensors: Mapping[str, Tensor]) -> Config:
        """{key: tensor} (anything with a shape) -> the generation's ModelConfig. Raises KeyError with a missing key,
        ValueError or IndexError if a shape does not fit."""

    @abstractmethod
    def new_dimensions(
        self, n_layer: int, n_embd: int, vocab_size: int, dim_att: int = 0, dim_ffn: int = 0, head_size: int = 0
    ) -> Config:
        """ModelConfig of a new model; 0 stands for the generation's default, by the other sizes. Raises UserError."""

    @abstractmethod
    def shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Every key of a checkpoint, in the order of official files, with its shape."""

    def build(self, config: Config, grad_checkpoint: bool = False) -> Model:
        """The model, a torch module under the checkpoints' keys, its parameters empty."""
        return cast(Model, self.model(config, grad_checkpoint))

    @abstractmethod
    def init_weights(self, model: Model) -> None:
        """Fill every parameter of a new model in place; draws from torch's global generator."""

    @abstractmethod
    def part_of(self, key: str) -> str | None:
        """The member of `parts` that a parameter belongs to, or None."""

    @abstractmethod
    def learning_rate(self, key: str) -> tuple[float, bool]:
        """(factor of a parameter's learning rate, True if it may decay) by RWKV-LM's rule for this generation."""

    @abstractmethod
    def kernels(self, *names: str) -> Mapping[str, str | None]:
        """Each backend of some names, of all by default -> None if its recurrence can run here, else the reason and
        the remedy."""

    def formless(self, what: str) -> UserError:
        """The refusal of a format in which this generation has no form. A generation has a form in other tools' formats
        once it overrides the methods below."""
        return UserError(f"{self.name} has no form as {what} here; take a .pth")

    def to_hf(self, key: str) -> str:
        """A key as the generation's Hugging Face model spells it."""
        return key

    def from_hf(self, key: str) -> str:
        """The inverse of to_hf; a key that is official already stays as it is."""
        return key

    def hf_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{key there: tensor} of {official key: tensor}, whole or a part, for the generation's Hugging Face model."""
        return {self.to_hf(key): tensor for key, tensor in tensors.items()}

    def from_hf_tensors(
        self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], name: str | Path
    ) -> dict[str, Tensor]:
        """The inverse of hf_tensors. settings come from config.json, name is the folder's. Raises UserError for a
        setting that makes it another model."""
        return {self.from_hf(key): tensor for key, tensor in tensors.items()}

    def from_layers(
        self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], name: str | Path
    ) -> dict[str, Tensor] | None:
        """{official key: tensor, a view} of {key: tensor} in a layout with names of its own, `model.layers.0.…`, such
        as flash-linear-attention's; None for another layout, or if this generation reads none. settings come from
        config.json, name is the folder's. Raises UserError for a missing or unexpected tensor, and for a setting that
        makes it another model."""
        return None

    def to_fla(self, base: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors in flash-linear-attention's layout, without those that its models do not compute, and the
        settings of config.json but the tokenizer's. Raises UserError without such a form."""
        raise self.formless("flash-linear-attention's folder")

    def hf_settings(self, config: Config) -> dict[str, Any]:
        """config.json of a Hugging Face folder, as a dict. Raises UserError without such a form."""
        raise self.formless("a Hugging Face folder")

    def to_web(self, key: str) -> str:
        """A key as web-rwkv and Ai00 spell it. Raises UserError without such a form."""
        raise self.formless("web-rwkv's .st or .safetensors")

    def from_web(self, key: str) -> str:
        """The inverse of to_web."""
        return key

    def swapped_in_web(self, key: str) -> bool:
        """True if web-rwkv keeps the last two axes of this (official) tensor the other way round."""
        return False

    def gguf_tensors(self, base: Mapping[str, Tensor], config: Config) -> Iterator[GgufTensor]:
        """The GgufTensor of each tensor in llama.cpp's form, in order. Raises UserError without such a form."""
        raise self.formless("GGUF")

    def gguf_settings(self, config: Config) -> Iterable[tuple[str, float]]:
        """(name of a method of gguf.GGUFWriter, its argument) of each setting of this architecture."""
        raise self.formless("GGUF")

    def config_of(self, tensors: Mapping[str, Tensor], name: str | Path = "the checkpoint") -> Config:
        """ModelConfig by the shapes of {key: tensor}. Raises UserError if a tensor is missing or does not fit."""
        try:
            return self.dimensions(tensors)
        except KeyError as error:
            raise UserError(f"{name} is not an {self.name} model: it has no tensor {error.args[0]}") from error
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise UserError(f"{name} is not an {self.name} model: {error}") from error

    def check(self, tensors: Mapping[str, Tensor], name: str | Path = "the checkpoint") -> Config:
        """Raise UserError unless {key: tensor} is a complete model of this generation, with the same STATE_PARTS for
        every layer, and nothing else; -> its ModelConfig."""
        config = self.config_of(tensors, name)
        shapes = self.shapes(config) | time_state_shapes(config, state_parts(tensors))
        if wrong := differences(shapes, tensors):
            raise UserError(
                f"{name} is not a complete {self.name} model of {config.n_layer} layers: {wrong}; take the file as its "
                "release or training wrote it"
            )
        for key, shape in shapes.items():
            if tuple(tensors[key].shape) != shape:
                raise UserError(
                    f"{name}: {key} has shape {tuple(tensors[key].shape)}, and {shape} is due in a model "
                    f"of {config.n_embd} channels and {config.dim_att} attention channels"
                )
        for key, tensor in tensors.items():
            if not tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise UserError(f"{name}: {key} is {kind}; weights must be {WEIGHTS}, not quantized")
        return config

    def unread_states(self, keys: Iterable[str]) -> str:
        """The sentence on time states among the keys of a model's file from which the `rwkv` package does not start by
        itself, or ""."""
        if not self.states_in_model:
            return f"the rwkv package does not look for them in an {self.name} file"
        return "the rwkv package does not look for shifts in a model's file" if "shift" in state_parts(keys) else ""

    def load(self, tensors: Mapping[str, Tensor], config: Config, grad_checkpoint: bool = False) -> Model:
        """The model over {key: tensor}, sharing their memory; time states are not parameters, and are left out."""
        with torch.device("meta"):
            model = self.build(config, grad_checkpoint)
        model.load_state_dict(split_time_states(tensors)[0], strict=True, assign=True)
        return model


def differences(due: Iterable[str], found: Iterable[str]) -> str:
    """Describe how found keys differ from due ones: "2 missing tensors (a, b); 1 unexpected tensors (c)"; "" if they
    are the same."""
    due, found = dict.fromkeys(due), dict.fromkeys(found)
    missing, unexpected = [key for key in due if key not in found], [key for key in found if key not in due]
    return "; ".join(
        f"{len(keys)} {word} tensors ({some(keys)})"
        for word, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    )
