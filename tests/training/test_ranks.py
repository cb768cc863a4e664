"""Several ranks and nodes, as commands on one machine's loopback: they meet, agree, and end together.

The nodes of a run are two processes that know each other by MASTER_ADDR alone.
"""

import re
import signal
import socket
import sys
import time

import psutil
import pytest

from training.held import held
from training.runs import finish, free_port, metrics, python_of, start, start_ranks, wait_for_steps, wait_for_words
from warm import CHILDREN

LONG = ("--precision", "fp32", "--epoch_steps", "20", "--epoch_count", "3", "--lr_init", "5e-3")
LONG += ("--strategy", "deepspeed_stage_2", "--lr_schedule", "constant")
PAIR = (*LONG, "--devices", "2")


def node(argv, number, port):
    argv = [*argv, "--num_nodes", "2"]
    return start(argv, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK=str(number))


def task(argv, number, port):
    """One of two tasks on two nodes, as srun starts them."""
    srun = {"STEP_NUM_TASKS": "2", "STEP_NUM_NODES": "2", "STEP_NODELIST": "localhost", "NODEID": str(number)}
    variables = {f"SLURM_{name}": value for name, value in srun.items()}
    return start([*argv, "--num_nodes", "2"], MASTER_PORT=port, SLURM_LOCALID="0", **variables)


def two_nodes(first, second):
    port = free_port()
    return [node(first, 0, port), node(second, 1, port)]


def children(process, count):
    """The child processes of a run, once there are `count`."""
    while len(found := psutil.Process(process.pid).children()) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return found


def is_over(process, seconds=60):
    """True if a process ends within so many seconds; it counts as ended even if nobody has read its exit code."""
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def history(files, name):
    return [[line[key] for key in ("step", "loss", "lr", "grad_norm")] for line in metrics(files, name)]


@pytest.fixture(scope="module")
def unbroken(files, command):
    """The losses of a run on two nodes; any other way to run two ranks, even with interruptions, gives the same."""
    argv = command("nodes", *LONG)
    for process in two_nodes(argv, argv):
        finish(process)
    lines = history(files, "nodes")
    assert len(lines) == 60 and lines[-1][1] < lines[0][1]
    return lines


def test_nodes_train_the_same_under_stage_3(files, command, unbroken):
    few = ("--epoch_steps", "8", "--epoch_count", "1")  # later, roundings grow
    argv = command("stage-3", *LONG, *few, "--strategy", "deepspeed_stage_3")
    for process in two_nodes(argv, argv):
        finish(process)
    lines = history(files, "stage-3")
    assert len(lines) == 8
    for mine, theirs in zip(lines, unbroken):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_nodes_that_disagree_end_with_one_message_that_names_the_flags_and_both_values(files, command):
    first = command("disagree", "--epoch_steps", "20", "--lr_init", "3e-3")
    second = command("disagree", "--epoch_steps", "10", "--lr_init", "1e-3")
    for process in two_nodes(first, second):
        _, err = finish(process, 2)
        assert err.count("\n") == 1 and "node 0 of 2" in err and "node 1 of 2" in err
        assert "--lr_init is 0.003 and 0.001; --epoch_steps is 20 and 10; give every node the same command" in err
    assert not (files / "disagree" / "metrics.jsonl").exists()


IMPATIENT = """
from rwkv_peft.cli.commands import run
from rwkv_peft.training.ranks import meeting

meeting.VISIBLE = 1.0
run("train")
"""


def test_a_folder_that_nodes_do_not_share_is_refused(files, command):
    (files / "impatient.py").write_text(IMPATIENT)
    here, there = ([sys.executable, str(files / "impatient.py"), *command(name)[2:]] for name in ("here", "there"))
    for process in two_nodes(here, there):
        _, err = finish(process, 2)
        assert err.count("\n") == 1 and "name a folder on a disk that all nodes share" in err
    assert [path.name for path in files.glob("*here/*")] == []


def test_a_node_that_is_refused_says_so_to_the_other(files, command):
    port = free_port()
    first = node(command("lonely"), 0, port)
    wait_for_words("waiting for node 1 of 2", first)
    second = node(command("lonely", "--data_file", str(files / "absent")), 1, port)
    assert "absent" in finish(second, 2)[1]
    _, err = finish(first, 2)
    assert err.startswith("error: rank 1 (node 1 of 2) on ") and "absent" in err


def test_waiting_is_told_and_ends(command):
    port = free_port()
    out, err = finish(node(command("late", "--join_minutes", "0.02"), 1, port), 75)
    assert f"waiting for node 0 of 2 at 127.0.0.1:{port}, 0 s" in out
    assert "node 0 of 2 at 127.0.0.1:" in err and "did not come within 0.02 minutes (--join_minutes)" in err
    process = node(command("late"), 0, port)
    wait_for_words("waiting for node 1 of 2", process)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = finish(process, 130)
    assert err == "interrupted; what was saved before is intact\n" and time.monotonic() - began < 60


