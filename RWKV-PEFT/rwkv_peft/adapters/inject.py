"""Put adapter layers into a model by module name, and choose the parameters that train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..cli.errors import UserError, some
from ..cli.names import NONE, STATE, STATE_PARTS
from ..cli.parser import counted
from ..config import CHOICES, QUANTIZATIONS, AdapterConfig, forms, problems
from .change import Params
from .layer import AdapterLinear
from .method import Method
from .methods import METHODS, adapter_parameter, method_of, word_of


class Generation(Protocol):
    """The part of a generation (a Family of models/) that is needed here."""

    targets: tuple[str, ...]
    parts: tuple[str, ...]

    def part_of(self, key: str) -> str | None: ...


@dataclass(frozen=True)
class InjectReport:
    """The outcome of `inject`: names of the replaced modules, parameters that train, parameters in all."""

    replaced: tuple[str, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        adapted = f"{counted(len(self.replaced), 'layer')} adapted; " if self.replaced else ""
        return (
            f"{adapted}trainable params: {self.trainable:,} || "
            f"all params: {self.total:,} || trainable%: {100 * self.trainable / self.total:.4f}"
        )


def check_adapter(
    config: AdapterConfig, shapes: Mapping[str, tuple[int, int]], parts: Sequence[str] = ()
) -> tuple[str, ...]:
    """Refuse an adapter that does not fit, from shapes alone.

    shapes: module name -> (out_features, in_features) of its weight, for every module that has a
    2-D weight (others do no harm); parts: what --train_parts may name. -> the names of the modules to replace, in the
    order of shapes. Raises UserError for an unknown method, mode, part or quantization, a target that matches
    nothing, and a rank that does not fit a layer.
    """
    _one_of("--peft", config.method, CHOICES)
    _one_of("--quant", config.quant, QUANTIZATIONS)
    for part in config.train_parts:
        _one_of("--train_parts", part, parts)
    for part in config.state_parts:
        _one_of("--state_parts", part, tuple(STATE_PARTS))
    if config.method == NONE:
        if config.quant != "none":
            raise UserError(f"--quant {config.quant} needs frozen weights, and --peft none trains them; drop one")
        return ()
    if len(forms(config.method)) > 1:
        _one_of(f"--{config.method}_mode", config.mode, forms(config.method))
    method = method_of(config)
    assert method is not None  # NONE was answered above
    if problem := next(problems(config, config.method), None):
        raise UserError(problem)
    names = _match_targets(config.targets, shapes)
    for name in names:
        _check_fit(method, config, name, *shapes[name])
    return names


def inject(
    model: nn.Module,
    config: AdapterConfig,
    names: tuple[str, ...] | None = None,
    *,
    family: Generation | None = None,
    initial: Mapping[str, Tensor] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
) -> InjectReport:
    """Replace the target layers of a model by adapter layers, in place, and freeze all that does not train.

    model is any nn.Module whose target modules (names that end in one of config.targets, or of the family's if there
    are none) are nn.Linear, with their weights loaded; names are what `check_adapter` said of it, which is asked if
    they are not given. config.method "none" replaces nothing and trains config.train_parts, or everything; family (a
    Family) names these parameters. If the method has constants, initial maps "<module>.<constant>" to the adapter
    file's that a run goes on from (its weights are loaded afterwards); without it they are made anew, by some methods
    from gradients: module name -> gradient of the loss with respect to its weight. device (by default the model's): the
    one on which weights are taken apart and quantized, a layer at a time, which then goes back. -> InjectReport. Raises
    UserError.
    """
    modules = dict(model.named_modules())
    if names is None:
        if family is not None and not config.targets:
            config = replace(config, targets=family.targets)
        names = check_adapter(config, linear_shapes(model), () if family is None else (*family.parts, STATE))
    parts = [] if not config.train_parts else _match_parts(config.train_parts, model, family)
    model.requires_grad_(config.method == NONE and not parts)
    method = method_of(config)
    # to make a layer costs more than to move it: its weight is quantized, or factors are taken out of it
    is_work = config.quant != "none" or (method is not None and method.residual is not None)
    for name in names:
        base = modules[name]
        home = base.weight.device
        away = device is not None and is_work
        if away:
            base.to(device)
        assert method is not None  # NONE has no layers
        layer = _make_layer(base, name, method, config, initial or {}, gradients or {})
        if config.quant != "none":
            layer.quantize(config.quant)
        if away:
            layer.to(home)
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, layer)
    for parameter in parts:
        parameter.requires_grad_(True)
    return InjectReport(names, *count_parameters(model))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; a quantized weight counts as its dense form."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    quantized = sum(
        m.out_features * m.in_features for m in model.modules() if isinstance(m, AdapterLinear) and m.quant != "none"
    )
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes) + quantized


def _make_layer(
    base: nn.Linear,
    name: str,
    method: Method,
    config: AdapterConfig,
    initial: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> AdapterLinear:
    constants: Params = {}
    if method.held is not None:
        keys = {constant: f"{name}.{constant}" for constant in method.held.names}
        constants = {constant: initial[key] for constant, key in keys.items() if key in initial}
        if initial and len(constants) != len(keys):
            raise UserError(
                f"the adapter to go on from has no {' or '.join(keys.values())}; it is not a {method.name} adapter"
            )
        shapes = method.tensors.shapes(config, base.out_features, base.in_features)
        for constant, tensor in constants.items():
            if tensor.shape != shapes[constant]:
                raise UserError(
                    f"the adapter to go on from has {keys[constant]} of shape {tuple(tensor.shape)}, and "
                    f"{tuple(shapes[constant])} is due; use the rank of its training, on the same base"
                )
        gradient = gradients.get(name)
        if gradient is not None:
            gradient = gradient.to(base.weight.device)
        constants = constants or method.held.make(base.weight, config, gradient)
    layer = AdapterLinear(base, method, config, constants)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    for parameter_name in method.parameters:
        getattr(layer, parameter_name).requires_grad_(True)
    return layer.train(base.training)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module name -> (out_features, in_features) of every nn.Linear."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def _match_targets(targets: Sequence[str], shapes: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Names of the modules that end in a target, in the order of shapes."""
    if not targets:
        raise UserError("no targets: name at least one layer to adapt, such as att.key")
    matched = {target: [n for n in shapes if n == target or n.endswith("." + target)] for target in targets}
    for target, names in matched.items():
        if not names:
            leaves = sorted({".".join(n.split(".")[-2:]) for n in shapes})
            raise UserError(f"target {target} matches no linear layer of the model; there are {', '.join(leaves)}")
        for name in names:
            if name in ("emb", "head"):
                raise UserError(f"target {target}: {name} takes no adapter; train it whole with --train_parts {name}")
    wanted = {name for names in matched.values() for name in names}
    return tuple(name for name in shapes if name in wanted)


def _match_parts(parts: Sequence[str], model: nn.Module, family: Generation | None) -> list[nn.Parameter]:
    """Parameters that belong to one of some parts of a generation's model."""
    assert family is not None  # a part is a generation's
    matched = []
    for part in parts:
        part_parameters = [p for name, p in model.named_parameters() if family.part_of(name) == part]
        if not part_parameters:
            raise UserError(f"--train_parts {part} matches no parameter of the model; leave it out")
        matched += part_parameters
    return matched


def _check_fit(method: Method, config: AdapterConfig, name: str, out_features: int, in_features: int) -> None:
    """Raise UserError if the settings do not fit a layer, in the words of the flags."""
    misfit = method.tensors.misfit(config, out_features, in_features)
    if misfit is None:
        return
    flag = word_of(method).flag_of(misfit.setting)
    advice = f"try {flag} {misfit.nearest}" if misfit.nearest else "lower it"
    if misfit.instead:
        advice += f", or --{config.method}_mode {METHODS[misfit.instead].name}, which takes any"
    raise UserError(
        f"{method.name}: {flag} {misfit.value} {misfit.problem} at {name} ({out_features} x {in_features}); {advice}"
    )


def _one_of(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{flag} {value} is not one of {', '.join(choices)}")


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], name: str | Path = "the adapter") -> None:
    """Copy {name: tensor} of an adapter file into a model with injected layers.

    Every adapter parameter of the model must be in the file, and every tensor of the file in the model,
    with its shape; tensors that train whole keep the base's values if the file has none.
    Raises UserError otherwise, before anything is copied.
    """
    places: dict[str, Tensor] = dict(model.named_parameters())
    places |= {key: buffer for key, buffer in model.named_buffers() if adapter_parameter(key)}
    adapter_keys = [key for key in places if adapter_parameter(key)]
    missing = [key for key in adapter_keys if key not in tensors]
    unexpected = [key for key in tensors if key not in places]
    if not tensors or (adapter_keys and len(missing) == len(adapter_keys)):
        raise UserError(
            f"{name} matches nothing in the model: it holds {some(list(tensors)) or 'nothing'}, and the model "
            f"awaits {some(adapter_keys) or 'nothing'}; check --peft, --bone_mode and which model it was trained on"
        )
    if missing or unexpected:
        kinds = ((missing, "missing from the file"), (unexpected, "without a place in the model"))
        raise UserError(
            f"{name} does not fit the model: "
            + "; ".join(f"{len(keys)} tensors {what} ({some(keys)})" for keys, what in kinds if keys)
            + "; use the same --peft, targets and --bone_mode as in its training"
        )
    for key, tensor in tensors.items():
        if tensor.shape != places[key].shape:
            raise UserError(
                f"{name}: {key} has shape {tuple(tensor.shape)}, the model's is "
                f"{tuple(places[key].shape)}; use the rank and mode of its training, on the same base"
            )
    for key, tensor in tensors.items():
        places[key].copy_(tensor)
