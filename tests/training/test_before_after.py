"""How answers to rows before and after training are compared and shown."""

from itertools import product
from types import SimpleNamespace

from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.evals.exam import Row, RowsExam
from rwkv_peft.tools.study.flags import parse_flags
from rwkv_peft.training.flags.request import parse_flags as parse_train_flags
from rwkv_peft.training.measuring.before_after import BeforeAfter, agreement, quoted, unended


def test_an_answer_is_right_by_its_words_and_its_end():
    due = {"text": " 3!", "end": "end"}
    records = [
        {"answer": due, "before": {"text": "4", "end": "end"}, "after": {"text": "3!", "end": "end"}},
        {"answer": due, "before": {"text": "4", "end": "length"}, "after": {"text": "3!", "end": "length"}},
    ]
    told = "1 answered word for word (0 before training), 1 stop as the row does (1 before)"
    assert agreement(records) == told
    long = {"text": "3 and so on", "end": "length"}
    told = "1 answered word for word (0 before training), 1 is longer than the 64 tokens that are compared"
    assert agreement([{"answer": long, "before": due, "after": long}]) == told
    for before, known in (({"text": " 3!", "end": "end"}, True), ({"text": " 4", "end": "end"}, False), (None, False)):
        rows = SimpleNamespace(records=[{"answer": due, "before": due}, {"answer": due, "before": before}])
        assert BeforeAfter.known.fget(rows) is known


def test_an_answer_stops_with_its_document_or_at_the_next_turn():
    ends = [{"text": "3", "end": end} for end in ("end", "stop", "length")]
    for due, given in product(ends[:2], ends):
        told = "{0} answered word for word (0 before training), {0} stop as the row does (0 before)"
        assert agreement([{"answer": due, "before": ends[2], "after": given}]) == told.format(int(given != ends[2]))


def test_texts_that_end_an_answer_end_those_of_rows(tmp_path):
    """As study's --stop does, for layouts that are no chat."""
    bytes_ = load_tokenizer("bytes")
    row = Row("training", tuple(bytes_.encode("Q: a\nA:")), (*bytes_.encode(" 3\n"), 0))
    for stops, due in (((), {"text": " 3\n", "end": "end"}), (("\n",), {"text": " 3", "end": "stop"})):
        exam = RowsExam([row], bytes_, 1, stops)
        assert exam.answer(0) == due and exam.stops == [stops]
    flags = parse_flags(["t.txt", "--load_model", "b.pth", "--output", str(tmp_path), "--stop", r"\n", "END"])
    assert parse_train_flags(flags.words).train.eval_stop == (r"\n", "END")


def test_answers_that_never_end_are_told_from_those_that_do():
    endless, ended = ({"answer": {"end": "end"}, "after": {"end": end}} for end in ("length", "end"))
    longer = {"answer": {"end": "length"}, "after": {"end": "length"}}
    assert not unended([longer]) and unended([longer, endless]) and unended([endless, endless])
    assert not unended([endless, ended]) and not unended([{"answer": {"end": "end"}}])


def test_a_terminal_finds_nothing_to_obey_in_an_answer():
    assert quoted({"text": " a\n\x1b[2Jb ü", "end": "end"}) == "a\\n\\x1b[2Jb ü"
    assert quoted({"text": "a", "end": "length"}) == "a…"
    assert quoted({"text": "b" * 200, "end": "end"}) == "b" * 100 + "…"
