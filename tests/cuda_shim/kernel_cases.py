"""Results of the CUDA kernels for random inputs: a function of RESULTS gives all results of a family's kernels on the
shim. The sizes are such that every kernel has more than one tile, strip and group."""

from unittest.mock import patch

import torch

from cuda_shim.cases import CASES
from rwkv_peft.ops import cross_entropy as loss
from rwkv_peft.ops import decode as decoding
from rwkv_peft.ops.bone import cuda as bone_cuda
from rwkv_peft.ops.mix import cpu as mix_cpu
from rwkv_peft.ops.mix import cuda as mix_cuda
from rwkv_peft.ops.mix.functions import KERNELS, GpuLerp


def draws(dtype, seed=0):
    """A function: shape -> a random normal tensor in dtype, drawn by a seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(dtype)


def differentiated(function, wanted, *inputs):
    """Outputs of an autograd Function, and the gradients of those inputs that are `wanted`."""
    leaves = [x.requires_grad_() if i in wanted else x for i, x in enumerate(inputs)]
    outs = function.apply(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    return [*(out.detach() for out in outs), *(leaves[i].grad for i in wanted)]


def mix(kernels):
    results = []
    with patch.object(mix_cpu, "call", mix_cuda.call), patch.object(mix_cuda.FAMILY, "kernels", lambda device: kernels):
        low = draws(torch.bfloat16)
        for rank in mix_cuda.LOW_RANKS:
            inputs = low(1, 129, 128), low(1, 128), low(5, 128), low(1, 129, 5 * rank), low(5, rank, 128), None
            results += differentiated(GpuLerp, (0, 1, 3), *inputs)
        y, g, (weight, bias) = low(1, 70, 2, 20), low(1, 70, 40), low(2, 40)
        results += differentiated(KERNELS["norm_gate"], (1, 2, 3, 4), 1e-5, y, g, weight.clone(), bias.clone())
        return results + others(low)


def others(randn):
    """Results of the operations of mix whose kernels have no barriers."""
    rows, vector, stacked = (1, 70, 200), (1, 1, 200), torch.tensor([0, 1, 33, 70])
    of_heads = [randn(1, 70, 2, 20) for _ in range(4)]
    inputs = randn(*rows), randn(3, 200), randn(6, 200), randn(1, 70, 6 * 8), randn(6, 8, 200), stacked
    results = differentiated(GpuLerp, (0, 1, 2, 3, 4), *inputs)
    results += differentiated(KERNELS["relu_square"], (1,), None, randn(*rows))
    results += differentiated(KERNELS["sigmoid_gate"], (1, 2), None, randn(*rows), randn(*rows))
    inputs = (randn(*shape) for shape in (rows, rows, rows, vector))
    results += differentiated(KERNELS["value_residual"], (1, 2, 3, 4), None, *inputs)
    inputs = None, *of_heads[:2], *(randn(1, 1, 40) for _ in range(3))
    results += differentiated(KERNELS["delta_keys"], (1, 2, 3, 4, 5), *inputs)
    inputs = 1e-5, *(x.detach() for x in of_heads), randn(1, 70, 40), randn(2, 20), randn(40), randn(40)
    return results + differentiated(KERNELS["norm_bonus_gate"], tuple(range(1, 9)), *inputs)


def bone(kernels):
    results = []
    with patch.object(bone_cuda.FAMILY, "kernels", lambda device: kernels), patch.object(bone_cuda, "BLOCKS", 2):
        randn = draws(torch.bfloat16)
        for rank in bone_cuda.RANKS:
            x, matrices, g, dz = randn(150, 4 * rank), randn(4, rank, rank), randn(150, 2 * rank), randn(150, 4 * rank)
            z, shift = bone_cuda.affine(x, matrices)
            results += [z, shift, bone_cuda.tiled(shift, 2 * rank)]
            results += [bone_cuda.affine_backward_(dz, g, x, matrices), dz]
            results.append(bone_cuda.merge(randn(2 * rank, 4 * rank), matrices[:2]))
    return results


def cross_entropy(kernels):
    results = []
    with patch.object(loss.CUDA, "kernels", lambda device: kernels):
        for vocabulary in (9000, 5001):
            logits, targets = draws(torch.bfloat16)(3, vocabulary), torch.tensor([0, 700, vocabulary - 1])
            results += [loss.cuda_losses_(logits, targets, 0.5, 0.25, True), logits]
    return results


def decode(kernels):
    results = []
    with patch.object(decoding.CUDA, "kernels", lambda device: kernels):
        x, weight = draws(torch.bfloat16)(16, 2208), draws(torch.float32)(33, 2208)
        for blocks in (decoding.quantize(weight, 8), decoding.quantize(weight, 4)):
            results += [decoding.cuda_product(x[:rows], blocks) for rows in (1, 3, 16)]
            results.append(decoding.cuda_dequantized(blocks))
    return results


def recurrence(op):
    """kernels -> the results of a recurrence's case, whole and split in groups."""

    def run(kernels):
        case = CASES[op].make((1, 129, 1, 64), torch.bfloat16, lengths=[81, 48])
        return [x for group in (0, 64) for x in CASES[op].run(kernels, case, group)]

    return run


RESULTS = {  # by a family's name
    **{op: recurrence(op) for op in CASES},
    **dict(mix=mix, bone=bone, cross_entropy=cross_entropy, decode=decode),
}
