"""demo/bone_finetuning.py's command as one process of a DeepSpeed job, with arguments of test_finetune.py."""

import os
import sys

# port 0: one that the system chooses, which nobody else has to know
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")

import deepspeed  # noqa: E402
import torch  # noqa: E402

from rwkv_peft.hf import finetune  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it takes a minute to compile

if __name__ == "__main__":
    finetune.main(sys.argv[1:])
    torch.distributed.destroy_process_group()
