"""A number is read the same however it is written, and only from the places that the measure allows."""

from fractions import Fraction

import pytest

from rwkv_peft.evals.numbers import flexible_number, numbers_in, strict_number


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
    """A model that repeats a digit for ever is wrong, and does not end the evaluation."""
    from rwkv_peft.evals.written import Gsm8k

    task = Gsm8k()
    problem = task.problem({"question": "How many?", "answer": "#### 8"}, "{question}")
    for answer in (f"#### {text}", f"5 + 3 = 8, which is {text}", f"\\frac{{{text}}}{{{text}}}"):
        assert task.judge(answer, problem) == {"strict": False, "flexible": False}
    assert task.judge("The answer is 8." + "0" * 5000, problem) == {"strict": True, "flexible": True}
