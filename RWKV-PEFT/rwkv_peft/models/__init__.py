"""The models: a folder for each generation; family.py has the interface that all of them implement."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.errors import UserError
from ..cli.tables import GENERATIONS

if TYPE_CHECKING:
    from torch import Tensor

    from .family import Family

    FAMILIES: tuple[Family, ...]
# (a key that only checkpoints of another kind have, a description of that kind)
OTHERS = (
    ("blocks.0.att.x_r", "an RWKV-7 model without r_k, which no release has"),
    ("blocks.0.att.time_mix_x", "an RWKV-6 model under web-rwkv's names"),
    ("blocks.0.att.time_maa_rkvw_w1", "an experimental variant of RWKV-6 (such as x060b) with other keys"),
    ("blocks.0.att.time_maa_x", "a variant of RWKV-6 with other keys"),
    ("blocks.0.att.gate.weight", "an RWKV-5 model"),
    ("blocks.0.att.ln_x.weight", "an RWKV-5 model"),
    ("blocks.0.att.time_first", "an RWKV-4 model"),
)


def __getattr__(name: str) -> Any:
    """FAMILIES, made at its first use, because a generation's model imports torch and its keys do not."""
    if name != "FAMILIES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    families = globals()[name] = tuple(family() for family in GENERATIONS.values())
    return families


def _families() -> "tuple[Family, ...]":
    return globals().get("FAMILIES") or __getattr__("FAMILIES")


def family_named(version: str) -> "Family":
    """The Family of a --model_version or of a ModelConfig's version; KeyError for an unknown one."""
    return {family.version: family for family in _families()}[version]


def official_key(key: str) -> str:
    """Spell a key, or the start of one, of any generation's Hugging Face model as official files do. Official keys
    stay as they are."""
    for family in _families():
        key = family.from_hf(key)
    return key


def official_tensors(
    tensors: "Mapping[str, Tensor]", naming: "Callable[[Family], Callable[[str], str]]"
) -> "tuple[Family, dict[str, Tensor]]":
    """Rename tensors by naming(family), which turns another format's name into the official one -> (the Family with
    such names, {official key: tensor}); the first Family if none has."""
    named = [(family, {naming(family)(key): tensor for key, tensor in tensors.items()}) for family in _families()]
    return next((pair for pair in named if pair[0].sign in pair[1]), named[0])


def family_of(tensors: "Mapping[str, Tensor]", name: str | Path = "the checkpoint") -> "Family":
    """The Family of {key: tensor}, recognized by its sign. Raises UserError for anything else, with its name if it is
    known."""
    if "emb.weight" not in tensors:
        prefixed = next((key for key in tensors if key.endswith(".emb.weight")), None)
        if prefixed:
            prefix = prefixed.removesuffix("emb.weight")
            raise UserError(
                f"{name}: its keys start with {prefix!r}, which no runtime expects; if all do, "
                f"`rwkv-peft convert {name} model.pth` removes it"
            )
        if any(key.startswith(("rwkv.", "model.")) for key in tensors):
            raise UserError(
                f"{name} has the key names of a Hugging Face model; make a .pth of its folder with `rwkv-peft convert`"
            )
        raise UserError(f"{name} is not an RWKV model: it has no emb.weight (its first key is {next(iter(tensors))})")
    # a later generation's files may have an earlier one's sign beside their own
    found = next((family for family in reversed(_families()) if family.sign in tensors), None)
    if found is not None:
        return found
    what = next((what for key, what in OTHERS if key in tensors), "no RWKV version known here")
    known = " or ".join(f"{family.name} ({family.version})" for family in _families())
    signs = " or ".join(family.sign for family in _families())
    raise UserError(f"{name} is {what}; this tool needs an {known} .pth under its official names (with {signs})")
