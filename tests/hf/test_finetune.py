"""demo/bone_finetuning.py's command, and the method's quick start in Python."""

import json
import shutil
import signal

import pytest
import torch

import tiny_llama
from rwkv_peft.errors import UserError
from rwkv_peft.files.alone import alone_in
from rwkv_peft.hf import BoneConfig, finetune, finetune_data, finetune_flags

QUIET = (
    "--report_to",
    "none",
    "--logging_steps",
    "1",
    "--save_strategy",
    "no",
    "--disable_tqdm",
    "True",
    "--dataloader_pin_memory",
    "False",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The model folder and data file that scripts/bone_llama.sh makes."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama.write_model(folder / "model")
    tiny_llama.write_data(folder / "data.jsonl", 32)
    return folder


def run(tiny, output, *flags):
    return finetune.main(
        [
            "--base_model_name_or_path",
            str(tiny / "model"),
            "--data_path",
            str(tiny / "data.jsonl"),
            "--output_dir",
            str(output),
            "--bone_r",
            "16",
            *QUIET,
            *flags,
        ]
    )


def losses(output):
    return [
        row["loss"] for row in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in row
    ]


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_commands_flags_train_save_and_merge(tiny, tmp_path, capsys):
    from peft import PeftModel
    from trl import SFTConfig

    assert (
        run(
            tiny,
            tmp_path,
            "--bits",
            "fp32",
            "--init_weights",
            "bat-in",
            "--merge_and_save",
            "--dataset_split",
            "train[:100000]",
            "--dataset_field",
            "query",
            "response",
            "--max_steps",
            "8",
            "--per_device_train_batch_size",
            "4",
            "--learning_rate",
            "1e-2",
            "--weight_decay",
            "0.",
            "--warmup_ratio",
            "0.03",
            "--max_seq_length",
            "128",
            "--tf32",
            "True",
        )
        == 0
    )
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
    assert (
        run(
            tiny,
            tmp_path,
            "--bits",
            bits,
            "--init_weights",
            "bat-in",
            "--merge_and_save",
            "--max_steps",
            "4",
            "--per_device_train_batch_size",
            "4",
            "--learning_rate",
            "1e-2",
            "--bf16",
            "True",
        )
        == 0
    )
    trace = losses(tmp_path)
    assert trace[-1] < trace[0] - 0.1
    assert all(torch.isfinite(tensor).all() for tensor in load(tmp_path / "bone_merged").state_dict().values())


def test_the_quick_start(tiny, tmp_path):
    from datasets import load_dataset
    from peft import PeftModel, get_peft_model
    from trl import SFTConfig, SFTTrainer

    model = get_peft_model(load(tiny / "model"), BoneConfig(r=16, target_modules="all-linear"))
    data = load_dataset("json", data_files=str(tiny / "data.jsonl"), split="train").rename_columns(
        {"query": "prompt", "response": "completion"}
    )
    from transformers import AutoTokenizer

    config = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(tiny / "model")
    )
    trainer.train()
    model.save_pretrained(tmp_path / "bone")
    again = PeftModel.from_pretrained(load(tiny / "model"), tmp_path / "bone")
    trained, loaded = model.state_dict(), again.state_dict()
    assert trained.keys() == loaded.keys() and all(torch.equal(trained[key], loaded[key]) for key in trained)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert (again(ids).logits - load(tiny / "model")(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--bits", "int3"), "--bits int3 is unknown; give bf16, fp16, fp32, nf4, int8"),
        (("--dataset_field", "query", "reply"), "has no column reply; it has query, response"),
        (("--dataset_field", "query"), "takes two columns"),
        (("--dataset_field", "query", "query"), "takes two columns, question and answer, and got query query"),
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
        (("--target_modules", "all-linear", "q_proj"), "all-linear stands alone"),
        (("--data_path", "nowhere"), "--data_path nowhere"),
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
def test_a_mistake_is_answered(tiny, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run(tiny, tmp_path, *flags)


@pytest.mark.parametrize(
    "rows, message",
    [
        ("", "is empty"),
        ('{"query": "a", "response": null}', "row 1 of .* has no response"),
        ('{"query": "a", "response": "b"}\n{"query": "a"}', "row 2 of .* has no response"),
        ('{"query": "a", "response": ["b"]}', "row 1 of .* has a list for its response, and text is due"),
        ('{"messages": []}', "no column query, response; it has messages: write two such columns, and name them with"),
        ('{"query": ', "--data_path .*rows.jsonl: "),
        ('{"query": "\xff", "response": "b"}', "--data_path .*rows.jsonl: .*can't decode byte 0xff"),
    ],
)
def test_rows_that_cannot_be_learned_are_refused(tiny, tmp_path, rows, message):
    (tmp_path / "rows.jsonl").write_text(rows, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        run(tiny, tmp_path / "out", "--data_path", str(tmp_path / "rows.jsonl"))


def test_arguments_about_loading_the_model_reach_it(tmp_path):
    _, config = finetune_flags.parse(
        [
            "--base_model_name_or_path",
            "model",
            "--data_path",
            "data",
            "--output_dir",
            str(tmp_path),
            "--model_init_kwargs",
            '{"revision": "main"}',
        ]
    )
    config.trust_remote_code = True  # an argument of newer trl alone
    assert finetune_flags.model_settings(config) == {"revision": "main", "trust_remote_code": True}
    assert config.model_init_kwargs is None  # or trl would say that they are ignored


def test_an_adapter_that_diverged_is_not_saved(tiny, tmp_path):
    with pytest.raises(UserError, match="training has diverged: .* is not finite, .* lower --learning_rate 1e\\+30"):
        run(tiny, tmp_path, "--bits", "fp32", "--max_steps", "3", "--learning_rate", "1e30")
    assert not (tmp_path / "bone_ft").exists()


def test_a_kernel_that_is_not_installed_is_told_before_the_model_loads(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda *_: False)
    with pytest.raises(UserError, match="--use_liger_kernel needs a package that is missing"):
        run(tmp_path, tmp_path, "--use_liger_kernel", "True")


def test_a_data_file_is_known_by_its_ending(tiny, tmp_path):
    for name in ("rows.JSONL", "rows.tsv"):
        (tmp_path / name).write_bytes((tiny / "data.jsonl").read_bytes())
    arguments = finetune.BoneArguments("model", str(tmp_path / "rows.JSONL"))
    assert len(finetune_data.load_data(arguments, "dataset_split", "</s>")) == 32
    arguments.data_path = str(tmp_path / "rows.tsv")
    with pytest.raises(UserError, match="rows.tsv is no .jsonl, .json, .csv or .parquet file"):
        finetune_data.load_data(arguments, "dataset_split", "</s>")


def test_a_folder_of_save_to_disk_is_read(tiny, tmp_path):
    from datasets import load_dataset

    load_dataset("json", data_files=str(tiny / "data.jsonl"), split="train").save_to_disk(tmp_path / "rows")
    arguments = finetune.BoneArguments("model", str(tmp_path / "rows"), dataset_split="train[2:5]")
    rows = finetune_data.load_data(arguments, "dataset_split", "</s>")
    arguments.data_path = str(tiny / "data.jsonl")
    assert rows.to_list() == finetune_data.load_data(arguments, "dataset_split", "</s>").to_list() and len(rows) == 3


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
        "--bits",
        "nf4",
        "--per_device_train_batch_size",
        "4",
        "--learning_rate",
        "1e-2",
        "--lr_scheduler_type",
        "constant",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
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
    flags = [
        "--warmup_ratio",
        "0.03",
        "--tf32",
        "True",
        "--warmup_ratio",
        "0.1",
        "--tf32",
        "True",
    ]  # the last one counts
    assert finetune_flags.adapt(flags, {"warmup_steps"}, accelerator=True, cuda=False) == [
        "--warmup_steps",
        "0.03",
        "--warmup_steps",
        "0.1",
    ]
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
    with pytest.raises(
        UserError, match="--output_dir .*model is the folder of --base_model_name_or_path; name another"
    ):
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


def test_a_tokenizer_without_padding_and_end_is_told(tiny, tmp_path):
    model = shutil.copytree(tiny / "model", tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("pad_token"), settings.pop("eos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="has neither an eos_token nor a pad_token, .* tokenizer_config.json"):
        run(tiny, tmp_path / "out", "--base_model_name_or_path", str(model))
