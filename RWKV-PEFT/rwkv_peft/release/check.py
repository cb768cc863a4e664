"""Check a merged model against base and adapter, here and in a foreign runtime.

    rwkv-peft check --base_model base.pth --bone_checkpoint adapter.safetensors --merged merged.pth
    rwkv-peft check --base_model base.pth --bone_checkpoint one.safetensors=0.7 two.safetensors --merged merged.pth
    rwkv-peft check --merged merged.pth --runtimes

One random token sequence is read with base and adapter layers (of several adapters, with their merge before it is
rounded), with the merged file, and with the merged file in the
`rwkv` package, all in float32 on the CPU; their logits are compared. A single wrong value may not show there, so each
tensor is compared too: unchanged ones with the base's, adapted ones with base and change, computed anew. Files stay
mapped, and one block at a time becomes float32; the `rwkv` package holds a float32 copy.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..adapters.inject import inject, load_tensors
from ..adapters.quant import roundtrip
from ..checkpoints.adapter_file import Adapter
from ..checkpoints.adapters import sources_of
from ..checkpoints.atomic import scratch_folder
from ..checkpoints.base import Base, open_base
from ..checkpoints.state_file import read_states
from ..checkpoints.tensors import dtype_name, save_pth
from ..cli.errors import UserError, summarize
from ..cli.parser import counted
from ..models.state import State, is_time_state, split_time_states, state_of
from .compatibility import Adapters
from .flags import check_flags
from .merge import LayerChange, Merge, MergeOptions, WholeChange, changed, check_fingerprints, is_layer_change
from .runtimes import logits_by_parts, random_tokens, reference_logits, refused_by_rwkv, runtimes_agree, rwkv_sequence

SAME_FILE = 1e-4  # relative difference allowed between two float32 programs that read the same weights
ROUNDED = 5e-2  # the same between a merged file and the unmerged float32 sum that it rounds to its dtype
SHOWN = 10  # differences of tensors that are printed
BAND = 1 << 18  # values compared at a time
SLACK = 2.0**-18  # relative to a row's largest value: more than float32 arithmetic loses in computing the row

Range = tuple[torch.Tensor, torch.Tensor]  # the lowest and the highest value allowed for each element
# (rows of the source, the first row's number, the file's dtype) -> the Range of the rows
Expect = Callable[[torch.Tensor, int, torch.dtype], Range]
Adapt = Callable[[str, torch.nn.Module], None]  # changes a part of a model, of a name, as it is reached


def main(argv: list[str]) -> int:
    """Print the comparisons; return 0 if all agree, else 1."""
    args = check_flags(argv)
    merged = open_base(args.merged)
    base = open_base(args.base_model) if args.base_model else None
    adapters: Adapters = []
    if base is not None and args.bone_checkpoint:
        check_comparable(merged, base)
        adapters = [(source.path, source.read(base.tensors)) for source in sources_of(args, args.bone_checkpoint)]
        Merge(base, adapters)  # raises UserError for an adapter that cannot be merged
        if not args.any_base:
            check_fingerprints(base, adapters)
    if args.state:
        states = read_states(args.state)
        states.check_base(base if base is not None and adapters else merged)
        merged = states.added_to(merged)
    if merged.has_states and (note := merged.family.unread_states(merged.tensors)):
        print(f"time states: {note}; here they are put into its list of states, as a program that uses them must")
    agree = True
    if base is not None and adapters:
        agree = logits_agree(merged, base, adapters, args.state or args.merged, args.tokens)
        agree = tensors_agree(merged, base, adapters) and agree
    if args.runtimes:
        agree = runtimes_agree(merged, args.tokens, args.gguf_types) and agree
    return int(not agree)


def check_comparable(merged: Base, base: Base) -> None:
    """Raise UserError for a model that the rwkv package refuses, and for a base of other dimensions."""
    if reason := refused_by_rwkv(merged.config):
        raise UserError(
            f"{merged.path} is an {merged.family.name}, and check runs the rwkv package, which {reason}; compare the "
            "answers of rwkv-peft generate, to the merged file and to the base with the adapter"
        )
    if merged.config != base.config:
        raise UserError(
            f"{merged.path} and {base.path} differ in their dimensions, {merged.config} and {base.config}, so that "
            "neither was made of the other; give the base of the merge"
        )


def logits_agree(merged: Base, base: Base, adapters: Adapters, where: str, length: int) -> bool:
    """Print how the logits of a merged model compare with the rwkv package's, and with a Base's under adapters; True if
    both agree. `where` is the file of the time states, if there are any."""
    states = split_time_states(merged.tensors)[1]
    for name, adapter in adapters:
        if split_time_states(adapter.tensors)[1] and not states:
            raise UserError(
                f"{name} holds time states, and {merged.path} none; give the file that the merge wrote them to as "
                "--state"
            )
    if states:
        foreign = not states.keys() <= base.tensors.keys() | {key for _, adapter in adapters for key in adapter.tensors}
        neither = ", which neither the base nor the adapter holds" if foreign else ""
        print(f"time states: the merged model starts from those of {where}{neither}")
    tokens, agree = random_tokens(base.config.vocab_size, length), True
    ours = reference_logits(merged, tokens, torch.float32)
    for text, actual, expected, limit in (
        ("merged file, rwkv package and ours", package_logits(merged, tokens), ours, SAME_FILE),
        ("merged file and base with adapter on", ours, adapted_logits(base, adapters, tokens, states), ROUNDED),
    ):
        relative = float((actual - expected).norm() / expected.norm())
        top = float((actual.argmax(-1) == expected.argmax(-1)).float().mean())
        agree = agree and relative <= limit  # False for NaN
        more = "" if relative <= limit else f", MORE THAN {limit:.0e}"
        print(f"{text}: relative difference {relative:.1e}, same top token in {top:.0%}{more}")
    return agree


def adapted_logits(
    base: Base, adapters: Adapters, tokens: torch.Tensor, states: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Compute the logits (T, V) of a Base over tokens (T,), in float32, with adapters.

    The sequence starts from the adapters' time states, else from `states`, else from zeros.
    """
    whole, tuned = split_time_states(whole_tensors(base, adapters))
    start = State.zeros(base.config, 1)
    if tuned or states:
        start = state_of(
            tuned or states, start, base.family.rows_are_keys, ", ".join(str(name) for name, _ in adapters)
        )
    adapt = layers_of(base, *adapters[0]) if len(adapters) == 1 else weights_of(base, adapters)
    return logits_by_parts(base.family.load(base.tensors | whole, base.config), tokens, start, torch.float32, adapt)


