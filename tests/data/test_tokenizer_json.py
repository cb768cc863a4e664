"""Files of the tokenizers library: they load, fail with messages, and tell their vocabularies apart."""

import json

import pytest

from fuzz.foreign import MODELS, json_file
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.recorded import vocabulary_of
from rwkv_peft.data.show import plain_text
from rwkv_peft.data.tokenizer import BytesTokenizer, load_tokenizer


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
    words = ["preprocess", tmp_path / "rows.jsonl", "--output", tmp_path / "out", "--no-append_eod", "--workers", "1"]
    with pytest.raises(UserError, match="line 2: tokenizer .* failed; give one that has tokens for every text"):
        commands.main([*map(str, words), "--tokenizer", json_file(tmp_path, kind)])


@pytest.mark.parametrize("token", [2**31, 2**32 - 1])
def test_ids_that_no_token_file_holds_are_refused(tmp_path, token):
    path = json_file(tmp_path, "WordLevel", vocab={"a": 0, "b": token}, unk_token="a")
    with pytest.raises(UserError, match=f"it has a token {token}, and ids of token files are below {2**31}"):
        load_tokenizer(path)


def test_a_panic_of_the_tokenizers_library_is_a_message(tmp_path, monkeypatch):
    import tokenizers

    panic = type("PanicException", (BaseException,), {})

    def fail(path):
        raise panic("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(tokenizers, "Tokenizer", type("T", (), {"from_file": staticmethod(fail)}))
    with pytest.raises(UserError, match="not a tokenizer.json .called `Option::unwrap"):
        load_tokenizer(json_file(tmp_path, "WordLevel"))


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
