"""Read the adapter or the states that a run starts from (--bone_load and its kin, --state_load), and check them."""

import math
from pathlib import Path

from ...adapters.methods import method_of, word_of
from ...checkpoints.adapter_file import Adapter, AdapterMetadata
from ...checkpoints.adapters import AdapterSource
from ...checkpoints.base import Base
from ...checkpoints.rwkv_peft_file import holds_lora
from ...checkpoints.state_file import read_states
from ...cli.errors import UserError
from ...cli.names import STATE
from ...config import WORDS, AdapterConfig, ModelConfig, forms
from ...models.family import Family
from ...models.state import State, is_time_state, split_time_states, state_of


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
        found, here = getattr(theirs, field), getattr(adapter, field)
        if found != here:
            raise UserError(
                f"{adapter.load} has {field} {found}, and this run {here}; give {found} as {word.flag_of(field)}"
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
    frozen = [key for key in loaded.whole() if family.part_of(key) not in adapter.train_parts]
    if not frozen:
        return
    parts = [family.part_of(key) for key in frozen]
    named = " ".join(dict.fromkeys([*adapter.train_parts, *filter(None, parts)]))
    trainable = all(part in (*family.parts, STATE) for part in parts)
    raise UserError(
        f"{adapter.load} holds {len(frozen)} tensors of the base that trained along (such as {frozen[0]}), and "
        "this run would neither train nor save them; "
        + (f"give --train_parts {named}" if trainable else "merge that adapter, and train on the merged model")
    )
