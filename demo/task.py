"""The demo's language: short stories of who has what, and questions about them.

    python demo/task.py base     --documents 80000 --seed 1 --output base.jsonl
    python demo/task.py finetune --documents 4000  --seed 1 --output finetune.jsonl
    python demo/task.py heldout  --documents 200   --seed 1 --output heldout.jsonl

`base` documents answer in plain words. `finetune` documents answer in JSON, a format that no base document shows.
`heldout` documents are like those of `finetune`, but every fact asked for is one that neither of the other kinds ever
states. The same arguments give the same file, byte for byte.
"""

import argparse
import json
import random
import sys
from typing import NamedTuple

NAMES = ("Ann", "Ben", "Cora", "Dan", "Eva", "Fay", "Gus", "Hal", "Ida", "Jim", "Kim", "Leo", "Mia", "Ned", "Otto", "Pam",
         "Quinn", "Rob", "Sue", "Tom", "Uma", "Vic", "Wes", "Zoe")
COLORS = ("red", "blue", "green", "white", "black", "brown", "pink", "gray", "yellow", "orange", "purple", "golden")
ITEMS = ("apples", "balls", "cups", "dolls", "eggs", "flags", "grapes", "hats", "jars", "kites", "lamps", "maps", "nuts",
         "pens", "rings", "shoes", "toys", "books", "coins", "drums", "boats", "pears", "spoons", "trees")
COUNTS = range(2, 10)
KINDS = ("base", "finetune", "heldout")
HELD_OUT = 10  # one fact in ten is kept for the held-out questions


class Fact(NamedTuple):
    """Who has how many of what."""

    name: str
    count: int
    color: str
    item: str

    @property
    def sentence(self):
        return f"{self.name} has {self.count} {self.color} {self.item}."

    @property
    def held_out(self):
        indices = (NAMES.index(self.name), self.count, COLORS.index(self.color), ITEMS.index(self.item))
        return sum(indices) % HELD_OUT == 0


def story(rng, sizes, held_out=False):
    """Facts, as many as one of `sizes` says, about different people and things; their order is random.

    held_out: the first fact returned is one that is kept for the held-out questions; otherwise none is.
    """
    size = rng.choice(sizes)
    while True:
        facts = [Fact(name, rng.choice(COUNTS), color, item) for name, color, item in
                 zip(rng.sample(NAMES, size), rng.sample(COLORS, size), rng.sample(ITEMS, size))]
        if facts[0].held_out == held_out and not any(fact.held_out for fact in facts[1:]):
            return facts


def tell(rng, facts):
    """The facts as one line of text, in random order."""
    return " ".join(fact.sentence for fact in rng.sample(facts, len(facts))) + "\n"


def base_document(rng):
    """A story, and questions in plain words: what each one has, in any order, and who has one of the things."""
    facts = story(rng, (1, 2, 3))
    turns = [(fact.name, f"{fact.count} {fact.color} {fact.item}") for fact in facts]
    turns += [(f"{fact.color} {fact.item}", fact.name) for fact in rng.sample(facts, 1)]
    rng.shuffle(turns)
    return {"text": tell(rng, facts) + "".join(f"Q: {question}?\nA: {answer}\n" for question, answer in turns)}


def json_document(rng, held_out):
    """A story and one question, answered in JSON."""
    facts = story(rng, (2, 3), held_out)
    return {"prompt": f"{tell(rng, facts)}Q: {facts[0].name} as JSON?\nA:",
            "completion": f" {json.dumps(facts[0]._asdict())}\n"}


def documents(kind, count, seed):
    """Yield `count` documents of one of KINDS: dicts with `text` (base), or with `prompt` and `completion`."""
    rng = random.Random(f"{kind} {seed}")
    for _ in range(count):
        yield base_document(rng) if kind == "base" else json_document(rng, kind == "heldout")


def main(argv):
    """Write the documents as JSON lines."""
    parser = argparse.ArgumentParser(description="Write the demo's documents as JSON lines.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--documents", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", required=True)
    args = parser.parse_args(argv)
    with open(args.output, "w", encoding="utf-8") as file:
        for document in documents(args.kind, args.documents, args.seed):
            file.write(json.dumps(document) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
