"""Chats with tools: every form of a row gives one layout, calls count in the loss, and come back out of the text."""

import json
import random

import pytest

from data.documents import marked, texts
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.layouts import RowLayout
from rwkv_peft.data.tools import ASKED, ToolCall, calls_text, parse_calls

WEATHER = {"name": "weather", "description": "It.", "parameters": {"type": "object", "properties": {}}}
TIME = {"name": "time", "parameters": {}}
PARIS, NOON = {"name": "weather", "arguments": {"city": "Paris"}}, {"name": "time", "arguments": {}}
CALLS = [{"id": "1", "type": "function", "function": PARIS}, {"id": "2", "type": "function", "function": NOON}]
LISTED = f"<tools>\n{json.dumps(WEATHER)}\n{json.dumps(TIME)}\n</tools>\n{ASKED}"
CALLED = f"<tool_call>\n{json.dumps(PARIS)}\n</tool_call>\n<tool_call>\n{json.dumps(NOON)}\n</tool_call>"
TEXT = f"System: Be.\n{LISTED}\n\nUser: Hi\n\nAssistant:[[ Well.\n{CALLED}\n\nTool:]] sun\n\nTool: 12\n\n"
TEXT += "Assistant:[[ Fine.]]"


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def row(*turns, **more):
    """Turns with the answer's between the question and the results."""
    begin, end = [turn("system", "Be."), turn("user", "Hi")], [turn("assistant", "Fine.")]
    return {"messages": [*begin, *turns, *end], "tools": [WEATHER, TIME], **more}


def results(*places):
    found = [turn("tool", "sun", tool_call_id="1"), turn("tool", "12", tool_call_id="2")]
    return [found[place] for place in places]


WITH_CALLS = turn("assistant", "Well.", tool_calls=CALLS)
OPENAI = row(WITH_CALLS, *results(0, 1))
IN_TEXT = [{"function": call | {"arguments": json.dumps(call["arguments"])}} for call in (PARIS, NOON)]
ROWS = {
    "OpenAI": OPENAI,
    "its results in another order": row(WITH_CALLS, *results(1, 0)),
    "arguments and tools as text": row(
        turn("assistant", "Well.", tool_calls=IN_TEXT),
        turn("tool", "sun"),
        turn("tool", "12"),
        tools=json.dumps([{"type": "function", "function": tool} for tool in (WEATHER, TIME)]),
    ),
    "functions, calls as text": row(
        turn("assistant", "Well.", tool_calls=json.dumps([PARIS, NOON]), function_call=None),
        turn("function", "sun", name="weather"),
        turn("function", "12", name="time"),
        tools=None,
        functions=[WEATHER, TIME],
    ),
    "the system's text and tools beside the turns": {
        "messages": OPENAI["messages"][1:],
        "system": "Be.",
        "tools": [WEATHER, TIME],
    },
    "tools in the system's turn": {"messages": [turn("system", "Be.", tools=[WEATHER, TIME]), *OPENAI["messages"][1:]]},
    "ShareGPT": {
        "conversations": [
            *({"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Well."}),
            *({"from": "function_call", "value": json.dumps(call)} for call in (PARIS, NOON)),
            *({"from": "observation", "value": said} for said in ("sun", "12")),
            {"from": "gpt", "value": "Fine."},
        ],
        "system": "Be.",
        "tools": json.dumps([WEATHER, TIME]),
    },
    "tool_call and tool_response": row(
        turn("assistant", "Well."),
        turn("tool_call", json.dumps([PARIS, NOON])),
        turn("tool_response", "sun"),
        turn("tool_response", "12"),
    ),
}


@pytest.mark.parametrize("form", ROWS)
def test_every_form_is_laid_out_alike(form):
    assert marked(RowLayout().segments(ROWS[form])) == TEXT


def test_tokens_count_as_the_layout_says(preprocess):
    ((text, counted),) = texts(preprocess([ROWS["OpenAI"]]))
    assert text == TEXT.replace("[[", "").replace("]]", "")
    assert counted == f" Well.\n{CALLED}\n\nTool: Fine."


def test_a_question_whose_answers_are_calls():
    xlam = {"query": "Hi", "tools": json.dumps([WEATHER, TIME]), "answers": json.dumps([PARIS, NOON])}
    assert marked(RowLayout().segments(xlam)) == f"System: {LISTED}\n\nUser: Hi\n\nAssistant:[[ {CALLED}]]"


