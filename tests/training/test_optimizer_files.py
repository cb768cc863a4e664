"""The optimizer's state by parameter: what some ranks and a stage wrote, others read to the bit; and files that
lack or change something."""

import json

import pytest
import torch

from rwkv_peft.checkpoints.tensors import read_safetensors, save_safetensors
from rwkv_peft.cli.errors import UserError
from rwkv_peft.training.saving.optimizer_state import KINDS, METADATA_KEY, Fragment, SavedOptimizer, write_pieces

SIZES = {"blocks.0.att.key.bone": 37, "blocks.0.ln1.weight": 5, "emb.weight": 64, "one": 1}


def whole():
    """The whole state of a model of SIZES: {(kind, name): float32 (size,)}."""
    generator = torch.Generator().manual_seed(0)
    return {(kind, name): torch.randn(size, generator=generator) for name, size in SIZES.items() for kind in KINDS}


def ranges(stage, rank, ranks):
    """{name: (start, end)} of a rank as ZeRO cuts: all parameters together, or in stage 3 each."""
    if stage == 3:
        lengths = {name: -(-size // ranks) for name, size in SIZES.items()}
        return {name: (rank * n, min((rank + 1) * n, SIZES[name])) for name, n in lengths.items()}
    share, place, found = -(-sum(SIZES.values()) // ranks), 0, {}
    for name, size in SIZES.items():
        found[name] = max(rank * share - place, 0), min((rank + 1) * share - place, size)
        place += size
    return found


def pieces(stage, rank, ranks, state):
    return [
        Fragment(name, SIZES[name], start, {kind: state[kind, name][start:end] for kind in KINDS})
        for name, (start, end) in ranges(stage, rank, ranks).items()
        if start < end
    ]


def written(folder, stage, ranks):
    folder.mkdir()
    for rank in range(ranks):
        write_pieces(folder, rank, pieces(stage, rank, ranks, whole()), steps=7)
    return folder


@pytest.mark.parametrize("stage, ranks", [(1, 1), (1, 2), (2, 4), (3, 1), (3, 2), (3, 4), (1, 64)])
def test_any_ranks_and_stage_read_what_others_wrote(tmp_path, stage, ranks):
    saved = SavedOptimizer(written(tmp_path / "checkpoint", stage, ranks))
    assert saved.steps == 7
    for other, count in ((1, 1), (2, 3), (3, 1), (3, 5)):
        found = {place: torch.full_like(tensor, torch.nan) for place, tensor in whole().items()}
        for rank in range(count):
            for piece in pieces(other, rank, count, found):
                saved.fill(piece)
        assert all(torch.equal(tensor, found[place]) for place, tensor in whole().items())


def lacking(tensors, told):
    del tensors[next(key for key in tensors if key.startswith("exp_avg:0:emb"))]


def cut(tensors, told):
    tensors["master:0:emb.weight"] = tensors["master:0:emb.weight"][:-1].clone()


def torn(tensors, told):
    tensors["exp_avg:9:emb.weight"] = tensors.pop("exp_avg:0:emb.weight")[9:].clone()


EDITS = [
    (lacking, "exp_avg of emb.weight lacks element 0"),
    (cut, "master of emb.weight lacks element 63"),
    (torn, "exp_avg of emb.weight lacks element 0"),
    (lambda tensors, told: tensors.update(x=torch.zeros(1)), "not enough values to unpack"),
    (lambda tensors, told: told.pop("steps"), "steps"),
    (lambda tensors, told: told.update(format_version=2), "its format is 2, and 1 is read here"),
]


@pytest.mark.parametrize("edit, words", EDITS, ids=["lacking", "cut", "torn", "odd", "uncounted", "later"])
def test_what_is_missing_or_changed_is_told(tmp_path, edit, words):
    path = written(tmp_path / "checkpoint", 1, 1) / "optimizer" / "rank-00000.safetensors"
    tensors, header = read_safetensors(path)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    told = json.loads(header[METADATA_KEY])
    edit(tensors, told)
    save_safetensors(path, tensors, {METADATA_KEY: json.dumps(told)})
    with pytest.raises(UserError, match=f"does not hold the optimizer's state of this run: .*{words}.*--fresh_"):
        saved = SavedOptimizer(tmp_path / "checkpoint")
        for piece in pieces(1, 0, 1, whole()):
            saved.fill(piece)
