"""An adapter's folder as rwkv_lightning_cuda serves it: MiSS on an RWKV-7, beside a model that is never merged.

adapter.json describes the layers, and adapter.pth holds each layer's D (out, rank) in 16 bits, under
`blocks.N.att.key.weight.D`. With S, the sums of inputs with equal numbers modulo the rank, it computes
y = W x + scale D S, which is bone with Dᵀ (https://github.com/Alic-Li/rwkv_lightning_cuda, src/miss).
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from ..cli.errors import UserError, quoted, short
from ..cli.names import is_finite, is_whole
from ..models import family_named
from .adapter_file import Adapter, AdapterMetadata, target_names
from .atomic import atomic_write
from .base import Base
from .digest import sha256_of
from .readable import read_settings
from .tensors import chunks, read_tensors, require_file, save_pth

MANIFEST, WEIGHTS = "adapter.json", "adapter.pth"
SOURCE = "rwkv_lightning_cuda"
GENERATION = "x070"
FORM = (("format_version", 1), ("method", "miss"), ("kind", "inference_adapter"), ("layout", "modulo_rank_zero_pad"))
LARGEST_RANK, LARGEST = 1024, 65504.0  # of the runtime, which computes with float16


def is_lightning_folder(folder: str | Path) -> bool:
    """Return whether a folder is one, by the names of its files."""
    return (Path(folder) / MANIFEST).is_file() and (Path(folder) / WEIGHTS).is_file()


def read_lightning_folder(folder: Path) -> Adapter:
    """Read a folder as a bone Adapter: the same numbers, in float32 with the scale in them if that is not 1. Raises
    UserError for another format, and for tensors that differ from the manifest's."""
    manifest = read_settings(folder / MANIFEST)
    for name, due in FORM:
        if (value := manifest.get(name)) != due:
            told = quoted(value)
            raise UserError(
                f"{folder / MANIFEST}: {name} is {told}, and {due!r} is read here; merge it where it is from"
            )
    rank, scale, targets = (manifest.get(name) for name in ("rank", "scale", "targets"))
    if not is_whole(rank) or not is_finite(scale) or scale == 0:
        told = short(f"rank = {rank!r} and scale = {scale!r}")
        raise UserError(f"{folder / MANIFEST} has {told}, and two finite numbers other than 0 are due; copy it again")
    listed = targets if isinstance(targets, list) else []
    shapes = {str(target.get("name")): target.get("shape") for target in listed if isinstance(target, dict)}
    tensors = read_tensors(folder / WEIGHTS)
    found = {key: list(tensor.shape) for key, tensor in tensors.items()}
    wrong = next((key for key in {**shapes, **found} if shapes.get(key) != found.get(key)), None)
    if wrong is not None or any(shape[1:] != [rank] or not key.endswith(".weight.D") for key, shape in found.items()):
        what = f"{wrong} is not in both with one shape" if wrong else f"not all are D of rank {rank}"
        raise UserError(f"{folder}: {MANIFEST} and {WEIGHTS} do not fit together: {short(what)}; copy the folder again")
    own = {key.removesuffix(".weight.D") + ".bone": tensor.t().contiguous() for key, tensor in tensors.items()}
    if scale != 1:
        own = {key: tensor.float() * scale for key, tensor in own.items()}
    names = target_names(key.removesuffix(".bone") for key in own)
    return Adapter(own, AdapterMetadata("bone", rank=rank, targets=names, generation=GENERATION, source=SOURCE))


def write_lightning_folder(folder: Path, adapter: Adapter, base: Base) -> str:
    """Write a bone Adapter that was trained on a Base -> a phrase on the loss in the runtime's float16. The file has
    bfloat16 if that holds every number. Raises UserError for an adapter that the runtime cannot serve."""
    refuse_unserved(adapter, base)
    modules = {module: params["bone"].t().contiguous() for module, params in adapter.modules().items()}
    fits = all(torch.equal(D.bfloat16().to(D.dtype), D) for D in modules.values())
    dtype = torch.bfloat16 if fits else torch.float16
    kept = {module: D.to(dtype) for module, D in modules.items()}
    family, rank = family_named(GENERATION), adapter.metadata.rank
    order = sorted(kept, key=lambda module: (int(module.split(".")[1]), family.targets.index(module.split(".", 2)[2])))
    tensors = {f"{module}.weight.D": kept[module] for module in order}
    targets = [
        {
            "name": f"{module}.weight.D",
            "layer": int(module.split(".")[1]),
            "target": module.split(".", 2)[2] + ".weight",
            "in_features": base.linear_shapes[module][1],
            "shape": list(kept[module].shape),
        }
        for module in order
    ]
    manifest: dict[str, Any] = dict(FORM) | {"dtype": str(dtype).removeprefix("torch."), "targets": targets}
    manifest |= {"rank": rank, "alpha": rank, "scale": 1, "base_fingerprint": sha256_of(require_file(base.path))}
    manifest["content_version"] = content_version(manifest, tensors)
    with atomic_write(folder / MANIFEST) as described, atomic_write(folder / WEIGHTS) as weights:
        save_pth(weights, tensors)
        described.write_text(json.dumps(manifest, sort_keys=True) + "\n")
        (folder / MANIFEST).unlink(missing_ok=True)  # so that a kill leaves no manifest beside other tensors
    lost = sum(float((kept[module].half().double() - D.double()).square().sum()) for module, D in modules.items())
    whole = sum(float(D.double().square().sum()) for D in modules.values())
    return f"of which the runtime's float16 loses {math.sqrt(lost / whole):.1e}" if lost else "exactly"


def refuse_unserved(adapter: Adapter, base: Base) -> None:
    """Raise UserError for an adapter that the runtime cannot serve on a Base."""
    metadata = adapter.metadata
    instead = "merge it with merge_bone.py"
    if metadata.variant != "bone":
        raise UserError(f"{SOURCE} serves MiSS, which is bone, and this is {metadata.variant}; {instead}")
    if base.family.version != GENERATION:
        raise UserError(f"{SOURCE} serves RWKV-7, and {base.path} is {base.family.name}; {instead}")
    if whole := adapter.whole():
        first = next(iter(whole))
        raise UserError(f"{len(whole)} tensors such as {first} trained along, which {SOURCE} cannot hold; {instead}")
    for module, params in adapter.modules().items():
        if base.linear_shapes.get(module, (0,))[0] != params["bone"].shape[1]:
            raise UserError(f"{module} has no layer of this width in {base.path}; give the adapter's own base")
        if params["bone"].abs().max() > LARGEST:
            raise UserError(f"{module} holds values beyond {LARGEST:g}, the most of float16; {instead}")
    if metadata.rank > LARGEST_RANK:
        raise UserError(f"rank {metadata.rank} is above {LARGEST_RANK}, the most that {SOURCE} takes; {instead}")


def content_version(manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """The SHA-256 that identifies a folder to the runtime: of the manifest's compact JSON, its keys sorted, without
    this entry, and of the tensors' bytes in the manifest's order."""
    told = {name: value for name, value in manifest.items() if name != "content_version"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode())
    for tensor in tensors.values():
        for chunk in chunks(tensor):
            digest.update(chunk)
    return digest.hexdigest()
