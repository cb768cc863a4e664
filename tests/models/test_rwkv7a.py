"""RWKV-7 with deep embeddings against a plain float64 model, and by laws."""

import pytest
import torch
import torch.nn.functional as F

from models.plain import plain, random_tensors
from rwkv_peft.errors import UserError
from rwkv_peft.files.base import base_of
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


def test_logits_and_all_gradients_are_the_plain_models():
    tensors, config = random_tensors(FAMILY, **SIZES)
    tokens, targets = torch.arange(1, 12), torch.arange(2, 13)
    model = FAMILY.load(tensors, config)
    logits = model(tokens[None])[0][0]
    F.cross_entropy(logits, targets).backward()
    own = {key: tensor.clone().requires_grad_() for key, tensor in tensors.items()}
    expected = plain(own, config, tokens, gate_of(own, tokens))
    F.cross_entropy(expected, targets).backward()
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits, plain(tensors, config, tokens))
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name in {f"blocks.0.att.v{n}" for n in "012"}  # which nothing uses
        else:
            torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-7, atol=1e-9)


def test_a_sequence_in_parts_and_packed_is_the_whole():
    tensors, config = random_tensors(FAMILY, **SIZES)
    model = FAMILY.load(tensors, config)
    tokens = torch.randint(20, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole, end = model(tokens)
        first, state = model(tokens[:, :17])
        rest, last = model(tokens[:, 17:], state)
        torch.testing.assert_close(torch.cat([first, rest], 1), whole)
        torch.testing.assert_close(tuple(last[1]), tuple(end[1]))
        packed, _ = model(torch.cat([tokens[:, :20], tokens], 1), cu_seqlens=torch.tensor([0, 20, 50]))
        torch.testing.assert_close(packed[:, 20:], whole)
        torch.testing.assert_close(packed[:, :20], whole[:, :20])


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


def test_recomputing_blocks_gives_the_same_gradients():
    tensors, config = random_tensors(FAMILY, **SIZES)
    gradients = []
    for grad_checkpoint in (False, True):
        model = FAMILY.load({key: tensor.clone() for key, tensor in tensors.items()}, config, grad_checkpoint)
        model(torch.arange(20)[None])[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_new_model_is_an_rwkv7_until_it_trains():
    torch.manual_seed(0)
    model = FAMILY.build(FAMILY.new_dimensions(**SIZES))
    FAMILY.init_weights(model)
    plain7 = family_named("x070")
    state = model.state_dict()
    tensors = {key: state[key] for key in plain7.shapes(plain7.new_dimensions(**SIZES))}
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(model(tokens)[0], plain7.load(tensors, plain7.config_of(tensors))(tokens)[0])


def test_what_a_file_is_comes_from_its_tensors():
    tensors, config = random_tensors(FAMILY, dtype=torch.float32, **SIZES)
    base = base_of(tensors, "the file")
    assert (base.family.name, base.config, config.deep_size) == ("RWKV-7a", config, 32)
    with pytest.raises(UserError, match=r"1 missing tensors \(blocks.1.ffn.s2\)"):
        base_of({key: tensor for key, tensor in tensors.items() if key != "blocks.1.ffn.s2"})


@pytest.mark.parametrize(
    "key, part, rate",
    [
        ("blocks.1.ffn.s0", "time", (1.0, False)),
        ("blocks.1.ffn.s_emb.weight", "emb", (1.0, True)),
        ("blocks.1.ffn.s_emb_x.weight", "emb", (1.0, True)),
        ("blocks.1.att.w0", "time", (2.0, False)),
        ("emb.weight", "emb", (1.0, True)),
        ("blocks.1.ffn.key.weight", None, (1.0, True)),
    ],
)
def test_parts_and_rates_of_parameters(key, part, rate):
    assert (FAMILY.part_of(key), FAMILY.learning_rate(key)) == (part, rate)
