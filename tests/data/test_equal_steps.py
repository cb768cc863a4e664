"""A step's gradient does not depend on how its samples are split, nor on what they are packed with."""

from itertools import islice

import pytest
import torch

from families import DISTINCT
from rwkv_peft.checkpoints.base import base_of
from rwkv_peft.config import DataConfig
from rwkv_peft.data.batches import TrainBatches
from rwkv_peft.data.collate import collate
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.data.sources import build_samples


@pytest.fixture
def model(tiny_state):
    state = tiny_state(n_embd=32, vocab_size=40, dim_ffn=48, head_size=8)
    return DISTINCT[0].load(state, base_of(state).config).double()


@pytest.fixture
def data(tmp_path):
    """data(**settings) -> samples over documents of several lengths, some of them masked whole."""
    with ShardWriter(tmp_path / "data") as writer:
        for i in range(16):
            tokens = [1 + (7 * i + 3 * j) % 39 for j in range(2 + 5 * i % 11)]
            writer.add(tokens, [int(i % 4 != 1 and j > 1) for j in range(len(tokens))])
    return lambda **settings: build_samples(DataConfig(path=str(tmp_path / "data"), ctx_len=16, **settings), 40)


def gradient(model, batches):
    """The gradient of the step's loss, the counted tokens' mean, summed over micro batches."""
    model.zero_grad()
    for batch in batches:
        logits, _ = model(batch["tokens"], cu_seqlens=batch.get("cu_seqlens"))
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        (losses * batch["mask"].flatten()).sum().div(max(1, batch["step_count"])).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("dataload", ["pad", "get"])
def test_the_gradient_is_the_same_for_every_split_of_a_step(model, data, dataload):
    samples = data(dataload=dataload, loss_mask="file", micro_bsz=2)

    def of(micro_bsz, world_size, accumulate):
        ranks = [
            TrainBatches(samples, micro_bsz, rank, world_size, accumulate, samples_seen=4) for rank in range(world_size)
        ]
        return gradient(model, [batch for batches in ranks for batch in islice(batches, accumulate)])

    whole = of(4, 1, 1)
    assert whole.abs().max() > 0
    for split in ((1, 1, 4), (2, 1, 2), (2, 2, 1), (1, 2, 2), (1, 4, 1)):
        torch.testing.assert_close(of(*split), whole, rtol=1e-9, atol=1e-12)


def test_a_packed_document_is_computed_as_if_alone(model, data):
    samples = data(dataload="pack")
    row = max((samples[n] for n in range(len(samples))), key=len)
    assert len(row) >= 3
    batch = collate([row])
    packed, _ = model(batch["tokens"], cu_seqlens=batch["cu_seqlens"])
    alone = [model(tokens[None, :-1])[0] for tokens, _ in row]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-9, atol=1e-9)


def test_packing_and_padding_learn_the_same_from_the_same_documents(model, data):
    epochs = (data(dataload=dataload, loss_mask="file") for dataload in ("pack", "pad"))
    packed, padded = (gradient(model, islice(TrainBatches(samples, len(samples)), 1)) for samples in epochs)
    torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-12)
