"""The engine of several ranks, of ZeRO-3 and of offload: DeepSpeed's ZeRO, set up by Lightning Fabric.

It runs on CPUs over gloo as well as on GPUs over NCCL.

DeepSpeed shards its work by its own forward hooks. Its engine must be entered once a micro batch, even if a loss runs
the model twice (a reference, then the policy). MicroBatch is the module that it enters.
"""

import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import DeepSpeedStrategy
from torch import Tensor, distributed, nn
from torch.autograd import Function

from ..config import BUCKET, RunConfig, TrainConfig
from ..models.parts import LanguageModel
from .engine import ParameterSlice, TrainingEngine, square_sum, sums_apart
from .optimizers import make_optimizer
from .ranks.world import World
from .step.steps import Step

COUNTERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of the loss scale, as LossScale has them
NOT_FINITE = -1.0  # DeepSpeed's value for a norm that is infinite or NaN
WHOLE = 1_000_000  # parameters of at most so many elements, as an adapter's matrices, stay on every rank in stage 3
PRECISIONS: Mapping[str, Any] = MappingProxyType({"bf16": "bf16-true", "fp16": "16-true", "fp32": "32-true"})


class MicroBatch(nn.Module):
    """The forward of a micro batch (TrainingEngine.forward) in a module that DeepSpeed's engine enters as a whole."""

    def __init__(self, model: LanguageModel, compute: Step) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, run_forward: Any, batch: Mapping[str, Any], count: float) -> tuple[Tensor, int]:
        return run_forward(batch, count)


class RunEnvironment(LightningEnvironment):
    """The processes of a run for Fabric. It makes no group of them: that exists (ranks/group.py).

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
        """The number of this process's device: Fabric and DeepSpeed take this for it."""
        return self.world.local_rank % self.devices

    def node_rank(self) -> int:
        return self.world.node


class ZeroStrategy(DeepSpeedStrategy):
    """Fabric's DeepSpeedStrategy without its refusal of everything but CUDA, on a process group that exists."""

    def setup_environment(self) -> None:
        if self.root_device.type == "cpu":  # the engine wants an index on every device
            number = len(self.parallel_devices or ())
            self.parallel_devices: list[torch.device] = [torch.device("cpu", index) for index in range(number)]
        super(DeepSpeedStrategy, self).setup_environment()


