"""wkv7's contract with its callers and with torch: valid arguments, refusals, dtypes, one graph."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from rwkv_peft.ops.wkv7 import backends, cpu, wkv7
from rwkv_peft.ops.wkv7.op import WKV7

BACKENDS = ("chunked", "cpu")


def random_inputs(B, T, H, N):
    g = torch.Generator().manual_seed(0)
    r, w, k, v, a = (torch.randn(B, T, H, N, generator=g) for _ in range(5))
    a = torch.nn.functional.normalize(a, dim=-1)
    return [r, w, k, v, -a, 0.5 * a, 0.5 * torch.randn(B, H, N, N, generator=g)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend that works here."""
    reason = backends()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def test_nothing_is_kept_when_no_gradient_is_needed(backend):
    inputs = random_inputs(1, 200, 2, 64)
    forward = torch.ops.rwkv_peft.wkv7_forward
    assert forward(*inputs, None, False, backend)[2].numel() == 0
    assert forward(*inputs, None, True, backend)[2].numel() > 0
    y, final = wkv7(*inputs, backend=backend)
    assert y.grad_fn is None and final.grad_fn is None


def test_strided_inputs_and_gradients(backend):
    results = []
    for stride in (False, True):
        leaves = random_inputs(2, 12, 3, 8)
        if stride:
            leaves = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in leaves[:6]]
            leaves.append(random_inputs(2, 12, 3, 8)[6].transpose(2, 3).contiguous().transpose(2, 3))
            assert not any(x.is_contiguous() for x in leaves)
        leaves = [x.detach().requires_grad_() for x in leaves]
        y, final = wkv7(*leaves, backend=backend)
        gradients = [torch.ones_like(x) for x in (y, final)]
        if stride:
            gradients = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in gradients]
        torch.autograd.backward([y, final], gradients)
        results.append([y, final, *(x.grad for x in leaves)])
    for one, two in zip(*results):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_mixed_precision_keeps_the_wider_type(backend, dtype):
    """Under autocast w is float32 beside narrow r, k and v; y and each gradient take their input's type."""
    r, w, k, v, a, b, state = random_inputs(1, 6, 2, 8)
    r, k, v = (x.to(dtype).requires_grad_() for x in (r, k, v))
    w = w.requires_grad_()
    y, final = wkv7(r, w, k, v, a, b, state, backend=backend)
    assert y.dtype == dtype and final.dtype == torch.float32
    expected, _ = wkv7(r, w, k, v, a, b, state, backend="reference")
    torch.testing.assert_close(y, expected)
    y.float().sum().backward()
    assert r.grad.dtype == dtype and w.grad.dtype == torch.float32


def test_nan_comes_through(backend):
    for i in range(6):
        inputs = random_inputs(1, 40, 1, 8)
        inputs[i][0, 20, 0, 0] = float("nan")
        y, final = wkv7(*inputs, backend=backend)
        assert not y[0, :16].isnan().any() and y[0, 20].isnan().any()
        assert y[0, 21:].isnan().any() == final.isnan().any() == (i > 0)


def test_a_second_derivative_is_refused(backend):
    leaves = [x.requires_grad_() for x in random_inputs(1, 4, 1, 8)]
    y, _ = wkv7(*leaves, backend=backend)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*backend='reference'"):
        gradient.sum().backward()


def test_forward_mode_is_refused_but_by_the_reference(backend):
    r, *others = random_inputs(1, 5, 2, 8)
    tangent = torch.randn_like(r)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(r, tangent)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative; take backend='reference'"):
            wkv7(dual, *others, backend=backend)
        found = forward_ad.unpack_dual(wkv7(dual, *others, backend="reference")[0]).tangent
    torch.testing.assert_close(found, wkv7(tangent, *others)[0])  # y is linear in r


def test_the_operators_keep_torchs_contract(backend):
    inputs = random_inputs(1, 70, 2, 8)
    forward, backward = torch.ops.rwkv_peft.wkv7_forward.default, torch.ops.rwkv_peft.wkv7_backward.default
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (*inputs, None, True, backend), test_utils=utils)
    y, final, checkpoints = forward(*inputs, None, True, backend)
    torch.library.opcheck(backward, (*inputs, None, checkpoints, y, final, backend), test_utils=utils)
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.library.opcheck(forward, (*leaves, None, True, backend), test_utils=("test_autograd_registration",))


