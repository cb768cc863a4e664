"""--objective distill by the commands that a user types: another model teaches, or the base with --data_type contexts;
who may teach whom, and what a run of it shows and keeps."""

import copy
import json
import sys

import pytest
import torch

from families import DISTINCT, shake, shaken
from rwkv_peft.adapters.inject import inject
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.cli.names import STATE_PARTS
from rwkv_peft.config import AdapterConfig, DataConfig, RunConfig, TrainConfig
from rwkv_peft.data.batches import EvalBatches
from rwkv_peft.data.recorded import Vocabulary
from rwkv_peft.data.samples import collate_packed
from rwkv_peft.data.sources import build_samples
from rwkv_peft.models.layout import time_state_shapes
from rwkv_peft.objectives.distill import Distill
from rwkv_peft.ops.recurrence.signature import bounds_on_host
from rwkv_peft.tools.plan.command import main as plan
from rwkv_peft.training.flags.request import parse_flags, parse_run
from rwkv_peft.training.inputs import find_inputs
from rwkv_peft.training.step.shared_prefix import Contexts
from rwkv_peft.training.step.steps import Whole
from rwkv_peft.training.step.teacher import make_teacher, open_teacher, require_own_tokens
from training.runs import ROOT, finish, metrics, rewound, start, start_ranks

FLAGS = ("--objective", "distill", "--random_seed", "1", "--precision", "fp32", "--val_split", "0.2")
PADDED, PACKED = ("--dataload", "pad", "--micro_bsz", "2"), ("--dataload", "pack", "--micro_bsz", "1")
STATE = ("--peft", "none", "--train_parts", "state", "--lr_init", "0.1", "--lr_final", "0.1")


def write_model(path, family, **sizes):
    """Write a random model of a generation, and return its path."""
    model = shaken(family, 0.05, **{"n_layer": 3, "n_embd": 96, "vocab_size": 80, "head_size": 16, **sizes})
    save_model(path, {key: tensor.bfloat16() for key, tensor in model.state_dict().items()})
    return path


@pytest.fixture(scope="module")
def teacher(files):
    """A wider teacher of the other generation."""
    return write_model(files / "teacher.pth", DISTINCT[1])


@pytest.fixture(scope="module")
def distil(command, teacher):
    def build(name, *more):
        return command(name, "--objective", "distill", "--teacher_model", str(teacher), "--random_seed", "1", *more)

    return build


@pytest.mark.parametrize(
    "flags",
    [
        ("--peft", "none", "--lr_init", "1e-3", "--distill_weight", "0.5"),
        ("--dataload", "pack", "--micro_bsz", "2", "--distill_kl", "jsd", "--distill_beta", "0.2"),
        ("--peft", "none", "--train_parts", "state", "--lr_init", "0.3", "--distill_kl", "reverse"),
        ("--dataload", "pad", "--micro_bsz", "2", "--grad_cp", "1", "--distill_temperature", "2"),
    ],
    ids=("model", "packed", "state", "padded"),
)
def test_a_student_comes_nearer_to_a_teacher_of_another_generation_and_width(files, distil, flags):
    name = flags[-1]
    more = ("--epoch_count", "6", "--precision", "fp32", "--val_split", "0.2", "--val_every", "8")
    out, _ = finish(start(distil(name, *flags, *more)))
    assert f"teacher   RWKV-7, 3 layers, 96 channels, from {files / 'teacher.pth'}" in out
    first, *_, last = (line["val_loss"] for line in metrics(files, name) if "val_loss" in line)
    assert last < first


def test_stage_3_computes_the_same(files, distil):
    for name, *more in (("one",), ("cut", "--strategy", "deepspeed_stage_3", "--devices", "2")):
        bsz = "1" if more else "2"
        ranks = start_ranks(distil(name, "--precision", "fp32", "--micro_bsz", bsz, *more))
        for rank in ranks:
            finish(rank)
    for ours, theirs in zip(metrics(files, "cut"), metrics(files, "one"), strict=True):
        for number in ("loss", "kl", "nll"):
            assert ours[number] == pytest.approx(theirs[number], rel=1e-3), (ours["step"], number)


