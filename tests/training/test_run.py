"""train.py as a user runs it: a run's files and output; training under all ZeRO stages, ranks and methods; on streams,
chats and rows of weights.

Each case is a process of its own, because the engine keeps global state.
"""

import json
import os
import re
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch.utils.cpp_extension import _get_build_directory

from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.cli import commands
from rwkv_peft.data.chat import ChatLayout
from rwkv_peft.data.preprocess import main as preprocess
from rwkv_peft.data.recorded import chat_beside
from rwkv_peft.data.token_file_writer import TokenFileWriter
from rwkv_peft.data.tools import TOOL_FORMS
from rwkv_peft.release.merge_command import main as merge
from training.held import held
from training.runs import ROOT, finish, metrics, start


@pytest.fixture(scope="module")
def one_process(train):
    """The run that others are compared with: stage 1, one process, four samples in a step."""
    out, _ = train("one", "--precision", "fp32", "--micro_bsz", "4")
    return out


def test_a_run_leaves_what_it_says(files, one_process):
    folder = files / "one"
    for name in ("config.json", "metrics.jsonl", "loss.png", "adapter.safetensors", "adapter-epoch-1.safetensors"):
        assert (folder / name).stat().st_size > 0, name
    assert any((folder / "tensorboard").iterdir())
    card = (folder / "README.md").read_text()
    assert "| method | Bone bat-in, rank " in card and "| steps | " in card and "--bone_checkpoint adapter" in card
    assert "trainable%" in one_process and "ETA" in one_process and "tokens/s" in one_process
    assert "2 epochs of 4 steps, 4 windows a step" in one_process
    lines = metrics(files, "one")
    assert [line["step"] for line in lines] == list(range(8))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["lr"] == pytest.approx(1e-3)
    tensors = load_file(folder / "adapter.safetensors")
    assert set(tensors) == {
        f"blocks.{i}.{name}.bone"
        for i in range(2)
        for name in "att.receptance att.key att.value att.gate att.output ffn.key ffn.receptance ffn.value".split()
    }
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())


@pytest.mark.parametrize(
    "strategy, ranks, micro, accumulate",
    [("deepspeed_stage_2", 2, 2, 1), ("deepspeed_stage_3", 1, 2, 2), ("deepspeed_stage_3", 2, 1, 2)],
)
def test_stages_ranks_and_micro_batches_train_the_same(files, train, one_process, strategy, ranks, micro, accumulate):
    name = f"{strategy}-{ranks}-{micro}"
    flags = f"--strategy {strategy} --devices {ranks} --micro_bsz {micro} --accumulate_grad_batches {accumulate}"
    train(name, *flags.split(), "--precision", "fp32", "--grad_cp", "1")
    for mine, theirs in zip(metrics(files, name), metrics(files, "one")):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert mine["tokens"] == theirs["tokens"]
    expected = load_file(files / "one" / "adapter.safetensors")
    for key, tensor in load_file(files / name / "adapter.safetensors").items():
        assert (tensor - expected[key]).norm() <= 2e-2 * expected[key].norm(), key


def test_the_tokens_of_a_step_are_those_of_each_rank(files, train):
    """Documents have 10 and 20 tokens in turn: one rank gets the short ones, the other the long ones."""
    with TokenFileWriter(files / "unequal", vocab_size=80) as writer:
        for number in range(8):
            writer.add(list(range(10 + 10 * (number % 2))))
    flags = ("--data_file", str(files / "unequal"), "--dataload", "only", "--data_shuffle", "0", "--epoch_steps", "2")
    train("unequal", *flags, "--epoch_count", "1", "--accumulate_grad_batches", "2", "--devices", "2")
    assert [line["tokens"] for line in metrics(files, "unequal")] == [2 * (9 + 19)] * 2


def test_a_step_in_which_no_token_counts_has_no_loss(files, train):
    with TokenFileWriter(files / "half", vocab_size=80) as writer:
        for answer in (1, 0):
            writer.add(list(range(20)), [answer] * 20)
    flags = ("--data_file", str(files / "half"), "--dataload", "only", "--data_shuffle", "0", "--epoch_steps", "2")
    out, _ = train("half", *flags, "--epoch_count", "1")
    first, second = metrics(files, "half")
    assert first["loss"] > 0 and second["loss"] is None
    assert "step 2/2, no token counts in the loss, lr" in out and (files / "half" / "loss.png").stat().st_size > 10_000


EAGER = """
from torch import nn

from rwkv_peft.cli.commands import run

whole = nn.Module.compile
nn.Module.compile = lambda block, **how: print("compiled") or whole(block, backend="eager", **how)
run("train")
"""


