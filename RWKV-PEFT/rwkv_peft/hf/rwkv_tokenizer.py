"""RWKV's World vocabulary as a tokenizer of transformers: the same tokens as everywhere in this package."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..cli.errors import UserError
from ..data.tokenizer import JsonTokenizer, load_tokenizer
from ..release.vocabulary import FOLDER_SETTINGS, MARKS, world_json

WORLD_FILE = "rwkv_vocab_v20230424.txt"  # in published folders, in place of a tokenizer.json


class RWKVTokenizer(PreTrainedTokenizerFast):
    """A tokenizer of transformers over a World vocabulary: the package's ("world"), its first 257 tokens ("bytes"), or
    a .txt file.

    Token 0 ends a document, begins and pads. Chats are laid out as in training (docs/guides/data.md). Padding is on the
    left, because generation continues on the right.
    """

    vocab_files_names = {"vocab_file": WORLD_FILE, "tokenizer_file": "tokenizer.json"}

    def __init__(self, vocab_file: str | Path = "world", tokenizer_file: str | None = None, **settings: Any) -> None:
        if tokenizer_file is None:
            world = load_tokenizer(vocab_file)
            if isinstance(world, JsonTokenizer):
                raise UserError(f"{vocab_file} is no World vocabulary; transformers' PreTrainedTokenizerFast takes it")
            settings["tokenizer_object"] = Tokenizer.from_str(world_json(world.token_bytes, world.vocab_size).decode())
            settings.pop("added_tokens_decoder", None)  # of a published folder: other names of token 0
        super().__init__(tokenizer_file=tokenizer_file, **{**FOLDER_SETTINGS, **settings, **MARKS})

    @classmethod
    def convert_to_native_format(cls, **settings: Any) -> dict[str, Any]:
        """transformers 5's hook, which would take a tokenizer.json apart; it is loaded as it is."""
        return settings
