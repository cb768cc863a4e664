"""The words that the tests of the chat use, and their tokens in training data."""

import torch

from rwkv_peft.data.encoding import Encoder, EncodeSettings
from rwkv_peft.data.rows import Chunk
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.inference.forward import prefill
from rwkv_peft.inference.loading import load_model

END = 0


def tokens_of(text):
    body, ends, interrupted = text.rstrip("|^"), text.endswith("|"), text.endswith("^")
    return BytesTokenizer().encode(body) + [END] * ends + [-1] * interrupted


def trained(*turns, think="", clean=True):
    """The tokens of a conversation in training data, without its end token."""
    messages = [{"role": role, "content": words} for role, words in turns]
    encoded = Encoder(EncodeSettings("bytes", end_token=False, think=think, clean_turns=clean)).encode(
        Chunk("x", 1, ({"messages": messages},))
    )
    return torch.frombuffer(bytearray(encoded.tokens), dtype=torch.int16).tolist()


def after(model, tokens):
    return prefill(load_model(model)[0], [tokens])[0]
