"""DeepSpeed ZeRO under Lightning, on CPUs over gloo as well as on GPUs over NCCL."""

import logging
from typing import Any

import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DeepSpeedStrategy

from ...config import BUCKET
from ..ranks.world import World
from ..step.zero import (
    dynamic_scaler,
    exchanges_gradients,
    gradient_norm,
    live_parameters,
    recompute_whole_blocks,
    sums_apart,
)
from .prepared import Prepared


class RunEnvironment(LightningEnvironment):
    """The processes of a run for Lightning, which makes no group of them: it exists (training/ranks/group.py).

    devices: the number of devices that this process can use; a launcher may show each rank one of its own.
    """

    creates_processes_externally = True

    def __init__(self, world: World, devices: int) -> None:
        super().__init__()
        self.world, self.devices = world, devices

    def world_size(self) -> int:
        return self.world.size

    def global_rank(self) -> int:
        return self.world.rank

    def local_rank(self) -> int:
        """The number of this process's device, which Lightning and DeepSpeed take this for."""
        return self.world.local_rank % self.devices

    def node_rank(self) -> int:
        return self.world.node


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy without its refusal of everything but CUDA, on a process group that exists."""

    def __init__(self, environment: RunEnvironment, exchange: bool, **settings: Any) -> None:
        """exchange: gradients go through buckets (exchanges_gradients)."""
        super().__init__(cluster_environment=environment, **settings)
        self.exchange = exchange

    def setup_environment(self) -> None:
        if self.root_device.type == "cpu":
            # The engine wants an index on every device.
            self.parallel_devices: list[torch.device] = [
                torch.device("cpu", index) for index in range(len(self.parallel_devices))
            ]
        super(DeepSpeedStrategy, self).setup_environment()

    def _setup_model_and_optimizer(self, model: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        if self.zero_stage_3:
            partition(model, self.root_device, self.config)
        engine, optimizer = super()._setup_model_and_optimizer(model, *arguments, **named)
        if (scaler := dynamic_scaler(optimizer)) is not None:
            scaler.raise_error_at_min_scale = False  # RunCallback ends the run, with a message
        if self.root_device.type != "cpu":  # CPUs compute the same bits
            share_buffers(engine.module, self.root_device)
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            if self.root_device.type == "cpu":  # a GPU does the engine's own in fewer launches
                optimizer.get_grad_norm_direct = lambda gradients, *_, **__: gradient_norm(optimizer, gradients)
            if not self.exchange:
                optimizer.reduce_independent_p_g_buckets_and_remove_grads = lambda parameter, group: None
        return engine, optimizer

    def teardown(self) -> None:
        """End as Lightning does, but leave optimizer states and module on the device: their way to main memory takes
        as long as a checkpoint, after each run and each exception, and the process ends here."""
        self.precision_plugin.teardown()
        assert self.accelerator is not None  # because the run had one
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def partition(model: torch.nn.Module, device: torch.device, config: Any) -> None:
    """Cut parameters into the parts of ZeRO-3's ranks, one after the other, so that only one is whole on the device.

    Buffers go there too. The engine would first copy the whole model to the device.
    """
    import deepspeed

    first: Any
    first, *others = model.parameters()
    for parameter in (first, *others):
        # a copy, because rank 0's values would else be written to this rank's mapping of the file
        parameter.data = parameter.data.to(device, copy=True)
        if parameter is first:
            deepspeed.zero.Init(module=torch.nn.ParameterList([first]), config_dict_or_path=config)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
    model.to(device)


def share_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Give every rank rank 0's buffers on its device: initial values of layers and quantized weights, which GPUs of
    other kinds round differently. The engine does this for parameters.

    Others stay: frozen tables are memory of the base's file that ranks share, and writing would copy it for each.
    """
    for buffer in model.buffers():
        if buffer.device == device:
            torch.distributed.broadcast(buffer, 0)


def devices_here(run: Prepared) -> int:
    """The number of devices that a rank of a run can use."""
    ranks = run.config.train.devices
    return min(ranks, torch.cuda.device_count()) if run.accelerator == "gpu" else ranks


WHOLE = 1_000_000  # parameters of at most so many elements, as an adapter's matrices, stay on every rank in stage 3


def make_strategy(run: Prepared) -> ZeroStrategy:
    """The strategy of a run's flags, with buckets for as many numbers as train."""
    train, accelerator = run.config.train, run.accelerator
    if accelerator == "cpu":
        import deepspeed

        # init_distributed would compile this shared-memory all-reduce for a minute; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed takes float16 only on CPUs that multiply it by themselves; torch computes it on all, slowly.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    bucket, exchange = min(BUCKET, max(run.trainable, 1)), exchanges_gradients(train)
    strategy = ZeroStrategy(
        RunEnvironment(run.world, devices_here(run)),
        exchange,
        stage=train.stage,
        offload_optimizer=train.offload,
        offload_parameters=train.offload and train.stage == 3,
        # else a GPU reads what is offloaded at a fraction of its speed
        pin_memory=train.offload and accelerator == "gpu",
        allgather_bucket_size=bucket,
        reduce_bucket_size=bucket if exchange else 1,
        logging_batch_size_per_gpu=run.config.data.micro_bsz,
        logging_level=logging.ERROR,
    )
    if train.stage == 3:
        zero = strategy.config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = WHOLE
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = live_parameters(run.model)
        if accelerator == "cpu":
            zero["stage3_prefetch_bucket_size"] = 0  # gloo's threads would compete with the step's
        if train.grad_cp:
            recompute_whole_blocks(run.model)
    if sums_apart(train):
        strategy.config["data_types"] = {"grad_accum_dtype": "fp32"}
    return strategy
