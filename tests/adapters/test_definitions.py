"""The change of each method is its definition: formulas in float64, block by block, beside the code that merges."""

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
    """W'_ab = W_ab + W_ab B_b + B_b."""
    return by_blocks(W, lambda block, a, b: block + block @ p["bone"][b] + p["bone"][b])


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


DEFINITIONS = {  # of the methods that files name
    **dict.fromkeys(("bone", "bone-mini", "bone-signed"), bone),
    "bat-in": bat_in,
    "bat-out": bat_out,
    "lora": lora,
    "dora": dora,
    **dict.fromkeys(("pissa", "olora", "lora-ga"), residual),
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
