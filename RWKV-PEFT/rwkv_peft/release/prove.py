"""Write a proof of a run, or ask an endpoint by one: `rwkv-peft prove --help`. probe.py asks, and is a proof's script.

A proof holds prompts and the model's greedy answers with their margins: the logit of each token above that of the next
best one. Rounding weights to 8 bits moves margins a little, and to 4 bits more. Both are measured, so that neither an
endpoint's arithmetic nor its q8_0 is a fault, and a coarse quantization is named.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..checkpoints.adapters import AdapterSource, product_of_run
from ..checkpoints.atomic import check_output, write_text
from ..checkpoints.readable import read_settings
from ..cli.errors import UserError
from ..cli.names import RUN
from ..config import DataConfig
from ..data.chat import ChatLayout, stops_of
from ..data.dialogues import written_turns
from ..data.recorded import CLEAN, TOOL_FORM, chat_beside, find_tokenizer, recorded_beside
from ..data.sources import build_samples
from ..data.tokenizer import Tokenizer
from ..evals.questions import GREEDY, rows_of
from ..inference.decode import generate
from ..inference.loading import Subject, load_model, resolve_device
from ..inference.text import Continuation
from . import probe
from .flags import prove_flags

LEAST = 0.05  # logits: a smaller margin is a tie for any arithmetic
SLACK = 2  # an endpoint's rounding may move a margin by so many times as much as ours
# prompts of no row, and texts that tokenizers cut in different ways
OPEN = ("The", "Once upon a time", "1, 2, 3,", "def main():\n", "今天")
CHATS = (
    ({"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Is snow white?"}),
    ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Why?"}),
)
AWKWARD = (
    *(" begins with a space", "ends with two  ", "one\n\ntwo\r\nthree", "\t\tx = 1", "naïve café", "a\u0301e\u0308"),
    *("你好，世界", "🙂👩‍👩‍👧", "مرحبا", "<|im_end|>[INST]", "0123456789", "\u00a0\u200b", "User: a\n\nTool: b"),
)


def main(argv: list[str]) -> int:
    """Write a proof, or print what is wrong at an endpoint -> the exit code. Raises UserError for mistakes, and for an
    endpoint that does not answer."""
    args = prove_flags(argv)
    if not args.url:
        return write(Path(args.source), args)
    try:
        return probe.prove(args.source, args)
    except probe.Unanswered as error:
        raise UserError(str(error)) from error


def write(folder: Path, args: argparse.Namespace) -> int:
    settings = read_settings(folder / RUN)
    try:
        base, vocab_size = args.load_model or settings["train"]["load_model"], settings["model"]["vocab_size"]
        values = {field.name: settings["data"][field.name] for field in fields(DataConfig)}
        lists: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        data = DataConfig(**(values | lists))
    except (LookupError, TypeError) as error:
        raise UserError(f"{folder / RUN} holds no settings of a run of this version; name such a run") from error
    if not data.of_rows:  # a run records those of its token files, which they are not to be made with again
        data = replace(data, **{name: getattr(DataConfig, name) for name in ("tokenizer", CLEAN, TOOL_FORM)})
    output = Path(args.output or folder / "proof.py")
    check_output("--output", output, [("--load_model", base), ("--data_file", args.data_file)])
    if not Path(base).exists():
        raise UserError(f"{base}, the base of {folder}, is gone; give its place as --load_model FILE")
    if args.data_file:
        data = replace(data, path=args.data_file, more=(), mix=(), replay="")
    try:
        rows = rows_of("", build_samples(data, vocab_size), args.rows)
    except UserError as error:
        raise UserError(f"the rows of {folder}: {error}; give their place as --data_file FILE") from error
    product, device = product_of_run(folder), resolve_device(args.device)
    tokenizer = find_tokenizer(None, vocab_size, recorded_beside(folder))
    questions = [tokenizer.decode(list(row.prompt)) for row in rows]
    prompts = prompts_of(questions, tokenizer, chat_beside(folder))

    def answers(trained: bool = True, weights: str | None = None) -> list[dict[str, Any]]:
        whole = product.suffix == ".pth"  # of a run that trained the model itself
        path, adapters = (product, []) if trained and whole else (base, [AdapterSource(product)] if trained else [])
        loaded = load_model(path, adapters, device=device, weights=weights)
        return greedy(Subject(*loaded, tokenizer), [each["tokens"] for each in prompts], args.max_tokens)

    given, given_by_base = answers(), answers(trained=False)
    tie, coarse = (SLACK * largest_shift(given, answers(weights=weights)) for weights in ("int8", "int4"))
    tie = round(max(LEAST, tie), 4)
    proof = {
        "version": probe.VERSION,
        "of": f"{folder.resolve().name}, trained on {Path(base).name}",
        "tie": tie,
        "coarse": max(round(coarse, 4), 2 * tie),
        "prompts": [each | {"answer": one, "base": two} for each, one, two in zip(prompts, given, given_by_base)],
        "strings": [{"text": text, "tokens": tokenizer.encode(text)} for text in AWKWARD],
    }
    script = Path(probe.__file__).read_text(encoding="utf-8")
    write_text(output, f"{script}\n{probe.BEGINS}{json.dumps(proof)}\n")
    print(f"{output}: {len(prompts)} prompts, {len(rows)} of them of rows; margins below {tie:.2f} are ties")
    return 0


def prompts_of(questions: Sequence[str], tokenizer: Tokenizer, chat: ChatLayout) -> list[dict[str, Any]]:
    """Rows' prompts, OPEN and CHATS as {prompt, messages, tokens}; messages are [] for a text that is no chat."""
    texts = [*questions, *OPEN, *("".join(chat.prompt(turns)) for turns in CHATS)]
    prompts = list[dict[str, Any]]()
    for text in dict.fromkeys(texts):
        turns, tokens = [turn for turn in written_turns(text) if turn["content"]], tokenizer.encode(text)
        parts = chat.prompt(turns) if turns and turns[-1]["role"] == "user" else []
        # a server may tokenize a chat part by part, and not as one text
        same = "".join(parts) == text and [token for part in parts for token in tokenizer.encode(part)] == tokens
        prompts.append({"prompt": text, "messages": turns if same else [], "tokens": tokens})
    return prompts


