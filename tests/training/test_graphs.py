"""--cuda_graphs: blocks that are recorded once and replayed give the losses and gradients of blocks that run.

graphs_emulated.py stands in for CUDA's graphs.
"""

import json
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from families import DISTINCT, shake, shaken
from rwkv_peft.adapters.inject import inject
from rwkv_peft.config import AdapterConfig, DataConfig
from rwkv_peft.data.collate import collate
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.errors import UserError
from rwkv_peft.files.base import save_model
from rwkv_peft.objectives.dpo import DPO
from rwkv_peft.ops.recurrence.checks import check_bounds
from rwkv_peft.training.flags.request import parse_flags
from rwkv_peft.training.step.graphs import Form, Graphed, bounds_like, recorded_forms
from rwkv_peft.training.step.steps import Whole, straight
from training.graphs_emulated import emulate
from training.runs import ROOT, finish, metrics, start

T, VOCABULARY = 6, 30


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    emulate(monkeypatch.setattr)


def make(family, trains, quant="none"):
    """A model without zeros in its tensors; what trains: "bat-in", "lora" (with dropout), "all" with tuned states, or
    "ln_out"."""
    model = shaken(family)
    if trains == "all":
        model.tune_states()
    elif trains == "ln_out":
        model.requires_grad_(False).ln_out.requires_grad_(True)
    else:
        method, mode = ("lora", "bat-in") if trains == "lora" else ("bone", trains)
        dropout = 0.5 if trains == "lora" else 0.0
        inject(model, AdapterConfig(method=method, mode=mode, rank=4, quant=quant, dropout=dropout), family=family)
    return shake(model)


def a_batch(seed, rows=2, tokens=T):
    torch.manual_seed(seed)
    mask = torch.ones(tokens, dtype=torch.bool)
    return collate([(torch.randint(VOCABULARY, (tokens + 1,)), mask) for _ in range(rows)])


def packed(seed, lengths):
    """A batch of documents with so many targets each."""
    torch.manual_seed(seed)
    return collate([[(torch.randint(VOCABULARY, (T + 1,)), torch.arange(T) % 3 > 0) for T in lengths]])


