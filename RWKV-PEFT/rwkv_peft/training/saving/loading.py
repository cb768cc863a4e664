"""Put a checkpoint's weights and optimizer state into the engine of a run that goes on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ..optimizers.choice import Averaging
from ..step.zero import go_on_with
from .optimizer_files import SavedOptimizer
from .partitions import codes_of, is_by_parameter, pieces_of, take_up
from .run_state import is_of_deepspeed, read_state

if TYPE_CHECKING:
    from ..step.lit import Lit


def trained_names(lit: "Lit") -> list[str]:
    """The names of the parameters that train, which a checkpoint holds."""
    return sorted(name for name, parameter in lit.model.named_parameters() if parameter.requires_grad)


def grouped_names(lit: "Lit") -> list[list[str]]:
    """The names of the parameters that train, by optimizer group, in the order of the optimizer's state in a
    checkpoint that holds it by ranks."""
    names = {parameter: name for name, parameter in lit.model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in lit.groups()]


def load_checkpoint(trainer: Any, lit: "Lit", checkpoint: Path) -> None:
    """Restore weights and the optimizer's state into the engine, on all ranks; the optimizer's settings are those of
    this run's flags.

    Frozen parameters come from the base, and the list in state.json shows that nothing else is missing. Raises
    UserError if this run trains other parameters or, in a checkpoint of earlier versions, in other groups.
    """
    state = read_state(checkpoint)
    saved, now = state["trained"], trained_names(lit)
    if saved != now:
        different = sorted(set(saved) ^ set(now))
        raise UserError(
            f"--resume: {checkpoint} and this run train different parameters ({different[0]} and "
            f"{len(different) - 1} more); give the first run's flags"
        )
    lit.compute.restore(checkpoint)
    optimizer = trainer.optimizers[0]
    by_ranks = is_of_deepspeed(checkpoint) or not is_by_parameter(optimizer)
    if by_ranks and state.get("groups", grouped_names(lit)) != grouped_names(lit):  # the first versions recorded none
        raise UserError(
            f"--resume: {checkpoint} holds the optimizer's state by other groups of parameters than this run's; "
            "give the first run's flags, or add --fresh_optimizer: weights and place in the data go on"
        )
    if is_of_deepspeed(checkpoint):
        from .deepspeed_files import load_deepspeed

        steps = load_deepspeed(checkpoint, optimizer, trainer.global_rank, trainer.world_size)
    else:
        found = SavedOptimizer(checkpoint)
        for piece in pieces_of(optimizer, lit.model.named_parameters()):
            found.fill(piece)
        found.fill_codes(trainer.global_rank, codes_of(optimizer))
        go_on_with(optimizer, found.scale)
        steps = found.steps
    take_up(optimizer, steps)
    if isinstance(optimizer.optimizer, Averaging):
        optimizer.optimizer.go_on(lit.lr_at(step) for step in range(lit.step - steps, lit.step))
