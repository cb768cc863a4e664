"""An adapter method: a value that defines how a linear layer changes, with its abilities as objects.

A method is a file with one `METHOD`, and a line in the table of config/adapter.py. The parser, injection, adapter
files, merging, conversion and the Hugging Face layers use this value; none of them depends on a method's name. Its
mathematics is in `tensors`, `change` and `apply`. Each further ability is a small object, or None if the method lacks
it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ..config import AdapterConfig
from .change import Change, Params
from .product import Frozen
from .quant import roundtrip

Shapes = dict[str, tuple[int, ...]]
Apply = Callable[[Tensor, Frozen, Params, float, float], Tensor]
Initial = Callable[[Tensor, AdapterConfig, Tensor | None], Params]
FirstStep = Callable[["Method", AdapterConfig, int], float]


class Layer(Protocol):
    """The layer (layer.py), as far as the start of a method fills it."""

    weight: Tensor
    scale: float

    def get_parameter(self, target: str) -> nn.Parameter: ...

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None: ...


class Misfit(NamedTuple):
    """The reason why a size does not fit a layer: the setting (a field of AdapterConfig) has the given value, with a
    problem, in words; nearest is the nearest value that fits (0: any lower one); instead names a method without that
    rule ("": none); too_large: such a value is a waste, but computes the same."""

    setting: str
    value: int
    problem: str
    nearest: int = 0
    instead: str = ""
    too_large: bool = False


@dataclass(frozen=True)
class Tensors:
    """The tensors of one layer. parameters are those that train; size names the fields of AdapterConfig that their
    shapes follow from, the rank in most methods; shapes(config, out, in) -> {name: shape} of parameters and constants;
    sizes(params) -> {field: value} of `size`, read off the tensors; misfit(config, out, in) -> the Misfit, or None.
    idle names those that change nothing if all others are zero."""

    parameters: tuple[str, ...]
    size: tuple[str, ...]
    shapes: Callable[[AdapterConfig, int, int], Shapes]
    sizes: Callable[[Params], dict[str, Any]]
    misfit: Callable[[AdapterConfig, int, int], Misfit | None] = lambda config, out, in_: None  # fits any
    idle: tuple[str, ...] = ()

    def config(self, params: Params) -> AdapterConfig:
        """An AdapterConfig of the size of params."""
        sizes: dict[str, Any] = self.sizes(params)
        return AdapterConfig(**sizes)


def register(layer: Layer, constants: Params) -> None:
    """Keep constants as buffers of a layer, in its weight's dtype."""
    for name, constant in constants.items():
        layer.register_buffer(name, constant.to(layer.weight.device, layer.weight.dtype), persistent=False)


@dataclass(frozen=True)
class Constants:
    """Tensors that a file holds beside those that train. make(weight, config, gradient) computes them for a new layer;
    the loss's gradient (out, in) is given if from_gradient is set. keep(layer, constants) puts them, or those of a
    file, into a layer."""

    names: tuple[str, ...]
    make: Initial
    keep: Callable[[Layer, Params], None] = register
    from_gradient: bool = False


@dataclass(frozen=True)
class Residual:
    """Training on a base that something was taken out of: base(weight, params, scale) computes it, of weight's dtype;
    first(params) gives the params that a new layer began with."""

    base: Callable[[Tensor, Params, float], Tensor]
    first: Callable[[Params], Params]


@dataclass(frozen=True)
class Alpha:
    """A scale that users give as alpha: scale = alpha / divisor(rank), and 1 if alpha is 0."""

    divisor: Callable[[int], float] = float

    def scale(self, config: AdapterConfig) -> float:
        return config.alpha / self.divisor(config.rank) if config.alpha else 1.0

    def alpha(self, scale: float, rank: int) -> float:
        """The alpha that gives this scale."""
        return scale * self.divisor(rank)


class UpstreamLayer(NamedTuple):
    """A layer to be written as RWKV-PEFT's: the module's name, its params and scale, and the base's weight or None."""

    module: str
    params: Params
    scale: float
    weight: Tensor | None


@dataclass(frozen=True)
class Upstream:
    """The form of the method in RWKV-PEFT's files: tensors(layer) -> {name: tensor} there ("bone" for Bone's), or
    raises UserError; remark(rank, scale) is a note on merging those files, or ""."""

    tensors: Callable[[UpstreamLayer], Params] = lambda layer: layer.params
    remark: Callable[[int, float], str] = lambda rank, scale: ""