def weights_of(base: Base, adapters: Adapters) -> Adapt:
    """Put weights in float32, changed by one adapter after the other, in the places of a block's."""
    merge = Merge(base, adapters)

    def adapt(name: str, part: torch.nn.Module) -> None:
        prefix = f"blocks.{name}."
        for key, changes in merge.changes.items():
            if key.startswith(prefix) and any(map(is_layer_change, changes)):
                weight = part.get_parameter(key.removeprefix(prefix))
                weight.data = changed(base.tensors[key].float(), changes)

    return adapt


def layers_of(base: Base, adapter: str | Path, loaded: Adapter) -> Adapt:
    """Put an Adapter's layers into a block; `adapter` names its file."""
    family, metadata, modules = base.family, loaded.metadata, loaded.modules()
    config = replace(loaded.config(family), train_parts=())  # tensors that trained whole take the base's places
    # quantized, or less its first factors, in the dtype that the training had
    rounded = metadata.quant != "none" or (metadata.method is not None and metadata.method.residual is not None)

    def adapt(name: str, part: torch.nn.Module) -> None:
        prefix = f"blocks.{name}."
        names = tuple(module for module in modules if module.startswith(prefix))
        if not names:
            return
        for module in names if rounded else ():
            weight = base.tensors[f"{module}.weight"]
            part.get_submodule(module.removeprefix(prefix)).to(metadata.base_dtype() or weight.dtype)
        model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleDict({name: part})})  # with its name in the whole one
        inject(model, config, names, initial=loaded.tensors)
        part.float()
        tensors = {f"{module}.{name}": tensor for module in names for name, tensor in modules[module].items()}
        load_tensors(model, tensors, adapter)
        for module in names if loaded.amount != 1 else ():
            weight, layer = base.tensors[f"{module}.weight"].float(), part.get_submodule(module.removeprefix(prefix))
            layer.register_forward_hook(partial(scaled_output, weight=weight, amount=loaded.amount))

    return adapt


def scaled_output(
    layer: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor, weight: torch.Tensor, amount: float
) -> torch.Tensor:
    """A forward hook of an adapter's layer on a weight (out, in): the output with its change times `amount`."""
    return torch.lerp(torch.nn.functional.linear(inputs[0], weight), output, amount)


def whole_tensors(base: Base, adapters: Adapters) -> dict[str, torch.Tensor]:
    """{key: tensor} that adapters put in place of a Base's; float32 if they are several, or do so in part."""
    (_, first), *others = adapters
    return first.whole() if first.amount == 1 and not others else Merge(base, adapters).whole(base)


