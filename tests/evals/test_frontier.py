"""How far a change is scaled back to what may be lost, by the commands that a user types, on the bundled RWKV-7."""

import json
import re
import sys

import pytest
import torch

from release.merges import ROOT, adapter_of
from rwkv_peft.checkpoints.adapter_file import save_adapter
from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig
from rwkv_peft.data.sources import build_samples
from rwkv_peft.evals.frontier import HALVINGS, KEPT, Likelihood, Point, answers_in, frontier, likelihood
from rwkv_peft.inference.loading import load_model

sys.path.insert(0, str(ROOT / "demo"))
from task import documents  # noqa: E402

BASE = ROOT / "demo" / "rwkv7-demo.pth"


@pytest.fixture(scope="module")
def keep(tmp_path_factory):
    """A file of 12 questions that the base answers."""
    path = tmp_path_factory.mktemp("keep") / "keep.jsonl"
    texts = [each["text"].partition("A:") for each in documents("base", 12, 1)]
    path.write_text("".join(f"{json.dumps({'prompt': a + b, 'completion': c})}\n" for a, b, c in texts if c))
    return path


@pytest.mark.parametrize("holds", [0.01, 0.3, 0.6875, 0.99, 1.0])
def test_the_largest_scale_that_holds_is_found(holds):
    points, best = frontier(lambda scale: Point(scale, {KEPT: Likelihood(scale, 1.0)}), holds)
    assert best.scale <= holds < best.scale + 0.25 / 2**HALVINGS or best.scale == holds == 1
    assert [point.scale for point in points] == sorted({point.scale for point in points})


FULL = ("--output_dtype", "fp32")


def adapters_in(folder):
    """Random adapters of two methods, whose whole change breaks the base."""
    base = open_base(BASE).tensors
    for seed, variant in enumerate(("bone", "lora")):
        save_adapter(folder / f"{variant}.safetensors", *adapter_of(variant, base, seed=seed))
    return [folder / "bone.safetensors", folder / "lora.safetensors=0.5"]


def merge(folder, *words):
    words = ["merge", "--base_model", BASE, "--output", folder / "m.pth", *words]
    return commands.main([str(word) for word in words])


def test_a_merge_loses_no_more_of_the_kept_rows_than_allowed(tmp_path, keep, capsys):
    files = adapters_in(tmp_path)
    most = 0.05
    assert merge(tmp_path, "--bone_checkpoint", *files, "--forget_at_most", most, "--keep", keep, *FULL) == 0
    out = capsys.readouterr().out
    table = {float(scale): float(nats) for scale, nats in re.findall(r"^([\d.]+) +([\d.]+) +\d+%", out, re.M)}
    scale = float(re.search(r"^scale +([\d.]+), the largest that loses at most 0.05 nats a token", out, re.M)[1])
    assert 0 < scale < 1 and table[1] > table[0] + most and f"bone.safetensors={scale:g} " in out

    ways = {"data_type": "sft", "tokenizer": "bytes", "loss_mask": "file", "dataload": "pad"}
    samples = build_samples(DataConfig(str(keep), **ways), 257)

    def nats(path):
        model, start = load_model(path)
        return likelihood(model, start, answers_in(samples)).nats

    printed = table[min(table, key=lambda at: abs(at - scale))]  # whose scales have four digits
    assert nats(tmp_path / "m.pth") - nats(BASE) <= most + 1e-4
    assert nats(tmp_path / "m.pth") == pytest.approx(printed, abs=1e-3)
    again = [f"{tmp_path}/bone.safetensors={scale}", f"{tmp_path}/lora.safetensors={scale / 2}"]
    merged = open_base(tmp_path / "m.pth").tensors
    assert merge(tmp_path, "--bone_checkpoint", *again, *FULL) == 0  # by FILE=SCALE
    assert all(torch.equal(tensor, merged[key]) for key, tensor in open_base(tmp_path / "m.pth").tensors.items())


def test_a_merge_of_which_each_part_loses_too_much_writes_nothing(tmp_path, keep, capsys):
    files = adapters_in(tmp_path)
    assert merge(tmp_path, "--bone_checkpoint", *files, "--forget_at_most", 0, "--keep", keep) == 1
    assert "nothing is written: each part of the change loses more" in capsys.readouterr().out
    assert not (tmp_path / "m.pth").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--forget_at_most", 1, "--keep", "none.jsonl"], "--keep none.jsonl: no such file"),
        (["--forget_at_most", -1, "--keep", "none.jsonl"], "--forget_at_most: -1 is negative"),
        (["--forget_at_most", 1, "--keep", "{}/empty.jsonl"], "empty.jsonl"),
        (["--forget_at_most", 1, "--keep", "{}/m.pth"], "must not be overwritten"),
    ],
)
def test_rows_to_keep_that_cannot_be_measured_are_refused(tmp_path, words, message):
    files = adapters_in(tmp_path)
    for name in ("empty.jsonl", "m.pth"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        merge(tmp_path, "--bone_checkpoint", *files, *(str(word).format(tmp_path) for word in words))
