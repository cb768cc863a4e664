"""benchmarks/step.py books a recurrence's time under wkv, by the names of its autograd Functions."""

from types import SimpleNamespace

from rwkv_peft.ops.recurrence import Differentiable


def test_a_recurrence_is_booked_under_wkv(benchmark):
    function = Differentiable
    for name in (function.__name__, f"{function.__name__}Backward"):
        event = SimpleNamespace(name=name, input_shapes=[], cpu_parent=None)
        inside = SimpleNamespace(name="aten::copy_", input_shapes=[], cpu_parent=event)
        assert [benchmark("step").part_of(each, set()) for each in (event, inside)] == ["wkv", "wkv"]
