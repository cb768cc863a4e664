"""RWKV's World vocabulary as a tokenizer of transformers: the same tokens as everywhere in this package."""

import shutil
from itertools import accumulate
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

from ..data.tokenizer import BytesTokenizer, JsonTokenizer, load_tokenizer, world_vocabulary
from ..errors import UserError
from ..release.chat_template import CHAT_TEMPLATE, MARKS
from ..release.vocabulary import WORLD_FILE, world_file

END = "<|rwkv_tokenizer_end_of_text|>"  # the text of token 0, which ends a document, as published folders spell it
BORDER = "\ufdd0"  # no character: stands in for a template's marks of what is generated, to find their places


class RWKVTokenizer(PreTrainedTokenizer):
    """A tokenizer of transformers over a World vocabulary: that of the package ("world"), its first 257 tokens
    ("bytes"), or a .txt file.

    A token is spelled by its bytes as Latin-1. Token 0 ends a document, begins and pads. Chats are laid out as in
    training (docs/guides/data.md). Padding is on the left, because what is generated goes on from the right.
    """

    vocab_files_names = {"vocab_file": WORLD_FILE}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file: str | Path = "world", end: str = END, **settings: Any) -> None:
        self.vocab_file = str(vocab_file)
        world = load_tokenizer(vocab_file)
        if isinstance(world, JsonTokenizer):
            raise UserError(f"{vocab_file} is no World vocabulary; transformers' PreTrainedTokenizerFast takes it")
        self._world, table = world, world.token_bytes
        self._spelled = {number: token.decode("latin-1") for number, token in enumerate(table) if token}
        self._numbers = {spelled: number for number, spelled in self._spelled.items()}
        self._added_tokens_decoder = {0: AddedToken(end, special=True, normalized=False)}
        settings |= dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), end)
        settings.pop("added_tokens_decoder", None)  # of a saved one: token 0
        settings.setdefault("chat_template", CHAT_TEMPLATE)
        settings |= {"clean_up_tokenization_spaces": False}
        super().__init__(end=end, **settings)

    def apply_chat_template(
        self, conversation: Any, *args: Any, return_assistant_tokens_mask: bool = False, **settings: Any
    ) -> Any:
        """transformers' method; with the mask, which that computes only for tokenizers of another kind, of a
        conversation or several, neither cut nor padded."""
        if not return_assistant_tokens_mask:
            return super().apply_chat_template(conversation, *args, **settings)
        found = super().apply_chat_template(conversation, *args, **settings | {"return_dict": True})
        marked = MARKS.sub("{{- '" + BORDER + "' -}}", settings.get("chat_template") or self.chat_template)
        settings |= {"chat_template": marked, "tokenize": False}
        texts = super().apply_chat_template(conversation, *args, **settings)
        if isinstance(texts, str):
            found["assistant_masks"] = self._mask(found["input_ids"], texts)
        else:
            found["assistant_masks"] = [self._mask(*pair) for pair in zip(found["input_ids"], texts, strict=True)]
        return found

    def _mask(self, tokens: list[int], text: str) -> list[int]:
        """1 for each token of a text that overlaps what stands between an odd BORDER and the next, else 0."""
        parts = [part.encode() for part in text.split(BORDER)]
        learned = b"".join((b"\1" if number % 2 else b"\0") * len(part) for number, part in enumerate(parts))
        ends = list(accumulate(len(self._spelled.get(token) or self.eos_token or "") for token in tokens))
        if ends[-1:] != [len(learned)]:
            raise UserError("a mask of the assistant's tokens is of whole conversations; leave out cuts and padding")
        return [int(any(learned[start:end])) for start, end in zip([0, *ends], ends)]

    @property
    def vocab_size(self) -> int:
        """The number of the vocabulary's ids."""
        return self._world.vocab_size

    def __len__(self) -> int:
        """The same: ids without a token count, because a model has rows for them."""
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {self.eos_token: 0} | self._numbers

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [self._spelled[number] for number in self._world.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self._numbers.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._spelled.get(index, "")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        ends = {self.eos_token: self.eos_token.encode()}
        return b"".join(ends.get(token) or token.encode("latin-1") for token in tokens).decode("utf-8", "replace")

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        """Decode the bytes of all tokens together, because a character may cross their borders."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(number) for number in token_ids]
        end = "" if skip_special_tokens else self.eos_token
        return self.convert_tokens_to_string([self._spelled.get(number, "") if number else end for number in ids])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{WORLD_FILE}"
        if isinstance(self._world, BytesTokenizer):
            path.write_bytes(world_file(self._world, self.vocab_size))
        else:
            shutil.copyfile(world_vocabulary() if self.vocab_file == "world" else self.vocab_file, path)
        return (str(path),)
