"""The marker that opens an answer is read from the data itself, whatever its layout."""

import pytest

from rwkv_peft.data.recorded import recorded_of_data
from rwkv_peft.data.report import opening_of

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
