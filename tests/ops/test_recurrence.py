"""Laws of every recurrence: its contract with its callers and with torch. Each family's own test compares its backends
with float64."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rwkv_peft.ops.native import cpu
from rwkv_peft.ops.recurrence import signature
from rwkv_peft.ops.wkv6 import WKV6, wkv6
from rwkv_peft.ops.wkv7 import WKV7, wkv7

RECURRENCES = {
    op.signature.op: SimpleNamespace(run=run, op=op, rows=op.signature.rows, rest=(*op.signature.shared, "state"))
    for op, run in ((WKV6, wkv6), (WKV7, wkv7))
}


@pytest.fixture(params=RECURRENCES)
def wkv(request):
    """A recurrence: run(…), the letters of its inputs (B, T, H, N) in their order, and the names of the `rest`."""
    return RECURRENCES[request.param]


@pytest.fixture(params=("chunked", "cpu"))
def backend(request, wkv):
    """Each backend that works here."""
    if (reason := wkv.op.table[request.param].unavailable()) is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def inputs_of(wkv, B, T, H, N):
    g = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(B, T, H, N, generator=g) for name in wkv.rows}
    if "a" in inputs:
        inputs["a"] = -torch.nn.functional.normalize(inputs["a"], dim=-1)
        inputs["b"] = -0.5 * inputs["a"]
    shapes = {"u": (H, N), "state": (B, H, N, N)}
    return [*inputs.values(), *(0.5 * torch.randn(shapes[name], generator=g) for name in wkv.rest)]


def operator(wkv, direction):
    return getattr(torch.ops.rwkv_peft, f"{wkv.run.__name__}_{direction}")


def results(function, leaves, backend, gradients=(torch.ones_like, torch.ones_like)):
    """Outputs and the gradients of the leaves."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves, backend=backend)
    torch.autograd.backward(outputs, [make(y) for make, y in zip(gradients, outputs)])
    return [*outputs, *(x.grad for x in leaves)]


def turned(x):
    """The same numbers, not contiguous."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def test_nothing_is_kept_when_no_gradient_is_needed(wkv, backend):
    inputs, forward = inputs_of(wkv, 1, 200, 2, 64), operator(wkv, "forward")
    assert forward(*inputs, None, False, backend)[2].numel() == 0
    assert forward(*inputs, None, True, backend)[2].numel() > 0
    assert all(x.grad_fn is None for x in wkv.run(*inputs, backend=backend))


def test_strided_inputs_and_gradients(wkv, backend):
    inputs = inputs_of(wkv, 2, 12, 3, 8)
    strided = [turned(x) for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    plain = results(wkv.run, inputs, backend)
    for one, two in zip(plain, results(wkv.run, strided, backend, [lambda y: turned(torch.ones_like(y))] * 2)):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_mixed_precision_keeps_the_wider_type(wkv, backend, dtype):
    """Under autocast w is float32 beside narrow r, k and v; y and each gradient take their input's type."""
    names = (*wkv.rows, *wkv.rest)
    given = {
        name: x.to(dtype if name in "rkv" else x.dtype).requires_grad_()
        for name, x in zip(names, inputs_of(wkv, 1, 6, 2, 8))
    }
    y, final = wkv.run(**given, backend=backend)
    assert y.dtype == dtype and final.dtype == torch.float32
    torch.testing.assert_close(y, wkv.run(**given, backend="reference")[0])
    y.float().sum().backward()
    assert given["r"].grad.dtype == dtype and given["w"].grad.dtype == torch.float32


def test_a_nan_comes_through(wkv, backend):
    for i, name in enumerate(wkv.rows):
        inputs = inputs_of(wkv, 1, 40, 1, 8)
        inputs[i][0, 20, 0, 0] = float("nan")
        y, final = wkv.run(*inputs, backend=backend)
        assert not y[0, :16].isnan().any() and y[0, 20:].isnan().any()
        assert y[0, 21:].isnan().any() == final.isnan().any() == (name != "r"), name


def test_a_second_derivative_is_refused(wkv, backend):
    leaves = [x.requires_grad_() for x in inputs_of(wkv, 1, 4, 1, 8)]
    y, _ = wkv.run(*leaves, backend=backend)
    with pytest.raises(RuntimeError, match="no second derivative.*float64"):
        torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)


def test_blocks_that_are_recomputed_have_the_same_gradients(wkv, backend):
    plain = inputs_of(wkv, 2, 70, 2, 8)
    again = lambda *x, backend: checkpoint(wkv.run, *x, backend=backend, use_reentrant=False)  # noqa: E731
    assert all(map(torch.equal, results(wkv.run, plain, backend), results(again, plain, backend)))


