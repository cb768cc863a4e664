"""RWKV-7 with attention over deep embeddings by the commands that a user types: made, trained, merged, asked."""

import json

import pytest
from safetensors.torch import load_file

from rwkv_peft import commands
from rwkv_peft.errors import UserError
from rwkv_peft.files.base import open_base
from rwkv_peft.release.check import main as check
from rwkv_peft.release.merge_command import main as merge
from rwkv_peft.training.flags.request import parse_run
from training.runs import metrics

NEW = ("--load_model", "", "--my_testing", "x070b", "--peft", "none", "--precision", "fp32", "--epoch_count", "1")
SIZES = ("--n_layer", "2", "--n_embd", "64", "--dim_ffn", "64", "--vocab_size", "257")
ADAPTED = ("--precision", "fp32", "--lr_init", "1e-2", "--dataload", "pack")
PROMPTS = ("\x05\x0c", "\x01\x08\x0f\x16\x1d")


@pytest.fixture(scope="module")
def base(files, train):
    """A new model after a few steps, so that all that starts at zero has moved."""
    train("new", *NEW, *SIZES, "--lr_init", "1e-3")
    return files / "new" / "rwkv.pth"


@pytest.fixture(scope="module")
def adapter(files, base, train):
    """A run of packed rows that recomputes blocks under ZeRO-3, resumed half way."""
    on_base = ("--load_model", str(base), *ADAPTED, "--strategy", "deepspeed_stage_3", "--grad_cp", "1")
    train("run", *on_base, "--epoch_count", "1")
    out, _ = train("run", *on_base, "--resume")
    assert "RWKV-7b" in out and "all blocks plain" in out
    return files / "run"


def test_a_new_model_learns_with_all_its_tensors(files, base):
    model, losses = open_base(base), [line["loss"] for line in metrics(files, "new")]
    assert model.family.version == "x070b" and losses[-1] < losses[0]
    own = [tensor for key, tensor in model.tensors.items() if ".qkv." in key]
    assert len(own) == 2 * 18 and all(tensor.any() for tensor in own)


def test_what_is_merged_answers_as_base_and_adapter_do_and_is_taken_apart_again(files, base, adapter, tmp_path):
    assert "blocks.1.qkv.qq.bone" in load_file(adapter / "adapter.safetensors") and len(metrics(files, "run")) == 8
    of_base, merged = ["--base_model", str(base), "--bone_checkpoint", str(adapter)], tmp_path / "merged.pth"
    assert merge([*of_base, "--output", str(merged)]) == 0
    with pytest.raises(UserError, match="is an RWKV-7b, and check asks the rwkv package, which takes only"):
        check([*of_base, "--merged", str(merged)])
    apart = ["--unmerge", "--base_model", str(merged), "--bone_checkpoint", str(adapter), "--output"]
    assert merge([*apart, str(tmp_path / "unmerged.pth")]) == 0
    before, after = open_base(base).tensors, open_base(tmp_path / "unmerged.pth").tensors
    assert all(tensor.allclose(after[key], atol=1e-5) for key, tensor in before.items())
    together, alone = tmp_path / "together.jsonl", tmp_path / "alone.jsonl"
    asked = ("--tokenizer", "bytes", "--max_tokens", "12", "--temperature", "0", "--output")
    commands.main(["generate", "--model", str(merged), "--prompt", *PROMPTS, *asked, str(together)])
    answers = [json.loads(line) for line in together.read_text().splitlines()]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        way = ("--model", str(base), "--adapter", str(adapter), "--prompt", prompt)
        commands.main(["generate", *way, *asked, str(alone)])
        assert json.loads(alone.read_text()) == answer


@pytest.mark.parametrize("flags", ["--train_type infctx", "--context_parallel 2 --devices 2"])
def test_what_hands_on_states_of_one_size_is_refused(files, base, flags):
    argv = ["--load_model", str(base), "--data_file", str(files / "data"), "--proj_dir", "out", *flags.split()]
    with pytest.raises(UserError, match="states of one size, and those of RWKV-7b grow with the tokens"):
        parse_run(argv)
