"""Trains a small student plainly and by --objective distill, on the same rows, and compares its loss on held-out rows.

    python benchmarks/distill.py --student rwkv6-tiny-1m-bf16.pth --teacher rwkv6-tiny-3m-bf16.pth \\
        --rows gsm8k/train.jsonl --steps 200

The teacher itself is trained on the rows first, by plain steps. Tokens are the bytes of UTF-16, on which the tiny
models of rwkv.cpp's tests were trained, two a character; every token counts. Flags after -- are those of train.py for
students.
"""

import sys
import tempfile
from pathlib import Path

from common import Parser, split, train, write_model, write_tokens
from methods import demo_rows, texts_of, tokens_of

TRAIN = "--peft none --ctx_len 256 --micro_bsz 8 --random_seed 1 --lr_init 1e-3 --lr_final 1e-4 --warmup_steps 10"
STUDENTS = {
    "plain": (),
    "forward KL": (),
    "forward KL, weight 0.5": ("--distill_weight", "0.5"),
    "reverse KL, weight 0.5": ("--distill_weight", "0.5", "--distill_kl", "reverse"),
}


def main(argv):
    own, more = split(argv)
    files = dict.fromkeys(("student", "teacher", "rows"))
    parser = Parser(__doc__, **files, steps=1, teacher_steps=1, held_out=2, students=2, output=None)
    for name in files:
        parser.add_argument(f"--{name}", required=True, metavar="FILE")
    parser.add_argument("--steps", type=int, default=200, help="of each student (default 200)")
    parser.add_argument("--teacher_steps", type=int, default=200, help="of the teacher, on the rows (default 200)")
    parser.add_argument("--held_out", type=int, default=64, help="rows to measure on (default 64)")
    parser.add_argument("--students", type=int, default=len(STUDENTS), help="the first so many")
    parser.add_argument("--output", default="out/distill", metavar="DIR")
    args = parser.parse_args(own)
    folder = Path(args.output or tempfile.mkdtemp()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if args.quick:
        args.student = args.teacher = folder / "model.pth"
        write_model(args.student, "x060", 1, 64, 256)
    texts = texts_of(args.rows or demo_rows(folder), None if args.quick else "question")
    for name, part in {"train": texts[: -args.held_out], "held-out": texts[-args.held_out :]}.items():
        write_tokens(folder / name, 256, [tokens_of(text, utf16=True) for text in part])
    data = ("--data_file", folder / "train", "--val_data", folder / "held-out", "--epoch_count", 1, *TRAIN.split())
    first = train(folder / "teacher", "--load_model", args.teacher, *data, "--epoch_steps", args.teacher_steps)
    print(f"teacher: {2 * first[-1]['val_loss']:.4f} nats a character")
    for number, (name, flags) in enumerate([*STUDENTS.items()][: args.students]):
        distill = ("--objective", "distill", "--teacher_model", folder / "teacher" / "rwkv.pth") if number else ()
        length = ("--load_model", args.student, "--epoch_steps", args.steps)
        last = train(folder / f"student-{number}", *length, *data, *distill, *flags, *more)[-1]
        kl = f", KL {2 * last['val_kl']:.4f}" if number else ""
        print(f"{name}: {2 * last.get('val_nll', last['val_loss']):.4f} nats a character{kl}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
