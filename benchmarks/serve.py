"""Tokens a second and the longest waits of `rwkv-peft serve` under load, beside llama.cpp's server (`xllamacpp`).

    python benchmarks/serve.py [--generation 7] [--layers 12] [--channels 768] [--threads 2] [--clients 1 8 64]

Makes a random model in a temporary folder, which both serve on 127.0.0.1, in float32 and with the same threads. So many
clients at once each ask for a stream of --tokens tokens after a prompt of 8; the two servers take turns. Each figure is
the median of the rounds. first: the longest wait from a request to its first piece of text; gap: the longest between
two pieces. Prompts and answers are of printable tokens alone, so that every token is a piece: both servers hold parts
of characters back.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from common import Parser, head, require, row
from generate import VERSIONS, make_model

PROMPT = 8
SECONDS = 600  # the longest that a round may take
PACKAGE = Path(__file__).resolve().parents[1] / "RWKV-PEFT" / "rwkv_peft"


def main():
    parser = Parser(__doc__, layers=1, channels=64, threads=1, clients=(2,), tokens=2, rounds=1, alone=True)
    parser.add_argument("--generation", choices=("6", "7"), default="7")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=(1, 8, 64))
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="leave llama.cpp out")
    parser.add_argument("--llama", metavar="PTH", help=argparse.SUPPRESS)  # set where this program runs itself
    args = parser.parse_args()
    if args.llama:
        return serve_llama(args)
    require("fastapi", "uvicorn", "llguidance", *(() if args.alone else ("gguf", "xllamacpp")))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        printable = printable_tokens()
        make_model(path, VERSIONS[args.generation], args.layers, args.channels, printable)
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        batch = str(max(args.clients))
        ours = [PACKAGE / "children.py", "rwkv_peft", "serve", "--model", path, "--port", "0", "--batch", batch]
        commands = {"rwkv-peft serve": [sys.executable, *map(str, ours)]}
        if not args.alone:
            theirs = [__file__, "--llama", path, "--threads", args.threads, "--clients", batch]
            commands["llama.cpp"] = [sys.executable, *map(str, theirs)]
        with Servers(commands, environment) as addresses:
            head("clients", "server", "tokens/s", "first, s", "gap, s")
            for clients in args.clients:
                for address in addresses.values():
                    load(address, clients, 4, 0, printable)
                found = {name: [] for name in addresses}
                for number in range(1, args.rounds + 1):
                    for name, address in addresses.items():
                        found[name].append(load(address, clients, args.tokens, number, printable))
                for name, rounds in found.items():
                    rate, first, gap = map(statistics.median, zip(*rounds))
                    row(clients, name, f"{rate:.1f}", f"{first:.2f}", f"{gap:.2f}")


class Servers:
    """Runs commands that print their address in the last word of a line with http in it -> {name: address}."""

    def __init__(self, commands, environment):
        self.commands, self.environment, self.processes = commands, environment, []

    def __enter__(self):
        found = {}
        for name, command in self.commands.items():
            process = subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, text=True)
            self.processes.append(process)
            line = next((line for line in process.stdout if "http://" in line), None)
            if line is None:
                self.__exit__()
                sys.exit(f"error: {name} did not start; its message is above")
            found[name] = line.split()[-1].removesuffix("/v1")
        return found

    def __exit__(self, *error):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def serve_llama(args):
    """Be llama.cpp's server, until the process is ended."""
    import xllamacpp

    from rwkv_peft.checkpoints.base import open_base
    from rwkv_peft.release.runtimes import written

    places = args.clients[0]
    params = xllamacpp.CommonParams()
    params.model.path = str(written(Path(args.llama).parent, "f32", open_base(args.llama)))
    params.n_ctx, params.n_parallel, params.verbosity = 256 * places, places, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.port = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


def printable_tokens():
    """The World tokens that are printable text by themselves."""
    from rwkv_peft.data.tokenizer import load_tokenizer

    texts = [(token or b"").decode(errors="replace") for token in load_tokenizer("world").token_bytes]
    return [number for number, text in enumerate(texts) if text and text.isprintable() and "\ufffd" not in text]


def load(address, clients, tokens, seed, printable):
    """Ask by so many clients at once, with prompts of `printable` tokens -> (tokens a second, the longest wait for a
    first piece, the longest gap)."""
    found = [None] * clients
    barrier = threading.Barrier(clients + 1)

    def ask(number):
        places = [7919 * (seed * clients + number) + 97 * place for place in range(PROMPT)]
        prompt = [printable[place % len(printable)] for place in places]
        body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), head)
        barrier.wait()
        began = time.perf_counter()
        moments, usage = [], 0
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    usage = (event.get("usage") or {}).get("completion_tokens", usage)
                    if event["choices"]:
                        moments.append(time.perf_counter())
        gaps = [after - before for before, after in zip(moments, moments[1:])]
        found[number] = usage, moments[0] - began, max(gaps, default=0.0)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    barrier.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    drawn, firsts, gaps = zip(*found)
    return sum(drawn) / seconds, max(firsts), max(gaps)


if __name__ == "__main__":
    main()
