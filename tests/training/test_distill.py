"""--objective distill by the command that a user types: who may teach whom, and what a run of it shows and keeps."""

import json

import pytest
import torch

from families import DISTINCT, shaken
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import AdapterConfig, DataConfig, RunConfig, TrainConfig
from rwkv_peft.data.recorded import Vocabulary
from rwkv_peft.models.state import is_time_state, time_state_shapes
from rwkv_peft.objectives.distill import Distill
from rwkv_peft.release.merge import main as merge
from rwkv_peft.tools.plan.command import main as plan
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.step.teacher import make_teacher, open_teacher, require_own_tokens
from training.runs import finish, metrics, start, start_ranks


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
        ((), "--objective distill needs --teacher_model or --teacher_logprobs or --data_type contexts: it learns"),
        (("--teacher_model", "t.pth", "--distill_beta", "0.3"), "--distill_beta 0.3 needs --distill_kl jsd"),
        (("--teacher_model", "t.pth", "--distill_beta", "1"), "1 must be below 1"),
        (("--teacher_model", "t.pth", "--distill_beta", "0"), "0 is not above 0"),
        (("--teacher_model", "t.pth", "--distill_weight", "0"), "0 is not above 0"),
        (("--teacher_model", "t.pth", "--distill_weight", "1.5"), "1.5 is no share"),
        (("--teacher_model", "t.pth", "--distill_temperature", "0"), "0 is not above 0"),
        (("--teacher_model", "t.pth", "--train_type", "infctx"), "distill does not go with --train_type infctx: the "),
        (("--teacher_model", "t.pth", "--peft", "lora-ga"), "does not go with --peft lora-ga: it begins with the grad"),
        (
            ("--objective", "next_token", "--teacher_adapter", "a", "b"),
            "--teacher_adapter a b needs --objective distill",
        ),
        (("--teacher_model", "none.pth"), "none.pth"),
    ],
)
def test_flags_that_no_teacher_goes_with_are_refused(files, flags, message):
    of_run = ["--load_model", str(files / "base.pth"), "--data_file", str(files / "data"), "--objective", "distill"]
    with pytest.raises(UserError, match=message):
        parse_run([*of_run, "--bone_r", "16", *flags])


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


def test_a_teacher_has_its_adapters_and_states(files, command, tmp_path):
    """Its words are those of the merged model, with the states of the file."""
    finish(start(command("tuned", "--train_parts", "state", "--epoch_count", "1")))
    base, adapter = str(files / "base.pth"), str(files / "tuned" / "adapter.safetensors")
    merge(["--base_model", base, "--bone_checkpoint", adapter, "--output", str(tmp_path / "merged.pth")])
    merged = open_teacher(Distill(str(tmp_path / "merged.pth")), 80)
    ours = open_teacher(Distill(base, (adapter,)), 80)
    assert merged.fingerprint == ours.fingerprint and ours.has_states
    states = {key: tensor for key, tensor in merged.tensors.items() if is_time_state(key)}
    save_model(tmp_path / "state.pth", {key: tensor + 1 for key, tensor in states.items()})
    other = open_teacher(Distill(base, (adapter,), str(tmp_path / "state.pth")), 80)
    for key, tensor in other.tensors.items():
        assert torch.equal(tensor, merged.tensors[key] + (key in states))


def test_a_teacher_in_the_place_where_a_run_saves_is_refused(files, distil):
    folder = files / "taught-there"
    folder.mkdir()
    path = write_model(folder / "rwkv.pth", DISTINCT[1])
    with pytest.raises(UserError, match=f"{path} is to be read, and --proj_dir {folder} is where this run writes"):
        parse_run(distil("taught-there", "--teacher_model", str(path), "--peft", "none")[2:])


def test_a_plan_counts_the_teacher(files, teacher, capsys):
    of_run = ["--load_model", str(files / "base.pth"), "--bone_r", "16", "--objective", "distill"]
    plan([*of_run, "--teacher_model", str(teacher), "--accelerator", "cpu"])
    out = capsys.readouterr().out
    size = 2 * sum(tensor.numel() for tensor in open_base(teacher).tensors.values())
    assert f"weights of the teacher {size / 2**20:.1f} MiB" in " ".join(out.split())
    assert "hidden states of the teacher" in out
