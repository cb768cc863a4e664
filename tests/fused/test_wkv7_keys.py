"""wkv7 with its keys, norm, bonus and gate as one Function, through the CUDA kernels on the CPU (tests/cuda_shim):
against float64, every gradient."""

import pytest
import torch

from cuda_shim import wkv7_cases
from cuda_shim.cases import check_empty_ends, error, rms
from cuda_shim.running import built, mix_call, shim_kernels
from rwkv_peft.fused.wkv7_keys import wkv7_with_keys
from rwkv_peft.ops.mix import cpu
from rwkv_peft.ops.mix import cuda as mix_cuda
from rwkv_peft.ops.recurrence import checks
from rwkv_peft.ops.wkv7 import cuda, reference

pytestmark = pytest.mark.usefixtures("quiet_torch")

NAMES = ("out", "final state", "gr", "gw", "gk", "gv", "glow", "gg", "gstate")
GIVEN = 6  # of inputs_of: those that are no parameters
EPS = 64e-5


@pytest.fixture
def on_shim(monkeypatch):
    """Send CPU tensors through the CUDA kernels; tensors that they should fill begin as NaN -> the names of mix's
    kernels in the order of their launches."""
    mix, launched = built(mix_cuda.FAMILY), []

    def call(name, like, tensors, **sizes):
        launched.append(name)
        mix_call(name, like, tensors, **sizes)

    recurrence = shim_kernels("wkv7")
    monkeypatch.setattr(cpu, "call", call)
    monkeypatch.setattr(mix_cuda.FAMILY, "kernels", lambda device: mix)
    monkeypatch.setattr(cuda.FAMILY, "kernels", lambda device: recurrence)
    return launched


def inputs_of(case):
    """The case's r w k v, low and g; a0, k_k, k_a, r_k, weight and bias."""
    B, T, H, N = case.r.shape
    generator = torch.Generator().manual_seed(9)
    shapes = ((B, T, H, N), (B, T, H * N), *3 * [(1, 1, H * N)], (H, N), (H * N,), (H * N,))
    low, g, *parameters = (torch.randn(*shape, generator=generator).to(case.r.dtype) for shape in shapes)
    return [case.r, case.w, case.k, case.v, low, g, *parameters]


def fused(rows, keys, g, r_k, weight, bias, state, cu_seqlens):
    """wkv7_with_keys with a norm of these parameters."""
    norm = torch.nn.GroupNorm(r_k.shape[0], weight.numel(), eps=EPS).to(weight.dtype).requires_grad_(False)
    norm.weight.copy_(weight), norm.bias.copy_(bias)
    return wkv7_with_keys(rows, keys, g, r_k, norm, state, cu_seqlens)


def apply(function, leaves, state=None, cu_seqlens=None):
    """Call a function, which takes the arguments of `fused`, with tensors in inputs_of's order."""
    *rows, g, a0, k_k, k_a, r_k, weight, bias = leaves
    return function(tuple(rows), (a0, k_k, k_a), g, r_k, weight, bias, state, cu_seqlens)


def results(case, dtype, function):
    """out, final state and the gradients of rows, g and state, by NAMES."""
    inputs = inputs_of(case)
    leaves = [x.detach().to(dtype).requires_grad_(i < GIVEN) for i, x in enumerate(inputs)]
    state = (
        None
        if case.state is None
        else case.state.detach().clone().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    )
    out, final = apply(function, leaves, state, case.cu_seqlens)
    gout = case.gy.to(dtype).view(out.shape)
    if case.gfinal is None:
        out.backward(gout)
    else:
        torch.autograd.backward([out, final], [gout, case.gfinal.to(final.dtype)])
    found = [out.detach(), final.detach(), *(x.grad for x in (*leaves[:GIVEN], *([] if state is None else [state])))]
    return dict(zip(NAMES, found))


def plainly(rows, keys, g, r_k, weight, bias, state, cu_seqlens):
    """The same in plain torch, entirely in the rows' dtype."""
    r, w, k, v, low = rows
    a0, k_k, k_a = (x.view(k.shape[2:]) for x in keys)
    rate, n = torch.sigmoid(a0 + low), torch.nn.functional.normalize(k * k_k, dim=-1)
    k = k * (1 + (rate - 1) * k_a)
    loop = reference.wkv7 if v.dtype == torch.float64 else wkv7_cases._loop
    y, final = loop(r, w, k, v, -n, n * rate, state if state is None else state.to(v.dtype), cu_seqlens)
    B, T, H, N = y.shape
    normal = torch.nn.functional.group_norm(y.reshape(B * T, H * N), H, weight, bias, EPS).view(y.shape)
    return (normal + (r * k * r_k).sum(-1, keepdim=True) * v).view(g.shape) * g, final


