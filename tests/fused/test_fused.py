"""The law of fused/: a fused block computes the same as the plain one, forward and every gradient, for every entry of
its table and every method; and `fuse` chooses the right blocks and says so."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fused.shims import GPU, model_of, on_shims, states_of, step
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.collate import collate
from rwkv_peft.fused import Setting, fuse
from rwkv_peft.fused.feed_forward import chained, layer_by_layer
from rwkv_peft.fused.fuse import CHAIN, TABLE
from rwkv_peft.models import FAMILIES
from rwkv_peft.objectives.documents import counted_losses
from rwkv_peft.objectives.dpo import DPO
from rwkv_peft.objectives.next_token import NextToken
from rwkv_peft.training.step.forked import forked
from rwkv_peft.training.step.graphs import Blocks
from rwkv_peft.training.step.steps import straight

CHAINED = ("bat-in", "bat-in-scaled")
TOKENS = torch.arange(26) * 7 % 40
FUSED = [family for family in FAMILIES if type(family.build(family.new_dimensions(1, 64, 40)).blocks[0]) in TABLE]
per_family = pytest.mark.parametrize("family", FUSED, ids=lambda family: family.name)


def both(model, monkeypatch, tokens, bounds=None, sequences=0, step=step):
    """The results of a step on the fused model, on the plain one, and on the plain one in float64."""
    fused, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    assert fuse(fused, GPU).startswith("2 of 2 blocks: ")

    def results(model):
        return step(model, tokens, bounds, states_of(model, sequences) if sequences else None)

    plain, true = results(model), results(exact)
    launched = on_shims(monkeypatch)
    found = results(fused)
    assert "norm_lerp_forward" in launched
    return found, plain, true


def assert_as_near(found, plain, true):
    """Assert that fused results are on average as near to float64 as the plain ones, and each about as near."""
    errors = [
        [(x.double() - exact).norm() / exact.norm() for x, exact in zip(results, true, strict=True)]
        for results in (found, plain)
    ]
    mine, theirs = (torch.stack(each) for each in errors)
    assert mine.mean() <= 1.6 * theirs.mean() + 1e-3
    assert (mine <= 4 * theirs + 0.01).all()


def test_every_entry_is_a_generations():
    assert len(FUSED) == len(TABLE) == 2


@per_family
@pytest.mark.parametrize("method", ("frozen", *METHODS))
def test_a_fused_step_is_the_plain_one(family, method, monkeypatch):
    assert_as_near(*both(model_of(family, method), monkeypatch, TOKENS.view(2, 13)))


@per_family
@pytest.mark.parametrize("lengths", [(26,), (3, 1, 22), (17, 9)])
@pytest.mark.parametrize("begun", (False, True), ids=("zeros", "states"))
def test_packed_sequences_and_states(family, lengths, begun, monkeypatch):
    """With gradients of the states that sequences begin with, and through those that they end with, too."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    model = model_of(family, "bat-in")
    assert_as_near(*both(model, monkeypatch, TOKENS[None], bounds, len(lengths) if begun else 0))


def of_answers(model, tokens, bounds, state):
    """The losses of packed documents that share what they begin with, and the gradients of the parameters."""
    batch = collate([[(document, torch.arange(len(document) - 1) >= 4) for document in tokens[0].split(bounds)]])
    batch |= forked(batch, 2)
    losses = counted_losses(lambda head: straight(model, batch, head), batch)
    model.zero_grad()
    losses.square().sum().backward()
    return [losses, *(x.grad for x in model.parameters() if x.grad is not None)]


@per_family
def test_a_pass_that_only_the_state_is_wanted_of(family, monkeypatch):
    """As over a prompt that several answers go on from."""
    tokens = torch.cat([TOKENS[:5], TOKENS[7:12], TOKENS[:5], TOKENS[12:21]])[None]
    assert_as_near(*both(model_of(family, "bat-in"), monkeypatch, tokens, (10, 14), step=of_answers))


@per_family
@pytest.mark.parametrize("tokens", (1, 2, 16))
def test_rows_of_any_length_with_states(family, tokens, monkeypatch):
    assert_as_near(*both(model_of(family, "bat-in"), monkeypatch, TOKENS[:tokens][None], None, 1))


@per_family
def test_recomputed_blocks(family, monkeypatch):
    assert_as_near(*both(model_of(family, "bat-in", checkpoint=True), monkeypatch, TOKENS.view(2, 13)))


@per_family
def test_quantized_layers(family, monkeypatch):
    pytest.importorskip("bitsandbytes")
    assert_as_near(*both(model_of(family, "bat-in", quant="nf4"), monkeypatch, TOKENS.view(2, 13)))


@per_family
def test_without_gradients_the_results_are_the_same(family, monkeypatch):
    model = model_of(family, "bat-in")
    fuse(model, GPU)
    on_shims(monkeypatch)
    with_gradients = model(TOKENS.view(2, 13))[0]
    with torch.inference_mode():
        assert torch.equal(model(TOKENS.view(2, 13))[0], with_gradients)


