"""What an adapter does to one tensor of the base, for any run of its rows.

A change can be cut by rows (`rows`), so that a large tensor is computed a band at a time; `unit` tells at which
multiples it may be cut.
"""

import math
from dataclasses import dataclass, replace

import torch

from .adapters.delta import RESIDUAL_VARIANTS, delta, merged
from .adapters.quant import block_size
from .config import BONE_MODES
from .errors import UserError


@dataclass(frozen=True)
class LayerChange:
    """An adapter on one weight.

    params are its tensors as adapters.delta takes them; scale is LoRA's; quant names the quantization of the frozen
    weight in training, dtype what the base was rounded to before it was quantized or a residual base was made of it;
    amount multiplies the change as a whole.
    """

    variant: str
    params: dict
    scale: float = 1.0
    quant: str = "none"
    amount: float = 1.0
    dtype: torch.dtype = torch.float32

    def unit(self, columns):
        """Bands of rows of a weight with this many columns must start and end at multiples of this."""
        unit = self.params["bone"].shape[-1] if self.variant in ("bat-in", "bat-out", "bone-mini") else 1
        if self.quant != "none":  # a block of weights with one scale may span rows
            unit = math.lcm(unit, block_size(self.quant) // math.gcd(block_size(self.quant), columns))
        return unit

    def rows(self, start, stop):
        """The same change for rows start to stop of the weight."""
        params = dict(self.params)
        if self.variant == "bat-out":
            rank = params["bone"].shape[-1]
            params["bone"] = params["bone"][start // rank : stop // rank]
        elif self.variant == "bone":
            params["bone"] = params["bone"][:, start:stop]
        for name in params.keys() & {"lora_B", "init_lora_B"}:
            params[name] = params[name][start:stop]
        return replace(self, params=params)

    def apply(self, weight):
        """weight (out, in) float32 -> float32, the weight that the trained layer computed with."""
        base = weight.to(self.dtype) if self.variant in RESIDUAL_VARIANTS or self.quant != "none" else weight
        result = merged(self.variant, base, self.params, scale=self.scale, quant=self.quant)
        return result if self.amount == 1 else torch.lerp(weight, result, self.amount)

    def removal(self):
        """The change that takes this one off again, up to rounding.

        A block affine change W' = W (I + B) + B is undone by the block affine change with
        C = (I + B)^-1 - I in B's place: W = (W' - B)(I + B)^-1 = W' (I + C) + C. The other changes do not depend
        on W and are subtracted. Raises UserError where I + B has no inverse.
        """
        params = dict(self.params)
        if self.variant in ("bone", "bone-mini"):
            params["bone"] = -self.amount * params["bone"].float()
        elif self.variant in ("bat-in", "bat-out"):
            bone = self.amount * params["bone"].double()
            identity = torch.eye(bone.shape[-1], dtype=bone.dtype, device=bone.device)
            inverse, singular = torch.linalg.inv_ex(identity + bone)
            if singular.any():
                raise UserError("--unmerge: an I + B of the adapter has no inverse, so that merging lost the base")
            params["bone"] = (inverse - identity).float()
        return Removal(self.variant, params, -self.amount * self.scale)


class Removal(LayerChange):
    """The opposite of a LayerChange: nothing of the base's rounding is replayed."""

    def apply(self, weight):
        return weight + delta(self.variant, weight, self.params, scale=self.scale)


@dataclass(frozen=True)
class WholeChange:
    """A tensor trained in full, which takes the base's place; amount as in LayerChange."""

    tensor: torch.Tensor
    amount: float = 1.0

    def unit(self, columns):
        return 1

    def rows(self, start, stop):
        return replace(self, tensor=self.tensor[start:stop])

    def apply(self, weight):
        new = self.tensor.float()
        return new if self.amount == 1 else torch.lerp(weight, new, self.amount)


def check_params(name, variant, params, weight_shape):
    """Raise UserError unless the tensors of a `variant` adapter fit a weight (out, in)."""
    if len(weight_shape) != 2:
        raise UserError(
            f"{name} is no linear layer: its weight has shape {weight_shape}, and a {variant} adapter changes a "
            "matrix; it was trained on another model"
        )
    out, inner = weight_shape
    names = {"bone"} if variant in BONE_MODES else set() if variant == "none" else {"lora_A", "lora_B"}
    if variant in RESIDUAL_VARIANTS:
        names |= {"init_lora_A", "init_lora_B"}
    if set(params) != names:
        raise UserError(
            f"{name} holds {sorted(params)}, and a {variant} adapter has {sorted(names) or 'no tensors of its own'}"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in params.items()}
    odd = [
        shape for shape in shapes.values() if 0 in shape or len(shape) != (3 if variant in ("bat-in", "bat-out") else 2)
    ]
    if odd:
        raise UserError(
            f"{name} holds a tensor of shape {odd[0]}, which no {variant} adapter has; the file is damaged, or "
            "describes itself wrongly"
        )
    if "bone" in params:
        shape = shapes["bone"]
        rank = shape[0] if variant in ("bone", "bone-mini") else shape[-1]
        due = {
            "bone": (rank, out),
            "bone-mini": (rank, shape[-1]),
            "bat-in": (inner // rank, rank, rank),
            "bat-out": (out // rank, rank, rank),
        }[variant]
        fits = shape == due
        if variant == "bone-mini":
            fits = fits and out % shape[-1] == 0
        elif variant != "bone":
            fits = fits and out % rank == 0 and inner % rank == 0
        due = {"bone": due}
    else:
        rank = shapes["lora_A"][0]
        due = {name: (rank, inner) if name.endswith("A") else (out, rank) for name in names}
        fits = shapes == due
    if not fits:
        given, needed = (", ".join(map(str, group.values())) for group in (shapes, due))
        raise UserError(
            f"{name} is a {variant} adapter of shape {given}, and a base weight of shape {weight_shape} "
            f"needs {needed} and a rank that divides it; it was trained on another model"
        )
