"""Mistakes in a command of demo/bone_finetuning.py, and refusals by machine, hub and folder, are reported before work
starts."""

import json
import shutil

import pytest
from finetuning import run

from rwkv_peft.errors import UserError
from rwkv_peft.files.lock import alone_in


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--bits", "int3"), "--bits int3 is unknown; give bf16, fp16, fp32, nf4, int8"),
        (("--dataset_field", "query", "reply"), "has no column reply; it has query, response"),
        (("--dataset_field", "a", "b", "c"), "or one of turns, and got a b c"),
        (("--dataset_field", "query", "query"), "takes two columns, question and answer, .* and got query query"),
        (("--warmup_ratio", "1"), "--warmup_ratio 1 is no share of the steps; .*below 1.* --warmup_steps"),
        (("--warmup_ratio=30",), "--warmup_ratio 30 is no share of the steps"),
        (("--eval_strategy", "epoch"), "--eval_strategy epoch validates on rows .* --eval_split test; give that too"),
        (("--eval_split", "train[:2]"), "--eval_split train\\[:2\\] is read at --eval_strategy steps or epoch"),
        (("--eval_split", "nope", "--eval_strategy", "epoch"), '--eval_split nope: .*"nope"'),
        (("--eval_on_start", "True"), "--eval_on_start validates on rows"),
        (("--adam_beta1", "2"), "these arguments: Invalid beta parameter at index 0: 2.0"),
        (("--lr_scheduler_type", "cosine_with_min_lr"), "these arguments: .*min_lr"),
        (("--dataset_kwargs", '{"skip_prepare_dataset": true}'), "leave skip_prepare_dataset out"),
        (("--config", "run.yaml"), "there is no --config here; it is given by flags, each by itself"),
        (("--lora_r", "8"), "there is no --lora_r here; it is --bone_r"),
        (("--load_best_model_at_end", "True"), "finds the best by validating; give --eval_split and --eval_strategy"),
        (("--learning_rat", "1"), "there is no --learning_rat; did you mean --learning_rate"),
        (("--bone_r", "many"), "invalid int value: 'many'"),
        (("--init_weights", "bad"), "init_weights='bad' is unknown"),
        (("--data_path", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("--base_model_name_or_path", "./nowhere"), "--base_model_name_or_path ./nowhere: "),
        (("--dataset_split", "train[:0]"), "corresponds to no data"),
        (("--target_modules", "q_prog"), "q_prog matches no linear layer; there are .*q_proj"),
        (("--target_modules", "all-linear", "q_proj"), "all-linear goes with no other names"),
        (("--data_path", "nowhere"), "--data_path nowhere is no folder .* the hub cannot be reached"),
        (("--resume_from_checkpoint", "True"), "has no checkpoint"),
        (("--resume_from_checkpoint", "nowhere"), "nowhere is no folder with an adapter_config.json"),
        (("--bf16", "True", "--fp16", "True"), "these arguments: .*(fp16|bf16)"),
        (("--gradient_accumulation_steps", "0"), "--gradient_accumulation_steps 0 is no number of batches"),
        (("--model_init_kwargs", '{"dtype": "float32"}'), "gives dtype, and --bits says"),
        (("--model_init_kwargs", '{"attn_implementation": "nope"}'), "--base_model_name_or_path .*: .*nope"),
        (("--per_device_train_batch_size", "0"), "--per_device_train_batch_size 0 is no number of rows"),
        (("--max_length", "-1"), "--max_length -1 is no number of tokens"),
        (("--learning_rate", "nan"), "--learning_rate nan is no rate"),
        (("--max_grad_norm", "nan"), "--max_grad_norm nan is no norm"),
        (("--weight_decay", "-1"), "--weight_decay -1.0 is no decay"),
        (("--dataloader_num_workers", "-1"), "--dataloader_num_workers -1 is no number of processes"),
        (("--num_train_epochs", "0"), "--num_train_epochs 0.0 trains nothing"),
        (("--report_to", "dvclive"), "--report_to dvclive: .*; --report_to none does without"),
        (("--lr", "1"), "there is no --lr here; it is --learning_rate"),
        (("--resume", "True"), "there is no --resume here; it is --resume_from_checkpoint True"),
        (("--base_model_name_or_path", "."), "--base_model_name_or_path . has no config.json"),
        (("--max_length", "2"), "has a token of an answer within --max_length 2"),
        (("--max_seq_length", "64", "--max-length", "32"), "two names of one argument"),
    ],
)
def test_a_mistake_is_answered(tiny, tmp_path, monkeypatch, flags, message):
    """Without a hub, for which datasets else waits through its repeated attempts."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        run(tiny, tmp_path, *flags)


@pytest.mark.parametrize(
    "rows, message",
    [
        ("", "is empty"),
        ('{"query": "a", "response": null}', "row 1 of .* has no response"),
        ('{"query": "a", "response": "b"}\n{"query": "a"}', "row 2 of .* has no response"),
        ('{"query": "a", "response": ["b"]}', "row 1 of .* has a list for its response, and text is due"),
        ('{"talk": []}', "no column query, response; it has talk: name two of them with --dataset_field"),
        ('{"query": ', "--data_path .*rows.jsonl: "),
        ('{"query": "\xff", "response": "b"}', "--data_path .*rows.jsonl: .*can't decode byte 0xff"),
    ],
)
def test_rows_that_cannot_be_learned_are_refused(tiny, tmp_path, rows, message):
    (tmp_path / "rows.jsonl").write_text(rows, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        run(tiny, tmp_path / "out", "--data_path", str(tmp_path / "rows.jsonl"))


def test_a_kernel_that_is_not_installed_is_told_before_the_model_loads(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda *_: False)
    with pytest.raises(UserError, match="--use_liger_kernel needs a package that is missing"):
        run(tmp_path, tmp_path, "--use_liger_kernel", "True")


def test_a_folder_that_holds_a_run_is_refused(tiny, tmp_path):
    run(tiny, tmp_path, "--max_steps", "1")
    adapter = tmp_path / "bone_ft" / "adapter_model.safetensors"
    trained = adapter.read_bytes()
    with pytest.raises(UserError, match=r"already holds a run \(bone_ft\); name another folder, or remove it"):
        run(tiny, tmp_path, "--max_steps", "2", "--overwrite_output_dir")
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(UserError, match="add --resume_from_checkpoint True to continue it, name another"):
        run(tiny, tmp_path, "--max_steps", "2")
    assert adapter.read_bytes() == trained


def test_an_output_folder_that_cannot_serve_is_told(tiny, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write .*: a file stands where .* should be; choose another folder"):
        run(tiny, tmp_path / "file" / "out")
    with pytest.raises(UserError, match="--output_dir .*model is the folder of --base_model_name_or_path; name "):
        run(tiny, tiny / "model")
    assert (tmp_path / "file").read_text() == "mine"


def test_offloading_without_an_accelerator_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(UserError, match="--activation_offloading True .* this machine has none; leave it out"):
        run(tmp_path, tmp_path, "--activation_offloading", "True")


def test_a_folder_in_which_a_run_is_training_is_refused(tiny, tmp_path):
    refusal = r"--output_dir .*out: a run is training there \(process \d+ on .*\); wait"
    with alone_in(tmp_path / "out"), pytest.raises(UserError, match=refusal):
        run(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hub_that_does_not_answer_is_told_before_the_work(tmp_path, monkeypatch):
    def fail(token):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.whoami", fail)
    with pytest.raises(UserError, match=r"--push_to_hub: the hub cannot be reached, or knows no login \(no route\)"):
        run(tmp_path, tmp_path / "out", "--push_to_hub", "True")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_padding_and_end_is_told(tiny, tmp_path):
    model = shutil.copytree(tiny / "model", tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("pad_token"), settings.pop("eos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="has neither an eos_token nor a pad_token, .* tokenizer_config.json"):
        run(tiny, tmp_path / "out", "--base_model_name_or_path", str(model))
