"""The definition of each method: W' for a few rows of the weight, in float64.

`check` compares merged files with these. They share no code with adapters/, which trains and merges, so that a mistake
there shows.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch

Params = Mapping[str, torch.Tensor]
# (rows of the weight (n, in), their numbers (n,), {name: tensor} of the whole adapter, its scale) -> W' (n, in)
Definition = Callable[[torch.Tensor, torch.Tensor, Params, float], torch.Tensor]


def bone(weight: torch.Tensor, rows: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
    """W'[o, i] = W[o, i] + s_i D[i mod rank, o mod width]; s is 1 but in bone-signed, width out but in bone-mini."""
    rank, width = params["bone"].shape
    columns = torch.arange(weight.shape[1]) % rank
    return weight + params["bone"][:, rows % width].t()[:, columns] * params.get("bone_signs", 1.0)


def bat_in(weight: torch.Tensor, rows: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
    """W'_ab = W_ab + c W_ab B_b + B_b; c is 1 except in bat-in-scaled."""
    matrices = params["bone"]  # (in/r, r, r)
    rank = matrices.shape[-1]
    blocks = weight.unflatten(1, (-1, rank))  # (n, in/r, r)
    product = params.get("bone_scale", 1.0) * torch.einsum("nbj,bji->nbi", blocks, matrices)
    return weight + (product + matrices[:, rows % rank].transpose(0, 1)).flatten(1)


def bat_out(weight: torch.Tensor, rows: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
    """W'_ab = W_ab + W_ab B_a + B_a."""
    rank = params["bone"].shape[-1]
    own = params["bone"][rows // rank]  # (n, r, r)
    product = torch.einsum("nbj,nji->nbi", weight.unflatten(1, (-1, rank)), own)
    return weight + (product + own[torch.arange(len(rows)), rows % rank][:, None]).flatten(1)


def lora(weight: torch.Tensor, rows: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
    """W' = W + scale B A."""
    return weight + scale * (params["lora_B"][rows] @ params["lora_A"])


def dora(weight: torch.Tensor, rows: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
    """W'_o = (1 + gain_o) norm_o (W + U)_o / |(W + U)_o| with U = scale B A and norm_o = |W_o| (kept in the file)."""
    turned = lora(weight, rows, params, scale)
    update, norm = turned - weight, params["lora_row_norm"][rows]
    squared = norm.square() + (2 * weight * update + update.square()).sum(1)
    length = squared.clamp_min(torch.finfo(torch.float32).tiny).sqrt()  # a row of zeros must not divide by 0
    return ((1 + params["lora_gain"][rows]) * norm / length)[:, None] * turned


def drawn(seed: torch.Tensor, stream: int, rows: int, columns: int) -> torch.Tensor:
    """Numbers in [0, 1) of NumPy's legacy generator, seeded by (seed, stream): float64 (rows, columns)."""
    return torch.from_numpy(np.random.RandomState([int(seed), stream]).random_sample((rows, columns)))


def vera(weight: torch.Tensor, rows: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
    """W' = W + 6 / sqrt(in rank) diag(b) B diag(d) A, with A and B uniform in [-1, 1), rounded to bfloat16."""
    b, d, seed, width = params["vera_b"], params["vera_d"], params["vera_seed"], weight.shape[1]
    B, A = ((2 * drawn(seed, n, size, len(d)) - 1).bfloat16().double() for n, size in enumerate((len(b), width)))
    return weight + 6 / math.sqrt(width * len(d)) * b[rows, None] * ((B[rows] * d) @ A.t())


def shira(weight: torch.Tensor, rows: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
    """W'[o, c] = W[o, c] + v[o, j], where c is drawn in [j in / n, (j + 1) in / n), rounded down, for j = 0 … n - 1."""
    values, width = params["shira_values"], weight.shape[1]
    count = values.shape[1]
    ends = torch.tensor([j * width // count for j in range(count + 1)])
    columns = ends[:-1] + (drawn(params["shira_seed"], 0, len(values), count) * (ends[1:] - ends[:-1])).long()
    changed = weight.clone()
    for j in range(count):
        changed[torch.arange(len(rows)), columns[rows, j]] += values[rows, j]
    return changed


def less_first_factors(weight: torch.Tensor, rows: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
    """W - scale B0 A0, the weight that PiSSA, OLoRA and LoRA-GA train on."""
    first = {name: params[f"init_{name}"] for name in ("lora_A", "lora_B")}
    return lora(weight, rows, first, -scale)


# variant in files' metadata -> its definition; for pissa, olora and lora-ga W is what less_first_factors returns
DEFINITIONS: Mapping[str, Definition] = MappingProxyType(
    {
        "bone": bone,
        "bone-mini": bone,
        "bone-signed": bone,
        "bat-in": bat_in,
        "bat-in-scaled": bat_in,
        "bat-out": bat_out,
        "lora": lora,
        "dora": dora,
        "pissa": lora,
        "olora": lora,
        "lora-ga": lora,
        "vera": vera,
        "shira": shira,
    }
)
