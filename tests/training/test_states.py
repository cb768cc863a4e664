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
from rwkv_peft.release.convert import main as convert
from rwkv_peft.release.inspect import main as inspect
from rwkv_peft.release.merge_command import main as merge
from training.runs import metrics, rewound

ALONE = ("--peft", "none", "--train_type", "state", "--precision", "fp32", "--lr_init", "1e-1", "--lr_final", "1e-1")
RUNS = {  # name of a run -> its generation, and the parts of states that it tunes
    f"{family.version}-{'-'.join(parts)}": (family.version, parts)
    for family in DISTINCT
    for parts in (("wkv",), ("wkv", "shift"))
} | {"x070-shift": ("x070", ("shift",))}
BY_RUN = pytest.mark.parametrize("run", RUNS)


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
    """{name of RUNS: folder of a run that tuned only states}, and the runs' output under "out"."""
    folders = {"out": ""}
    for name, (version, parts) in RUNS.items():
        more = () if parts == ("wkv",) else ("--state_parts", *parts)
        folders["out"] += train(f"alone-{name}", "--load_model", str(bases[version]), *ALONE, *more)[0]
        folders[name] = files / f"alone-{name}"
    return folders


def memory(folder, model, *more):
    """{key: tensor} of the state that `generate --save_state` writes after a prompt."""
    words = ("--prompt", "abc", "--temperature", "0", "--max_tokens", "1", "--save_state", str(folder / "session.pth"))
    assert generate(["--model", model, *more, *words]) == 0
    return read_tensors(folder / "session.pth")


@BY_RUN
def test_a_run_leaves_the_states_and_their_base(files, bases, tuned, run):
    version, parts = RUNS[run]
    base, folder = open_base(bases[version]), tuned[run]
    adapter = read_own(folder / "adapter.safetensors")
    assert adapter.metadata.base_fingerprint == base.fingerprint and adapter.metadata.train_parts == ("state",)
    assert {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()} == time_state_shapes(
        base.config, parts
    )
    states = read_tensors(folder / "state.pth")  # as runtimes take it: nothing else is in it
    assert all(torch.equal(states[key], tensor) and tensor.any() for key, tensor in adapter.tensors.items())
    assert (folder / "state-epoch-1.pth").exists() and not (folder / "rwkv.pth").exists()
    size = 2048 * ("wkv" in parts) + 256 * ("shift" in parts)
    assert f"time states, --train_parts state: trainable params: {size:,}" in tuned["out"]
    lines = metrics(files, folder.name)
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[0]["lr"] == pytest.approx(5e-2)  # of two steps of warm-up


@BY_RUN
@pytest.mark.usefixtures("warm_python")
def test_merged_they_are_what_foreign_runtimes_start_from(bases, tuned, tmp_path, capsys, run):
    """The rwkv package starts from shifts, too, if a program puts them into its list of states, as check does."""
    pytest.importorskip("rwkv")
    version, parts = RUNS[run]
    base, merged, state = str(bases[version]), str(tmp_path / "merged.pth"), str(tuned[run] / "state.pth")
    of_base = ["--base_model", base, "--bone_checkpoint", str(tuned[run])]
    assert merge([*of_base, "--output", merged]) == 0
    out = capsys.readouterr().out
    assert ("does not look for them in an RWKV-7 file" in out) == (version == "x070")
    assert ("have no place for their shifts, from which only rwkv-peft starts" in out) == ("shift" in parts)
    assert check([*of_base, "--merged", merged]) == 0
    assert check([*of_base, "--merged", base, "--state", state]) == 0
    assert ("they are put into its list of states" in capsys.readouterr().out) == (run != "x060-wkv")
    with pytest.raises(UserError, match="give the file that the merge wrote them to as --state"):
        check([*of_base, "--merged", base])
    assert check(["--runtimes", "--merged", merged, "--gguf_types"]) == 0
    assert check(["--runtimes", "--merged", base, "--state", str(tuned[run]), "--gguf_types"]) == 0
    for given in ([merged], [base, "--state", str(tuned[run])], [base, "--state", state], [base, "--adapter", state]):
        for key, tensor in memory(tmp_path, *given).items():
            torch.testing.assert_close(tensor, memory(tmp_path, merged)[key], rtol=1e-4, atol=1e-5)
    last = "blocks.1.att.time_state"
    assert not torch.allclose(memory(tmp_path, base)[last], memory(tmp_path, merged)[last], rtol=1e-2)


@pytest.mark.parametrize("run", ["x060-wkv-shift", "x070-shift"])
def test_files_say_that_they_hold_shifts_and_who_cannot_take_them(bases, tuned, tmp_path, capsys, run):
    version, _ = RUNS[run]
    base, state = str(bases[version]), str(tuned[run] / "state.pth")
    for path, words in (
        (state, "layers (with shifts, from which only rwkv-peft starts)"),
        (str(tuned[run]), "(shifts among"),
    ):
        assert inspect([path]) == 0
        assert words in capsys.readouterr().out
    with pytest.raises(UserError, match="s.st: web-rwkv and Ai00 start from wkv states alone, and these have shifts"):
        convert([state, str(tmp_path / "s.st")])
    both = ["--base_model", base, "--bone_checkpoint", state, "--output", str(tmp_path / "m.pth")]
    with pytest.raises(UserError, match="s.state: web-rwkv and Ai00 start from wkv states alone"):
        merge([*both, "--state_output", str(tmp_path / "s.state")])
    assert not list(tmp_path.iterdir())
    assert merge(both) == 0
    with pytest.raises(UserError, match="GGUF has no place for initial states"):
        convert([str(tmp_path / "m.pth"), str(tmp_path / "m.gguf")])
    assert convert([str(tmp_path / "m.pth"), str(tmp_path / "m.st")]) == 0
    assert "holds tuned states, and its runtimes take those only as a separate file" in capsys.readouterr().out
    assert convert([str(tmp_path / "m.st"), str(tmp_path / "back.pth"), "--dtype", "fp32"]) == 0
    back = open_base(tmp_path / "back.pth").tensors
    assert all(torch.allclose(back[key], tensor, rtol=1e-2) for key, tensor in read_tensors(state).items())


