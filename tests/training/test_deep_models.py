"""RWKV-7 with deep embeddings (x070a), and with attention over them too (x070b), by the commands that a user types:
made, trained, resumed, merged, asked."""

import json

import pytest
from safetensors.torch import load_file

from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError
from rwkv_peft.release.check import main as check
from rwkv_peft.release.merge import main as merge
from rwkv_peft.training.flags.request import parse_run
from training.runs import metrics

NEW = "--peft none --n_layer 2 --n_embd 64 --dim_ffn 64 --vocab_size 257 --precision fp32 --lr_init 1e-3".split()
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
        train(version, "--load_model", "", "--my_testing", version, *NEW, "--epoch_count", "1")
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
