"""Tokens a second of decoding, beside the `rwkv` package and llama.cpp (`xllamacpp`) with the same model.

    python benchmarks/generate.py [--generation 6 7] [--layers 12] [--channels 768] [--threads 1 2] [--batches 1 16]

Makes a random model in a temporary folder. All continue greedily, from prompts of 8 tokens, each generation and number
of threads in a process of its own; they take turns, and the best of the rounds counts, because other work on the
machine can only slow one down. Beside it is the median, over the rounds, of the ratio of our tokens a second to the
other's in the same round. The package has no batches: it advances the sequences one after the other; llama.cpp, with a
GGUF in the same precision, gets only one sequence. For one thread, tokens per second of processor time are printed
beside those of the clock, but not for llama.cpp.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = 8
GGUF = {"fp32": "f32", "bf16": "bf16"}
VERSIONS = {"6": "x060", "7": "x070"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", nargs="+", choices=("6", "7"), default=("6", "7"))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each sequence in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help=argparse.SUPPRESS)  # set where this program runs itself
    args = parser.parse_args()
    if args.model:
        return measure(args)
    print("| RWKV | threads | sequences | clock | rwkv_peft, tokens/s | beside | tokens/s | median ratio |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for generation in args.generation:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pth"
            make_model(path, VERSIONS[generation], args.layers, args.channels)
            for threads in args.threads:
                flags = {"model": path, "generation": generation, "threads": threads, "precision": args.precision}
                flags |= {"tokens": args.tokens, "rounds": args.rounds}
                command = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
                batches = ["--batches", *map(str, args.batches)]
                environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
                subprocess.run([sys.executable, __file__, *command, *batches], env=environment, check=True)


def make_model(path, version, layers, channels):
    """A random World-vocabulary model of the official widths, float32."""
    import torch

    from rwkv_peft.files.base import save_model
    from rwkv_peft.models import family_named

    torch.manual_seed(0)
    family = family_named(version)
    shapes = family.shapes(family.new_dimensions(n_layer=layers, n_embd=channels, vocab_size=65536))
    save_model(
        path,
        {key: torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape) for key, shape in shapes.items()},
    )


def measure(args):
    """Print the rows of the table for one generation and number of threads."""
    import torch

    from rwkv_peft.generate import load_model

    generation, threads = args.generation[0], args.threads[0]
    torch.set_num_threads(threads)
    ours, _ = load_model(args.model, precision=args.precision)
    package = rwkv_package(args.model, generation, args.precision)
    server = llama_cpp(args.model, args.precision, threads)
    for batch in args.batches:
        prompts = torch.randint(1, 60000, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
        tokens = args.tokens if batch == 1 else max(args.tokens // 4, 2)
        others = {"rwkv": (package_rates, package)} | ({"llama.cpp": (llama_rates, server)} if batch == 1 else {})
        rounds = []
        for _ in range(args.rounds + 1):  # the first warms up
            rates = {name: ask(model, prompts, tokens) for name, (ask, model) in others.items()}
            rounds.append((our_rates(ours, prompts, tokens), rates))
        for name in others:
            clocks = ("wall", "processor")[: 2 if threads == 1 and name == "rwkv" else 1]
            for clock, word in enumerate(clocks):
                pairs = [(mine[clock], rates[name][clock]) for mine, rates in rounds[1:]]
                mine, other = (max(side) for side in zip(*pairs))
                ratio = statistics.median(a / b for a, b in pairs)
                cells = generation, threads, batch, word, f"{mine:.1f}", name, f"{other:.1f}", f"{ratio:.2f}"
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def rwkv_package(path, generation, precision):
    """The `rwkv` package's model; it reads the generation when it is imported."""
    import contextlib
    import io

    os.environ["RWKV_V7_ON"] = "1" if generation == "7" else "0"
    with contextlib.redirect_stdout(io.StringIO()):
        from rwkv.model import RWKV

        return RWKV(model=path.removesuffix(".pth"), strategy=f"cpu {precision}")


def llama_cpp(path, precision, threads):
    """llama.cpp's server, on a GGUF of the same precision beside the model."""
    import xllamacpp

    from rwkv_peft.files.base import open_base
    from rwkv_peft.release.verify import written

    params = xllamacpp.CommonParams()
    params.model.path = str(written(Path(path).parent, GGUF[precision], open_base(path)))
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 512, 1, -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def our_rates(model, prompts, tokens):
    """Tokens a second by the wall clock and by processor time; prompts are read before the clocks start."""
    from rwkv_peft.generate import Sampling, generate

    steps = generate(model, prompts, Sampling(temperature=0), tokens + 1)
    for _ in prompts:  # the first token of each comes of reading its prompt
        next(steps)
    began = time.perf_counter(), time.process_time()
    drawn = sum(1 for _ in steps)
    return drawn / (time.perf_counter() - began[0]), drawn / (time.process_time() - began[1])


def package_rates(model, prompts, tokens):
    """The same for the package."""
    import torch

    with torch.inference_mode():
        rows = [model.forward(prompt, None) for prompt in prompts]
        began = time.perf_counter(), time.process_time()
        for _ in range(tokens):
            rows = [model.forward([int(logits.argmax())], state) for logits, state in rows]
        drawn = tokens * len(prompts)
        return drawn / (time.perf_counter() - began[0]), drawn / (time.process_time() - began[1])


def llama_rates(server, prompts, tokens):
    """The same for llama.cpp, one prompt, only by its own clock, which leaves the prompt out."""
    answer = server.handle_completions(
        {"prompt": prompts[0], "n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    )
    return (answer["timings"]["predicted_per_second"],)


if __name__ == "__main__":
    main()
