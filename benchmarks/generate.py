"""Tokens a second of decoding on a CPU, beside llama.cpp (`xllamacpp`) with the same model, and the time of reading.

    python benchmarks/generate.py [--generation 6 7] [--sizes 12x768 3x2048] [--threads 2] [--weights fp32 int8]
        [--prompts 32 512 2048]

Makes random models of some layers and channels and the World vocabulary in a temporary folder; each generation, size
and number of threads has a process of its own. Both sides continue prompts of 8 tokens greedily. They take turns, and
the best of the rounds counts, because other work on the machine can only slow one down. llama.cpp has a GGUF of the
same numbers (int8: q8_0), and as many places as there are sequences. "reading" is our time of a step over the time of
reading the weights, which is their size over the rate at which all threads add up 512 MB of floats in large pages, in
the same rounds. "reads N" is the rate at which one prompt of N tokens is read, in tokens a second, and that over
llama.cpp's.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import Parser, head, require, row

PROMPT = 8
GGUF = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0"}
VERSIONS = {"6": "x060", "7": "x070"}
COLUMNS = "RWKV;size;threads;weights;MB;sequences;tokens/s;reading;llama.cpp;ratio".split(";")
PROMPTS = (32, 512, 2048)


def main():
    parser = Parser(
        __doc__,
        generation=("7",),
        sizes=("1x64",),
        threads=(1,),
        batches=(2,),
        weights=("fp32", "int8"),
        tokens=2,
        rounds=1,
        prompts=(8,),
    )
    parser.add_argument("--generation", nargs="+", choices=("6", "7"), default=("6", "7"))
    parser.add_argument("--sizes", nargs="+", default=("12x768", "3x2048"), help="layers x channels")
    parser.add_argument("--threads", type=int, nargs="+", default=(2,))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--weights", nargs="+", default=("fp32", "bf16", "int8", "int4"))
    parser.add_argument("--tokens", type=int, default=16, help="tokens of one sequence in a round; of several a half")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, nargs="*", default=PROMPTS, help="tokens of prompts to read")
    parser.add_argument("--model", help=argparse.SUPPRESS)  # set where this program runs itself
    args = parser.parse_args()
    if args.model:
        return measure(args)
    if GGUF.keys() & args.weights:
        require("gguf", "xllamacpp")
    head(*COLUMNS, *(f"reads {length:,}" for length in args.prompts))
    for generation in args.generation:
        for size in args.sizes:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.pth"
                make_model(path, VERSIONS[generation], *map(int, size.split("x")))
                for threads in args.threads:
                    flags = {"model": path, "generation": generation, "sizes": size, "threads": threads}
                    flags |= {"tokens": args.tokens, "rounds": args.rounds}
                    command = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
                    command += ["--batches", *map(str, args.batches), "--weights", *args.weights]
                    command += ["--prompts", *map(str, args.prompts)]
                    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
                    subprocess.run([sys.executable, __file__, *command], env=environment, check=True)


def make_model(path, version, layers, channels, drawn=None):
    """A random World-vocabulary model of the official widths, float32; greedily it draws the tokens `drawn` alone."""
    import torch

    from rwkv_peft.checkpoints.base import save_model
    from rwkv_peft.models import family_named

    torch.manual_seed(0)
    family = family_named(version)
    shapes = family.shapes(family.new_dimensions(n_layer=layers, n_embd=channels, vocab_size=65536))
    tensors = {
        key: torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape) for key, shape in shapes.items()
    }
    if drawn is not None:  # a logit of 0 is below the largest of many random ones
        tensors["head.weight"][torch.ones(65536, dtype=torch.bool).index_fill(0, torch.tensor(drawn), False)] = 0
    save_model(path, tensors)


def measure(args):
    """Print the rows of the table for one model and number of threads."""
    import torch

    from rwkv_peft.inference.loading import load_model
    from rwkv_peft.inference.weights import large_pages, rounded

    torch.set_num_threads(args.threads[0])
    torch.set_grad_enabled(False)
    stream = torch.frombuffer(large_pages(1 << 29), dtype=torch.float32).fill_(1.0)
    for kind in args.weights:
        quantized = {"weights": kind} if kind.startswith("int") else {"precision": kind}
        ours, _ = load_model(args.model, **quantized)
        size = sum(weight.nbytes for name, weight in ours.named_parameters() if name != "emb.weight")
        size += sum(product.weight.nbytes for product in rounded(ours).values())
        for batch in args.batches:
            context = 256 + (max(args.prompts, default=0) if batch == 1 else 0)
            server = llama_cpp(args.model, GGUF[kind], args.threads[0], batch, context) if kind in GGUF else None
            prompts = torch.randint(1, 60000, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
            tokens = args.tokens if batch == 1 else max(args.tokens // 2, 2)
            mine = theirs = reading = 0.0
            for _ in range(args.rounds + 1):  # the first warms up
                began = time.perf_counter()
                stream.sum()
                reading = max(reading, stream.nbytes / (time.perf_counter() - began))
                mine = max(mine, our_rate(ours, prompts, tokens))
                theirs = max(theirs, llama_rate(server, prompts, tokens)) if server else 0.0
            share = batch / mine / (size / reading)
            beside = (f"{theirs:.1f}", f"{mine / theirs:.2f}") if server else ("", "")
            cells = f"{size / 1e6:,.0f}", batch, f"{mine:.1f}", f"{share:.2f}", *beside
            reads = [read_rates(ours, server, length, args.rounds) if batch == 1 else "" for length in args.prompts]
            row(args.generation[0], args.sizes[0], args.threads[0], kind, *cells, *reads)
            del server
        del ours


def read_rates(ours, server, length, rounds):
    """The rate of reading a prompt, and that over llama.cpp's, the best of the rounds by turns."""
    import torch

    from rwkv_peft.inference.forward import prefill

    mine = theirs = 0.0
    for seed in range(rounds + 1):  # the first warms up
        prompt = torch.randint(1, 60000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        began = time.perf_counter()
        prefill(ours, [prompt])
        mine = max(mine, length / (time.perf_counter() - began))
        if server:
            asked = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "cache_prompt": False}
            timings = server.handle_completions(asked)["timings"]
            theirs = max(theirs, timings["prompt_n"] / timings["prompt_ms"] * 1e3)
    return f"{mine:,.0f} ({mine / theirs:.2f})" if theirs else f"{mine:,.0f}"


