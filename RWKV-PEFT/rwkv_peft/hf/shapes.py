"""The shape that an adapter has in a layer of a Hugging Face model."""

from ..adapters.methods import METHODS
from ..config import AdapterConfig
from ..errors import UserError
from .config import BoneConfig

PARAMETER = "bone"  # the methods' name for bone_block


def block_shape(config: BoneConfig, in_features: int, out_features: int, name: str) -> tuple[int, ...]:
    """The shape of an adapter's parameter. Raises UserError if the rank or mini_r does not fit the layer."""
    method, sizes = config.method, AdapterConfig(rank=config.r, mini_rank=config.mini_r)
    misfit = method.tensors.fit(sizes, out_features, in_features)
    if misfit is None:
        return method.tensors.shapes(sizes, out_features, in_features)[PARAMETER]
    setting = "r" if misfit.setting == "rank" else "mini_r"
    advice = f"try {setting}={misfit.nearest}" if misfit.nearest else f"give a smaller {setting}"
    other = METHODS[misfit.instead].hf if misfit.instead else None
    if other is not None:
        advice += f", or init_weights={other.names[0]!r}, which fits any width"
    raise UserError(
        f"{method.name}: {setting}={misfit.value} {misfit.problem} at {name} ({in_features} -> {out_features}); "
        f"{advice}"
    )
