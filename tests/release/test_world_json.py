"""The World vocabulary as a tokenizer.json: World's own tokens, wherever transformers runs."""

import json
import random
import subprocess
import sys

import pytest
import torch

from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.cli.commands import main
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.release.world_json import END, world_json

PIECES = [*" \n\t\r=-'\0\xa0\u3000é\u0301\ufffd🦢", "<s>", "क्षि", "ёж", "你好", "한글"]
ALONE = """
import json, sys
sys.modules["rwkv_peft"] = sys.modules["torch"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts, chat = json.load(sys.stdin)
ids = tokenizer(texts).input_ids
asked = dict(return_dict=True, return_assistant_tokens_mask=True)
prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
marks = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side, len(tokenizer)]
print(json.dumps([ids, tokenizer.batch_decode(ids), prompt, tokenizer.apply_chat_template(chat, **asked).data, marks]))
"""


@pytest.fixture(scope="module")
def world():
    return load_tokenizer("world")


def awkward(world, number):
    """Texts of runs of signs, of any code points, of tokens cut and joined, and of random bytes."""
    draw, tokens = random.Random(0), [token for token in world.token_bytes if token]
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    for _ in range(number):
        size = draw.choice((1, 3, 20, 60))
        yield "".join(draw.choice(PIECES) * draw.choice((1, 2, 3, 150)) for _ in range(size))
        yield "".join(map(chr, draw.choices(draw.choice((points, range(0x3000))), k=size)))
        yield b"".join(draw.choices(tokens, k=size)).decode("utf-8", "replace")
        yield "".join(token.decode("utf-8", "ignore")[: draw.randint(1, 9)] for token in draw.choices(tokens, k=size))
        yield draw.randbytes(size).decode("utf-8", "replace")


def test_all_tokens_and_any_text_are_those_of_world(world):
    tokenizers = pytest.importorskip("tokenizers")
    found = tokenizers.Tokenizer.from_str(world_json(world.token_bytes, world.vocab_size).decode())
    known = [number for number, token in enumerate(world.token_bytes) if token]
    assert found.decode_batch([[number] for number in known]) == [world.decode([number]) for number in known]
    for texts in (map(world.decode, zip(known)), awkward(world, 40)):
        texts = [*texts]
        assert [encoding.ids for encoding in found.encode_batch(texts)] == list(map(world.encode, texts))
    ids = random.Random(1).choices(known, k=1000)  # bytes that are no text
    assert found.decode(ids) == world.decode(ids)
    assert found.encode(f"a{END}b").ids == [*world.encode("a"), 0, *world.encode("b")]
    assert found.get_vocab_size() == 65536 and found.id_to_token(65535) == "[PAD65535]"


def test_signs_that_share_a_token_with_a_newline_are_those_of_the_guide(world):
    """docs/guides/release.md names the answers that a chat template's text cuts otherwise than training does."""
    tokens = [token.decode("utf-8", "replace") for token in world.token_bytes if token]
    assert [token for token in tokens if "\n" in token and token.strip()] == ["…\n", "。\n", "，\n"]


def test_a_byte_without_a_token_is_an_error():
    tokenizers = pytest.importorskip("tokenizers")
    table = [None, b"a", b"\xff", None, b"ab", b"-", b"^]", b"+"]
    found = tokenizers.Tokenizer.from_str(world_json(table, 9).decode())
    assert found.encode("aaba^]-+").ids == [1, 4, 1, 6, 5, 7]
    with pytest.raises(Exception, match="UNK"):
        found.encode("axb")


def test_a_folder_needs_nothing_of_this_package(tmp_path, tiny_state, world):
    pytest.importorskip("transformers")
    save_model(tmp_path / "model.pth", tiny_state(vocab_size=65536, dtype=torch.bfloat16))
    assert main(["convert", str(tmp_path / "model.pth"), str(tmp_path / "hf")]) == 0
    texts = [*awkward(world, 5)]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So é."}]
    command = [sys.executable, "-c", ALONE, str(tmp_path / "hf")]
    done = subprocess.run(command, input=json.dumps([texts, chat]), capture_output=True, text=True, check=True)
    ids, decoded, prompt, tokens, marks = json.loads(done.stdout)
    assert ids == list(map(world.encode, texts)) and decoded == texts
    assert prompt == "User: Hi\n\nAssistant:" and marks == [0, 0, "left", 65536]
    parts = world.encode(prompt), world.encode(" So é.\n\n")
    assert tokens.keys() == {"input_ids", "attention_mask", "assistant_masks"}
    assert tokens["input_ids"] == [*parts[0], *parts[1]]
    assert tokens["assistant_masks"] == [0] * len(parts[0]) + [1] * len(parts[1])
