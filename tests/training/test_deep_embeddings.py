"""RWKV-7 with deep embeddings by the commands that a user types: made, trained, resumed, merged, asked."""

import json

import pytest
from safetensors.torch import load_file

from rwkv_peft import commands
from rwkv_peft.errors import UserError
from rwkv_peft.files.base import open_base
from rwkv_peft.release.check import main as check
from rwkv_peft.release.merge_command import main as merge
from training.runs import metrics

NEW = ("--load_model", "", "--my_testing", "x070a", "--peft", "none", "--precision", "fp32", "--epoch_count", "1")
SIZES = ("--n_layer", "2", "--n_embd", "64", "--dim_ffn", "64", "--vocab_size", "257")
ADAPTED = (
    "--train_type",
    "infctx",
    "--chunk_ctx",
    "7",
    "--train_parts",
    "state",
    "time",
    "--precision",
    "fp32",
    "--lr_init",
    "1e-3",
)


@pytest.fixture(scope="module")
def base(files, train):
    """A new model after a few steps, so that all that starts at zero has moved."""
    train("new", *NEW, *SIZES, "--lr_init", "1e-3")
    return files / "new" / "rwkv.pth"


@pytest.fixture(scope="module")
def adapter(files, base, train):
    """A run in segments, with states and the gate beside its adapter, resumed half way."""
    on_base = ("--load_model", str(base), *ADAPTED, "--grad_cp", "1")
    train("run", *on_base, "--epoch_count", "1")
    out, _ = train("run", *on_base, "--resume")
    assert "RWKV-7a" in out and "all blocks plain" in out
    return files / "run"


def test_a_new_model_learns_with_all_its_tensors(files, base):
    model, losses = open_base(base), [line["loss"] for line in metrics(files, "new")]
    assert model.family.version == "x070a" and losses[-1] < losses[0]
    own = [tensor for key, tensor in model.tensors.items() if ".ffn.s" in key]
    assert len(own) == 10 and all(tensor.any() for tensor in own)


def test_an_adapter_leaves_the_tables_as_they_are(files, base, adapter):
    trained, before = load_file(adapter / "adapter.safetensors"), open_base(base).tensors
    kinds = {key.split(".", 2)[2] for key in trained}
    assert kinds >= {"ffn.key.bone", "ffn.s0", "ffn.s1", "ffn.s2", "att.time_state"}
    assert not any("s_emb" in kind for kind in kinds)
    assert not any(trained[key].equal(before[key]) for key in before if key.rpartition(".")[2] in ("s0", "s1", "s2"))
    assert len(metrics(files, "run")) == 8


def test_what_is_merged_answers_as_base_and_adapter_do(base, adapter, tmp_path):
    of_base = ["--base_model", str(base), "--bone_checkpoint", str(adapter)]
    merged, state = tmp_path / "merged.pth", tmp_path / "state.pth"
    assert merge([*of_base, "--output", str(merged), "--state_output", str(state)]) == 0
    # against the `rwkv` package, which computes deep embeddings by itself
    assert check([*of_base, "--merged", str(merged), "--state", str(state), "--tokens", "20"]) == 0
    asked = ("--tokenizer", "bytes", "--prompt", "\x05\x0c", "--max_tokens", "12", "--temperature", "0")
    ways = (("--model", base, "--adapter", adapter), ("--model", merged, "--state", state))
    answers = []
    for number, way in enumerate(ways):
        commands.main(["generate", *map(str, way), *asked, "--output", str(tmp_path / f"{number}.jsonl")])
        answers.append(json.loads((tmp_path / f"{number}.jsonl").read_text()))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["model.st", "model.gguf", "folder"])
def test_formats_without_a_form_for_it_say_so(base, tmp_path, name):
    vocabulary = () if name == "model.st" else ("--tokenizer", "bytes")
    with pytest.raises(UserError, match="RWKV-7a has no form as .* here; take a .pth"):
        commands.main(["convert", str(base), str(tmp_path / name), *vocabulary])
    assert not (tmp_path / name).exists()