def test_offload_after_a_killed_build_and_compiled_blocks_train_the_same(files, command, one_process, quick_compiler):
    """Blocks are compiled without the C++ that torch would write, which takes a minute."""
    build = Path(_get_build_directory("cpu_adam", verbose=False))
    with FileLock(build / "rwkv_peft.lock"):  # no other run of this machine is in there
        (build / "lock").touch()  # what such a build leaves behind
    (files / "eager.py").write_text(EAGER)
    flags = "--precision fp32 --strategy deepspeed_stage_2_offload --micro_bsz 4 --compile"
    python, _, *words = command("offload", *flags.split())
    out, _ = finish(start([python, str(files / "eager.py"), *words]))
    assert out.splitlines().count("compiled") == 2
    for mine, theirs in zip(metrics(files, "offload"), metrics(files, "one")):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_tensors_of_a_run_that_could_not_save_a_checkpoint_are_not_cleared_away(files, command, one_process):
    """The run's message names their path; --resume auto, which begins anew, must not remove them."""
    size = (files / "one" / "adapter.safetensors").stat().st_size
    argv, hold = command("refused", "--resume", "auto"), files / "hold"
    process = start(held(argv, hold, 1))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2 * size, 2 * size))  # less than the optimizer's state has
    hold.unlink()
    _, said = finish(process, 2)
    folder = files / "refused"
    told = f"error: cannot write {folder}/checkpoints/.step-00000004: .*; the trained tensors are in {folder}/adapter"
    assert re.search(f"^{told}.safetensors; no checkpoint had been saved yet", said, re.M), said
    assert os.listdir(folder / "checkpoints") == []
    kept = (folder / "adapter.safetensors").read_bytes()
    _, said = finish(start(argv), 2)
    assert "already holds adapter.safetensors" in said
    assert (folder / "adapter.safetensors").read_bytes() == kept


def test_a_new_run_continues_from_an_adapter(files, train, one_process):
    flags = "--precision fp32 --micro_bsz 4 --epoch_count 3 --epoch_begin 2 --bone_load".split()
    train("again", *flags, str(files / "one" / "adapter.safetensors"))
    lines = metrics(files, "again")
    assert [line["step"] for line in lines] == [8, 9, 10, 11]
    assert lines[0]["loss"] < metrics(files, "one")[0]["loss"]


