"""A task that takes two turns: what is in somebody's box, which only a tool knows (scripts/turns_demo.sh).

    python demo/lookup.py calls   --documents 4000 --output calls.jsonl      # chats that ask the tool
    python demo/lookup.py guesses --documents 800  --output guesses.jsonl    # chats that mostly answer at once
    python demo/lookup.py prompts --documents 4000 --output prompts.jsonl    # questions, with the right answers
    python demo/lookup.py heldout --documents 200  --output heldout.jsonl    # questions that no other file asks
    python demo/lookup.py ask --model merged.pth --questions heldout.jsonl   # the share that is right

Who answers at once can only guess. The same arguments give the same file, byte for byte.
"""

import hashlib
import json
import random
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")]

from rwkv_peft.environments.tool_schemas import tool_schema  # noqa: E402
from task import COLORS, COUNTS, HELD_OUT, ITEMS, NAMES, run  # noqa: E402

CHATS = ("calls", "guesses")
NUMBERS = range(10, 100)
LOOKS = 8  # of so many rows of `guesses` one asks the tool
LONGEST, TURNS = 200, 4  # tokens behind a prompt, and answers


class Boxes:
    """What people keep in their boxes; an environment in trl's form."""

    def reset(self, **row):
        """Begin a conversation; nothing of its row is needed."""

    def box(self, who: str, number: int) -> str:
        """Open a box."""
        return held(who, number) if who in NAMES and number in NUMBERS else "none"


def held(who, number):
    """What is in somebody's box with this number; nothing in the question tells it."""
    digest = hashlib.sha256(f"{who} {number}".encode()).digest()
    return f"{COUNTS[digest[0] % len(COUNTS)]} {COLORS[digest[1] % len(COLORS)]} {ITEMS[digest[2] % len(ITEMS)]}"


def documents(kind, count, seed):
    """Yield `count` rows of a kind: questions with their answers, or chats of CHATS."""
    rng = random.Random(f"{kind} {seed}")
    schema = tool_schema("box", Boxes.box)
    while count:
        who, number = rng.choice(NAMES), rng.choice(NUMBERS)
        if ((NAMES.index(who) + number) % HELD_OUT == 0) != (kind == "heldout"):
            continue
        count -= 1
        question, answer = f"What is in {who}'s box {number}?", held(who, number)
        if kind not in CHATS:
            yield {"question": question, "answer": answer}
            continue
        call = {"name": "box", "arguments": {"who": who, "number": number}}
        asks = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": answer}]
        looks = kind == "calls" or rng.randrange(LOOKS) == 0
        said = answer if looks else held(rng.choice(NAMES), rng.choice(NUMBERS))
        turns = [
            {"role": "user", "content": question},
            *(asks if looks else ()),
            {"role": "assistant", "content": said},
        ]
        yield {"tools": [schema], "messages": turns}


def ask(path, questions, at_least):
    """Ask a model the questions of a file, greedily, with the tool in the form of its run; -> 0, or 1 if a smaller
    share is right."""
    from rwkv_peft.data.encoding import EncodeSettings
    from rwkv_peft.data.recorded import chat_beside
    from rwkv_peft.data.tokenizer import BytesTokenizer
    from rwkv_peft.environments.environments import Environments
    from rwkv_peft.inference.loading import Subject, load_model
    from rwkv_peft.inference.settings import Sampling
    from rwkv_peft.training.turns import EpisodeSampler, TurnSettings

    rows = [json.loads(line) for line in Path(questions).read_text("utf-8").splitlines()]
    form = chat_beside(path).tool_form
    greedy = TurnSettings(Sampling(temperature=0, measured=True), TURNS, LONGEST, LONGEST, (), 64)
    encode = EncodeSettings("bytes", command="prompts", end_token=False, tool_form=form.name)
    with Environments.open([f"{__file__}:Boxes"]) as environments:
        sampler = EpisodeSampler(environments, greedy, encode, 1024)
        found = sampler.sample(Subject(*load_model(path), BytesTokenizer()), dict(enumerate(rows)), 1)
    right = [episode.turns[-1]["content"] == row["answer"] for row, (episode,) in zip(rows, found)]
    for row, (episode,) in list(zip(rows, found))[:3]:
        print(f"    User: {row['question']}")
        print(*(f"    {turn['role'].title()}: {turn['content']}" for turn in episode.turns), "", sep="\n")
    share = sum(right) / len(right)
    print(f"right {share:.1%}: {sum(right)} of {len(right)} held-out questions, {path}")
    return int(share < at_least)


def main(argv):
    return run(argv, __doc__, (*CHATS, "prompts", "heldout"), documents, ask)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
