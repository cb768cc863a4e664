"""Adapters that other tools wrote: RWKV-PEFT's flat .pth files, and folders of Hugging Face peft.

Both name block affine Bone "bat" and mean different things by it, and their files look alike, so that a
variant is concluded only from what is decisive: the key's name, the tool, or a layer that is not square.
"""

import json
from pathlib import Path

from .adapter_file import Adapter, AdapterMetadata, adapter_parameter
from .atomic import atomic_write
from .errors import UserError
from .names import from_hf
from .pth import read_state, require_file
from .pth_writer import save_pth

HF_PREFIX = "base_model.model."
WHOLE_MODEL = ("emb.weight", "head.weight", "blocks.0.att.receptance.weight", "blocks.0.ffn.value.weight")


def read_rwkv_peft(path, mode=None, base=None, init=None, alpha=None):
    """The Adapter in a flat .pth of RWKV-PEFT: .bone, .disha, LoRA, PiSSA, time states, whole tensors.

    mode names the variant of 3-D .bone tensors where neither the file nor base (a state dict, for its shapes)
    tells it; init is the path of PiSSA's init file; alpha is LoRA's, which RWKV-PEFT does not save.
    Raises UserError as read_state does, and for a file that is a whole model or mixes kinds of adapter.
    """
    state = read_state(path)
    adapter = Adapter(state, AdapterMetadata("none", source="RWKV-PEFT"))
    modules = adapter.modules()
    if not modules and all(key in state for key in WHOLE_MODEL):
        raise UserError(f"{path} is a whole model, not an adapter; give it as --base_model")
    kinds = {tuple(sorted(params)) for params in modules.values()}
    if len(kinds) > 1:
        raise UserError(f"{path} mixes adapters with the tensors {' and '.join(map(str, sorted(kinds)))}; "
                        "they cannot be from one training")
    kind = kinds.pop() if kinds else ()
    if kind not in ((), ("bone",), ("disha",), ("lora_A", "lora_B")):
        raise UserError(f"{path} holds adapter tensors {kind}, which RWKV-PEFT does not write; known are .bone, "
                        ".disha, and .lora_A with .lora_B")
    if init is not None and kind != ("lora_A", "lora_B"):
        raise UserError(f"--lora_init is for PiSSA, and {path} holds no lora_A and lora_B")
    whole = adapter.whole()
    common = {"targets": _targets(modules), "train_parts": tuple(whole), "source": "RWKV-PEFT"}
    if kind == ():
        return Adapter(state, AdapterMetadata("none", **common))
    if "lora_A" in kind:
        own, metadata = _read_lora(path, modules, init, alpha, common)
    else:
        own, metadata = _read_bone(path, modules, kind[0], mode, base, common)
    return Adapter(own | whole, metadata)


def _read_bone(path, modules, kind, mode, base, common):
    dims = {params[kind].dim() for params in modules.values()}
    if len(dims) != 1 or not dims <= {2, 3}:
        raise UserError(f"{path} mixes .{kind} tensors of {sorted(dims)} dimensions; 2 or 3 are due throughout")
    tensors = {module: params[kind] for module, params in modules.items()}
    if dims == {2}:
        tall = {tensor.shape[0] > tensor.shape[1] for tensor in tensors.values()}
        square = [module for module, tensor in tensors.items() if tensor.shape[0] == tensor.shape[1]]
        if kind == "bone" and tall == {True}:  # the oldest files: (out, rank), the blocks of bat-out stacked
            tensors = {module: tensor.unflatten(0, (-1, tensor.shape[1])) for module, tensor in tensors.items()}
            variant, rank = "bat-out", next(iter(tensors.values())).shape[-1]
        elif tall == {False} and not square:
            variant, rank = "bone", next(iter(tensors.values())).shape[0]
        else:
            raise UserError(f"{path}: its 2-D .{kind} tensors are neither all (rank, out) nor all (out, rank)")
    else:
        rank = next(iter(tensors.values())).shape[-1]
        variant = "bat-in" if kind == "disha" else _block_affine_variant(path, tensors, mode, base)
    own = {f"{module}.bone": tensor for module, tensor in tensors.items()}
    return own, AdapterMetadata(variant, rank=rank, **common)


