"""Rows in segments have the gradients of whole rows: every parameter's, for every generation, with adapters, tuned
states, packing and masks."""

import pytest
import torch

import families
from families import DISTINCT
from rwkv_peft.adapters.inject import inject
from rwkv_peft.cli.names import STATE_PARTS
from rwkv_peft.config import AdapterConfig
from rwkv_peft.data.samples import collate, positions
from rwkv_peft.models.layout import is_time_state
from rwkv_peft.objectives.next_token import NextToken
from rwkv_peft.training.step import segments
from rwkv_peft.training.step.segments import Segments, filler, forward, segments_of
from rwkv_peft.training.step.steps import Whole

pytestmark = pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
VOCABULARY = 30


def shaken(family, dtype=torch.float64, adapter=None, grad_checkpoint=False):
    """A model without zeros in its tensors, with tuned states; all of it trains, or an adapter and the states."""
    model = families.shaken(family, grad_checkpoint=grad_checkpoint)
    model.tune_states(parts=STATE_PARTS)
    if adapter is not None:
        inject(model, adapter, family=family)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or is_time_state(name))
    return families.shake(model).to(dtype)


def a_batch(packed, T=23):
    """A batch of three documents of up to T tokens, some of which count, but none at the end."""
    generator = torch.Generator().manual_seed(1)
    sizes = (T // 2, 1, T - T // 2 - 1) if packed else (T, T - 4, 1)
    documents = []
    for size in sizes:
        mask = torch.rand(size, generator=generator) < 0.5
        documents.append((torch.randint(VOCABULARY, (size + 1,), generator=generator), mask))
    documents[-1][1][-3:] = False
    return collate([documents] if packed else documents)


def count(batch, mask):
    """Let the targets of a mask count."""
    batch.update(mask=mask, counted=positions(mask))


def gradients(model, loss):
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, [parameter for _, parameter in trained], allow_unused=True)
    nothing = torch.zeros((), device=loss.device)
    return {name: nothing if grad is None else grad for (name, _), grad in zip(trained, found)}


def compare(found, expected, rtol=1e-9):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= rtol * grad.norm() + 1e-13, name


ADAPTERS = (None, AdapterConfig(rank=8), AdapterConfig(method="lora", rank=4, train_parts=("ln", "time")))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length, adapter", [(1, ADAPTERS[1]), (4, None), (7, ADAPTERS[2]), (22, None), (99, None)])
def test_gradients_are_those_of_whole_rows(family, packed, length, adapter):
    """Also if targets have weights, as in those of four positions."""
    model, batch = shaken(family, adapter=adapter, grad_checkpoint=length == 7), a_batch(packed)
    if length == 4:
        batch["weights"] = torch.rand(batch["mask"].shape, generator=torch.Generator().manual_seed(2)) * batch["mask"]
    expected = Whole().loss(model, batch, 5.0)
    loss = Segments(length).loss(model, batch, 5.0)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-10, atol=0, check_dtype=False)
    compare(gradients(model, 3 * loss), gradients(model, 3 * expected))
    torch.testing.assert_close(Segments(length).total(model, batch), Whole().total(model, batch), check_dtype=False)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("step", [Whole(), Segments(4)], ids=["whole", "segments"])
def test_a_step_reads_no_value_before_the_end_of_backward(family, packed, step):
    """On the meta device, which has no values; on a GPU, reading one would wait."""
    model, batch, meta = shaken(family, torch.float32, AdapterConfig(rank=8)).to("meta"), a_batch(packed), "meta"
    batch = step.prepare_inputs(batch, torch.device(meta))
    found = gradients(model, step.loss(model, batch, 5.0))
    assert all(grad.is_meta for grad in found.values())


def in_order(model, batch, length, seeds):
    """The loss of a batch segment by segment, in one graph."""
    total, state = 0.0, None
    for number, segment in enumerate(segments_of(batch, length)):
        torch.manual_seed(seeds[number])
        head = NextToken().head(segment.targets, segment.counted, 5.0)
        loss, after = forward(model, segment, state if segment.carries else None, head)
        total, state = total + loss, segment.state_after(after)
    return total


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_is_drawn_alike_in_both_passes(family, packed):
    model = shaken(family, adapter=AdapterConfig(method="lora", rank=4, dropout=0.4)).train()
    batch = a_batch(packed)
    torch.manual_seed(7)
    seeds = torch.randint(2**62, (len(segments_of(batch, 4)),)).tolist()
    expected = gradients(model, in_order(model, batch, 4, seeds))
    torch.manual_seed(7)
    compare(gradients(model, Segments(4).loss(model, batch, 5.0)), expected)


def test_kernels_lose_no_more_than_in_whole_rows(family):
    batch = a_batch(False, T=130)
    exact = gradients(model := shaken(family), Whole().loss(model, batch, 5.0))
    low = shaken(family, torch.float32)
    whole, found = (gradients(low, step.loss(low, batch, 5.0)) for step in (Whole(), Segments(33)))
    for name, grad in exact.items():
        error = (whole[name].double() - grad).norm()
        assert (found[name].double() - grad).norm() <= 3 * error + 1e-6 * grad.norm(), name


class Noted(torch.autograd.Function):
    """Returns a tensor unchanged, and calls `note` in its backward."""

    @staticmethod
    def forward(ctx, tensor, note):
        ctx.note = note
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        ctx.note()
        return grad, None


def noted(value, note):
    """A module's arguments or results, with Noted applied to the tensors that require a gradient."""
    if isinstance(value, tuple):
        parts = [noted(part, note) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return Noted.apply(value, note) if isinstance(value, torch.Tensor) and value.requires_grad else value


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tuned", [False, True])
def test_autograd_enters_the_same_modules_whatever_a_segment_holds(family, packed, tuned, monkeypatch):
    """The first, one that continues a row, one that begins a row, the last, and a filler: under ZeRO-3 each rank
    gathers a module's parameters when autograd comes to it."""
    model, batch, seen = shaken(family, adapter=AdapterConfig(rank=8)), a_batch(packed), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *call, name=name: noted(call[-1], lambda: seen[-1].append(name)))
    for block in model.blocks:
        block.att.time_state.requires_grad_(tuned)
    go_back = segments.go_back
    monkeypatch.setattr(segments, "go_back", lambda *given: seen.append([]) or go_back(*given))
    parts = segments_of(batch, 6)
    monkeypatch.setattr(Segments, "segments", lambda *_: [*parts, filler(parts[0]), filler(parts[0])])
    Segments(6).loss(model, batch, 5.0)
    assert len(seen) == len(parts) + 2 >= 5 and {"head", "blocks.0.att.key", "blocks.1.ffn.value"} <= set(seen[0])
    assert all(order == seen[0] for order in seen)


def test_segments_behind_the_last_counted_target_are_not_computed(family, monkeypatch):
    model, batch, seen = shaken(family), a_batch(False), []
    count(batch, batch["mask"] & (torch.arange(batch["mask"].shape[1]) < 6))
    expected = gradients(model, Whole().loss(model, batch, 5.0))
    go_back = segments.go_back
    monkeypatch.setattr(segments, "go_back", lambda *given: seen.append(1) or go_back(*given))
    compare(gradients(model, Segments(3).loss(model, batch, 5.0)), expected)
    assert len(seen) == 2
    count(batch, torch.zeros_like(batch["mask"]))
    assert all((grad == 0).all() for grad in gradients(model, Segments(3).loss(model, batch, 1.0)).values())
