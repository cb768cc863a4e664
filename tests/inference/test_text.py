"""Text comes out as soon as it is certain, whatever the borders of tokens."""

import random

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.tokenizer import BytesTokenizer, load_tokenizer
from rwkv_peft.inference.text import Continuation, TextStream

WORLD = load_tokenizer("world")
MIXED = "naïve 你好 🙂 — end"


class SpacedTokenizer:
    """Decodes as sentencepiece does: the first word loses the space before it; otherwise each byte is a token."""

    special: dict[str, int] = {}

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace").removeprefix(" ")


@pytest.fixture(scope="module")
def straddling(tmp_path_factory):
    """A tokenizer.json of bytes, and of tokens that end one letter and begin another, like GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = {letter: words.pre_tokenize_str(letter)[0][0] for letter in "éèêà"}  # of two bytes each
    vocabulary = {name: number for number, name in enumerate(["</s>", *sorted(words.alphabet())])}
    merges = [(name[1], name[0]) for name in names.values()]
    for merge in merges:
        vocabulary["".join(merge)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = words, decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return load_tokenizer(path)


def pieces(stream, tokens):
    return [stream.feed(token) for token in tokens] + [stream.finish()]


@pytest.mark.parametrize(
    "tokenizer, tokens",
    [
        (BytesTokenizer(), BytesTokenizer().encode(MIXED)),
        (SpacedTokenizer(), list(f" {MIXED}".encode())),
        (WORLD, WORLD.encode(MIXED)),
    ],
    ids=["bytes", "spaced", "world"],
)
def test_characters_are_whole(tokenizer, tokens):
    found = pieces(TextStream(tokenizer), tokens)
    assert "".join(found) == MIXED
    assert all("\ufffd" not in piece for piece in found)
    assert sum("你" in piece for piece in found) == 1 == sum("🙂" in piece for piece in found)


def test_letters_that_share_tokens_come_one_by_one(straddling):
    tokens = straddling.encode("aéèêàéb")
    assert len(tokens) == 8
    assert pieces(TextStream(straddling), tokens) == ["a", "", "é", "è", "ê", "à", "é", "b", ""]
    assert pieces(TextStream(straddling, ["êà"]), tokens)[:6] == ["a", "", "é", "è", "", ""]


@pytest.mark.parametrize("seed", range(10))
def test_any_tokens_stream_what_decoding_them_at_once_gives(straddling, seed):
    source = random.Random(seed)
    for tokenizer, choices in (
        (straddling, (65, *range(100, 140), 220, *range(257, 261))),
        (BytesTokenizer(), (66, 130, 196, 227, 241, 256, 0)),
    ):
        tokens = [source.choice(choices) for _ in range(60)]
        assert "".join(pieces(TextStream(tokenizer), tokens)) == tokenizer.decode(tokens)


def test_a_broken_character_is_not_withheld_for_ever():
    stream = TextStream(SpacedTokenizer())
    assert len("".join(stream.feed(0xFF) for _ in range(40))) >= 36
    stream = TextStream(BytesTokenizer())
    assert "".join(stream.feed(256) for _ in range(40)) == "\ufffd" * 40


@pytest.mark.parametrize(
    "stops, text, expected",
    [
        (("User:",), "Hi.\nUser: more", "Hi.\n"),
        (("\n\n", "."), "a\nb. c", "a\nb"),
        (("abc", "b"), "xabc", "xa"),  # the earliest, not the first in the list
        (("aab",), "aaaab!", "aa"),
        (("é",), "caf\u00e9s", "caf"),
        (("never",), "nevnever", "nev"),
        (("never",), "ends in nev", "ends in nev"),
    ],
)
def test_a_stop_string_ends_the_text_before_it(stops, text, expected):
    stream = TextStream(BytesTokenizer(), stops)
    assert "".join(pieces(stream, BytesTokenizer().encode(text))) == expected
    assert stream.stopped in (stops if expected != text else [""])


def test_a_stop_string_is_withheld_and_may_end_inside_a_token():
    stream = TextStream(BytesTokenizer(), ["END"])
    assert pieces(stream, BytesTokenizer().encode("E ENDx")) == ["", "E ", "", "", "", "", ""]
    (token,), stream = WORLD.encode("The"), TextStream(WORLD, ["h"])
    assert stream.feed(token) == "T" and stream.stopped


def test_a_special_token_stops_though_it_has_no_text(straddling):
    tokens = straddling.encode("aé<|im_end|>b")
    stream = TextStream(straddling, ["<|im_end|>", "éx"])
    assert pieces(stream, tokens) == ["a", "", "", "é", "", ""] and stream.stopped
    with pytest.raises(UserError, match="holds <.im_end.>, a token without text.*give only <.im_end.>"):
        TextStream(straddling, ["<|im_end|>b"])


def test_a_stop_text_that_begins_inside_of_a_token_leaves_the_part_before_it(tmp_path):
    (tmp_path / "words.txt").write_text("1 'a' 1\n2 'b' 1\n3 'ab' 2\n4 '|' 1\n5 'b|' 2\n")
    continuation = Continuation({}, load_tokenizer(tmp_path / "words.txt"), ["|"])
    assert [continuation.feed(token) for token in (3, 1, 5)] == ["", "", "stop"]
    continuation.finish("stop")
    assert continuation.text == "abab" and continuation.shown_tokens() == [3, 1, 2]