def test_a_base_in_a_hugging_face_folder_trains_and_merges_as_its_pth(files, train, one_process):
    base, folder = open_base(files / "base.pth"), files / "hf"
    folder.mkdir()
    save_file(base.family.hf_tensors(base.tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(base.family.hf_settings(base.config)))
    train("of-folder", "--load_model", str(folder), "--precision", "fp32", "--micro_bsz", "4")
    adapters = [load_file(files / run / "adapter.safetensors") for run in ("one", "of-folder")]
    assert all(torch.equal(adapters[1][key], tensor) for key, tensor in adapters[0].items())
    for model in (folder, files / "base.pth"):
        argv = ["--model", model, "--adapter", files / "of-folder", "--output", files / f"merged-{model.name}.pth"]
        assert merge([str(word) for word in argv]) == 0
    assert (files / "merged-hf.pth").read_bytes() == (files / "merged-base.pth.pth").read_bytes()


METHODS = {
    "bone-mini": "--bone_mode bone-mini --bone_r 8 --bone_mini_r 4",
    "bone-signed": "--bone_mode bone-signed --bone_r 16",
    "bat-out nf4": "--bone_mode bat-out --quant nf4 --bone_r 16",
    "pissa": '--peft pissa --pissa_config {"pissa_r":4,"svd_niter":2}',
    **{
        name: f'--peft {name} --lora_config {{"lora_r":4,"lora_alpha":8,"lora_dropout":0.1}}'
        for name in ("lora-plus", "dora", "lora-ga")
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_validates_and_merges(files, train, method):
    """Each in one short run: packed documents, a validation split, the best adapter, and its merge."""
    if "nf4" in method:
        pytest.importorskip("bitsandbytes")
    flags = "--ctx_len 96 --dataload pack --val_split 0.2 --val_every 4 --micro_bsz 2 --epoch_steps 10 --epoch_count 1"
    train(method, *flags.split(), "--lr_init", "3e-3", "--lr_final", "3e-3", *METHODS[method].split())
    losses = {line["step"] + 1: line["val_loss"] for line in metrics(files, method) if "val_loss" in line}
    assert list(losses) == [4, 8, 10] and losses[10] < losses[4]
    best, merged = files / method / "adapter-best.safetensors", files / f"{method}.pth"
    argv = ["--base_model", files / "base.pth", "--bone_checkpoint", best, "--output", merged]
    assert merge(list(map(str, argv))) == 0
    original, result = torch.load(files / "base.pth"), torch.load(merged)
    assert list(original) == list(result)
    assert sum(not torch.equal(original[key], result[key]) for key in original) == 16


def test_rows_of_questions_train_a_new_model_without_preprocessing(files, train):
    rows = [{"query": f"{i} + 1?", "response": str(i + 1)} for i in range(40)]
    (files / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--peft none --n_layer 1 --n_embd 64 --vocab_size 257 --precision fp32 --micro_bsz 8".split()
    flags += f"--data_type sft --tokenizer bytes --sft_field query response --random_seed {2**63 - 1}".split()
    train("scratch", "--load_model", "", *flags, "--data_file", str(files / "rows.jsonl"))
    assert metrics(files, "scratch")[-1]["loss"] < metrics(files, "scratch")[0]["loss"]
    assert open_base(files / "scratch" / "rwkv.pth").tensors["emb.weight"].shape == (257, 64)


def test_a_run_records_the_layout_of_the_chats_in_its_rows(tmp_path, tiny_state, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save(tiny_state(vocab_size=257, dtype=torch.bfloat16), tmp_path / "base.pth")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"query": "a\n\nUser: b", "response": "c"}) + "\n")
    words = [str(rows), "--tokenizer", "bytes", "--output", str(tmp_path / "data"), "--clean_turns", "0"]
    words += ["--tool_form", "hermes"]
    assert preprocess(words) == 0
    of_rows = (str(rows), "--data_type", "sft", "--tokenizer", "bytes")
    runs = (("tokens", (str(tmp_path / "data"),), False, "hermes"), ("rows", of_rows, True, "g1"))
    for name, data, clean, form in runs:
        argv = [
            sys.executable,
            str(ROOT / "train.py"),
            "--load_model",
            str(tmp_path / "base.pth"),
            "--data_file",
            *data,
        ]
        argv += f"--proj_dir {tmp_path / name} --bone_r 16 --epoch_count 1 --accelerator cpu --ctx_len 64".split()
        finish(start(argv))
        due, adapter = ChatLayout("", clean, TOOL_FORMS[form]), tmp_path / name / "adapter.safetensors"
        assert chat_beside(tmp_path / name) == chat_beside(None, adapter) == due
        assert (b"--clean_turns 0" in adapter.read_bytes()) is not clean
        assert f"--tool_form {form}".encode() in adapter.read_bytes()
    assert chat_beside(tmp_path) == ChatLayout()


def test_a_row_of_weight_two_is_as_if_it_stood_there_twice(files, train):
    rows = [np.arange(1, 12 + 5 * number, dtype="<u2") for number in range(3)]
    for name, places, weights in (("weighed", (0, 1, 2), (0, 1, 2)), ("often", (1, 2, 2), (1, 1, 1))):
        with TokenFileWriter(files / f"rows-{name}") as writer:
            for place, weight in zip(places, weights):
                writer.add(rows[place], weight=weight)
        data = str(files / f"rows-{name}")
        flags = "--dataload pad --micro_bsz 3 --precision fp32 --epoch_steps 1 --epoch_count 2 --warmup_steps 0".split()
        out, _ = train(name, "--data_file", data, "--val_data", data, *flags)
        assert ("rows weigh 0 to 2; the loss is the mean by weight" in out) == (name == "weighed")
    for mine, theirs in zip(metrics(files, "weighed"), metrics(files, "often")):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)
    expected = load_file(files / "often" / "adapter.safetensors")
    for key, tensor in load_file(files / "weighed" / "adapter.safetensors").items():
        assert (tensor - expected[key]).norm() <= 1e-2 * expected[key].norm(), key


CHATS = (("2+2?", "2 and 2.", "4"), ("Sky?", "Look up.", "blue\n\nMostly."))
NEW = ("--n_layer", "2", "--n_embd", "64", "--dim_ffn", "64", "--vocab_size", "257")
RATES = ("--lr_init", "5e-3", "--lr_final", "5e-4", "--warmup_steps", "5", "--beta2", "0.99")


@pytest.fixture(scope="module")
def model(files, train):
    """An RWKV-7 that knows two chats by heart: a greeting, an answer with thinking, a farewell."""
    turns = [("Hi", "Yo."), None, ("Bye", "Bye.")]
    rows = []
    for question, thinking, answer in CHATS:
        turns[1] = (question, f"<think>\n{thinking}\n</think>\n{answer}")
        words = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
        rows.append(json.dumps({"messages": words}))
    (files / "chats.jsonl").write_text("\n".join(8 * rows))
    argv = [str(files / "chats.jsonl"), "--output", str(files / "chats"), "--tokenizer", "bytes", "--think", "on"]
    assert commands.main(["preprocess", *argv]) == 0
    data = ("--data_file", str(files / "chats"), "--dataload", "pad", "--ctx_len", "128", "--micro_bsz", "4")
    steps = ("--epoch_steps", "4", "--epoch_count", "25", "--precision", "fp32")
    train("chats", "--load_model", "", "--generation", "7", "--peft", "none", *NEW, *data, *RATES, *steps)
    return files / "chats" / "rwkv.pth"


def test_a_turn_ends_where_the_next_begins_and_the_last_with_the_document(model, capsys):
    asked = "User: Hi\n\nAssistant:"
    prompts = [asked, *(f"{asked} Yo.\n\nUser: {question}\n\nAssistant: <think" for question, _, _ in CHATS)]
    expected = [(" Yo.", "stop"), *((f">\n{thinking}\n</think>\n{answer}", "stop") for _, thinking, answer in CHATS)]
    question, thinking, answer = CHATS[0]
    prompts.append(f"{prompts[1]}>\n{thinking}\n</think>\n{answer}\n\nUser: Bye\n\nAssistant:")
    argv = ["generate", "--model", str(model), "--temperature", "0", "--prompt", *prompts]
    assert commands.main(argv) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["generated"], row["end"]) for row in rows] == [*expected, (" Bye.", "end")]
