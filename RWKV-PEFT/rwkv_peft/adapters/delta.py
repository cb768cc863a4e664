"""What each adapter adds to a frozen weight, as plain tensor arithmetic.

`delta` is the definition that layers are tested against and that merging uses. The formulas: Bone
(Kang and Yin 2024, arXiv 2409.15371), its mini form (MiSS, the later versions of the same paper),
LoRA (Hu et al. 2021, arXiv 2106.09685); PiSSA, OLoRA and LoRA-GA are LoRA over a base from which
the initial factors were subtracted.
"""

import torch

RESIDUAL_VARIANTS = ("pissa", "olora", "lora-ga")


def delta(variant, weight, params, *, scale=1.0):
    """The change W' - W that an adapter makes to a weight.

    variant is a name in ADAPTERS; weight (out, in) the original weight, float32 or float64; params
    maps the adapter's own tensor names to tensors of any float dtype:

    - bat-in:  bone (in/r, r, r),  delta_ab = W_ab B_b + B_b over r x r blocks, a over out, b over in
    - bat-out: bone (out/r, r, r), delta_ab = W_ab B_a + B_a
    - bone, bone-mini: bone (r, m), delta[o, i] = D[i mod r, o mod m], m = out for bone
    - lora: lora_A (r, in), lora_B (out, r), delta = scale lora_B lora_A
    - pissa, olora, lora-ga: also init_lora_A, init_lora_B; minus scale init_lora_B init_lora_A

    -> (out, in) in weight's dtype. The arithmetic is done in that dtype.
    """
    params = {name: tensor.to(weight.dtype) for name, tensor in params.items()}
    if variant in ("bat-in", "bat-out"):
        blocks = _blocks(weight, params["bone"].shape[-1])
        return _block_affine(variant, blocks, params["bone"]).reshape(weight.shape)
    if variant in ("bone", "bone-mini"):
        return _sharded(weight, params["bone"])
    if variant == "lora" or variant in RESIDUAL_VARIANTS:
        change = scale * (params["lora_B"] @ params["lora_A"])
        if variant in RESIDUAL_VARIANTS:
            change -= scale * (params["init_lora_B"] @ params["init_lora_A"])
        return change
    raise KeyError(variant)


def _blocks(weight, rank):
    return weight.unflatten(0, (-1, rank)).unflatten(2, (-1, rank))  # (out/r, r, in/r, r)


def _block_affine(variant, blocks, bone):
    """-> the change of each block, (out/r, r, in/r, r), in no particular order in memory."""
    index = "b" if variant == "bat-in" else "a"
    addend = bone.transpose(0, 1) if variant == "bat-in" else bone[:, :, None]  # (r, in/r, r) or (out/r, r, 1, r)
    return torch.einsum(f"aobj,{index}ji->aobi", blocks, bone).add_(addend)


def _sharded(weight, bone):
    out_features, in_features = weight.shape
    columns = torch.arange(out_features, device=bone.device) % bone.shape[1]
    rank = bone.shape[0]
    rows = bone.t()[columns].repeat(1, -(-in_features // rank))  # (out, in rounded up to a multiple of r)
    return rows[:, :in_features]


def residual(weight, init_A, init_B, scale):
    """The base that PiSSA, OLoRA and LoRA-GA train on: W - scale B0 A0, rounded to weight's dtype."""
    change = scale * (init_B.float() @ init_A.float())
    return (weight.float() - change).to(weight.dtype)


def merged(variant, weight, params, *, scale=1.0, quant="none"):
    """The weight that a trained adapter's layer computed with, rebuilt from the original weight.

    Differs from weight + delta by the rounding that the training base had: a residual base
    (pissa, olora, lora-ga) is rounded to weight's dtype, and quant ("nf4", "int8") replays the
    quantization of the base. weight (out, in), any float dtype -> (out, in) float32.
    """
    if variant in RESIDUAL_VARIANTS:
        weight = residual(weight, params["init_lora_A"], params["init_lora_B"], scale)
        params = {name: params[name] for name in ("lora_A", "lora_B")}
        variant = "lora"
    if quant != "none":
        from .quant import roundtrip

        weight = roundtrip(weight, quant)
    weight = weight.float()
    if variant in ("bat-in", "bat-out"):  # added block by block, which spares `delta`'s copy into the weight's order
        bone = params["bone"].float()
        blocks = _blocks(weight, bone.shape[-1])
        return (blocks + _block_affine(variant, blocks, bone)).reshape(weight.shape)
    return weight + delta(variant, weight, params, scale=scale)
