"""Fine-tune a Hugging Face model with Bone: python demo/bone_finetuning.py --help (see rwkv_peft/hf/finetune.py)."""

from rwkv_peft.errors import UserError, exit_on_user_error


def main(argv):
    """The command; a library that is missing or unknown is a user's mistake like any other."""
    try:
        from rwkv_peft.hf import finetune

        return finetune.main(argv)
    except ModuleNotFoundError as error:
        raise UserError(f"{error}; pip install -r requirements-hf.txt") from error


if __name__ == "__main__":
    exit_on_user_error(main)