def test_states_of_another_base_are_refused(bases, tuned, tmp_path):
    with pytest.raises(UserError, match="was tuned on an RWKV-6, and the model is an RWKV-7"):
        generate(["--model", str(bases["x070"]), "--state", str(tuned["x060-wkv"]), "--prompt", "a"])
    tensors = read_tensors(bases["x060"])
    torch.save(tensors | {"head.weight": 2 * tensors["head.weight"]}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="was trained on another base"):
        generate(["--model", str(tmp_path / "other.pth"), "--state", str(tuned["x060-wkv"]), "--prompt", "a"])


def test_a_resumed_run_has_the_bits_of_a_whole_one(files, train, bases, tuned):
    command = ("resumed", "--load_model", str(bases["x060"]), *ALONE)
    rewound(tuned["x060-wkv"], "resumed")
    out, _ = train(*command, "--resume")
    assert "resuming after step 4" in out
    first, second = ((files / name / "adapter.safetensors").read_bytes() for name in ("alone-x060-wkv", "resumed"))
    assert first == second
    more = ("--epoch_save", "3", "--save_minutes", "1e-9", "--keep_checkpoints", "3")
    train(*command, "--resume", "--fresh_optimizer", "--devices", "2", "--epoch_count", "3", *more)
    assert len(metrics(files, "resumed")) == 16  # of which eight were taken before the step grew
    folder = files / "resumed"
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in (10, 11, 12)]  # every step's, since a minute's part had passed
    assert {path.stem for path in folder.glob("state*")} == {"state", *(f"state-epoch-{n}" for n in (1, 2, 3))}


def test_states_train_along_with_an_adapter_under_every_stage(files, train, bases, tuned, tmp_path, capsys):
    base, start = str(bases["x070"]), str(tuned["x070-wkv"] / "state.pth")
    both = ("--load_model", base, "--train_parts", "state", "--state_load", start, "--state_lr", "3e-2")
    both += ("--precision", "fp32", "--epoch_count", "1", "--state_parts", "wkv", "shift")
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
    assert merge([*of_base, "--output", str(merged), "--state_output", str(tmp_path / "s.pth")]) == 0
    assert list(open_base(merged).tensors) == list(open_base(base).tensors)
    assert all(torch.equal(read_states(tmp_path / "s.pth").tensors[key], tensor) for key, tensor in moved.items())
    assert check([*of_base, "--merged", str(merged), "--state", str(tmp_path / "s.pth")]) == 0
    assert "do not explain" not in capsys.readouterr().out
    _, err = train(
        "further", *both[:4], "--bone_load", str(adapter / "adapter.safetensors"), "--epoch_count", "1", code=2
    )
    assert "would neither train nor save them; give --train_parts state --state_parts wkv shift" in err
    _, err = train("further", "--load_model", str(adapter / "merged.pth"), code=2)
    assert "add --train_parts state --state_parts wkv shift, or take the model without them" in err
    inside = open_base(adapter / "merged.pth").tensors
    assert all(torch.equal(inside[key], tensor) for key, tensor in moved.items())


def test_shifts_join_wkv_states_that_were_tuned_before(files, train, bases, tuned):
    start = ("--load_model", str(bases["x060"]), *ALONE, "--state_load")
    err = train("joined", *start, str(tuned["x060-wkv-shift"]), code=2)[1]
    assert "have att.shift, which --state_parts wkv leaves out; give --state_parts wkv shift" in err
    train("joined", *start, str(tuned["x060-wkv"]), "--state_parts", "shift", "wkv", "--epoch_count", "1")
    states = read_tensors(files / "joined" / "state.pth")
    assert all(tensor.any() for tensor in states.values())
    before = read_tensors(tuned["x060-wkv"] / "state.pth")
    assert all((states[key] - tensor).abs().max() < 0.5 for key, tensor in before.items()) and len(before) < len(states)


def test_states_train_along_with_the_model_itself(files, train, bases, tuned, tmp_path):
    base = open_base(bases["x060"])
    save_model(tmp_path / "tuned.pth", base.tensors | read_tensors(tuned["x060-wkv"] / "state.pth"))
    parts = ("--load_model", str(tmp_path / "tuned.pth"), "--peft", "none", "--train_parts", "ln", "state")
    train("parts", *parts, "--precision", "fp32", "--epoch_count", "1")
    model = open_base(files / "parts" / "rwkv.pth")
    assert list(model.tensors) == [*base.tensors, *time_state_shapes(base.config)]
    assert not torch.equal(model.tensors["blocks.0.ln1.weight"], base.tensors["blocks.0.ln1.weight"])
