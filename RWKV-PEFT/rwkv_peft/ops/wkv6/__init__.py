"""wkv6: the one entry to the RWKV-6 recurrence, over several backends that compute the same thing."""

from torch import Tensor

from ..recurrence import Recurrence
from ..recurrence.kernels import CpuRecurrence, CudaRecurrence, Split
from . import reference
from .chunked import CHUNKED
from .reference import SIGNATURE

TILE = 64  # steps between two saved states: cpu/wkv6/rows.h's kTile
SCAN_BLOCK = 512  # elements of a state; cuda/wkv6/groups.cuh's 4 SCAN_THREADS
SPLIT = Split("wkv6_{}_groups_64", "wkv6_{}_scan", scan_blocks=64 * 64 // SCAN_BLOCK, on_small=2)


WKV6 = Recurrence(
    SIGNATURE,
    reference.wkv6,
    CHUNKED,
    CpuRecurrence(SIGNATURE, TILE),
    CudaRecurrence(SIGNATURE, 64, SPLIT, halved=True),
)
backends = WKV6.backends


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RWKV-6's recurrence (Peng et al. 2024, arXiv 2404.05892, eq. 19): y_t = r_tᵀ (S_{t-1} + diag(u) k_t v_tᵀ),
    S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t v_tᵀ.

    r k v w (B, T, H, N), w before the two exponentials; u (H, N); state (B, H, N, N), rows the key dimension, or None
    for zeros -> y (B, T, H, N) in v's dtype, final state (B, H, N, N) float32. With cu_seqlens (n + 1,), int32 or
    int64, B is 1, the row holds n sequences bounded by its entries, and the states are (n, H, N, N).

    Differentiable once in r k v w u and state, through both outputs. backend: "auto" takes the kernel of the tensors'
    device ("cpu", "cuda") if it can be used, else "chunked", products of matrices in plain torch on any device, and
    says so once; a named backend is never replaced. "cpu:avx512bf16", "cpu:avx512", "cpu:avx2" and "cpu:portable" name
    the CPU kernel's instruction set. All compute in float32 but "cuda", which takes bfloat16 and an N of 64 alone: its
    products have bfloat16 operands, with float32 sums and state. float64 and forward-mode differentiation need
    "reference". Raises ValueError if arguments do not fit, RuntimeError if a named backend is
    unusable.
    """
    return WKV6.compute((r, k, v, w, u), state, cu_seqlens, backend)