class HfForm(NamedTuple):
    """The form of the method in Hugging Face peft's BONE and MISS: the init_weights that mean it, first the one in our
    files, and the dimensions of its tensor."""

    names: tuple[bool | str, ...]
    dims: int = 2


@dataclass(frozen=True)
class Method:
    """One way to adapt a linear layer of weight W (out, in).

    name is unique, and the method's name in files' metadata, unless another method's files serve (saved_as).
    apply(x, base, params, scale, dropout) computes y = x W'ᵀ + bias: x (..., in), the Frozen
    layer W, params {name: tensor}, the layer's scale, and the probability with which an input is hidden from the
    adapter (0 for methods without dropout) -> (..., out) in x's dtype. draw(layer, config) fills the parameters of a
    new layer, which are zeros.

    Abilities: term(params, scale) is what `apply` adds to the base layer as data, differentiable in params, for fusions
    that compute it together with the operation before or after the layer. lora(params, scale, out, in) is the change as
    factors `lora_A` (r, in) and `lora_B` (out, r), float32, with exactly that product. step(method, config, in) is the
    distance that Adam's first step moves a layer's weight: the root mean square of the change of its entries over the
    learning rate (docs/guides/learning-rates.md); if it depends on the weight, of a square one with entries of mean
    square 1/in. rates are (tensor, AdapterConfig field that multiplies its rate).
    """

    name: str
    tensors: Tensors
    change: Change
    apply: Apply
    draw: Callable[[Layer, AdapterConfig], None] | None = None
    held: Constants | None = None
    residual: Residual | None = None
    alpha: Alpha | None = None
    rates: tuple[tuple[str, str], ...] = ()
    step: "FirstStep" = lambda method, config, in_features: 1.0
    lora: Callable[[Params, float, int, int], Params] | None = None
    upstream: Upstream | None = None
    hf: HfForm | None = None
    saved_as: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled model names its method, whose tables and functions the file of that name holds."""
        return load_method, (self.name,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Method":
        """A copied model has the same method."""
        return self

    @property
    def label(self) -> str:
        """The method's name in messages."""
        return f"Bone {self.name}" if self.parameters == ("bone",) else self.name

    @property
    def file_name(self) -> str:
        """The method's name in files."""
        return self.saved_as or self.name

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the tensors that train."""
        return self.tensors.parameters

    @property
    def constants(self) -> tuple[str, ...]:
        """The names of the tensors that a file holds besides."""
        return () if self.held is None else self.held.names

    def scale(self, config: AdapterConfig) -> float:
        """The factor of the update of an AdapterConfig's adapter."""
        return 1.0 if self.alpha is None else self.alpha.scale(config)

    def size_words(self, sizes: Mapping[str, int]) -> str:
        """Write {field: value} of a size: "rank 8", or "" for a method without one."""
        return ", ".join(f"{field} {sizes[field]}" for field in self.tensors.size)

    def training_base(self, weight: Tensor, params: Params, scale: float) -> Tensor:
        """The weight that the layer trains on, of weight's dtype."""
        return weight if self.residual is None else self.residual.base(weight, params, scale)

    def merged(self, weight: Tensor, params: Params, *, scale: float = 1.0, quant: str = "none") -> Tensor:
        """The weight that a trained layer computed with, rebuilt from the original weight.

        Differs from weight + delta by the rounding that the training base had: a residual base is rounded to weight's
        dtype, and quant ("nf4", "int8") replays the quantization of the base. weight (out, in), any float dtype ->
        (out, in) float32.
        """
        weight = self.training_base(weight, params, scale)
        weight = roundtrip(weight, quant) if quant != "none" else weight
        return self.change.added(weight.float(), params, scale)


def rank_up_to(most: Callable[[int, int], int]) -> Callable[[AdapterConfig, int, int], Misfit | None]:
    """The `misfit` of a method that can use ranks up to most(out, in) on a layer (out, in)."""

    def misfit(config: AdapterConfig, out_features: int, in_features: int) -> Misfit | None:
        rank, limit = config.rank, most(out_features, in_features)
        if rank <= limit:
            return None
        return Misfit("rank", rank, f"is more than {limit}, the most that it can use", limit, too_large=True)

    return misfit


def nearest_divisor(number: int, value: int) -> int:
    """The divisor of a number that is nearest to a value, the larger of two equally near ones."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - value), -d))


def load_method(name: str) -> Method:
    """The METHOD of the file of that name."""
    method: Method = import_module(f".{name.replace('-', '_')}", __package__).METHOD
    return method
