"""RWKV's vocabulary as a tokenizer of transformers: the package's own tokens, and what counts of a chat."""

import json

import pytest
from jinja2 import TemplateError

import rwkv_peft as rp
from data.documents import BOUNDARY, HOSTILE
from rwkv_peft.data.chat import ONLY_CALLS, SPEAKERS, THINK
from rwkv_peft.data.layouts import RowLayout
from rwkv_peft.hf import RWKVTokenizer
from rwkv_peft.hf.rwkv_tokenizer import WORLD_FILE
from rwkv_peft.inference.serve.requests import ChatBody, Limits


def test_the_tokenizer_is_the_packages_own(tmp_path):
    tokenizer, world = RWKVTokenizer(), rp.tokenizer("world")
    texts = ["Ann has 3 red balls.\n\nUser: héllo 你好 🦢", "<s> and  <|endoftext|>", " lead\ttail "]
    for text in texts:
        tokens = tokenizer(text).input_ids
        assert tokens == world.encode(text) and tokenizer.decode(tokens) == text
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == tokens
    assert tokenizer.vocab_size == len(tokenizer) == 65536 and tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.decode([0, *world.encode("a"), 0]) == f"{tokenizer.eos_token}a{tokenizer.eos_token}"
    assert tokenizer.decode([0, *world.encode("a"), 0], skip_special_tokens=True) == "a"
    assert tokenizer(f"a{tokenizer.eos_token}").input_ids == [*world.encode("a"), 0]
    asked = dict(tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(CHAT[1:2], **asked) == "User: Hi\n\nAssistant:"
    tokenizer.save_pretrained(tmp_path)
    again = RWKVTokenizer.from_pretrained(tmp_path)
    assert [again(text).input_ids for text in texts] == [world.encode(text) for text in texts]


def test_a_published_folder_that_holds_a_vocabulary_alone(tmp_path):
    (tmp_path / WORLD_FILE).write_text("1 'a' 1\n2 'b' 1\n4 '<s>' 3\n")
    names = {"bos_token": "<s>", "added_tokens_decoder": {"0": {"content": "<s>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = RWKVTokenizer.from_pretrained(tmp_path)
    assert tokenizer("ab<s>").input_ids == [1, 2, 4] and len(tokenizer) == 5 and tokenizer.bos_token_id == 0


CALL = {"function": {"name": "f", "arguments": {"é": [1, "x"]}}}
CHAT = [
    {"role": "system", "content": "Be. "},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo, é."},
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "No", "tool_calls": [CALL]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"é": 1}}}, {"name": "g"}]


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("turns", [CHAT, CHAT[1:3], CHAT[2:]])
def test_chats_and_what_counts_of_them_are_those_of_rows(turns, tools):
    """As trl's assistant_only_loss asks for it; the template ends every turn with a blank line, also the last."""
    tokenizer, parts = (
        RWKVTokenizer("bytes"),
        [*RowLayout().segments({"messages": turns, "tools": tools}), ("\n\n", True)],
    )
    found = tokenizer.apply_chat_template(turns, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(found["input_ids"]) == "".join(text for text, _ in parts)
    assert found["assistant_masks"] == [int(counts) for text, counts in parts for _ in text.encode()]


@pytest.mark.parametrize("words", HOSTILE)
def test_no_words_forge_a_turn_and_all_are_those_of_rows(words):
    turns = [{**turn, "content": turn["content"] if turn["role"] == "assistant" else words} for turn in CHAT]
    tools, tokenizer = [{"name": "f", "description": words}], RWKVTokenizer("bytes")
    found = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)
    assert found == "".join(text for text, _ in RowLayout().segments({"messages": turns, "tools": tools})) + "\n\n"
    assert BOUNDARY.findall(found) == BOUNDARY.findall(tokenizer.apply_chat_template(CHAT, tokenize=False))


@pytest.mark.parametrize("think", ["", *THINK])
def test_the_next_answer_is_opened_as_in_serve(think):
    tokenizer = RWKVTokenizer("bytes")
    own = [{"role": "user", "content": "Well (think)"}, *CHAT[4:6]]
    blank = [*CHAT[:3], {"role": "user", "content": " \n"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": " b\n"}]}]
    for number, turns in enumerate((CHAT[:2], CHAT, parts, own, CHAT[:1], blank)):
        asked = {"messages": turns, "tools": TOOLS[:number] or None, "think": think or None}
        (prompt,) = ChatBody(model="m", **asked).encode(rp.tokenizer("bytes"), Limits(1, 1 << 20, 1, 257))
        asked = {"tools": asked["tools"], "add_generation_prompt": True, "return_dict": False, "think": think}
        assert tokenizer.apply_chat_template(turns, **asked) == prompt.tokens


@pytest.mark.parametrize("role", sorted(SPEAKERS.keys() - set(ONLY_CALLS)))
def test_roles_have_the_names_of_rows_and_an_answer_goes_on(role):
    turns = [{"role": role.title(), "content": " 1 "}, *CHAT[1:3]]
    found = RWKVTokenizer("bytes").apply_chat_template(turns, tokenize=False, continue_final_message=True)
    assert found == "".join(text for text, _ in RowLayout().segments({"messages": turns}))


def test_masks_of_several_chats_and_of_another_template(tmp_path):
    tokenizer, asked = RWKVTokenizer("bytes"), dict(return_dict=True, return_assistant_tokens_mask=True)
    one, other = (tokenizer.apply_chat_template(chat, **asked)["assistant_masks"] for chat in (CHAT, CHAT[:3]))
    assert tokenizer.apply_chat_template([CHAT, CHAT[:3]], **asked)["assistant_masks"] == [one, other]
    plain = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    assert not any(tokenizer.apply_chat_template(CHAT, **asked, **plain)["assistant_masks"])
    assert tokenizer.apply_chat_template(CHAT, **asked, truncation=True, max_length=40)["assistant_masks"] == one[:40]
    assert any(one[:40])
    with pytest.raises(TemplateError, match="the role elf has no name"):
        tokenizer.apply_chat_template([{"role": "elf", "content": "Hi"}])
    with pytest.raises(TemplateError, match="a part of a content is no text"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image", "url": "a.png"}]}])
    tokenizer.save_pretrained(tmp_path)
    assert RWKVTokenizer.from_pretrained(tmp_path).apply_chat_template(CHAT, **asked)["assistant_masks"] == one
