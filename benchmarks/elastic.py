"""Kills nodes of a run under `torchrun --nnodes 1:2` at random moments, and compares it with one that stayed whole.

    python benchmarks/elastic.py [--kills 4] [--steps 400] [--seed 0]

A node is an agent of torchrun with one rank, on a CPU. After a random number of steps one of the agents, the first or
the last, is killed by SIGKILL, alone or with its rank, or asked to leave by SIGTERM, as nodes are that are preempted;
another takes its place some seconds later. This script keeps
torchrun's meeting place, so that any node may be lost. The run must end by itself: each step once, on the same samples,
with the losses and weights of the other run up to the order of sums.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.files.base import save_model
from rwkv_peft.models import family_named

ROOT = Path(__file__).resolve().parents[1]
NODES = 2
ALONE, WHOLE, ASKED = WAYS = "killed", "killed with its rank", "asked to leave"
CONF = "is_host=0,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=8"
FLAGS = "--ctx_len 32 --micro_bsz 1 --precision fp32 --accelerator cpu --bone_r 8 --lr_init 3e-3 --lr_schedule constant"
FLAGS += " --save_every 10 --epoch_count 1 --resume auto --answer_rows 0"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        one = ["--num_nodes", "1", "--accumulate_grad_batches", str(NODES)]
        command = train(folder, "stayed", args.steps, *one)
        subprocess.run(command, env=variables(folder), check=True, stdout=subprocess.DEVNULL)
        run_and_kill(folder, args, draw)
        compare(folder)


def write_inputs(folder):
    """A tiny base, and data in which the next token follows from the last."""
    torch.manual_seed(0)
    family = family_named("x070")
    model = family.build(family.new_dimensions(n_layer=2, n_embd=64, vocab_size=80, head_size=32))
    family.init_weights(model)
    save_model(folder / "base.pth", model.state_dict())
    with ShardWriter(folder / "data", vocab_size=80) as writer:
        for start in range(200):
            writer.add([1 + (start + 7 * i) % 79 for i in range(50 + start)] + [0])


def train(folder, name, steps, *more):
    files = ("--load_model", folder / "base.pth", "--data_file", folder / "data", "--proj_dir", folder / name)
    return [sys.executable, *map(str, (ROOT / "train.py", *files, "--epoch_steps", steps, *FLAGS.split(), *more))]


def variables(folder):
    """Those of a run; folder is for what agents leave."""
    own = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TMPDIR": str(folder)}
    return os.environ | own


def run_and_kill(folder, args, draw):
    """Run on NODES agents; kill one time and again, and start another."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # lives until this function ends
    launcher = f"-m torch.distributed.run --nnodes 1:{NODES} --nproc_per_node 1 --max_restarts 99 --rdzv_backend c10d "
    launcher += f"--rdzv_endpoint 127.0.0.1:{port} --rdzv_conf {CONF} --local_addr 127.0.0.1"
    _, *words = train(folder, "killed", args.steps, "--num_nodes", str(NODES))
    command = [sys.executable, *launcher.split(), *words]
    log = open(folder / "log", "w")
    agents = [start(command, log, folder) for _ in range(NODES)]
    moments = sorted(draw.sample(range(5, args.steps - 20), args.kills))
    for moment in moments:
        while len(read(folder, "killed")) < moment:
            if all(agent.poll() is not None for agent in agents):
                sys.exit(f"the run ended early:\n{(folder / 'log').read_text()}")
            time.sleep(0.02)
        victim, way = draw.choice((0, -1)), draw.choice(WAYS)
        agent = agents.pop(victim)
        ranks = psutil.Process(agent.pid).children(recursive=True) if way == WHOLE else []
        for process in (agent, *ranks):
            process.terminate() if way == ASKED else process.kill()
        print(f"after {moment} steps: agent {victim} {way}", flush=True)
        time.sleep(draw.uniform(0, 5))
        agents.append(start(command, log, folder))
    codes = [agent.wait() for agent in agents]
    if any(codes):
        sys.exit(f"the agents ended with {codes}:\n{(folder / 'log').read_text()}")
    del store
    said = (folder / "log").read_text()
    starts, both = said.count("machine   "), said.count(f"machine   {NODES} x 1")
    print(f"{starts} starts, {both} of them on {NODES} nodes", flush=True)


def start(command, log, folder):
    return subprocess.Popen(command, env=variables(folder), stdout=log, stderr=log)


def read(folder, name):
    path = folder / name / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def compare(folder):
    """Print how far the two runs are from each other."""
    stayed, killed = (read(folder, name) for name in ("stayed", "killed"))
    places = [[(line["step"], line["samples"]) for line in lines] for lines in (stayed, killed)]
    if places[0] != places[1]:
        sys.exit("the runs differ in their steps")
    loss = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(stayed, killed))
    ours, theirs = (load_file(folder / name / "adapter.safetensors") for name in ("killed", "stayed"))
    weights = max(float((ours[key] - tensor).norm() / tensor.norm()) for key, tensor in theirs.items())
    print(f"{len(stayed)} steps each once; losses within {loss:.1e}, weights within {weights:.1e}")


if __name__ == "__main__":
    main()
