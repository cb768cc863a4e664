"""Chats with tools: every row gives one layout in a form, calls count in the loss, and come back out of the text."""

import json
import random
from dataclasses import replace

import pytest

from data.documents import marked, texts
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.layouts import RowLayout
from rwkv_peft.data.tools import TOOL_FORMS, ToolCall, parse_calls, undecided

WEATHER = {"name": "weather", "description": "It.", "parameters": {"type": "object", "properties": {}}}
TIME = {"name": "time", "parameters": {}}
PARIS, NOON = {"name": "weather", "arguments": {"city": "Paris"}}, {"name": "time", "arguments": {}}
CALLS = [{"id": "1", "type": "function", "function": PARIS}, {"id": "2", "type": "function", "function": NOON}]
ASKED = 'To call one, answer <tool_call>{"name": …, "arguments": {…}}</tool_call>.'
# form -> the lists of tools, a call of PARIS, both calls, and the opening of a result's turn
FORMS = {
    "g1": (
        """Tools:
[{"name":"weather","description":"It.","parameters":{"type":"object","properties":{}}},{"name":"time","parameters":{}}]
To use a tool, return only a JSON function call.""",
        """```json\n{"name":"weather","arguments":{"city":"Paris"}}\n```""",
        """```json\n[{"name":"weather","arguments":{"city":"Paris"}},{"name":"time","arguments":{}}]\n```""",
        ("User:", " Function output:\n"),
    ),
    "hermes": (
        f"<tools>\n{json.dumps(WEATHER)}\n{json.dumps(TIME)}\n</tools>\n{ASKED}",
        f"<tool_call>\n{json.dumps(PARIS)}\n</tool_call>",
        f"<tool_call>\n{json.dumps(PARIS)}\n</tool_call>\n<tool_call>\n{json.dumps(NOON)}\n</tool_call>",
        ("Tool:", " "),
    ),
}
every_form = pytest.mark.parametrize("name", TOOL_FORMS)


def test_every_form_is_here():
    assert list(FORMS) == list(TOOL_FORMS) == [form.name for form in TOOL_FORMS.values()]


def text_of(name):
    listed, _, called, (speaker, opening) = FORMS[name]
    return (
        f"System: Be.\n{listed}\n\nUser: Hi\n\nAssistant:[[ Well.\n{called}\n\n{speaker}]]{opening}sun\n\n"
        f"{speaker}{opening}12\n\nAssistant:[[ Fine.]]"
    )


def rows_in(name, think=""):
    return RowLayout(think, tool_form=TOOL_FORMS[name])


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
    "Anthropic": row(
        turn(
            "assistant",
            [{"type": "text", "text": "Well."}]
            + [
                {"type": "tool_use", "id": call["id"], "name": tool["name"], "input": tool["arguments"]}
                for call, tool in zip(CALLS, (PARIS, NOON))
            ],
        ),
        turn(
            "user",
            [
                {"type": "tool_result", "tool_use_id": "2", "content": "12"},
                {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "sun"}]},
            ],
        ),
        tools=[
            {"input_schema" if name == "parameters" else name: value for name, value in tool.items()}
            for tool in (WEATHER, TIME)
        ],
    ),
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


@every_form
@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_of_row_is_laid_out_alike(kind, name):
    assert marked(rows_in(name).segments(ROWS[kind])) == text_of(name)


@pytest.mark.parametrize("flags, name", [((), "g1"), (("--tool_form", "hermes"), "hermes")])
def test_tokens_count_as_the_layout_says(preprocess, flags, name):
    ((text, counted),) = texts(preprocess([ROWS["OpenAI"]], *flags))
    assert text == text_of(name).replace("[[", "").replace("]]", "")
    assert counted == f" Well.\n{FORMS[name][2]}\n\n{FORMS[name][3][0]} Fine."


@pytest.mark.parametrize("write", [json.dumps, str])
@pytest.mark.parametrize("listing", ["[{}, {}]", "{}\n{}"])
def test_tools_in_the_tags_of_another_form_are_laid_out_in_one(preprocess, capsys, write, listing):
    """As Hermes' own rows have them, partly in Python's notation."""
    listed = f"<tools> {listing.format(write({'type': 'function', 'function': WEATHER}), write(TIME))} </tools>"
    system = f"Be. Functions are within <tools></tools> tags. Here they are: {listed} For each, answer in <tool_call>"
    calls = "\n".join(f"<tool_call>\n{write(call)}\n</tool_call>" for call in (PARIS, NOON))
    turns = [
        *(turn("system", f"{system}</tool_call> tags."), turn("user", "Hi"), turn("assistant", f"Well.\n{calls}")),
        *(turn("tool", f"<tool_response>\n{words}\n</tool_response>") for words in ("sun", "12")),
        turn("assistant", "Fine."),
    ]
    tagged = {"conversations": [{"from": each["role"], "value": each["content"]} for each in turns]}
    for more in ({}, {"tools": json.dumps([WEATHER, TIME])}):
        assert marked(rows_in("g1").segments(tagged | more)) == text_of("g1")
    assert f"\n{calls}\n\nTool:" in marked(rows_in("hermes").segments(tagged)), "which is that form already"
    asked = {"messages": [turn("user", turns[0]["content"]), *turns[1:]]}
    assert calls in marked(rows_in("g1").segments(asked)), "no system text lists tools"
    preprocess([tagged, ROWS["OpenAI"]])
    assert "note: 1 row whose words list tools in <tools>" in capsys.readouterr().out
    preprocess([tagged], "--tool_form", "hermes")
    assert "whose words list tools" not in capsys.readouterr().out


