"""What wkv6 accepts: each rule is checked once, here, before any backend sees a tensor."""

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 128


def check(r, k, v, w, u, state, cu_seqlens):
    """Raise ValueError, with the value, the rule and the remedy, where the arguments of wkv6 do not fit together."""
    if v.dim() != 4:
        raise ValueError(f"wkv6: v has shape {tuple(v.shape)}; it must be (B, T, H, N): view it so")
    B, T, H, N = v.shape
    for name, x in (("r", r), ("k", k), ("w", w)):
        if x.shape != v.shape:
            raise ValueError(f"wkv6: {name} is {tuple(x.shape)} and v {tuple(v.shape)}; r k v w share one (B, T, H, N)")
    if T == 0 or B == 0 or H == 0:
        raise ValueError(
            f"wkv6: v is {tuple(v.shape)}; B, T and H must be at least 1: skip the call for an empty batch"
        )
    if N % 4 or not 0 < N <= MAX_HEAD_SIZE:
        raise ValueError(
            f"wkv6: head size {N}; it must be a multiple of 4, from 4 to {MAX_HEAD_SIZE}: "
            "set head_size to one such as 64"
        )
    if u.shape != (H, N):
        raise ValueError(f"wkv6: u is {tuple(u.shape)}; it must be (H, N) = {(H, N)}: view it so")
    sequences = B if cu_seqlens is None else _check_cu_seqlens(cu_seqlens, B, T)
    if state is not None and state.shape != (sequences, H, N, N):
        raise ValueError(
            f"wkv6: state is {tuple(state.shape)}; it must be one (N, N) a sequence and head, rows the key dimension: "
            f"{(sequences, H, N, N)}; expand a shared state over the sequences"
        )
    for name, x in (("r", r), ("k", k), ("v", v), ("w", w), ("u", u), ("state", state), ("cu_seqlens", cu_seqlens)):
        if x is None:
            continue
        if x.device != v.device:
            raise ValueError(
                f"wkv6: {name} is on {x.device} and v on {v.device}; move it with {name}.to({str(v.device)!r})"
            )
        if name != "cu_seqlens" and x.dtype not in DTYPES:
            raise ValueError(f"wkv6: {name} is {x.dtype}; it must be a float type: convert it with {name}.float()")


def _check_cu_seqlens(cu_seqlens, B, T):
    """The number of sequences that cu_seqlens packs into the one row of T tokens."""
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ValueError(
            f"wkv6: cu_seqlens is a {type(cu_seqlens).__name__}; give a tensor, torch.tensor([0, ..., {T}])"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"wkv6: cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; it must be (n + 1,) int32 or int64, "
            f"the bounds of n sequences: [0, ..., {T}]"
        )
    if B != 1:
        raise ValueError(f"wkv6: B is {B} with cu_seqlens; packed sequences share one row: reshape to (1, B * T, H, N)")
    if not torch.compiler.is_compiling() and _has_values(cu_seqlens):
        check_bounds(cu_seqlens, T)
    return len(cu_seqlens) - 1


def _has_values(x):
    """Whether x is a real tensor rather than a fake or meta one."""
    return type(x) is torch.Tensor and x.device.type != "meta"


def check_bounds(cu_seqlens, T):
    """Raise ValueError unless cu_seqlens bounds sequences of T tokens in all.

    Reading a GPU's tensor waits for the GPU, so such a tensor remembers that it passed, as long as nobody writes to it.
    """
    if getattr(cu_seqlens, "_wkv6_checked", None) == _mark(cu_seqlens, T):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or any(a >= b for a, b in zip(bounds, bounds[1:])):
        shown = bounds if len(bounds) <= 12 else f"[{bounds[0]}, {bounds[1]}, ..., {bounds[-1]}]"
        raise ValueError(
            f"wkv6: cu_seqlens is {shown} for {T} tokens; it must start at 0, increase, and end at {T}: "
            "drop empty sequences and count the padding as one"
        )
    if cu_seqlens.device.type != "cpu":
        cu_seqlens._wkv6_checked = _mark(cu_seqlens, T)


def as_int64(cu_seqlens, T):
    """cu_seqlens as the kernels take it; a converted copy of a tensor that passed has passed, too."""
    plain = cu_seqlens.to(torch.int64).contiguous()
    converted = plain is not cu_seqlens and not torch.compiler.is_compiling()
    if converted and getattr(cu_seqlens, "_wkv6_checked", None) == _mark(cu_seqlens, T):
        plain._wkv6_checked = _mark(plain, T)
    return plain


def _mark(cu_seqlens, T):
    """What a tensor that bounds sequences of T tokens remembers, as long as nobody writes to it."""
    return T, 0 if cu_seqlens.is_inference() else cu_seqlens._version