def _block_affine_variant(path, tensors, mode, base):
    """bat-in or bat-out for 3-D .bone tensors, by the layers whose input and output differ in width."""
    votes = set()
    for module, tensor in tensors.items():
        weight = None if base is None else base.get(f"{module}.weight")
        if weight is None or weight.shape[0] == weight.shape[1]:
            continue
        width = tensor.shape[0] * tensor.shape[1]
        if width not in weight.shape:
            raise UserError(f"{path}: {module}.bone has shape {tuple(tensor.shape)}, which covers {width} "
                            f"channels, and the base's weight is {tuple(weight.shape)}: it belongs to another model")
        votes.add("bat-out" if width == weight.shape[0] else "bat-in")
    if len(votes) > 1:
        raise UserError(f"{path}: some layers fit bat-in and others bat-out; it belongs to another model")
    if votes:
        return votes.pop()
    if mode in ("bat-in", "bat-out"):
        return mode
    raise UserError(
        f"{path}: its 3-D .bone tensors fit bat-in and bat-out alike, because every layer in it is square, and the "
        "two change the model in different ways; give --bone_mode bat-in (files of RWKV-PEFT since 2024-09-27) or "
        "--bone_mode bat-out (earlier ones)"
    )


def _read_lora(path, modules, init, alpha, common):
    rank = next(iter(modules.values()))["lora_A"].shape[0]
    own = {f"{module}.{name}": tensor for module, params in modules.items() for name, tensor in params.items()}
    if init is not None:
        initial = {key: tensor for key, tensor in read_state(init).items() if adapter_parameter(key)}
        wanted = {f"{module}.init_{name}" for module in modules for name in ("lora_A", "lora_B")}
        if set(initial) != wanted:
            odd = sorted(set(initial) ^ wanted)
            raise UserError(f"{init} is not the init file of {path}: they differ in {len(odd)} tensors, "
                            f"such as {odd[0]}")
        return own | initial, AdapterMetadata("pissa", rank=rank, **common)  # RWKV-PEFT's PiSSA has scale 1
    if alpha is None:
        raise UserError(f"{path} is a LoRA file of RWKV-PEFT, which does not record alpha: give --lora_alpha as in its "
                        "training; or, if it is PiSSA, its init file as --lora_init init_pissa.pth")
    return own, AdapterMetadata("lora", rank=rank, scale=alpha / rank, **common)


def read_hf_folder(folder):
    """The Adapter in a folder saved by Hugging Face peft: BONE, MISS or plain LORA over layers of an RWKV model.

    Module names may be official ones or those of the Hugging Face RWKV-6 model. Raises UserError: files
    missing, another kind of adapter, settings that merging cannot honour.
    """
    folder = Path(folder)
    path = require_file(folder / "adapter_config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; copy it again") from error
    tensors = {}
    for key, tensor in _read_hf_tensors(folder).items():
        if not key.startswith(HF_PREFIX):
            raise UserError(f"{folder}: key {key} does not start with {HF_PREFIX!r} as peft's keys do")
        module = key.removeprefix(HF_PREFIX)
        split = adapter_parameter(module)
        tensors[f"{from_hf(split[0] + '.')}{split[1]}" if split else from_hf(module)] = tensor
    modules = Adapter(tensors, None).modules()
    whole = {key: tensor for key, tensor in tensors.items() if not adapter_parameter(key)}
    common = {"targets": _targets(modules), "train_parts": tuple(whole),
              "source": f"peft {config.get('peft_version', '')}"}
    kind = str(config.get("peft_type", "")).upper()
    if kind == "LORA":
        _check_plain_lora(folder, config)
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
        return Adapter(tensors, AdapterMetadata("lora", rank=config["r"], scale=scale, **common))
    if kind not in ("BONE", "MISS"):
        raise UserError(f"{folder} holds a {kind or 'nameless'} adapter of peft; BONE, MISS and plain LORA can be "
                        "merged")
    parameter = f"{kind.lower()}_block"
    own = {}
    for module, params in modules.items():
        if set(params) != {parameter}:
            raise UserError(f"{folder}: {module} holds {sorted(params)}, and a {kind} adapter has {parameter} alone")
        own[f"{module}.bone"] = params[parameter]
    dims = {tensor.dim() for tensor in own.values()}
    if len(dims) != 1 or not dims <= {2, 3}:
        raise UserError(f"{folder}: its {parameter} tensors have {sorted(dims)} dimensions; 2 or 3 are due throughout")
    mini = config.get("init_weights") == "mini"
    variant = "bat-out" if dims == {3} else "bone-mini" if mini else "bone"
    metadata = AdapterMetadata(variant, rank=config["r"], mini_rank=config.get("mini_r", 0) if mini else 0, **common)
    return Adapter(own | whole, metadata)


