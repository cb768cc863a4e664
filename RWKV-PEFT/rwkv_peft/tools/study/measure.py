"""Measures how likely a model finds the answers to held-out questions, with the text before them and without."""

from typing import NamedTuple

from ...data.samples import Samples
from ...evals.asking import score
from ...evals.exam import last_answer
from ...inference.loading import Subject
from ...inference.reading import prefill

BATCH = 16  # questions that are read at once
LEAST = 0.01  # of what the text tells, that counts as learned
ALONE, BEHIND = 0, 1  # the documents of a sample: a question with its answer, and the same behind its context

Tokens = tuple[int, ...]


class Word(NamedTuple):
    """A model's word on answers: nats a token, and the share that it gives itself, word for word."""

    nats: float
    right: float

    def __str__(self) -> str:
        return f"{self.nats:.3f} nats a token, {self.right:.0%} word for word"


def word_of(subject: Subject, samples: Samples, document: int) -> Word:
    """Measure a model's word on the answers in one document (ALONE, BEHIND) of samples; each context is read once."""
    logprob, right, tokens, number = 0.0, 0, 0, 0
    for context, pairs in questions(samples, document, subject.tokenizer.end_id).items():
        start = prefill(subject.model, [list(context)], subject.start)[1] if context else subject.start
        for first in range(0, len(pairs), BATCH):
            prompts, answers = zip(*pairs[first : first + BATCH])
            for [found] in score(subject.model, prompts, [[answer] for answer in answers], start):
                logprob += found.logprob
                right += found.greedy
        tokens, number = tokens + sum(len(answer) for _, answer in pairs), number + len(pairs)
    return Word(-logprob / tokens, right / number)


def questions(samples: Samples, document: int, end_id: int | None) -> dict[Tokens, list[tuple[list[int], list[int]]]]:
    """The tokens of each question and of its answer, by those of the context before them: () if it is ALONE. An answer
    lacks the end of the document, which a text that goes on does not have."""
    found: dict[Tokens, list[tuple[list[int], list[int]]]] = {}
    for n in range(len(samples)):
        sample = samples[n]
        assert isinstance(sample, list)  # because these are rows with contexts
        if pair := last_answer(sample[ALONE]):
            prompt, answer = map(list, pair)
            before = len(sample[document][0]) - len(sample[ALONE][0])
            context = tuple(sample[document][0][:before].tolist())
            ends = answer[-1] == end_id and len(answer) > 1
            found.setdefault(context, []).append((prompt, answer[:-1] if ends else answer))
    return found


def verdict(behind: Word, alone: Word, after: Word) -> str:
    """Say what was learned, by the base's words with the text and without, and the trained model's without."""
    helped, learned = alone.nats - behind.nats, alone.nats - after.nats
    if helped <= 0:
        return "nothing can be learned: the text before the questions does not make their answers likelier to the model"
    if learned < LEAST * helped:
        why = "raise the rate or the number of epochs, or train an adapter (--peft bone)"
        return f"nothing was learned: without the text the answers are no likelier than before; {why}"
    return f"learned {min(learned / helped, 1):.0%} of what the text before the questions tells"
