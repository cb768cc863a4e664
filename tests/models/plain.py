"""Each generation written out in plain torch, nothing shared with the package; random checkpoints."""

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
        if "time_" in key:  # of RWKV-6
            return (random - 2 if key.endswith("decay") else random) * (1 if shape[:2] == (1, 1) else 0.3)
        return random / (shape[-1] ** 0.5 if len(shape) == 2 else 1)

    skipped = () if first_value else tuple(f"blocks.0.att.v{n}" for n in "012")
    tensors = {key: tensor(key, shape).to(dtype) for key, shape in family.shapes(config).items() if key not in skipped}
    return tensors, family.config_of(tensors)


def plain7(tensors, config, tokens, start=None, scale=None, beside=None):
    """Logits (T, V) of one sequence of RWKV-7: section 2 of the paper, token by token, from start {key: tensor}, parts
    of a state as in a file.
    scale(layer, x (T, C)) -> (T, F) is a factor between the feed-forward's layers, if there is one; beside(layer,
    x (T, C)) -> (T, C) is what is added beside the time mix."""
    H, N, C, T = config.n_head, config.head_size, config.n_embd, len(tokens)
    given = {} if start is None else start
    begun = lambda end, *shape: given.get(f"blocks.{end}", tensors["emb.weight"].new_zeros(shape))  # noqa: E731
    shifted = lambda x, end: torch.cat([begun(end, C)[None], x[:-1]])  # noqa: E731
    norm = lambda x, name: F.layer_norm(x, (C,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-5)  # noqa: E731
    x, first = norm(tensors["emb.weight"][tokens], "blocks.0.ln0"), None
    for i in range(config.n_layer):
        att = lambda name, i=i: tensors[f"blocks.{i}.att.{name}"]  # noqa: E731
        inner = norm(x, f"blocks.{i}.ln1")
        r, w, k, v, a, g = (
            inner + (shifted(inner, f"{i}.att.shift") - inner) * att(f"x_{name}").view(-1) for name in "rwkvag"
        )
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
        S, rows = begun(f"{i}.att.time_state", H, N, N), []
        for t in range(T):
            sa = -(S @ kk[t, :, :, None])
            S = S * decay[t, :, None] + sa @ (kk * rate)[t, :, None] + value[t, :, :, None] @ k[t, :, None]
            rows.append((S @ r[t, :, :, None])[..., 0])
        y = F.group_norm(torch.stack(rows).reshape(T, C), H, att("ln_x.weight"), att("ln_x.bias"), 64e-5)
        y = y + ((r * k * att("r_k")).sum(-1, keepdim=True) * value).reshape(T, C)
        added = 0 if beside is None else beside(i, x)
        x = x + (y * gate) @ att("output.weight").T + added
        inner = norm(x, f"blocks.{i}.ln2")
        k = inner + (shifted(inner, f"{i}.ffn.shift") - inner) * tensors[f"blocks.{i}.ffn.x_k"].view(-1)
        k = torch.relu(k @ tensors[f"blocks.{i}.ffn.key.weight"].T) ** 2
        k = k if scale is None else k * scale(i, inner)
        x = x + k @ tensors[f"blocks.{i}.ffn.value.weight"].T
    return norm(x, "ln_out") @ tensors["head.weight"].T


def plain6(p, config, tokens, start=None):
    """Logits (T, V) of one sequence of RWKV-6: the paper's equations (section 4), token by token on plain
    vectors, from the raw state dict p and start {key: tensor}, parts of a state as in a file."""
    layer_norm = lambda x, weight, bias, eps=1e-5: F.layer_norm(x, x.shape, weight, bias, eps)  # noqa: E731
    H, N = config.n_head, config.head_size
    sizes = {"att.shift": (config.n_embd,), "ffn.shift": (config.n_embd,), "att.time_state": (H, N, N)}
    given = {} if start is None else start
    att_last, ffn_last, S = (
        [given.get(f"blocks.{i}.{end}", p["emb.weight"].new_zeros(size)) for i in range(config.n_layer)]
        for end, size in sizes.items()
    )
    S = [list(state.mT) for state in S]
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


def gate_of(tensors, tokens):
    """The gate of RWKV-7a as RWKV-LM's demo has it: the tables summed once for the whole vocabulary, then by tokens."""
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


def attention_of(tensors, tokens):
    """The attention of RWKV-7b as RWKV-LM's demo has it, query by query: the factors summed once for the whole
    vocabulary, the low ranks of all tokens, and what is made of them."""
    norm = (tensors["emb.weight"].shape[1:], tensors["blocks.0.ln0.weight"], tensors["blocks.0.ln0.bias"])
    emb = F.layer_norm(tensors["emb.weight"], *norm)

    def attention(layer, x):
        own = lambda name: tensors[f"blocks.{layer}.qkv.{name}"]  # noqa: E731
        table = lambda name: (own(f"{name}.weight") + emb @ own(f"{name}_x.weight").T)[tokens]  # noqa: E731
        made = {
            "q": x @ own("qq.weight").T,
            "k": (x @ own("k1")) @ own("k2") * table("k_emb"),
            "v": torch.tanh((x @ own("v1")) @ own("v2")) * table("v_emb"),
        }
        for name, each in made.items():
            before = torch.cat([torch.zeros_like(each[:1]), each[:-1]])
            mixed = each + (before - each) * own(f"x_{name}").flatten()
            made[name] = F.layer_norm(mixed, mixed.shape[1:], own(f"ln{name}.weight"), own(f"ln{name}.bias"))
        rows = []
        for t, query in enumerate(made["q"]):
            scores = 64 * torch.tanh(made["k"][: t + 1] @ query / 1024)
            rows.append(scores.softmax(0) @ made["v"][: t + 1])
        return torch.stack(rows)

    return attention


def plain7a(tensors, config, tokens, start=None):
    return plain7(tensors, config, tokens, start, gate_of(tensors, tokens))


def plain7b(tensors, config, tokens, start=None):
    return plain7(tensors, config, tokens, start, gate_of(tensors, tokens), attention_of(tensors, tokens))


PLAIN = {"x060": plain6, "x070": plain7, "x070a": plain7a, "x070b": plain7b}
