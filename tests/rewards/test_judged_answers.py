"""A number is read the same however it is written, and only from the places that the measure allows; formulas are found
in an answer, and compared."""

from fractions import Fraction

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.rewards.judges import Formula, Number
from rwkv_peft.rewards.numbers import (
    final_answer,
    flexible_number,
    numbers_in,
    same_answer,
    same_anywhere,
    strict_number,
)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        {"query": "2+2?", "response": "2+2 is 4.\n#### 4\nThe answer is: 4"},
        {"question": "2+2?", "answer": "4"},
    ],
)
def test_gsm8k_rows(row):
    strict, flexible = Number(), Number("flexible")
    assert strict.due(row) == flexible.due(row) == "4"
    for text, strictly, flexibly in (
        ("#### 4.0", True, True),
        ("It is 4", False, True),
        ("#### 4, not 5", True, False),
        ("no", False, False),
    ):
        assert (strict.right(text, "4"), flexible.right(text, "4")) == (strictly, flexibly)


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "x?", "solution": r"so $\boxed{\frac12}$"},
        {"problem": "x?", "solution": "long", "answer": r"\frac12"},
        {"query": "x?", "response": r"The answer is: \frac12"},
    ],
)
def test_math_rows(row):
    pytest.importorskip("math_verify")
    strict, flexible = Formula(), Formula("flexible")
    assert strict.due(row) == flexible.due(row) == r"\frac12"
    for text, strictly, flexibly in (
        (r"\boxed{0.5}", True, True),
        ("so it is $0.5$", False, True),
        (r"\boxed{2}", False, False),
    ):
        assert (strict.right(text, r"\frac12"), flexible.right(text, r"\frac12")) == (strictly, flexibly)


@pytest.mark.parametrize(
    "reward, row, message",
    [
        (Number, {"question": "q", "answer": "3 or 4"}, "no number after ####"),
        (Number, {"question": "q"}, "one of answer, response, solution is due"),
        (Formula, {"problem": "q", "solution": "5"}, "has no .boxed{answer}"),
    ],
)
def test_rows_without_an_answer_are_refused(reward, row, message):
    if reward is Formula:
        pytest.importorskip("math_verify")
    with pytest.raises(UserError, match=message):
        reward().check(row)


@pytest.mark.parametrize(
    "text, value",
    [
        ("7", 7),
        ("1,234", 1234),
        ("12,345,678.5", Fraction(24691357, 2)),
        ("$5.00", 5),
        (r"\$5", 5),
        ("-7 apples", -7),
        ("\u22127", -7),
        ("-$3.50", Fraction(-7, 2)),
        ("$-3.50", Fraction(-7, 2)),
        ("50%", 50),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"$\dfrac{-3}{4}$", Fraction(-3, 4)),
        (".5", Fraction(1, 2)),
        ("72.", 72),
        ("**72**", 72),
    ],
)
@pytest.mark.parametrize("around", ["{}", "#### {}", "The answer is: {}", "so she has {} left.\n#### {}\n"])
def test_forms_of_a_number(text, value, around):
    whole = around.format(*[text] * around.count("{}"))
    assert flexible_number(whole) == value
    assert strict_number(whole) == (None if "answer" not in whole and "####" not in whole else value)


@pytest.mark.parametrize(
    "text, values",
    [
        ("48/2 = <<48/2=24>>24 clips", [24, 24, 24, 24]),
        ("3, 4 and 1,23", [3, 4, 1, 23]),
        ("5-3=2", [5, 3, 2]),
        ("14 - 6 = 8", [14, 6, 8]),  # a minus
        ("She has:\n- 72 apples\n\u2212 3 pears", [72, 3]),  # a list
        ("1/0 or 2", [2]),
        ("none", []),
    ],
)
def test_several_numbers(text, values):
    assert numbers_in(text) == values


def test_strict_is_the_last_marker_and_flexible_the_last_number():
    text = "2 + 2 = 4\n#### 4\nThe answer is: 5\n\nThat was 6 words."
    assert (strict_number(text), flexible_number(text)) == (5, 6)
    assert strict_number("The answer is: unknown\n7") is None


@pytest.mark.parametrize("text", ["9" * 5000, "-1," + "000," * 3000 + "000", "0." + "3" * 5000, "1/" + "7" * 5000])
def test_a_number_without_end_is_one_that_no_answer_is(text):
    """A model that repeats a digit for ever is wrong, and does not end the judging."""
    for judge in (Number(), Number("flexible")):
        for answer in (f"#### {text}", f"5 + 3 = 8, which is {text}", f"\\frac{{{text}}}{{{text}}}"):
            assert not judge.right(answer, "8")
        assert judge.right("The answer is 8." + "0" * 5000, "8")


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