def trained(model, way, batches):
    """Take an optimizer step for every two micro batches -> losses, parameters, and the last gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses, step = torch.optim.AdamW(parameters, lr=1e-2), [], Whole(way=way)
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        loss = step.loss(model, batch, batch["mask"].sum().item())
        losses += [loss.detach(), step.total(model, a_batch(seed + 9))]
        loss.backward()
        if seed in (1, 3):
            optimizer.step()
            optimizer.zero_grad()
    return losses, parameters, [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("trains", ["bat-in", "lora", "all", "ln_out"])
@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_replayed_blocks_train_as_blocks_do(family, trains):
    batches = [a_batch(seed) for seed in range(6)]
    runs = [trained(make(family, trains), way, batches) for way in (Graphed([Form(T)]), straight)]
    torch.testing.assert_close(*runs, rtol=0, atol=0)
    assert sum(gradient is not None for gradient in runs[1][2]) > 0


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_quantized_weights_train_as_they_do(quant):
    pytest.importorskip("bitsandbytes")
    batches = [a_batch(seed) for seed in range(6)]
    runs = [trained(make(DISTINCT[0], "bat-in", quant), way, batches) for way in (Graphed([Form(T)]), straight)]
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("family, trains", [*zip(DISTINCT, ("all", "bat-in")), (DISTINCT[0], "ln_out")])
def test_shorter_rows_are_padded_and_train_as_they_are(family, trains):
    graphed = Graphed([Form(T), Form(T - 2)])
    batches = [a_batch(seed, tokens=tokens) for seed, tokens in enumerate([T, T, T - 1, T - 2, T, T - 3])]
    runs = [trained(make(family, trains), way, batches) for way in (graphed, straight)]
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)
    longest, shorter = graphed.graphs.values()
    assert longest.calls == 6 and shorter.leader is longest


PACKED = (  # the lengths of the documents in each of a run's rows, of 9 targets
    [(4, 5), (9,), (1, 1, 1, 1, 5), (2, 3, 4), (9,), (5, 4)],
    [(1, 2, 3, 2, 1), (3, 6), (3, 3, 3), (8, 1), (2, 2, 2, 3), (1, 8)],
    [(9,), (3, 3, 3), (1, 8), (1,) * 5 + (4,), (9,), (7, 2)],
)


@pytest.mark.parametrize("rows, family, trains", [*zip(cycle(PACKED), cycle(DISTINCT), ["all"] * 2 + ["bat-in"] * 2)])
def test_packed_rows_train_as_they_do_whatever_their_number_of_sequences(rows, family, trains):
    """Rows follow each other with more sequences than the row before, and with fewer."""
    graphed = Graphed([Form(9, most) for most in (6, 4, 2)])
    batches = [packed(seed, lengths) for seed, lengths in enumerate(rows)]
    runs = [trained(make(family, trains), way, batches) for way in (graphed, straight)]
    torch.testing.assert_close(*runs, rtol=0, atol=0)
    assert graphed.graphs[Form(9, 6)].calls == 6


@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_the_last_sequence_goes_on_to_the_end_of_rows_that_are_not_full(family):
    batches = [packed(seed, lengths) for seed, lengths in enumerate([(4, 5), (3,), (1, 1, 2), (2, 3, 6), (7,), (2,)])]

    def filled(batch):
        bounds = torch.cat([batch["cu_seqlens"][:-1], torch.tensor([11])])
        rows = {name: F.pad(batch[name], (0, 11 - batch[name].shape[1])) for name in ("tokens", "targets", "mask")}
        return batch | rows | {"cu_seqlens": bounds}

    longer = list(map(filled, batches))
    found = trained(make(family, "bat-in"), Graphed([Form(11, 3)]), batches)
    torch.testing.assert_close(found, trained(make(family, "bat-in"), straight, longer), rtol=0, atol=0)
    torch.testing.assert_close(found[0], trained(make(family, "bat-in"), straight, batches)[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_pairs_train_as_they_do_and_their_base_stays_the_base(family):
    """Recorded with adapters that have already moved, so that the base's graphs would show a trace of them."""
    forms, results = [Form(9, 4), Form(6, 4)], []
    for ways in ((Graphed(forms), Graphed(forms, gradients=False)), ()):
        model, step = make(family, "bat-in"), Whole(DPO(0.7, 0.3), *ways)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
        for seed, lengths in enumerate([(2, 3, 2, 2), (1, 2, 2, 1), (3, 3, 1, 2)]):
            batch = packed(seed, lengths)
            loss = step.loss(model, batch, 2)
            losses += [loss.detach(), *step.measures.values(), step.total(model, batch)]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((losses, parameters))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_forms_that_are_recorded():
    def tokens(packs=(0, 0), **data):
        return [tuple(form) for form in recorded_forms(DataConfig(path="", **data), packs)]

    assert tokens(ctx_len=1000) == [(1000, 0)]
    assert tokens(ctx_len=1000, micro_bsz=3, dataload="pad") == [(1000, 0), (768, 0), (512, 0), (256, 0)]
    assert tokens(ctx_len=100, dataload="only") == [(100, 0), (64, 0)]
    assert tokens((1, 9), ctx_len=100, dataload="pack") == [(100, 9), (100, 8), (100, 4), (100, 2), (100, 1)]
    assert tokens((6, 16), ctx_len=100, micro_bsz=2, dataload="pack") == [(200, 16), (200, 8)]
    pairs = dict(ctx_len=60, micro_bsz=2, data_type="pairs", dataload="pack")
    assert tokens((4, 4), **pairs) == [(240, 4), (192, 4), (128, 4), (64, 4)]


def test_the_bounds_that_are_recorded_are_taken_unread():
    bounds = bounds_like(torch.empty(1, 9, 4, device="meta"), 4)
    assert bounds.shape == (5,)
    check_bounds("wkv7", bounds, 9)  # which would read them
    assert bounds_like(torch.empty(1, 9, 4), 4).tolist() == [0, 2, 4, 6, 9]


