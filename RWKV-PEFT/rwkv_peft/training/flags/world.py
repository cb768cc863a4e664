"""Find which process of a run this one is, from its flags and whatever started it: this command itself, torchrun (or
another launcher that sets torch's variables), or Slurm's srun."""

import os
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from ...cli.errors import UserError
from ...cli.parser import counted
from ...config import TrainConfig
from ..saving.checkpoints import saved_state

LOOPBACK = "127.0.0.1"
PORT = 29500  # torch's own default, if MASTER_PORT is not given
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # what every launcher of torch's kind sets for each process
TORCHRUN = "TORCHELASTIC_RUN_ID"  # what torchrun's agent sets besides
SLURM_PORTS = (15000, 10000)  # the first, and how many: a job's number chooses its port


@dataclass(frozen=True)
class World:
    """This process, `rank` of nodes x devices, numbered node by node, and the address:port at which they meet; for port
    0 the system chooses one. `starts` says whether it starts the others of its node; `hosted` says whether torchrun
    keeps the store there, else rank 0 keeps it. `elastic` says whether torchrun's agent started it, which decides how
    many ranks there are, and starts them anew, perhaps on other nodes, if one ends with an error."""

    nodes: int = 1
    devices: int = 1
    rank: int = 0
    address: str = LOOPBACK
    port: int = 0
    starts: bool = True
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
        """Tell whether it is the first process of its node, which speaks for the others."""
        return self.local_rank == 0

    def name(self, rank: int) -> str:
        """Name a rank in a message, with its node if there are several."""
        return f"rank {rank}" + f" (node {rank // self.devices} of {self.nodes})" * (self.nodes > 1)


def find_world(train: TrainConfig, environment: Mapping[str, str] = os.environ) -> World:
    """Find the World of this process. Raises UserError if the flags and what started the process contradict each other,
    or do not tell at what address the processes meet."""
    if any(name in environment for name in TORCH):
        return by_torch(train, environment)
    if number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return by_slurm(train, environment)
    node = number(environment, "NODE_RANK", 0)
    if node >= train.num_nodes:
        raise UserError(
            f"NODE_RANK is {node} and --num_nodes {train.num_nodes}, whose nodes have the numbers 0 to "
            f"{train.num_nodes - 1}; " + ("unset NODE_RANK" if train.num_nodes == 1 else "set NODE_RANK to one of them")
        )
    if train.num_nodes > 1 and "NODE_RANK" not in environment:
        raise UserError(
            f"--num_nodes {train.num_nodes} and NODE_RANK is not set; set it to this node's number, 0 to "
            f"{train.num_nodes - 1}, and MASTER_ADDR to the address of node 0"
        )
    return World(train.num_nodes, train.devices, node * train.devices, *meeting_place(train.num_nodes, environment))


def by_torch(train: TrainConfig, environment: Mapping[str, str]) -> World:
    """Find the World by torch's variables: one process a rank. Raises UserError as find_world does."""
    missing = [name for name in TORCH if name not in environment]
    if missing:
        given = next(name for name in TORCH if name in environment)
        raise UserError(
            f"{given} is set, as for one of several processes that a launcher starts, and {missing[0]} is not; unset "
            f"{given} to train with this command alone, or start it with torchrun"
        )
    rank, size, local = (number(environment, name) for name in TORCH)
    devices = number(environment, "LOCAL_WORLD_SIZE", train.devices, least=1)
    nodes, rest = divmod(size, devices)
    elastic = TORCHRUN in environment
    if rest or not elastic and (devices, nodes) != (train.devices, train.num_nodes):
        raise UserError(
            f"{size} processes were started, {devices} of them here (WORLD_SIZE, LOCAL_WORLD_SIZE), for --devices "
            f"{train.devices} and --num_nodes {train.num_nodes}; "
            + ("start as many on each node" if rest else f"give --devices {devices} --num_nodes {nodes}")
        )
    if rank >= size or rank % devices != local:
        raise UserError(
            f"RANK {rank} and LOCAL_RANK {local} are not those of one of {size} processes, {devices} a node, counted "
            "node by node; start them with torchrun, or unset " + ", ".join(TORCH)
        )
    hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    place = meeting_place(size, environment)
    return World(nodes, devices, rank, *place, starts=False, hosted=hosted, elastic=elastic)


def by_slurm(train: TrainConfig, environment: Mapping[str, str]) -> World:
    """Find the World by srun's variables: one task a rank, or one a node, which starts the others there."""
    tasks, node = number(environment, "SLURM_STEP_NUM_TASKS"), number(environment, "SLURM_NODEID", 0)
    nodes = number(environment, "SLURM_STEP_NUM_NODES", 1, least=1)
    if nodes != train.num_nodes or tasks not in (nodes, nodes * train.devices):
        raise UserError(
            f"srun started {tasks} tasks on {nodes} nodes, for --devices {train.devices} and --num_nodes "
            f"{train.num_nodes}; give --num_nodes {nodes} --devices {max(1, tasks // nodes)}, or another "
            "--ntasks-per-node to srun"
        )
    hosts = environment.get("SLURM_STEP_NODELIST", LOOPBACK)
    base, many = SLURM_PORTS
    port = base + number(environment, "SLURM_JOB_ID", 0) % many
    place = {"MASTER_ADDR": first_host(hosts), "MASTER_PORT": str(port), **environment}
    local = 0 if tasks == nodes else number(environment, "SLURM_LOCALID", 0)
    rank = node * train.devices + local
    return World(nodes, train.devices, rank, *meeting_place(tasks, place), starts=tasks == nodes)


def first_host(hosts: str) -> str:
    """The first host of a list as Slurm writes it: "gpu[03-05,9],login" -> "gpu03"."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", hosts)
    return "".join(part or "" for part in found.groups()) if found else hosts


def meeting_place(others: int, environment: Mapping[str, str]) -> tuple[str, int]:
    """Return the (address, port) at which `others` nodes or processes meet that were started apart: LOOPBACK for 1.
    Raises UserError if there are more and MASTER_ADDR is not set, or for a bad MASTER_PORT."""
    port = number(environment, "MASTER_PORT", PORT if others > 1 else 0)
    if port > 65535:
        raise UserError(f"MASTER_PORT is {port}; a port is at most 65535")
    if others == 1:
        return LOOPBACK, port
    if not environment.get("MASTER_ADDR"):
        raise UserError(
            "MASTER_ADDR is not set, so that the processes do not know where to meet; set it to the address of node 0, "
            f"the same on every node, and MASTER_PORT to a free port there (else {PORT})"
        )
    return environment["MASTER_ADDR"], port


def number(environment: Mapping[str, str], name: str, default: int | None = None, least: int = 0) -> int:
    """Read a variable that holds a number; the default if it is not set."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise UserError(
            f"{name} is {text!r}, and a whole number is due{f', {least} or more' * bool(least)}; set it to one, or "
            "unset it"
        )
    return int(text)


def fit(args: Namespace, world: World) -> list[str]:
    """Set --devices and --num_nodes in a parsed command line to those of an elastic World, and
    --accumulate_grad_batches so that a step has the samples of the run that goes on, else those of the flags -> notes.
    Of an elastic World, flags of 1, the default, stand for as many as there are. Raises UserError if the ranks cannot
    share the samples."""
    notes = []
    if world.hosted and world.nodes > 1:
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
    before = {} if args.fresh_optimizer else saved_state(args.proj_dir, args.resume)
    if "step_samples" in before:  # 0.2.0 did not record it
        samples, source = before["step_samples"], f"in the run in {args.proj_dir}"
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
