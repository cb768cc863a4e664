"""Formulas: finding the final one in an answer, and deciding if two of them mean the same."""

import importlib.util

import pytest

from rwkv_peft.errors import UserError
from rwkv_peft.evals.numbers import boxed, final_answer, require_math_verify, same_answer, same_anywhere


@pytest.mark.parametrize(
    "text, inside",
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1}, no: \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1", None),
        ("5", None),
        ("", None),
    ],
)
def test_the_last_box(text, inside):
    assert boxed(text) == inside


def test_a_final_answer_stands_in_a_box_or_behind_its_words():
    assert final_answer(r"thus $\boxed{\sqrt{5}}$.\nThe answer is: 7") == r"\sqrt{5}"
    assert final_answer("The answer is: $3x+1$.") == "3x+1"
    assert final_answer("I do not know.") is None


@pytest.mark.parametrize(
    "given, gold, same",
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
        ("x + 1", "1+x", True),
        ("(1, 2)", "(1,2)", True),
        ("(2, 1)", "(1,2)", False),
        ("5", "6", False),
        (r"\text{Monday}", r"\text{Monday}", True),
    ],
)
def test_answers_mean_the_same(given, gold, same):
    pytest.importorskip("math_verify")
    assert same_answer(given, gold) is same
    assert same_anywhere(f"It follows that it is ${given}$.", gold) is same


def test_without_the_package_its_remedy_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"setup.sh eval\)"):
        require_math_verify()
