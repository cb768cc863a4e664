"""RWKV-7 written out in plain torch, random checkpoints of its kind, and the laws that its models keep."""

import math

import torch
import torch.nn.functional as F


def random_tensors(family, first_value=True, dtype=torch.float64, **sizes):
    """A random checkpoint whose decays and learning rates vary, and its config."""
    usual = {"n_layer": 3, "n_embd": 32, "vocab_size": 40, "head_size": 8, "dim_ffn": 48}
    config = family.new_dimensions(**usual | sizes)
    generator = torch.Generator().manual_seed(0)

    def tensor(key, shape):
        random = torch.randn(shape, generator=generator, dtype=torch.float64)
        if ".ln" in key or key.startswith("ln_out"):
            return (1 if key.endswith("weight") else 0) + 0.1 * random
        if key.endswith((".w0", ".a0", ".v0")):
            return 2 * random
        return random / (shape[-1] ** 0.5 if len(shape) == 2 else 1)

    skipped = () if first_value else tuple(f"blocks.0.att.v{n}" for n in "012")
    tensors = {key: tensor(key, shape).to(dtype) for key, shape in family.shapes(config).items() if key not in skipped}
    return tensors, family.config_of(tensors)


def plain(tensors, config, tokens, scale=None, beside=None):
    """Logits (T, V) of one sequence: section 2 of the paper, token by token, nothing shared with the package.
    scale(layer, x (T, C)) -> (T, F) is a factor between the feed-forward's layers, if there is one; beside(layer,
    x (T, C)) -> (T, C) is what is added beside the time mix."""
    H, N, C, T = config.n_head, config.head_size, config.n_embd, len(tokens)
    shifted = lambda x: torch.cat([torch.zeros_like(x[:1]), x[:-1]])  # noqa: E731
    norm = lambda x, name: F.layer_norm(x, (C,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-5)  # noqa: E731
    x, first = norm(tensors["emb.weight"][tokens], "blocks.0.ln0"), None
    for i in range(config.n_layer):
        att = lambda name, i=i: tensors[f"blocks.{i}.att.{name}"]  # noqa: E731
        inner = norm(x, f"blocks.{i}.ln1")
        r, w, k, v, a, g = (inner + (shifted(inner) - inner) * att(f"x_{name}").view(-1) for name in "rwkvag")
        decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(att("w0").view(-1) + torch.tanh(w @ att("w1")) @ att("w2")))
        r, k, value = r @ att("receptance.weight").T, k @ att("key.weight").T, v @ att("value.weight").T
        if first is None:
            first = value
        else:
            value = value + (first - value) * torch.sigmoid(att("v0").view(-1) + v @ att("v1") @ att("v2"))
        rate = torch.sigmoid(att("a0").view(-1) + a @ att("a1") @ att("a2"))
        gate = torch.sigmoid(g @ att("g1")) @ att("g2")
        kk = F.normalize((k * att("k_k").view(-1)).view(T, H, N), dim=-1, eps=1e-12)
        k = k * (1 + (rate - 1) * att("k_a").view(-1))
        r, k, value, rate, decay = (each.view(T, H, N) for each in (r, k, value, rate, decay))
        S, rows = torch.zeros(H, N, N, dtype=x.dtype), []
        for t in range(T):
            sa = -(S @ kk[t, :, :, None])
            S = S * decay[t, :, None] + sa @ (kk * rate)[t, :, None] + value[t, :, :, None] @ k[t, :, None]
            rows.append((S @ r[t, :, :, None])[..., 0])
        y = F.group_norm(torch.stack(rows).reshape(T, C), H, att("ln_x.weight"), att("ln_x.bias"), 64e-5)
        y = y + ((r * k * att("r_k")).sum(-1, keepdim=True) * value).reshape(T, C)
        added = 0 if beside is None else beside(i, x)
        x = x + (y * gate) @ att("output.weight").T + added
        inner = norm(x, f"blocks.{i}.ln2")
        k = inner + (shifted(inner) - inner) * tensors[f"blocks.{i}.ffn.x_k"].view(-1)
        k = torch.relu(k @ tensors[f"blocks.{i}.ffn.key.weight"].T) ** 2
        k = k if scale is None else k * scale(i, inner)
        x = x + k @ tensors[f"blocks.{i}.ffn.value.weight"].T
    return norm(x, "ln_out") @ tensors["head.weight"].T


def assert_plain(family, tensors, config, expected, grad_checkpoint=False):
    """Assert that a model's logits and all gradients are those of expected(tensors, tokens)."""
    tokens, targets = torch.arange(1, 12), torch.arange(2, 13)
    model = family.load({key: tensor.clone() for key, tensor in tensors.items()}, config, grad_checkpoint)
    own = {key: tensor.clone().requires_grad_() for key, tensor in tensors.items()}
    found, due = model(tokens[None])[0][0], expected(own, tokens)
    for logits in (found, due):
        F.cross_entropy(logits, targets).backward()
    torch.testing.assert_close(found, due, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name in {f"blocks.0.att.v{n}" for n in "012"}  # which nothing uses
        else:
            torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-7, atol=1e-9)


@torch.inference_mode()
def assert_parts_and_packed(model, tokens, cut, **close):
    """Assert that a row is its two parts, its end their end, and its place in a packed row the whole."""
    whole, end = model(tokens)
    first, state = model(tokens[:, :cut])
    rest, last = model(tokens[:, cut:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, **close)
    torch.testing.assert_close(tuple(last[1]), tuple(end[1]), **close)
    bounds = torch.tensor([0, cut, cut + tokens.shape[1]])
    packed, _ = model(torch.cat([tokens[:, :cut], tokens], 1), cu_seqlens=bounds)
    torch.testing.assert_close(packed, torch.cat([first, whole], 1), **close)
