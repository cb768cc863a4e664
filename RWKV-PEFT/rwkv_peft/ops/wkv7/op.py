"""wkv7: the one entry to the RWKV-7 recurrence."""

from torch import Tensor

from ..recurrence.operation import Recurrence
from . import chunked, cpu, cuda, reference
from .reference import SIGNATURE

WKV7 = Recurrence(
    SIGNATURE, reference.wkv7, {"chunked": chunked.RECURRENCE, "cpu": cpu.RECURRENCE, "cuda": cuda.RECURRENCE}
)


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
    the CPU kernel's instruction set. All compute in float32, with one much faster exception: on a GPU, if r w k v a b
    are all bfloat16 and N is 64, products take bfloat16 operands, with float32 sums and state. float64 needs
    "reference", one step at a time, which "auto" takes for it, and so does forward-mode differentiation. Raises
    ValueError if arguments do not fit, RuntimeError if a named backend is unusable, NotImplementedError for
    forward mode of another backend than "reference".
    """
    return WKV7.compute((r, w, k, v, a, b), state, cu_seqlens, backend)


backends = WKV7.backends.reasons