def test_a_run_goes_on_with_its_own_teacher_alone(files, distil):
    finish(start(distil("ended", "--epoch_count", "1")))
    other = write_model(files / "other.pth", DISTINCT[1], n_embd=32)
    _, err = finish(start(distil("ended", "--resume", "--teacher_model", str(other))), 2)
    assert "has teacher " in err and "give the first run's flags" in err
    finish(start(distil("ended", "--resume")))


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "--objective distill needs --teacher_model or --data_type contexts: it learns"),
        (("--teacher_model", "t.pth", "--distill_beta", "0.3"), "--distill_beta 0.3 needs --distill_kl jsd"),
        (("--teacher_model", "t.pth", "--distill_beta", "1"), "1 must be below 1"),
        (("--teacher_model", "t.pth", "--distill_beta", "0"), "0 is not above 0"),
        (("--teacher_model", "t.pth", "--distill_weight", "0"), "0 is not above 0"),
        (("--teacher_model", "t.pth", "--distill_weight", "1.5"), "1.5 is no share"),
        (("--teacher_model", "t.pth", "--distill_temperature", "0"), "0 is not above 0"),
        (("--teacher_model", "t.pth", "--train_type", "infctx"), "distill does not go with --train_type infctx: the "),
        (("--teacher_model", "t.pth", "--peft", "lora-ga"), "does not go with --peft lora-ga: it begins with the grad"),
        (("--teacher_model", "none.pth"), "none.pth"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(files, flags, message):
    of_run = ["--load_model", str(files / "base.pth"), "--data_file", str(files / "data"), "--objective", "distill"]
    with pytest.raises(UserError, match=message):
        find_inputs(parse_run([*of_run, "--bone_r", "16", *flags]))


def test_a_teacher_of_another_vocabulary_is_refused(files, distil):
    path = write_model(files / "others-words.pth", DISTINCT[0], vocab_size=81)
    with pytest.raises(UserError, match=f"--teacher_model {path} has a vocabulary of 81 tokens, and its student 80; a"):
        parse_run(distil("unwritten", "--teacher_model", str(path))[2:])
    assert not (files / "unwritten").exists()


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path):
    path = write_model(tmp_path / "rwkv.pth", DISTINCT[0])
    record = {"name": "bytes", "hash": "00", "size": 80}
    (tmp_path / "config.json").write_text(json.dumps({"vocabulary": record}))
    base = open_base(path)
    data = Vocabulary(**record)
    require_own_tokens(base, None)
    require_own_tokens(base, data)
    with pytest.raises(UserError, match=r"was trained with bytes \(80 tokens, 00\), and the data was made with .*01\)"):
        require_own_tokens(base, data._replace(hash="01"))


@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_a_teacher_begins_with_the_time_states_of_its_file(tmp_path, family):
    path = write_model(tmp_path / "plain.pth", family)
    plain = open_base(path)
    states = {key: torch.randn(shape) for key, shape in time_state_shapes(plain.config).items()}
    save_model(tmp_path / "begun.pth", {**plain.tensors, **states})
    tokens, logits = torch.arange(5)[None], []
    for base in (plain, open_teacher(Distill(str(tmp_path / "begun.pth")), 80)):
        config = RunConfig(plain.config, AdapterConfig(), DataConfig("d"), TrainConfig(precision="fp32"), Distill())
        model = make_teacher(base, config, torch.device("cpu"))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        logits.append(model(tokens)[0])
    tuned = model.tuned_states()
    torch.testing.assert_close(make_teacher(plain, config, torch.device("cpu"))(tokens, tuned)[0], logits[1])
    assert not torch.allclose(*logits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_state):
    folder = tmp_path_factory.mktemp("contexts")
    save_model(folder / "base.pth", tiny_state(vocab_size=257, dtype=torch.bfloat16))
    rows = ({"context": "AB" * (1 + i % 7), "question": f"{i}?", "answer": f"{i % 3}!"} for i in range(20))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def train_contexts(folder, accelerator):
    def run(name, *more):
        flags = ["--load_model", folder / "base.pth", "--data_file", folder / "rows.jsonl", "--data_type", "contexts"]
        flags += ["--tokenizer", "bytes", "--ctx_len", 64, "--accumulate_grad_batches", 2, "--val_split", 0.2]
        flags += ["--accelerator", accelerator, "--epoch_count", 2, "--epoch_save", 1, "--data_shuffle", 0]
        flags += ["--answer_rows", 0, "--lr_schedule", "constant", "--proj_dir", folder / name, *more]
        ranks = start_ranks([sys.executable, str(ROOT / "train.py"), *map(str, flags)])
        return [finish(rank) for rank in ranks][0][0]

    return run


