"""Fine-tune a Hugging Face model with Bone: python demo/bone_finetuning.py --help (see rwkv_peft/hf/finetune.py)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "RWKV-PEFT"))

from rwkv_peft.cli.commands import missing  # noqa: E402
from rwkv_peft.cli.errors import exit_on_user_error  # noqa: E402


def main(argv):
    """Run the command; -> its exit code. Raises UserError, for a missing library too."""
    try:
        from rwkv_peft.hf import finetune

        return finetune.main(argv)
    except ModuleNotFoundError as error:
        raise missing(error, "hf") from error


if __name__ == "__main__":
    exit_on_user_error(main)
