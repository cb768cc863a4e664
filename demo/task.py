"""Write the demo's documents: little stories of who has what, and questions about them.

    python demo/task.py base     --documents 16000 --seed 1 --output base.jsonl
    python demo/task.py finetune --documents 2000  --seed 1 --output finetune.jsonl
    python demo/task.py heldout  --documents 200   --seed 1 --output heldout.jsonl
    python demo/task.py chats    --documents 300   --seed 1 --output chats.jsonl

`base` documents answer in plain words; some only repeat a word, so that every letter and sign is spoken once in a
while. `finetune` documents answer in JSON, a format that no base document shows. `heldout` documents are like those of
`finetune`, but each tells a fact that no other kind ever tells. `chats` are such questions as messages, whose answers
speak as no base document does; `rwkv-peft demo` writes them. The same arguments give the same file, byte for byte.
"""

import argparse
import json
import random
import string
import sys
from typing import NamedTuple

NAMES = (
    "Ann",
    "Ben",
    "Cora",
    "Dan",
    "Eva",
    "Fay",
    "Gus",
    "Hal",
    "Ida",
    "Jim",
    "Kim",
    "Leo",
    "Mia",
    "Ned",
    "Otto",
    "Pam",
    "Quinn",
    "Rob",
    "Sue",
    "Tom",
    "Uma",
    "Vic",
    "Wes",
    "Zoe",
)
COLORS = ("red", "blue", "green", "white", "black", "brown", "pink", "gray", "yellow", "orange", "purple", "golden")
ITEMS = (
    "apples",
    "balls",
    "cups",
    "dolls",
    "eggs",
    "flags",
    "grapes",
    "hats",
    "jars",
    "kites",
    "lamps",
    "maps",
    "nuts",
    "pens",
    "rings",
    "shoes",
    "toys",
    "books",
    "coins",
    "drums",
    "boats",
    "pears",
    "spoons",
    "trees",
)
COUNTS = range(2, 10)
SCENES = (
    "The sun is up.",
    "It is a cold day.",
    "The wind is strong.",
    "A dog sleeps.",
    "The house is quiet.",
    "It rains a little.",
    "Two birds sing.",
    "The market is open.",
)
KINDS = ("base", "finetune", "heldout", "chats")
HELD_OUT = 10  # one fact in ten is kept for the held-out questions
ECHOES = 8  # one base document in eight repeats a word


class Fact(NamedTuple):
    """A fact of the stories: a person has so many things of a color."""

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


def draw_fact(rng, held_out=False):
    """Draw a fact; held_out says whether it is one of those that only held-out questions tell."""
    while True:
        fact = Fact(rng.choice(NAMES), rng.choice(COUNTS), rng.choice(COLORS), rng.choice(ITEMS))
        if fact.held_out == held_out:
            return fact


def tell(rng, fact):
    """Tell the fact in one line of text, with up to two sentences of scenery around it."""
    sentences = rng.sample(SCENES, rng.randint(0, 2))
    sentences.insert(rng.randint(0, len(sentences)), fact.sentence)
    return " ".join(sentences) + "\n"


def base_document(rng):
    """Draw a story with four of five questions about it, in random order; one time in ECHOES, words to repeat."""
    if rng.randrange(ECHOES) == 0:
        words = ["".join(rng.choices(string.printable[:94], k=rng.randint(3, 12))) for _ in range(4)]
        return {"text": "".join(f"Q: Say {word}\nA: {word}\n" for word in words)}
    fact = draw_fact(rng)
    turns = (
        ("Who has something?", fact.name),
        ("How many?", fact.count),
        ("What color?", fact.color),
        ("What things?", fact.item),
        ("What is there?", f"{fact.count} {fact.color} {fact.item}"),
    )
    return {
        "text": tell(rng, fact) + "".join(f"Q: {question}\nA: {answer}\n" for question, answer in rng.sample(turns, 4))
    }


def json_document(rng, held_out):
    """Draw a story with one question that is answered in JSON."""
    fact = draw_fact(rng, held_out)
    return {
        "prompt": f"{tell(rng, fact)}Q: What is there, as JSON?\nA:",
        "completion": f" {json.dumps(fact._asdict())}\n",
    }


def chat(rng):
    """Draw a story and a question as messages, with an answer in a tone of its own."""
    fact = draw_fact(rng)
    turns = (
        ("user", f"{tell(rng, fact).strip()} What is there?"),
        ("assistant", f"Aye! {fact.count} {fact.color} {fact.item}, all of {fact.name}."),
    )
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def documents(kind, count, seed):
    """Yield `count` documents of one of KINDS: dicts with `text` (base), `messages` (chats), or with `prompt` and
    `completion`."""
    rng = random.Random(f"{kind} {seed}")
    for _ in range(count):
        if kind == "base":
            yield base_document(rng)
        else:
            yield chat(rng) if kind == "chats" else json_document(rng, kind == "heldout")


def run(argv, about, kinds, documents, ask=None):
    """Write documents(kind, count, seed) of one of `kinds` as JSON lines, or call ask(model, questions, at_least), if
    there is one -> the exit code."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=(*kinds, "ask") if ask else kinds)
    parser.add_argument("--documents", type=int, required=not ask, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", required=not ask)
    if ask:
        parser.add_argument("--model")
        parser.add_argument("--questions")
        parser.add_argument("--at_least", type=float, default=0.0, help="exit with 1 below this share")
    args = parser.parse_args(argv)
    if args.kind == "ask":
        return ask(args.model, args.questions, args.at_least)
    with open(args.output, "w", encoding="utf-8") as file:
        for document in documents(args.kind, args.documents, args.seed):
            file.write(json.dumps(document) + "\n")
    return 0


def main(argv):
    return run(argv, "Write the demo's documents as JSON lines.", KINDS, documents)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
