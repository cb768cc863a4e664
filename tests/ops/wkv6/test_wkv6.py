"""wkv6: what its chunked form costs; bounds that are known without a reading, and instruction sets."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cuda_shim.cases import make_case
from rwkv_peft.ops.native import cpu
from rwkv_peft.ops.recurrence import signature
from rwkv_peft.ops.wkv6 import chunked, wkv6


def test_levels_for_bfloat16_need_a_compiler_that_knows_them(monkeypatch):
    best = cpu.best_level.__wrapped__
    if best() != "avx512bf16":
        pytest.skip("this machine's best level is another")
    monkeypatch.setattr(cpu, "AVX512BF16_FLAGS", ("-mno-such-instructions",))
    assert best() == "avx512"


def test_a_tensor_that_passed_is_not_read_again_until_it_changes():
    """As on a GPU, for which reading waits: a mark replaces the reading, also in a converted copy."""
    bounds = torch.tensor([0, 99], dtype=torch.int32)  # would not pass
    bounds._checked_bounds = 6, bounds._version
    signature.check_bounds("wkv6", signature.as_int64(bounds, 6), 6)
    for changed_bounds, tokens in ((bounds, 7), (bounds.add_(0), 6)):
        with pytest.raises(ValueError, match="it must start at 0"):
            signature.check_bounds("wkv6", signature.as_int64(changed_bounds, tokens), tokens)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_what_was_vouched_for_is_known_without_a_reading(dtype):
    """The meta device has no values to read."""
    bounds = torch.tensor([0, 3, 6], dtype=dtype)
    copy = bounds.to("meta")
    signature.vouch(copy, bounds, 6)
    assert signature.bounds_on_host(signature.as_int64(copy, 6)) == [0, 3, 6]


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
        case = make_case((1, T, 1, 64), torch.float32)
        leaves = [x.requires_grad_() for x in (*case.inputs, case.state)]
        with Operations() as operations:
            torch.autograd.backward(wkv6(*leaves, backend="chunked"), [case.gy, case.gfinal])
        counts[T] = operations.count
    assert 0 < counts[2048] - counts[1024] < 512  # half of one a token, forward and backward
    for B, tokens in ((1, 1024), (8, 128), (64, 128)):
        assert chunked.RECURRENCE.checkpoint_count(torch.empty(B, 4096, 1, 64, device="meta"), B) == B * 4096 // tokens
