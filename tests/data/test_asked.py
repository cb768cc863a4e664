"""A run's model is asked as its rows ask."""

import json

import pytest

from rwkv_peft.data.asked import flags_beside, note_on_chats, prompt_beside
from rwkv_peft.data.templates import LAYOUTS, opening_within, stops_of
from rwkv_peft.inference.flags import unescaped


@pytest.mark.parametrize("last", [last for _, last in LAYOUTS])
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
