"""A run does its steps in the order of the docstring of training/loop.py, and a full GPU ends it with a remedy."""

import re
import sys

from rwkv_peft.training import loop
from training.runs import finish, start

TRACED = """
import sys

from rwkv_peft.cli.commands import run

FUNCTIONS = {functions}

def note(frame, event, argument):
    if event == "call":
        code, owner = frame.f_code, frame.f_locals.get("self")
        name = code.co_name if owner is None else f"{{NAMES.get(type(owner).__name__, 'other')}}.{{code.co_name}}"
        name = name.removesuffix(".__call__").removeprefix(".")
        if name in FUNCTIONS and "training" in code.co_filename:
            with open("{log}", "a") as log:
                log.write(name + "\\n")

NAMES = {{"Plain": "engine", "Validator": "run.validator", "Report": ""}}
sys.setprofile(note)
run("train")
"""


FULL = """
import torch

from rwkv_peft.cli.commands import run
from rwkv_peft.training import loop

def step(run, number, *others):
    if number == 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    return whole(run, number, *others)

torch.cuda.max_memory_allocated = lambda: 3 << 29
whole, loop.take_step = loop.take_step, step
run("train")
"""


def test_a_full_gpu_ends_a_run_with_the_peak_of_the_steps_before_and_the_remedy(files, command):
    (files / "full.py").write_text(FULL)
    _, err = finish(start([sys.executable, str(files / "full.py"), *command("full")[2:]]), 2)
    words = (
        "2.00 GiB more are needed; step 3 of 8 did not fit, and those before needed 1.5 GiB at most; lower --micro_bsz"
    )
    assert words in err and err.count("\n") == 1


def test_a_step_is_done_in_the_order_of_the_docstring(files, command):
    lines = re.findall(r"^    (\S[^A-Z]*?) {2,}\S", loop.__doc__, re.MULTILINE)
    functions = [name.strip() for line in lines for name in line.split(",")]
    assert len(functions) == 7, functions
    script, log = files / "traced.py", files / "calls.txt"
    script.write_text(TRACED.format(functions=functions, log=log))
    more = ("--epoch_steps", "2", "--epoch_count", "1", "--answer_rows", "0", "--val_split", "0.1", "--val_every", "1")
    finish(start([sys.executable, str(script), *command("traced", *more)[2:]]))
    assert log.read_text().split() == functions * 2
