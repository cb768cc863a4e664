"""A run does its steps in the order of the docstring of training/engine/trainer.py, and no copy at its end."""

import re
import sys

from rwkv_peft.training.engine import trainer
from training.runs import finish, start

TRACED = """
import sys

from rwkv_peft.cli.commands import run

METHODS = {methods}

def note(frame, event, argument):
    if event == "call" and "self" in frame.f_locals:
        name = f"{{type(frame.f_locals['self']).__name__}}.{{frame.f_code.co_name}}"
        if name in METHODS and (not called or called[-1] != name):  # not what a method calls of its own base
            called.append(name)
            with open("{log}", "a") as log:
                log.write(name + "\\n")

called = []
sys.setprofile(note)
run("train")
"""


FULL = """
import torch

from rwkv_peft.cli.commands import run
from rwkv_peft.training.step.lit import Lit

def step(lit, *batch):
    if lit.step == 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    return whole(lit, *batch)

torch.cuda.max_memory_allocated = lambda: 3 << 29
whole, Lit.training_step = Lit.training_step, step
run("train")
"""


def test_a_full_gpu_ends_a_run_with_the_peak_of_the_steps_before_and_the_remedy(files, command):
    (files / "full.py").write_text(FULL)
    _, err = finish(start([sys.executable, str(files / "full.py"), *command("full")[2:]]), 2)
    words = (
        "2.00 GiB more are needed; step 3 of 8 did not fit, and those before needed 1.5 GiB at most; lower --micro_bsz"
    )
    assert words in err and err.count("\n") == 1


def test_a_step_is_done_in_the_order_of_the_table(files, command):
    methods = re.findall(r"^    (\w+\.\w+) ", trainer.__doc__, re.MULTILINE)
    assert len(methods) > 10
    never = "Lit.cpu"  # Lightning's teardown moves the module to main memory
    script, log = files / "traced.py", files / "calls.txt"
    script.write_text(TRACED.format(methods=[*methods, never], log=log))
    more = ("--epoch_steps", "2", "--epoch_count", "1", "--answer_rows", "0")
    finish(start([sys.executable, str(script), *command("traced", *more)[2:]]))
    assert log.read_text().split() == methods * 2
