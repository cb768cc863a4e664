"""wkv7: the one entry to the RWKV-7 recurrence, over several backends that compute the same thing."""

from torch import Tensor

from ..recurrence import Recurrence
from ..recurrence.kernels import CpuRecurrence, CudaRecurrence, Split
from . import reference
from .chunked import CHUNKED
from .reference import SIGNATURE

TILE = 64  # steps between two saved states: cpu/wkv7/chunk.h's kTile
SPLIT = Split("wkv7_{}_groups_64", "wkv7_{}_scan_64", scan_blocks=4)


WKV7 = Recurrence(
    SIGNATURE, reference.wkv7, CHUNKED, CpuRecurrence(SIGNATURE, TILE), CudaRecurrence(SIGNATURE, 32, SPLIT)
)
backends = WKV7.backends


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RWKV-7's recurrence ("Goose", Peng et al. 2025, arXiv 2503.14456): y_t = S_t r_t,
    S_t = S_{t-1} diag(exp(-e^(-1/2) sigmoid(w_t))) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ.

    r w k v a b (B, T, H, N), w before the sigmoid; state (B, H, N, N), rows the value dimension (in wkv6 the key
    dimension), or None for zeros -> y (B, T, H, N) in v's dtype, final state (B, H, N, N) float32. With cu_seqlens
    (n + 1,), int32 or int64, B is 1, the row holds n sequences bounded by its entries, and the states are (n, H, N, N).

    Differentiable once in r w k v a b and state, through both outputs. backend: "auto" takes the kernel of the tensors'
    device ("cpu", "cuda") if it can be used, else "chunked", products of matrices in plain torch on any device, and
    says so once; a named backend is never replaced. "cpu:avx512bf16", "cpu:avx512", "cpu:avx2" and "cpu:portable" name
    the CPU kernel's instruction set. All compute in float32 but "cuda", which takes bfloat16 and an N
    of 64 alone: its products have bfloat16 operands, with float32 sums and state. float64 and forward-mode
    differentiation need "reference". Raises ValueError if arguments do not fit, RuntimeError if a named backend is
    unusable.
    """
    return WKV7.compute((r, w, k, v, a, b), state, cu_seqlens, backend)