@pytest.mark.parametrize("said", [None, "", "<think>hm</think>"])
def test_thinking_stands_before_calls(said):
    thought = {} if said else {"reasoning_content": "hm"}
    called = {"messages": [turn("user", "Hi"), turn("assistant", said, tool_calls=[CALLS[0]], **thought)]}
    text = f"<tool_call>\n{json.dumps(PARIS)}\n</tool_call>"
    breaks = "" if said else "\n"
    assert (
        marked(RowLayout("on").segments(called))
        == f"User: Hi\n\nAssistant: <think[[>{breaks}hm{breaks}</think>\n{text}]]"
    )
    assert marked(RowLayout("off").segments(called)) == f"User: Hi\n\nAssistant: <think></think[[>\n{text}]]"


def test_pairs_and_prompts_list_tools_too():
    asked = {"messages": [turn("user", "Hi")], "tools": [WEATHER, TIME]}
    begin = f"System: {LISTED}\n\nUser: Hi\n\nAssistant:"
    better, worse = RowLayout().pair(asked | {"chosen": turn("assistant", "", tool_calls=CALLS), "rejected": "No."})
    assert marked(better) == f"{begin}[[ {CALLED}]]" and marked(worse) == f"{begin}[[ No.]]"
    assert "".join(text for text, _ in RowLayout().opened(asked)) == begin


@pytest.mark.parametrize(
    "bad, message",
    [
        (row(turn("assistant", "", tool_calls="weather()")), "a call of a tool is a text that is not JSON .*weather"),
        (row(turn("assistant", "", tool_calls=[{"id": "1"}])), "a call of a tool is .*it needs a name and arguments"),
        (
            row(turn("assistant", "", tool_calls=[PARIS | {"arguments": "[1]"}])),
            r"call of weather are \[1\], and an obj",
        ),
        (row(turn("assistant", "", tool_calls=[PARIS | {"arguments": "{"}])), "arguments of the call of weather is a"),
        (row(turn("user", "", tool_calls=CALLS)), "role 'user' calls a tool, which only the assistant does"),
        (row(turn("user", "", tools=[TIME])), "role 'user' lists tools, which only the system does"),
        (row(turn("function_call", "Paris")), "a call of a tool is a text that is not JSON"),
        (row(turn("assistant", None)), "field 'content' of a turn is null"),
        (row(tools=[1]), "a tool is 1; it needs a name"),
        (row(functions="f(x)", tools=None), "the list of tools is a text that is not JSON"),
    ],
)
def test_a_call_that_nobody_can_read_is_a_bad_row(preprocess, bad, message):
    with pytest.raises(UserError, match=f"line 2: .*{message}"):
        preprocess([ROWS["OpenAI"], bad])
    assert len(texts(preprocess([ROWS["OpenAI"], bad], "--skip_bad_rows"))) == 1


def anything(draw, depth=0):
    """A random value of JSON, of texts that are hard to tell from the layout."""
    hard = ["", "</tool_call>", "<tool_call>\n{", "\n\nUser:", "```", "é\u2028\U0001f600", '"\\', "</think>", "<think>"]
    kinds = [lambda: draw.choice(hard), lambda: draw.randint(-9, 9), lambda: draw.choice([None, True, 0.5])]
    if depth < 3:
        kinds += [
            lambda: [anything(draw, depth + 1) for _ in range(draw.randint(0, 3))],
            lambda: {draw.choice(hard): anything(draw, depth + 1) for _ in range(draw.randint(0, 3))},
        ]
    return draw.choice(kinds)()


@pytest.mark.parametrize("before", ["", "Well.", ">\nhm <tool_call>\n</think>\nWell.", "<think>{}</think>Well."])
def test_calls_come_back_as_they_were(before):
    draw = random.Random(0)
    for _ in range(200):
        calls = [ToolCall("f", {"x": anything(draw)}) for _ in range(draw.randint(0, 3))]
        text = calls_text([call._asdict() for call in calls])
        assert "\n\n" not in text  # which would end the turn for some runtimes
        assert parse_calls(f" {before}\n{text}") == (before.strip(), calls)


@pytest.mark.parametrize(
    "text, rest, names",
    [
        ('<tool_call>{"name": "f"}', "", ["f"]),
        ('a <tool_call> {"name": "f"}\n{"name": "g", "parameters": {}} </tool_call> b', "a  b", ["f", "g"]),
        ('**Tool Call:**\n```json\n{\n  "name": "f",\n  "arguments": {}\n}\n```', "", ["f"]),
        ('<tool_call>{"name": "f"</tool_call>', '<tool_call>{"name": "f"</tool_call>', []),
        ("<tool_call>f</tool_call>", "<tool_call>f</tool_call>", []),
        ('<think>I might <tool_call>{"name": "f"}', '<think>I might <tool_call>{"name": "f"}', []),
        ('> quoted\n<tool_call>{"name": "f"}</tool_call>', "> quoted", ["f"]),
    ],
)
def test_what_models_write(text, rest, names):
    content, calls = parse_calls(text)
    assert (content, [call.name for call in calls]) == (rest, names)
