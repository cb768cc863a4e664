"""How many held-out questions does a model answer exactly?

    python demo/evaluate.py --model demo/rwkv6-demo.pth --questions heldout.jsonl
    python demo/evaluate.py --model merged.pth --questions heldout.jsonl --runtime rwkv --at_least 0.9

Reads the .pth of a byte-vocabulary model with this package, or with the `rwkv` package from PyPI (--runtime rwkv),
continues each prompt greedily up to the end of the line, and compares with the completion letter by letter.
"""

import json
from pathlib import Path

from rwkv_peft.cli import Parser
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.errors import UserError, exit_on_user_error
from rwkv_peft.files.base import open_base
from rwkv_peft.generate import Sampling, generate, load_model
from rwkv_peft.release.runtimes import rwkv_model

LONGEST = 80  # tokens of an answer


def read_questions(path, limit):
    """[(prompt, completion)] of the first `limit` lines of a .jsonl, blank ones left out; UserError where it is missing
    or malformed."""
    if not Path(path).is_file():
        raise UserError(f"--questions {path}: no such file; make it with demo/task.py heldout")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--questions {path} is not UTF-8 (byte {error.start}); make it with demo/task.py heldout"
        ) from error
    questions = []
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for number, line in lines[:limit]:
        try:
            row = json.loads(line)
            prompt, completion = row["prompt"], row["completion"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: needs an object with prompt and completion ({error!r})") from error
        if not (isinstance(prompt, str) and prompt and isinstance(completion, str)):
            raise UserError(f"{path}, line {number}: prompt and completion must be texts, and the prompt not empty")
        questions.append((prompt, completion))
    if not questions:
        raise UserError(f"{path} holds no question")
    return questions


def answer(path, prompts, stop):
    """Greedy continuations (lists of ids) of prompts (lists of ids) by this package: all prompts at once.

    Each answer ends with its first id in `stop`.
    """
    model, start = load_model(path)
    answers = [[] for _ in prompts]

    def ends(number, token):
        return "stop" if token in stop else ""

    for step in generate(model, prompts, Sampling(temperature=0), LONGEST, ends, start, batch=len(prompts)):
        answers[step.number].append(step.token)
    return answers


def answer_with_rwkv(path, prompts, stop):
    """The same by the `rwkv` package in float32, one prompt after the other."""
    model = rwkv_model(path)
    answers = []
    for prompt in prompts:
        logits, memory = model.forward(prompt, None)
        tokens = [int(logits.argmax())]
        while len(tokens) < LONGEST and tokens[-1] not in stop:
            logits, memory = model.forward(tokens[-1:], memory)
            tokens.append(int(logits.argmax()))
        answers.append(tokens)
    return answers


def build_parser():
    parser = Parser(prog="demo/evaluate.py", description="Exact match of a model's answers to held-out questions.")
    parser.add_argument("--model", required=True, metavar="PTH")
    parser.add_argument("--questions", required=True, metavar="JSONL", help="from demo/task.py heldout")
    parser.add_argument("--limit", type=int, default=200, help="questions asked")
    parser.add_argument("--runtime", default="rwkv_peft", choices=("rwkv_peft", "rwkv"), help="what runs the model")
    parser.add_argument("--examples", type=int, default=3, help="questions shown with their answers")
    parser.add_argument("--at_least", type=float, default=0.0, help="exit with 1 below this share of exact answers")
    return parser


def main(argv):
    """Print the examples and the score; 0, or 1 below --at_least."""
    args = build_parser().parse_args(argv)
    if args.limit < 1:
        raise UserError(f"--limit {args.limit}: at least one question is asked")
    if not 0 <= args.at_least <= 1:
        raise UserError(f"--at_least {args.at_least}: a share from 0 to 1 is due, as 0.9 for 90 %")
    questions = read_questions(args.questions, args.limit)
    tokenizer = load_tokenizer("bytes")
    vocab_size = open_base(args.model).config.vocab_size
    if vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"--model {args.model} has a vocabulary of {vocab_size} tokens, and the questions are put in "
            f"{tokenizer.vocab_size}, a byte each; give demo/rwkv6-demo.pth or a model made of it"
        )
    prompts = [tokenizer.encode(prompt) for prompt, _ in questions]
    stop = {tokenizer.end_id, *tokenizer.encode("\n")}
    run = answer_with_rwkv if args.runtime == "rwkv" else answer
    answers = [
        tokenizer.decode([token for token in tokens if token != tokenizer.end_id])
        for tokens in run(args.model, prompts, stop)
    ]
    for (prompt, _), given in list(zip(questions, answers))[: args.examples]:
        print("\n".join(f"    {line}" for line in (prompt + given.rstrip("\n")).splitlines()) + "\n")
    exact = sum(given == wanted for (_, wanted), given in zip(questions, answers))
    share = exact / len(questions)
    print(f"exact match {share:.1%}: {exact} of {len(questions)} held-out questions, {args.model} in {args.runtime}")
    return int(share < args.at_least)


if __name__ == "__main__":
    exit_on_user_error(main)
