"""Makes each script of test_zero3.py a DeepSpeed job of one process."""

import os


def join_job():
    """Tell torch.distributed; call it before deepspeed is imported."""
    # port 0: one that the system chooses, which nobody else has to know
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
