"""Tokenizers: the World vocabulary, bytes and tokenizer.json files encode, decode, and fail with messages."""

import json
import random
import sys
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.foreign import MODELS, json_file
from rwkv_peft.cli.commands import main
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.recorded import vocabulary_of
from rwkv_peft.data.report import plain_text
from rwkv_peft.data.tokenizer import (
    BytesTokenizer,
    GreedyEncoder,
    load_tokenizer,
    parse_world_vocabulary,
    say_slow,
    world_vocabulary,
)

cached_tokenizer = lru_cache(load_tokenizer)  # one for all of a property's examples
MIXED = (
    "",
    "\0",
    "\0\0a",
    "Natalia sold 48/2 = 24 clips.\r\n\r\n",
    "def f(x):\n\treturn x  # \t\t\t\n",
    "世界 мир שלום مرحبا नमस्ते ไทย 한국어 ελληνικά አማርኛ",
    "\U0001f600\U0001f469\u200d\U0001f4bb\U0001f3f3\ufe0f\u200d\U0001f308 e\u0301 \ufeff\u2028\ufffd\U0010ffff",
    "  \n \n\n\n  x" + " " * 200 + "=" * 300,
    "<|endoftext|>User: hi\n\nAssistant:",
)
VOCABULARY = b"1 '\\x00' 1\n2 'a' 1\n3 b'\\xff' 1\n5 'ab' 2\n"


@pytest.fixture(scope="module")
def world():
    return load_tokenizer("world")


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_world_and_bytes_give_back_the_text(text):
    for name in ("world", "bytes"):
        tokenizer = cached_tokenizer(name)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert 0 not in ids and all(token < tokenizer.vocab_size for token in ids)


def test_world_and_our_encoder_agree_with_the_runtimes_tokenizer(world, greedy):
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    peer = TRIE_TOKENIZER(str(world.path))
    for text in MIXED:
        assert world.encode(text) == greedy.encode(text) == peer.encode(text)


@pytest.fixture(scope="module")
def greedy(world):
    return GreedyEncoder(world.token_bytes)


@pytest.fixture
def without_package(monkeypatch):
    """Simulate a Python for which pyrwkv-tokenizer has no build."""
    monkeypatch.setitem(sys.modules, "pyrwkv_tokenizer", None)
    say_slow.cache_clear()


def test_our_encoder_agrees_on_every_token(world, greedy):
    texts = []
    for token in filter(None, world.token_bytes):
        try:
            texts.append(token.decode("utf-8"))
        except UnicodeDecodeError:
            continue
    assert len(texts) > 65000
    assert all(greedy.encode(text) == world.encode(text) for text in texts)
    drawn = random.Random(0)
    for _ in range(2000):
        text = "".join(drawn.choices(texts, k=20))
        assert greedy.encode(text) == world.encode(text)


def test_without_the_package_world_is_the_same(world, without_package, capsys):
    assert world_vocabulary().parent.name == "rwkv"
    for _ in range(2):
        ours = load_tokenizer("world")
    assert (ours.name, ours.vocab_size, ours.end_id, ours.token_bytes) == ("world", 65536, 0, world.token_bytes)
    assert ours.encode(MIXED[6]) == world.encode(MIXED[6])
    assert capsys.readouterr().err.count("encoding in Python") == 1
    with pytest.raises(UserError, match="character 2"):
        ours.encode("ab\ud800")
    with pytest.raises(UserError, match="token 65536 at position 1 is outside the vocabulary of 65536"):
        ours.decode([1, 65536])


def test_without_any_vocabulary_the_packages_are_named(without_package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pyrwkv-tokenizer and rwkv"):
        load_tokenizer("world")


def test_a_byte_without_a_token_is_named_and_nothing_is_dropped(tmp_path):
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(VOCABULARY)
    with pytest.raises(UserError, match="no token for the byte 120 at byte 2"):
        load_tokenizer(str(path)).encode("abx")


def test_bytes_are_the_first_tokens_of_world(world):
    raw = load_tokenizer("bytes")
    ids = [*range(1, 257)]
    assert [world.token_bytes[token] for token in ids] == [bytes([token - 1]) for token in ids]
    assert raw.decode(raw.encode("é")) == world.decode(raw.encode("é"))


def test_end_token_decodes_to_nothing_and_bad_utf8_to_the_replacement_character(world):
    for tokenizer in (world, load_tokenizer("bytes")):
        assert tokenizer.decode([ord("a") + 1, 0, ord("b") + 1]) == "ab"
        assert tokenizer.decode([ord("a") + 1, 0xC3 + 1]) == "a\ufffd"
    assert world.decode([65535]) == "\ufffd"  # below the models' vocabulary, but stands for nothing


@pytest.mark.parametrize("content", [VOCABULARY, VOCABULARY.replace(b"\n", b"\r\n"), VOCABULARY.rstrip(b"\n")])
def test_vocabulary_files_load_with_any_line_ends(tmp_path, content):
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(content)
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.token_bytes == [None, b"\0", b"a", b"\xff", None, b"ab"]
    assert tokenizer.vocab_size == 6
    assert tokenizer.encode("aba\0") == [5, 2, 1]
    assert tokenizer.decode([5, 2]) == "aba"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds no token"),
        (b"hello\n", "line 1"),
        (b"1 'a' 1\n2 'b' 2\n", "line 2.*1 bytes, and the line says 2"),
        (b"1 __import__('os') 1\n", "line 1"),
        (b"-4 'a' 1\n", "line 1"),
        (b"5 " + b"-" * 100_000 + b"1 1\n", "line 1.* is not"),
        (b"5 " + b"(" * 100_000 + b"'a' 1\n", "line 1.* is not"),
        (b"5 [1, 2] 2\n", "line 1.* is not"),
        (b"1 'a' 1\n16777216 'b' 1\n", "line 2: token 16777216 is not from 1 to 16,777,215"),
    ],
)
def test_bad_vocabularies_are_named(tmp_path, content, message):
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        parse_world_vocabulary(path)