def test_a_driver_that_cannot_record_is_told_of(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.raises(UserError, match=r"cannot record what the model does \(operation not permitted.*; leave "):
        Whole(way=Graphed([Form(T)])).loss(make(DISTINCT[0], "bat-in"), a_batch(0), 1)


@pytest.fixture
def recorded():
    """A model with an adapter, and a step that has recorded it."""
    model, step = make(DISTINCT[0], "bat-in"), Whole(way=Graphed([Form(T), Form(T - 2)]))
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
        (["--strategy", "deepspeed_stage_3"], "--strategy deepspeed_stage_3: it gathers"),
        (["--strategy", "deepspeed_stage_2_offload"], "--strategy deepspeed_stage_2_offload: a step waits"),
        (["--grad_cp", "1"], "--grad_cp 1: "),
        (["--compile"], "--compile: both take the blocks"),
        (["--train_type", "infctx"], "--train_type infctx: segments hand states on"),
    ],
)
def test_what_a_recorded_step_cannot_repeat_is_refused(more, words):
    flags = ["--load_model", "base.pth", "--data_file", "data", "--cuda_graphs", "1"]
    with pytest.raises(UserError, match="--cuda_graphs 1 does not go with") as error:
        parse_flags([*flags, *more])
    assert words in str(error.value)


@pytest.fixture(scope="module")
def data(files, tiny_state):
    """Flags for a kind of rows: "pack" packs 1 to 8 documents into rows of 24 targets; "pairs" has pairs of answers, on
    a base whose tokens are bytes; other kinds need no flags."""
    with ShardWriter(files / "documents", vocab_size=80) as writer:
        for number, size in enumerate([24, 12, 12, 6, 6, 6, 6, *[3] * 8] * 4):
            writer.add([1 + (number + 7 * i) % 79 for i in range(size)] + [0])
    rows = [{"query": f"{i}?", "chosen": "AB" * (1 + i % 9), "rejected": "no" * (1 + i % 4)} for i in range(20)]
    (files / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model(files / "bytes.pth", tiny_state(vocab_size=257))
    pairs = ["--data_file", files / "pairs.jsonl", "--load_model", files / "bytes.pth", "--tokenizer", "bytes"]
    return {
        "pack": ["--dataload", "pack", "--data_file", files / "documents"],
        "pairs": ["--data_type", "pairs", *pairs],
    }


SAME, CLOSE = {"rtol": 0, "atol": 0}, {"rtol": 1e-3, "atol": 1e-5}
LORA = ("--peft", "lora", "--lora_config", '{"lora_r": 8, "lora_dropout": 0.2}')
ROWS = {
    "get, quantized, dropping": (("--quant", "nf4", *LORA), SAME),
    "pad": (("--dataload", "pad", "--ctx_len", "96", "--precision", "fp32"), CLOSE),
    "pack, with states": (("--random_seed", "2", "--train_parts", "state"), SAME),
    "pairs": (("--ctx_len", "64", "--micro_bsz", "1", "--precision", "fp32"), CLOSE),
}


@pytest.mark.parametrize("rows", ROWS)
def test_a_run_is_the_same_replayed(files, data, command, rows):
    """Under the engine, which moves parameters, hooks gradients and accumulates them over micro batches."""
    if "quantized" in rows:
        pytest.importorskip("bitsandbytes")
    more, close = ROWS[rows]
    flags = ["--micro_bsz", "2", "--accumulate_grad_batches", "2", "--val_split", "0.2", "--epoch_steps", "2", *more]
    kind = rows.split(",")[0]
    flags += map(str, data.get(kind, ()))
    runs = {}
    for name, graphs in ((f"eager {rows}", "0"), (f"replayed {rows}", "1")):
        python, _, *rest = command(name, *flags, "--cuda_graphs", graphs, "--accelerator", "cpu")
        runs[name] = start([python, str(ROOT / "tests" / "training" / "train_graphed.py"), *rest])
    eager, replayed = (finish(process)[0] for process in runs.values())
    assert "CUDA graphs" not in eager and "\n0 replays" in eager
    most = {"pack": 16, "pairs": 2}.get(kind)
    packed = f" of rows of up to {most} documents" if most else ""
    assert f"blocks are recorded as CUDA graphs{packed} in the first step" in replayed
    base = 8 + 3 * 4 if kind == "pairs" else 0  # in training, and in validation before it and after each epoch
    assert f"\n{16 + base} replays" in replayed
    eager, replayed = (
        [{k: torch.tensor(v) for k, v in line.items() if k != "tokens_per_s"} for line in metrics(files, name)]
        for name in runs
    )
    assert len(eager) == 4
    torch.testing.assert_close(replayed, eager, **close)
    torch.testing.assert_close(*(load_file(files / name / "adapter.safetensors") for name in runs), **close)
