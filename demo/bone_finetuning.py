"""Fine-tune a Hugging Face model with Bone: python demo/bone_finetuning.py --help (see rwkv_peft/hf/finetune.py)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "RWKV-PEFT"))

from rwkv_peft.errors import exit_on_user_error  # noqa: E402
from rwkv_peft.hf.finetune import main  # noqa: E402

if __name__ == "__main__":
    exit_on_user_error(main)
