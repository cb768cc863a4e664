"""What is found of answers: calls of tools, whole and as a stream."""

import json

import pytest

from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.inference.serve.requests import ChatBody
from rwkv_peft.inference.serve.responses import ChatResponse, CompletionPart, CompletionResponse, Token, event
from rwkv_peft.inference.serve.web import Body

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
ANSWERS = {  # (words, cities)
    "I look it up.\n" + CALL: ("I look it up.", ["Köln"]),
    CALL + "\n" + CALL.replace("Köln", "Bonn"): ("", ["Köln", "Bonn"]),
    "a < b and <tool_c or <tool_call> of nothing": ("a < b and <tool_c or <tool_call> of nothing", []),
    "no calls": ("no calls", []),
    **{CALL[:-cut]: ("", ["Köln"]) for cut in (1, 5, 11, 12, 13)},  # by max_tokens, within the closing
}


def parts_of(text, width):
    response = ChatResponse("m", BytesTokenizer(), False, True)
    cuts = [text[begin : begin + width] for begin in range(0, len(text), width)]
    pieces = [CompletionPart(0, cut, ()) for cut in cuts] + [CompletionPart(0, "", (), "stop")]
    found = [response.delta(piece, place == 0) for place, piece in enumerate(pieces)]
    return [part for part in found if part is not None]


def arguments(calls):
    return [json.loads(call["function"]["arguments"])["city"] for call in calls]


@pytest.mark.parametrize("text", ANSWERS)
def test_calls_of_tools_are_found_apart_from_words(text):
    words, cities = ANSWERS[text]
    answer = ChatResponse("m", BytesTokenizer(), False, True).choice(CompletionPart(0, text, (), "stop"))
    assert (answer["message"]["content"] or "") == words
    assert arguments(answer["message"].get("tool_calls", ())) == cities
    assert answer["finish_reason"] == ("tool_calls" if cities else "stop")


@pytest.mark.parametrize("width", [1, 3, 1000])
@pytest.mark.parametrize("text", ANSWERS)
def test_a_stream_tells_words_at_once_and_calls_at_the_end(text, width):
    words, cities = ANSWERS[text]
    parts = parts_of(text, width)
    assert "".join(part["delta"]["content"] for part in parts).strip() == words
    assert arguments(parts[-1]["delta"].get("tool_calls", ())) == cities
    assert parts[-1]["finish_reason"] == ("tool_calls" if cities else "stop")
    assert not any("tool_calls" in part["delta"] for part in parts[:-1])
    if words and width == 1:
        assert len(parts) > 5


def test_without_tools_an_answer_is_its_text():
    answer = ChatResponse("m", BytesTokenizer(), False, False).choice(CompletionPart(0, CALL, (), "stop"))
    assert answer["message"]["content"] == CALL and answer["finish_reason"] == "stop"


def test_offsets_are_those_of_the_text():
    response, tokenizer = CompletionResponse("m", BytesTokenizer(), True), BytesTokenizer()
    text = "é 😀!"
    pieces = [CompletionPart(0, "", (Token(token, None),)) for token in tokenizer.encode(text)]
    offsets = [offset for piece in pieces for offset in response.choice(piece)["logprobs"]["text_offset"]]
    assert offsets == [0, 0, 1, 2, 2, 2, 2, 3] and text[3] == "!"


def test_a_field_that_is_null_is_left_out():
    asked = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    assert ChatBody.model_validate(asked | {"logit_bias": None, "n": None}) == ChatBody.model_validate(asked)


def test_what_is_not_unicode_is_found_as_json_escapes_it():
    found = {"arguments": '{"a": "\ud800 中"}'}
    assert json.loads(Body(found).body) == json.loads(event(found).removeprefix(b"data: ")) == found
