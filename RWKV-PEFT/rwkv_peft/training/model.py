"""Make the model of a run: a generation's plain model, its weights, and its adapter."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from ..adapters.inject import InjectReport, inject, load_tensors
from ..adapters.methods import method_of
from ..checkpoints.adapters import read_adapter
from ..checkpoints.atomic import check_output
from ..checkpoints.base import Base, open_base
from ..checkpoints.tensors import DTYPES
from ..cli.names import ADAPTER, MODEL, STATE
from ..config import AdapterConfig, RunConfig
from ..data.batches import TrainBatches
from ..models import family_named
from ..models.family import Family
from ..models.parts import LanguageModel
from .flags.legacy import INIT
from .inputs import Inputs
from .saving.products import model_dtypes, write_model
from .saving.start import start_adapter, start_states
from .step.segments import forward, segments_of
from .step.steps import NEXT_TOKEN, Batch


def make_model(
    inputs: Inputs, layers: tuple[str, ...], batches: TrainBatches, device: torch.device
) -> tuple[LanguageModel, InjectReport]:
    """Make the model that a run begins or goes on with, drawn by --random_seed, with adapters at `layers`."""
    config, base, checkpoint = inputs.config, inputs.base, inputs.checkpoint
    torch.manual_seed(config.train.random_seed)
    family = family_named(config.model.version)
    model = build_model(config, family, base)

    def gradients() -> dict[str, torch.Tensor]:
        if config.train.stage != 3:  # stage 3 is for models that one GPU may not hold
            model.to(device)
        part = -(-config.data.ctx_len // config.train.context_parallel) if config.train.context_parallel > 1 else 0
        return estimate_gradients(model, layers, batches.first_counted(), config.train.chunk_ctx or part)

    report = adapt(model, config.adapter, layers, family, base, gradients, checkpoint, device)
    if checkpoint is not None and config.train.fresh_optimizer and config.adapter.whole_model:
        load_tensors(model, open_base(checkpoint / MODEL).tensors, checkpoint / MODEL)
    model.settle()
    return model, report


def build_model(config: RunConfig, family: Family, base: Base | None) -> LanguageModel:
    """Build the model in the run's precision, with the states to tune, if any. Its weights are the base's,
    memory-mapped if the dtypes agree, or fresh ones."""
    dtype, grad_cp = DTYPES[config.train.precision], config.train.grad_cp
    if base is not None:
        model = family.load(base.tensors, config.model, grad_cp)
    else:
        model = family.build(config.model, grad_cp)
        family.init_weights(model)
    model = model.to(dtype)
    if STATE in config.adapter.train_parts:
        model.tune_states(start_states(config.train.state_load, config.model, family, base))
    return model


def adapt(
    model: LanguageModel,
    adapter: AdapterConfig,
    layers: tuple[str, ...],
    family: Family,
    base: Base | None,
    gradients: Callable[[], Mapping[str, torch.Tensor]],
    checkpoint: Path | None = None,
    device: torch.device | None = None,
) -> InjectReport:
    """Inject the adapter into the model: from the checkpoint to resume from, with the factors that it began with; from
    --bone_load and its kin; or fresh, from gradients if the method needs them. device is inject's."""
    method, loaded = method_of(adapter), None
    found: Mapping[str, torch.Tensor] = {}
    if checkpoint is not None and not adapter.whole_model:
        loaded = read_adapter(checkpoint / ADAPTER)
    elif adapter.load:
        assert base is not None  # the flags were checked for that
        loaded = start_adapter(adapter, base)
    elif method is not None and method.held is not None and method.held.from_gradient:
        found = gradients()
    initial = loaded.tensors if loaded else {}
    report = inject(model, adapter, layers, family=family, initial=initial, gradients=found, device=device)
    if loaded:
        load_tensors(model, loaded.tensors, str(checkpoint or adapter.load))
    return report


def write_new_model(config: RunConfig, say: Callable[..., object]) -> int:
    """Write a new model, drawn by --random_seed, in the dtype of --save_dtype or --precision -> the exit code."""
    path = Path(config.train.proj_dir) / INIT
    check_output("--proj_dir", path, [])
    family = family_named(config.model.version)
    torch.manual_seed(config.train.random_seed)
    model = family.build(config.model, False)
    family.init_weights(model)
    tensors = model.to(DTYPES[config.train.precision]).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_model(path, tensors, model_dtypes(config, None))
    say(f"wrote {path}, a new {family.name} of {sum(map(torch.numel, tensors.values())):,} parameters")
    return 0


def estimate_gradients(
    model: nn.Module, names: Iterable[str], batch: Batch, length: int = 0
) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss on one batch with respect to the weight of each module in `names`.

    batch is one of TrainBatches, on the CPU, wherever the model is. If length is not 0, only one segment of `length`
    positions is used, the one with the most counted targets. -> {module name: (out, in) tensor}, on the CPU; each
    gradient goes there as soon as it is complete, so only one layer's at a time is beside the activations.
    requires_grad flags are left as found.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    gradients: dict[str, torch.Tensor] = {}
    hooks = []
    for name in names:
        weight = model.get_parameter(f"{name}.weight").requires_grad_(True)

        def keep(parameter: torch.Tensor, name: str = name) -> None:
            assert parameter.grad is not None  # the hook runs once it is accumulated
            gradients[name] = parameter.grad.to("cpu", copy=True)
            parameter.grad = None

        hooks.append(weight.register_post_accumulate_grad_hook(keep))
    with torch.enable_grad():
        segments = segments_of(batch, length or batch["tokens"].shape[1])
        segment = max(segments, key=lambda segment: len(segment.counted)).to(next(model.parameters()).device)
        count = max(1, len(segment.counted))
        head = NEXT_TOKEN.head(segment.targets, segment.counted, count, segment.weights)
        forward(model, segment, None, head)[0].backward()
    for hook in hooks:
        hook.remove()
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return gradients


def own_device(accelerator: str, local_rank: int) -> torch.device:
    """Return the device that a rank trains on, and make a GPU the current one, so that nothing is put on another."""
    if accelerator == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