@per_family
@pytest.mark.parametrize("method", ("frozen", *METHODS))
def test_a_chain_is_of_methods_that_have_a_block_term(family, method):
    """And only with ranks that the kernels have."""
    for rank in (16, 8):
        model = model_of(family, method, rank=rank)
        assert (CHAIN in fuse(model, GPU)) == (method in CHAINED and rank == 16)
        expected = chained if method in CHAINED and rank == 16 else layer_by_layer
        assert all(block.forward.args[0] is expected for block in model.blocks)


def test_the_plain_layers_of_a_chain_are_not_called(monkeypatch):
    for family in FUSED:
        model = model_of(family, "bat-in")
        fuse(model, GPU)
        with monkeypatch.context() as patch:
            on_shims(patch)
            for block in model.blocks:
                for layer in (block.ffn.key, block.ffn.value):
                    layer.register_forward_hook(lambda *_: pytest.fail("a layer of a chain was called"))
            model(TOKENS[None])


@per_family
@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(wanted=False), "--fused 0"),
        (dict(device=torch.device("cpu")), "for GPUs"),
        (dict(compiled=True), "--compile"),
        (dict(cut=True), "stage 3"),
    ],
)
def test_a_run_that_has_none_says_why(family, change, reason):
    model = model_of(family, "bat-in")
    told = fuse(model, replace(GPU, **change))
    assert told.startswith("2 of 2 blocks plain: ") and reason in told
    assert not any("forward" in vars(block) for block in model.blocks)


@pytest.mark.parametrize(
    "flags, objective, expected",
    [
        (dict(), NextToken(), dict()),
        (dict(fused=False), NextToken(), dict(wanted=False)),
        (dict(compile=True), NextToken(), dict(compiled=True)),
        (dict(strategy="deepspeed_stage_3"), NextToken(), dict(cut=True)),
        (dict(), DPO(), dict(asks_base=True)),
    ],
)
def test_a_runs_flags_decide(flags, objective, expected):
    config = SimpleNamespace(train=TrainConfig(**flags), objective=objective)
    assert Setting.of(config, GPU.device) == replace(GPU, **expected)


@per_family
def test_blocks_that_cannot_be_fused_stay_plain(family):
    assert fuse(model_of(family, "whole"), GPU) == "2 of 2 blocks plain: ln1.weight trains"
    assert "torch.float32" in fuse(model_of(family, "bat-in").float(), GPU)
    model = model_of(family, "bat-in")
    model.blocks[1].ln2.bias.requires_grad_(True)
    told = fuse(model, GPU)
    assert told.startswith("1 of 2 blocks: ") and told.endswith("1 of 2 blocks plain: ln2.bias trains")
    assert ["forward" in vars(block) for block in model.blocks] == [True, False]


def test_sizes_that_no_released_model_has_run_plain():
    wide, small = (family.new_dimensions(1, 64, 40, head_size=size) for family, size in zip(FUSED, (64, 32)))
    for family, config in zip(FUSED, (replace(wide, maa_rank=16, decay_rank=32), small)):
        model = family.build(config).bfloat16().requires_grad_(False)
        assert "no released model" in fuse(model, GPU) or "all released models" in fuse(model, GPU)


@per_family
def test_a_base_that_is_asked_too_keeps_its_layers(family):
    """A preference step asks the base, by switching adapters off."""
    model = model_of(family, "bat-in")
    told = fuse(model, replace(GPU, asks_base=True))
    assert told.startswith("2 of 2 blocks: ") and CHAIN not in told


@per_family
def test_tuned_states_are_fused_too(family, monkeypatch):
    model = model_of(family, "frozen")
    model.tune_states()
    fused = copy.deepcopy(model)
    fuse(fused, GPU)
    plain = step(model, TOKENS.view(2, 13))
    on_shims(monkeypatch)
    for x, low in zip(step(fused, TOKENS.view(2, 13)), plain, strict=True):
        torch.testing.assert_close(x, low, rtol=0.05, atol=0.05 * low.abs().max().item())


@per_family
def test_parameters_that_are_swapped_in_are_used(family, monkeypatch):
    """CUDA graphs put stand-ins in place of the trained parameters of the blocks that they record."""
    model = model_of(family, "bat-in")
    fuse(model, GPU)
    on_shims(monkeypatch)
    x, blocks = model.emb(TOKENS.view(2, 13)), Blocks(model)
    trained = {name: parameter for name, parameter in blocks.named_parameters() if parameter.requires_grad}
    found = torch.func.functional_call(blocks, {name: 2 * one.detach() for name, one in trained.items()}, (x, None))
    with torch.no_grad():
        for parameter in trained.values():
            parameter.mul_(2)
        assert torch.equal(found, blocks(x, None))
