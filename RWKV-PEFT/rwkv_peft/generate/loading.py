"""What generation starts from: a model with its adapters folded in, and the states that files hold.

A state file is a .pth with blocks.N.att.time_state (H, N value, N key) of every layer, as state tuning makes them. A
saved session holds besides them blocks.N.att.shift and blocks.N.ffn.shift (C), the last inputs of the two mixes.
"""

import torch
from torch import nn

from ..checkpoint import load_base, model_config_from_state, read_adapter, save_model
from ..errors import UserError
from ..merge import check_fingerprints, merge_state_dict
from ..model import RWKV6, LayerState, State
from ..pth import read_state

DTYPES = (("fp32", torch.float32), ("bf16", torch.bfloat16))


def load_model(path, adapters=(), precision="fp32", device="cpu", mode=None, init=None, alpha=None, any_base=False):
    """The .pth at path, with adapters (paths) merged into it in memory -> RWKV6 ready to generate, and the State of one
    sequence that it starts from, or None where neither file holds time states.

    Folding an adapter in gives bit by bit the weights that merge_bone.py would write, so that the tokens are those of
    the merged file and no step pays for the adapter. mode, init and alpha as in read_adapter; any_base allows an
    adapter of another base of the same shape. Raises UserError as load_base, read_adapter and merging do.
    """
    tensors = load_base(path)
    if adapters:
        named = [(name, read_adapter(name, mode, tensors, init, alpha)) for name in adapters]
        if not any_base:
            check_fingerprints(path, tensors, named)
        tensors = merge_state_dict(tensors, named)
    config = model_config_from_state(tensors)
    with torch.device("meta"):
        model = RWKV6(config)
    states = {key: tensors.pop(key) for key in list(tensors) if key.endswith(".time_state")}
    model.load_state_dict(tensors, strict=True, assign=True)
    model = model.to(device=device, dtype=dict(DTYPES)[precision]).requires_grad_(False).eval()
    if device == "cpu" and precision == "fp32":
        store_by_columns(model)
    return model, state_of(states, model, path) if states else None


def store_by_columns(model):
    """Keep the linear layers' weights (out, in) column by column in memory; values and shapes stay.

    One token's product is then a sum of scaled columns, which reads memory faster than many dot products do: a tenth
    more tokens a second on a CPU, where reading the weights is nearly all of the time.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


def read_state_file(path, model):
    """The State of one sequence in a state file or saved session. Raises UserError where it does not fit the model."""
    return state_of(read_state(path), model, path)


def save_state_file(path, state):
    """Write the State of one sequence as a saved session, in float32. Raises UserError where the disk refuses."""
    tensors = {}
    for i, layer in enumerate(state):
        rows = LayerState(layer.att_shift[0], layer.wkv[0].mT, layer.ffn_shift[0])
        tensors |= {key: row.float().cpu().contiguous() for key, row in zip(layer_keys(i), rows)}
    save_model(path, tensors)


def layer_keys(i):
    """The keys of layer i's LayerState in a file."""
    return LayerState(f"blocks.{i}.att.shift", f"blocks.{i}.att.time_state", f"blocks.{i}.ffn.shift")


def state_of(tensors, model, name):
    """State of one sequence from the tensors of a file; each of them must have its place and shape.

    A file without shifts starts as from no token before. Raises UserError for anything else than one of the two kinds.
    """
    zeros = State.zeros(model.config, 1, model.emb.weight.device, model.emb.weight.dtype)
    due = {key: tensor[0] for i, layer in enumerate(zeros) for key, tensor in zip(layer_keys(i), layer)}
    session = any(key.endswith(".shift") for key in tensors)
    unexpected = [key for key in tensors if key not in due]
    missing = [key for key in due if key not in tensors and (session or key.endswith(".time_state"))]
    if unexpected or missing:
        odd = f"there is no place for its {unexpected[0]}" if unexpected else f"it has no {missing[0]}"
        raise UserError(
            f"{name} is no state of this model of {len(zeros)} layers: {odd}; give a .pth of time states "
            "made for this model, or one that --save_state wrote"
        )
    for key, tensor in tensors.items():
        if tensor.shape != due[key].shape:
            raise UserError(
                f"{name}: {key} has shape {tuple(tensor.shape)}, and this model's is {tuple(due[key].shape)}; "
                "the state was made for another model"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name}: {key} holds NaN or Inf; make the state anew")
    due |= {key: (tensor.mT if key.endswith(".time_state") else tensor).to(due[key]) for key, tensor in tensors.items()}
    return State(LayerState(*(due[key][None].contiguous() for key in layer_keys(i))) for i in range(len(zeros)))
