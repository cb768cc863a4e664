"""The place of this process among the ranks of a run, by its flags and the variables of its launcher: torchrun (or
another that sets torch's variables), Slurm's srun, or none."""

import os
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from ...cli.errors import UserError
from ...cli.parser import counted

LOOPBACK = "127.0.0.1"
PORT = 29500  # torch's own default, if MASTER_PORT is not given
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # set by every launcher of torch's kind for each process
TORCHRUN = "TORCHELASTIC_RUN_ID"  # set by torchrun's agent besides
SLURM_PORTS = (15000, 10000)  # the first, and how many: a job's number chooses its port


@dataclass(frozen=True)
class World:
    """This process, `rank` of nodes x devices, numbered node by node, and the address:port of the run's store.

    launches: it starts the ranks of its node. It is none of several then (ranks/group.py). hosted: torchrun's agent
    keeps the store, else rank 0. elastic: an agent started it. The agent sets the number of ranks, and may start them
    anew, on other nodes too, if one ends with an error."""

    nodes: int = 1
    devices: int = 1
    rank: int = 0
    address: str = LOOPBACK
    port: int = 0
    launches: bool = True
    hosted: bool = False
    elastic: bool = False

    @property
    def size(self) -> int:
        return self.nodes * self.devices

    @property
    def node(self) -> int:
        return self.rank // self.devices

    @property
    def local_rank(self) -> int:
        return self.rank % self.devices

    @property
    def leads(self) -> bool:
        """True for the first rank of a node; it prints for the node."""
        return self.local_rank == 0

    def name(self, rank: int) -> str:
        """A rank in a message, with its node if there are several."""
        return f"rank {rank}" + f" (node {rank // self.devices} of {self.nodes})" * (self.nodes > 1)


def find_world(nodes: int, devices: int, environment: Mapping[str, str] = os.environ) -> World:
    """The World of this process, by --num_nodes, --devices and its launcher's variables. Raises UserError if these
    contradict each other, or give no address at which nodes meet."""
    # torch's variables first: torchrun within a Slurm job sets them, and Slurm's are there too.
    if any(name in environment for name in TORCH):
        return by_torch(nodes, devices, environment)
    if number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return by_slurm(nodes, devices, environment)
    node = number(environment, "NODE_RANK", 0)
    if node >= nodes or nodes > 1 and "NODE_RANK" not in environment:
        remedy = f"set it to this node's number, 0 to {nodes - 1}, and MASTER_ADDR to the address of node 0"
        raise UserError(
            f"NODE_RANK is {environment.get('NODE_RANK', 'not set')} for --num_nodes {nodes}; "
            + ("unset it" if nodes == 1 else remedy)
        )
    return World(nodes, devices, node * devices, *meeting_place(nodes, environment))


def by_torch(asked_nodes: int, asked_devices: int, environment: Mapping[str, str]) -> World:
    """The World of a rank, by torch's variables. Raises UserError as find_world does."""
    if missing := [name for name in TORCH if name not in environment]:
        present = next(name for name in TORCH if name in environment)
        raise UserError(
            f"{present} is set, as for one of several processes that a launcher starts, and {missing[0]} is not; unset "
            f"{present} to train with this command alone, or start it with torchrun"
        )
    rank, size = (number(environment, name) for name in TORCH[:2])
    devices = number(environment, "LOCAL_WORLD_SIZE", asked_devices, least=1)
    nodes, rest = divmod(size, devices)
    elastic = TORCHRUN in environment
    if rest or not elastic and (devices, nodes) != (asked_devices, asked_nodes):
        raise UserError(
            f"{size} processes were started, {devices} of them here (WORLD_SIZE, LOCAL_WORLD_SIZE), for --devices "
            f"{asked_devices} and --num_nodes {asked_nodes}; "
            + ("start as many on each node" if rest else f"give --devices {devices} --num_nodes {nodes}")
        )
    # The agent keeps the store, so that it outlives a restart of the ranks.
    hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    return World(nodes, devices, rank, *meeting_place(size, environment), False, hosted, elastic)


def by_slurm(asked_nodes: int, devices: int, environment: Mapping[str, str]) -> World:
    """The World of a task of srun: a rank, or the only task of a node. Such a task launches the ranks there."""
    tasks, node = number(environment, "SLURM_STEP_NUM_TASKS"), number(environment, "SLURM_NODEID", 0)
    nodes = number(environment, "SLURM_STEP_NUM_NODES", 1, least=1)
    if nodes != asked_nodes or tasks not in (nodes, nodes * devices):
        raise UserError(
            f"srun started {tasks} tasks on {nodes} nodes, for --devices {devices} and --num_nodes "
            f"{asked_nodes}; give --num_nodes {nodes} --devices {max(1, tasks // nodes)}, or another "
            "--ntasks-per-node to srun"
        )
    base, many = SLURM_PORTS
    port = base + number(environment, "SLURM_JOB_ID", 0) % many
    address = first_host(environment.get("SLURM_STEP_NODELIST", LOOPBACK))
    # Variables that somebody set by hand win over what follows from the job.
    place = {"MASTER_ADDR": address, "MASTER_PORT": str(port), **environment}
    alone = tasks == nodes
    rank = node * devices + (0 if alone else number(environment, "SLURM_LOCALID", 0))
    return World(nodes, devices, rank, *meeting_place(tasks, place), launches=alone)


