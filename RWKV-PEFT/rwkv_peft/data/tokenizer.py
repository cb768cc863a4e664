"""Tokenizers: text <-> token ids, for the World vocabulary, raw bytes, and any tokenizer.json.

Every tokenizer has
- encode(str) -> list[int], decode(list[int]) -> str
- name, and vocab_size, which is above every id
- end_id: the token that ends a document, None if the vocabulary names none
- special: {text: id} of the tokens that encode reads in a text and decode leaves out
- content() -> bytes that differ for tokenizers with different tokens
"""

import ast
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TypeVar

from ..checkpoints.readable import require_readable
from ..cli.errors import UserError, summarize
from ..cli.installing import how_to_install

MOST_TOKENS = 1 << 31  # ids of token files are below
MOST_WORLD_TOKENS = 1 << 24  # ids of a World vocabulary are below; the table of its tokens has a place for each
REPLACEMENT = "\ufffd"
Result = TypeVar("Result")
KNOWN_SIZES = ((65536, "world"), (257, "bytes"))  # (a model's vocabulary size, the tokenizer that it implies)
ENCODES = ("normalizer", "pre_tokenizer", "model", "added_tokens")  # parts of a tokenizer.json that shape its tokens
WORLD_END = "<|rwkv_tokenizer_end_of_text|>"  # World's token 0 in a tokenizer.json, as published folders spell it
END_TOKENS = (WORLD_END, "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "<|im_end|>")


def load_tokenizer(name: str | Path) -> "Tokenizer":
    """Load a tokenizer: "world", "bytes", or the path of a World vocabulary (.txt) or a Hugging Face tokenizer.json."""
    if name == "world":
        return WorldTokenizer()
    if name == "bytes":
        return BytesTokenizer()
    path = require_readable(
        name,
        f"tokenizer {str(name)!r}: no such file; give world, bytes, the path of a "
        "tokenizer.json, or the path of a World vocabulary (.txt)",
        again=True,
    )
    return WorldTokenizer(path) if path.suffix == ".txt" else JsonTokenizer(path)


class BytesTokenizer:
    """Token b + 1 is the byte b: the first 257 tokens of the World vocabulary, 0 included."""

    name = "bytes"
    vocab_size = 257
    end_id = 0
    special: Mapping[str, int] = MappingProxyType({})
    token_bytes = (None, *(bytes([byte]) for byte in range(256)))

    def encode(self, text: str) -> list[int]:
        return [byte + 1 for byte in utf8(text)]

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.vocab_size, self.name)
        return bytes(token - 1 for token in ids if token).decode("utf-8", "replace")

    def content(self) -> bytes:
        return repr(self.token_bytes).encode()


class WorldTokenizer:
    """The RWKV World vocabulary: greedy longest match over bytes; token 0 ends a document.

    The pyrwkv-tokenizer package encodes. Our GreedyEncoder, which gives the same tokens, encodes if the package is not
    installed (some Pythons have no build of it) or if the vocabulary lacks a token for some byte.

    vocab_size is 65536, the size of the models trained on it, for the standard vocabulary, and one more than the
    largest id for a file given by path (lines "id 'token' length", with any line ends).
    """

    end_id = 0
    special: Mapping[str, int] = MappingProxyType({})

    def __init__(self, path: str | Path | None = None) -> None:
        if path is None:
            self.name, self.path = "world", world_vocabulary()
            self.vocab_size = 65536
        else:
            self.name, self.path = str(path), Path(path)
            self.vocab_size = len(self.token_bytes)  # parsed here, so that a bad file stops here
        if path is not None and not {bytes([byte]) for byte in range(256)} <= set(self.token_bytes):
            self._encoder = GreedyEncoder(self.token_bytes)  # the package drops the text behind a byte without a token
        elif (package := rust_package()) is not None:
            self._encoder = guarded("the World tokenizer failed", package.WorldTokenizer, str(self.path))
        else:
            self._encoder = GreedyEncoder(self.token_bytes)
            say_slow()

    @cached_property
    def token_bytes(self) -> list[bytes | None]:
        """The bytes of each token id; None for ids that stand for nothing."""
        return parse_world_vocabulary(self.path)

    def encode(self, text: str) -> list[int]:
        utf8(text)
        return guarded("the World tokenizer failed", self._encoder.encode, text)

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.vocab_size, self.name)
        table, unknown = self.token_bytes, REPLACEMENT.encode()
        parts = (table[token] if token < len(table) else None for token in ids if token)
        return b"".join(unknown if part is None else part for part in parts).decode("utf-8", "replace")

    def content(self) -> bytes:
        return self.path.read_bytes().replace(b"\r\n", b"\n")  # the same vocabulary, whatever the line ends


