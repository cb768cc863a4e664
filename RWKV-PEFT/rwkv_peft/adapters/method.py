"""What an adapter method says of itself, so that everything else works on any method.

A method is a file with one subclass of Method in it, and a line in METHODS (methods.py). The parser, injection, adapter
files, merging, conversion and the Hugging Face layers ask the method; none of them knows one by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import nn

from ..config import AdapterConfig
from ..errors import UserError
from .product import Frozen
from .quant import roundtrip

Params = Mapping[str, torch.Tensor]  # {tensor name: tensor} of the adapter of one layer
Shapes = dict[str, tuple[int, ...]]


class Layer(Protocol):
    """What a Method's `begin` works on: the layer (layer.py), a torch module."""

    weight: torch.Tensor
    scale: float

    def get_parameter(self, target: str) -> nn.Parameter: ...

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None: ...


class BlockTerm(NamedTuple):
    """What an adapter adds to y = W x, as data, if it works on blocks of the input: with u_b = B_b x_b for each b,
    y = W (x + u) and, added to each block of y, factor Σ_b u_b. matrices: B (in/r, r, r)."""

    matrices: torch.Tensor
    factor: float


class Misfit(NamedTuple):
    """Why a method's settings do not fit a layer: setting ("rank" or "mini_rank") has the given value, and problem says
    what is wrong with it; nearest is the nearest value that fits (0: any lower one); instead names a method without
    that rule ("": none); too_large: such a value is a waste, and computes what it should all the same."""

    setting: str
    value: int
    problem: str
    nearest: int = 0
    instead: str = ""
    too_large: bool = False


