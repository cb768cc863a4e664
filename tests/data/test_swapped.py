"""Each held-out answer is read behind its own prompt, and behind that of a row with another answer."""

import json

from rwkv_peft.config import DataConfig
from rwkv_peft.data.sources import build_samples
from rwkv_peft.data.swapped import swapped
from rwkv_peft.data.tokenizer import load_tokenizer


def samples_of(folder, rows, **settings):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"data_type": "sft", "dataload": "pad", "loss_mask": "file", "ctx_len": 64, "seed": None} | settings
    return build_samples(DataConfig(path=str(path), tokenizer="bytes", **config), 257)


def asked(answers):
    return [{"query": f"{number}?", "response": answer} for number, answer in enumerate(answers)]


def test_an_answer_goes_behind_the_next_prompt_that_has_another(tmp_path):
    decode = load_tokenizer("bytes").decode
    found = swapped(samples_of(tmp_path, asked(["yes", "yes", "no"])))
    texts = [[decode(one[0][0][:-1].tolist()) for one in pair] for pair in found]
    laid_out = "User: {}?\n\nAssistant: {}".format
    due = (((0, "yes"), (2, "yes")), ((1, "yes"), (2, "yes")), ((2, "no"), (0, "no")))
    assert texts == [[laid_out(*one) for one in pair] for pair in due]
    for own, other in found:  # the same tokens count
        counted = [one[0][0][1:][one[0][1]].tolist() for one in (own, other)]
        assert counted[0] == counted[1] and own.count(0) == other.count(0) == len(counted[0])


def test_equal_answers_packed_rows_and_texts_tell_nothing(tmp_path):
    assert swapped(samples_of(tmp_path, asked(["yes"] * 3))) == []
    assert swapped(samples_of(tmp_path, asked(["yes", "no"]), dataload="pack")) == []
    assert swapped(samples_of(tmp_path, [{"text": f"text {n}"} for n in range(3)], loss_mask="none")) == []
