"""Prompts that are computed once for all of their answers give the losses and gradients of whole documents: every
parameter's, for every generation, with adapters, tuned states and checkpointed blocks."""

import pytest
import torch

from families import DISTINCT
from rwkv_peft.config import AdapterConfig
from rwkv_peft.data.samples import collate
from rwkv_peft.models import family_named
from rwkv_peft.objectives import OBJECTIVES
from rwkv_peft.objectives.answers import OfAnswers
from rwkv_peft.objectives.documents import counted_losses, per_document
from rwkv_peft.training.step.shared_prefix import share_prefixes, tokens_read
from rwkv_peft.training.step.steps import Whole, plain_forward, to_device
from training.test_steps import VOCABULARY, compare, gradients, shaken

EVERY = pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
ADAPTERS = (None, AdapterConfig(rank=8), AdapterConfig(method="lora", rank=4, train_parts=("ln", "time")))
# lengths of the prompt and the answers of each group
SHARED = [[7, 3, 1, 9], [2, 5, 5, 1], [18, 1, 12, 2]]
NOTHING = [[7, 3, 1, 9], [1, 4, 1, 6]]  # the second has no token before those that predict answers


def documents(groups):
    """Documents of prompts and answers, which count, but for one token within."""
    generator = torch.Generator().manual_seed(1)
    for prompt, *answers in groups:
        begin = torch.randint(VOCABULARY, (prompt,), generator=generator)
        for length in answers:
            mask = torch.arange(prompt + length - 1) >= prompt - 1
            mask[prompt : prompt + 1] &= length < 4
            yield torch.cat([begin, torch.randint(VOCABULARY, (length,), generator=generator)]), mask


def batches(groups=SHARED):
    """A batch of whole documents, and the same with prompts that stand there once."""
    batch = collate([list(documents(groups))])
    return batch, batch | to_device(share_prefixes(batch, len(groups[0]) - 1), torch.device("cpu"))


def weighed(model, batch):
    """A number whose gradients are those of every counted token's loss, with a factor each."""
    losses = counted_losses(lambda head: plain_forward(model, batch, head), batch)
    return (losses * torch.linspace(-1, 2, len(losses), dtype=losses.dtype)).sum(), losses.detach()


@EVERY
@pytest.mark.parametrize("groups", [SHARED, NOTHING], ids=["shared", "nothing"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=["all", "bat-in", "lora"])
def test_losses_and_gradients_are_those_of_whole_documents(family, adapter, checkpointed, groups):
    model = shaken(family, adapter=adapter, grad_checkpoint=checkpointed)
    (expected, losses), (found, ours) = (weighed(model, batch) for batch in batches(groups))
    torch.testing.assert_close(ours, losses, rtol=1e-9, atol=1e-12)
    compare(gradients(model, found), gradients(model, expected))


def test_blocks_that_see_tokens_see_those_of_their_document():
    model = shaken(family_named("x070a"), adapter=ADAPTERS[1])
    (expected, _), (found, _) = (weighed(model, batch) for batch in batches())
    compare(gradients(model, found), gradients(model, expected))


@EVERY
@pytest.mark.parametrize("name", [name for name, one in OBJECTIVES.items() if issubclass(one, OfAnswers)])
def test_every_objective_of_answers_has_the_same_loss_and_figures(family, name):
    model, batch = shaken(family, adapter=ADAPTERS[1]), collate([list(documents([[9, 4, 2], [5, 1, 6]]))])
    if name == "kto":
        batch["labels"] = torch.tensor([True, True, False, False])
    whole, once = Whole(OBJECTIVES[name]()), Whole(OBJECTIVES[name](), group=2)
    expected = whole.loss(model, batch, 2.0)
    laid = once.prepare_inputs(batch, torch.device("cpu"))
    assert tokens_read(laid) == tokens_read(batch) - 8 - 4
    found = once.loss(model, laid, 2.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(dict(once.measures), dict(whole.measures), rtol=1e-9, atol=0)
    compare(gradients(model, found), gradients(model, expected))
    torch.testing.assert_close(once.total(model, laid), whole.total(model, batch), rtol=1e-9, atol=0)


def test_documents_are_cut_where_they_differ_or_begin_to_count():
    tokens = torch.arange(10)
    other = tokens.clone()
    other[4:] += 1
    for count, expected in ((2, 2), (3, 3), (4, 4), (7, 4)):  # what counts first, what is shared
        mask = torch.arange(9) >= count
        batch = collate([[(tokens, mask), (other, mask)]])
        laid = share_prefixes(batch, 2)
        assert laid["shared"].tolist() == [list(range(expected))] and laid["shared_seqlens"].tolist() == [0, expected]
        assert laid["cu_seqlens"].tolist() == [0, 9 - expected, 18 - 2 * expected] and laid["owner"].tolist() == [0, 0]
        targets = [one["targets"].flatten()[one["counted"]].tolist() for one in (batch, laid)]
        assert targets[0] == targets[1]
        assert per_document(laid, torch.ones_like(laid["counted"])).tolist() == [9 - count, 9 - count]


@EVERY
def test_a_step_reads_no_value(family):
    """On the meta device, which has no values; on a GPU, reading one would wait."""
    step, batch, meta = Whole(OBJECTIVES["dpo"](), group=2), collate([list(documents([[9, 4, 2], [5, 1, 6]]))]), "meta"
    model = shaken(family, torch.float32, ADAPTERS[1]).to(meta)
    laid = step.prepare_inputs(batch, torch.device(meta))
    assert all(grad.is_meta for grad in gradients(model, step.loss(model, laid, 2.0)).values())