def llama_cpp(path, kind, threads, places, context):
    """llama.cpp's server, on a GGUF of a type beside the model, for `context` tokens in each of some places."""
    import xllamacpp

    from rwkv_peft.checkpoints.base import open_base
    from rwkv_peft.release.runtimes import written

    params = xllamacpp.CommonParams()
    params.model.path = str(written(Path(path).parent, kind, open_base(path)))
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = context * places, places, -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def our_rate(model, prompts, tokens):
    """Tokens a second; prompts are read before the clock starts."""
    from rwkv_peft.inference.decode import generate
    from rwkv_peft.inference.settings import Sampling

    steps = generate(model, prompts, Sampling(temperature=0), tokens + 1)
    for _ in prompts:  # the first token of each comes of reading its prompt
        next(steps)
    began = time.perf_counter()
    drawn = sum(1 for _ in steps)
    return drawn / (time.perf_counter() - began)


def llama_rate(server, prompts, tokens):
    """The same for llama.cpp, by its own clock, which leaves prompts out: all tokens over the longest time of one."""

    def ask(prompt):
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        return server.handle_completions(asked)["timings"]

    with ThreadPoolExecutor(len(prompts)) as pool:
        timings = list(pool.map(ask, prompts))
    return sum(one["predicted_n"] for one in timings) / max(one["predicted_ms"] for one in timings) * 1e3


if __name__ == "__main__":
    main()
