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
from rwkv_peft.training.graphs import Graphed
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


def trained(model, step):
    """What three optimizer steps of two micro batches leave, of which some are shorter: losses, parameters, and the
    last gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for seed in range(6):
        batch = a_batch(seed, tokens=T - 2 if seed == 3 else T)
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
    graphed, plain = Graphed(), Whole()
    found, expected = trained(make(family, trains), graphed), trained(make(family, trains), plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert graphed.graphs.calls == 5, "one of the six is shorter"
    assert sum(gradient is not None for gradient in expected[2]) > 0


@pytest.fixture
def recorded():
    """A model with an adapter, and a Graphed that has recorded it."""
    model, step = make(FAMILIES[0], "bat-in"), Graphed()
    step.loss(model, a_batch(0), 1)
    return model, step


def test_what_a_later_call_has_overwritten_is_not_taken_for_a_gradient(recorded):
    model, step = recorded
    early, late = (step.loss(model, a_batch(seed), 1) for seed in (1, 2))
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
        (["--dataload", "pad"], "--dataload pad: a graph is of one shape"),
        (["--dataload", "pack"], "--dataload pack: a graph is of one shape"),
        (["--quant", "nf4"], "--quant nf4: "),
        (["--peft", "lora", "--lora_config", '{"lora_dropout": 0.1}'], "dropout 0.1: a graph repeats what was drawn"),
    ],
)
def test_what_a_recorded_step_cannot_repeat_is_refused(more, words):
    flags = ["--load_model", "base.pth", "--data_file", "data", "--cuda_graphs", "1"]
    with pytest.raises(UserError, match="--cuda_graphs 1 does not go with") as error:
        parse_flags([*flags, *more])
    assert words in str(error.value)


def test_a_run_has_the_same_bits_replayed(files, command):
    """Under the engine, which moves parameters, hooks their gradients and adds up those of micro batches."""
    flags = ("--micro_bsz", "2", "--accumulate_grad_batches", "2", "--val_split", "0.2")
    runs = {}
    for name, graphs in (("eager", "0"), ("replayed", "1")):
        python, _, *rest = command(name, *flags, "--cuda_graphs", graphs, "--accelerator", "cpu")
        runs[name] = start([python, str(ROOT / "tests" / "training" / "train_graphed.py"), *rest])
    out = {name: finish(process)[0] for name, process in runs.items()}
    told = "blocks are recorded as CUDA graphs in the first step"
    assert told in out["replayed"] and told not in out["eager"]
    timed = ("tokens_per_s",)
    lines = [[{k: v for k, v in line.items() if k not in timed} for line in metrics(files, name)] for name in runs]
    assert lines[0] == lines[1] and len(lines[0]) == 8
    tensors = [load_file(files / name / "adapter.safetensors") for name in runs]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