def greedy(subject: Subject, prompts: Sequence[list[int]], most: int) -> list[dict[str, Any]]:
    """Continue prompts greedily -> answers {text, end, tokens, margins, ends}: `margins` of the tokens in logits, and
    the letters (probe.squeeze) of the text up to the end of each of its tokens."""
    model, start, tokenizer = subject
    texts = [Continuation({}, tokenizer, stops_of(tokenizer.decode(prompt))) for prompt in prompts]
    margins: list[list[float]] = [[] for _ in prompts]

    def ends(number: int, token: int) -> str:
        return texts[number].feed(token)

    sampling = replace(GREEDY, top_logprobs=2)
    for step in generate(model, prompts, sampling, most, ends, start, vocab_size=tokenizer.vocab_size):
        (_, first), (_, second) = step.top
        margins[step.number].append(round(first - second, 4))
        if step.end:
            texts[step.number].finish(step.end)
    return [
        {
            **{"text": text.text, "end": text.end, "tokens": text.tokens, "margins": numbers},
            "ends": [len(probe.squeeze(tokenizer.decode(shown[: n + 1]))) for n in range(len(shown))],
        }
        for text, numbers, shown in ((text, numbers, text.shown_tokens()) for text, numbers in zip(texts, margins))
    ]


def largest_shift(answers: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> float:
    """The most by which a margin changes from answers to others, up to the first token that differs."""
    shifts = [0.0]
    for one, other in zip(answers, others):
        for token, margin, another, changed in zip(one["tokens"], one["margins"], other["tokens"], other["margins"]):
            if token != another:
                shifts.append(margin)
                break
            shifts.append(abs(margin - changed))
    return max(shifts)
