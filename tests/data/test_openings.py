"""The opening of answers is found in the data, and a run's model is prompted in the layout of its rows."""

import json

import pytest

from rwkv_peft.data.chat import KNOWN, opening_within, stops_of
from rwkv_peft.data.recorded import flags_beside, note_on_chats, prompt_beside, recorded_of_data
from rwkv_peft.data.report import opening_of
from rwkv_peft.inference.flags import unescaped

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>\nt\n</think>\nA"}]


@pytest.mark.parametrize(
    "rows, flags, opening",
    [
        ([{"messages": TURNS}], (), "Assistant:"),
        ([{"messages": [{"role": "system", "content": "a" * 9000}, *TURNS]}], (), "Assistant:"),
        ([{"messages": TURNS[1:]}], (), "Assistant:"),
        ([{"messages": TURNS}], ("--think", "on"), "Assistant: <think"),
        ([{"messages": TURNS}], ("--think", "off"), "Assistant: <think></think"),
        ([{"query": "Q", "response": "A"}], (), "Assistant:"),
        ([{"messages": TURNS[:1]}, {"text": "a"}, {"query": "Q", "response": "A"}], (), "Assistant:"),
        ([{"text": "User: Q\n\nAssistant: A"}], (), "Assistant:"),
        ([{"text": "User: Q\n\nAssistant: A"}, {"prompt": "a", "completion": "b"}], (), "Assistant:"),
        ([{"instruction": "Q", "output": "A"}], (), "Response:"),
        ([{"prompt": "Q:", "completion": "A"}], (), ""),
        ([{"text": "a"}], (), ""),
    ],
)
def test_the_opening_of_answers(preprocess, rows, flags, opening):
    dataset = preprocess(rows, *flags)
    assert opening_of(dataset, recorded_of_data(dataset.prefix)) == opening
    assert opening_of(dataset, None) == ""


def test_without_its_tokenizer_nothing_is_told(preprocess, tmp_path):
    (tmp_path / "own.txt").write_text("".join(f"{i + 1} {chr(i)!r} 1\n" for i in range(128)))
    dataset = preprocess([{"query": "Q", "response": "A"}], "--tokenizer", str(tmp_path / "own.txt"))
    vocabulary = recorded_of_data(dataset.prefix)
    assert opening_of(dataset, vocabulary) == "Assistant:"
    (tmp_path / "own.txt").write_text("".join(f"{i + 1} {chr(i)!r} 1\n" for i in range(127)))
    assert opening_of(dataset, vocabulary) == ""
    (tmp_path / "own.txt").unlink()
    assert opening_of(dataset, vocabulary) == ""


@pytest.mark.parametrize("last", [last for _, last in KNOWN])
def test_a_prompt_of_a_run_has_the_layout_of_its_rows(tmp_path, last):
    (tmp_path / "config.json").write_text(json.dumps({"opening": last}))
    prompt = unescaped(prompt_beside(None, tmp_path / "merged.pth"))
    if last == "Assistant:":
        assert prompt == note_on_chats(tmp_path) == ""
    else:
        assert opening_within(prompt) == last and stops_of(prompt)
        assert all(prompt_beside(tmp_path) in told(tmp_path) for told in (flags_beside, note_on_chats))


@pytest.mark.parametrize("settings", [{"opening": "Assistant: <think"}, {"opening": ""}, {"opening": [1]}, {}, []])
def test_what_is_not_known_is_asked_by_a_chat(tmp_path, settings):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert prompt_beside(tmp_path, tmp_path / "nowhere" / "a.pth") == "" and flags_beside(tmp_path) == "--chat"
