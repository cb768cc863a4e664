"""Settings of the adapter that trains, and of the parameters that train beside it."""

from dataclasses import dataclass

from ..cli.names import NONE, STATE
from ..cli.parser import names
from .methods import MethodSettings
from .setting import setting

QUANTIZATIONS = ("none", "nf4", "int8")


@dataclass(frozen=True)
class AdapterConfig(MethodSettings):
    """The adapter, the linear layers that get it, and the other parameters that train.

    method is a value of --peft (methods.py), and mode one of its forms if it has several; method "none" has no adapter:
    the model itself trains, or train_parts. targets are module-name suffixes such as "att.key", () all that the
    generation has. The other fields are the method's own settings.
    """

    targets: tuple[str, ...] = setting(
        (),
        "linear layers that get an adapter, as ends of their names (default: all of a block)",
        flag="target_modules",
        unset=True,
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

    @property
    def states_alone(self) -> bool:
        """True if only time states train."""
        return self.method == NONE and self.train_parts == (STATE,)

    @property
    def whole_model(self) -> bool:
        """True if a run writes a model: no layer has an adapter, and parameters of the model itself train."""
        return self.method == NONE and not self.states_alone
