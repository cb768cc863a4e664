"""Inputs of the mix operations, and the error bound of their kernels."""

import torch

from rwkv_peft.ops.mix import cpu, norm_bonus_gate

HEADS = [(1, 1, 1, 4), (2, 9, 3, 8), (1, 70, 2, 64), (2, 33, 5, 20)]
KERNELS = (*"CpuLerp GpuLerp NormGate SigmoidGate ReluSquare".split(), *"DeltaKeys ValueResidual NormBonusGate".split())


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def run(function, inputs, dtype, plain, monkeypatch):
    """Outputs and the gradients of all inputs, in dtype, with kernels or without."""
    with monkeypatch.context() as patch:
        if plain:
            patch.setattr(cpu.FAMILY, "unavailable", lambda: "no compiler")
        leaves = [
            None if x is None else x.to(dtype).requires_grad_()
            for x in (None if x is None else x.clone() for x in inputs)
        ]
        outs = function(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        by_kernel = type(outs[0].grad_fn).__name__.removesuffix("Backward") in KERNELS
        assert by_kernel == (not plain and dtype != torch.float64)
        torch.autograd.backward(outs, [randn(*out.shape, seed=7 + i).to(dtype) for i, out in enumerate(outs)])
    return [*outs, *(x.grad for x in leaves if x is not None)]


def assert_as_accurate(function, inputs, dtype, monkeypatch):
    """Each result is at most twice as far from float64 as plain torch in the same dtype, plus two roundings."""
    rounded = [None if x is None else x.to(dtype) for x in inputs]
    truth = run(function, [None if x is None else x.double() for x in rounded], torch.float64, True, monkeypatch)
    plain = run(function, rounded, dtype, True, monkeypatch)
    kernel = run(function, rounded, dtype, False, monkeypatch)
    for i, (x, low, exact) in enumerate(zip(kernel, plain, truth, strict=True)):
        assert x.dtype == dtype and x.shape == exact.shape
        allowed = 2 * (low.double() - exact).norm() + 2 * torch.finfo(dtype).eps * exact.norm()
        assert (x.double() - exact).norm() <= allowed, i


def low_rank(B, T, C, m, rank):
    """Low-rank factors that make the weights depend on the token, or none."""
    return (None, None) if rank is None else (randn(B, T, m * rank), randn(m, rank, C) / rank)


def keys_inputs(B, T, H, N):
    """Arguments of delta_keys."""
    k, low = randn(B, T, H, N), 2 * randn(B, T, H, N, seed=1)
    return [k, low, *(randn(1, 1, H * N, seed=seed) for seed in (2, 3, 4))]


def reads_inputs(B, T, H, N):
    """Arguments of norm_bonus_gate, without eps."""
    y, r, k, v = (randn(B, T, H, N, seed=seed) + 0.5 for seed in range(4))
    weight, bias = randn(H * N, seed=6), randn(H * N, seed=7)
    return [y, r, k, v, randn(B, T, H * N, seed=4), randn(H, N, seed=5), weight, bias]


def bonus_gate(*inputs):
    """norm_bonus_gate of reads_inputs."""
    return norm_bonus_gate(*inputs[:5], inputs[5:], 64e-5)
