"""Make the model of a run: a generation's plain model, its weights, and the adapter or states to start from."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from ..adapters.inject import InjectReport, inject, load_tensors
from ..adapters.methods import method_of, word_of
from ..checkpoints.adapter_file import Adapter, AdapterMetadata
from ..checkpoints.adapters import AdapterSource, read_adapter
from ..checkpoints.atomic import check_output
from ..checkpoints.base import Base, open_base
from ..checkpoints.rwkv_peft_file import holds_lora
from ..checkpoints.state_file import read_states
from ..checkpoints.tensors import DTYPES
from ..cli.errors import UserError
from ..cli.names import ADAPTER, MODEL, STATE
from ..config import WORDS, AdapterConfig, ModelConfig, RunConfig, forms
from ..data.batches import TrainBatches
from ..models import family_named
from ..models.family import Family
from ..models.layout import belongs, is_time_state, state_parts_flag
from ..models.parts import LanguageModel
from ..models.state import State, split_time_states, state_of
from .flags.legacy import INIT
from .inputs import Inputs
from .saving.products import model_dtypes, write_model
from .step.segments import forward, segments_of
from .step.steps import NEXT_TOKEN, Batch


def make_model(
    inputs: Inputs, layers: tuple[str, ...], batches: TrainBatches, device: torch.device
) -> tuple[LanguageModel, InjectReport]:
    """Make the model that a run begins or goes on with, drawn by --random_seed, with adapters at `layers`."""
    config, base, checkpoint = inputs.config, inputs.base, inputs.checkpoint
    # Before anything is drawn: every rank draws the same new weights and the same adapter.
    torch.manual_seed(config.train.random_seed)
    family = family_named(config.model.version)
    model = build_model(config, family, base)

    def gradients() -> dict[str, torch.Tensor]:
        if config.train.stage != 3:  # stage 3 is for models that one GPU may not hold
            model.to(device)
        # Ranks that share a row see a part of it each; no more of a row may fit here.
        part = -(-config.data.ctx_len // config.train.context_parallel) if config.train.context_parallel > 1 else 0
        return estimate_gradients(model, layers, batches.first_counted(), config.train.chunk_ctx or part)

    report = adapt(model, config.adapter, layers, family, base, gradients, checkpoint, device)
    # --fresh_optimizer reads no masters, from which the weights follow else (saver.load_checkpoint).
    if checkpoint is not None and config.train.fresh_optimizer and config.adapter.whole_model:
        load_tensors(model, open_base(checkpoint / MODEL).tensors, checkpoint / MODEL)
    # Last, because only now it is known which tables train. A frozen one stays in the mapped file.
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
    # No copy where the file has this dtype: such weights stay mapped, and ranks share their memory.
    model = model.to(dtype)
    if STATE in config.adapter.train_parts:
        start = start_states(config.train.state_load, config.model, family, base)
        model.tune_states(start, config.adapter.state_parts)
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
    first_gradients: Mapping[str, torch.Tensor] = {}
    # The checkpoint wins over --bone_load: a run that resumes has begun from that adapter already.
    if checkpoint is not None and not adapter.whole_model:
        loaded = read_adapter(checkpoint / ADAPTER)
    elif adapter.load:
        assert base is not None  # the flags were checked for that
        loaded = start_adapter(adapter, base)
    elif method is not None and method.held is not None and method.held.from_gradient:
        first_gradients = gradients()
    # Constants come from the file, at once: the frozen weight follows from them (PiSSA takes its first factors off).
    initial = loaded.tensors if loaded else {}
    report = inject(model, adapter, layers, family=family, initial=initial, gradients=first_gradients, device=device)
    if loaded:
        load_tensors(model, loaded.tensors, str(checkpoint or adapter.load))
    return report


def start_adapter(adapter: AdapterConfig, base: Base) -> Adapter:
    """Read the adapter to start from. Raises UserError unless it fits this run's method, sizes, base and parts."""
    path, method, word = Path(adapter.load), method_of(adapter), WORDS[adapter.method]
    assert method is not None  # --peft none has nothing to load
    flat = path.is_file() and path.suffix != ".safetensors"  # a file as RWKV-PEFT writes it
    if adapter.init and path.exists() and not flat:
        raise UserError(
            f"pissa_init {adapter.init} belongs to a .pth of RWKV-PEFT, and {adapter.load} is none; leave it out"
        )
    if word.takes("init") and flat and not adapter.init:
        raise UserError(
            f"{adapter.load} does not hold the factors that its {method.label} began with; name the file that does, "
            f"init_pissa.pth in the folder of that run, as {word.flag_of('init')}"
        )
    lora = flat and holds_lora(path)
    if lora and "lora_A" not in method.parameters:
        raise UserError(
            f"{adapter.load} holds a LoRA or PiSSA adapter, and this run trains {method.file_name}; give --peft lora "
            "or pissa"
        )
    lacks_alpha = lora and method.alpha is not None and method.held is None  # as RWKV-PEFT's LoRA files do
    if lacks_alpha and not adapter.alpha:
        raise UserError(f"{adapter.load} does not record alpha; give that of its training as {word.flag_of('alpha')}")
    loaded = AdapterSource(
        adapter.load,
        init=adapter.init or None,
        alpha=adapter.alpha if lacks_alpha else None,
        guess=adapter.mode if len(forms(adapter.method)) > 1 else None,
    ).read(base.tensors)
    theirs = loaded.metadata
    theirs.require_base(adapter.load, base, "give its own base as --load_model")
    if theirs.method is None:
        states = all(map(is_time_state, loaded.tensors))
        raise UserError(
            f"{adapter.load} holds no adapter, but {'time states' if states else 'tensors of the base'}; "
            + ("give it as --state_load with --train_parts state" if states else "merge it, and train on that model")
        )
    if theirs.variant != method.file_name:
        other = word_of(theirs.method)
        mode = f" --bone_mode {theirs.variant}" if len(other.forms) > 1 else ""
        raise UserError(
            f"{adapter.load} holds a {theirs.variant} adapter, and this run trains {method.file_name}; give --peft "
            f"{other.name}{mode}"
        )
    for field in method.tensors.size:
        loaded_value, wanted = getattr(theirs, field), getattr(adapter, field)
        if loaded_value != wanted:
            raise UserError(
                f"{adapter.load} has {field} {loaded_value}, and this run {wanted}; "
                f"give {loaded_value} as {word.flag_of(field)}"
            )
    scale = method.scale(adapter)
    if method.alpha is not None and not math.isclose(theirs.scale, scale):
        raise UserError(
            f"{adapter.load} was trained at a scale (alpha / rank) of {theirs.scale:g}, and this run has "
            f"{scale:g}; "
            + (
                f"give {theirs.alpha:g} as {word.flag_of('alpha')}"
                if word.flag_of("alpha")
                else "merge that adapter, and train on the merged model"
            )
        )
    # Only our files record it. An adapter also makes up for the rounding of the weights that it was trained on.
    if theirs.source == AdapterMetadata.source and theirs.quant != adapter.quant:
        raise UserError(
            f"{adapter.load} was trained on weights under --quant {theirs.quant}, and this run has --quant "
            f"{adapter.quant}; give --quant {theirs.quant}"
        )
    check_parts(adapter, loaded, base.family)
    return loaded


