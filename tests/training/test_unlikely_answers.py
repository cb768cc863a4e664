"""A run on pairs of answers says at its end if it made the chosen ones unlikely."""

import numpy as np
import pytest

from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.measuring.learned import unlikely_answers
from training.runs import ROOT


def config(data_type, *more):
    """The settings of a run on rows, which nobody reads here."""
    base, data = str(ROOT / "demo" / "rwkv6-demo.pth"), f"{data_type}.jsonl"
    rows = ("--data_file", data, "--data_type", data_type, "--tokenizer", "bytes")
    return parse_run(["--load_model", base, *rows, "--ctx_len", "32", "--bone_r", "16", *more]).config


@pytest.mark.parametrize(
    "objective, name, way, harmed",
    [
        ("dpo", "chosen", (0.0, 0.3), False),
        ("dpo", "chosen", (0.1, -0.4), True),
        ("simpo", "nll", (0.2, 0.6), True),
        ("orpo", "nll", (0.2, 0.1), False),
    ],
)
def test_pairs_whose_chosen_answers_become_unlikely_are_told(objective, name, way, harmed):
    records = [{"step": n, name: value} for n, value in enumerate(np.linspace(*way, 40))]
    note = unlikely_answers(config("pairs", "--objective", objective), records)
    assert bool(note) == harmed and ("--dpo_nll 1" in note) == harmed
    assert unlikely_answers(config("sft"), [{"step": 0, "chosen": -1.0}] * 40) == ""
