"""Hostile words and surroundings for faults.py: names, sizes, variables, limits, caches, servers and answers."""

import functools
import json
import os
import resource
import shutil
import socket
from pathlib import Path

import torch
from fault_attacks import Attack
from fault_files import MODEL, NEW, RUN

from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.files.base import save_model

PLAN = ("plan", "--n_layer", 12, "--n_embd", 768, "--vocab_size", 65536, "--gpu", "24GiB")
TERMINAL = "\x1b[2J\x1b]0;owned\x07\u202ereversed\r\x9b31m"
START = (*NEW, "--load_model", "base.pth")


def words(*command):
    return lambda folder: command


def plans():
    dimensions = ("--n_layer", "--n_embd", "--vocab_size", "--head_size", "--dim_ffn", "--dim_att")
    attacks = [
        Attack(f"{flag} of {len(str(size))} digits", words(*PLAN, flag, size), "is above|at most")
        for flag in (*dimensions, "--micro_bsz", "--ctx_len")
        for size in (10**9, 10**12, 2**63, 10**4000)
        if (flag, size) != ("--ctx_len", 10**9)  # which a plan counts
    ]
    return attacks + [
        Attack(f"--gpu {gpu[:9]}", words(*PLAN, f"--gpu={gpu}"), "is no (memory|size)")
        for gpu in ("9" * 5000, "1e400", "-1GiB", "9" * 30 + "GiB")
    ]


def shown(folder):
    torch.save({TERMINAL: torch.ones(2, 2)}, folder / "hostile.pth")
    return ("inspect", "hostile.pth")


def drawn(name, folder):
    (folder / "run").rename(folder / name)
    return ("plot", "--panels", name, "out.svg")


def nines(folder):
    """An evaluation of a model that says 9 without an end."""
    state = torch.load(folder / "base.pth", weights_only=True)
    state["ln_out.weight"].zero_()
    state["ln_out.bias"].fill_(1)
    state["head.weight"].zero_()
    state["head.weight"][BytesTokenizer().encode("9")] = 1
    save_model(folder / "nines.pth", state)
    (folder / "rows.jsonl").write_text(json.dumps({"question": "How many?", "answer": "#### 8"}) + "\n")
    model = ("--model", "nines.pth", "--tokenizer", "bytes", "--max_tokens", 5000)
    return ("eval", "jsonl", "--data", "rows.jsonl", *model)


def chatting(folder):
    (folder / "other.pth").write_bytes(b"mine")
    return ("generate", *MODEL[:4], "--chat", "--max_tokens", 3)


def told_names():
    attacks = [
        Attack("a tensor whose name moves the cursor", shown, r"\\x1b\[2J", 0),
        Attack("an answer of 5,000 digits", nines, "0 of 1|0.0", 0),
        Attack("/save of a name with NUL", chatting, "a name holds no NUL", 0, typed="Hi\n/save a\0b.pth\n"),
        Attack("/save over a file", chatting, "there is such a file", 0, typed="Hi\n/save other.pth\n"),
    ]
    return attacks + [
        Attack(f"plot of a run named {name}", functools.partial(drawn, name), "out.svg", 0)
        for name in ("$", "$x", "a$x^$b", "$\\frac$")
    ]


def cached(make, folder):
    """A run whose cache of kernels holds something else under the names of one, whose compilation is short."""
    kernels = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rwkv_peft"
    cache = folder / "cache" / "rwkv_peft"
    cache.mkdir(parents=True)
    for path in kernels.glob("*_cpu_*.so"):
        make(cache / path.name) if path.name.startswith("cross_entropy") else shutil.copy(path, cache)
    return START


def use_cache():
    os.environ["XDG_CACHE_HOME"] = os.path.abspath("cache")


def locked(folder):
    (folder / "run" / ".run.lock").write_text("[" * 100_000)
    return RUN


def few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))


def surroundings():
    """The server of another kind is silent, and lives as long as this process."""
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"}
    server = socket.create_server(("127.0.0.1", 0))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "NODE_RANK": "1"}
    nodes = words(*START, "--num_nodes", 2, "--join_minutes", 0.05)
    return [
        Attack("LOCAL_WORLD_SIZE=0", words(*START, "--devices", 2), "a whole number is due", variables=launched),
        Attack("a lock of deep JSON", locked, "resuming after step 4", 0),
        Attack("24 open files, two ranks", words(*START, "--devices", 2), "ulimit -n", within=few_files),
        Attack(
            "folders in the cache of kernels", functools.partial(cached, os.mkdir), "directory", 0, within=use_cache
        ),
        Attack("pipes in the cache of kernels", functools.partial(cached, os.mkfifo), "finished", 0, within=use_cache),
        Attack("a silent server at MASTER_PORT", nodes, "did not come within", 75, variables=meeting),
    ]
