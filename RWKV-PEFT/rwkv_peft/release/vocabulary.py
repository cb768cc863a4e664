"""Write a tokenizer's vocabulary in the forms of other tools: GGUF's lists, the files of a Hugging Face folder."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from ..cli.errors import UserError
from ..data.tokenizer import JsonTokenizer, Tokenizer
from ..data.turns import TURN_END
from .chat_template import CHAT_TEMPLATE, cleaning
from .world_json import MARKS, world_json

FOLDER_SETTINGS = MappingProxyType(
    {
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ("input_ids", "attention_mask"),
        "padding_side": "left",  # what is generated goes on from the right
    }
)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens


class GgufVocabulary(NamedTuple):
    """A vocabulary as GGUF holds it.

    model and pre are llama.cpp's names for the tokenizer and its pre-tokenizer; tokens and types have an entry for each
    id of the model; merges are those of byte-level BPE; end is the token that ends a document and turn_end the one that
    ends a turn of a chat, or None; clean is that of its template (chat_template.cleaning).
    """

    model: str
    tokens: list[bytes]
    types: list[int]
    end: int | None
    turn_end: int | None
    pre: str = ""
    merges: tuple[str, ...] = ()
    clean: bool = True


def gguf_vocabulary(tokenizer: Tokenizer, size: int) -> GgufVocabulary:
    """Make the GgufVocabulary of a tokenizer, padded to the model's size. Raises UserError for a tokenizer.json that
    llama.cpp cannot reproduce."""
    if isinstance(tokenizer, JsonTokenizer):
        return _byte_level_bpe(tokenizer, size)
    return table_vocabulary(tokenizer.token_bytes, size)


def table_vocabulary(table: Sequence[bytes | None], size: int) -> GgufVocabulary:
    """Make the GgufVocabulary of the first `size` entries of a table {id: bytes} (None: an unused id), as RWKV's own
    vocabularies have it: token 0 ends a document."""
    tokens, types = [], []
    for token in range(size):
        content = table[token] if token < len(table) else None
        # llama.cpp reads a token's text as the inside of a Python bytes literal
        text = "<s>" if token == 0 else f"[PAD{token}]" if content is None else repr(content)[2:-1]
        tokens.append(text.encode())
        types.append(CONTROL if token == 0 else UNUSED if content is None else NORMAL)
    turn_end = next((token for token, content in enumerate(table[:size]) if content == TURN_END.encode()), None)
    return GgufVocabulary("rwkv", tokens, types, 0, turn_end)


def _byte_level_bpe(tokenizer: JsonTokenizer, size: int) -> GgufVocabulary:
    """Make the GgufVocabulary of a byte-level BPE like GPT-2's, which GPT-NeoX and RWKV's Pile models use (llama.cpp:
    gpt-2). Raises UserError for any other tokenizer.json."""
    content = json.loads(tokenizer.path.read_text(encoding="utf-8"))
    model, before = content["model"], content.get("pre_tokenizer") or {}
    normalizer = (content.get("normalizer") or {}).get("type")
    if (
        model.get("type") != "BPE"
        or model.get("byte_fallback")
        or before.get("type") != "ByteLevel"
        or before.get("add_prefix_space")
        or not before.get("use_regex", True)
        or normalizer not in (None, "NFC")
    ):
        raise UserError(
            f"--tokenizer {tokenizer.name} is no byte-level BPE as GPT-2 and GPT-NeoX have it, the one kind of "
            "tokenizer.json that is written to GGUF here; convert to a Hugging Face folder, which holds any"
        )
    tokens = [f"[PAD{token}]".encode() for token in range(size)]
    types = [UNUSED] * size
    for text, token in model["vocab"].items():
        tokens[token], types[token] = text.encode(), NORMAL
    for token, text in tokenizer.added.items():
        tokens[token], types[token] = text.encode(), CONTROL if text in tokenizer.special else USER_DEFINED
    merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    turn_end = tokenizer.encode(TURN_END)
    one = turn_end[0] if len(turn_end) == 1 else None
    return GgufVocabulary("gpt2", tokens, types, tokenizer.end_id, one, "gpt-2", merges)


def hf_files(tokenizer: Tokenizer, size: int, clean: bool = True) -> dict[str, bytes]:
    """Make {name: bytes} of a tokenizer's files in a Hugging Face folder, which transformers loads by itself; clean is
    that of its chat template (chat_template.cleaning)."""
    if isinstance(tokenizer, JsonTokenizer):
        content = tokenizer.path.read_bytes()
        marks: Mapping[str, str] = {"eos_token": tokenizer.end_token} if tokenizer.end_token else {}
    else:
        content, marks = world_json(tokenizer.token_bytes, size), MARKS
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **marks, **FOLDER_SETTINGS}
    settings["chat_template"] = cleaning(CHAT_TEMPLATE, clean)
    return {"tokenizer.json": content, "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode()}
