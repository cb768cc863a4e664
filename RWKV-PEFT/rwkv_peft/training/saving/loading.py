"""Put a checkpoint's weights and optimizer state into the engine of a run that goes on."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...models.state import TIME_STATE
from .run_state import read_state
from .saved_files import TAG

if TYPE_CHECKING:
    from ..step.lit import Lit

GROUPING = ("weight_decay", "layerwise_lr", "state_lr")  # flags that optimizer groups depend on
OF_STATES = ("lr_init",)  # another if states train along: their group's lr_scale has the factor state_lr / lr_init


def trained_names(lit: "Lit") -> list[str]:
    """The names of the parameters that train, which a checkpoint holds."""
    return sorted(name for name, parameter in lit.model.named_parameters() if parameter.requires_grad)


def grouped_names(lit: "Lit") -> list[list[str]]:
    """The names of the parameters that train, by optimizer group, in the order of the optimizer's state in a
    checkpoint."""
    names = {parameter: name for name, parameter in lit.model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in lit.groups()]


def load_checkpoint(trainer: Any, lit: "Lit", checkpoint: Path) -> None:
    """Restore weights and the optimizer's state into the engine, on all ranks; the optimizer's settings stay those of
    this run's flags.

    Frozen parameters come from the base, so the engine loads without them; the lists in state.json show that nothing
    else is missing. Raises UserError if this run trains other parameters, or in other groups.
    """
    from .optimizer_files import tensors_alone

    state = read_state(checkpoint)
    saved, now = state["trained"], trained_names(lit)
    if saved != now:
        different = sorted(set(saved) ^ set(now))
        raise UserError(
            f"--resume: {checkpoint} and this run train different parameters ({different[0]} and "
            f"{len(different) - 1} more); give the first run's flags"
        )
    if state.get("groups", grouped_names(lit)) != grouped_names(lit):  # earlier versions did not record them
        raise UserError(
            f"--resume: {checkpoint} holds the optimizer's state by other groups of parameters than this run's"
            + changes(state.get("config", {}).get("train", {}), lit)
            + "; give the first run's flags, or add --fresh_optimizer: weights and place in the data go on"
        )
    engine, optimizer = trainer.strategy.deepspeed_engine, trainer.optimizers[0]
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    with tensors_alone(engine):
        engine.load_checkpoint(checkpoint, tag=TAG, load_module_strict=False, load_lr_scheduler_states=False)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # the checkpoint's are those of the earlier flags


def changes(then: Mapping[str, Any], lit: "Lit") -> str:
    """Say which flags that optimizer groups depend on differ from the earlier run's (its TrainConfig as a dict)."""
    now = asdict(lit.train_config)
    names = GROUPING + OF_STATES * (TIME_STATE in dict(lit.ratios))
    different = [name for name in names if then.get(name, now[name]) != now[name]]
    return "".join(f", with --{name} {now[name]:g} for {then[name]:g}" for name in different)
