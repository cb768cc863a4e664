"""A model whose State grows with the tokens (x070b): an answer is that of its prompt alone, whoever shares its batch,
in whatever pieces the prompt is read, and whatever is known of it."""

import pytest
import torch

from families import shaken
from inference.test_engine import GREEDY, PROMPTS, ask, engine_of, finish
from rwkv_peft.inference.decode import generate
from rwkv_peft.inference.reading import prefill
from rwkv_peft.inference.replay import recordable
from rwkv_peft.inference.voices import Voice
from rwkv_peft.models import family_named
from rwkv_peft.training.step.contexts import Contexts


@pytest.fixture(scope="module")
def voice():
    """A random float64 model, in which nothing is zero, and answers depend on all that was read."""
    model = shaken(family_named("x070b"), 0.3, seed=2, n_embd=32, vocab_size=80, head_size=16)
    return Voice("base", model.double().requires_grad_(False))


def greedy(model, prompt, tokens=8):
    """The tokens after a prompt, each from the whole sequence read at once."""
    for _ in range(tokens):
        prompt = [*prompt, int(model(torch.tensor([prompt]))[0][0, -1].argmax())]
    return prompt[-tokens:]


@pytest.fixture(scope="module")
def due(voice):
    return [greedy(voice.model, prompt) for prompt in PROMPTS]


def test_prompts_of_any_lengths_are_continued_together(voice, due):
    found = [[] for _ in PROMPTS]
    for step in generate(voice.model, PROMPTS, GREEDY, 8, batch=3):
        found[step.number].append(step.token)
    assert found == due and len({tuple(tokens) for tokens in due}) == len(due)
    assert not recordable(voice.model)


@pytest.mark.parametrize("batch, piece, ahead", [(8, 64, False), (2, 4, True)])
def test_rows_join_and_leave_while_prompts_are_read_in_pieces(voice, due, batch, piece, ahead):
    running, heard = engine_of(voice, batch, piece, ahead), []
    for number, prompt in enumerate(PROMPTS):
        heard += ask(running, voice, prompt, GREEDY, max_tokens=8 - number)
        running.step()
    finish(running)
    assert [listener.tokens for listener in heard] == [tokens[: 8 - number] for number, tokens in enumerate(due)]


def test_what_is_known_of_a_text_is_as_long_as_the_text_and_read_on_from(voice, due):
    running = engine_of(voice)
    first = ask(running, voice, PROMPTS[2], GREEDY, max_tokens=8)[0]
    ask(running, voice, PROMPTS[1], GREEDY, max_tokens=8)
    finish(running)
    found = {read.length: read.state[0].past_keys.shape[1] for read in running.known.reads.values()}
    assert found == {size: size for size in (1, 8, 9, 16)}
    turn = [*PROMPTS[2], *first.tokens, 5, 6]
    second = ask(running, voice, turn, GREEDY, max_tokens=4)[0]
    finish(running)
    assert running.reused == len(turn) - 3 and second.tokens == greedy(voice.model, turn, 4)


def test_a_prompt_is_read_on_from_states_of_other_lengths(voice):
    begun = [[4, 7, 7], [1], [9, 9]]
    _, state = prefill(voice.model, begun)
    logits, after = prefill(voice.model, PROMPTS[:3], state)
    for start, prompt, found in zip(begun, PROMPTS, logits):
        torch.testing.assert_close(found, voice.model(torch.tensor([start + prompt]))[0][0, -1])
    assert after[1].length.tolist() == [6, 2, 11]


def test_a_teacher_reads_rows_behind_contexts_of_other_lengths(voice):
    texts, rows, contexts = [torch.tensor([3, 1, 4]), torch.tensor([5])], [[6, 7], [8, 9, 2]], Contexts(room=1)
    seen = {"tokens": torch.tensor([sum(rows, [])]), "cu_seqlens": torch.tensor([0, 2, 5]), "contexts": texts}
    found = contexts.through(voice.model, seen, lambda x, weight: x @ weight.t())
    due = [voice.model(torch.tensor([[*text.tolist(), *row]]))[0][:, len(text) :] for text, row in zip(texts, rows)]
    torch.testing.assert_close(found, torch.cat(due, 1))
    assert len(contexts.kept) == 1  # the last one, though the first was larger
