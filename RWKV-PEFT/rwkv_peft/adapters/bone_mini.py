"""bone-mini: bone with a matrix (rank, mini_rank) that repeats along the outputs. MiSS's mini."""

from dataclasses import dataclass, replace

from ..cli.errors import UserError
from ..config import AdapterConfig
from . import bone
from .change import Params, Sum
from .method import HfForm, Misfit, Shapes, Tensors, Upstream, UpstreamLayer, nearest_divisor


def misfit(config: AdapterConfig, out_features: int, in_features: int) -> Misfit | None:
    mini_rank = config.mini_rank
    if mini_rank < 1 or out_features % mini_rank:
        nearest = nearest_divisor(out_features, mini_rank if mini_rank > 0 else config.rank)
        return Misfit("mini_rank", mini_rank, f"does not divide {out_features}", nearest)
    return bone.misfit(config, out_features, in_features)


def shapes(config: AdapterConfig, out_features: int, in_features: int) -> Shapes:
    return {"bone": (config.rank, config.mini_rank)}


def sizes(params: Params) -> dict[str, int]:
    rank, mini_rank = params["bone"].shape
    return {"rank": rank, "mini_rank": mini_rank}


@dataclass(frozen=True)
class Repeated(Sum):
    """A change with rows that repeat after the width of the matrix."""

    def row_unit(self, params: Params) -> int:
        return params["bone"].shape[-1]


def as_bone(layer: UpstreamLayer) -> Params:
    """As bone, of the layer's width."""
    if layer.weight is None:
        raise UserError(
            f"RWKV-PEFT has no bone-mini, and as bone it needs the layers' widths: give --base_model, the model "
            f"that {layer.module}.bone was trained on"
        )
    out_features, mini_rank = layer.weight.shape[0], layer.params["bone"].shape[1]
    if out_features % mini_rank:
        raise UserError(
            f"{layer.module}.bone repeats every {mini_rank} outputs, which does not divide the layer's {out_features}: "
            "the base is another model than it was trained on"
        )
    return {"bone": layer.params["bone"].repeat(1, out_features // mini_rank)}


METHOD = replace(
    bone.METHOD,
    name="bone-mini",
    tensors=Tensors(("bone",), ("rank", "mini_rank"), shapes, sizes, misfit),
    change=Repeated(update=bone.update, negated=("bone",)),
    upstream=Upstream(as_bone),
    hf=HfForm(("mini",)),
)
