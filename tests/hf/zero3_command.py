"""demo/bone_finetuning.py's command as one process of a DeepSpeed job: test_zero3.py gives it the command's arguments."""

import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "RWKV-PEFT"))

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

import deepspeed  # noqa: E402
import torch  # noqa: E402

from rwkv_peft.hf import finetune  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it takes a minute to compile

if __name__ == "__main__":
    finetune.main(sys.argv[1:])
    torch.distributed.destroy_process_group()
