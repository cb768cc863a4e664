"""LoRA and its relatives, as baselines: one layer, four ways to start.

LoRA (Hu et al. 2021, arXiv 2106.09685) starts at zero. PiSSA (Meng et al. 2024, arXiv 2404.02948),
OLoRA (Büyükakyüz 2024, arXiv 2406.01775) and LoRA-GA (Wang et al. 2024, arXiv 2407.05000) start
from factors A0, B0 of the weight or of its gradient and train on the base W - s B0 A0; the factors
go into the adapter file, so that merging starts from the original weight.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UserError
from . import functional
from .base import AdapterLinear
from .delta import residual

LORA_GA_GAMMA = 16  # the paper's stable scale


class LoraLinear(AdapterLinear):
    """y = W x + scale lora_B lora_A x, with lora_A (rank, in) and lora_B (out, rank)."""

    parameter_names = ("lora_A", "lora_B")

    def __init__(self, base, config):
        super().__init__(base, config)
        self.dropout = config.dropout
        self.lora_A = self.new_parameter(config.rank, base.in_features)
        self.lora_B = self.new_parameter(base.out_features, config.rank)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        if self.dropout and self.training:
            y = functional.linear(x, self.base, self.bias, product=self.product)
            inner = F.linear(F.dropout(x, self.dropout), self.lora_A.to(x.dtype))
            return y + self.scale * F.linear(inner, self.lora_B.to(x.dtype))
        return functional.lora(
            x, self.base, self.lora_A, self.lora_B, self.bias, scale=self.scale, product=self.product
        )


class ResidualLoraLinear(LoraLinear):
    """LoRA that starts from factors of the weight, which it takes out of the weight."""

    def __init__(self, base, config, factors):
        """factors: (A0 (rank, in), B0 (out, rank)), as `initial_factors` makes or a file holds them."""
        super().__init__(base, config)
        init_A, init_B = (f.to(self.weight.device, self.weight.dtype).contiguous() for f in factors)
        with torch.no_grad():
            self.lora_A.copy_(init_A)
            self.lora_B.copy_(init_B)
        # The storage may be the memory-mapped base file's, which others still read: replaced, not written to.
        self.weight.data = residual(self.weight.detach(), init_A, init_B, self.scale)
        self.register_buffer("init_lora_A", init_A, persistent=False)
        self.register_buffer("init_lora_B", init_B, persistent=False)

    def adapter_tensors(self):
        return super().adapter_tensors() | {"init_lora_A": self.init_lora_A, "init_lora_B": self.init_lora_B}


def initial_factors(weight, config, gradient=None):
    """A0 (rank, in) and B0 (out, rank), float32, for pissa, olora or lora-ga.

    weight (out, in), any float dtype; gradient (out, in), that of the loss, for lora-ga.
    """
    weight = weight.detach().float()
    rank = config.rank
    if config.variant == "pissa":
        return _pissa(weight, rank, config.scale, config.svd_niter)
    if config.variant == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if gradient is None:
        raise UserError(
            "lora-ga starts from the gradient of the loss at each weight, and none was given for this one; "
            "estimate it on a batch of the data first, or use --peft pissa, which needs none"
        )
    return _lora_ga(gradient.float(), rank)


def _pissa(weight, rank, scale, niter):
    """The principal part of W: B = U sqrt(S / s), A = sqrt(S / s) Vᵀ."""
    if niter:
        u, s, v = _svd_lowrank(weight, rank, niter)
        vt = v.t()
    else:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def _lora_ga(gradient, rank):
    """The gradient's leading directions: A from V's first `rank`, B from U's next `rank`, stably scaled."""
    u, _, v = _svd_lowrank(gradient, 2 * rank, niter=4)
    scale = gradient.shape[0] ** 0.25 / math.sqrt(LORA_GA_GAMMA)
    return scale * v.t()[:rank], scale * u[:, rank : 2 * rank]


def _svd_lowrank(matrix, rank, niter):
    """Randomized SVD with oversampling, from a seed of its own: the same factors on every run."""
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        return torch.svd_lowrank(matrix, q=min(2 * rank, *matrix.shape), niter=niter)
