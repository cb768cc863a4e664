"""The tensors of the mix operations that take a token at a time, by name: the kernels' arguments on either device and
their autograd Functions (functions.py) follow from this table."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Operation(NamedTuple):
    """An operation of `inputs` (tokens, channels) and `parameters` (channels) that gives outputs like its last input.
    by_head: it works within heads; has_eps: a number eps belongs to it; from_result: backward reads the result in place
    of the inputs. The gradient of x is gx, that of out is grad."""

    inputs: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("out",)
    by_head: bool = False
    has_eps: bool = False
    from_result: bool = False

    @property
    def saved(self) -> tuple[str, ...]:
        """The tensors that backward reads besides gradients."""
        return self.outputs if self.from_result else self.inputs + self.parameters

    @property
    def gradients(self) -> tuple[tuple[str, ...], ...]:
        """The gradients of the outputs, of the inputs, and of the parameters, which are float32 sums over tokens."""
        given = tuple("grad" if name == "out" else f"g{name}" for name in self.outputs)
        return given, *(tuple(f"g{name}" for name in names) for names in (self.inputs, self.parameters))


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "relu_square": Operation(("x",), from_result=True),
        "sigmoid_gate": Operation(("r", "v")),
        "value_residual": Operation(("v", "first", "low"), ("v0",)),
        "norm_gate": Operation(("y", "g"), ("weight", "bias"), by_head=True, has_eps=True),
        "delta_keys": Operation(("k", "low"), ("a0", "k_k", "k_a"), ("key", "a", "b"), by_head=True),
        "norm_bonus_gate": Operation(("y", "r", "k", "v", "g"), ("r_k", "weight", "bias"), by_head=True, has_eps=True),
    }
)


def class_name(name: str) -> str:
    """norm_gate -> NormGate."""
    return name.title().replace("_", "")
