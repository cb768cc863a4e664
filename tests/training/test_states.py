"""State tuning by the commands that a user types: training, resuming, merging, checking, converting and generating;
with and without an adapter; for every generation."""

import pytest
import torch

from families import DISTINCT, shaken
from rwkv_peft.checkpoints.adapter_file import read_own
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.checkpoints.state_file import read_states
from rwkv_peft.checkpoints.tensors import read_tensors
from rwkv_peft.cli.errors import UserError
from rwkv_peft.inference.command import main as generate
from rwkv_peft.models.layout import time_state_shapes
from rwkv_peft.release.check import main as check
from rwkv_peft.release.merge import main as merge
from training.runs import metrics, rewound

ALONE = ("--peft", "none", "--train_type", "state", "--precision", "fp32", "--lr_init", "1e-1", "--lr_final", "1e-1")
BY_VERSION = pytest.mark.parametrize("version", [family.version for family in DISTINCT])


@pytest.fixture(scope="module")
def bases(files):
    """{version: path of a base of 257 tokens, without zeros in its tensors}."""
    paths = {}
    for family in DISTINCT:
        model = shaken(family, 0.05, n_layer=2, n_embd=64, vocab_size=257, head_size=16)
        paths[family.version] = files / f"{family.version}.pth"
        save_model(paths[family.version], model.state_dict())
    return paths


@pytest.fixture(scope="module")
def tuned(files, train, bases):
    """{version: folder of a run that tuned only states}, and the runs' output under "out"."""
    folders = {"out": ""}
    for version, base in bases.items():
        folders["out"] += train(f"alone-{version}", "--load_model", str(base), *ALONE)[0]
        folders[version] = files / f"alone-{version}"
    return folders


def memory(folder, model, *more):
    """{key: tensor} of the state that `generate --save_state` writes after a prompt."""
    words = ("--prompt", "abc", "--temperature", "0", "--max_tokens", "1", "--save_state", str(folder / "session.pth"))
    assert generate(["--model", model, *more, *words]) == 0
    return read_tensors(folder / "session.pth")


@BY_VERSION
def test_a_run_leaves_the_states_and_their_base(files, bases, tuned, version):
    base, folder = open_base(bases[version]), tuned[version]
    adapter = read_own(folder / "adapter.safetensors")
    assert adapter.metadata.base_fingerprint == base.fingerprint and adapter.metadata.train_parts == ("state",)
    assert {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()} == time_state_shapes(base.config)
    states = read_tensors(folder / "state.pth")  # as runtimes take it: nothing else is in it
    assert all(torch.equal(states[key], tensor) and tensor.any() for key, tensor in adapter.tensors.items())
    assert (folder / "state-epoch-1.pth").exists() and not (folder / "rwkv.pth").exists()
    assert "time states, --train_parts state: trainable params: 2,048" in tuned["out"]
    lines = metrics(files, folder.name)
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[0]["lr"] == pytest.approx(5e-2)  # of two steps of warm-up


@BY_VERSION
@pytest.mark.usefixtures("warm_python")
def test_merged_they_are_what_foreign_runtimes_start_from(bases, tuned, tmp_path, capsys, version):
    pytest.importorskip("rwkv")
    base, merged = str(bases[version]), str(tmp_path / "merged.pth")
    of_base = ["--base_model", base, "--bone_checkpoint", str(tuned[version])]
    assert merge([*of_base, "--output", merged]) == 0
    assert ("does not look for them in an RWKV-7 file" in capsys.readouterr().out) == (version == "x070")
    assert check([*of_base, "--merged", merged]) == 0
    assert check([*of_base, "--merged", base, "--state", str(tuned[version] / "state.pth")]) == 0
    assert ("they are put into its list of states" in capsys.readouterr().out) == (version == "x070")
    with pytest.raises(UserError, match="give the file that the merge wrote them to as --state"):
        check([*of_base, "--merged", base])
    assert check(["--runtimes", "--merged", merged, "--gguf_types"]) == 0
    assert check(["--runtimes", "--merged", base, "--state", str(tuned[version]), "--gguf_types"]) == 0
    capsys.readouterr()
    for given in ([merged], [base, "--state", str(tuned[version])], [base, "--adapter", str(tuned[version])]):
        for key, tensor in memory(tmp_path, *given).items():
            torch.testing.assert_close(tensor, memory(tmp_path, merged)[key], rtol=1e-4, atol=1e-5)
    last = "blocks.1.att.time_state"
    assert not torch.allclose(memory(tmp_path, base)[last], memory(tmp_path, merged)[last], rtol=1e-2)


