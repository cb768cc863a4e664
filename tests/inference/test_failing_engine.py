"""An error in the midst of a step: each answer hears of its end, and just once."""

import pytest
from engines import GREEDY, PROMPTS, ask, engine_of, finish, model_file

from rwkv_peft.inference.loading import load_model
from rwkv_peft.inference.voices import Voice


@pytest.mark.parametrize("failing", ["longest", "add", "_turn", "_begin"])
def test_an_error_ends_each_answer_once_but_those_that_wait(tiny_state, tmp_path, monkeypatch, failing):
    voice = Voice("base", *load_model(model_file(tiny_state, tmp_path / "base.pth")))
    running, calls = engine_of(voice, batch=2), []
    owner = running.known if hasattr(running.known, failing) else running
    whole = getattr(owner, failing)

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == (1 if failing.startswith("_") else 2):
            raise MemoryError
        return whole(*arguments)

    heard = [ask(running, voice, prompt, GREEDY, max_tokens=1)[0] for prompt in PROMPTS[:3]]
    monkeypatch.setattr(owner, failing, fail)
    with pytest.raises(MemoryError):
        finish(running)
    running.fail("failed")
    assert heard[1].end == "failed" and not heard[2].end
    finish(running)
    assert heard[0].end and heard[2].end == "length" and not running._open