class Zero(TrainingEngine):
    """DeepSpeed's engine of a run."""

    def __init__(
        self, model: LanguageModel, compute: Step, config: RunConfig, world: World, device: torch.device
    ) -> None:
        super().__init__(model, compute, config, world, device)
        quiet()
        train = config.train
        self.strategy, self.stage_3 = make_strategy(model, config, world, device), train.stage == 3
        fabric = Fabric(
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=devices_here(train, device),
            num_nodes=train.num_nodes,
            strategy=self.strategy,
            precision=PRECISIONS[train.precision],
        )
        # Starts no process and makes no group: RunEnvironment says that both exist.
        fabric.launch()
        if self.stage_3:
            # Before the engine is made, which would first put the whole model on every device.
            partition(self.model, self.strategy.root_device, self.strategy.config)
        # Made over the model's parameters: DeepSpeed then replaces these in its groups by its own flat float32 tensors.
        module, optimizer = MicroBatch(self.model, self.compute), make_optimizer(self.groups, train)
        self.engine, (self.optimizer,), _ = self.strategy.setup_module_and_optimizers(module, [optimizer])
        # ZeRO's wrapper, and torch's optimizer within it, whose state checkpoints hold.
        self.zero, self.optimizer = self.optimizer, self.optimizer.optimizer
        self.engine.train()
        if (scaler := self.scaler) is not None:
            scaler.raise_error_at_min_scale = False  # the loop ends the run, with a message
        if self.device.type != "cpu":  # CPUs compute the same bits
            share_buffers(self.model, self.device)
        elif isinstance(self.zero, DeepSpeedZeroOptimizer):  # a GPU does the engine's own in fewer launches
            self.zero.get_grad_norm_direct = lambda gradients, *_, **__: norm_over_ranks(self.zero, gradients)

    def forward(self, batch: Mapping[str, Any], count: float) -> tuple[Tensor, int]:
        # Through the engine and not the module: its hooks gather ZeRO-3's weights, and reset the trace of their order.
        return self.engine(super().forward, batch, count)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed divides by the micro batches too; dividing before and multiplying leaves the bits of runs before.
        self.engine.backward(loss * self.micro_batches / self.micro_batches)
        # The last micro batch's step() is the loop's, after all ranks know whether the losses are finite.
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro batch

    def step(self, rate: float) -> float | None:
        self.set_rate(rate)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        if norm is None or self.skipped:
            return None
        return math.nan if norm < 0 else float(norm)  # NOT_FINITE

    @property
    def scaler(self) -> Any:
        """DeepSpeed's loss scaler, None unless it changes the scale."""
        scaler = getattr(self.zero, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    @property
    def skipped(self) -> bool:
        """True if the last step was skipped: gradients overflowed, and the scale can be lowered further."""
        return self.scaler is not None and self.zero.overflow and self.scaler.cur_scale > self.scaler.min_scale

    def scale_metrics(self) -> dict[str, float]:
        return {} if self.scaler is None else {"loss_scale": self.scaler.cur_scale, "skipped": int(self.skipped)}

    @property
    def flats(self) -> Sequence[Tensor]:
        return self.zero.fp32_partitioned_groups_flat if self.stage_3 else self.zero.single_partition_of_fp32_groups

    def place(self, parameter: Any) -> ParameterSlice:
        if self.stage_3:  # each rank has as many elements, padded beyond the parameter's end
            number, offset, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = distributed.get_rank(self.zero.dp_process_group) * length
            return ParameterSlice(parameter.ds_numel, start, number, offset, min(length, parameter.ds_numel - start))
        mapping = parameter._hp_mapping
        if mapping is None:  # all of it is another rank's
            return ParameterSlice(parameter.numel(), 0, 0, 0, 0)
        inner, outer = mapping.lp_fragment_address, mapping.hp_fragment_address
        return ParameterSlice(parameter.numel(), inner.start, mapping.param_group_index, outer.start, outer.numel)

    def publish(self) -> None:
        if not self.stage_3:
            self.zero.update_lp_params()
            return
        # The weights that persist on every rank (WHOLE) are cut here and gathered anew at the end, with the new values.
        self.zero.checkpoint_event_prologue()
        for number in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        self.zero.checkpoint_event_epilogue()

    def whole(self, tensor: Tensor) -> AbstractContextManager[object]:
        if self.stage_3 and isinstance(tensor, nn.Parameter):
            return deepspeed.zero.GatheredParameters([tensor])
        return super().whole(tensor)

    def barrier(self) -> None:
        self.strategy.barrier()

    def counters(self) -> dict[str, float]:
        return {} if self.scaler is None else {name: getattr(self.scaler, name) for name in COUNTERS}

    def set_counters(self, counters: Mapping[str, float]) -> None:
        for name in self.counters().keys() & counters.keys():
            setattr(self.scaler, name, counters[name])


def devices_here(train: TrainConfig, device: torch.device) -> int:
    """The number of devices that a rank of a run can use."""
    return train.devices if device.type == "cpu" else min(train.devices, torch.cuda.device_count())


def make_strategy(model: LanguageModel, config: RunConfig, world: World, device: torch.device) -> ZeroStrategy:
    """The strategy of a run's flags, with buckets for as many numbers as train."""
    train, on_cpu = config.train, device.type == "cpu"
    if on_cpu:
        # init_distributed would compile this shared-memory all-reduce for a minute; gloo serves
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed takes float16 only on CPUs that multiply it by themselves; torch computes it on all, slowly
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    bucket = min(BUCKET, max(trainable, 1))
    strategy = ZeroStrategy(
        cluster_environment=RunEnvironment(world, devices_here(train, device)),
        stage=train.stage,
        offload_optimizer=train.offload,
        offload_parameters=train.offload and train.stage == 3,
        pin_memory=train.offload and not on_cpu,  # else a GPU reads what is offloaded at a fraction of its speed
        allgather_bucket_size=bucket,
        reduce_bucket_size=bucket,
        logging_level=logging.ERROR,
    )
    settings: dict[str, Any] = strategy.config
    settings["gradient_accumulation_steps"] = train.accumulate_grad_batches
    settings["gradient_clipping"] = train.gradient_clip_val
    settings["train_micro_batch_size_per_gpu"] = config.data.micro_bsz
    if train.stage == 3:
        zero = settings["zero_optimization"]
        # To gather such small ones would cost a message each, and save next to no memory.
        zero["stage3_param_persistence_threshold"] = WHOLE
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = live_parameters(model)
        if on_cpu:
            zero["stage3_prefetch_bucket_size"] = 0  # gloo's threads would compete with the step's
        if train.grad_cp:
            recompute_whole_blocks(model)
    if sums_apart(train):
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return strategy


def partition(model: nn.Module, device: torch.device, config: Any) -> None:
    """Cut parameters into the parts of ZeRO-3's ranks, one after the other: only one is whole on the device.

    Buffers go there too. The engine would first copy the whole model to the device.
    """
    first: Any
    first, *others = model.parameters()
    for parameter in (first, *others):
        # a copy, because rank 0's values would else be written to this rank's mapping of the file
        parameter.data = parameter.data.to(device, copy=True)
        if parameter is first:
            deepspeed.zero.Init(module=nn.ParameterList([first]), config_dict_or_path=config)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
    model.to(device)


def share_buffers(model: nn.Module, device: torch.device) -> None:
    """Give every rank rank 0's buffers on its device: initial values of layers and quantized weights. GPUs of other
    kinds round these differently. The engine does this for parameters.

    Others stay: frozen tables are memory of the base's file that ranks share. Writing would copy it for each.
    """
    for buffer in model.buffers():
        if buffer.device == device:
            distributed.broadcast(buffer, 0)


def norm_over_ranks(zero: Any, gradients: Iterable[Tensor]) -> Tensor:
    """This rank's parts of the gradients of a DeepSpeedZeroOptimizer -> their norm over all ranks: float32 (),
    NOT_FINITE if it is not finite. Parts are padded with zeros: they add nothing."""
    total = sum(map(square_sum, gradients), torch.zeros((), dtype=torch.float64, device=zero.device))
    distributed.all_reduce(total, group=zero.dp_process_group)
    norm = total.sqrt().float()
    return torch.where(norm.isfinite(), norm, torch.full_like(norm, NOT_FINITE))


def live_parameters(model: LanguageModel) -> int:
    """The number of parameters that may be gathered at a time: two blocks' (one computes, the next is prefetched), or
    the embedding's or the head's if these are larger.

    DeepSpeed's default, a billion, would leave most of a 1.6B model gathered.
    """
    blocks = sorted(map(_size, model.blocks))
    return max(sum(blocks[-2:]), _size(model.emb), _size(model.head))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def recompute_whole_blocks(model: LanguageModel) -> None:
    """Let --grad_cp recompute a block at the beginning of its backward, before the engine adds hooks of its own.

    ZeRO-3 keeps the weights that a recomputation gathers until the module that is in backward then is done. If the
    first layer's saved tensors started the recomputation, it would leave that very layer. The engine would free its
    weight too early.
    """
    for block in model.blocks:
        block.register_forward_hook(_recomputed_first)


def _recomputed_first(block: nn.Module, inputs: object, outputs: Any) -> Any:
    *tensors, state = outputs
    results = _RecomputeFirst.apply(*tensors, *state)
    return *results[: len(tensors)], type(state)(*results[len(tensors) :])


class _RecomputeFirst(Function):
    """Identity; backward first reads a saved tensor, for which a checkpoint recomputes all."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        # A state that no loss reads has no gradient; zeros in its place would start a backward pass through it.
        ctx.set_materialize_grads(False)
        # Of no size, because only the reading of it matters.
        ctx.save_for_backward(tensors[0].new_empty(0))
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # reading it recomputes the block
        return gradients


def quiet() -> None:
    """Silence the libraries' banners and tips: they are not about this run."""
    rank_zero = [f"lightning.{part}.utilities.rank_zero" for part in ("fabric", "pytorch")]  # the last import's is used
    for name in ("lightning", "lightning.fabric", "DeepSpeed", *rank_zero):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (".*barrier.*device under current context.*", ".*torch.distributed.*deprecated.*"):
        warnings.filterwarnings("ignore", text)
