"""Functions are marked for torch.compile as torch itself marks them, without importing the compiler."""

import subprocess
import sys

import torch

from rwkv_peft.ops.native.calls import constant_when_compiled


def test_the_mark_is_that_of_torch():
    def ours():
        pass

    def theirs():
        pass

    assert vars(constant_when_compiled(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_the_result_is_a_constant_of_the_graph():
    calls = []

    @constant_when_compiled
    def factor():
        calls.append(1)
        return 3.0 if len(calls) == 1 else 5.0

    compiled = torch.compile(lambda x: x * factor(), backend="eager", fullgraph=True)
    x = torch.ones(2)
    assert torch.equal(compiled(x), 3 * x) and torch.equal(compiled(x), 3 * x)


def test_importing_models_and_adapters_leaves_the_compiler_alone():
    code = "import sys; import rwkv_peft.adapters.inject, rwkv_peft.models; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
