"""Engines of a tiny model, listeners that record their calls, and the tokens of the chat's words."""

import torch

from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.data.encoding import Encoder, EncodeSettings, Totals
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.inference.engine import Engine, PrefillBudget
from rwkv_peft.inference.forward import prefill
from rwkv_peft.inference.loading import load_model
from rwkv_peft.inference.requests import Completion, GenerationRequest, PrefixCache
from rwkv_peft.inference.settings import Sampling

GREEDY = Sampling(temperature=0)
PROMPTS = [[66, 5, 9], [7], [30, 1, 50, 3, 4, 5, 70, 8, 9], [2, 2], [79]]


def spread_logits(tiny_state, **settings):
    """Random weights with logits far enough apart for rounding not to matter."""
    state = tiny_state(seed=3, **settings)
    state["head.weight"] = state["head.weight"] * 4
    return state


def model_file(tiny_state, path):
    save_model(path, spread_logits(tiny_state))
    return path


class Recording:
    """A listener that records its calls, and ends its completion after some tokens."""

    def __init__(self, most=10**9):
        self.tokens, self.logprobs, self.end, self.most, self.gone = [], [], "", most, False

    def cancelled(self):
        return "gone" if self.gone else ""

    def on_token(self, token, logprobs):
        self.tokens.append(token)
        self.logprobs.append(logprobs)
        return "enough" if len(self.tokens) == self.most else self.cancelled()

    def on_end(self, reason):
        assert not self.end
        self.end = reason


def engine_of(speaker, batch=8, piece=64, overlap=False):
    return Engine(speaker.model.config.vocab_size, batch, PrefixCache(1 << 30), PrefillBudget(piece), overlap)


def ask(running, speaker, prompt, *samplings, most=10**9, max_tokens=12, **settings):
    listeners = [Recording(most) for _ in samplings]
    completions = [Completion(sampling, max_tokens, listener) for sampling, listener in zip(samplings, listeners)]
    running.add(GenerationRequest(speaker, prompt, completions, **settings))
    return listeners


def finish(running):
    while running.busy:
        running.step()


END = 0


def tokens_of(text):
    body, ends, interrupted = text.rstrip("|^"), text.endswith("|"), text.endswith("^")
    return BytesTokenizer().encode(body) + [END] * ends + [-1] * interrupted


def trained(*turns, think="", clean=True):
    """The tokens of a conversation in training data, without its end token."""
    messages = [{"role": role, "content": words} for role, words in turns]
    encoder = Encoder(EncodeSettings("bytes", end_token=False, think=think, clean_turns=clean))
    encoded = encoder.encode("x", {"messages": messages}, Totals())
    return torch.frombuffer(bytearray(encoded.tokens), dtype=torch.int16).tolist()


def after(model, tokens):
    return prefill(load_model(model)[0], [tokens])[0]