def test_the_operators_keep_torchs_contract(wkv, backend):
    inputs = inputs_of(wkv, 1, 70, 2, 8)
    forward, backward = operator(wkv, "forward").default, operator(wkv, "backward").default
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (*inputs, None, True, backend), test_utils=utils)
    y, final, checkpoints = forward(*inputs, None, True, backend)
    torch.library.opcheck(backward, (*inputs, None, checkpoints, y, final, backend), test_utils=utils)
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.library.opcheck(forward, (*leaves, None, True, backend), test_utils=("test_autograd_registration",))


def test_fake_tensors_and_one_compiled_graph_pass_through(wkv, backend):
    inputs = inputs_of(wkv, 1, 20, 2, 8)
    with FakeTensorMode():
        rows = [torch.empty(2, 70, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in wkv.rows]
        y, final = wkv.run(*rows, *(torch.empty(2, 64) for name in wkv.rest if name == "u"), backend=backend)
        assert y.shape == (2, 70, 2, 64) and final.shape == (2, 2, 64, 64) and final.dtype == torch.float32
        y.sum().backward()
        assert rows[0].grad.shape == rows[0].shape
    compiled = torch.compile(wkv.run, fullgraph=True, backend="aot_eager")
    for one, two in zip(*(results(function, inputs, backend, [torch.cos] * 2) for function in (wkv.run, compiled))):
        assert torch.equal(one, two)


def test_bounds_that_only_a_compiled_graph_sees_are_checked_when_it_runs(wkv, backend):
    *inputs, _ = inputs_of(wkv, 1, 70, 1, 8)
    compiled = torch.compile(wkv.run, fullgraph=True, backend="aot_eager")
    good = torch.tensor([0, 20, 70])
    y, _ = compiled(*inputs, None, good, backend=backend)
    assert torch.equal(y, wkv.run(*inputs, None, good, backend=backend)[0])
    for bad in ([0, 80, 70], [0, 4_000_000, 70], [5, 20, 70]):
        with pytest.raises(ValueError, match="it must start at 0, increase, and end at 70"):
            compiled(*inputs, None, torch.tensor(bad), backend=backend)


@pytest.mark.parametrize("output", (0, 1))
def test_one_output_alone_can_be_differentiated(wkv, backend, output):
    found = []
    for name in ("reference", backend):
        leaves = [x.requires_grad_() for x in inputs_of(wkv, 1, 20, 2, 32)]
        wkv.run(*leaves, backend=name)[output].sum().backward()
        found.append([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_gradcheck_of_the_reference(wkv):
    leaves = [x.double().requires_grad_() for x in inputs_of(wkv, 2, 3, 1, 4)]
    assert torch.autograd.gradcheck(lambda *x: wkv.run(*x, backend="reference"), leaves)
    rows, bounds = len(wkv.rows), torch.tensor([0, 1, 3])
    packed = [x[:1].detach().requires_grad_() for x in leaves[:rows]] + leaves[rows:]
    assert torch.autograd.gradcheck(lambda *x: wkv.run(*x, bounds, backend="reference"), packed)
    few = [x[:1, :2, :1].detach().requires_grad_() for x in leaves[:rows]]
    few += [x.detach().requires_grad_() for x in leaves[rows:-1]]
    assert torch.autograd.gradgradcheck(lambda *x: wkv.run(*x, backend="reference"), few)


def changed(wkv, shape=(1, 6, 2, 8), **changes):
    """Good arguments (B = 1, T = 6, H = 2, N = 8, n = 1); of another shape, zeros, without a state."""
    given = dict(zip((*wkv.rows, *wkv.rest), inputs_of(wkv, 1, 6, 2, 8)))
    if shape != (1, 6, 2, 8):
        given = {name: torch.zeros(shape if name in wkv.rows else shape[2:]) for name in (*wkv.rows, *wkv.rest[:-1])}
    return given | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"v": torch.zeros(6, 2, 8)}, r"v has shape \(6, 2, 8\).*\(B, T, H, N\)"),
        ({"shape": (1, 0, 2, 8)}, "at least 1"),
        ({"r": torch.zeros(1, 5, 2, 8)}, r"r is \(1, 5, 2, 8\) and v \(1, 6, 2, 8\), .* must be \(1, 6, 2, 8\)"),
        ({"shape": (1, 6, 2, 6)}, "head size 6.*multiple of 4"),
        ({"shape": (1, 6, 1, 132)}, "head size 132.*128"),
        ({"state": torch.zeros(2, 2, 8, 8)}, r"state is \(2, 2, 8, 8\).*\(1, 2, 8, 8\)"),
        ({"cu_seqlens": torch.tensor([0, 2, 6])}, r"state is \(1, 2, 8, 8\).*\(2, 2, 8, 8\)"),
        ({"k": torch.zeros(1, 6, 2, 8, device="meta")}, r"k is torch.float32 on meta.*k\.to\('cpu'\)"),
        ({"k": torch.zeros(1, 6, 2, 8, dtype=torch.int64)}, r"k is torch.int64.*k\.float\(\)"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "int32 or int64"),
        ({"cu_seqlens": torch.tensor([0])}, r"\(n \+ 1,\)"),
        ({"shape": (2, 3, 2, 8), "cu_seqlens": torch.tensor([0, 3])}, "beside 2 rows"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"\[0, 5\] for 6 tokens.*end at 6"),
        ({"cu_seqlens": torch.tensor([1, 6])}, "start at 0"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "increase"),
        ({"cu_seqlens": torch.tensor([0, 3, 3, 6])}, "drop empty sequences"),
        ({"backend": "tpu"}, "'tpu' is unknown; take one of auto, reference, chunked, cpu, cuda"),
        *(({"backend": name}, f"'{name}' is unknown") for name in ("cpu:sse9", "auto:fast", "cuda:avx2")),
    ],
)
def test_arguments_that_do_not_fit_are_refused(wkv, changes, message):
    with pytest.raises(ValueError, match=message):
        wkv.run(**changed(wkv, **changes))


