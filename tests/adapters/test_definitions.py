"""The change of each method is its definition: formulas in float64, block by block, beside the code that merges."""

import math

import numpy as np
import pytest
import torch

from release.merges import VARIANTS, params_of
from rwkv_peft.adapters.methods import METHODS

OUT, IN, RANK, SCALE = 48, 64, 8, 0.75


def bone(W, p):
    """W'[o, i] = W[o, i] + s_i D[i mod rank, o mod width]; s is 1 but in bone-signed, width out but in bone-mini."""
    rank, width = p["bone"].shape
    change = torch.stack([p["bone"][torch.arange(IN) % rank, o % width] for o in range(OUT)])
    return W + change * p.get("bone_signs", 1.0)


def bat_in(W, p):
    """W'_ab = W_ab + c W_ab B_b + B_b; c is 1 except in bat-in-scaled."""
    c = p.get("bone_scale", torch.ones(1))
    return by_blocks(W, lambda block, a, b: block + c * block @ p["bone"][b] + p["bone"][b])


def bat_out(W, p):
    """W'_ab = W_ab + W_ab B_a + B_a."""
    return by_blocks(W, lambda block, a, b: block + block @ p["bone"][a] + p["bone"][a])


def by_blocks(W, change):
    """W with each block (RANK, RANK) in place of change(block, its row of blocks, its column of blocks)."""
    rows = [
        torch.cat([change(block, a, b) for b, block in enumerate(row.split(RANK, 1))], 1)
        for a, row in enumerate(W.split(RANK))
    ]
    return torch.cat(rows)


def lora(W, p):
    """W' = W + scale B A."""
    return W + SCALE * p["lora_B"] @ p["lora_A"]


def residual(W, p):
    """W' = W + scale (B A - B0 A0): PiSSA, OLoRA and LoRA-GA train on W - scale B0 A0."""
    return lora(W - SCALE * p["init_lora_B"] @ p["init_lora_A"], p)


def dora(W, p):
    """W'_o = (1 + gain_o) norm_o (W + U)_o / |(W + U)_o| with U = scale B A and norm_o = |W_o| (kept in the file)."""
    turned = lora(W, p)
    return ((1 + p["lora_gain"]) * p["lora_row_norm"] / turned.norm(dim=1))[:, None] * turned


def drawn(seed, stream, rows, columns):
    """Numbers in [0, 1) of NumPy's legacy generator, seeded by (seed, stream): float64 (rows, columns)."""
    return torch.from_numpy(np.random.RandomState([int(seed), stream]).random_sample((rows, columns)))


def vera(W, p):
    """W' = W + 6 / sqrt(in rank) diag(b) B diag(d) A, with A and B uniform in [-1, 1), rounded to bfloat16."""
    b, d = p["vera_b"], p["vera_d"]
    B, A = ((2 * drawn(p["vera_seed"], n, size, len(d)) - 1).bfloat16().double() for n, size in enumerate((OUT, IN)))
    return W + 6 / math.sqrt(IN * len(d)) * b.diag() @ B @ d.diag() @ A.t()


def shira(W, p):
    """W'[o, c] = W[o, c] + v[o, j], where c is drawn in [j in / n, (j + 1) in / n), rounded down, for j = 0 … n - 1."""
    count, changed = p["shira_values"].shape[1], W.clone()
    numbers = drawn(p["shira_seed"], 0, OUT, count)
    for j in range(count):
        start, stop = j * IN // count, (j + 1) * IN // count
        for o in range(OUT):
            changed[o, start + int(numbers[o, j] * (stop - start))] += p["shira_values"][o, j]
    return changed


DEFINITIONS = {  # of the methods that files name
    **dict.fromkeys(("bone", "bone-mini", "bone-signed"), bone),
    **dict.fromkeys(("bat-in", "bat-in-scaled"), bat_in),
    "bat-out": bat_out,
    "lora": lora,
    "dora": dora,
    **dict.fromkeys(("pissa", "olora", "lora-ga"), residual),
    "vera": vera,
    "shira": shira,
}


def test_every_method_that_files_name_is_defined():
    assert set(DEFINITIONS) == set(VARIANTS)


@pytest.mark.parametrize("variant", DEFINITIONS)
def test_a_change_is_the_methods_definition(variant):
    weight, change = torch.randn(OUT, IN, dtype=torch.float64), METHODS[variant].change
    params = params_of(variant, weight, RANK, std=0.3)
    expected = DEFINITIONS[variant](weight, {name: tensor.double() for name, tensor in params.items()})
    assert (expected - weight).abs().max() > 0.01
    torch.testing.assert_close(weight + change.delta(weight, params, SCALE), expected, rtol=1e-6, atol=1e-6)
    unit = change.row_unit(params)  # and so it is from some of the rows
    part = weight[2 * unit : 4 * unit]
    found = part + change.delta(part, change.rows(params, 2 * unit, 4 * unit), SCALE)
    torch.testing.assert_close(found, expected[2 * unit : 4 * unit], rtol=1e-6, atol=1e-6)
