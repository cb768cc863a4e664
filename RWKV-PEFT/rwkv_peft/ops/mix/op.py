"""What the models do between their matrix products: token shift with interpolation, gates, keys, the normalization of
heads.

Each operation is written out in plain torch, which takes any device and dtype, is differentiable twice and is what
torch.compile sees. Float32 and bfloat16 tensors go through one pass forward and one backward instead (elements.py,
heads.py, norms.py, ddlerp.py, cpu_lerp.py, gpu_lerp.py), where a compiler exists; those are differentiable once.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import affine, asked, cpu, cpu_lerp, cuda, ddlerp, elements, gpu_lerp, heads, lefts, norms, square
from .asked import Asked
from .functions import run
from .shift import check_shift, fit, last_token, offsets_of, token_shift


def fused(first: Tensor, *others: Tensor | None) -> bool:
    """Whether tensors, or None, go through a kernel: the one place that decides."""
    return cpu.FAMILY.takes(first, *others) if first.is_cpu else cuda.takes(first, *others)


def norms_fused(first: Tensor, *others: Tensor | None) -> bool:
    """Whether layer norms, and residuals with a gate or of another layer's values, go through a kernel that GPUs have
    alone: torch's are fast enough on CPUs."""
    return first.shape[-1] <= cuda.MOST_CHANNELS and fused_on_gpu(first, *others)


def fused_on_gpu(first: Tensor, *others: Tensor | None) -> bool:
    """Whether tensors, or None, go through a kernel that GPUs have alone."""
    return not first.is_cpu and fused(first, *others)


