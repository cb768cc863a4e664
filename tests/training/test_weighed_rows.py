"""Rows that weigh more train as if they stood there more often, by the command that a user types."""

import numpy as np
import pytest
from safetensors.torch import load_file

from rwkv_peft.data.shard_writer import ShardWriter
from training.runs import metrics


def test_a_row_of_weight_two_is_as_if_it_stood_there_twice(files, train):
    rows = [np.arange(1, 12 + 5 * number, dtype="<u2") for number in range(3)]
    for name, places, weights in (("weighed", (0, 1, 2), (0, 1, 2)), ("often", (1, 2, 2), (1, 1, 1))):
        with ShardWriter(files / f"rows-{name}") as writer:
            for place, weight in zip(places, weights):
                writer.add(rows[place], weight=weight)
        data = str(files / f"rows-{name}")
        flags = "--dataload pad --micro_bsz 3 --precision fp32 --epoch_steps 1 --epoch_count 2 --warmup_steps 0".split()
        out, _ = train(name, "--data_file", data, "--val_data", data, *flags)
        assert ("rows weigh 0 to 2; the loss is the mean by weight" in out) == (name == "weighed")
    for mine, theirs in zip(metrics(files, "weighed"), metrics(files, "often")):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)
    expected = load_file(files / "often" / "adapter.safetensors")
    for key, tensor in load_file(files / "weighed" / "adapter.safetensors").items():
        assert (tensor - expected[key]).norm() <= 1e-2 * expected[key].norm(), key
