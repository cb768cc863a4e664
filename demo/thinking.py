"""A task with thinking of three lengths, which the prompt sets (scripts/think_demo.sh).

    python demo/thinking.py rows    --documents 4000 --output rows.jsonl      # chats; nothing asks for their lengths
    python demo/thinking.py heldout --documents 200  --output heldout.jsonl   # questions about facts of no other file
    python demo/thinking.py ask --model merged.pth --questions heldout.jsonl  # asked for each length: the lengths given

The bounds 32 and 64 of --think_labels separate the lengths of `rows`. The same arguments give the same file, byte for
byte.
"""

import json
import random
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "RWKV-PEFT")]

from task import draw_fact, run, tell  # noqa: E402

SHORT = "{count} {color} {item}."
MEDIUM = "{sentence} That is {count} {color} {item}."
LONG = (
    "Who? {name}. How many? {count}. What color? {color}. What things? {item}. {sentence} So: {count} {color} {item}."
)
LENGTHS = (("low", SHORT, range(32)), ("medium", MEDIUM, range(32, 65)), ("high", LONG, range(65, 300)))
LONGEST, BATCH = 400, 100  # tokens behind a prompt, and answers at once


def documents(kind, count, seed):
    """Yield `count` chats about stories, with a thinking of any length; of `heldout`, questions and answers."""
    rng = random.Random(f"thinking {kind} {seed}")
    for _ in range(count):
        fact = draw_fact(rng, held_out=kind == "heldout")
        question, answer = f"{tell(rng, fact)}What is there?", f"{fact.count} {fact.color} {fact.item}"
        if kind == "heldout":
            yield {"question": question, "answer": answer}
            continue
        _, thinking, _ = rng.choice(LENGTHS)
        thought = thinking.format(sentence=fact.sentence, **fact._asdict())
        turn = {"role": "assistant", "content": answer, "reasoning_content": thought}
        yield {"messages": [{"role": "user", "content": question}, turn]}


def ask(path, questions, at_least):
    """Ask a model the questions of a file for each length, greedily; -> 0, or 1 if a smaller share of the thinkings has
    the length, or a smaller share of the answers is right."""
    from rwkv_peft.data.chat import THINK_CLOSES, ChatLayout, stops_of
    from rwkv_peft.data.tokenizer import BytesTokenizer
    from rwkv_peft.inference.decode import complete
    from rwkv_peft.inference.loading import Subject, load_model
    from rwkv_peft.inference.settings import Sampling
    from rwkv_peft.inference.text import Continuation

    rows = [json.loads(line) for line in Path(questions).read_text("utf-8").splitlines()]
    subject, shares = Subject(*load_model(path), BytesTokenizer()), []
    print(f"{path}\nasked    tokens of thinking: mean, least to most    of that length    right")
    for mode, _, tokens in LENGTHS:
        layout = ChatLayout(mode)
        prompts = [subject.tokenizer.encode("".join(layout.question(row["question"]))) for row in rows]
        found = [Continuation({}, subject.tokenizer, stops_of("Assistant:")) for _ in rows]
        list(complete(subject, prompts, found, Sampling(temperature=0), LONGEST, BATCH))
        split = [one.text.removeprefix(">").partition(THINK_CLOSES) for one in found]
        lengths = [len(subject.tokenizer.encode(thought)) for thought, _, _ in split]
        given = sum(length in tokens for length in lengths) / len(rows)
        right = sum(words.strip() == row["answer"] for (*_, words), row in zip(split, rows)) / len(rows)
        mean = sum(lengths) / len(rows)
        print(f"{mode:8} {mean:19.1f}, {min(lengths):5} to {max(lengths):<10} {given:17.1%} {right:8.1%}")
        shares += [given, right]
    return int(min(shares) < at_least)


def main(argv):
    return run(argv, __doc__, ("rows", "heldout"), documents, ask)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
