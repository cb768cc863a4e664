"""The adapter that a run goes on from (bone_load, lora_load, pissa_load), and what must agree with the run."""

import math
from pathlib import Path
from types import MappingProxyType

from ..adapters import part_of
from ..checkpoint import AdapterMetadata, read_adapter
from ..errors import UserError

# method -> where its rank is given; the others take lora_r
RANK_NAMES = MappingProxyType({"bone": "--bone_r", "pissa": "pissa_r in --pissa_config"})


def start_adapter(adapter, base, base_fingerprint):
    """The adapter to start from, refused unless it is of this run's variant, rank, scale, quantization, parts and
    base."""
    path = Path(adapter.load)
    flat = path.is_file() and path.suffix != ".safetensors"  # as RWKV-PEFT writes them
    if adapter.init and path.exists() and not flat:
        raise UserError(
            f"pissa_init {adapter.init} belongs to a .pth of RWKV-PEFT, and {adapter.load} is none; leave it out"
        )
    if adapter.method == "pissa" and flat and not adapter.init:
        raise UserError(
            f"{adapter.load} does not hold the factors that its PiSSA began with; name the file that does, "
            "init_pissa.pth in the folder of that run, as pissa_init in --pissa_config"
        )
    if adapter.variant == "lora" and flat and not adapter.alpha:
        raise UserError(
            f"{adapter.load} does not record alpha; give that of its training as lora_alpha in --lora_config"
        )
    loaded = read_adapter(
        adapter.load,
        mode=adapter.mode if adapter.method == "bone" else None,
        base=base,
        init=adapter.init or None,
        alpha=adapter.alpha if flat and adapter.variant == "lora" else None,
    )
    theirs = loaded.metadata
    if theirs.base_fingerprint and theirs.base_fingerprint != base_fingerprint:
        raise UserError(
            f"{adapter.load} was trained on another base model (fingerprint {theirs.base_fingerprint}, this "
            f"one's is {base_fingerprint}); give its own base as --load_model"
        )
    if theirs.variant != adapter.variant:
        raise UserError(f"{adapter.load} holds a {theirs.variant} adapter, and this run trains {adapter.variant}")
    if theirs.rank != adapter.rank:
        raise UserError(
            f"{adapter.load} has rank {theirs.rank}, and this run {adapter.rank}; give {theirs.rank} as "
            f"{RANK_NAMES.get(adapter.method, 'lora_r in --lora_config')}"
        )
    if adapter.method != "bone" and not math.isclose(theirs.scale, adapter.scale):
        raise UserError(
            f"{adapter.load} was trained at a scale (alpha / rank) of {theirs.scale:g}, and this run has "
            f"{adapter.scale:g}; "
            + (
                f'give "lora_alpha": {theirs.scale * theirs.rank:g} in --lora_config'
                if adapter.method != "pissa"
                else "merge that adapter, and train on the merged model"
            )
        )
    if theirs.source == AdapterMetadata.source and theirs.quant != adapter.quant:
        raise UserError(
            f"{adapter.load} was trained on weights under --quant {theirs.quant}, and this run has --quant "
            f"{adapter.quant}; give --quant {theirs.quant}"
        )
    check_parts(adapter, loaded)
    return loaded


def check_parts(adapter, loaded):
    """Refuse tensors of the base that the earlier run trained and this one would not save with its adapter."""
    frozen = [key for key in loaded.whole() if part_of(key) not in adapter.train_parts]
    if frozen:
        parts = dict.fromkeys([*adapter.train_parts, *filter(None, map(part_of, frozen))])
        raise UserError(
            f"{adapter.load} holds {len(frozen)} tensors of the base that trained along (such as {frozen[0]}), and "
            "this run would neither train nor save them; "
            + (
                f"give --train_parts {' '.join(parts)}"
                if all(map(part_of, frozen))
                else "merge that adapter, and train on the merged model"
            )
        )
