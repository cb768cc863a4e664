"""Compares adapter methods, each at its own best learning rate, by rwkv-peft compare on a small model.

    python demo/task.py finetune --documents 4000 --seed 1 --output out/finetune.jsonl
    python benchmarks/methods.py --rows out/finetune.jsonl --rank 16 --steps 200             (the demo's base and task)
    python benchmarks/methods.py --model rwkv6-tiny-1m-bf16.pth --rows gsm8k/train.jsonl --template question --utf16 \\
        --rank 8 --rates 1e-3 3e-3 1e-2 --steps 200 --val_every 40

Rows are laid out as by rwkv-peft preprocess, or by --template; every token counts, and the last --held_out rows are the
validation data. Tokens are the bytes of UTF-8 and an end token (the demo's vocabulary), or with --utf16 the bytes of
UTF-16, on which the tiny models of rwkv.cpp's tests were trained. --retain_text also measures how much of a text is
forgotten: train.py's --retain_data is its first --retain_chars characters. Further flags are those of rwkv-peft
compare, and after -- those of train.py, some of which are always given (TRAIN). With --quick, one rate of bone.
"""

import tempfile
from pathlib import Path

from common import DEMO, ROOT, Parser, run, split, write_tokens

from rwkv_peft.cli.errors import exit_on_user_error
from rwkv_peft.data.chat import TURN_END
from rwkv_peft.data.encoding import parse
from rwkv_peft.data.layouts import RowLayout, Template, read_template
from rwkv_peft.data.rows import read_rows
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.tools.compare.command import main as compare

TRAIN = ("--ctx_len", "256", "--micro_bsz", "2", "--precision", "fp32", "--warmup_steps", "10")
QUICK = "--methods bone --rank 8 --rates 1e-3 --seeds 1 --steps 2".split()


def main(argv):
    own, train = split(argv)
    parser = Parser(__doc__, rows=None, held_out=2, output=None)
    parser.add_argument("--model", default=DEMO["x060"], metavar="PTH")
    parser.add_argument("--rows", required=True, metavar="FILE")
    parser.add_argument("--template", metavar="NAME", help="as preprocess takes it")
    parser.add_argument("--utf16", action="store_true")
    parser.add_argument("--held_out", type=int, default=16, help="rows to validate on (default 16)")
    parser.add_argument("--retain_text", metavar="TXT")
    parser.add_argument("--retain_chars", type=int, default=8192, help="(default 8192)")
    parser.add_argument("--output", default="out/methods", metavar="DIR")
    args, further = parser.parse_known_args(own)
    folder = Path(args.output or tempfile.mkdtemp())
    texts = texts_of(args.rows or demo_rows(folder), args.template)
    parts = {"train": texts[: -args.held_out], "held-out": texts[-args.held_out :]}
    if args.retain_text:
        parts["retain"] = [Path(args.retain_text).read_text(encoding="utf-8")[: args.retain_chars]]
    vocabulary = 256 if args.utf16 else BytesTokenizer.vocab_size
    for name, part in parts.items():
        write_tokens(folder / name, vocabulary, [tokens_of(text, args.utf16) for text in part])
    data = ("--load_model", args.model, "--data_file", folder / "train", "--val_data", folder / "held-out")
    retain = ("--retain_data", folder / "retain") if args.retain_text else ()
    further = QUICK if args.quick else further
    return compare([*map(str, ("--output", folder, *further, "--", *data, *retain, *TRAIN, *train))])


def demo_rows(folder):
    """Write a few rows of the demo's task -> their file."""
    folder.mkdir(parents=True, exist_ok=True)
    run(ROOT / "demo" / "task.py", "finetune", "--documents", 24, "--output", folder / "rows.jsonl")
    return folder / "rows.jsonl"


def texts_of(path, template):
    """The text of each row of a file, laid out by a template if one is named."""
    layout = Template(read_template(template)) if template else RowLayout()
    rows = [parse(item) for _, item in read_rows(path)]
    return ["".join(text for text, _ in layout.segments(row)) for row in rows]


def tokens_of(text, utf16):
    """The tokens of one document."""
    if utf16:
        return list((text + TURN_END).encode("utf-16-le"))
    return [*BytesTokenizer().encode(text), BytesTokenizer.end_id]


if __name__ == "__main__":
    exit_on_user_error(main)