def package_logits(base: Base, tokens: torch.Tensor) -> torch.Tensor:
    """Compute the logits (T, V) of a Base over tokens (T,) in float32 with the `rwkv` package.

    The package reads a copy with the embeddings of these tokens alone, the first in float32, because it folds
    blocks.0.ln0 into it in the file's own dtype; it casts the rest itself. Raises UserError if the package is missing
    or fails.
    """
    if importlib.util.find_spec("rwkv") is None:
        raise UserError("check runs the rwkv package, which is not installed: pip install rwkv")
    embeddings = ("emb.weight", *base.family.tables)
    tensors = {key: tensor[tokens] if key.endswith(embeddings) else tensor for key, tensor in base.tensors.items()}
    folded = ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias")
    dtypes = {key: torch.float32 if key in folded else tensor.dtype for key, tensor in tensors.items()}
    with scratch_folder() as folder:
        copy = folder / "model.pth"
        save_pth(copy, tensors, dtypes)
        try:
            return rwkv_sequence(copy, torch.arange(len(tokens)), base.config)
        except Exception as error:
            raise UserError(
                f"the rwkv package cannot compute {base.path} ({summarize(error, named=True)}); --runtimes runs the "
                "others, too"
            ) from error


def tensors_agree(merged: Base, base: Base, adapters: Adapters) -> bool:
    """Print how a merged model's tensors differ from base and adapters; True if they do not."""
    lines = differences(merged, base, adapters)
    for line in lines[:SHOWN]:
        print(f"DIFFERS  {line}")
    if len(lines) > SHOWN:
        print(f"and {len(lines) - SHOWN} more differences")
    if not lines:
        print(f"{counted(len(base.tensors), 'tensor')}: each as base and adapter make it")
    return not lines


def differences(merged: Base, base: Base, adapters: Adapters) -> list[str]:
    """Lines on the differences between a Base `merged` and the merge of a Base and adapters: order, dtypes, values.

    Adapters that were trained on a quantized base may be merged into the quantized or the original one; the closer of
    the two counts.
    """
    odd = list(odd_values(merged, base, adapters))
    if odd and any(adapter.metadata.quant != "none" for _, adapter in adapters):
        odd = min(odd, list(odd_values(merged, base, adapters, "none")), key=len)
    return [*odd_order(merged, base), *odd_dtypes(merged, base), *odd]


def odd_order(merged: Base, base: Base) -> Iterator[str]:
    """Yield a line about the first key that is not at the base's place, if any; time states may lie anywhere."""
    keys, base_keys = ([key for key in model.tensors if not is_time_state(key)] for model in (merged, base))
    if place := next((pair for pair in zip(keys, base_keys) if pair[0] != pair[1]), None):
        yield f"the order of the keys: {place[0]} is in the place of the base's {place[1]}"


def odd_dtypes(merged: Base, base: Base) -> Iterator[str]:
    """Yield a line for each tensor with another dtype than the base's, unless all share one (--output_dtype)."""
    weights = {key: tensor.dtype for key, tensor in merged.tensors.items() if not is_time_state(key)}
    if len(set(weights.values())) > 1:
        for key, dtype in weights.items():
            if dtype != base.tensors[key].dtype:
                yield f"{key}: {dtype_name(dtype)}, and the base has {dtype_name(base.tensors[key].dtype)}"


def odd_values(merged: Base, base: Base, adapters: Adapters, quant: str | None = None) -> Iterator[str]:
    """Yield a line for each tensor with wrong values. `quant` names the quantization of the frozen weights (None: as
    recorded)."""
    whole, merge = whole_tensors(base, adapters), Merge(base, adapters, MergeOptions(quant=quant))
    exact = len(adapters) == 1 and adapters[0][1].amount == 1
    for key, source in (base.tensors | whole).items():
        if (tensor := merged.tensors.get(key)) is None:
            yield f"{key}: missing"  # a time state, because a model that lacks another tensor is not opened
            continue
        expect: Expect = near if key in whole and not exact else cast
        changes, unit = merge.changes.get(key, []), 1
        if any(map(is_layer_change, changes)):
            first, *others = changes
            expect = adapted_in_turn(changes)
            if isinstance(first, LayerChange) and not others:
                expect = adapted(first)
            unit = math.lcm(*(change.unit(tensor.shape[1]) for change in changes))
        if odd := compared(tensor, source, expect, unit):
            unmerged = key in base.tensors and not compared(tensor, base.tensors[key], cast)
            yield f"{key}: {odd}" + (", as the base has it" if unmerged else "")


