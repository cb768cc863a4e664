"""LoRA-GA starts from the gradient on samples that the loss counts."""

import torch

from rwkv_peft.adapters.layer import AdapterLinear
from rwkv_peft.checkpoints.base import base_of
from rwkv_peft.config import AdapterConfig, DataConfig
from rwkv_peft.data.batches import TrainBatches
from rwkv_peft.data.sources import build_samples
from rwkv_peft.data.token_file_writer import TokenFileWriter
from rwkv_peft.training.model import adapt, estimate_gradients

MARKER = 79
BARE, ANSWERED, LONGER = [1, 2, 3, 4, 5], [6, 7, MARKER, 8, 9, 10], [11, MARKER, 12, 13, 14, 15]


def factors(state, folder, documents, rows=1):
    with TokenFileWriter(folder / "data", vocab_size=80) as writer:
        for document in documents:
            writer.add(document)
    settings = DataConfig(str(folder / "data"), dataload="pad", loss_mask="qa", mask_id=(MARKER,), seed=None)
    base = base_of(state)
    model = base.family.load(base.tensors, base.config, False)
    batches = TrainBatches(build_samples(settings, 80), rows)
    names = layers(model)

    def gradients():
        return estimate_gradients(model, names, batches.first_counted())

    adapt(model, AdapterConfig(method="lora-ga", rank=2), names, base.family, base, gradients)
    return [module.init_lora_A for module in model.modules() if isinstance(module, AdapterLinear)]


def layers(model):
    return tuple(f"blocks.{n}.att.{name}" for n in range(len(model.blocks)) for name in ("key", "value"))


def test_samples_before_the_first_that_counts_change_nothing(tiny_state, tmp_path):
    alone, behind, other = (
        factors(tiny_state(), tmp_path, documents)
        for documents in ([ANSWERED], [BARE, BARE, ANSWERED, LONGER], [LONGER])
    )
    assert all(map(torch.equal, alone, behind)) and not any(map(torch.equal, alone, other))


def test_a_batch_of_which_a_row_counts_is_taken_as_it_is(tiny_state, tmp_path):
    both, first = (factors(tiny_state(), tmp_path, rows, 2) for rows in ([ANSWERED, LONGER], [ANSWERED, BARE]))
    assert not any(map(torch.equal, both, first))
