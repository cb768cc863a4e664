"""Count the held-out questions that a model answers exactly.

    python demo/evaluate.py --model demo/rwkv7-demo.pth --questions heldout.jsonl
    python demo/evaluate.py --model merged.pth --questions heldout.jsonl --runtime rwkv --at_least 0.9

Runs the .pth of a byte-vocabulary model with this package, or with the `rwkv` package from PyPI (--runtime rwkv),
continues each prompt greedily up to the end of the line, and compares with the completion letter by letter.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "RWKV-PEFT"))

from rwkv_peft.cli.commands import missing  # noqa: E402
from rwkv_peft.cli.errors import UserError, exit_on_user_error  # noqa: E402
from rwkv_peft.cli.parser import Parser  # noqa: E402
from rwkv_peft.data.tokenizer import load_tokenizer  # noqa: E402

LONGEST = 80  # the most tokens of an answer
QUIET = 10  # seconds between the lines of a log


def read_questions(path, limit):
    """Read [(prompt, completion)] from the first `limit` lines of a .jsonl that are not blank. Raises UserError if the
    file is missing, empty or malformed."""
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


class Progress:
    """Show how many of `total` questions are answered: a bar on a terminal, in a log a line every QUIET seconds."""

    def __init__(self, total):
        self.total, self.done, self.tokens, self.bar, self.last = total, 0, 0, None, time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="answer", dynamic_ncols=True, leave=False)

    def update(self, tokens, done):
        """Add numbers of tokens drawn and of answers that ended."""
        self.tokens, self.done = self.tokens + tokens, self.done + done
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.tokens:,} tokens", refresh=False)
            self.bar.update(done)
        elif time.monotonic() - self.last >= QUIET and self.done < self.total:
            self.last = time.monotonic()
            print(f"{self.done} of {self.total} answered, {self.tokens:,} tokens", file=sys.stderr, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def answer(path, prompts, stop, expected=None, progress=None):
    """Continue prompts (lists of ids) greedily by this package, all at once; -> answers (lists of ids).

    An answer ends with its first id in `stop`, or at LONGEST tokens. expected is not read; answer_with_rwkv needs it.
    """
    from rwkv_peft.inference.decode import generate
    from rwkv_peft.inference.loading import load_model
    from rwkv_peft.inference.settings import Sampling

    progress = progress or Progress(len(prompts))
    model, start = load_model(path)
    answers = [[] for _ in prompts]

    def ends(number, token):
        return "stop" if token in stop else ""

    for step in generate(model, prompts, Sampling(temperature=0), LONGEST, ends, start, batch=len(prompts)):
        answers[step.number].append(step.token)
        progress.update(1, bool(step.end))
    return answers


def answer_with_rwkv(path, prompts, stop, expected=None, progress=None):
    """Do the same by the `rwkv` package in float32, one prompt after the other.

    expected are the likely answers (lists of ids). One pass over a prompt and its expected answer gives the most
    probable token after each beginning of it, and so the greedy answer up to the token at which it leaves the expected
    one. Only the rest is drawn token by token, which takes ten times as long.
    """
    import torch

    from rwkv_peft.checkpoints.base import open_base
    from rwkv_peft.release.runtimes import rwkv_model

    progress = progress or Progress(len(prompts))
    model = rwkv_model(path, open_base(path).config.version)
    threads, answers = torch.get_num_threads(), []
    torch.set_num_threads(1)  # the package computes small products, for which threads cost more than they save
    with torch.inference_mode():
        for prompt, draft in zip(prompts, expected or [[] for _ in prompts]):
            draft = draft[: LONGEST - 1]
            logits, _ = model.forward(prompt + draft, None, full_output=True)
            best = logits.view(-1, logits.shape[-1])[len(prompt) - 1 :].argmax(-1).tolist()
            agreed = next((n for n, token in enumerate(draft) if best[n] != token), len(draft))
            tokens = until(best[: agreed + 1], stop)
            memory = None
            while len(tokens) < LONGEST and tokens[-1] not in stop:
                unread = tokens[-1:] if memory is not None else prompt + tokens
                logits, memory = model.forward(unread, memory)
                tokens.append(int(logits.argmax()))
            answers.append(tokens)
            progress.update(len(tokens), 1)
    torch.set_num_threads(threads)
    return answers


def until(tokens, stop):
    """The tokens up to the first one in `stop`, which is included."""
    end = next((n for n, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[: end + 1]


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
    """Print the examples and the score; -> 0, or 1 if the score is below --at_least."""
    args = build_parser().parse_args(argv)
    try:
        from rwkv_peft.checkpoints.base import open_base
    except ModuleNotFoundError as error:
        raise missing(error) from error
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
            f"{tokenizer.vocab_size}, a byte each; give demo/rwkv6-demo.pth, demo/rwkv7-demo.pth or a model made of one"
        )
    prompts = [tokenizer.encode(prompt) for prompt, _ in questions]
    stop = {tokenizer.end_id, *tokenizer.encode("\n")}
    expected = [tokenizer.encode(completion) for _, completion in questions]
    run = answer_with_rwkv if args.runtime == "rwkv" else answer
    progress = Progress(len(questions))
    try:
        drawn = run(args.model, prompts, stop, expected, progress)
    finally:
        progress.close()
    answers = [tokenizer.decode([token for token in tokens if token != tokenizer.end_id]) for tokens in drawn]
    for (prompt, _), given in list(zip(questions, answers))[: args.examples]:
        print("\n".join(f"    {line}" for line in (prompt + given.rstrip("\n")).splitlines()) + "\n")
    exact = sum(given == wanted for (_, wanted), given in zip(questions, answers))
    share = exact / len(questions)
    print(f"exact match {share:.1%}: {exact} of {len(questions)} held-out questions, {args.model} in {args.runtime}")
    return int(share < args.at_least)


if __name__ == "__main__":
    exit_on_user_error(main)
