"""What the scripts of test_zero3.py share: each is a DeepSpeed job of one process."""

import os
import socket


def join_job():
    """Say so to torch.distributed; called before deepspeed is imported."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
