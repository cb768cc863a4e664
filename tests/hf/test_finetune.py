"""The command of demo/bone_finetuning.py: training, saving, resuming, ZeRO-3 and its mistakes."""

import ast
import inspect
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from bone_runs import arguments, load, losses, run
from bone_runs import losses as losses_of

import tiny_llama
from rwkv_peft.cli.errors import UserError
from rwkv_peft.hf import finetune
from training.runs import finish, start


def test_the_commands_flags_train_save_and_merge(tiny, tmp_path, capsys):
    from peft import PeftModel

    flags = (
        *"--bits fp32 --init_weights bat-in --merge_and_save --dataset_split train[:100000]".split(),
        *"--dataset_field query response --max_steps 8 --per_device_train_batch_size 4".split(),
        *"--learning_rate 1e-2 --weight_decay 0. --warmup_ratio 0.03 --max_seq_length 128 --tf32 True".split(),
    )
    assert run(tiny, tmp_path, *flags) == 0
    assert "trainable params: 35,840 ||" in capsys.readouterr().out
    trace = losses(tmp_path)
    assert trace[-1] < trace[0] - 0.3
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(load(tiny / "model"), tmp_path / "bone_ft")(ids).logits
        torch.testing.assert_close(load(tmp_path / "bone_merged")(ids).logits, adapted, atol=1e-4, rtol=1e-4)
        assert (load(tiny / "model")(ids).logits - adapted).abs().max() > 0.1


@pytest.mark.parametrize("bits", ("nf4", "int8", "bf16"))
def test_every_kind_of_base_trains_and_merges(tiny, tmp_path, bits):
    if bits != "bf16":
        pytest.importorskip("bitsandbytes")
    flags = f"--bits {bits} --init_weights bat-in --merge_and_save --max_steps 4 --learning_rate 1e-2 --bf16 True"
    assert run(tiny, tmp_path, *flags.split(), "--per_device_train_batch_size", "4") == 0
    trace = losses(tmp_path)
    assert trace[-1] < trace[0] - 0.1
    assert all(torch.isfinite(tensor).all() for tensor in load(tmp_path / "bone_merged").state_dict().values())


def test_a_run_resumes_from_its_checkpoint_and_is_not_written_over(tiny, tmp_path):
    flags = (
        *"--bits fp32 --per_device_train_batch_size 4 --learning_rate 1e-2".split(),
        *"--lr_scheduler_type constant --save_strategy steps --save_steps 2".split(),
    )
    run(tiny, tmp_path / "whole", *flags, "--max_steps", "4")
    run(tiny, tmp_path / "parts", *flags, "--max_steps", "2")
    with pytest.raises(UserError, match=r"holds a run \(bone_ft\); add --resume_from_checkpoint True"):
        run(tiny, tmp_path / "parts", *flags, "--max_steps", "4")
    run(tiny, tmp_path / "parts", *flags, "--max_steps", "4", "--resume_from_checkpoint", "True")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    with pytest.raises(UserError, match="--resume_from_checkpoint True: there is no checkpoint .*none"):
        run(tiny, tmp_path / "none", *flags, "--resume_from_checkpoint", "True")


