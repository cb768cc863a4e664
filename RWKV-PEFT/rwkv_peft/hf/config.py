"""BoneConfig: the settings of Bone on a Hugging Face model, saved as adapter_config.json."""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftType
from peft.config import PeftConfig

from ..adapters.method import Method
from ..adapters.methods import METHODS, by_hf_name
from ..cli.errors import UserError
from ..cli.names import is_finite, is_whole
from ..config import AdapterConfig
from .register import add_member

# (setting, its default): peft 0.14 to 0.18 do not know these, so a file names them only if they differ from it
LATER_SETTINGS = (("bone_dropout", 0.0), ("mini_r", 0))
PARAMETER = "bone"  # the methods' name for bone_block


def option(default: Any, text: str) -> Any:
    """A field of a dataclass with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class BoneConfig(PeftConfig):
    """Settings of Bone. Raises UserError if one is wrong or two contradict each other.

    r: rank, the size of a block. For "bat-in" and "bat-out" it must divide both widths of a layer.
    init_weights: the form, and how it starts:
        True           bone: one update D (r, out) shared by the shards of the input, starting at zero
        "bat-in"       block affine by input block, the fast one
        "bat-out"      block affine by output block; peft's name for it, "bat", is taken too
        "mini"         bone with D (r, mini_r) repeated along the output
        False          bone with a random D, as peft has it for tests
    bone_dropout: probability that an element of the adapter's input is dropped in training.
    target_modules: names, a regular expression or "all-linear"; None takes peft's default for the model.
    exclude_modules, layers_to_transform, layers_pattern, modules_to_save, bias: as in other methods of peft.
    """

    r: int = option(64, "Rank: the size of a block.")
    target_modules: list[str] | str | None = option(
        None, "Modules that get an adapter: names, a regular expression or 'all-linear'."
    )
    exclude_modules: list[str] | str | None = option(None, "Modules that get none.")
    init_weights: bool | str = option(True, "True (bone), 'bat-in', 'bat-out' ('bat'), 'mini', or False (random bone).")
    mini_r: int = option(0, "Width of the repeated update if init_weights is 'mini'.")
    bone_dropout: float = option(0.0, "Dropout of the adapter's input.")
    layers_to_transform: list[int] | int | None = option(None, "Indices of the layers to adapt.")
    layers_pattern: list[str] | str | None = option(None, "Name of the list of layers, with layers_to_transform.")
    bias: str = option("none", "Biases to train: 'none', 'all' or 'bone_only'.")
    modules_to_save: list[str] | None = option(None, "Other modules to train whole and to save with the adapter.")

    def __post_init__(self) -> None:
        super().__post_init__()
        # adapter_config.json gives peft_type; a call of this class does not
        self.from_file = self.peft_type is not None
        self.peft_type: PeftType = add_member("BONE")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        self._check()

    @property
    def method(self) -> Method:
        """The Method that init_weights names. Raises UserError for an unknown value."""
        method = by_hf_name(self.init_weights)
        if method is None:
            raise UserError(
                f"init_weights={self.init_weights!r} is unknown; give True (bone), 'bat-in', 'bat-out' "
                "(which peft calls 'bat'), 'mini', or False (random)"
            )
        return method

    def _check(self) -> None:
        method = self.method
        for name in ("r", "mini_r"):
            if not is_whole(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)!r} is not a whole number; give one, such as 64")
        if self.r < 1:
            raise UserError(f"r={self.r} is not a rank; give 1 or more, usually 64")
        mini = "mini_rank" in method.tensors.size
        if mini and self.mini_r < 1:
            raise UserError(
                f"init_weights='mini' needs mini_r, a width that divides the layers' outputs, and it is {self.mini_r}"
            )
        if not mini and self.mini_r:
            raise UserError(
                f"mini_r={self.mini_r} is for init_weights='mini', and that is {self.init_weights!r}; leave mini_r "
                "out, or give init_weights='mini'"
            )
        if not is_finite(self.bone_dropout) or not 0 <= self.bone_dropout < 1:
            raise UserError(f"bone_dropout={self.bone_dropout} is not a probability below 1")
        if self.bias not in ("none", "all", "bone_only"):
            raise UserError(f"bias={self.bias!r} is unknown; give 'none', 'all' or 'bone_only'")
        # peft would take each letter of a text as the end of a module's name, and train many other modules
        if isinstance(self.modules_to_save, str):
            raise UserError(
                f"modules_to_save={self.modules_to_save!r} is no list of names; give [{self.modules_to_save!r}]"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise UserError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, whose layers it names; give "
                "layers_to_transform too, or leave both out"
            )
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{name} works with a list of target_modules, and {self.target_modules!r} is one "
                        "expression; name the layers in it, or give a list"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings to save, written as peft 0.14 to 0.18 read them if those have the setting."""
        settings = super().to_dict()
        form = self.method.hf
        assert form is not None  # the method was found by it
        settings["init_weights"] = form.names[0] if self.init_weights is not False else False
        for name, default in LATER_SETTINGS:
            if settings[name] == default:
                del settings[name]
        return settings


def block_shape(config: BoneConfig, in_features: int, out_features: int, name: str) -> tuple[int, ...]:
    """The shape of an adapter's parameter. Raises UserError if the rank or mini_r does not fit the layer."""
    method, sizes = config.method, AdapterConfig(rank=config.r, mini_rank=config.mini_r)
    misfit = method.tensors.misfit(sizes, out_features, in_features)
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
