"""demo/bone_finetuning.py's command as one process of a DeepSpeed job: test_zero3.py gives it the command's
arguments."""

import sys

from zero3_process import join_job

join_job()

import deepspeed  # noqa: E402
import torch  # noqa: E402

from rwkv_peft.hf import finetune  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it takes a minute to compile

if __name__ == "__main__":
    finetune.main(sys.argv[1:])
    torch.distributed.destroy_process_group()