def parse_world_vocabulary(path: Path) -> list[bytes | None]:
    """The bytes of each token id, or None, in a World vocabulary: a line "id 'token' length" for each token, the token
    as Python writes it. Raises UserError with the bad line."""
    table: list[bytes | None] = [None]
    like = "give a World vocabulary such as rwkv_vocab_v20230424.txt"
    for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").split("\n"), start=1):
        if not (line := line.rstrip("\r")):
            continue
        head, _, rest = line.partition(" ")
        literal, _, length = rest.rpartition(" ")
        try:
            token, value, size = int(head), ast.literal_eval(literal), int(length)
            value = value.encode("utf-8") if isinstance(value, str) else value
            if not isinstance(value, bytes):
                raise ValueError
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UserError(f"{path}, line {number}: {line[:60]!r} is not \"id 'token' length\"; {like}") from None
        if not 0 < token < MOST_WORLD_TOKENS:
            raise UserError(f"{path}, line {number}: token {token} is not from 1 to {MOST_WORLD_TOKENS - 1:,}; {like}")
        if len(value) != size:
            raise UserError(
                f"{path}, line {number}: token {token} has {len(value)} bytes, and the line "
                f"says {size}; the file is damaged, download it again"
            )
        table.extend([None] * (token + 1 - len(table)))
        table[token] = value
    if len(table) == 1:
        raise UserError(f"{path}: holds no token; {like}")
    return table


class GreedyEncoder:
    """Encodes by the longest token that matches at each place; table has the bytes of each token id, or None."""

    def __init__(self, table: Sequence[bytes | None]) -> None:
        self._ids = {token: number for number, token in enumerate(table) if token}
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        data, position = text.encode("utf-8"), 0
        while position < len(data):
            # a single byte comes last, for the end of the text and for bytes that begin no longer token
            for length in (*self._lengths.get(data[position : position + 2], ()), 1):
                token = self._ids.get(data[position : position + length])
                if token is not None and position + length <= len(data):
                    break
            else:
                raise UserError(
                    f"the vocabulary has no token for the byte {data[position]} at byte {position} of the text; give a "
                    "vocabulary that has one for every byte, such as rwkv_vocab_v20230424.txt"
                )
            ids.append(token)
            position += length
        return ids


def rust_package() -> ModuleType | None:
    """The pyrwkv_tokenizer module, None if it is not installed."""
    try:
        import pyrwkv_tokenizer
    except ModuleNotFoundError:
        return None
    return pyrwkv_tokenizer


def world_vocabulary() -> Path:
    """The World vocabulary's file, which lies in the pyrwkv-tokenizer and rwkv packages; neither is imported."""
    for package in ("pyrwkv_tokenizer", "rwkv"):
        spec = importlib.util.find_spec(package)
        path = spec and spec.origin and Path(spec.origin).with_name("rwkv_vocab_v20230424.txt")
        if path and path.is_file():
            return path
    raise UserError(
        "tokenizer world: its vocabulary comes with the packages pyrwkv-tokenizer and rwkv, and neither is installed; "
        + how_to_install()
    )


@cache
def say_slow() -> None:
    """Print once that encoding is slow."""
    print(
        "tokenizer world: encoding in Python, which takes ten times as long as with the package pyrwkv-tokenizer",
        file=sys.stderr,
    )


class JsonTokenizer:
    """A Hugging Face tokenizer.json, read by the tokenizers library; adds no special tokens."""

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer

        self.name, self.path = str(path), Path(path)
        self._tokenizer = guarded(f"tokenizer {path}: not a tokenizer.json", Tokenizer.from_file, str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"tokenizer {path}: its vocabulary is empty")
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > MOST_TOKENS:
            raise UserError(
                f"tokenizer {path}: it has a token {self.vocab_size - 1}, and ids of token files are below "
                f"{MOST_TOKENS}; give the tokenizer that the model was trained with"
            )
        added = self._tokenizer.get_added_tokens_decoder()
        self.added = {number: token.content for number, token in added.items()}
        self.special = {token.content: number for number, token in added.items() if token.special}
        self.end_token = next((token for token in END_TOKENS if token in vocabulary), None)
        self.end_id = None if self.end_token is None else vocabulary[self.end_token]

    def encode(self, text: str) -> list[int]:
        utf8(text)
        return guarded(self._failed, self._tokenizer.encode, text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.vocab_size, self.name)
        return guarded(self._failed, self._tokenizer.decode, list(ids), skip_special_tokens=True)

    @property
    def _failed(self) -> str:
        return (
            f"tokenizer {self.name} failed; give one that has tokens for every text, by byte fallback or an unk_token"
        )

    def content(self) -> bytes:
        file = json.loads(self.path.read_bytes())
        model = file["model"]
        if model.get("merges"):  # pairs, or texts in files of older libraries
            model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        return json.dumps({name: file.get(name) for name in ENCODES}, sort_keys=True).encode()


Tokenizer = WorldTokenizer | BytesTokenizer | JsonTokenizer


def utf8(text: str) -> bytes:
    """The UTF-8 bytes of a text. Raises UserError if it holds half of a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"text is not Unicode: a lone surrogate {text[error.start]!r} at character "
            f"{error.start}; remove it, or replace it by U+FFFD"
        ) from error


def check_ids(ids: Iterable[int], vocab_size: int, name: str) -> None:
    """Raise UserError unless every id is in [0, vocab_size)."""
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise UserError(
                f"token {token} at position {position} is outside the vocabulary of "
                f"{vocab_size} tokens of tokenizer {name}"
            )


def guarded(failed: str, function: Callable[..., Result], *arguments: object, **named: object) -> Result:
    """Call a tokenizer library; its bare Exceptions and panics become a UserError that begins with `failed`."""
    try:
        return function(*arguments, **named)
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{failed} ({summarize(error)})") from error
