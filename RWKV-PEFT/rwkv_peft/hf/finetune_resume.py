"""The checkpoint that a fine-tuning goes on from and the folder that it writes, checked before training begins."""

from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError
from ..files.atomic import same_file
from ..files.peft_folder import CONFIG, read_config
from .config import BoneConfig
from .refusals import refusals_of

ADAPTER = "bone_ft"  # the folder of the trained adapter in --output_dir


def checkpoint_to_resume(config: Any, adapter_config: BoneConfig) -> str | None:
    """The folder of --resume_from_checkpoint, for True the newest checkpoint in --output_dir; None without the flag.

    Raises UserError if there is none, or if its adapter has other settings than the arguments say.
    """
    from transformers.trainer_utils import get_last_checkpoint

    given = config.resume_from_checkpoint
    if given is None or str(given).lower() == "false":
        return None
    if str(given).lower() == "true":
        given = get_last_checkpoint(config.output_dir) if Path(config.output_dir).is_dir() else None
        if given is None:
            raise UserError(f"--resume_from_checkpoint True, and --output_dir {config.output_dir} has no checkpoint")
    if not all((Path(given) / name).is_file() for name in (CONFIG, "trainer_state.json")):
        raise UserError(
            f"--resume_from_checkpoint {given} is no folder with an {CONFIG} and a trainer_state.json; give a "
            "checkpoint-N folder"
        )
    saved, due = read_config(given), adapter_config.to_dict()
    for flag, name in (("bone_r", "r"), ("init_weights", "init_weights"), ("mini_r", "mini_r")):
        wanted, found = due.get(name, 0), saved.get(name, 0)
        if wanted != found:
            raise UserError(
                f"--{flag} {wanted} differs from the checkpoint's {found} ({given}); give the same, or start anew "
                "without --resume_from_checkpoint"
            )
    return str(given)


def check_folder(folder: str, base: Path, resumed: str | None) -> None:
    """Raise UserError if --output_dir is the base model's folder, because its model card would be overwritten, or if it
    holds a run that is not resumed: its adapter would be overwritten, and its checkpoints deleted by --save_total_limit
    or taken for this run's."""
    output = Path(folder)
    if same_file(output, base):
        raise UserError(f"--output_dir {output} is the folder of --base_model_name_or_path; name another")
    if resumed is not None and Path(resumed).resolve().parent == output.resolve():
        return
    checkpoints = sorted(output.glob("checkpoint-*"))
    held = [path.name for path in (output / ADAPTER, *checkpoints) if path.exists()]
    if held:
        going_on = "add --resume_from_checkpoint True to continue it, " if checkpoints else ""
        raise UserError(
            f"--output_dir {output} already holds a run ({held[0]}); {going_on}name another folder, or remove it"
        )


def check_layers(checkpoint: str, model: nn.Module) -> None:
    """Raise UserError if a checkpoint's adapter is for other layers than the model's adapter."""
    from peft import get_peft_model_state_dict, load_peft_weights

    with refusals_of(f"--resume_from_checkpoint {checkpoint}"):
        saved, due = set(load_peft_weights(checkpoint, device="cpu")), set(get_peft_model_state_dict(model))
    if saved != due:
        raise UserError(
            f"the adapter of --resume_from_checkpoint {checkpoint} is one of other layers than this run's, such as "
            f"{min(saved ^ due)}; give the same --target_modules, or start anew without --resume_from_checkpoint"
        )
