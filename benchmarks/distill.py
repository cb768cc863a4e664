"""Trains a small student plainly and by --objective distill, on the same rows, and compares its loss on held-out rows.

    python benchmarks/distill.py --student rwkv6-tiny-1m-bf16.pth --teacher rwkv6-tiny-3m-bf16.pth \\
        --rows gsm8k/train.jsonl --steps 200

The teacher itself is trained on the rows first, by plain steps. Tokens are the bytes of UTF-16, on which the tiny
models of rwkv.cpp's tests were trained, two a character; every token counts. Flags after -- are those of train.py for
students.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from methods import tokens_of

from rwkv_peft.data.encoding import parse
from rwkv_peft.data.rows import read_chunks
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.data.templates import Template, read_template

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ("--peft", "none", "--ctx_len", "256", "--micro_bsz", "8", "--precision", "fp32", "--random_seed", "1")
RATE = ("--lr_init", "1e-3", "--lr_final", "1e-4", "--warmup_steps", "10")
STUDENTS = {
    "plain": (),
    "forward KL": (),
    "forward KL, weight 0.5": ("--distill_weight", "0.5"),
    "reverse KL, weight 0.5": ("--distill_weight", "0.5", "--distill_kl", "reverse"),
}


def main(argv):
    own, more = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "teacher", "rows"):
        parser.add_argument(f"--{name}", required=True, metavar="FILE")
    parser.add_argument("--steps", type=int, default=200, help="of each student (default 200)")
    parser.add_argument("--teacher_steps", type=int, default=200, help="of the teacher, on the rows (default 200)")
    parser.add_argument("--held_out", type=int, default=64, help="rows to measure on (default 64)")
    parser.add_argument("--output", default="out/distill", metavar="DIR")
    args = parser.parse_args(own)
    folder = Path(args.output).resolve()
    write_data(folder, args)
    teacher = train(folder / "teacher", args.teacher, args.teacher_steps)
    print(f"teacher: {2 * teacher['val_loss']:.4f} nats a character")
    for number, (name, flags) in enumerate(STUDENTS.items()):
        distill = ("--objective", "distill", "--teacher_model", folder / "teacher" / "rwkv.pth") if number else ()
        last = train(folder / f"student-{number}", args.student, args.steps, *distill, *flags, *more)
        kl = f", KL {2 * last['val_kl']:.4f}" if number else ""
        print(f"{name}: {2 * last.get('val_nll', last['val_loss']):.4f} nats a character{kl}", flush=True)


def write_data(folder, args):
    layout = Template(read_template("question"))
    rows = [parse(item) for chunk in read_chunks(args.rows) for item in chunk.items]
    texts = ["".join(text for text, _ in layout(row)) for row in rows]
    for name, part in {"train": texts[: -args.held_out], "held-out": texts[-args.held_out :]}.items():
        with ShardWriter(folder / name, 256) as writer:
            for text in part:
                writer.add(tokens_of(text, utf16=True))


def train(output, model, steps, *flags):
    """Train a model in the folder `output` -> the last line of its metrics."""
    data = ("--data_file", output.parent / "train", "--val_data", output.parent / "held-out")
    length = ("--epoch_steps", steps, "--epoch_count", 1, "--proj_dir", output, "--accelerator", "cpu")
    command = [sys.executable, "train.py", "--load_model", Path(model).resolve(), *data, *length, *TRAIN, *RATE, *flags]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])


if __name__ == "__main__":
    main(sys.argv[1:])
