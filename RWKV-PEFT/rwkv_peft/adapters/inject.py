"""Put adapter layers into a model by module name, and decide what trains."""

import math
import re
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from ..config import ADAPTER_METHODS, BONE_MODES, QUANTIZATIONS, TRAIN_PARTS
from ..errors import UserError
from .base import AdapterLinear
from .bat import BatInLinear, BatOutLinear
from .bone import BoneLinear
from .delta import RESIDUAL_VARIANTS
from .lora import LoraLinear, ResidualLoraLinear, initial_factors

ADAPTERS = MappingProxyType(
    {
        "bone": BoneLinear,
        "bone-mini": BoneLinear,
        "bat-in": BatInLinear,
        "bat-out": BatOutLinear,
        "lora": LoraLinear,
        "pissa": ResidualLoraLinear,
        "olora": ResidualLoraLinear,
        "lora-ga": ResidualLoraLinear,
    }
)


@dataclass(frozen=True)
class InjectReport:
    """What `inject` did: names of the replaced modules, parameters that train, parameters in all."""

    replaced: tuple[str, ...]
    trainable: int
    total: int

    def __str__(self):
        adapted = f"{len(self.replaced)} layers adapted; " if self.replaced else ""
        return (
            f"{adapted}trainable params: {self.trainable:,} || "
            f"all params: {self.total:,} || trainable%: {100 * self.trainable / self.total:.4f}"
        )


def check_adapter(config, shapes):
    """Refuse an adapter that does not fit, from shapes alone.

    shapes: module name -> (out_features, in_features) of its weight, for every module that has a
    2-D weight (others do no harm). -> the names of the modules to replace, in the order of shapes.
    Raises UserError for an unknown method, mode, part or quantization, a target that matches
    nothing, and a rank that does not fit a layer.
    """
    _one_of("--peft", config.method, ADAPTER_METHODS)
    _one_of("--quant", config.quant, QUANTIZATIONS)
    for part in config.train_parts:
        _one_of("--train_parts", part, TRAIN_PARTS)
    if config.method == "none":
        if config.quant != "none":
            raise UserError(f"--quant {config.quant} needs frozen weights, and --peft none trains them; drop one")
        return ()
    if config.method == "bone":
        _one_of("--bone_mode", config.mode, BONE_MODES)
    if config.method == "bone" and config.dropout:
        raise UserError(f"dropout {config.dropout} is LoRA's alone and Bone has none; leave it at 0")
    if not 0 <= config.dropout < 1:
        raise UserError(f"dropout {config.dropout} is not in [0, 1)")
    if config.rank < 1:
        raise UserError(f"rank {config.rank}: a rank is at least 1; try 64")
    if not (math.isfinite(config.alpha) and config.alpha >= 0):
        raise UserError(f"alpha {config.alpha}: it is a finite number above 0, or 0 for that of the rank")
    if not (math.isfinite(config.lora_plus_ratio) and config.lora_plus_ratio > 0):
        raise UserError(f"--loraplus_lr_ratio {config.lora_plus_ratio}: it is a finite number above 0; try 16")
    if config.svd_niter < 0:
        raise UserError(f"svd_niter {config.svd_niter} is negative; 0 asks for an exact SVD, 4 for a quick one")
    names = _match_targets(config.targets, shapes)
    for name in names:
        _check_rank(config, name, *shapes[name])
    return names


def inject(model, config, *, initial=None, gradients=None):
    """Replace the target layers of a model by adapter layers, in place, and freeze what does not train.

    model is any nn.Module whose target modules (names that end in one of config.targets) are
    nn.Linear, with their weights loaded. config.method "none" replaces nothing and trains
    config.train_parts, or everything. For pissa, olora and lora-ga, initial maps
    "<module>.init_lora_A" and "…_B" to the factors of an adapter file to go on from (its weights
    are loaded afterwards); without it they are made anew, lora-ga from gradients: module name ->
    gradient of the loss with respect to its weight. -> InjectReport. Raises UserError.
    """
    modules = dict(model.named_modules())
    names = check_adapter(config, linear_shapes(model))
    parts = _match_parts(config.train_parts, model)
    model.requires_grad_(config.method == "none" and not parts)
    for name in names:
        layer = _make_layer(modules[name], name, config, initial or {}, gradients or {})
        if config.quant != "none":
            layer.quantize(config.quant)
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, layer)
    for parameter in parts:
        parameter.requires_grad_(True)
    return InjectReport(names, *count_parameters(model))


