"""This process's place in a run, from the flags and a launcher's variables, the combinations that are refused, and a
step's samples on as many ranks as torchrun starts."""

from argparse import Namespace
from dataclasses import replace

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.training.ranks.world import LOOPBACK, World, find_world, first_host, match_world

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}
TORCHRUN |= {"MASTER_PORT": "29511", "TORCHELASTIC_USE_AGENT_STORE": "True"}
SRUN = {"SLURM_JOB_ID": "1234567", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
SRUN |= {"SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}
FIRST = {"MASTER_ADDR": "10.0.0.1", "NODE_RANK": "1"}


@pytest.mark.parametrize(
    "devices, nodes, environment, expected",
    [
        (1, 1, {}, World()),
        (2, 1, {"MASTER_ADDR": "10.0.0.1", "NODE_RANK": "0"}, World(1, 2, 0, LOOPBACK, 0)),
        (2, 1, {"MASTER_PORT": "29511"}, World(1, 2, 0, LOOPBACK, 0)),
        (2, 2, FIRST, World(2, 2, 2, "10.0.0.1", 29500)),
        (2, 2, TORCHRUN, World(2, 2, 3, "10.0.0.1", 29511, False, hosted=True)),
        (1, 8, TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}, World(2, 2, 3, "10.0.0.1", 29511, False, True, elastic=True)),
        (2, 2, SRUN, World(2, 2, 3, "gpu03", 19567, False)),
        (8, 2, SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}, World(2, 8, 8, "gpu03", 19567)),
        (8, 1, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, World(1, 8, 0)),  # an interactive step
    ],
)
def test_every_way_of_starting_says_who_this_process_is(devices, nodes, environment, expected):
    assert find_world(nodes, devices, environment) == expected


def test_a_rank_is_named_with_its_node():
    world = World(2, 4, 6)
    assert (world.size, world.node, world.local_rank, world.leads) == (8, 1, 2, False)
    assert world.name(6) == "rank 6 (node 1 of 2)" and World(1, 4).name(2) == "rank 2"


@pytest.mark.parametrize(
    "devices, nodes, environment, words",
    [
        (1, 2, {"NODE_RANK": "0"}, "MASTER_ADDR is not set, .* set it to the address of node 0"),
        (1, 2, {"MASTER_ADDR": "10.0.0.1"}, "NODE_RANK is not set for --num_nodes 2; .* 0 to 1, and MASTER_ADDR"),
        (1, 1, {"NODE_RANK": "1"}, "NODE_RANK is 1 for --num_nodes 1; unset it"),
        (1, 2, FIRST | {"NODE_RANK": "2"}, "NODE_RANK is 2 for --num_nodes 2; set it to .* 0 to 1"),
        (2, 2, TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0', and a whole number is due, 1 or more"),
        (2, 2, SRUN | {"SLURM_STEP_NUM_NODES": "0"}, "SLURM_STEP_NUM_NODES is '0', .* 1 or more"),
        (1, 1, {"NODE_RANK": "x"}, "NODE_RANK is 'x', and a whole number is due"),
        (1, 1, {"RANK": "1"}, "RANK is set, .* and WORLD_SIZE is not; unset RANK"),
        (2, 1, {"LOCAL_RANK": "1"}, "LOCAL_RANK is set, .* and RANK is not; unset LOCAL_RANK"),
        (1, 2, TORCHRUN, "4 processes were started, 2 of them here .* give --devices 2 --num_nodes 2"),
        (2, 2, FIRST | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000; a port is at most 65535"),
        (1, 1, SRUN, "srun started 4 tasks on 2 nodes, .* give --num_nodes 2 --devices 2"),
    ],
)
def test_what_contradicts_itself_or_leaves_the_meeting_open_is_refused(devices, nodes, environment, words):
    with pytest.raises(UserError, match=words):
        find_world(nodes, devices, environment)


@pytest.mark.parametrize(
    "hosts, first", [("gpu7", "gpu7"), ("gpu[03-05,9],login", "gpu03"), ("a,b", "a"), ("r[1-2]n.site,c", "r1n.site")]
)
def test_the_first_host_of_a_list_of_slurm(hosts, first):
    assert first_host(hosts) == first


def fitted(world, nodes=1, devices=1, passes=1):
    args = Namespace(num_nodes=nodes, devices=devices, accumulate_grad_batches=passes, micro_bsz=1, context_parallel=1)
    args.proj_dir, args.resume, args.fresh_optimizer = "out", "", False
    notes = match_world(args, world, {})
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


@pytest.mark.parametrize("recorded, devices, rows, passes", [(8, 1, 8, 1), (8, 2, 4, 1), (4, 1, 4, 2), (3, 4, 2, 1)])
def test_a_run_goes_on_with_its_rows_or_as_many_as_the_ranks_can_share(recorded, devices, rows, passes):
    state = {"step_samples": 8, "config": {"data": {"micro_bsz": recorded}}}
    flags = {"micro_bsz": 1, "accumulate_grad_batches": 1, "context_parallel": 1, "fresh_optimizer": False}
    args = Namespace(**flags, devices=devices, num_nodes=1, proj_dir="out")
    match_world(args, World(1, devices), state, keeps_rows=True)
    assert (args.micro_bsz, args.accumulate_grad_batches) == (rows, passes)
