"""The command of demo/bone_finetuning.py: training, saving and resuming; and the quick start in Python."""

import json
import signal

import pytest
import torch
from finetuning import load, losses, run

from rwkv_peft.errors import UserError
from rwkv_peft.hf import finetune, finetune_data, finetune_flags


def test_the_commands_flags_train_save_and_merge(tiny, tmp_path, capsys):
    from peft import PeftModel
    from trl import SFTConfig

    flags = (
        *"--bits fp32 --init_weights bat-in --merge_and_save --dataset_split train[:100000]".split(),
        *"--dataset_field query response --max_steps 8 --per_device_train_batch_size 4".split(),
        *"--learning_rate 1e-2 --weight_decay 0. --warmup_ratio 0.03 --max_seq_length 128 --tf32 True".split(),
    )
    assert run(tiny, tmp_path, *flags) == 0
    said = capsys.readouterr().out
    assert "--max_seq_length is --max_length" in said
    assert ("--warmup_ratio is --warmup_steps" in said) == ("warmup_ratio" not in SFTConfig.__dataclass_fields__)
    assert torch.cuda.is_available() or "--tf32 is for CUDA devices" in said
    assert "trainable params: 35,840 ||" in said
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


def test_arguments_about_loading_the_model_reach_it(tmp_path):
    words = f"--base_model_name_or_path model --data_path data --output_dir {tmp_path} --model_init_kwargs".split()
    _, config = finetune_flags.parse([*words, '{"revision": "main"}'])
    config.trust_remote_code = True  # an argument of newer trl alone
    assert finetune_flags.model_settings(config) == {"revision": "main", "trust_remote_code": True}
    assert config.model_init_kwargs is None  # or trl would say that they are ignored


def test_an_adapter_that_diverged_is_not_saved(tiny, tmp_path):
    with pytest.raises(UserError, match="training has diverged: .* is not finite, .* lower --learning_rate 1e\\+30"):
        run(tiny, tmp_path, "--bits", "fp32", "--max_steps", "3", "--learning_rate", "1e30")
    assert not (tmp_path / "bone_ft").exists()


def tokenizer_of(tiny):
    return finetune.load_tokenizer(str(tiny / "model"), {})


def test_a_data_file_is_known_by_its_ending(tiny, tmp_path):
    for name in ("rows.JSONL", "rows.tsv"):
        (tmp_path / name).write_bytes((tiny / "data.jsonl").read_bytes())
    arguments, tokenizer = finetune.BoneArguments("model", str(tmp_path / "rows.JSONL")), tokenizer_of(tiny)
    assert len(finetune_data.load_data(arguments, "dataset_split", tokenizer)) == 32
    arguments.data_path = str(tmp_path / "rows.tsv")
    with pytest.raises(UserError, match="rows.tsv is no .jsonl, .json, .csv or .parquet file"):
        finetune_data.load_data(arguments, "dataset_split", tokenizer)


def test_a_folder_of_save_to_disk_is_read(tiny, tmp_path):
    from datasets import load_dataset

    load_dataset("json", data_files=str(tiny / "data.jsonl"), split="train").save_to_disk(tmp_path / "rows")
    arguments = finetune.BoneArguments("model", str(tmp_path / "rows"), dataset_split="train[2:5]")
    tokenizer = tokenizer_of(tiny)
    rows = finetune_data.load_data(arguments, "dataset_split", tokenizer)
    arguments.data_path = str(tiny / "data.jsonl")
    assert rows.to_list() == finetune_data.load_data(arguments, "dataset_split", tokenizer).to_list() and len(rows) == 3


def test_rows_that_do_not_fit_are_counted(tiny, tmp_path, capsys):
    lengths = [200, 60, 10, 10]  # of questions in bytes, which are tokens here
    rows = "".join(json.dumps({"query": "x" * length, "response": "y" * 8}) + "\n" for length in lengths)
    (tmp_path / "rows.jsonl").write_text(rows)
    data = ("--data_path", str(tmp_path / "rows.jsonl"), "--max_steps", "1", "--max_length")
    run(tiny, tmp_path / "short", *data, "90")
    said = "--max_length 90, of the 4 rows of --dataset_split: 1 left out, without a token of an answer within it"
    assert f"{said}; 1 as long as it, or cut there\n" in capsys.readouterr().out
    run(tiny, tmp_path / "long", *data, "300")
    assert "--max_length" not in capsys.readouterr().out


