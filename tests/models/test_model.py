"""RWKV6 against a plain float64 token-by-token formulation, and against a pretrained model's reference logits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from families import shake
from rwkv_peft.checkpoints.base import base_of, open_base
from rwkv_peft.models.rwkv6.keys import RWKV6Config
from rwkv_peft.models.rwkv6.model import RWKV6, init_weights
from rwkv_peft.models.state import State
from rwkv_peft.ops.mix import token_shift

CONFIG = RWKV6Config(
    n_layer=3, n_embd=32, vocab_size=50, dim_att=48, dim_ffn=112, head_size=8, maa_rank=4, decay_rank=6
)


def random_model(config=CONFIG, seed=0, dtype=torch.float64):
    """A model whose every parameter matters: initialized, then shaken, so that nothing is zero."""
    torch.manual_seed(seed)
    model = RWKV6(config)
    init_weights(model)
    return shake(model).to(dtype)


def layer_norm(x, weight, bias, eps=1e-5):
    return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + eps) * weight + bias


def plain_logits(state, config, tokens):
    """The paper's equations, one token at a time, in float64, from the raw state dict (L, C: plain vectors); it shares
    nothing with the package."""
    p = {key: value.double() for key, value in state.items()}
    H, N = config.n_head, config.head_size
    att_last = [torch.zeros(config.n_embd, dtype=torch.float64) for _ in range(config.n_layer)]
    ffn_last = [torch.zeros(config.n_embd, dtype=torch.float64) for _ in range(config.n_layer)]
    S = [[torch.zeros(N, N, dtype=torch.float64) for _ in range(H)] for _ in range(config.n_layer)]
    logits = []
    for token in tokens:
        x = layer_norm(p["emb.weight"][token], p["blocks.0.ln0.weight"], p["blocks.0.ln0.bias"])
        for i in range(config.n_layer):
            b, a, f = f"blocks.{i}.", f"blocks.{i}.att.", f"blocks.{i}.ffn."
            h = layer_norm(x, p[b + "ln1.weight"], p[b + "ln1.bias"])
            d = att_last[i] - h
            low = torch.tanh((h + d * p[a + "time_maa_x"].flatten()) @ p[a + "time_maa_w1"]).view(5, -1)
            mixed = {
                name: h + d * (p[a + f"time_maa_{name}"].flatten() + low[j] @ p[a + "time_maa_w2"][j])
                for j, name in enumerate("wkvrg")
            }
            att_last[i] = h
            r, k, v = (
                p[a + f"{long}.weight"] @ mixed[name]
                for long, name in (("receptance", "r"), ("key", "k"), ("value", "v"))
            )
            g = F.silu(p[a + "gate.weight"] @ mixed["g"])
            w = p[a + "time_decay"].flatten() + torch.tanh(mixed["w"] @ p[a + "time_decay_w1"]) @ p[a + "time_decay_w2"]
            w = torch.exp(-torch.exp(w))
            y = []
            for head in range(H):
                s = slice(head * N, (head + 1) * N)
                kv = torch.outer(k[s], v[s])
                y.append(r[s] @ (S[i][head] + p[a + "time_faaaa"][head][:, None] * kv))
                S[i][head] = w[s][:, None] * S[i][head] + kv
                y[-1] = layer_norm(y[-1], p[a + "ln_x.weight"][s], p[a + "ln_x.bias"][s], eps=64e-5)
            x = x + p[a + "output.weight"] @ (torch.cat(y) * g)
            h = layer_norm(x, p[b + "ln2.weight"], p[b + "ln2.bias"])
            d = ffn_last[i] - h
            ffn_last[i] = h
            key = torch.relu(p[f + "key.weight"] @ (h + d * p[f + "time_maa_k"].flatten())) ** 2
            gate = torch.sigmoid(p[f + "receptance.weight"] @ (h + d * p[f + "time_maa_r"].flatten()))
            x = x + gate * (p[f + "value.weight"] @ key)
        logits.append(p["head.weight"] @ layer_norm(x, p["ln_out.weight"], p["ln_out.bias"]))
    return torch.stack(logits)


def test_logits_equal_the_plain_equations():
    model = random_model()
    tokens = torch.randint(CONFIG.vocab_size, (2, 19), generator=torch.Generator().manual_seed(1))
    logits, _ = model(tokens)
    for row in range(2):
        torch.testing.assert_close(
            logits[row], plain_logits(model.state_dict(), CONFIG, tokens[row]), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("grad_checkpoint", (False, True))
def test_all_gradients_equal_those_of_the_plain_equations(grad_checkpoint):
    model = random_model()
    model.grad_checkpoint = grad_checkpoint
    tokens = torch.randint(CONFIG.vocab_size, (7,), generator=torch.Generator().manual_seed(1))
    own = {key: tensor.clone().requires_grad_() for key, tensor in model.state_dict().items()}
    for logits in (model(tokens[None])[0][0], plain_logits(own, CONFIG, tokens)):
        F.cross_entropy(logits, tokens.roll(-1)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name
        torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_low_precision_stays_near(dtype, tolerance):
    exact = random_model()
    tokens = torch.randint(CONFIG.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    expected, _ = exact(tokens)
    logits, _ = random_model(dtype=dtype)(tokens)
    assert (logits.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("split", [1, 7, 18])
def test_a_sequence_in_two_parts_equals_the_whole(split):
    model = random_model()
    tokens = torch.randint(CONFIG.vocab_size, (2, 19), generator=torch.Generator().manual_seed(1))
    whole, last = model(tokens)
    first, state = model(tokens[:, :split], State.zeros(CONFIG, 2, dtype=torch.float64))
    second, state = model(tokens[:, split:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(state, last):
        for a, b in zip(mine, theirs):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_packed_documents_do_not_see_each_other():
    model = random_model()
    lengths = [3, 1, 9, 4]
    tokens = torch.randint(CONFIG.vocab_size, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    packed, state = model(tokens, cu_seqlens=bounds)
    again, _ = model(tokens, state, cu_seqlens=bounds)
    for i, document in enumerate(tokens.split(lengths, dim=1)):
        alone, own = model(document)
        torch.testing.assert_close(packed[:, bounds[i] : bounds[i + 1]], alone, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state[1].wkv[i], own[1].wkv[0], rtol=1e-9, atol=1e-9)
        continued, _ = model(document, own)
        torch.testing.assert_close(again[:, bounds[i] : bounds[i + 1]], continued, rtol=1e-6, atol=1e-6)


def test_init_starts_every_block_as_the_identity():
    torch.manual_seed(0)
    model = RWKV6(CONFIG)
    init_weights(model)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    tokens = torch.randint(CONFIG.vocab_size, (1, 5))
    logits, _ = model(tokens)
    block = model.blocks[0]
    expected = model.head(model.ln_out(block.ln0(model.emb(tokens))))
    torch.testing.assert_close(logits, expected)


def test_token_shift_takes_the_given_predecessor():
    x = torch.arange(6.0).view(1, 3, 2)
    assert token_shift(x).tolist() == [[[0, 0], [0, 1], [2, 3]]]
    assert token_shift(x, torch.tensor([[8.0, 9.0]])).tolist() == [[[8, 9], [0, 1], [2, 3]]]


def test_pretrained_model_reproduces_its_reference_logits(shared_data):
    state = open_base(shared_data / "rwkv6_tiny_1m" / "rwkv6-tiny-1m-bf16.pth").tensors
    config = base_of(state).config
    model = RWKV6(config)
    model.load_state_dict({key: value.float() for key, value in state.items()})
    logits, _ = model(torch.tensor([list(b'"in')]))
    expected = np.fromfile(shared_data / "rwkv6_tiny_1m" / "expected-logits-6v0-1m.bin", dtype=np.float32)
    assert np.abs(logits[0, -1].detach().numpy() - expected).max() < 2e-3