def first_host(hosts: str) -> str:
    """The first host of a list as Slurm writes it: "gpu[03-05,9],login" -> "gpu03"."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", hosts)
    return "".join(part or "" for part in match.groups()) if match else hosts


def meeting_place(others: int, environment: Mapping[str, str]) -> tuple[str, int]:
    """(address, port) of the store of `others` nodes or processes that are started apart; for 1 LOOPBACK and 0, upon
    which the system chooses a port. Raises UserError if there are more and MASTER_ADDR is not set, or for a bad
    MASTER_PORT."""
    if others == 1:
        return LOOPBACK, 0
    port = number(environment, "MASTER_PORT", PORT)
    if port > 65535:
        raise UserError(f"MASTER_PORT is {port}; a port is at most 65535")
    if not environment.get("MASTER_ADDR"):
        raise UserError(
            "MASTER_ADDR is not set, and processes that are started apart need an address to meet at; set it to the "
            f"address of node 0, the same on every node, and MASTER_PORT to a free port there (else {PORT})"
        )
    return environment["MASTER_ADDR"], port


def number(environment: Mapping[str, str], name: str, default: int | None = None, least: int = 0) -> int:
    """The whole number in a variable; the default if it is not set."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise UserError(
            f"{name} is {text!r}, and a whole number is due{f', {least} or more' * bool(least)}; set it to one, or "
            "unset it"
        )
    return int(text)


def match_world(args: Namespace, world: World, state: Mapping[str, Any], keeps_rows: bool = False) -> list[str]:
    """Set --devices and --num_nodes in a parsed command line to an elastic World's -> notes. `state` is the state.json
    that the run goes on from, {} if it begins; with keeps_rows its --micro_bsz stays, or the next lower one that the
    ranks can share.

    --accumulate_grad_batches follows: a step has as many samples as in the run that goes on, else as by the flags.
    There 1, the default of --devices and --num_nodes, stands for the World's numbers. Raises UserError if the ranks
    cannot share the samples."""
    notes = []
    if world.hosted and world.nodes > 1 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        notes.append(
            "torchrun keeps the place at which ranks meet over its restarts; with --rdzv_backend c10d and nodes that "
            "come and go, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it (docs/guides/clusters.md)"
        )
    if world.elastic and args.devices == 1:
        args.devices = world.devices
    if world.elastic and args.num_nodes == 1:
        args.num_nodes = world.nodes
    samples, asked, source = step_samples(args), args.accumulate_grad_batches, "by these flags"
    if world.elastic:
        source = f"by --num_nodes {args.num_nodes} x --devices {args.devices} x --accumulate_grad_batches {asked}"
        args.devices, args.num_nodes = world.devices, world.nodes
    # A step of another size has another mean gradient: Adam's moments would not fit it.
    before = {} if args.fresh_optimizer else state
    if "step_samples" in before:  # 0.2.0 did not record it
        samples, source = before["step_samples"], f"in the run in {args.proj_dir}"
    if keeps_rows and state:
        groups = samples_at_once(args) // args.micro_bsz
        rows = state.get("config", {}).get("data", {}).get("micro_bsz", args.micro_bsz)
        args.micro_bsz = next((n for n in range(rows, 0, -1) if samples % (n * groups) == 0), args.micro_bsz)
    ranks, at_once = counted(args.devices * args.num_nodes, "rank"), samples_at_once(args)
    passes, rest = divmod(samples, at_once)
    if rest or not passes:
        if before:
            groups = at_once // args.micro_bsz
            rows = next((rows for rows in range(args.micro_bsz, 0, -1) if samples % (rows * groups) == 0), 0)
            remedy = f"give --micro_bsz {rows}" if rows else "take a number of ranks that divides them"
            remedy += ", or add --fresh_optimizer to go on with steps of another size"
        else:
            unit = at_once // gcd(samples // asked, at_once)
            remedy = (
                f"give --accumulate_grad_batches {-(-asked // unit) * unit}, and --micro_bsz to match, or wait for "
            )
            remedy += "nodes"
        raise UserError(
            f"a step has {counted(samples, 'sample')} {source}, and {ranks} of --micro_bsz {args.micro_bsz} cannot "
            f"share them; {remedy}"
        )
    args.accumulate_grad_batches = passes
    if passes == asked:
        return notes
    return [*notes, f"--accumulate_grad_batches {passes}: a step has {counted(samples, 'sample')} {source}"]


def samples_at_once(args: Namespace) -> int:
    """The number of samples in a forward pass of all ranks."""
    groups: int = max(1, args.devices * args.num_nodes // args.context_parallel)
    return groups * args.micro_bsz


def step_samples(args: Namespace) -> int:
    """The number of samples in an optimizer step, by the flags."""
    return samples_at_once(args) * args.accumulate_grad_batches
