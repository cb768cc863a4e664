"""What is told of the answers before and after training."""

from types import SimpleNamespace

from rwkv_peft.training.measuring.before_after import BeforeAfter, agreement, quoted, unended


def test_an_answer_is_right_by_its_words_and_its_end():
    due = {"text": " 3!", "end": "end"}
    records = [
        {"answer": due, "before": {"text": "4", "end": "end"}, "after": {"text": "3!", "end": "end"}},
        {"answer": due, "before": {"text": "4", "end": "length"}, "after": {"text": "3!", "end": "length"}},
    ]
    told = "1 answered word for word (0 before training), 1 end like the row's answer (1 before)"
    assert agreement(records) == told
    long = {"text": "3 and so on", "end": "length"}
    told = "1 answered word for word (0 before training), 1 is longer than the 64 tokens that are compared"
    assert agreement([{"answer": long, "before": due, "after": long}]) == told
    for before, known in (({"text": " 3!", "end": "end"}, True), ({"text": " 4", "end": "end"}, False), (None, False)):
        rows = SimpleNamespace(records=[{"answer": due, "before": due}, {"answer": due, "before": before}])
        assert BeforeAfter.known.fget(rows) is known


def test_answers_that_never_end_are_told_from_those_that_do():
    endless, ended = ({"answer": {"end": "end"}, "after": {"end": end}} for end in ("length", "end"))
    longer = {"answer": {"end": "length"}, "after": {"end": "length"}}
    assert not unended([longer]) and unended([longer, endless]) and unended([endless, endless])
    assert not unended([endless, ended]) and not unended([{"answer": {"end": "end"}}])


def test_a_terminal_finds_nothing_to_obey_in_an_answer():
    assert quoted({"text": " a\n\x1b[2Jb ü", "end": "end"}) == "a\\n\\x1b[2Jb ü"
    assert quoted({"text": "a", "end": "length"}) == "a…"
    assert quoted({"text": "b" * 200, "end": "end"}) == "b" * 100 + "…"
