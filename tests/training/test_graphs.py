"""--cuda_graphs: blocks that are recorded once and replayed give the losses and gradients of blocks that run.

graphs_emulated.py stands for CUDA's graphs.
"""

import pytest
import torch
from safetensors.torch import load_file

from rwkv_peft.adapters.inject import inject
from rwkv_peft.config import AdapterConfig
from rwkv_peft.data.batches import collate
from rwkv_peft.errors import UserError
from rwkv_peft.models import FAMILIES
from rwkv_peft.training.flags import parse_flags
from rwkv_peft.training.graphs import Graphed, recorded_lengths
from rwkv_peft.training.steps import Whole
from training.graphs_emulated import emulate
from training.runs import ROOT, finish, metrics, start

T, VOCABULARY = 6, 30


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    emulate(monkeypatch.setattr)


def make(family, trains):
    """A model of which nothing is zero; what trains: "bat-in", "lora", "all" with tuned states, or "ln_out"."""
    torch.manual_seed(0)
    model = family.build(family.new_dimensions(n_layer=2, n_embd=16, vocab_size=VOCABULARY, head_size=8))
    family.init_weights(model)
    if trains == "all":
        model.tune_states()
    elif trains == "ln_out":
        model.requires_grad_(False).ln_out.requires_grad_(True)
    else:
        method, mode = ("lora", "bat-in") if trains == "lora" else ("bone", trains)
        inject(model, AdapterConfig(method=method, mode=mode, rank=4), family=family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def a_batch(seed, rows=2, tokens=T):
    torch.manual_seed(seed)
    mask = torch.ones(tokens, dtype=torch.bool)
    return collate([(torch.randint(VOCABULARY, (tokens + 1,)), mask) for _ in range(rows)])


def trained(model, step, lengths):
    """What three optimizer steps of two micro batches leave, which have so many tokens a row: losses, parameters, and
    the last gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for seed, tokens in enumerate(lengths):
        batch = a_batch(seed, tokens=tokens)
        loss = step.loss(model, batch, batch["mask"].sum().item())
        losses += [loss.detach(), step.total(model, a_batch(seed + 9))]
        loss.backward()
        if seed in (1, 3):
            optimizer.step()
            optimizer.zero_grad()
    return losses, parameters, [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("trains", ["bat-in", "lora", "all", "ln_out"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_replayed_blocks_train_as_blocks_do(family, trains):
    runs = [trained(make(family, trains), step, [T] * 6) for step in (Graphed((T,)), Whole())]
    torch.testing.assert_close(*runs, rtol=0, atol=0)
    assert sum(gradient is not None for gradient in runs[1][2]) > 0


@pytest.mark.parametrize("family, trains", [*zip(FAMILIES, ("all", "bat-in")), (FAMILIES[0], "ln_out")])
def test_shorter_rows_are_padded_and_train_as_they_are(family, trains):
    graphed = Graphed((T, T - 2))
    runs = [trained(make(family, trains), step, [T, T, T - 1, T - 2, T, T - 3]) for step in (graphed, Whole())]
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)
    assert graphed.graphs[T].calls == 6 and graphed.graphs[T - 2].leader is graphed.graphs[T]


def test_the_lengths_that_are_recorded():
    assert recorded_lengths(1000, padded=False) == (1000,)
    assert recorded_lengths(1000, padded=True) == (1000, 768, 512, 256)
    assert recorded_lengths(100, padded=True) == (100, 64)


def test_a_driver_that_cannot_record_is_told_of(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.raises(UserError, match=r"cannot record what the blocks do \(operation not permitted.*; leave it out"):
        Graphed((T,)).loss(make(FAMILIES[0], "bat-in"), a_batch(0), 1)


@pytest.fixture
def recorded():
    """A model with an adapter, and a Graphed that has recorded it."""
    model, step = make(FAMILIES[0], "bat-in"), Graphed((T, T - 2))
    step.loss(model, a_batch(0), 1)
    return model, step


@pytest.mark.parametrize("tokens", [T, T - 2])
def test_what_a_later_call_has_overwritten_is_not_taken_for_a_gradient(recorded, tokens):
    model, step = recorded
    early, late = step.loss(model, a_batch(1), 1), step.loss(model, a_batch(2, tokens=tokens), 1)
    late.backward()
    with pytest.raises(AssertionError, match="overwritten by a later one"):
        early.backward()


def test_parameters_that_have_moved_are_noticed(recorded):
    model, step = recorded
    parameter = model.blocks[1].att.key.bone
    parameter.data = parameter.data.clone()
    with pytest.raises(AssertionError, match="parameters have moved"):
        step.loss(model, a_batch(1), 1)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--strategy", "deepspeed_stage_3"], "--strategy deepspeed_stage_3: stage 3 gathers"),
        (["--strategy", "deepspeed_stage_2_offload"], "--strategy deepspeed_stage_2_offload: a step waits"),
        (["--grad_cp", "1"], "--grad_cp 1: "),
        (["--compile"], "--compile: both take the blocks"),
        (["--train_type", "infctx"], "--chunk_ctx 512: segments hand states on"),
        (["--dataload", "pack"], "--dataload pack: a graph is of one number of documents"),
        (["--quant", "nf4"], "--quant nf4: "),
        (["--peft", "lora", "--lora_config", '{"lora_dropout": 0.1}'], "dropout 0.1: a graph repeats what was drawn"),
    ],
)
def test_what_a_recorded_step_cannot_repeat_is_refused(more, words):
    flags = ["--load_model", "base.pth", "--data_file", "data", "--cuda_graphs", "1"]
    with pytest.raises(UserError, match="--cuda_graphs 1 does not go with") as error:
        parse_flags([*flags, *more])
    assert words in str(error.value)


@pytest.mark.parametrize(
    "rows, close",
    [
        ([], {"rtol": 0, "atol": 0}),
        (["--dataload", "pad", "--ctx_len", "128", "--precision", "fp32"], {"rtol": 1e-3, "atol": 1e-5}),
    ],
    ids=["get", "pad"],
)
def test_a_run_is_the_same_replayed(files, command, rows, close):
    """Under the engine, which moves parameters, hooks their gradients and adds up those of micro batches."""
    flags = ("--micro_bsz", "2", "--accumulate_grad_batches", "2", "--val_split", "0.2", *rows)
    runs = {}
    for name, graphs in ((f"eager{len(rows)}", "0"), (f"replayed{len(rows)}", "1")):
        python, _, *rest = command(name, *flags, "--cuda_graphs", graphs, "--accelerator", "cpu")
        runs[name] = start([python, str(ROOT / "tests" / "training" / "train_graphed.py"), *rest])
    told = ["blocks are recorded as CUDA graphs in the first step" in finish(process)[0] for process in runs.values()]
    assert told == [False, True]
    eager, replayed = (
        [{k: torch.tensor(v) for k, v in line.items() if k != "tokens_per_s"} for line in metrics(files, name)]
        for name in runs
    )
    assert len(eager) == 8
    torch.testing.assert_close(replayed, eager, **close)
    torch.testing.assert_close(*(load_file(files / name / "adapter.safetensors") for name in runs), **close)