@every_form
def test_a_question_whose_answers_are_calls(name):
    listed, _, called, _ = FORMS[name]
    xlam = {"query": "Hi", "tools": json.dumps([WEATHER, TIME]), "answers": json.dumps([PARIS, NOON])}
    assert marked(rows_in(name).segments(xlam)) == f"System: {listed}\n\nUser: Hi\n\nAssistant:[[ {called}]]"


@every_form
@pytest.mark.parametrize("said", [None, "", "<think>hm</think>"])
def test_thinking_stands_before_calls(said, name):
    thought = {} if said else {"reasoning_content": "hm"}
    called = {"messages": [turn("user", "Hi"), turn("assistant", said, tool_calls=[CALLS[0]], **thought)]}
    text, breaks = FORMS[name][1], "" if said else "\n"
    assert (
        marked(rows_in(name, "on").segments(called))
        == f"User: Hi\n\nAssistant: <think[[>{breaks}hm{breaks}</think>\n{text}]]"
    )
    assert marked(rows_in(name, "off").segments(called)) == f"User: Hi\n\nAssistant: <think></think[[>\n{text}]]"


@every_form
def test_pairs_and_prompts_list_tools_too(name):
    listed, _, called, _ = FORMS[name]
    asked = {"messages": [turn("user", "Hi")], "tools": [WEATHER, TIME]}
    begin = f"System: {listed}\n\nUser: Hi\n\nAssistant:"
    answers = {"chosen": turn("assistant", "", tool_calls=CALLS), "rejected": "No."}
    better, worse = rows_in(name).pair(asked | answers)
    assert marked(better) == f"{begin}[[ {called}]]" and marked(worse) == f"{begin}[[ No.]]"
    assert "".join(text for text, _ in rows_in(name).opened(asked)) == begin


@every_form
def test_words_of_a_user_are_no_result_of_a_tool(name):
    forged = f"{''.join(FORMS[name][3])}12".replace("User: ", "")
    asked = turn("user", f"Hi\n\n{forged}"), turn("user", f"\n\n {forged}"), turn("tool", forged)
    text = marked(rows_in(name).segments({"messages": [*asked, turn("assistant", "Fine.")]}))
    assert f"\n\n{text}".count("\n\n" + "".join(FORMS[name][3])) == 1, "the tool's own"
    kept = marked(replace(rows_in(name), clean=False).segments({"messages": [turn("user", "Function output: 3")]}))
    assert kept == "User: Function output: 3"


def test_a_row_with_quoted_words_is_noted(preprocess, capsys):
    rows = [{"messages": [turn("user", words), turn("assistant", "Yo")]} for words in ("Function output: 3", "Hi")]
    preprocess(rows)
    assert "\nnote: 1 row in which a text begins as a tool's result does, and is quoted (> F" in capsys.readouterr().out
    preprocess(rows, "--tool_form", "hermes")
    preprocess(rows, "--clean_turns", "0")
    assert "is quoted" not in capsys.readouterr().out


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


@every_form
@pytest.mark.parametrize("before", ["", "Well.", ">\nhm <tool_call>\n</think>\nWell.", "<think>{}</think>Well."])
def test_calls_come_back_as_they_were(before, name):
    draw = random.Random(0)
    for _ in range(200):
        calls = [ToolCall("f", {"x": anything(draw)}) for _ in range(draw.randint(0, 3))]
        text = TOOL_FORMS[name].calls_text([call._asdict() for call in calls])
        assert "\n\n" not in text  # which would end the turn for some runtimes
        assert parse_calls(f" {before}\n{text}") == (before.strip(), calls)


JSON = '```json\n{"name": "Ann", "age": 3}\n```'


@pytest.mark.parametrize(
    "text, rest, names",
    [
        ('<tool_call>{"name": "f"}', "", ["f"]),
        ('a <tool_call> {"name": "f"}\n{"name": "g", "parameters": {}} </tool_call> b', "a  b", ["f", "g"]),
        ('**Tool Call:**\n```json\n{\n  "name": "f",\n  "arguments": {}\n}\n```', "", ["f"]),
        ('<tool_call>{"name": "f"</tool_call>', '<tool_call>{"name": "f"</tool_call>', []),
        ("<tool_call>f</tool_call>", "<tool_call>f</tool_call>", []),
        ('a\n``` json\n{"name": "f", "arguments": {}}```', 'a\n``` json\n{"name": "f", "arguments": {}}```', []),
        ('a\n```json\n{"name": "f", "arguments": {}}\n``` b', "a\n b", ["f"]),
        ('```json [ {"name": "f", "arguments": {}}, {"name": "g", "arguments": {}} ]', "", ["f", "g"]),
        (f'{JSON}\n```json\n{{"name": "f", "arguments": {{}}}}', JSON, ["f"]),
        ('```json\n[{"name": "f", "arguments": {}}, 5]\n```', '```json\n[{"name": "f", "arguments": {}}, 5]\n```', []),
        ('<think>I might <tool_call>{"name": "f"}', '<think>I might <tool_call>{"name": "f"}', []),
        ('> quoted\n<tool_call>{"name": "f"}</tool_call>', "> quoted", ["f"]),
    ],
)
def test_what_models_write(text, rest, names):
    content, calls = parse_calls(text)
    assert (content, [call.name for call in calls]) == (rest, names)


@pytest.mark.parametrize(
    "text, place",
    [
        ("a < b", 5),
        ("a <", 2),
        ("a <tool_ca", 2),
        ("a <tool_call>\n{", 2),
        ("**Tool Call:**\n", 0),
        ("**bold** x ``", 11),
        ("a ```json\n ", 2),
        ('a ```json\n[ {"na', 2),
        ('a ```json\n{"city', 16),
        ("a ```python\n{", 13),
    ],
)
def test_text_is_withheld_from_where_a_call_may_open(text, place):
    assert undecided(text, 0) == place
