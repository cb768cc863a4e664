"""RWKV-7, with deep embeddings (x070a) and attention over them (x070b) too, by the commands that a user types: made,
trained, resumed, merged, checked, asked; and files of another generation, which every command refuses."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError
from rwkv_peft.release.check import main as check
from rwkv_peft.release.merge_command import main as merge
from rwkv_peft.training.flags.request import parse_run
from training.runs import metrics

NEW = ("--load_model", "", "--generation", "7", "--peft", "none", "--precision", "fp32", "--epoch_count", "1")
SIZES = ("--n_layer", "2", "--n_embd", "64", "--vocab_size", "80")


@pytest.fixture(scope="module")
def base(files, train):
    """A new RWKV-7 after a few steps, so that the matrices that start at zero have moved."""
    train("new", *NEW, *SIZES, "--lr_init", "1e-4", "--lr_final", "1e-4")
    return files / "new" / "rwkv.pth"


def test_a_new_model_is_an_rwkv7_in_the_official_order(base):
    model = open_base(base)
    assert model.family.version == "x070" and list(model.tensors) == list(model.family.shapes(model.config))
    assert model.tensors["blocks.1.att.output.weight"].any()


def test_an_adapter_trains_and_merges(files, base, train, tmp_path):
    on_base = ("--load_model", str(base), "--precision", "fp32")
    out, _ = train("whole", *on_base)
    assert "RWKV-7" in out
    assert len(metrics(files, "whole")) == 8
    adapter = files / "whole" / "adapter.safetensors"
    of_base = ["--base_model", str(base), "--bone_checkpoint", str(adapter)]
    assert merge([*of_base, "--output", str(tmp_path / "merged.pth")]) == 0
    assert check([*of_base, "--merged", str(tmp_path / "merged.pth"), "--tokens", "20"]) == 0
    merged = open_base(tmp_path / "merged.pth").tensors
    assert all(not torch.equal(merged[key], open_base(base).tensors[key]) for key in merged if "att.key" in key)


@pytest.fixture(scope="module")
def wrong(files, base, train):
    """Files that every command refuses as an RWKV-7, and an adapter of an RWKV-6."""
    train("six", "--epoch_count", "1", "--epoch_steps", "1")
    adapter = read_adapter(files / "six" / "adapter.safetensors")
    shared = {key: tensor for key, tensor in adapter.tensors.items() if ".att.key." in key}  # RWKV-7 has them, too
    save_adapter(files / "shared.safetensors", shared, adapter.metadata)
    save_adapter(files / "untold.safetensors", adapter.tensors, replace(adapter.metadata, generation=""))
    states = {f"blocks.{i}.att.time_state": torch.ones(1, 64, 64) for i in range(2)}
    of_states = AdapterMetadata("none", train_parts=("state",), generation="x060")
    save_adapter(files / "states.safetensors", states, of_states)
    tensors = open_base(base).tensors
    torch.save(tensors | {"blocks.0.ffn.s_emb.weight": torch.ones(80, 8)}, files / "torn.pth")
    torch.save(tensors | {"blocks.0.qkv.qq.weight": torch.ones(8, 8)}, files / "v7b.pth")
    torch.save({key: tensor for key, tensor in tensors.items() if key != "blocks.1.att.v0"}, files / "no_v0.pth")
    return files


TRAIN = "train --data_file data --proj_dir refused --bone_r 16 --load_model {}"
MERGE = "merge --output refused.pth --bone_checkpoint six --base_model {}"
GENERATE = "generate --prompt a --tokenizer bytes --model {}"
SHARED, UNTOLD = (MERGE.replace("six", name + ".safetensors") for name in ("shared", "untold"))
CHECK = "check --bone_checkpoint six --merged base.pth --base_model {}"
CHECK_SHARED = "check --bone_checkpoint shared.safetensors --merged new/rwkv.pth --base_model {}"
COMMANDS = (TRAIN, MERGE, GENERATE, CHECK, "convert {} refused.gguf", "check --runtimes --merged {}")
OURS = "new/rwkv.pth"


@pytest.mark.parametrize(
    "line, file, words",
    [
        (f"{TRAIN} --generation 6", OURS, f"--model_version x060 (RWKV-6) contradicts {OURS}, which is RWKV-7"),
        (f"{TRAIN} --model_version x070", "base.pth", "x070 (RWKV-7) contradicts base.pth, which is RWKV-6"),
        (f"{TRAIN} --generation 8", OURS, "'8' names no generation; there is x060 (RWKV-6) or x070 (RWKV-7)"),
        (f"{TRAIN} --target_modules att.gate", OURS, "att.gate"),
        (f"{TRAIN} --bone_load six/adapter.safetensors", OURS, "was trained on another base"),
        (MERGE, OURS, "was trained on an RWKV-6, and new/rwkv.pth is an RWKV-7: give the adapter's own base"),
        (f"{MERGE} --any_base", OURS, "was trained on an RWKV-6"),
        (f"{SHARED} --any_base", OURS, "was trained on an RWKV-6"),
        (f"{GENERATE} --adapter shared.safetensors --any_base", OURS, "was trained on an RWKV-6"),
        (
            f"{GENERATE} --state states.safetensors --any_base",
            OURS,
            "was tuned on an RWKV-6, and the model is an RWKV-7",
        ),
        (f"{CHECK_SHARED} --any_base", OURS, "was trained on an RWKV-6"),
        (f"{UNTOLD} --any_base", OURS, "att.gate is a layer of RWKV-6, and the base is an RWKV-7"),
        (f"{GENERATE} --adapter six", OURS, "was trained on an RWKV-6"),
        *((line, "torn.pth", "is not an RWKV-7a model: it has no tensor blocks.0.ffn.s1") for line in COMMANDS),
        *((line, "v7b.pth", "is not an RWKV-7b model: it has no tensor blocks.0.qkv.k1") for line in COMMANDS),
        *((line, "no_v0.pth", "1 missing tensors (blocks.1.att.v0); take the file as") for line in COMMANDS),
    ],
)
def test_what_is_of_another_generation_is_refused_by_every_command(wrong, monkeypatch, capsys, line, file, words):
    monkeypatch.chdir(wrong)
    monkeypatch.setattr("sys.argv", ["rwkv-peft", *line.format(file).split()])
    before = sorted(path.name for path in wrong.iterdir())
    with pytest.raises(SystemExit) as ended:
        commands.run()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words in error and error.count("\n") == 1, error
    assert sorted(path.name for path in wrong.iterdir()) == before


DEEP = "--peft none --n_layer 2 --n_embd 64 --dim_ffn 64 --vocab_size 257 --precision fp32 --lr_init 1e-3".split()
ADAPTED = {  # in segments, with states and the gate beside its adapter; and of packed rows, under ZeRO-3
    "x070a": "--train_type infctx --chunk_ctx 7 --train_parts state time --precision fp32 --lr_init 1e-3 --grad_cp 1",
    "x070b": "--dataload pack --strategy deepspeed_stage_3 --precision fp32 --lr_init 1e-2 --grad_cp 1",
}
PROMPTS = ("\x05\x0c", "\x01\x08\x0f\x16\x1d")
EACH = pytest.mark.parametrize("version", ADAPTED)


@pytest.fixture(scope="module")
def bases(files, train):
    """{version: a new model after a few steps, so that all that starts at zero has moved}."""
    for version in ADAPTED:
        train(version, "--load_model", "", "--my_testing", version, *DEEP, "--epoch_count", "1")
    return {version: files / version / "rwkv.pth" for version in ADAPTED}


@pytest.fixture(scope="module")
def adapters(files, bases, train):
    """{version: a run that recomputes blocks, resumed half way}."""
    for version, base in bases.items():
        on_base = (f"run-{version}", "--load_model", str(base), *ADAPTED[version].split())
        train(*on_base, "--epoch_count", "1")
        out, _ = train(*on_base, "--resume")
        assert f"RWKV-7{version[-1]}" in out
        assert len(metrics(files, on_base[0])) == 8
    return {version: files / f"run-{version}" for version in ADAPTED}


@pytest.mark.parametrize("version, part, count", [("x070a", ".ffn.s", 10), ("x070b", ".qkv.", 2 * 18)])
def test_a_new_model_learns_with_all_its_tensors(files, bases, version, part, count):
    model, losses = open_base(bases[version]), [line["loss"] for line in metrics(files, version)]
    assert model.family.version == version and losses[-1] < losses[0]
    own = [tensor for key, tensor in model.tensors.items() if part in key]
    assert len(own) == count and all(tensor.any() for tensor in own)


def test_an_adapter_leaves_the_tables_as_they_are(bases, adapters):
    trained = load_file(adapters["x070a"] / "adapter.safetensors")
    before = open_base(bases["x070a"]).tensors
    kinds = {key.split(".", 2)[2] for key in trained}
    assert kinds >= {"ffn.key.bone", "ffn.s0", "ffn.s1", "ffn.s2", "att.time_state"}
    assert not any("s_emb" in kind for kind in kinds)
    assert not any(trained[key].equal(before[key]) for key in before if key.rpartition(".")[2] in ("s0", "s1", "s2"))
    assert "blocks.1.qkv.qq.bone" in load_file(adapters["x070b"] / "adapter.safetensors")


def answers(tmp_path, *words):
    asked = ("--tokenizer", "bytes", "--max_tokens", "12", "--temperature", "0", "--output", tmp_path / "answers.jsonl")
    commands.main(["generate", *map(str, (*words, *asked))])
    return [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]


@EACH
def test_what_is_merged_answers_as_base_and_adapter_do(bases, adapters, tmp_path, version):
    of_base = ["--base_model", str(bases[version]), "--bone_checkpoint", str(adapters[version])]
    merged, state = tmp_path / "merged.pth", tmp_path / "state.pth"
    states = ("--state_output", str(state)) if version == "x070a" else ()
    assert merge([*of_base, "--output", str(merged), *states]) == 0
    if version == "x070a":  # against the `rwkv` package, which computes deep embeddings by itself
        assert check([*of_base, "--merged", str(merged), "--state", str(state), "--tokens", "20"]) == 0
    else:
        with pytest.raises(UserError, match="is an RWKV-7b, and check runs the rwkv package, which takes only"):
            check([*of_base, "--merged", str(merged)])
    whole = ("--model", merged, *(("--state", state) if states else ()))
    alone = [answers(tmp_path, *whole, "--prompt", prompt)[0] for prompt in PROMPTS]
    assert answers(tmp_path, *whole, "--prompt", *PROMPTS) == alone
    taken = ("--model", bases[version], "--adapter", adapters[version])
    assert [answers(tmp_path, *taken, "--prompt", prompt)[0] for prompt in PROMPTS] == alone


@pytest.mark.parametrize("flags", ["--train_type infctx", "--context_parallel 2 --devices 2"])
def test_what_hands_on_states_of_one_size_is_refused(files, bases, flags):
    argv = ["--load_model", str(bases["x070b"]), "--data_file", str(files / "data"), "--proj_dir", "out"]
    with pytest.raises(UserError, match="states of one size, and those of RWKV-7b grow with the tokens"):
        parse_run([*argv, *flags.split()])
