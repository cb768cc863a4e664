"""RWKV-7 against a plain float64 model (plain.py), against stored logits of another implementation, and by
laws."""

import pytest
import torch
import torch.nn.functional as F

from models.plain import plain, random_tensors
from rwkv_peft.errors import UserError
from rwkv_peft.files.base import base_of, open_base
from rwkv_peft.models import family_named
from rwkv_peft.models.rwkv7.keys import SIGN

FAMILY = family_named("x070")


@pytest.mark.parametrize("first_value", [True, False])
def test_logits_and_all_gradients_are_the_plain_models(first_value):
    tensors, config = random_tensors(FAMILY, first_value)
    tokens, targets = torch.arange(1, 12), torch.arange(2, 13)
    model = FAMILY.load(tensors, config)
    F.cross_entropy(model(tokens[None])[0][0], targets).backward()
    own = {key: tensor.clone().requires_grad_() for key, tensor in tensors.items()}
    logits = plain(own, config, tokens)
    F.cross_entropy(logits, targets).backward()
    torch.testing.assert_close(model(tokens[None])[0][0], logits, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name in {f"blocks.0.att.v{n}" for n in "012"}  # which nothing uses
        else:
            torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-7, atol=1e-9)


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
    tensors, config = random_tensors(FAMILY, dtype=torch.float32)
    model = FAMILY.load(tensors, config)
    tokens = torch.randint(40, (1, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole, end = model(tokens)
        first, state = model(tokens[:, :17])
        rest, last = model(tokens[:, 17:], state)
        torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last[2].wkv, end[2].wkv, rtol=1e-4, atol=1e-4)
        packed, _ = model(torch.cat([tokens[:, :20], tokens], 1), cu_seqlens=torch.tensor([0, 20, 70]))
        torch.testing.assert_close(packed[:, 20:], whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(packed[:, :20], model(tokens[:, :20])[0], rtol=1e-4, atol=1e-4)


def test_recomputing_blocks_gives_the_same_gradients():
    tensors, config = random_tensors(FAMILY, dtype=torch.float32)
    gradients = []
    for grad_checkpoint in (False, True):
        model = FAMILY.load({key: tensor.clone() for key, tensor in tensors.items()}, config, grad_checkpoint)
        model(torch.arange(20)[None])[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


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
