"""DeepSpeed ZeRO under Lightning on any device: CPU processes over gloo as well as GPUs over NCCL."""

import logging

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from ..config import BUCKET


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy without its refusal of everything but CUDA."""

    def setup_environment(self):
        if self.root_device.type == "cpu":
            # The engine wants an index on every device.
            self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        super(DeepSpeedStrategy, self).setup_environment()


WHOLE = 1_000_000  # parameters of at most so many elements stay on every rank under stage 3: each matrix of an adapter


def make_strategy(train, micro_bsz, trainable, accelerator):
    """The strategy that train (TrainConfig) names, for a "cpu" or "gpu"; `trainable` parameters set the size of
    communication buckets."""
    if accelerator == "cpu":
        import deepspeed

        # init_distributed would compile this shared-memory all-reduce for a minute; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    bucket = min(BUCKET, max(trainable, 1))
    strategy = ZeroStrategy(
        stage=train.stage,
        offload_optimizer=train.offload,
        offload_parameters=train.offload and train.stage == 3,
        # else a GPU reads what is offloaded at a fraction of its speed
        pin_memory=train.offload and accelerator == "gpu",
        allgather_bucket_size=bucket,
        reduce_bucket_size=bucket,
        exclude_frozen_parameters=True,
        logging_batch_size_per_gpu=micro_bsz,
        logging_level=logging.ERROR,
    )
    if train.stage == 3:
        strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = WHOLE
    if train.stage == 2 and train.precision == "bf16" and train.accumulate_grad_batches > 1:
        strategy.config["data_types"] = {"grad_accum_dtype": "fp32"}  # else micro batches add up in bfloat16
    return strategy