def lerp(
    x: Tensor,
    last: Tensor | None,
    maa: Tensor,
    low: Tensor | None = None,
    up: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Points between each token and its predecessor p: x + (p - x) m_i, where m_i = maa_i + low_i up_i, for each i.

    x (B, T, C), last and cu_seqlens as in token_shift; maa (m, C); low (B, T, m K), i after i, and up (m, K, C) make
    the weights depend on the token, both None: they do not -> m tensors (B, T, C).
    """
    check_shift(x, last, cu_seqlens)
    if not fit(low, up):
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (low, up)]
        raise ValueError(f"low and up must be (B, T, m K) and (m, K, C), or both None, not {shapes[0]} and {shapes[1]}")
    if fused(x, last, maa, low, up):
        kernel = cpu_lerp if x.is_cpu else gpu_lerp
        return run(kernel.Lerp, *_contiguous(x, last, maa, low, up), _bounds(cu_seqlens))
    delta = token_shift(x, last, cu_seqlens) - x
    weights = maa if low is None or up is None else maa[:, None, None] + offsets_of(low, up)
    return tuple(torch.addcmul(x, delta, weight) for weight in weights)


def _bounds(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()


def norm_gate(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalizes each head and gates it: (normalized y · weight + bias) · silu(g).

    y (B, T, H, N), g (B, T, H N), weight and bias (H N,) -> (B, T, H N).
    """
    if fused(y, g, weight, bias):
        return run(heads.NormGate, *_contiguous(y, g, weight, bias), eps)
    B, T, H, N = y.shape
    return F.group_norm(y.reshape(B * T, H * N), H, weight, bias, eps).view(B, T, H * N) * F.silu(g)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, and x normalized over its channels · weight + bias.

    x (B, T, C), weight and bias (C,) -> (B, T, C), (B, T, C). The first is x for its second user, the residual: so on a
    GPU its gradients are never added up by themselves.
    """
    if norms_fused(x, weight, bias):
        return run(norms.LayerNorm, *_contiguous(x, weight, bias), eps)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def norm_lerp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    last: Tensor | None,
    maa: Tensor,
    cu_seqlens: Tensor | None = None,
    whole: bool = False,
    twice: int | None = None,
    left: Tensor | None = None,
    bones: Sequence[Asked] = (),
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """layer_norm, and `lerp` of what it normalizes: on a GPU in one pass, where neither norm nor points are trained.

    x, weight, bias as in layer_norm; last (B, C) or None, maa (m, C) and cu_seqlens as in lerp; left (n, B T, r), what
    an adapter left to be added to x (lefts.py), or None -> x with that, the last normalized token of each sequence
    (B, C), m points (B, T, C), preceded by what is normalized where `whole`, and nothing. Point number `twice` comes
    once more, as the last, for a second user, as x does. bones: of each point the matrices by which it may be bent, or
    None, where not `whole`: then points are, on a GPU, and what `bent` gives besides takes the place of nothing. Or the
    ranks r of points' sums over shards of r channels, or None: these (B T, r) take its place then, and points stay.
    """
    check_shift(x, last, cu_seqlens)
    narrow = x.shape[-1] <= cuda.MOST_MIXED and len(maa) <= cuda.MOST_POINTS
    frozen = not _trained(weight, bias, maa)
    if frozen and narrow and lefts.fit(x, left) and norms_fused(x, last, weight, bias, maa, left):
        tensors = _contiguous(x, last, weight, bias, maa)
        ranks = tuple(bones) if asked.takes(x, bones, left) else ()
        settings = eps, _bounds(cu_seqlens), whole, twice, *_contiguous(left), ranks
        given = _contiguous(*asked.matrices(bones)) if affine.takes(x, bones) else ()
        x, ends, *outs = run(norms.NormLerp, *tensors, *settings, *given)
        count = whole + len(maa) + (twice is not None)
        return x, ends, tuple(outs[:count]), tuple(outs[count:])
    x = lefts.plus_left(x, left)
    x, normal = layer_norm(x, weight, bias, eps)
    points = lerp(normal, last, maa, cu_seqlens=cu_seqlens)
    points = points if twice is None else (*points, points[twice])
    return x, last_token(normal, cu_seqlens), (normal, *points) if whole else points, ()


def norm_ddlerp(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    last: Tensor | None,
    maa_x: Tensor,
    w1: Tensor,
    maa: Tensor,
    w2: Tensor,
    decay_w1: Tensor,
    cu_seqlens: Tensor | None = None,
    left_y: Tensor | None = None,
    left_gate: Tensor | None = None,
    bones: Sequence[Asked] = (),
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A gated residual, layer norm and RWKV-6's token shift ("ddlerp"; Peng et al. 2024, arXiv 2404.05892, eq. 12 to
    14): five `lerp` points of what is normalized, whose weights have the factor tanh(p w1), p being the point of maa_x.
    The first of the five makes the decay's factor, tanh(first decay_w1).

    x, weight, bias, last and cu_seqlens as in norm_lerp; y and gate (B, T, C), or both None; maa_x (1, C), w1 (C, 5 K),
    maa (5, C), w2 (5, K, C), decay_w1 (C, D); what adapters left of y and gate, as norm_lerp has it of x; bones: of
    each of the other four points what norm_lerp takes -> x + sigmoid(gate) y, which is normalized, (B, T, C), the last
    normalized token of each sequence (B, C), the decay's factor (B, T, D), the other four points (B, T, C), and what
    norm_lerp gives for bones, or nothing. A GPU's kernels write neither the norm nor the first point, nor one that they
    bend, where none of the parameters is trained.
    """
    check_shift(x, last, cu_seqlens)
    parameters = weight, bias, maa_x, w1, maa, w2, decay_w1
    left_y, left_gate = lefts.alike(left_y, left_gate)
    frozen = not _trained(*parameters) and norms_fused(x, y, gate, last, *parameters, left_y, left_gate)
    if frozen and lefts.fit(x, left_y, left_gate) and ddlerp.takes(x, last, *parameters):
        tensors, left = _contiguous(x, y, gate, last, *parameters), _contiguous(left_y, left_gate)
        ranks = tuple(bones) if affine.takes(x, bones, int) else ()
        given = _contiguous(*asked.matrices(bones)) if affine.takes(x, bones) else ()
        x, ends, low, *points = run(ddlerp.NormDDLerp, *tensors, eps, _bounds(cu_seqlens), *left, ranks, *given)
        return x, ends, low, tuple(points[:4]), tuple(points[4:])
    if y is not None and gate is not None:
        x = gated_residual(x, lefts.plus_left(gate, left_gate), lefts.plus_left(y, left_y))
    x, ends, (normal, p), _ = norm_lerp(x, weight, bias, eps, last, maa_x, cu_seqlens, whole=True)
    first, *points = lerp(normal, last, maa, torch.tanh(p @ w1), w2, cu_seqlens)
    return x, ends, torch.tanh(first @ decay_w1), tuple(points), ()


def _trained(*parameters: Tensor) -> bool:
    return torch.is_grad_enabled() and any([parameter.requires_grad for parameter in parameters])


def gated_residual(x: Tensor, r: Tensor, v: Tensor) -> Tensor:
    """x + sigmoid(r) · v, for tensors of one shape."""
    if norms_fused(x, r, v):
        return run(elements.GatedResidual, *_contiguous(x, r, v))
    return x + sigmoid_gate(r, v)


def sigmoid_gate(r: Tensor, v: Tensor) -> Tensor:
    """sigmoid(r) · v, for r and v of one shape."""
    if fused(r, v):
        return run(elements.SigmoidGate, *_contiguous(r, v))
    return torch.sigmoid(r) * v


def relu_square(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    if fused(x):
        return run(elements.ReluSquare, *_contiguous(x))
    return torch.relu(x).square()


def low_square(
    x: Tensor, left: Tensor | None, up: Tensor | None, down: Tensor | None, rank: int, sums: bool = True
) -> tuple[Tensor, Tensor | None]:
    """relu_square with what adapters before and after it have of low rank: out = max(x + left up, 0)² and, where
    `sums`, right = out down.

    x (…, F); left (T, r), or None for nothing; up (r, F) and down (F, r), or None for the identity, repeated along the
    channels and cut at F -> out (…, F), right (T, r) or None. On a GPU one pass, whose gradients are one more.
    """
    if takes_low_square(x, x.shape[-1], rank, left, up, down):
        return run(square.LowSquare, x.contiguous(), left, up, down, rank, sums)
    if left is not None:
        x = x + (lefts.repeated(left, x.shape[-1]) if up is None else left @ up).view(x.shape)
    out = torch.relu(x).square()
    if not sums:
        return out, None
    rows = out.flatten(0, -2)
    if down is None:
        rows = F.pad(rows, (0, -rows.shape[-1] % rank))
    return out, rows @ down if down is not None else rows.unflatten(-1, (-1, rank)).sum(1)


def takes_low_square(x: Tensor, channels: int, rank: int, *others: Tensor | None) -> bool:
    """Whether low_square of so many channels is one pass, where its tensors are like x and others."""
    return square.takes(x.dtype, channels, rank) and fused_on_gpu(x, *others)


def takes_bones(x: Tensor, rank: int) -> bool:
    """Whether the points of norm_lerp and norm_ddlerp that are like x may be bent by matrices of a rank."""
    return affine.fit(x, rank) and fused_on_gpu(x)


def takes_sums(x: Tensor, rank: int) -> bool:
    """Whether norm_lerp and norm_ddlerp may give sums over shards of a rank of their points that are like x."""
    return lefts.takes(x.shape[-1], rank) and fused_on_gpu(x)


def takes_left(x: Tensor, channels: int, rank: int, *others: Tensor | None) -> bool:
    """Whether norm_lerp and norm_ddlerp of so many channels add what an adapter of a rank leaves in their pass, where
    tensors are like x and others, and the norm is frozen."""
    return lefts.takes(channels, rank) and fused_on_gpu(x, *others)


def delta_keys(k: Tensor, low: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of RWKV-7's delta rule (Peng et al. 2025, arXiv 2503.14456, section 4): of a key k and an in-context
    learning rate, sigmoid(a0 + low), what is written at, what is taken away, and that times the rate.

    k, low (B, T, H, N); a0, k_k, k_a (1, 1, H N) -> key, a, b (B, T, H, N): k · (1 + (rate - 1) k_a), -n and n · rate,
    n being k · k_k, in each head divided by its length (by 1e-12 at the least).
    """
    if fused(k, low, a0, k_k, k_a):
        return run(heads.DeltaKeys, *_contiguous(k, low, a0, k_k, k_a))
    a0, k_k, k_a = (x.view(k.shape[2:]) for x in (a0, k_k, k_a))
    rate = torch.sigmoid(a0 + low)
    n = F.normalize(k * k_k, dim=-1)
    return k * (1 + (rate - 1) * k_a), -n, n * rate


def value_residual(v: Tensor, first: Tensor, low: Tensor, v0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RWKV-7's values: v + (first - v) · sigmoid(v0 + low), first being layer 0's.

    v, first, low (B, T, C); v0 (1, 1, C) -> the values (B, T, C), the same for a second user, and `first` for the next
    layer: so on a GPU the gradients of none of them are added up by themselves.
    """
    if norms_fused(v, first, low, v0):
        return run(elements.SharedValueResidual, *_contiguous(v, first, low, v0))
    if fused(v, first, low, v0):
        v = run(elements.ValueResidual, *_contiguous(v, first, low, v0))
    else:
        v = v + (first - v) * torch.sigmoid(v0 + low)
    return v, v, first


def norm_bonus_gate(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Normalizes each head, adds the current token's bonus and gates it: (normalized y · weight + bias + s v) · g,
    s being the sum of r · k · r_k over the head.

    y, r, k, v (B, T, H, N), g (B, T, H N), r_k (H, N), weight and bias (H N,) -> (B, T, H N).
    """
    if fused(y, r, k, v, g, r_k, weight, bias):
        return run(heads.NormBonusGate, *_contiguous(y, r, k, v, g, r_k, weight, bias), eps)
    B, T, H, N = y.shape
    normal = F.group_norm(y.reshape(B * T, H * N), H, weight, bias, eps).view(y.shape)
    return (normal + (r * k * r_k).sum(-1, keepdim=True) * v).view(g.shape) * g


def _contiguous(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    return (None if x is None else x.contiguous() for x in tensors)
