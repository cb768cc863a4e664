"""Ranks meet, here within one process: nodes that count themselves wrongly, and one that has died."""

import signal
import socket
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from rwkv_peft.cli.errors import Ended, UserError
from rwkv_peft.training.flags.world import LOOPBACK, World
from rwkv_peft.training.ranks.meeting import Ranks, call
from rwkv_peft.training.ranks.processes import Processes
from rwkv_peft.training.ranks.watch import END, Watch


def silent(*words, **options):
    pass


@pytest.fixture
def first():
    """Rank 0 of two nodes, which keeps the store."""
    ranks = Ranks(World(2, 1), [], 0.02, silent)
    with ranks:
        yield ranks


def other(first, world):
    """A rank that has joined it."""
    ranks = Ranks(world, [], 0.02, silent)
    ranks.connect(call(LOOPBACK, first.server.port))
    return ranks


def test_two_processes_that_say_they_are_one_node_are_told(first):
    other(first, World(2, 1, 1)).gather_nodes()
    with pytest.raises(UserError, match="both say that they are node 1; give each node its own NODE_RANK"):
        other(first, World(2, 1, 1)).gather_nodes()


@pytest.mark.parametrize(
    "world, words",
    [(World(2, 4, 4), "--devices is 1 on node 0 .* and 4 on node 1"), (World(3, 1, 1), "--num_nodes is 2 .* and 3 on")],
)
def test_nodes_that_count_differently_are_told(first, world, words):
    second = other(first, world)
    second.gather_nodes()
    with pytest.raises(UserError, match=words + ".*give every node the same command"):
        first.gather_nodes()
    assert second.store.check([END])


def test_whoever_does_not_come_is_named(first):
    with pytest.raises(UserError, match="node 1 of 2 at .* did not come within 0.02 minutes"):
        first.gather_nodes()


def test_the_end_of_one_is_the_reason_of_the_others_and_the_first_reason_counts(first):
    second = other(first, World(2, 1, 1))
    second.tell(UserError("the disk is full"))
    second.tell(RuntimeError("of no matter"))
    with pytest.raises(UserError, match="^rank 1 \\(node 1 of 2\\) on .* ended: the disk is full$"):
        first.gather_nodes()


@pytest.mark.parametrize("error, words", [(KeyboardInterrupt(), "interrupted"), (Ended(signal.SIGTERM), "terminated")])
def test_a_rank_that_a_signal_ends_says_so(first, error, words):
    other(first, World(2, 1, 1)).tell(error)
    with pytest.raises(UserError, match=f"^rank 1 .* on .* was {words}$"):
        first.gather_nodes()


def test_a_port_that_is_taken_is_told(first):
    with pytest.raises(UserError, match=f"MASTER_PORT {first.server.port} is taken by another process"):
        Ranks(World(2, 1, port=first.server.port), [], 1.0, silent).__enter__()


def test_nobody_is_there_to_call():
    with pytest.raises((OSError, dist.DistError)):
        call(LOOPBACK, 1)


def test_a_server_of_another_kind_costs_no_more_than_the_time_to_join(monkeypatch):
    patience = []

    def silent_server(*place, timeout, **options):
        patience.append(timeout.total_seconds())
        raise dist.DistNetworkError("no answer")

    with socket.create_server((LOOPBACK, 0)) as server:
        monkeypatch.setattr(dist, "TCPStore", silent_server)
        ranks = Ranks(World(2, 1, 1, port=server.getsockname()[1]), [], 0.05, silent)
        with pytest.raises(UserError, match="did not come within 0.05 minutes"):
            ranks.reach()
    assert max(patience) <= 3


def test_a_store_on_a_frozen_machine_is_asked_in_vain_for_so_many_turns(tmp_path, monkeypatch):
    def frozen(*beat):
        watch.stopped.wait()
        raise dist.DistError

    monkeypatch.setattr("rwkv_peft.training.ranks.watch.PERIOD", 0.001)
    watch = Watch(World(1, 3, 1), tmp_path, 1.0, Processes(), SimpleNamespace(set=frozen))
    words = "rank 0, or the launcher that kept the ranks together, has not answered for "
    assert watch.look_in_time().startswith(words) and watch.frozen
    watch.stopped.set()


def test_a_run_hangs_once_it_has_not_moved_for_its_minutes_however_slow_it_was(tmp_path):
    watch = Watch(World(), tmp_path, 1.0, Processes(), None)
    assert not any(watch.look() for _ in range(200))  # before it begins to move, any time is allowed
    for step in range(4):
        watch.moved(f"step {step}")
        assert not any(watch.look() for _ in range(59))
    assert watch.look().startswith("nothing has moved for 1 minutes (--stall_minutes): rank 0 is at step 3, in ")
    patient = Watch(World(), tmp_path, 0.0, Processes(), None)
    patient.moved("step 0")
    assert not any(patient.look() for _ in range(10_000))
