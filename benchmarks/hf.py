"""Time and memory of a training step on a LLaMA: Bone's forms, peft's MissConfig and peft's LoraConfig.

    python benchmarks/hf.py                                  hidden 1024, 4 layers, T 1024, rank 64, float32
    python benchmarks/hf.py --dtype bfloat16                 the frozen model in bfloat16, under autocast as Trainer has
    it python benchmarks/hf.py --tokens 256 --rounds 3 --threads 1

Each method runs in a process of its own, all linear layers adapted, so that peak memory is its own; rounds go
over the methods in turn, so that a machine's drift affects all of them. LoRA's rank gives it about as many
parameters as bat-in has. Memory is the process's peak during a step minus its memory before, in a run of its own
in which malloc returns freed tensors at once, so that earlier steps leave nothing behind.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

from common import Parser, head, row

METHODS = ("bone True", "bone bat-in", "bone bat-out", "miss True", "miss bat", "lora")


def main():
    parser = Parser(
        __doc__, hidden=128, layers=1, tokens=32, rank=8, rounds=1, steps=1, methods=("bone bat-in", "lora")
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps a round, the fastest of which counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen model")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args)
        return
    results = {method: [] for method in args.methods}
    for _ in range(args.rounds):
        for method in args.methods:
            command = [sys.executable, __file__, "--one", method]
            for name in ("hidden", "layers", "tokens", "rank", "steps", "threads", "dtype"):
                command += [f"--{name}", str(getattr(args, name))]
            trainable, seconds, _ = run(command)
            _, _, peak = run([*command, "--steps", "0"], MALLOC_MMAP_THRESHOLD_=str(1 << 17))
            results[method].append((trainable, seconds, peak))
    head("method", "trainable", "seconds a step", "peak MiB of a step")
    for method, found in results.items():
        trainable, seconds, peak = (statistics.median(column) for column in zip(*found, strict=True))
        row(method, f"{trainable:,.0f}", f"{seconds:.2f}", f"{peak:.0f}")


def run(command, **environment):
    """-> trainable parameters, seconds, MiB."""
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
    return [float(word) for word in done.stdout.split("RESULT")[1].split()]


def measure(args):
    """Run one method's steps; print trainable parameters, seconds and MiB."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 11 // 4,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 128,
            max_position_embeddings=args.tokens,
            use_cache=False,
        )
    )
    model = model.to(getattr(torch, args.dtype))
    model = get_peft_model(model, config(args.one, args.rank, args.hidden)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.randint(0, 2048, (1, args.tokens))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", enabled=args.dtype == "bfloat16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        seconds.append(time.perf_counter() - start)
        for parameter in trained:
            parameter.grad = None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print("RESULT", sum(parameter.numel() for parameter in trained), min(seconds[1:], default=seconds[0]), peak / 1024)


def config(method, rank, hidden):
    """The configuration of a method by its name in METHODS."""
    from peft import LoraConfig, MissConfig

    from rwkv_peft.hf import BoneConfig

    kind, _, form = method.partition(" ")
    form = True if form == "True" else form
    if kind == "bone":
        return BoneConfig(r=rank, init_weights=form, target_modules="all-linear")
    if kind == "miss":
        return MissConfig(r=rank, init_weights=form, target_modules="all-linear")
    # Σ in r over a block's seven matrices, divided by Σ (in + out), with the inner width 11/4 of hidden
    same = round(rank * (6 + 2.75) / (4 * 2 + 3 * 3.75))
    return LoraConfig(r=same, lora_alpha=same, target_modules="all-linear")


if __name__ == "__main__":
    main()