def _read_hf_tensors(folder):
    if (folder / "adapter_model.safetensors").is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(folder / "adapter_model.safetensors")
        except SafetensorError as error:
            raise UserError(f"{folder / 'adapter_model.safetensors'} is damaged: {error}") from error
    if (folder / "adapter_model.bin").is_file():
        return read_state(folder / "adapter_model.bin")
    raise UserError(f"{folder} has no adapter_model.safetensors (nor adapter_model.bin); is it a folder that peft "
                    "saved?")


def _check_plain_lora(folder, config):
    """Refuse LoRA settings under which W + scale B A over the original base is not what was trained."""
    odd = [name for name in ("use_dora", "rank_pattern", "alpha_pattern", "layer_replication", "fan_in_fan_out")
           if config.get(name)]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        odd.append(f"init_lora_weights={config['init_lora_weights']!r}, which changes the base")
    if odd:
        raise UserError(f"{folder}: this LoRA uses {', '.join(odd)}; only plain LoRA can be merged from peft's files: "
                        "convert it with peft first (path_initial_model_for_weight_conversion)")


def write_rwkv_peft(path, adapter, parameter="disha"):
    """Write an Adapter as RWKV-PEFT's flat .pth; returns the paths written.

    parameter names Bone's tensors: "disha" (RWKV-PEFT since 2025-02) or "bone" (before).
    PiSSA writes a second file, `init_<name>`. Raises UserError for a variant that RWKV-PEFT does not have.
    """
    path = Path(path)
    variant = adapter.metadata.variant
    if variant not in ("bone", "bat-in", "lora", "pissa", "none"):
        raise UserError(f"RWKV-PEFT has no {variant}; its adapters are bone, bat-in (its bat), lora and pissa. Merge "
                        "the adapter with merge_bone.py instead")
    if variant == "pissa" and adapter.metadata.scale != 1:
        raise UserError(f"RWKV-PEFT's PiSSA has scale 1, and this adapter {adapter.metadata.scale}; merge it instead")
    main, initial = {}, {}
    for key, tensor in adapter.tensors.items():
        split = adapter_parameter(key)
        if split and split[1] == "bone":
            key = f"{split[0]}.{parameter}"
        (initial if split and split[1].startswith("init_") else main)[key] = tensor
    files = {path: main} | ({path.with_name(f"init_{path.name}"): initial} if initial else {})
    for file, tensors in files.items():
        with atomic_write(file) as temporary:
            save_pth(temporary, tensors)
    return list(files)


def _targets(modules):
    """("blocks.0.att.key", …) -> ("att.key", …), each once, in order."""
    return tuple(dict.fromkeys(".".join(module.split(".")[-2:]) for module in modules))