def test_states_come_nearer_to_what_the_base_says_with_the_context(folder, train_contexts):
    """And a run goes on with the same bits."""
    more = ("--precision", "bf16", "--micro_bsz", 2, *STATE)
    out = train_contexts("state", *more)
    assert "teacher   the base, without what trains, which reads each row behind its context\n" in out
    first, *_, last = (line["val_loss"] for line in metrics(folder, "state") if "val_loss" in line)
    assert last < first
    rewound(folder / "state", "parts")
    assert "resuming after step 4" in train_contexts("parts", *more, "--resume")
    whole, parts = ((folder / name / "adapter.safetensors").read_bytes() for name in ("state", "parts"))
    assert whole == parts


def test_ranks_with_gathered_weights_compute_the_same(folder, train_contexts):
    """Of an adapter and states, of which neither changes what the base says."""
    more = ("--precision", "fp32", "--bone_r", 16, "--lr_init", "3e-3", "--train_parts", "state")
    more += ("--epoch_steps", 2, "--epoch_count", 1)
    train_contexts("one", "--micro_bsz", 2, *more)
    train_contexts("cut", "--micro_bsz", 1, "--devices", 2, "--strategy", "deepspeed_stage_3", "--grad_cp", 1, *more)
    for ours, theirs in zip(metrics(folder, "cut"), metrics(folder, "one"), strict=True):
        for number in ("loss", "kl", "nll"):
            assert ours[number] == pytest.approx(theirs[number], rel=1e-3), (ours["step"], number)


