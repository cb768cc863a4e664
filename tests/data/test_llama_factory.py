"""Each form of row in LLaMA-Factory's data/ folder, but those with media, is read as it is meant."""

import json

import pytest

from data.documents import marked, shared, talk, valued
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.encoding import LAYOUTS
from rwkv_peft.data.forms import SIDES
from rwkv_peft.data.layouts import RowLayout
from rwkv_peft.data.sources import build_samples
from rwkv_peft.data.tools import TOOL_FORMS

TOOLS = json.dumps([{"name": "f", "parameters": {}}])
CALLED = json.dumps({"name": "f", "arguments": {"a": 1}})
LISTED = TOOL_FORMS["g1"].tools_text(TOOLS)
V1 = talk(("system", [valued("S")]), ("user", [valued("Q")]))["messages"]
V1_CALL = {"role": "assistant", "content": [valued("hm", "reasoning"), valued(CALLED, "tool_call")]}
V1_ANSWER = {"role": "assistant", "content": [valued("A")], "loss_weight": 1.0}
V1_END = [{"role": "tool", "content": [valued("3")]}, V1_ANSWER]
V1_TEXT = f"System: S\n{LISTED}\n\nUser: Q\n\nAssistant:"
CALL_TEXT = f"{TOOL_FORMS['g1'].calls_text(CALLED)}\n\nUser:]] Function output:\n3\n\nAssistant:[[ A]]"
TWO_TURNS = "User: P\n\nAssistant:[[ O\n\nUser:]] Q"


@pytest.mark.parametrize(
    "kind, row, think, due",
    [
        ("sft", {"text": "A page."}, "", ["[[A page.]]"]),
        ("sft", dict(instruction="Q", input="x", output="A"), "", ["Instruction: Q\n\nInput: x\n\nResponse:[[ A]]"]),
        (
            "sft",
            dict(instruction="Q", input="x", output="A", system="S", history=[["P", "O"]]),
            "",
            [f"System: S\n\n{TWO_TURNS}\nx\n\nAssistant:[[ A]]"],
        ),
        ("sft", dict(query="Q", response="A", history=[["P", "O"]]), "", [f"{TWO_TURNS}\n\nAssistant:[[ A]]"]),
        (
            "sft",
            dict(query="Q", response="A", thinking="hm", history='[["P", "O"]]'),
            "on",
            [f"{TWO_TURNS}\n\nAssistant: <think[[>\nhm\n</think>\nA]]"],
        ),
        (
            "sft",
            shared(("human", "Q"), ("function_call", CALLED), ("observation", "3"), ("gpt", "A"))
            | {"system": "S", "tools": TOOLS},
            "",
            [f"{V1_TEXT}[[ {CALL_TEXT}"],
        ),
        (
            "pairs",
            dict(instruction="Q", input="x", chosen="A", rejected="B"),
            "",
            [f"Instruction: Q\n\nInput: x\n\nResponse:[[ {answer}]]" for answer in "AB"],
        ),
        (
            "pairs",
            dict(instruction="Q", chosen="A", rejected="B", history=[["P", "O"]]),
            "",
            [f"User: P\n\nAssistant: O\n\nUser: Q\n\nAssistant:[[ {answer}]]" for answer in "AB"],
        ),
        (
            "pairs",
            shared(("human", "Q")) | {side: {"from": "gpt", "value": answer} for side, answer in zip(SIDES[0], "AB")},
            "",
            [f"User: Q\n\nAssistant:[[ {answer}]]" for answer in "AB"],
        ),
        ("labels", talk(("user", "Q"), ("assistant", "A"), label=True), "", ["User: Q\n\nAssistant:[[ A]]"]),
        ("labels", shared(("human", "Q"), ("gpt", "A")) | {"kto_tag": False}, "", ["User: Q\n\nAssistant:[[ A]]"]),
        ("sft", {"messages": [*V1, V1_CALL, *V1_END], "tools": TOOLS}, "", [f"{V1_TEXT}[[ {CALL_TEXT}"]),
        (
            "sft",
            {"messages": [*V1, V1_CALL, *V1_END], "tools": TOOLS},
            "on",
            [f"{V1_TEXT} <think[[>\nhm\n</think>\n{CALL_TEXT}"],
        ),
        (
            "sft",
            {"messages": [*V1, V1_CALL | {"loss_weight": 0}, *V1_END], "tools": TOOLS},
            "",
            [f"{V1_TEXT} {CALL_TEXT.replace(']]', '', 1)}"],
        ),
        (
            "pairs",
            {
                f"{side}_messages": [*V1, {"role": "assistant", "content": [valued(answer)], "loss_weight": 1.0}]
                for side, answer in zip(SIDES[0], "AB")
            },
            "",
            [f"System: S\n\nUser: Q\n\nAssistant:[[ {answer}]]" for answer in "AB"],
        ),
    ],
)
def test_every_form_of_row(kind, row, think, due):
    layout = RowLayout(think)
    documents = LAYOUTS[kind](layout, row) if kind in LAYOUTS else [layout.segments(row)]
    assert [marked(document) for document in documents] == due


def test_a_label_by_llama_factorys_name(answers, preprocess):
    rows = [shared(("human", "Q"), ("gpt", answer)) | {"kto_tag": answer == "A"} for answer in "AB"]
    assert len(build_samples(answers("labels")(rows), 257)) == 2
    with pytest.raises(UserError, match="a row has the label true, .*--data_type labels"):
        preprocess(rows)