def start_states(path: str, config: ModelConfig, family: Family, base: Base | None) -> State | None:
    """The State that --train_parts state starts from: --state_load's, else the base's, or None for zeros."""
    tensors = {} if base is None else split_time_states(base.tensors)[1]
    if path:
        file = read_states(path)
        if base is not None:
            file.check_base(base)
        tensors = file.time_states()
    name = path or ("" if base is None else base.path)
    return state_of(tensors, State.zeros(config, 1), family.rows_are_keys, name) if tensors else None


def check_parts(adapter: AdapterConfig, loaded: Adapter, family: Family) -> None:
    """Raise UserError for tensors of the base that the earlier run trained and this one would not save."""
    frozen = [
        key
        for key in loaded.whole()
        if family.part_of(key) not in adapter.train_parts
        or (is_time_state(key) and not belongs(key, adapter.state_parts))
    ]
    if not frozen:
        return
    parts = [family.part_of(key) for key in frozen]
    named = " ".join(dict.fromkeys([*adapter.train_parts, *filter(None, parts)]))
    named += state_parts_flag(loaded.whole())
    trainable = all(part in (*family.parts, STATE) for part in parts)
    raise UserError(
        f"{adapter.load} holds {len(frozen)} tensors of the base that trained along (such as {frozen[0]}), and "
        "this run would neither train nor save them; "
        + (f"give --train_parts {named}" if trainable else "merge that adapter, and train on the merged model")
    )


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
    # Only the wanted weights: gradients of a whole model may not fit.
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
        # A batch may be longer than one pass holds. The segment from which most is learned stands for it.
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
    """The device that a rank trains on. A GPU becomes the current one: nothing is put on another."""
    if accelerator == "cpu":
        return torch.device("cpu")
    index = local_rank % torch.cuda.device_count()  # a launcher may show each rank one GPU, its first
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