def test_states_of_another_base_are_refused(bases, tuned, tmp_path):
    with pytest.raises(UserError, match="was tuned on an RWKV-6, and the model is an RWKV-7"):
        generate(["--model", str(bases["x070"]), "--state", str(tuned["x060"]), "--prompt", "a"])
    tensors = read_tensors(bases["x060"])
    torch.save(tensors | {"head.weight": 2 * tensors["head.weight"]}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="was trained on another base"):
        generate(["--model", str(tmp_path / "other.pth"), "--state", str(tuned["x060"]), "--prompt", "a"])


def test_a_resumed_run_has_the_bits_of_a_whole_one(files, train, bases, tuned):
    command = ("resumed", "--load_model", str(bases["x060"]), *ALONE)
    rewound(tuned["x060"], "resumed")
    out, _ = train(*command, "--resume")
    assert "resuming after step 4" in out
    first, second = ((files / name / "adapter.safetensors").read_bytes() for name in ("alone-x060", "resumed"))
    assert first == second
    more = ("--epoch_save", "3", "--save_minutes", "1e-9", "--keep_checkpoints", "3")
    train(*command, "--resume", "--fresh_optimizer", "--devices", "2", "--epoch_count", "3", *more)
    assert len(metrics(files, "resumed")) == 16  # of which eight were taken before the step grew
    folder = files / "resumed"
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in (10, 11, 12)]  # every step's, since a minute's part had passed
    assert {path.stem for path in folder.glob("state*")} == {"state", *(f"state-epoch-{n}" for n in (1, 2, 3))}


def test_states_train_along_with_an_adapter_under_every_stage(files, train, bases, tuned, tmp_path, capsys):
    base, start = str(bases["x070"]), str(tuned["x070"] / "state.pth")
    both = ("--load_model", base, "--train_parts", "state", "--state_load", start, "--state_lr", "3e-2")
    both += ("--precision", "fp32", "--epoch_count", "1")
    out, _ = train("both", *both, "--micro_bsz", "4", "--merge_on_save")
    assert "the states' learning rate is 0.03 after warm-up" in out
    train("both-3", *both, "--strategy", "deepspeed_stage_3", "--devices", "2", "--micro_bsz", "2", "--grad_cp", "1")
    for mine, theirs in zip(metrics(files, "both-3"), metrics(files, "both")):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    moved = read_tensors(files / "both" / "state.pth")
    for key, tensor in read_tensors(start).items():
        assert 0.02 < (moved[key] - tensor).abs().max() < 0.12  # four steps of Adam at the states' own rate
    adapter, merged = files / "both", tmp_path / "merged.pth"
    of_base = ["--base_model", base, "--bone_checkpoint", str(adapter)]
    assert merge([*of_base, "--output", str(merged), "--state_output", str(tmp_path / "s.st")]) == 0
    assert list(open_base(merged).tensors) == list(open_base(base).tensors)
    assert all(torch.equal(read_states(tmp_path / "s.st").tensors[key], tensor) for key, tensor in moved.items())
    assert check([*of_base, "--merged", str(merged), "--state", str(tmp_path / "s.st")]) == 0
    assert "do not explain" not in capsys.readouterr().out
    inside = open_base(adapter / "merged.pth").tensors
    assert all(torch.equal(inside[key], tensor) for key, tensor in moved.items())


def test_states_train_along_with_the_model_itself(files, train, bases, tuned, tmp_path):
    base = open_base(bases["x060"])
    save_model(tmp_path / "tuned.pth", base.tensors | read_tensors(tuned["x060"] / "state.pth"))
    parts = ("--load_model", str(tmp_path / "tuned.pth"), "--peft", "none", "--train_parts", "ln", "state")
    train("parts", *parts, "--precision", "fp32", "--epoch_count", "1")
    model = open_base(files / "parts" / "rwkv.pth")
    assert list(model.tensors) == [*base.tensors, *time_state_shapes(base.config)]
    assert not torch.equal(model.tensors["blocks.0.ln1.weight"], base.tensors["blocks.0.ln1.weight"])