class Method(ABC):
    """One way to adapt a linear layer of weight W (out, in).

    name is unique, and what files' metadata say (or saved_as, where another method's files serve); peft is the word
    that --peft takes, one for all forms of a method; label says it to people. json_flag is the flag of train.py that
    takes the settings as JSON, rank_flag where the rank is given, alpha_key the key of alpha in that JSON, init_flag
    where the initial factors of a file of RWKV-PEFT are named.

    parameters are the tensors that train, constants those that a file holds besides; idle are those of both that change
    nothing by themselves. mini methods have a mini_rank, scaled ones an alpha, dropout ones take dropout; residual ones
    train on a base that something was taken out of; from_gradient ones start from the gradient of the loss.
    learning_rates are (tensor, AdapterConfig field that multiplies its rate).

    hf_names are the init_weights of Hugging Face peft's BONE and MISS that mean this method, first the one that its
    files say, and hf_dims the dimensions of its tensor there. in_rwkv_peft: RWKV-PEFT's files hold its tensors as they
    are.
    """

    name: str
    peft: str
    label: str
    json_flag: str
    rank_flag: str
    alpha_key: str | None = None
    init_flag: str | None = None
    parameters: tuple[str, ...]
    constants: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    saved_as: str | None = None
    mini = False
    scaled = False
    dropout = False
    residual = False
    from_gradient = False
    learning_rates: tuple[tuple[str, str], ...] = ()
    hf_names: tuple[bool | str, ...] = ()
    hf_dims = 2
    in_rwkv_peft = False

    @property
    def file_name(self) -> str:
        """The method's name in files."""
        return self.saved_as or self.name

    def scale(self, config: AdapterConfig) -> float:
        """What multiplies the update of an AdapterConfig's adapter."""
        return 1.0

    def alpha(self, scale: float, rank: int) -> float:
        """The alpha that gives this scale."""
        return scale * rank

    def first_step(self, config: AdapterConfig, in_features: int) -> float | None:
        """How far Adam's first step moves a layer's weight: the root mean square of the change of its entries over the
        learning rate (docs/guides/learning-rates.md). None where that depends on the weight."""
        return 1.0

    @abstractmethod
    def fit(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Misfit | None:
        """The Misfit of a rank and a layer, or None where they fit."""

    @abstractmethod
    def shapes(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Shapes:
        """{tensor name: shape} of the parameters and constants on a layer that the rank fits."""

    def sizes(self, params: Params) -> tuple[int, int]:
        """(rank, mini_rank) of {tensor name: tensor}, as the shapes tell it."""
        return params[self.parameters[0]].shape[0], 0

    def begin(self, layer: Layer, constants: Params) -> None:  # noqa: B027 (most have nothing to do)
        """Fill the parameters of a new layer, which are zeros; constants are `initial_factors` or a file's."""

    def initial_factors(
        self, weight: torch.Tensor, config: AdapterConfig, gradient: torch.Tensor | None = None
    ) -> Params:
        """{constant: tensor} that a new layer over weight starts from; gradient (out, in) is that of the loss."""
        return {}

    def first(self, params: Params) -> Params | None:
        """The params that a new layer began with; None where it began as its base."""
        return None

    @abstractmethod
    def apply(self, x: torch.Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> torch.Tensor:
        """y = x W'ᵀ + bias without forming W': x (..., in), the Frozen layer W, params {name: tensor} -> (..., out) in
        x's dtype. scale is the layer's; dropout the probability with which an input is hidden from the adapter, 0 but
        for methods that take it."""

    def term(self, params: Params, scale: float) -> BlockTerm | None:
        """What `apply` adds to the base layer, differentiable in params, for fusions (fused/) that compute it together
        with the operation before or after the layer; None if the method has no such form: they call the layer."""
        return None

    @abstractmethod
    def delta(self, weight: torch.Tensor, params: Params, scale: float = 1.0) -> torch.Tensor:
        """The change W' - W: weight (out, in) float32 or float64, params {name: tensor} of any float dtype -> (out, in)
        in weight's dtype, in which the arithmetic is done. What layers are tested against."""

    def training_base(self, weight: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
        """The weight that the layer trains on, of weight's dtype."""
        return weight

    def merged(self, weight: torch.Tensor, params: Params, *, scale: float = 1.0, quant: str = "none") -> torch.Tensor:
        """The weight that a trained layer computed with, rebuilt from the original weight.

        Differs from weight + delta by the rounding that the training base had: a residual base is rounded to weight's
        dtype, and quant ("nf4", "int8") replays the quantization of the base. weight (out, in), any float dtype ->
        (out, in) float32.
        """
        weight = self.training_base(weight, params, scale)
        weight = roundtrip(weight, quant) if quant != "none" else weight
        return self.merged_with(weight.float(), params, scale)

    def merged_with(self, base: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
        """W' from the float32 base that the layer trained on."""
        return base + self.delta(base, params, scale)

    def row_unit(self, params: Params) -> int:
        """Bands of rows of a weight must start and end at multiples of this to be merged by themselves."""
        return 1

    def rows(self, params: Params, start: int, stop: int) -> Params:
        """The params of rows start to stop of the weight."""
        return params

    @abstractmethod
    def opposite(self, params: Params, scale: float, amount: float = 1.0) -> Params:
        """params that `removed` takes to undo `amount` times the change. Raises UserError where nothing undoes it."""

    def removed(self, weight: torch.Tensor, opposite: Params, scale: float) -> torch.Tensor:
        """W from W' (out, in), up to rounding, by the params that `opposite` gives."""
        return weight + self.delta(weight, opposite, scale)

    def as_lora(self, params: Params, scale: float, out_features: int, in_features: int) -> Params | None:
        """The change of a layer as LoRA's: `lora_A` (r, in) and `lora_B` (out, r), float32, whose product lora_B lora_A
        it is exactly; None where it has no such form."""
        return None

    def for_rwkv_peft(self, module: str, params: Params, scale: float, weight: torch.Tensor | None) -> Params:
        """{tensor name: tensor} as RWKV-PEFT's files hold the adapter of a layer ("bone" for Bone's tensors); weight is
        the base's, or None. Raises UserError where RWKV-PEFT has no such form."""
        if not self.in_rwkv_peft:
            raise UserError(
                f"RWKV-PEFT has no {self.name}; its adapters are bone, bat-in (its bat), lora and pissa. Merge the "
                "adapter with merge_bone.py instead"
            )
        return params

    def remark_for_rwkv_peft(self, rank: int, scale: float) -> str:
        """What merging those files takes besides them, or ""."""
        return ""


def nearest_divisor(number: int, value: int) -> int:
    """The divisor of a number that is nearest to a value, the larger of two equally near ones."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - value), -d))


def cast(params: Params, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in params.items()}


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float32, or in the float64 that it has."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