def count_parameters(model):
    """(trainable, total) parameters; a quantized weight counts as what it stands for."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    quantized = sum(
        m.out_features * m.in_features for m in model.modules() if isinstance(m, AdapterLinear) and m.quant != "none"
    )
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes) + quantized


def _make_layer(base, name, config, initial, gradients):
    if config.variant not in RESIDUAL_VARIANTS:
        layer = ADAPTERS[config.variant](base, config)
    else:
        keys = (f"{name}.init_lora_A", f"{name}.init_lora_B")
        factors = tuple(initial[key] for key in keys if key in initial)
        if initial and len(factors) != 2:
            raise UserError(
                f"the adapter to go on from has no {' or '.join(keys)}; it is not a {config.variant} adapter"
            )
        factors = factors or initial_factors(base.weight, config, gradients.get(name))
        layer = ADAPTERS[config.variant](base, config, factors)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    for parameter_name in layer.parameter_names:
        getattr(layer, parameter_name).requires_grad_(True)
    return layer.train(base.training)


def linear_shapes(model):
    """Module name -> (out_features, in_features) of every nn.Linear."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def _match_targets(targets, shapes):
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


def _match_parts(parts, model):
    """Parameters whose name has a component of a part: time_*, ln0 ln1 ln2 ln_x ln_out, emb, head."""
    matched = []
    for part in parts:
        found = [p for name, p in model.named_parameters() if part_of(name) == part]
        if not found:
            raise UserError(f"--train_parts {part} matches no parameter of the model; leave it out")
        matched += found
    return matched


def part_of(name):
    """The member of TRAIN_PARTS that a parameter of the base belongs to, None for one of none."""
    return next(
        (
            part
            for part in TRAIN_PARTS
            if any(re.fullmatch(rf"{part}(\d+|_\w+)?", component) for component in name.split("."))
        ),
        None,
    )


def _check_rank(config, name, out_features, in_features):
    variant, rank, mini_rank = config.variant, config.rank, config.mini_rank
    if variant in ("bat-in", "bat-out"):
        common = math.gcd(out_features, in_features)
        if common % rank:
            raise UserError(
                f"{variant} needs its rank to divide both sides of every layer: {rank} does not divide "
                f"{out_features if out_features % rank else in_features} at {name} ({out_features} x {in_features}); "
                f"try --bone_r {nearest_divisor(common, rank)}, or --bone_mode bone, which pads"
            )
        return
    if variant == "bone-mini" and (mini_rank < 1 or out_features % mini_rank):
        raise UserError(
            f"bone-mini needs --bone_mini_r to divide the outputs of every layer: {mini_rank} does not divide "
            f"{out_features} at {name}; try --bone_mini_r "
            f"{nearest_divisor(out_features, mini_rank if mini_rank > 0 else rank)}"
        )
    limit = in_features if config.method == "bone" else min(out_features, in_features) // (1 + (variant == "lora-ga"))
    if rank > limit:
        raise UserError(
            f"rank {rank} is more than {limit}, the most that {variant} can use at {name} "
            f"({out_features} x {in_features}); lower it"
        )


def nearest_divisor(number, value):
    """The divisor of a number that is nearest to a value, the larger of two equally near ones."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - value), -d))


def _one_of(flag, value, choices):
    if value not in choices:
        raise UserError(f"{flag} {value} is not one of {', '.join(choices)}")