def test_float64_takes_the_reference_and_no_kernel(wkv, backend):
    arguments = {name: x.double() for name, x in changed(wkv).items()}
    assert {x.dtype for x in wkv.run(**arguments)} == {torch.float64}
    with pytest.raises(ValueError, match="float32, not torch.float64"):
        wkv.run(**arguments, backend=backend)


def test_a_named_backend_of_another_device_says_why_it_does_not_serve(wkv):
    missing = wkv.op.backends()["cuda"]
    words = re.escape(missing or "backend 'cuda' with tensors on cpu")
    with pytest.raises(RuntimeError if missing else ValueError, match=words):
        wkv.run(**changed(wkv), backend="cuda")


def test_auto_says_once_what_it_took_and_a_named_backend_never_falls_back(wkv, monkeypatch):
    monkeypatch.setattr(wkv.op.cpu, "unavailable", lambda level="": "no g++ on this machine; install one")
    wkv.op._resolve.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="takes backend 'chunked'.*no g\\+\\+.*install one"):
            wkv.run(**changed(wkv))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wkv.run(**changed(wkv))
        for name in ("cpu", "cpu:portable"):
            with pytest.raises(RuntimeError, match="cannot be used: no g\\+\\+"):
                wkv.run(**changed(wkv), backend=name)
    finally:
        wkv.op._resolve.cache_clear()


def test_backends_lists_every_name_and_looks_at_named_ones_alone(wkv, monkeypatch):
    found = wkv.op.backends()
    assert tuple(found) == ("reference", "chunked", "cpu", "cuda") and found["reference"] is None
    assert all(reason is None or ";" in reason for reason in found.values())
    monkeypatch.setattr(wkv.op.cpu, "unavailable", None)  # compiles if it is called
    assert wkv.op.backends("cuda") == {name: found[name] for name in ("reference", "cuda")}


def test_levels_for_bfloat16_need_a_compiler_that_knows_them(monkeypatch):
    best = cpu.best_level.__wrapped__
    if best() != "avx512bf16":
        pytest.skip("this machine's best level is another")
    monkeypatch.setattr(cpu, "AVX512BF16_FLAGS", ("-mno-such-instructions",))
    assert best() == "avx512"


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_bounds_that_passed_are_known_without_a_reading_until_they_change(dtype):
    """As on a GPU, for which reading waits; the meta device has no values to read."""
    bounds = torch.tensor([0, 3, 6], dtype=dtype)
    copy = bounds.to("meta")
    signature.check_copy(copy, bounds, 6)
    for known in (copy, signature.as_int64(copy, 6)):
        signature.check_bounds("wkv6", known, 6)
        assert signature.bounds_on_host(known) == [0, 3, 6]
    for unknown, tokens in ((copy, 7), (copy.add_(0), 6)):
        with pytest.raises(NotImplementedError):  # it is read
            signature.check_bounds("wkv6", unknown, tokens)


class Operations(TorchDispatchMode):
    """Counts the operations within it, without views."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        self.count += not operation.is_view
        return result


def test_the_chunked_form_takes_few_operations_a_token_and_keeps_little():
    """Each operation is a launch on a GPU; a step at a time takes 30 for each token. Beside its inputs the form keeps a
    state for every 1,024 tokens of one row, or for every 128 tokens of each of eight rows."""
    counts = {}
    for T in (1024, 2048):
        with Operations() as operations:
            results(wkv6, inputs_of(RECURRENCES["wkv6"], 1, T, 1, 64), "chunked")
        counts[T] = operations.count
    assert 0 < counts[2048] - counts[1024] < 512  # half of one a token, forward and backward
    for B, tokens in ((1, 1024), (8, 128), (64, 128)):
        assert WKV6.chunked.checkpoint_count(torch.empty(B, 4096, 1, 64, device="meta"), B) == B * 4096 // tokens
