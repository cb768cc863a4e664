"""RWKV-7 with deep embeddings against a plain float64 model, and by laws."""

import pytest
import torch
import torch.nn.functional as F

from models.plain import assert_parts_and_packed, assert_plain, plain, random_tensors
from rwkv_peft.checkpoints.base import base_of
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models import family_named

FAMILY = family_named("x070a")
SIZES = {"n_layer": 2, "n_embd": 16, "vocab_size": 20, "head_size": 8, "dim_ffn": 24}


def gate_of(tensors, tokens):
    """The gate as RWKV-LM's demo has it: the tables summed once for the whole vocabulary, then token by token."""
    norm = (tensors["emb.weight"].shape[1:], tensors["blocks.0.ln0.weight"], tensors["blocks.0.ln0.bias"])
    emb = F.layer_norm(tensors["emb.weight"], *norm)

    def gate(layer, x):
        s0, s1, s2, table, more = (
            tensors[f"blocks.{layer}.ffn.{name}"] for name in ("s0", "s1", "s2", "s_emb.weight", "s_emb_x.weight")
        )
        table = table + emb @ more.T
        rows = [x[t] @ s1 @ table[token].reshape(32, 32) for t, token in enumerate(tokens.tolist())]
        return torch.stack(rows) @ s2 + s0.flatten()

    return gate


@pytest.mark.parametrize("grad_checkpoint", (False, True))
def test_logits_and_all_gradients_are_the_plain_models(grad_checkpoint):
    tensors, config = random_tensors(FAMILY, **SIZES)
    expected = lambda own, tokens: plain(own, config, tokens, gate_of(own, tokens))  # noqa: E731
    assert_plain(FAMILY, tensors, config, expected, grad_checkpoint)
    tokens = torch.arange(9)
    assert not torch.allclose(expected(tensors, tokens), plain(tensors, config, tokens))


def test_a_sequence_in_parts_and_packed_is_the_whole():
    tokens = torch.randint(20, (1, 30), generator=torch.Generator().manual_seed(1))
    assert_parts_and_packed(FAMILY.load(*random_tensors(FAMILY, **SIZES)), tokens, 17)


def test_a_settled_table_stays_as_the_file_has_it_and_gives_the_same():
    tensors, config = random_tensors(FAMILY, dtype=torch.bfloat16, **SIZES)
    models = [FAMILY.load(tensors, config).requires_grad_(False) for _ in range(2)]
    models[0].settle()
    whole, settled = (model.float() for model in reversed(models))
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(settled(tokens)[0], whole(tokens)[0])
    names = [f"blocks.{i}.ffn.s_emb.weight" for i in (0, 1)]
    state, trained = settled.state_dict(), dict(settled.named_parameters())
    assert state.keys() == tensors.keys() and not any(name in trained for name in names)
    assert all(state[name].data_ptr() == tensors[name].data_ptr() for name in names)
    again = FAMILY.load(state, config)  # it trains in another model
    again.settle()
    assert all(name in dict(again.named_parameters()) for name in names)


def test_what_a_file_is_comes_from_its_tensors():
    tensors, config = random_tensors(FAMILY, dtype=torch.float32, **SIZES)
    base = base_of(tensors, "the file")
    assert (base.family.name, base.config, config.deep_size) == ("RWKV-7a", config, 32)
    with pytest.raises(UserError, match=r"1 missing tensors \(blocks.1.ffn.s2\)"):
        base_of({key: tensor for key, tensor in tensors.items() if key != "blocks.1.ffn.s2"})
