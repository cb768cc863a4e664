"""Ranks that torchrun starts, as many as there are nodes: a step keeps its samples, and a run outlives its nodes."""

import signal
import sys
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
from safetensors.torch import load_file

import warm
from rwkv_peft.cli.errors import UserError
from rwkv_peft.training.engine.fit import stopped
from rwkv_peft.training.ranks.world import World, fit
from training.held import held
from training.runs import finish, free_port, metrics, start, wait_for_steps, wait_for_words

STEPS = 20
FLAGS = ("--precision", "fp32", "--epoch_steps", str(STEPS), "--epoch_count", "1", "--save_every", "4")
FLAGS += ("--num_nodes", "2", "--lr_schedule", "constant", "--lr_init", "5e-3", "--resume", "auto")
HURRY = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=8"  # torchrun waits for 30 and 15 s itself


def fitted(world, nodes=1, devices=1, passes=1):
    args = Namespace(num_nodes=nodes, devices=devices, accumulate_grad_batches=passes, micro_bsz=1, context_parallel=1)
    args.proj_dir, args.resume, args.fresh_optimizer = "out", "", False
    notes = fit(args, world)
    return args.num_nodes, args.devices, args.accumulate_grad_batches, notes


def test_a_step_keeps_its_samples_on_as_many_ranks_as_there_are(monkeypatch):
    two = World(2, 4, launches=False, elastic=True)
    assert fitted(two, passes=3) == (2, 4, 3, [])  # flags left out
    assert fitted(two, 2, 4) == (2, 4, 1, []) and fitted(two, devices=4) == (2, 4, 1, [])
    note = "--accumulate_grad_batches 6: a step has 48 samples by "
    note += "--num_nodes 4 x --devices 4 x --accumulate_grad_batches 3"
    assert fitted(two, 4, 4, 3) == (2, 4, 6, [note]) and fitted(two, 4, passes=3) == (2, 4, 6, [note])
    assert fitted(replace(two, hosted=True))[-1] == []
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in fitted(replace(two, hosted=True))[-1][0]
    assert fitted(World(2, 4), 4, 4) == (4, 4, 1, [])  # no torchrun: the flags stand, and are judged elsewhere
    with pytest.raises(UserError, match="16 samples by .*, and 3 ranks .*give --accumulate_grad_batches 6,"):
        fitted(World(3, 1, elastic=True), nodes=4, passes=4)


def test_only_a_run_that_was_asked_to_stop_before_its_end_ends_with_a_signals_code():
    run = SimpleNamespace(exhausted=False, plan=SimpleNamespace(total_steps=10))
    for step, stopping, number, code in ((3, True, 2, 130), (3, True, 0, 143), (10, True, 15, 0), (3, False, 0, 0)):
        assert stopped(run, SimpleNamespace(step=step, stopping=stopping, stop_requested=number)) == code


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
    argv = held(command("elastic", *FLAGS), hold, 3)[1:]
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
    train("stayed", *FLAGS, "--num_nodes", "1", "--accumulate_grad_batches", "2")
    lines = [[(line["step"], line["samples"]) for line in metrics(files, name)] for name in ("stayed", "elastic")]
    assert lines[1] == lines[0] and len(lines[0]) == STEPS
    losses = [[line["loss"] for line in metrics(files, name)] for name in ("stayed", "elastic")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    ours, theirs = (load_file(files / name / "adapter.safetensors") for name in ("elastic", "stayed"))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() < 1e-4 * tensor.norm(), name