def test_chats_are_learned_as_trl_reads_them(tiny, tmp_path):
    from transformers import AutoTokenizer

    model = shutil.copytree(tiny / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer.save_pretrained(model)
    chat = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 8)
    words = ("--base_model_name_or_path", str(model), "--data_path", str(tmp_path / "chats.jsonl"), "--max_steps", "3")
    assert run(tiny, tmp_path / "out", *words, "--bits", "fp32", "--learning_rate", "1e-2") == 0
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--bits", "int3"), "--bits int3 is unknown; give bf16, fp16, fp32, nf4, int8"),
        (("--dataset_field", "query", "reply"), "has no column reply; it has query, response"),
        (("--dataset_field", "query", "query"), "two columns are due, question and answer"),
        (("--learning_rat", "1"), "there is no --learning_rat; did you mean --learning_rate"),
        (("--bone_r", "many"), "invalid int value: 'many'; see bone_finetuning.py --help"),
        (("--init_weights", "bad"), "init_weights='bad' is unknown"),
        (("--data_path", "ROWS"), "row 2 of .*rows.jsonl: response is NoneType, and text is due"),
        (("--data_path", "LABELS"), "row 2 of .*labels.jsonl has the label false, and here every answer is learned"),
        (("--data_path", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("--base_model_name_or_path", "./nowhere"), "--base_model_name_or_path ./nowhere: "),
        (("--dataset_split", "nope"), '--data_path .*, split nope: .*"nope"'),
        (("--target_modules", "q_prog"), "these arguments: .*q_prog"),
        (("--bf16", "True", "--fp16", "True"), "these arguments: .*(fp16|bf16)"),
    ],
)
def test_a_mistake_is_answered(tiny, tmp_path, monkeypatch, flags, message):
    """Without a hub, for which datasets else waits through its repeated attempts."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "rows.jsonl").write_text('{"query": "a", "response": "b"}\n{"query": "a"}\n')
    row = {"query": "a", "response": "b"}
    (tmp_path / "labels.jsonl").write_text(
        "".join(json.dumps(row | {"label": label}) + "\n" for label in (True, False))
    )
    files = {"ROWS": tmp_path / "rows.jsonl", "LABELS": tmp_path / "labels.jsonl"}
    with pytest.raises(UserError, match=message):
        run(tiny, tmp_path / "out", *(str(files.get(flag, flag)) for flag in flags))


def test_arguments_are_adapted_to_the_installed_versions():
    flags = ["--warmup_ratio=0.03", "--tf32", "--lr", "1"]
    adapted = finetune.adapt(flags, {"warmup_steps"}, accelerator=False)
    assert adapted == ["--warmup_steps", "0.03", "--tf32", "--lr", "1", "--tf32", "False", "--use_cpu", "True"]
    assert finetune.adapt(["--bits=fp32"], set(), accelerator=True)[-2:] == ["--bf16", "False"]
    flags = ["--run_name", "fp32", "--warmup_ratio", "0.03", "--tf32", "True"]
    assert finetune.adapt(flags, {"warmup_ratio", "warmup_steps"}, accelerator=True) == flags


def test_validation_is_on_the_rows_of_its_split_and_the_best_is_kept(tiny, tmp_path):
    flags = ("--bits", "fp32", "--max_steps", "3", "--learning_rate", "0.3", "--per_device_train_batch_size", "4")
    flags += ("--save_strategy", "steps", "--save_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1")
    split = ("--dataset_split", "train[:28]", "--eval_split", "train[28:]")
    run(tiny, tmp_path, *flags, *split, "--load_best_model_at_end", "True")
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    judged = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    best = tmp_path / f"checkpoint-{min(judged, key=judged.get)}" / "adapter_model.safetensors"
    assert sorted(judged) == [1, 2, 3]
    assert (tmp_path / "bone_ft" / "adapter_model.safetensors").read_bytes() == best.read_bytes()


ZERO_3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def test_the_command_under_accelerates_zero_3_trains_and_merges_as_it_does_alone(tmp_path):
    from safetensors.torch import load_file

    tiny_llama.write_model(tmp_path / "model")
    tiny_llama.write_data(tmp_path / "data.jsonl", 16)
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO_3))
    flags = "--init_weights bat-in --bits fp32 --max_steps 3 --learning_rate 1e-2 --merge_and_save".split()
    run(tmp_path, tmp_path / "plain", *flags)
    flags += ["--deepspeed", str(tmp_path / "zero3.json")]
    command = [sys.executable, str(Path(__file__).with_name("zero3_command.py"))]
    finish(start(command + arguments(tmp_path, tmp_path / "zero3", *flags)))
    losses = [losses_of(tmp_path / name) for name in ("plain", "zero3")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]
    plain, zero = (load_file(tmp_path / name / "bone_merged" / "model.safetensors") for name in ("plain", "zero3"))
    assert plain.keys() == zero.keys()
    for key in plain:
        torch.testing.assert_close(zero[key], plain[key], atol=1e-4, rtol=1e-4)


GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "hugging-face.md"


def test_the_quick_start_names_arguments_of_the_installed_trl():
    trl = pytest.importorskip("trl", minversion="1.0")
    block = next(text for text in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S) if "SFTTrainer(" in text)
    for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
        if call.func.id in ("SFTConfig", "SFTTrainer"):
            known = inspect.signature(getattr(trl, call.func.id)).parameters
            assert {keyword.arg for keyword in call.keywords} <= set(known), call.func.id