@pytest.mark.parametrize(
    "B, T, lengths, with_state, group",
    [(2, 17, None, True, 0), (1, 1, None, False, 0), (1, 75, [1, 16, 33, 25], True, 0), (1, 130, None, True, 64)],
)
def test_every_result_is_as_exact_as_plain_torch(on_shim, monkeypatch, B, T, lengths, with_state, group):
    monkeypatch.setattr(cuda.WITH_KEYS, "group_of", lambda *_: group)
    case = wkv7_cases.make_case((B, T, 2, 64), torch.bfloat16, lengths=lengths, with_state=with_state, decay="mixed")
    ours = results(case, torch.bfloat16, fused)
    assert on_shim == ["bonus_gate_forward", "bonus_gate_backward"]
    true, plain = (results(case, dtype, plainly) for dtype in (torch.float64, torch.bfloat16))
    assert ours.keys() == true.keys()
    for name, x in ours.items():
        assert x.shape == true[name].shape
        bound = 2 * error(plain[name], true[name]) + 32 * torch.finfo(torch.float32).eps * rms(true[name])
        assert error(x, true[name]) <= bound, name


@pytest.mark.parametrize("group", [0, 64])
def test_empty_sequences_at_the_end_change_no_bit_of_the_others(on_shim, monkeypatch, group):
    """A recorded step has such sequences, because nobody can read its bounds."""
    monkeypatch.setattr(checks, "_has_values", lambda x: False)
    monkeypatch.setattr(cuda.WITH_KEYS, "group_of", lambda *_: group)
    raised = wkv7_cases.make_case((1, 147, 2, 64), torch.bfloat16, lengths=[1, 130, 16, 0, 0], seed=2)
    check_empty_ends(raised, lambda case: results(case, torch.bfloat16, fused))


def test_the_bonus_is_in_the_gradients(on_shim):
    """With a single token r has no gradient through the state, so that the bonus's part is large."""
    case = wkv7_cases.make_case((1, 1, 2, 64), torch.bfloat16, with_state=False)
    inputs = inputs_of(case)
    inputs[GIVEN + 3] = torch.zeros_like(inputs[GIVEN + 3])  # r_k
    leaves = [x.requires_grad_(i < 5) for i, x in enumerate(inputs)]
    apply(fused, leaves)[0].backward(case.gy.view(1, 1, -1))
    whole = results(case, torch.bfloat16, fused)
    assert all(
        (whole[f"g{name}"] - leaves[i].grad).norm() > 0.1 * whole[f"g{name}"].norm() for i, name in ((0, "r"), (2, "k"))
    )


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_the_results_alone(on_shim, which):
    """The final state's gradient needs no gate; without it, zeros are taken for it."""
    case = wkv7_cases.make_case((1, 5, 1, 64), torch.bfloat16)
    leaves = [x.requires_grad_(i < GIVEN) for i, x in enumerate(inputs_of(case))]
    apply(fused, leaves, case.state)[which].sum().backward()
    assert ("bonus_gate_backward" in on_shim) == (which == 0)
    assert all(x.grad.isfinite().all() for x in leaves[1 if which else 0 : 5])


def test_a_second_derivative_is_refused(on_shim):
    case = wkv7_cases.make_case((1, 3, 1, 64), torch.bfloat16)
    leaves = [x.requires_grad_(i < GIVEN) for i, x in enumerate(inputs_of(case))]
    out, _ = apply(fused, leaves)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.float().sum(), leaves[0], create_graph=True)


def test_without_gradients_nothing_is_kept_and_the_results_are_the_same(on_shim):
    case = wkv7_cases.make_case((1, 40, 2, 64), torch.bfloat16)
    with torch.no_grad():
        out, state = apply(fused, inputs_of(case), case.state)
    found = results(case, torch.bfloat16, fused)
    assert torch.equal(out, found["out"]) and torch.equal(state, found["final state"])