def test_a_run_resumes_from_a_checkpoint_of_the_same_settings(tiny, tmp_path):
    flags = (
        *"--bits nf4 --per_device_train_batch_size 4 --learning_rate 1e-2".split(),
        *"--lr_scheduler_type constant --save_strategy steps --save_steps 2".split(),
    )
    pytest.importorskip("bitsandbytes")
    run(tiny, tmp_path / "whole", *flags, "--max_steps", "4")
    run(tiny, tmp_path / "parts", *flags, "--max_steps", "2")
    with pytest.raises(UserError, match="--init_weights bat-in differs from the checkpoint's True"):
        run(tiny, tmp_path / "parts", *flags, "--resume_from_checkpoint", "True", "--init_weights", "bat-in")
    with pytest.raises(
        UserError, match="is one of other layers than this run's, such as .*; give the same --target_modules"
    ):
        run(tiny, tmp_path / "parts", *flags, "--resume_from_checkpoint", "True", "--target_modules", "q_proj")
    run(tiny, tmp_path / "parts", *flags, "--max_steps", "4", "--resume_from_checkpoint", "True")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    adapter = tmp_path / "parts" / "bone_ft"
    with pytest.raises(UserError, match="bone_ft is no folder with .* trainer_state.json; give a checkpoint-N folder"):
        run(tiny, tmp_path / "parts", *flags, "--resume_from_checkpoint", str(adapter))
    (tmp_path / "parts" / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="--resume_from_checkpoint .*checkpoint-2: .*header"):
        run(tiny, tmp_path / "parts", *flags, "--resume_from_checkpoint", str(tmp_path / "parts" / "checkpoint-2"))
    with pytest.raises(UserError, match="is an adapter of .*model; give that model"):
        run(tiny, tmp_path / "again", "--base_model_name_or_path", str(adapter))


def test_arguments_are_adapted_to_the_installed_versions(capsys):
    flags = ["--warmup-ratio=0.03", "--tf32", "--lr", "1", "--overwrite_output_dir"]
    adapted = finetune_flags.adapt(flags, {"warmup_steps"}, accelerator=False, cuda=False)
    assert adapted == ["--warmup_steps", "0.03", "--lr", "1", "--use_cpu", "True"]
    assert len(capsys.readouterr().out.splitlines()) == 3
    flags = "--warmup_ratio 0.03 --tf32 True --warmup_ratio 0.1 --tf32 True".split()  # the last one counts
    assert (
        finetune_flags.adapt(flags, {"warmup_steps"}, accelerator=True, cuda=False)
        == "--warmup_steps 0.03 --warmup_steps 0.1".split()
    )
    capsys.readouterr()
    assert finetune_flags.adapt(["--bits=fp32"], set(), accelerator=True, cuda=True)[-2:] == ["--bf16", "False"]
    flags = ["--run_name", "fp32", "--warmup_ratio", "0.03", "--tf32", "True"]
    assert finetune_flags.adapt(flags, {"warmup_ratio", "warmup_steps"}, accelerator=True, cuda=True) == flags
    assert capsys.readouterr().out == ""


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


def test_ctrl_c_saves_a_checkpoint_that_the_run_goes_on_from(tiny, tmp_path, monkeypatch, capsys):
    from trl import SFTTrainer

    flags = ("--bits", "fp32", "--max_steps", "4", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant")
    run(tiny, tmp_path / "whole", *flags)
    step = SFTTrainer.training_step

    def interrupted(trainer, *arguments, **settings):
        if trainer.state.global_step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(trainer, *arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(SFTTrainer, "training_step", interrupted)
        assert run(tiny, tmp_path / "parts", *flags) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "checkpoint-2 is saved; --resume_from_checkpoint True goes on from there" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "bone_ft").exists()
    run(tiny, tmp_path / "parts", *flags, "--resume_from_checkpoint", "True")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_the_adapter_is_pushed_when_all_is_saved(tiny, tmp_path, monkeypatch):
    from trl import SFTTrainer

    pushed = []

    def upload(api, *, repo_id, folder_path, **settings):
        assert (tmp_path / "bone_merged" / "model.safetensors").is_file()
        pushed.append((repo_id, folder_path))
        if len(pushed) > 1:
            raise ConnectionError("gone")

    monkeypatch.setattr("huggingface_hub.whoami", lambda token: {})
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr(SFTTrainer, "init_hf_repo", lambda trainer: setattr(trainer, "hub_model_id", "me/bone"))
    flags = ("--push_to_hub", "True", "--max_steps", "1", "--merge_and_save")
    assert run(tiny, tmp_path, *flags) == 0 and pushed == [("me/bone", tmp_path / "bone_ft")]
    (tmp_path / "bone_ft").rename(tmp_path / "first")
    with pytest.raises(UserError, match="everything is saved, .*gone.* try again with hf upload me/bone .*bone_ft"):
        run(tiny, tmp_path, *flags)
    assert (tmp_path / "bone_ft" / "adapter_model.safetensors").is_file()
