"""RWKV-7 against a plain float64 model (plain.py), against stored logits of another implementation, and by
laws."""

import pytest
import torch

from models.plain import assert_parts_and_packed, assert_plain, plain, random_tensors
from rwkv_peft.checkpoints.base import base_of, open_base
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models import family_named
from rwkv_peft.models.rwkv7.keys import SIGN

FAMILY = family_named("x070")


@pytest.mark.parametrize("first_value, grad_checkpoint", [(True, False), (False, True)])
def test_logits_and_all_gradients_are_the_plain_models(first_value, grad_checkpoint):
    tensors, config = random_tensors(FAMILY, first_value)
    assert_plain(FAMILY, tensors, config, lambda own, tokens: plain(own, config, tokens), grad_checkpoint)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_stored_logits_of_a_real_model(shared_data, dtype, bound):
    folder = shared_data / "rwkv7_tiny_834k"
    base = open_base(folder / "rwkv7-tiny-834k-fp32.pth")
    expected = torch.frombuffer(bytearray((folder / "expected-logits-7v0-834k.bin").read_bytes()), dtype=torch.float32)
    model = FAMILY.load({key: tensor.to(dtype) for key, tensor in base.tensors.items()}, base.config)
    tokens, state = torch.tensor([list(b'"in')]), None
    with torch.inference_mode():
        assert (model(tokens)[0][0, -1] - expected).abs().max() < bound
        for position in range(3):
            logits, state = model(tokens[:, position : position + 1], state)
        assert (logits[0, -1] - expected).abs().max() < bound


def test_a_sequence_in_parts_and_packed_is_the_whole():
    model = FAMILY.load(*random_tensors(FAMILY, dtype=torch.float32))
    tokens = torch.randint(40, (1, 50), generator=torch.Generator().manual_seed(1))
    assert_parts_and_packed(model, tokens, 17, rtol=1e-4, atol=1e-4)


def test_widths_come_from_the_file_and_not_from_a_formula():
    tensors, config = random_tensors(FAMILY, first_value=False)
    wide = dict(tensors)
    for i in range(3):
        wide[f"blocks.{i}.att.g1"], wide[f"blocks.{i}.att.g2"] = torch.ones(32, 7), torch.ones(7, 32)
    found = base_of({key: tensor.float() for key, tensor in wide.items()}).config
    assert (found.gate_rank, found.first_value, found.head_size, found.n_head) == (7, False, 8, 4)


@pytest.mark.parametrize("key, words", [("blocks.0.ffn.enn.weight", "an RWKV-8"), ("blocks.1.ffn.rosa.emb", "ROSA")])
def test_other_architectures_are_refused_by_name(key, words):
    tensors, _ = random_tensors(FAMILY)
    with pytest.raises(UserError, match=words):
        base_of(tensors | {key: torch.ones(1)}, "the file")


def test_an_unknown_addition_and_a_missing_value_residual_are_told():
    tensors, _ = random_tensors(FAMILY)
    with pytest.raises(UserError, match="1 unexpected tensors .blocks.0.att.other"):
        base_of(tensors | {"blocks.0.att.other": torch.ones(1)})
    with pytest.raises(UserError, match="1 missing tensors .blocks.1.att.v0"):
        base_of({key: tensor for key, tensor in tensors.items() if key != "blocks.1.att.v0"})
    assert SIGN in tensors
