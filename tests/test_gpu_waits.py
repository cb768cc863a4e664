"""A training step never waits for the GPU between its forward pass and the end of its backward pass: it finds values
that it needs on the CPU, before. Nor does a token that is drawn. Calls that wait are forbidden by name in the files of
both."""

import ast
from pathlib import Path

import pytest

import rwkv_peft

PACKAGE = Path(rwkv_peft.__file__).parent
FILES = [
    *("training/loop.py", "training/engine.py", "training/zero.py"),
    *(f"training/step/{name}.py" for name in ("steps", "segments", "context_parallel")),
    *(f"objectives/{path.name}" for path in (PACKAGE / "objectives").glob("*.py")),
    *("inference/batch.py", "inference/forward.py", "inference/sampling.py"),  # of a token that is drawn
    *("models/parts.py", "models/state.py"),
    *(f"models/{name}/model.py" for name in ("rwkv6", "rwkv7", "rwkv7a", "rwkv7b")),
    *(str(path.relative_to(PACKAGE)) for path in (PACKAGE / "adapters").rglob("*.py")),
    *(str(path.relative_to(PACKAGE)) for path in (PACKAGE / "ops").rglob("*.py") if path.parent.name != "native"),
]
# Each reads a tensor's values, has a shape that depends on them, or copies from memory that is not pinned.
WAITS = {
    *("item", "tolist", "cpu", "numpy", "new_tensor", "tensor", "as_tensor", "from_numpy", "synchronize"),
    *("nonzero", "argwhere", "unique", "masked_select", "repeat_interleave", "bincount", "is_nonzero"),
    *("equal", "allclose"),
}
ALLOWED = {
    ("inference/batch.py", "results", "synchronize"): "for the token before",
    ("inference/batch.py", "results", "tolist"): "of what was copied by then",
    ("inference/batch.py", "on_device", "tensor"): "on the CPU, which is pinned then",
    ("inference/forward.py", "prefill", "tensor"): "of prompts",
    ("inference/forward.py", "read_packed", "tensor"): "of prompts",
    ("inference/sampling.py", "most_probable", "nonzero"): "on a CPU: a GPU sorts nothing",
    ("inference/sampling.py", "sample", "as_tensor"): "of a tensor that is there",
    ("objectives/documents.py", "drawn_log_probabilities", "repeat_interleave"): "into a size that is told",
    ("objectives/documents.py", "head", "repeat_interleave"): "into a size that is told",
    ("objectives/grpo.py", "loss", "repeat_interleave"): "into a size that is told",
    ("training/engine.py", "step", "item"): "after the backward pass",
    ("training/loop.py", "add", "tolist"): "after the backward pass, once a step",
    ("training/step/context_parallel.py", "recomputed", "tolist"): "of seeds that the CPU drew",
    ("training/step/segments.py", "loss", "tolist"): "of seeds that the CPU drew",
    ("training/step/segments.py", "segments", "tensor"): "ranks agree on a number before forward, in stage 3 alone",
    ("training/step/segments.py", "end_of", "nonzero"): "of a batch on the CPU",
    ("training/step/segments.py", "part_of", "tolist"): "of a batch on the CPU",
    ("training/step/segments.py", "part_of", "new_tensor"): "of a batch on the CPU",
    ("models/state.py", "extended", "tolist"): "of packed rows behind states alone, which prompts are",
    ("models/state.py", "repeated", "repeat_interleave"): "by one number, which is no tensor",
    ("models/state.py", "state_tensors", "cpu"): "for a file",
    ("ops/recurrence/signature.py", "check_bounds", "tolist"): "of what nobody has vouched for",
    ("ops/recurrence/signature.py", "check_copy", "tolist"): "of a tensor on the CPU",
    ("ops/recurrence/signature.py", "bounds_on_host", "tolist"): "of a tensor on the CPU",
    ("ops/recurrence/signature.py", "one_by_one", "tolist"): "for the references",
}


def waits(file):
    """(function, name) of each call in a file that would wait."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITS:
                    yield function.name, node.func.attr


@pytest.mark.parametrize("file", FILES)
def test_no_call_in_a_step_waits_for_the_gpu(file):
    """If this fails: find the value on the CPU, before the step."""
    assert {(file, *call) for call in waits(file)} == {call for call in ALLOWED if call[0] == file}