def compared(tensor: torch.Tensor, source: torch.Tensor, expect: Expect, unit: int = 1) -> str:
    """The wrong values of a tensor in words: their number, largest deviation and first place; "" if there are none.

    `expect` computes the Range from `source` a band of rows at a time. Bands begin at multiples of `unit`.
    """
    count, largest = 0, 0.0
    first: list[int] = []
    step = max(BAND // (math.prod(tensor.shape[1:]) * unit), 1) * unit
    for start in range(0, len(tensor), step):
        actual, rows = tensor[start : start + step], source[start : start + step]
        low, high = expect(rows, start, tensor.dtype)
        odd = ~((actual >= low) & (actual <= high))  # True for NaN
        if odd.any():
            row, *place = odd.nonzero()[0].tolist()
            first = first or [start + row, *place]
            low, high, actual = (values[odd].double() for values in (low, high, actual))
            count += len(actual)
            largest = max(largest, float(torch.maximum(low - actual, actual - high).max()), key=lambda x: (x != x, x))
    return f"{count:,} of {tensor.numel():,} values, by up to {largest:.2g}, the first at {first}" if count else ""


def cast(source: torch.Tensor, start: int, dtype: torch.dtype) -> Range:
    """Expect the source's own values, in the file's dtype."""
    values = source.to(dtype)
    return values, values


def near(source: torch.Tensor, start: int, dtype: torch.dtype) -> Range:
    """Expect the source's own values, give or take the loss of float32 arithmetic, in the file's dtype."""
    loss = SLACK * torch.linalg.vector_norm(source, torch.inf)
    return (source - loss).to(dtype), (source + loss).to(dtype)


def adapted(change: LayerChange) -> Expect:
    """The Expect of an adapted weight: base plus `amount` times the change, give or take the loss of float32
    arithmetic, rounded."""
    form, scale, amount = change.method.change, change.scale, change.amount
    is_residual = change.method.residual is not None

    def expect(source: torch.Tensor, start: int, dtype: torch.dtype) -> Range:
        part = change.rows(start, start + len(source))
        bases = [base.float() for base in trained_on(source, part)]
        # a residual base lacks a part of `delta` already
        ends = [
            form.added(base, part.params, scale) if is_residual else base + form.delta(base, part.params, scale)
            for base in bases
        ]
        loss = lost(source.float(), *ends)
        if amount != 1:
            ends = [torch.lerp(source.float(), end, amount) for end in (ends[0] - loss, ends[-1] + loss)]
            return torch.minimum(*ends).to(dtype), torch.maximum(*ends).to(dtype)
        return (ends[0] - loss).to(dtype), (ends[-1] + loss).to(dtype)

    return expect


def adapted_in_turn(changes: Sequence[LayerChange | WholeChange]) -> Expect:
    """The Expect of a weight under several changes, each of the result of those before, give or take as `adapted`."""

    def expect(source: torch.Tensor, start: int, dtype: torch.dtype) -> Range:
        weights = [source.float()]
        for change in changes:
            weights.append(change.rows(start, start + len(source)).apply(weights[-1]))
        loss = lost(*weights)
        return (weights[-1] - loss).to(dtype), (weights[-1] + loss).to(dtype)

    return expect


def trained_on(source: torch.Tensor, change: LayerChange) -> list[torch.Tensor]:
    """The weight that the adapter was trained on, from rows of the base -> [it]; if it was rounded after first factors
    were taken out of it, [the lowest, the highest] that it may be."""
    residual, quant, dtype = change.method.residual, change.quant, change.dtype
    if quant == "none" and residual is None:
        return [source]
    kept = [source.to(dtype)]
    if residual is not None:
        wide = kept[0].float()
        left = residual.base(wide, change.params, change.scale)  # float32, as not rounded
        loss = lost(wide, left)
        kept = [(left - loss).to(dtype), (left + loss).to(dtype)]
    if quant == "none":
        return kept
    kept = [roundtrip(weight.float(), quant) for weight in kept]
    return [kept[0].minimum(kept[-1]), kept[0].maximum(kept[-1])]


def lost(*values: torch.Tensor) -> torch.Tensor:
    """The most that float32 may lose in each row (n, 1) of values (n, in) that go into or come out of a computation."""
    largest = [torch.linalg.vector_norm(value, torch.inf, 1, keepdim=True) for value in values]
    return SLACK * torch.cat(largest, 1).amax(1, keepdim=True)
