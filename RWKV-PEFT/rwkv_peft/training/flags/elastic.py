"""Fit a run to the ranks that torchrun started, which may be fewer or more than its flags name.

`torchrun --nnodes 1:4` starts as many nodes as there are, and starts them anew if one is lost or joins. A step must not
depend on that, so the flags say how many samples it has, and the ranks share them.
"""

from argparse import Namespace
from math import gcd

from ...cli import counted
from ...errors import UserError
from .world import World


def fit(args: Namespace, world: World) -> list[str]:
    """Set --devices and --num_nodes in a parsed command line to those of an elastic World, and
    --accumulate_grad_batches so that a step keeps its samples -> a note, in a list, if it changes. Flags of 1, the
    default, stand for as many as there are. Raises UserError if the ranks cannot share a step's samples."""
    if not world.elastic:
        return []
    notes = []
    if world.hosted and world.nodes > 1:
        notes.append(
            "torchrun keeps the place at which ranks meet over its restarts; with --rdzv_backend c10d and nodes that "
            "come and go, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it (docs/guides/clusters.md)"
        )
    devices, nodes = (
        given if given > 1 else there for given, there in ((args.devices, world.devices), (args.num_nodes, world.nodes))
    )
    args.devices, args.num_nodes = world.devices, world.nodes
    if devices * nodes == world.size:
        return notes
    passes = args.accumulate_grad_batches
    asked = f"--num_nodes {nodes} x --devices {devices} x --accumulate_grad_batches {passes}"
    args.accumulate_grad_batches, rest = divmod(passes * devices * nodes, world.size)
    if rest:
        unit = world.size // gcd(devices * nodes, world.size)
        raise UserError(
            f"torchrun started {counted(world.size, 'rank')}, which cannot share the micro batches of a step, {asked}; "
            f"give --accumulate_grad_batches {-(-passes // unit) * unit}, and --micro_bsz to match, or wait for nodes"
        )
    return [
        *notes,
        f"--accumulate_grad_batches {args.accumulate_grad_batches}, so that a step on {counted(world.size, 'rank')} "
        f"has the samples of {asked}",
    ]