def test_a_panic_of_the_rust_tokenizer_is_a_user_error(world):
    from rwkv_peft.data.tokenizer import guarded

    pytest.importorskip("pyrwkv_tokenizer")
    with pytest.raises(UserError, match="World tokenizer failed"):
        guarded("the World tokenizer failed", world._encoder.decode, [129])  # byte 128 alone is not UTF-8


def test_real_world_vocabulary(shared_data, world):
    path = shared_data / "tokenizer" / "rwkv_vocab_v20230424.txt"
    loaded = load_tokenizer(str(path))
    text = (shared_data / "text" / "sherlock.txt").read_text()[:20000]
    assert loaded.encode(text) == world.encode(text)
    assert loaded.vocab_size == 65530


def test_the_command_prints_ids_as_mask_id_takes_them(capsys):
    assert main(["preprocess", "--ids", "ab", "--tokenizer", "bytes"]) == 0
    assert capsys.readouterr().out == "98 99\n"
    with pytest.raises(UserError, match="no command tokenize; did you mean preprocess --ids --tokenizer?"):
        main(["tokenize", "bytes", "ab"])
    assert main(["preprocess", "--ids", "--tokenizer", "bytes", "a", "b"]) == 0
    assert capsys.readouterr().out == "98\n99\n"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ids", "ab", "--output", "x"], "--output x does not go with --ids: that only prints token ids; leave"),
        (["ab"], "needs --output or --ids"),
    ],
)
def test_flags_that_go_with_files_do_not_go_with_a_text(words, message):
    with pytest.raises(UserError, match=message):
        main(["preprocess", *words])


def test_tokenizer_json(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"hello": 0, "world": 1, "[UNK]": 2, "</s>": 7}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_truncation(1)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.encode("hello world hello") == [0, 1, 0]
    assert loaded.decode([0, 1]) == "hello world"
    assert (loaded.vocab_size, loaded.end_id) == (8, 7)


def test_bad_tokenizer_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file; give world, bytes"):
        load_tokenizer(str(tmp_path / "missing.json"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(UserError, match="not a tokenizer.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("kind", MODELS)
def test_a_text_without_a_token_is_a_message(tmp_path, kind):
    """Through the command: such a tokenizer has no token for the rows."""
    from rwkv_peft.cli import commands

    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    words = ["preprocess", tmp_path / "rows.jsonl", "--output", tmp_path / "out", "--no-append_eod"]
    with pytest.raises(UserError, match="line 2: tokenizer .* failed; give one that has tokens for every text"):
        commands.main([*map(str, words), "--tokenizer", json_file(tmp_path, kind)])


@pytest.mark.parametrize("token", [2**31, 2**32 - 1])
def test_ids_that_no_token_file_holds_are_refused(tmp_path, token):
    path = json_file(tmp_path, "WordLevel", vocab={"a": 0, "b": token}, unk_token="a")
    with pytest.raises(UserError, match=f"it has a token {token}, and ids of token files are below {2**31}"):
        load_tokenizer(path)


def test_special_tokens_are_shown_by_their_names(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.add_special_tokens(["</s>", "<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    tokens = loaded.encode("a<|im_end|><|im_end|>b</s>")
    assert loaded.special == {"</s>": 2, "<|im_end|>": 3} and tokens == [0, 3, 3, 1, 2]
    assert plain_text(tokens, loaded) == "a<|im_end|><|im_end|>b<end>"
    assert plain_text([98, 0, 0], BytesTokenizer()) == "a<end><end>"


def test_tokenizers_of_one_vocabulary_that_cut_otherwise_are_told_apart(tmp_path):
    from tokenizers import Tokenizer, models

    vocabulary, hashes = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}, []
    for merges in ([("a", "b"), ("b", "c")], [("b", "c"), ("a", "b")]):
        path = tmp_path / f"{len(hashes)}.json"
        Tokenizer(models.BPE(vocab=vocabulary, merges=merges)).save(str(path))
        hashes.append(vocabulary_of(load_tokenizer(path)).hash)
        file = json.loads(path.read_text())
        file["model"]["merges"] = [" ".join(pair) for pair in merges]  # as older libraries wrote them
        path.write_text(json.dumps(file | {"truncation": None}, indent=1))
        assert vocabulary_of(load_tokenizer(path)).hash == hashes[-1]
    assert len(set(hashes)) == 2
