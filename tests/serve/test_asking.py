"""Bodies that ask for too much are refused before they cost anything."""

import pytest
from pydantic import ValidationError

from rwkv_peft.generate.settings import Sampling
from rwkv_peft.serve.asking import Bounds, asking_of
from rwkv_peft.serve.forms import ChatAsked, TextAsked
from rwkv_peft.serve.refused import Refused


@pytest.mark.parametrize(
    "form",
    [
        TextAsked(model="m", prompt=[""] * 5),
        ChatAsked(model="m", messages=[{}] * 11),
        ChatAsked(model="m", messages=[{}], tools=[{}] * 10),
    ],
)
def test_too_much_is_refused_before_it_is_tokenized(form):
    with pytest.raises(Refused, match="may be"):
        asking_of(form, None, Sampling(), Bounds(answers=4, prompt=10, tokens=10, vocabulary=257))


@pytest.mark.parametrize(
    "mistakes", [{f"x{n}": 0 for n in range(999)}, {"prompt": [None] * 999}, {"prompt": [[None] * 999] * 999}]
)
def test_a_thousand_mistakes_are_told_as_few(mistakes):
    with pytest.raises(ValidationError) as refusal:
        TextAsked(**{"model": "m", "prompt": "x"} | mistakes)
    assert refusal.value.error_count() < 6
