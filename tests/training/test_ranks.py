"""Several ranks and nodes, as commands on one machine's loopback: they meet, agree, and end together.

The nodes of a run are two processes that know each other by MASTER_ADDR alone.
"""

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import warm
from rwkv_peft.checkpoints.lock import LOCK, alone_in, holder
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import TrainConfig
from rwkv_peft.training.ranks import group
from rwkv_peft.training.ranks.world import LOOPBACK, World
from training.held import held
from training.runs import finish, free_port, metrics, python_of, start, start_ranks, wait_for_steps, wait_for_words
from warm import CHILDREN

LONG = ("--precision", "fp32", "--epoch_steps", "20", "--epoch_count", "3", "--lr_init", "5e-3")
LONG += ("--strategy", "deepspeed_stage_2", "--lr_schedule", "constant")
PAIR = (*LONG, "--devices", "2")
STEPS = 20
ELASTIC = ("--precision", "fp32", "--epoch_steps", str(STEPS), "--epoch_count", "1", "--save_every", "4")
ELASTIC += ("--num_nodes", "2", "--lr_schedule", "constant", "--lr_init", "5e-3", "--resume", "auto")
HURRY = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=8"  # torchrun waits for 30 and 15 s itself


def two_nodes(first, second):
    """Start a command on each of two nodes, which launches the ranks there."""
    place = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": free_port()}
    return [
        start([*argv, "--num_nodes", "2"], **place, NODE_RANK=str(node)) for node, argv in enumerate((first, second))
    ]


def two_tasks(argv):
    """Start the ranks of one node as srun does, one a task."""
    srun = {"JOB_ID": free_port(), "STEP_NUM_TASKS": "2", "STEP_NUM_NODES": "1", "STEP_NODELIST": "localhost"}
    variables = {f"SLURM_{name}": value for name, value in srun.items()} | {"MASTER_PORT": srun["JOB_ID"]}
    return [start(argv, SLURM_LOCALID=str(rank), **variables) for rank in range(2)]


def children(process, count):
    """The child processes of a command, once there are `count`."""
    while len(found := psutil.Process(process.pid).children()) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return found


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


def test_ranks_of_every_launcher_train_the_same(files, command, unbroken):
    out, err = finish(start(command("devices", *PAIR)))
    assert "machine   1 x 2 cpu" in out and out.count("finished") == 1 and err == ""
    for process in two_tasks(command("tasks", *PAIR)):
        finish(process)
    assert history(files, "devices") == history(files, "tasks") == unbroken


def test_nodes_that_disagree_end_with_one_message_that_names_the_flags_and_both_values(files, command):
    first = command("disagree", "--epoch_steps", "20", "--lr_init", "3e-3")
    second = command("disagree", "--epoch_steps", "10", "--lr_init", "1e-3")
    for process in two_nodes(first, second):
        _, err = finish(process, 2)
        assert err.count("\n") == 1 and "node 0 of 2" in err and "node 1 of 2" in err
        assert "--lr_init is 0.003 and 0.001; --epoch_steps is 20 and 10; give every node the same command" in err
    assert not (files / "disagree" / "metrics.jsonl").exists()


# A launcher and its ranks, the second of which does something before its fourth step
FAULTY = """
import os, sys, time

import torch
import torch.distributed as dist

from rwkv_peft.cli.commands import run
from rwkv_peft.cli.errors import NotNow, UserError
from rwkv_peft.training import loop
from rwkv_peft.training.ranks import group

def start(run, step, *others):
    if os.environ["RANK"] == "1" and step == 3:
        {fault}
    return begin(run, step, *others)

group.VISIBLE = 1.0
begin, loop.take_step = loop.take_step, start
group.python_command = lambda package, name, *argv: [sys.executable, __file__, *argv]
run("train")
"""


@pytest.fixture
def faulty(files, command):
    """(a run's name, its fault, flags) -> the command."""

    def build(name, fault, *flags):
        (files / f"{name}.py").write_text(FAULTY.format(fault=fault))
        return [sys.executable, str(files / f"{name}.py"), *command(name, *LONG, *flags)[2:]]

    return build


