"""Reads and writes adapters in RWKV-PEFT's flat .pth files.

RWKV-PEFT and Hugging Face peft both call block affine Bone "bat" and mean different forms, and their files look alike.
So the variant is concluded only from decisive facts: the key's name, the tool, or a layer that is not square.
"""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..adapters.method import Method, Upstream, UpstreamLayer
from ..adapters.methods import adapter_parameter
from ..cli.errors import UserError
from ..cli.names import NONE
from ..models import FAMILIES
from ..models.family import Family
from .adapter_file import Adapter, AdapterMetadata, target_names
from .atomic import atomic_write
from .tensors import read_tensors, save_pth

SOURCE = "RWKV-PEFT"  # in the metadata of adapters read here
# the prefix of keys in PiSSA's init files since 2025-02, when RWKV-PEFT began to wrap the model
PREFIX = "model."
INITS = ("init_pissa.pth", "init_{}")  # names of the init file beside a PiSSA file: RWKV-PEFT's, and write_rwkv_peft's
INITIAL = ("init_lora_A", "init_lora_B")  # parameters that RWKV-PEFT's PiSSA keeps in a file of their own
Modules = dict[str, dict[str, torch.Tensor]]  # {module name: {parameter name: tensor}}
WRAPPED = re.compile(r"(.+?\.)(?:emb|blocks|ln_out|head)\.")  # a prefix before an official key
SHAPES_DIFFER = "they cannot be from one training"


def read_rwkv_peft(
    path: str | Path,
    mode: str | None = None,
    base: Mapping[str, torch.Tensor] | None = None,
    init: str | Path | None = None,
    alpha: float | None = None,
) -> Adapter:
    """Read the Adapter in a flat .pth of RWKV-PEFT: .bone, .disha, LoRA, PiSSA, time states, whole tensors.

    mode names the variant of 3-D .bone tensors if it follows neither from the file nor from base (a state dict, for its
    shapes); init is the path of PiSSA's init file; alpha is LoRA's, which RWKV-PEFT does not save. Keys may have a
    wrapper's prefix. Raises UserError as read_tensors does, for a file that is a model or mixes kinds of adapter, and
    if the variant or alpha is unknown.
    """
    state = unwrapped(read_tensors(path))
    adapter = Adapter(state, AdapterMetadata(NONE, source=SOURCE))
    modules = adapter.modules()
    if any(is_model(state, family) for family in FAMILIES):
        if modules:
            raise UserError(
                f"{path} is a whole model beside an adapter on {len(modules)} layers that was never merged, "
                "and runtimes would ignore the adapter without a word; merge the adapter's own file into the "
                "base's own file with merge_bone.py"
            )
        raise UserError(
            f"{path} is a model, not an adapter; give it as the base (--load_model of train.py, --base_model elsewhere)"
        )
    kinds = {tuple(sorted(params)) for params in modules.values()}
    kind = kinds.pop() if len(kinds) == 1 else ()
    if kind == INITIAL:
        raise UserError(
            f"{path} holds the initial factors of a PiSSA, and no adapter; give it as --lora_init (pissa_init of "
            "train.py) beside the adapter, rwkv-N.pth in its folder"
        )
    if modules and kind not in (("bone",), ("disha",), ("lora_A", "lora_B")):
        kind_names = ", ".join(map(" with ".join, sorted(kinds or {kind})))
        raise UserError(
            f"{path} holds adapter tensors {kind_names}; one of .bone, .disha, and .lora_A with .lora_B is due: give "
            "the adapter as one of these, or its peft folder"
        )
    if init is not None and "lora_A" not in kind:
        raise UserError(f"--lora_init is for PiSSA, and {path} holds no lora_A and lora_B")
    whole = adapter.whole()
    common: dict[str, Any] = {"targets": target_names(modules), "train_parts": tuple(whole), "source": SOURCE}
    if not modules:
        return Adapter(state, AdapterMetadata(NONE, **common))
    if "lora_A" in kind:
        adapter_tensors, metadata = _read_lora(path, modules, init, alpha, common)
    else:
        adapter_tensors, metadata = _read_bone(path, modules, kind[0], mode, base, common)
    return Adapter(adapter_tensors | whole, metadata)


def is_model(state: Mapping[str, torch.Tensor], family: Family) -> bool:
    """True if a state has the matrices of a generation's first block, as models have and adapters do not."""
    return all(f"blocks.0.{target}.weight" in state for target in family.targets)


def unwrapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the prefix that a training's wrapper of the model gave to all keys, such as model. or base_model.model.;
    a state in which some key lacks it stays as it is."""
    match = WRAPPED.match(next(iter(state)))
    if match is None or not all(key.startswith(match[1]) for key in state):
        return state
    return {key.removeprefix(match[1]): tensor for key, tensor in state.items()}


def holds_lora(path: str | Path) -> bool:
    """Return whether a flat .pth holds LoRA's factors, or PiSSA's."""
    return any((adapter_parameter(key) or ("", ""))[1] == "lora_A" for key in read_tensors(path))


def _read_bone(
    path: str | Path,
    modules: Modules,
    kind: str,
    mode: str | None,
    base: Mapping[str, torch.Tensor] | None,
    common: dict[str, Any],
) -> tuple[dict[str, torch.Tensor], AdapterMetadata]:
    tensors = {module: params[kind] for module, params in modules.items()}
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    dims = {len(shape) for shape in shapes}
    if dims == {3}:
        variant = "bat-in" if kind == "disha" else _block_affine_variant(path, tensors, mode, base)
    elif dims == {2} and all(rows < columns for rows, columns in shapes):
        variant = "bone"
    elif dims == {2} and kind == "bone" and all(rows > columns > 0 == rows % columns for rows, columns in shapes):
        variant = "bat-out"  # the oldest files: (out, rank), the blocks stacked
        tensors = {module: tensor.unflatten(0, (-1, tensor.shape[1])) for module, tensor in tensors.items()}
    else:
        raise UserError(f"{path}: its .{kind} tensors are neither all (rank, out) nor all blocks; {SHAPES_DIFFER}")
    ranks = {tensor.shape[0 if variant == "bone" else -1] for tensor in tensors.values()}
    if len(ranks) > 1:
        rank_names = ", ".join(map(str, sorted(ranks)))
        raise UserError(f"{path} mixes .{kind} tensors of the ranks {rank_names}; {SHAPES_DIFFER}")
    adapter_tensors = {f"{module}.bone": tensor for module, tensor in tensors.items()}
    return adapter_tensors, AdapterMetadata(variant, rank=ranks.pop(), **common)


def _block_affine_variant(
    path: str | Path, tensors: Mapping[str, torch.Tensor], mode: str | None, base: Mapping[str, torch.Tensor] | None
) -> str:
    """The variant of 3-D .bone tensors, bat-in or bat-out, by the layers that are not square in base, or else by mode.
    Raises UserError if neither decides it, or the layers contradict each other."""
    if base is not None and not any(f"{module}.weight" in base for module in tensors):
        raise UserError(
            f"{path}: its tensors have no place in the base, as there is no {next(iter(tensors))}.weight; it was "
            "trained on a model of other names or of more layers"
        )
    votes = set()
    for module, tensor in tensors.items():
        weight = None if base is None else base.get(f"{module}.weight")
        if weight is None or weight.dim() != 2 or weight.shape[0] == weight.shape[1]:
            continue
        width = tensor.shape[0] * tensor.shape[1]
        if width not in weight.shape:
            raise UserError(
                f"{path}: {module}.bone has shape {tuple(tensor.shape)}, which covers {width} "
                f"channels, and the base's weight is {tuple(weight.shape)}: it belongs to another model"
            )
        votes.add("bat-out" if width == weight.shape[0] else "bat-in")
    if len(votes) > 1:
        raise UserError(f"{path}: some layers fit bat-in and others bat-out; it belongs to another model")
    if votes:
        return votes.pop()
    if mode in ("bat-in", "bat-out"):
        return mode
    cause = (
        "nothing in the file says which; give --base_model, whose layers' shapes may decide it, or"
        if base is None
        else "every layer in it is square, and the two change the model in different ways; give"
    )
    raise UserError(
        f"{path}: its 3-D .bone tensors may be bat-in or bat-out: {cause} --bone_mode bat-in (files of RWKV-PEFT "
        "since 2024-09-27) or --bone_mode bat-out (earlier ones)"
    )


def _read_lora(
    path: str | Path, modules: Modules, init: str | Path | None, alpha: float | None, common: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], AdapterMetadata]:
    shapes = {tuple(params["lora_A"].shape) for params in modules.values()}
    ranks = {shape[0] if len(shape) == 2 else 0 for shape in shapes}
    rank = ranks.pop()
    if ranks or not rank:
        shape_names = ", ".join(map(str, sorted(shapes)))
        raise UserError(
            f"{path}: its lora_A have the shapes {shape_names}, not (rank, in) with one rank; {SHAPES_DIFFER}"
        )
    adapter_tensors = {
        f"{module}.{name}": tensor for module, params in modules.items() for name, tensor in params.items()
    }
    if init is not None:
        initial = {key: tensor for key, tensor in unwrapped(read_tensors(init)).items() if adapter_parameter(key)}
        wanted = {f"{module}.init_{name}" for module in modules for name in ("lora_A", "lora_B")}
        if set(initial) != wanted:
            odd = sorted(set(initial) ^ wanted)
            raise UserError(
                f"{init} is not the init file of {path}: they differ in {len(odd)} tensors, such as {odd[0]}"
            )
        return adapter_tensors | initial, AdapterMetadata("pissa", rank=rank, **common)  # RWKV-PEFT's PiSSA has scale 1
    beside = [file for name in INITS if (file := Path(path).with_name(name.format(Path(path).name))).is_file()]
    if beside:
        raise UserError(
            f"{path} has {beside[0]} beside it, and so seems to be PiSSA: give that file as --lora_init (to train.py "
            f"with --peft pissa as pissa_init); or, if {path} is LoRA, move that file away"
        )
    if alpha is None:
        raise UserError(
            f"{path} is a LoRA file of RWKV-PEFT, which does not record alpha: give --lora_alpha as in its "
            f"training; or, if it is PiSSA, its init file as --lora_init {INITS[0]}"
        )
    return adapter_tensors, AdapterMetadata("lora", rank=rank, scale=alpha / rank, **common)


def write_rwkv_peft(
    path: str | Path, adapter: Adapter, parameter: str = "disha", base: Mapping[str, torch.Tensor] | None = None
) -> list[Path]:
    """Write an Adapter as RWKV-PEFT's flat .pth; return the paths written.

    parameter names Bone's tensors: "disha" (RWKV-PEFT since 2025-02) or "bone" (before). Method.upstream converts a
    method's tensors; some methods need base (a state dict). PiSSA writes a second file, `init_<name>`, which must not
    exist yet; its keys have the PREFIX that RWKV-PEFT's newest merger needs and that mergers from before 2025-02
    refuse. Raises UserError for a method that RWKV-PEFT does not have.
    """
    path, metadata = Path(path), adapter.metadata
    adapter_tensors: dict[str, torch.Tensor] = {}
    for module, params in adapter.modules().items():
        assert metadata.method is not None  # the readers refuse tensors of no method
        weight = None if base is None else base.get(f"{module}.weight")
        layer = UpstreamLayer(module, params, metadata.scale, weight)
        converted = upstream_form(metadata.method).tensors(layer)
        adapter_tensors |= {f"{module}.{name}": tensor for name, tensor in converted.items()}
    main: dict[str, torch.Tensor] = {}
    initial: dict[str, torch.Tensor] = {}
    for key, tensor in (adapter.tensors | adapter_tensors).items():
        module, name = adapter_parameter(key) or ("", "")
        if name == "bone":
            key = f"{module}.{parameter}"
        if name in INITIAL:
            initial[PREFIX + key] = tensor
        else:
            main[key] = tensor
    files = {path: main} | ({path.with_name(INITS[1].format(path.name)): initial} if initial else {})
    for file in list(files)[1:]:
        if file.exists():
            raise UserError(
                f"{file} exists, and PiSSA's initial factors would overwrite it; move it away, or choose another "
                f"name than {path.name}"
            )
    with ExitStack() as stack:  # both files get their names when both are written, the adapter's own last
        for file, tensors in files.items():
            save_pth(stack.enter_context(atomic_write(file)), tensors)
    return list(files)


def upstream_form(method: Method) -> Upstream:
    """The form of a method in RWKV-PEFT's files. Raises UserError if it has none."""
    if method.upstream is None:
        raise UserError(
            f"RWKV-PEFT has no {method.name}; its adapters are bone, bat-in (its bat), lora and pissa. Merge the "
            "adapter with merge_bone.py instead"
        )
    return method.upstream
