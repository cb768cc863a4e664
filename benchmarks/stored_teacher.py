"""How much of a teacher's word its k most probable tokens hold: the probability that is left, and the divergence of a
student over these tokens and one class of all others, beside that over all tokens.

    python benchmarks/stored_teacher.py --student rwkv6-tiny-1m-bf16.pth --teacher rwkv6-tiny-3m-bf16.pth \\
        --rows gsm8k/train.jsonl [--number 32] [--top_k 1 4 16 64]

Tokens are the bytes of UTF-16, two a character
"""

import argparse

import torch
from methods import tokens_of

from rwkv_peft.data.encoding import parse
from rwkv_peft.data.rows import read_chunks
from rwkv_peft.data.templates import Template, read_template
from rwkv_peft.files.base import open_base
from rwkv_peft.objectives.divergence import Divergence, divergence, most_probable

KINDS = ("forward", "reverse")


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "teacher", "rows"):
        parser.add_argument(f"--{name}", required=True, metavar="FILE")
    parser.add_argument("--number", type=int, default=32, help="of rows (default 32)")
    parser.add_argument("--top_k", type=int, nargs="+", default=(1, 4, 16, 64))
    args = parser.parse_args()
    torch.set_num_threads(1)
    layout = Template(read_template("question"))
    rows = [parse(item) for chunk in read_chunks(args.rows) for item in chunk.items][: args.number]
    texts = ["".join(text for text, _ in layout(row)) for row in rows]
    student, teacher = (torch.cat(list(logits(path, texts))) for path in (args.student, args.teacher))
    print(f"{len(teacher):,} tokens\n")
    print("| tokens stored | bytes a token | left, mean | left, most | forward KL | reverse KL |")
    print(f"|{'---|' * 6}")
    for number in args.top_k:
        stored = most_probable(teacher, number, 1.0)
        left = stored.logprobs[:, -1].exp()
        kls = " | ".join(f"{mean(student, stored, kind):.4f}" for kind in KINDS)
        print(f"| {number} | {8 * number + 4} | {left.mean():.2%} | {left.max():.2%} | {kls} |", flush=True)
    print(f"| all | | | | {' | '.join(f'{mean(student, teacher, kind):.4f}' for kind in KINDS)} |")


def logits(path, texts):
    base = open_base(path)
    model = base.family.load(base.tensors, base.config).float()
    for text in texts:
        yield model(torch.tensor(tokens_of(text, utf16=True))[None, :-1])[0][0]


def mean(student, teacher, kind):
    return divergence(student.clone(), teacher, Divergence(kind, 0.5, 1.0, 1.0))[0].mean().item()


if __name__ == "__main__":
    main()
