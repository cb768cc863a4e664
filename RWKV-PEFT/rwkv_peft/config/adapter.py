"""Settings of the adapter that trains, and of the parameters that train beside it."""

from dataclasses import dataclass

from ..cli import above_zero, alias, names, positive
from ..names import NONE, STATE
from .setting import setting

MODE_ALIASES = (("bat", "bat-in"),)  # RWKV-PEFT's name for it
METHOD_ALIASES = (("disha", "bone"),)
QUANTIZATIONS = ("none", "nf4", "int8")


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter, the linear layers that get it, and the other parameters that train.

    method and mode name one of METHODS (adapters/methods.py), mode only if several forms share the method's word;
    method "none" has no adapter: the model itself trains, or train_parts. targets are module-name suffixes such as
    "att.key", () all that the generation has; alpha is the LoRA scale times rank (0 means alpha = rank), svd_niter the
    power iterations of PiSSA's randomized SVD (0: an exact SVD), init the file of the initial factors if `load` is a
    PiSSA adapter of RWKV-PEFT.
    """

    method: str = setting(
        "bone",
        "adapter method; none trains the model itself (all of it, or --train_parts); RWKV-PEFT's miss is bone with "
        "--bone_mode bone, and its state is --train_type state; default bone, and none for a new model and with "
        "--train_type finetune or state",
        flag="peft",
        unset=True,
        type=alias(METHOD_ALIASES),
    )
    mode: str = setting(
        "bat-in",
        "bat-in (block affine by input block, also called bat), bat-in-scaled (its two terms of one size), bat-out, "
        "bone, bone-mini or bone-signed (default bat-in)",
        flag="bone_mode",
        unset=True,
        type=alias(MODE_ALIASES),
        metavar="MODE",
    )
    rank: int = setting(
        64,
        "block size r (default 64); for the bat modes it divides all dimensions",
        flag="bone_r",
        unset=True,
        type=positive,
    )
    mini_rank: int = setting(
        0,
        "bone-mini: width of its (bone_r, bone_mini_r) matrix, which repeats over a layer's outputs and divides their "
        "number",
        flag="bone_mini_r",
        unset=True,
        type=positive,
    )
    alpha: float = setting(0.0)
    dropout: float = setting(0.0)
    svd_niter: int = setting(4)
    lora_plus_ratio: float = setting(
        16.0,
        "lora-plus: learning rate of lora_B over lora_A's (default 16)",
        flag="loraplus_lr_ratio",
        unset=True,
        type=above_zero,
    )
    targets: tuple[str, ...] = setting(
        (),
        "linear layers that get an adapter, as ends of their names (default: all of a block)",
        flag="target_modules",
        unset=True,
        nargs="+",
        metavar="NAME",
    )
    train_parts: tuple[str, ...] = setting(
        (),
        "also train these: time ln emb head are parameters of the base; state is the wkv states before the first "
        "token, which start at zero or from --state_load",
        nargs="*",
        type=names,
        metavar="PART",
    )
    quant: str = setting("none", "keep the frozen matrices quantized (needs bitsandbytes)", choices=QUANTIZATIONS)
    load: str = setting("", "adapter to start from", flag="bone_load", unset=True, metavar="FILE")
    init: str = setting("")

    @property
    def states_alone(self) -> bool:
        """True if only time states train."""
        return self.method == NONE and self.train_parts == (STATE,)

    @property
    def whole_model(self) -> bool:
        """True if a run writes a model: no layer has an adapter, and parameters of the model itself train."""
        return self.method == NONE and not self.states_alone