def test_a_folder_that_nodes_do_not_share_is_refused(files, faulty):
    for process in two_nodes(*(faulty(name, "pass") for name in ("here", "there"))):
        _, err = finish(process, 2)
        assert err.count("\n") == 1 and "name a folder on a disk that all nodes share" in err
    assert [path.name for path in files.glob("*here/*")] == []


SAID = "--flag 5: the rule; the remedy"
GOES_ON = "no checkpoint had been saved yet that --resume could go on from\n"


@pytest.mark.parametrize(
    "name, fault, code, last",
    [
        ("mistake", f"raise UserError('{SAID}')", 2, f"error: {SAID}\n"),
        ("for-now", f"raise NotNow('{SAID}')", 75, f"error: {SAID}\n"),
        ("bug", "1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("killed", "os.kill(os.getpid(), 9)", 1, f"error: rank 1 was ended by SIGKILL; {GOES_ON}"),
        ("hung", "time.sleep(1e6)", 76, f"; --timeout_minutes is 0.1), whose output says why; {GOES_ON}"),
    ],
)
def test_a_rank_that_fails_ends_the_other_and_its_message_comes_last_with_its_code(faulty, name, fault, code, last):
    limit = ("--timeout_minutes", "0.1") if name == "hung" else ()
    _, err = finish(start(faulty(name, fault, "--devices", "2", *limit)), code)
    assert err.endswith(last) and ("Traceback" in err) is (name == "bug")


@pytest.mark.parametrize(
    "name, fault, codes, words",
    [
        ("mistaken-node", f"raise UserError('{SAID}')", (2, 2), f" ended: {SAID}\n"),
        ("killed-node", "os.kill(os.getpid(), 9)", (76, 1), f", whose output says why; {GOES_ON}"),
    ],
)
def test_a_rank_that_fails_ends_those_of_the_other_node(faulty, name, fault, codes, words):
    first, second = two_nodes(*[faulty(name, fault)] * 2)
    assert finish(second, codes[1])[1].count("error: ") == 1
    _, err = finish(first, codes[0])
    assert err.endswith(words) and err.count("\n") == 1


def test_refusals_of_ranks_are_those_of_one_process(files, command):
    _, err = finish(start(command("pair", *PAIR, "--data_file", str(files / "absent"))), 2)
    assert err.startswith("error: ") and "absent" in err and err.count("\n") == 1
    with alone_in(files / "pair"):
        _, err = finish(start(command("pair", *PAIR)), 75)
    assert "a run is training there" in err and err.count("\n") == 1


def test_a_node_that_waits_in_vain_says_so_and_ctrl_c_ends_it(command):
    place = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": free_port(), "NODE_RANK": "1"}
    argv = [*command("late"), "--num_nodes", "2"]
    _, err = finish(start([*argv, "--join_minutes", "0.02"], **place), 75)
    assert f"did not meet at {LOOPBACK}:" in err and "within 0.02 minutes (--join_minutes)" in err
    process = start(argv, **place | {"NODE_RANK": "0"})
    wait_for_words("ranks     2 nodes meet at", process)
    process.send_signal(signal.SIGINT)
    finish(process, -signal.SIGINT)


@pytest.mark.parametrize("name", ["launcher", "rank-0"])  # Ctrl-C, and the page's Stop
def test_ctrl_c_once_saves_and_stops_all_ranks_and_twice_ends_them(files, command, name):
    argv, hold = command(name, *PAIR, "--resume", "auto"), files / "hold"
    for times in (1, 2, 3)[: 3 if name == "launcher" else 2]:
        done = 3 * times
        process = start(held(argv, hold, done))
        wait_for_steps(files, name, done, process)
        ranks = children(process, 2) if name == "launcher" else []
        pid = process.pid if name == "launcher" else holder(files / name / LOCK)["process"]
        psutil.Process(pid).send_signal(signal.SIGINT)
        wait_for_words("stopping after this step", process)
        if times == 1:
            hold.unlink()
            out, err = finish(process, 130)
            assert f"stopped after {done + 1} of 60 steps, saved in" in out and err == ""
        else:
            for rank in ranks[1:]:  # which then hears nothing
                rank.suspend()
            psutil.Process(pid).send_signal(signal.SIGINT)
            if times == 3:
                psutil.wait_procs(ranks[:1], 600)
                psutil.Process(pid).send_signal(signal.SIGINT)
            _, err = finish(process, 130)
            assert not any(rank.is_running() for rank in ranks)
            assert err == "interrupted; what was saved before is intact\n"
    assert [path.name for path in (files / name / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_rank_that_waits_for_another_ends_with_it_upon_a_second_signal(faulty):
    """No handler of Python's runs while a collective waits. The signals differ, because equal ones may become one."""
    ranks = start_ranks(faulty("deaf", "print('waits', flush=True); dist.recv(torch.zeros(1), 0)", "--devices", "2"))
    wait_for_words("waits", ranks[1])
    for number in (signal.SIGINT, signal.SIGTERM):
        ranks[1].send_signal(number)
    errors = [process.communicate(timeout=1800)[1] for process in ranks]
    assert ranks[0].returncode == ranks[1].returncode and ranks[0].returncode in group.ASKED
    assert errors == ["", "interrupted; what was saved before is intact\n"]


def test_no_rank_outlives_its_launcher(files, command):
    process = start(command("orphans", *PAIR, "--epoch_count", "5000"), cold=True)
    ranks = children(process, 2)
    wait_for_steps(files, "orphans", 1, process)
    process.kill()
    _, left = psutil.wait_procs(ranks, 600)
    assert not left
    process.communicate()


def test_one_command_goes_on_through_restarts(files, command, unbroken):
    """A rank is killed before the first checkpoint, and the same command is started again; then torchrun starts it, and
    restarts it after a rank is killed after a checkpoint."""
    argv, hold = command("restarts", *PAIR, "--resume", "auto"), files / "hold"
    first, second = start_ranks(held(argv, hold, 1))
    wait_for_steps(files, "restarts", 1, first)
    second.kill()
    second.communicate()
    hold.unlink()
    finish(first, 76)
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # a thread that would exit
def test_meeting_and_collectives_have_limits_of_their_own_and_the_first_failure_counts(tmp_path, monkeypatch):
    """Two ranks in one process: NCCL fetches its id from a store that waits as long as a collective does."""
    ends, kept = [], []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: kept.append(how))
    monkeypatch.setattr(group.os, "_exit", lambda code: ends.append(code) or sys.exit())
    monkeypatch.setattr(group, "PERIOD", 0.01)
    monkeypatch.setattr(group.signal, "signal", lambda *_: None)
    train = TrainConfig(devices=2, timeout_minutes=7.0, join_minutes=5.0, proj_dir=str(tmp_path))
    worlds = [World(1, 2, rank, LOOPBACK, int(free_port()), launches=False) for rank in range(2)]
    worlds[1] = World(1, 2, 1, LOOPBACK, worlds[0].port, launches=False)
    ranks = [group.Ranks(world, train, torch.device("cpu")) for world in worlds]
    threads = [threading.Thread(target=rank.__enter__) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hang = threading.Event()
    monkeypatch.setattr(group, "gathered", lambda value: hang.wait() and [value])
    leaving = threading.Thread(target=ranks[0].leave, args=(0,))  # it is done, and waits for rank 1
    leaving.start()
    assert ranks[0].leaving.wait()
    assert [how["timeout"] for how in kept] == [how["store"].timeout for how in kept] == [timedelta(minutes=7)] * 2
    with pytest.raises(SystemExit):
        ranks[1].fail(UserError(SAID))
    while len(ends) < 2:
        time.sleep(0.01)
    hang.set()
    leaving.join()
    assert ends == [2, 2]


def test_a_save_may_take_as_long_as_a_collective_before_ranks_are_killed(tmp_path):
    config = group.agent_config(World(1, 2), TrainConfig(devices=2), str(tmp_path))
    assert (config.shutdown_timeout, config.nproc_per_node, config.max_restarts) == (3600, 2, 0)


@pytest.mark.parametrize("cores, asked, threads", [(16, None, "2"), (4, None, "1"), (16, "5", "5")])
def test_ranks_share_the_cores_of_their_machine(monkeypatch, cores, asked, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", asked or "")  # so that it is as before after the test
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr("logging.disable", lambda level: None)  # for the rest of the process
    seen = []
    monkeypatch.setattr(
        "torch.distributed.launcher.api.elastic_launch",
        lambda *_: lambda *_: seen.append(os.environ["OMP_NUM_THREADS"]),
    )
    assert group.launch(World(1, 8), [], TrainConfig(devices=8)) == 0 and seen == [threads]


def test_of_several_failures_the_cause_is_reported(tmp_path, capsys):
    def ended(code, at=5):
        return SimpleNamespace(exitcode=code, timestamp=at, signal_name=lambda: "SIGSEGV")

    for failures, code in (
        ({0: ended(76), 1: ended(2)}, 2),
        ({0: ended(143), 1: ended(75)}, 75),
        ({0: ended(-15), 1: ended(1, 9)}, 1),
        ({0: ended(76)}, 76),
        ({0: ended(130), 1: ended(143)}, 130),
    ):
        assert group.report(failures, World(1, 2), tmp_path) == code and capsys.readouterr().err == ""
    assert group.report({0: ended(76, 4), 1: ended(-11)}, World(1, 2), tmp_path) == 1
    assert capsys.readouterr().err.startswith("error: rank 1 was ended by SIGSEGV; ")


def torchrun(argv, port, folder):
    """Start an agent of torchrun, a node of one rank that meets the others at a port; folder is for what it leaves."""
    agent = ["--nnodes", "1:2", "--nproc_per_node", "1", "--max_restarts", "3", "--local_addr", "127.0.0.1"]
    agent += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_conf", HURRY]
    variables = {"PYTHON_EXEC": warm.python(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TMPDIR": str(folder)}
    return start([sys.executable, "-m", "torch.distributed.run", *agent, *argv], cold=True, **variables)


def lose(process):
    """Kill an agent and the rank that it started, as if their node were gone."""
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)  # so that it starts nobody anew
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            warm.send(one.pid, signal.SIGKILL)


def test_a_run_goes_on_as_a_node_joins_and_is_lost(files, command, train):
    """A node begins, another joins, upon which the run saves and goes on on both; the second is killed, and the first
    goes on alone from the last checkpoint."""
    port, hold = free_port(), files / "hold"
    argv = held(command("elastic", *ELASTIC), hold, 3)[1:]
    first, second = torchrun(argv, port, files), None
    try:
        wait_for_steps(files, "elastic", 3, first)
        second = torchrun(argv, port, files)
        wait_for_words("stopping after this step", first)
        hold.write_text("10")
        wait_for_words("machine   2 x 1 cpu", first)
        wait_for_words("resuming after", first)
        wait_for_steps(files, "elastic", 10, first)
        lose(second)
        hold.unlink()
        out, _ = finish(first)
    finally:
        for process in filter(None, (first, second)):
            lose(process)
    assert "--accumulate_grad_batches 2: a step has 2 samples" in out
    assert "resuming after" in out
    train("stayed", *ELASTIC, "--num_nodes", "1", "--accumulate_grad_batches", "2")
    lines = [[(line["step"], line["samples"]) for line in metrics(files, name)] for name in ("stayed", "elastic")]
    assert lines[1] == lines[0] and len(lines[0]) == STEPS
    losses = [[line["loss"] for line in metrics(files, name)] for name in ("stayed", "elastic")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    ours, theirs = (load_file(files / name / "adapter.safetensors") for name in ("elastic", "stayed"))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() < 1e-4 * tensor.norm(), name
