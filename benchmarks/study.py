"""Trains a tiny model to answer questions from facts in its context, has it study documents of new facts, and counts
the questions that it then answers without the document.

    python benchmarks/study.py [--facts 8 24 48] [--steps 1200 1600] [--output out/study]

A fact gives a made-up name a number of two digits, `Ku37`; the base learns to answer from up to eight facts before
the questions, and "?" without. A document's facts are new, because names and numbers are paired anew. Each document is
studied by rwkv-peft study, as a state and as an adapter; then the model is asked for each fact, greedily: with the
document's part before the question, with nothing, and with what it studied.
"""

import json
import random
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from common import Parser, head, row, run, split

from rwkv_peft.checkpoints.adapters import AdapterSource
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.evals.questions import GREEDY, sample
from rwkv_peft.inference.loading import Subject, load_model

NAMES = ["".join(pair) for pair in product("BDFGHKLMNPRSTVWYZ", "aeiou")]
AT_ONCE = 8  # facts that the base learns to answer from
ASK, ANSWER, STOP = "?", "?{question}\n!{question}", "\n"
SIZES = ("--generation", "7", "--n_layer", "2", "--n_embd", "64", "--head_size", "32", "--vocab_size", "257")
BASE = "--lr_init 3e-3 --lr_final 1e-4 --warmup_steps 20 --weight_decay 0.1 --beta2 0.99 --micro_bsz 4 --ctx_len 512"
WAYS = {
    "state": "--train_parts state --lr_init 0.1 --lr_final 0.01",
    "bat-in, rank 16": "--peft bone --bone_mode bat-in --bone_r 16 --lr_init 5e-3 --lr_final 5e-4",
}


def told(facts):
    return " ".join(f"{name}{number}" for name, number in facts)


def asked(facts, rng, times):
    """Questions with their answers, without facts "?"."""
    known = dict(facts)
    for _ in range(times):
        name = rng.choice(list(known) or NAMES)
        yield f"?{name}\n!{name}{known.get(name, '?')}\n"


def draw(rng, number):
    return [(name, rng.randint(10, 99)) for name in rng.sample(NAMES, number)]


def base_rows(number, rng):
    """Rows of facts and questions on them; one in eight has no facts."""
    for place in range(number):
        facts = draw(rng, rng.randint(1, AT_ONCE)) if place % 8 else []
        yield {"prompt": told(facts) + "\n\n" if facts else "", "completion": "".join(asked(facts, rng, 8))}


def train_base(folder, rounds, more):
    """Train the base in rounds of so many steps, each with rates and rows of its own -> its file."""
    model = folder / "base-0" / "rwkv.pth"
    for number, steps in enumerate(rounds):
        rows, before = folder / f"base-{number}.jsonl", model
        model = folder / f"base-{number}" / "rwkv.pth"
        if model.exists():
            continue
        with open(rows, "w") as file:
            for row in base_rows(32 * steps, random.Random(number + 1)):
                file.write(json.dumps(row) + "\n")
        begin = ("--load_model", before) if number else SIZES
        data = ("--data_file", rows, "--data_type", "sft", "--tokenizer", "bytes", "--dataload", "pack")
        length = ("--epoch_steps", steps, "--epoch_count", 1, "--answer_rows", 0, "--precision", "fp32")
        run("train.py", "--peft", "none", *begin, *data, *length, *BASE.split(), "--proj_dir", model.parent, *more)
    return model


def right(facts, subject, before=None):
    """The share of facts that a model tells if it is asked; before gives the text before the question on a fact."""
    tokenizer = subject.tokenizer
    prompts = {
        place: tokenizer.encode((before(place) if before else "") + ANSWER.format(question=name))
        for place, (name, _) in enumerate(facts)
    }
    answers = sample(subject, prompts, dict.fromkeys(prompts, (STOP,)), GREEDY, 8, 32)
    return sum(answer.text.strip() == str(facts[answer.number][1]) for answer in answers) / len(facts)


def subject_of(path, adapter=None):
    model, start = load_model(path, [AdapterSource(adapter)] if adapter else [])
    return Subject(model, start, BytesTokenizer())


def study(folder, base, facts, way, more, quick):
    """Study a document of facts -> the share that is told without it afterwards."""
    place = folder / f"{len(facts)}-{way.split(',')[0]}"
    document = folder / f"{len(facts)}.txt"
    lines = [told(facts[first : first + AT_ONCE]) for first in range(0, len(facts), AT_ONCE)]
    document.write_text("\n\n".join(lines) + "\n")
    due = folder / f"{len(facts)}.jsonl"  # what the document says, to measure on
    with open(due, "w") as file:
        for at, (name, number) in enumerate(facts):
            row = {"context": lines[at // AT_ONCE], "prompt": ANSWER.format(question=name), "completion": f"{number}\n"}
            file.write(json.dumps(row) + "\n")
    questions = ("--questions", 48, "--ask", ASK, "--answer", ANSWER, "--stop", r"\n")
    ours = ("--rows", due) if quick else (document, "--part_tokens", 5 * AT_ONCE, *questions)
    where = ("--load_model", base, "--output", place, "--tokenizer", "bytes", "--precision", "fp32")
    length = ("--micro_bsz", 8, "--epoch_count", 1, "--answer_rows", 0, "--val_data", due)
    told_of = run("-m", "rwkv_peft", "study", *ours, *where, *length, *WAYS[way].split(), *more)
    print(f"{len(facts)} facts, {way}: {told_of.splitlines()[-1]}", flush=True)
    return right(facts, subject_of(base, place / "adapter.safetensors"))


def main(argv):
    own, more = split(argv)
    parser = Parser(__doc__, facts=(2,), steps=(1,), output=None)
    parser.add_argument("--facts", type=int, nargs="+", default=[8, 24, 48], help="of the documents")
    parser.add_argument("--steps", type=int, nargs="+", default=[1200, 1600], help="of the base's rounds of training")
    parser.add_argument("--output", default="out/study", metavar="DIR")
    args = parser.parse_args(own)
    folder = Path(args.output or tempfile.mkdtemp()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    length = ("--epoch_steps", 1 if args.quick else 200)
    base = train_base(folder, args.steps, more)
    head("facts", "with its part of the document", "nothing", *WAYS)
    for number in args.facts:
        facts = draw(random.Random(number), number)
        subject = subject_of(base)
        parts = [told(facts[first : first + AT_ONCE]) + "\n\n" for first in range(0, number, AT_ONCE)]
        shares = [right(facts, subject, lambda place, parts=parts: parts[place // AT_ONCE]), right(facts, subject)]
        shares += [study(folder, base, facts, way, [*more, *length], args.quick) for way in WAYS]
        row(number, *(f"{share:.0%}" for share in shares))


if __name__ == "__main__":
    main(sys.argv[1:])