def test_fake_tensors_and_one_compiled_graph_pass_through(backend):
    with FakeTensorMode():
        leaves = [torch.empty(2, 70, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(6)]
        y, final = wkv7(*leaves, backend=backend)
        assert y.shape == (2, 70, 2, 64) and final.shape == (2, 2, 64, 64) and final.dtype == torch.float32
        y.sum().backward()
        assert leaves[0].grad.shape == leaves[0].shape

    results = []
    for function in (wkv7, torch.compile(wkv7, fullgraph=True, backend="aot_eager")):
        leaves = [x.requires_grad_() for x in random_inputs(1, 20, 2, 8)]
        y, final = function(*leaves, backend=backend)
        (y.square().sum() + final.sum()).backward()
        results.append([y, final, *(x.grad for x in leaves)])
    for one, two in zip(*results):
        assert torch.equal(one, two)


def test_bounds_that_only_a_compiled_graph_sees_are_checked_when_it_runs(backend):
    inputs = random_inputs(1, 70, 1, 8)[:6]
    compiled = torch.compile(wkv7, fullgraph=True, backend="aot_eager")
    good = torch.tensor([0, 20, 70])
    y, _ = compiled(*inputs, None, good, backend=backend)
    assert torch.equal(y, wkv7(*inputs, None, good, backend=backend)[0])
    for bad in ([0, 80, 70], [5, 20, 70]):
        with pytest.raises(ValueError, match="it must start at 0, increase, and end at 70"):
            compiled(*inputs, None, torch.tensor(bad), backend=backend)


SEQUENCES = ("r", "w", "k", "v", "a", "b")


def changed(**changes):
    """Good arguments of wkv7 (B = 1, T = 6, H = 2, N = 8) with some of them replaced."""
    return {**dict(zip((*SEQUENCES, "state"), random_inputs(1, 6, 2, 8))), **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"v": torch.zeros(6, 2, 8)}, r"v has shape \(6, 2, 8\).*\(B, T, H, N\)"),
        ({"a": torch.zeros(1, 5, 2, 8)}, r"a is \(1, 5, 2, 8\) and v \(1, 6, 2, 8\); r w k v a b share one"),
        ({x: torch.zeros(1, 0, 2, 8) for x in SEQUENCES}, "at least 1"),
        ({x: torch.zeros(1, 6, 2, 6) for x in SEQUENCES}, "head size 6.*multiple of 4"),
        ({x: torch.zeros(1, 6, 1, 132) for x in SEQUENCES}, "head size 132.*128"),
        ({"state": torch.zeros(2, 2, 8, 8)}, r"state is \(2, 2, 8, 8\).*rows the value dimension: \(1, 2, 8, 8\)"),
        ({"k": torch.zeros(1, 6, 2, 8, device="meta")}, r"k is on meta.*k\.to\('cpu'\)"),
        ({"b": torch.zeros(1, 6, 2, 8, dtype=torch.int64)}, r"b is torch.int64.*b\.float\(\)"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"\[0, 5\] for 6 tokens.*end at 6"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "increase"),
        ({"cu_seqlens": torch.tensor([0, 2, 6])}, r"state is \(1, 2, 8, 8\).*\(2, 2, 8, 8\)"),
        ({"cu_seqlens": [0, 6]}, r"cu_seqlens is a list; give a tensor"),
        ({x: torch.zeros(2, 3, 2, 8) for x in SEQUENCES} | {"cu_seqlens": torch.tensor([0, 3])}, "B is 2 with cu_seq"),
        ({"backend": "tpu"}, "'tpu' is unknown; take one of auto, reference, chunked"),
        ({"backend": "chunked:avx2"}, "'chunked:avx2' is unknown"),
        ({"backend": "cpu:sse9"}, "'cpu:sse9' is unknown"),
        ({"backend": None}, "None is unknown"),
        (
            {x: torch.zeros(1, 6, 2, 8).double() for x in SEQUENCES} | {"backend": "chunked"},
            "float32, not torch.float64",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        wkv7(**changed(**changes))


def test_auto_says_once_what_it_took_and_a_named_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(cpu.RECURRENCE, "unavailable", lambda level="": "no g++ on this machine; install one")
    WKV7.backends._resolve.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="takes backend 'chunked'.*no g\\+\\+.*install one"):
            wkv7(**changed())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wkv7(**changed())
        for name in ("cpu", "cpu:portable"):
            with pytest.raises(RuntimeError, match="cannot be used: no g\\+\\+"):
                wkv7(**changed(), backend=name)
    finally:
        WKV7.backends._resolve.cache_clear()


def test_float64_takes_the_reference():
    y, final = wkv7(**{name: x.double() for name, x in changed().items()})
    assert y.dtype == final.dtype == torch.float64


def test_backends_lists_every_name():
    found = backends()
    assert tuple(found) == ("reference", *BACKENDS, "cuda") and found["reference"] is None
    assert all(reason is None or ";" in reason for reason in found.values())