def test_what_a_launcher_leaves_behind_and_a_taken_port_are_told(command):
    for variables, words in (
        ({"RANK": "1"}, "unset RANK"),
        ({"NODE_RANK": "x"}, "NODE_RANK is 'x'"),
        ({"NODE_RANK": "1"}, "unset NODE_RANK"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "give --devices 2"),
    ):
        _, err = finish(start(command("stray"), **variables), 2)
        assert words in err and err.count("\n") == 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        _, err = finish(start(command("stray", "--devices", "2"), MASTER_PORT=port), 75)
    assert f"MASTER_PORT {port} is taken by another process; set MASTER_PORT to a free one" in err


def test_a_dead_node_ends_the_other_within_a_minute(files, command):
    argv, port = command("dead", *LONG, "--epoch_count", "5000"), free_port()
    first, second = (task(argv, number, port) for number in range(2))
    wait_for_steps(files, "dead", 25, first)
    second.kill()
    began = time.monotonic()
    out, err = finish(first, 1)
    assert time.monotonic() - began < 60
    assert "error: rank 1 (node 1 of 2) has given no sign for" in err and "Traceback" not in err
    assert "the last checkpoint is" in err and "the same command with --resume goes on from there" in err
    second.communicate()


def test_no_process_outlives_the_one_that_started_it(files, command, unbroken):
    process = start(command("pair", *PAIR))
    (child,) = children(process, 1)
    process.kill()  # while the other starts up
    assert is_over(child)
    process.communicate()

    argv, hold = command("pair", *PAIR, "--resume", "auto"), files / "hold"
    process = start(held(argv, hold, 25))
    wait_for_steps(files, "pair", 25, process)
    (child,) = children(process, 1)
    process.kill()
    assert is_over(child)
    _, err = process.communicate()
    assert err.count("\n") == 1 and "rank 0, which had started the others, is gone; the last checkpoint is" in err

    out, _ = finish(start(argv))
    assert "resuming after step" in out
    assert history(files, "pair") == unbroken


def test_one_command_goes_on_through_restarts(files, command, unbroken):
    """A rank is killed before the first checkpoint, and the same command is started again; then torchrun starts it, and
    restarts it after a rank is killed after a checkpoint."""
    argv, hold = command("restarts", *PAIR, "--resume", "auto"), files / "hold"
    first, second = start_ranks(held(argv, hold, 1))
    wait_for_steps(files, "restarts", 1, first)
    second.kill()
    second.communicate()
    hold.unlink()
    finish(first, 1)
    (files / "restarts" / "adapter-best.safetensors").write_bytes(b"of a run that died before its first checkpoint")
    torchrun = [sys.executable, str(CHILDREN), "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "1"]
    torchrun += ["--monitor_interval", "0.1", "--master_port", free_port()]
    process = start([*torchrun, *held(argv, hold, 25)[1:]], PYTHON_EXEC=python_of(argv))
    wait_for_steps(files, "restarts", 25, process)
    children(process, 2)[0].kill()
    hold.unlink()
    out, err = finish(process)
    assert "resuming after step" in out and history(files, "restarts") == unbroken
    assert not (files / "restarts" / "adapter-best.safetensors").exists()


HANGING = """
import time

from rwkv_peft.cli.commands import run
from rwkv_peft.training.step.steps import Whole
from rwkv_peft.training.ranks.watch import Watch

loss, moved, steps = Whole.loss, Watch.moved, iter({pauses})

def slowly(self, *batch):
    time.sleep(next(steps, 0))
    return loss(self, *batch)

def from_the_first_step_on(self, doing):
    if doing != "the start":  # which takes long on a busy machine
        moved(self, doing)

Whole.loss, Watch.moved = slowly, from_the_first_step_on
run("train")
"""


def test_a_rank_that_hangs_ends_all_and_says_where_and_a_slow_one_does_not(files, command):
    """Three steps take a third of the limit each, and so more than it together, and one never ends."""
    argv, port, processes = command("hanging", *LONG, "--stall_minutes", "0.12")[2:], free_port(), []
    for number, pauses in enumerate(([], [2.5, 2.5, 2.5, 1e6])):
        script = files / f"hanging-{number}.py"
        script.write_text(HANGING.format(pauses=pauses))
        processes.append(node([sys.executable, str(script), *argv], number, port))
    wait_for_steps(files, "hanging", 3, processes[0])
    began = time.monotonic()
    for process in processes:
        _, err = finish(process, 1)
        assert "error: nothing has moved for 0.12 minutes (--stall_minutes): " in err and "Traceback" not in err
        place = r"is at step 4, in step/lit.py, line \d+"
        assert re.search(rf"rank 0 \(node 0 of 2\) {place} \(ask_ranks\); ", err), err
        assert re.search(rf"rank 1 \(node 1 of 2\) {place} \(training_step\)", err)
        assert "no checkpoint had been saved yet" in err
    assert time.monotonic() - began < 60
