"""Pushing an adapter to the hub: a check before training begins, and the upload at the end."""

from pathlib import Path
from typing import Any

from ..errors import UserError, told


def check_hub(token: str | None) -> None:
    """Raise UserError if the hub cannot be reached or does not know the token (None: that of `hf auth login`)."""
    from huggingface_hub import whoami

    try:
        whoami(token)
    except Exception as error:  # raised by this library, its HTTP client or the system: a push would fail with any
        raise UserError(
            f"--push_to_hub: the hub cannot be reached, or knows no login ({told(error)}); log in (hf auth login), or "
            "leave the flag out and upload the adapter later"
        ) from error


def push(trainer: Any, adapter: Path) -> None:
    """Upload a saved adapter's folder to the trainer's repository. Raises UserError if that fails, with the command
    that tries again."""
    from huggingface_hub import HfApi

    if not trainer.is_world_process_zero():
        return
    config, name = trainer.args, trainer.hub_model_id
    try:
        HfApi(token=config.hub_token).upload_folder(
            repo_id=name, folder_path=adapter, revision=config.hub_revision, commit_message="End of training"
        )
    except Exception as error:  # as in check_hub
        raise UserError(
            f"--push_to_hub: everything is saved, and the hub did not take it ({told(error)}); try again with "
            f"hf upload {name} {adapter}"
        ) from error
    print(f"the adapter is pushed to {name}")