@pytest.fixture
def samples(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    settings = dict(tokenizer="bytes", dataload="pack", loss_mask="file", ctx_len=64, seed=None)
    return build_samples(DataConfig(str(folder / "rows.jsonl"), data_type="contexts", **settings), 257)


def trained(family):
    """(a float64 model that trains an adapter and states, as after training, its base)."""
    model = shaken(family, vocab_size=257).double()
    base = copy.deepcopy(model)
    model.tune_states(parts=STATE_PARTS)
    inject(model, AdapterConfig(rank=8, train_parts=("state",)), family=family)
    return shake(model), base


@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_the_loss_is_the_divergence_from_the_base_with_the_context(samples, family):
    """Whatever an adapter and tuned states have become."""
    batch = samples.collate([samples[n] for n in range(3)])
    model, base = trained(family)
    step = Whole(Distill())
    due = 0.0
    for n in range(3):
        (own, mask), (whole, its) = samples[n]
        p, q = (net(tokens[None, :-1])[0][0, counts].log_softmax(1) for net, tokens, counts in (
            (model, own, mask), (base, whole, its)
        ))  # fmt: skip
        due += (q.exp() * (q - p)).sum().item()
    assert step.loss(model, batch, 1).item() == pytest.approx(due, rel=1e-9)
    assert not any(getattr(module, "untrained", False) for module in model.modules())


@pytest.mark.parametrize("room, read", [(1 << 20, 7), (0, 21)], ids=("kept", "one"))
@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_a_context_is_read_once_for_all_of_its_rows(samples, family, room, read):
    """In a whole run if States after all of them have room; the loss is that of rows which are read as wholes."""
    model, _ = trained(family)
    whole, step = Whole(Distill()), Whole(Distill(), contexts=Contexts(room))
    contexts, lengths = [], []
    model.emb.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    for batch in EvalBatches(samples, 3):
        due = whole.total(model, batch)
        lengths.clear()
        found = step.total(model, step.prepare_inputs(batch, torch.device("cpu")))
        torch.testing.assert_close(found, due, rtol=1e-9, atol=1e-12)
        rows = batch["tokens"].shape[1]
        assert lengths[-2:] == [rows, rows]  # of the teacher behind contexts, and of the student
        contexts += lengths[:-2]
    assert len(contexts) == read and set(contexts) == {2 * n + 2 for n in range(1, 8)}


def test_the_teachers_bounds_are_vouched_for(monkeypatch):
    """Nobody reads them from a GPU: the meta device has no values."""
    own, whole = (collate_packed([(torch.arange(size), torch.ones(size - 1).bool())] * 2) for size in (4, 9))
    batch = own | {f"teacher_{name}": tensor for name, tensor in whole.items()}
    moved = Whole(Distill()).prepare_inputs(batch, torch.device("meta"))
    assert bounds_on_host(moved["cu_seqlens"]) == [0, 3, 6]
    assert bounds_on_host(moved["teacher_cu_seqlens"]) == [0, 8, 16]
    moved = Whole(Distill(), contexts=Contexts()).prepare_inputs(batch, torch.device("meta"))
    assert bounds_on_host(moved["teacher_cu_seqlens"]) == [0, 3, 6] and moved["teacher_tokens"].shape == (1, 6)
    assert [text.tolist() for text in moved["teacher_contexts"]] == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--peft", "none"), r"\(--data_type contexts without --teacher_model\) does not go with a model that trains"),
        (("--train_parts", "ln", "state"), "does not go with --train_parts ln state: its teacher is the base, which"),
        (("--bone_load", "x.safetensors"), r"does not go with an adapter to start from \(x.safetensors\): its teacher"),
        (("--dataload", "pad"), "--data_type contexts does not go with --dataload pad"),
        (("--loss_mask", "none"), "--data_type contexts does not go with --loss_mask none"),
        (("--objective", "next_token"), "--objective next_token learns from --data_type binidx or sft, and the data "),
    ],
)
def test_what_does_not_go_with_contexts_is_refused(flags, message):
    given = ["--load_model", "base.pth", "--data_file", "rows.jsonl", "--data_type", "contexts"]
    with pytest.raises(UserError, match=message):
        parse_flags([*given, *flags])
    if "--dataload" not in flags and len(flags) == 2 and flags[0] in ("--peft", "--bone_load"):
        assert parse_flags([*given, *flags, "--teacher_model", "t.pth"]).objective == Distill("t.pth")
    assert parse_flags([*given, *STATE]).data.dataload == "pack"


def test_a_base_that_holds_states_is_no_teacher_of_itself(folder, tiny_state):
    weights = tiny_state(vocab_size=257)
    model = parse_run(["--load_model", str(folder / "base.pth"), "--data_file", "x", "--peft", "none"]).config.model
    states = {key: torch.ones(shape) for key, shape in time_state_shapes(model).items()}
    save_model(folder / "begun.pth", weights | states)
    given = ["--load_model", str(folder / "begun.pth"), "--data_file", "x", "--data_type", "contexts", *STATE]
    with pytest.raises(UserError, match="begun.pth holds tuned time states, .* name it as --teacher_model too"):
        parse_run(given)
    assert parse_run([*given, "--teacher_model", str(folder / "begun.pth")]).teacher.has_states


def test_a_plan_counts_the_teacher(files, teacher, folder, capsys):
    """Weights and hidden states, and only these of a base that teaches itself."""
    of_run = ["--load_model", str(files / "base.pth"), "--bone_r", "16", "--objective", "distill"]
    plan([*of_run, "--teacher_model", str(teacher), "--accelerator", "cpu"])
    out = capsys.readouterr().out
    size = 2 * sum(tensor.numel() for tensor in open_base(teacher).tensors.values())
    assert f"weights of the teacher {size / 2**20:.1f} MiB" in " ".join(out.split())
    assert "hidden states of the teacher" in out
    given = ["--load_model", str(folder / "base.pth"), "--data_type", "contexts", "--tokenizer", "bytes", *STATE]
    plan([*given, "--accelerator", "cpu"])
    out = capsys.readouterr().out
    assert "hidden states of the teacher" in out and "weights of the teacher" not in out
