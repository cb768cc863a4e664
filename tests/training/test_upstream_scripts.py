"""Scripts of RWKV-LM and RWKV-PEFT run unchanged, on files, a package and a machine that stand in for theirs, or get
all their mistakes in one message."""

import json
import sys

import pytest
import torch

from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.token_file_writer import TokenFileWriter
from rwkv_peft.models.rwkv6.keys import TARGETS
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.run import main
from training.runs import ROOT, finish, start
from training.upstream_scripts import RWKV_LM_SCRIPTS, RWKV_PEFT, RWKV_PEFT_SCRIPTS

SCRIPTS = {f"RWKV-LM {name}": flags for name, flags in RWKV_LM_SCRIPTS.items()}
SCRIPTS |= {f"RWKV-PEFT {name}": flags for name, flags in RWKV_PEFT_SCRIPTS.items()}
# what the other scripts hear, all at once; docs/guides/upstream.md names them
FIRST = ("it is --peft lora", "it is lora_load in", "lora_r in", "lora_alpha in", "lora_dropout in", "--train_parts")
REFUSED = {
    "RWKV-LM v5 run x052": ("x052 is RWKV-5",),
    "RWKV-PEFT demo-lora, the first": (*FIRST, "--quant nf4"),
    "RWKV-PEFT demo-lora": FIRST,
    "RWKV-PEFT demo-pissa": (*FIRST, "it is --peft pissa", "svd_niter in"),
    "RWKV-PEFT infctx": (*FIRST, "it is --peft pissa", "svd_niter in"),
    "RWKV-PEFT training-v6 lisa": tuple(f"no --{name} here; it is LISA's" for name in ("LISA", "lisa_r", "lisa_k")),
    "RWKV-PEFT demo-finetune": ("invalid choice: 'xpu'", "single_device of other tools"),
    "RWKV-PEFT demo-finetune, later": ("invalid choice: 'xpu'", "single of other tools"),
    "RWKV-PEFT run_lora_fp8": ("fp8 of other tools is --quant int8",),
    "RWKV-PEFT run_pissa_fp8": ("fp8 of other tools is --quant int8",),
    "RWKV-PEFT run_sft, 2024": ("hf download meta-math/MetaMathQA --repo-type dataset --local-dir MetaMathQA",),
    "RWKV-PEFT mask_se": ("other keys than mask0 and mask1",),
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A folder with data, and a model of each generation made by stage 1: {version: path}."""
    folder = tmp_path_factory.mktemp("upstream")
    with TokenFileWriter(folder / "data", vocab_size=80) as writer:
        for start in range(30):
            writer.add([1 + (start + 7 * i) % 79 for i in range(40)] + [0])
    (folder / "rows.jsonl").write_text('{"query": "a", "response": "b"}\n')
    for version in ("x060", "x070"):
        size = ["--n_layer", "2", "--n_embd", "128", "--vocab_size", "80"]
        stage = ["--train_stage", "1", "--my_testing", version, "--data_file", str(folder / "data")]
        assert main([*stage, *size, "--proj_dir", str(folder / version)]) == 0
    return folder


@pytest.fixture
def logged_in(tmp_path, monkeypatch):
    """Stand in for an installed wandb that asks for no login."""
    (tmp_path / "wandb.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")


def command(folder, flags, **others):
    """A script's flags as a command line, with stand-ins for its base, its data and its GPUs."""
    settings = flags | {"proj_dir": folder / "run", "accelerator": flags["accelerator"].replace("gpu", "cpu")} | others
    if settings["data_file"] == "data":
        settings["data_file"] = folder / ("data" if flags["data_type"] == "binidx" else "rows.jsonl")
    if settings.get("load_model"):
        version = settings.get("my_testing", "x060")
        settings |= {"load_model": folder / version / "rwkv-init.pth"}
        settings |= {"n_layer": 2, "n_embd": 128, "vocab_size": 80}
    argv = []
    for name, value in settings.items():
        argv.append(f"--{name}")
        if value is not True or name == "enable_progress_bar":
            argv += map(str, value if isinstance(value, tuple) else (value,))
    return argv


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_or_is_told_all_that_keeps_it_from_it(stand_ins, logged_in, capsys, name):
    argv = [*command(stand_ins, SCRIPTS[name]), "--check_flags"]
    if name not in REFUSED:
        assert main(argv) == 0
        assert "these flags can work" in capsys.readouterr().out
        return
    with pytest.raises(UserError) as refusal:
        main(argv)
    told = str(refusal.value).splitlines()
    told = told if len(told) == 1 else told[1:]
    assert len(told) == len(REFUSED[name])
    assert all(any(words in line for line in told) for words in REFUSED[name]), told


@pytest.mark.parametrize("by_file", [False, True])
def test_flags_the_base_and_the_machine_are_refused_together(stand_ins, tmp_path, monkeypatch, by_file):
    """A script on a machine without a login, a GPU and the data, for a base of other dimensions."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    (tmp_path / "wandb.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rwkv-init.pth").symlink_to(stand_ins / "x070/rwkv-init.pth")
    flags = RWKV_LM_SCRIPTS["v7 run, 2026"] | {"proj_dir": str(tmp_path / "run"), "my_testing": "x070"}
    flags |= {"data_file": str(tmp_path / "absent")}
    if by_file:
        (tmp_path / "run.yaml").write_text(json.dumps(flags))
        argv = ["--config", str(tmp_path / "run.yaml")]
    else:
        argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with pytest.raises(UserError) as refusal:
        main(argv)
    told = str(refusal.value).splitlines()
    due = ("--n_layer 12 contradicts", "--n_embd 768", "--vocab_size 65536")
    due += ("this machine has 0 GPUs", "absent.idx: no such file")
    assert len(told) == 1 + len(due) and all(any(words in line for line in told) for words in due), told


@pytest.mark.parametrize("name, steps, saves", [("v7 run", 182_889, 25_200), ("v7 run pile", 337_846, 8_400)])
def test_a_stage_trains_the_whole_model_to_its_last_token(stand_ins, logged_in, name, steps, saves):
    config = parse_run(command(stand_ins, RWKV_LM_SCRIPTS[name])).config
    train = config.train
    assert (train.epoch_steps, train.epoch_count, train.save_every, train.lr_schedule) == (steps, 1, saves, "rwkv-lm")
    assert config.adapter.whole_model and config.model.version == "x070" and config.model.n_layer == 12


def test_magic_prime_alone_is_whole_epochs(stand_ins, logged_in):
    flags = RWKV_LM_SCRIPTS["v7 run"] | {"my_exit_tokens": 0}
    assert parse_run(command(stand_ins, flags)).config.train.epoch_steps == 72 * 40320 // 16


def test_the_newest_model_of_the_folder_trains(stand_ins, tmp_path, logged_in):
    flags = RWKV_LM_SCRIPTS["v7 run"] | {"n_layer": 2, "n_embd": 128, "vocab_size": 80}
    assert parse_run(command(stand_ins, flags, proj_dir=tmp_path)).base is None
    for name in ("rwkv-init.pth", "rwkv-9.pth", "rwkv-71.pth"):
        (tmp_path / name).symlink_to(stand_ins / "x070/rwkv-init.pth")
        request = parse_run(command(stand_ins, flags, proj_dir=tmp_path))
        assert request.base.path == str(tmp_path / name) and str(tmp_path / name) in request.notes[0]
    named = parse_run(command(stand_ins, flags, proj_dir=tmp_path, load_model="x"))
    assert named.base.path == str(stand_ins / "x070/rwkv-init.pth")


def test_stage_1_writes_a_new_model_once(stand_ins, capsys):
    base = open_base(stand_ins / "x070/rwkv-init.pth")
    assert (base.config.version, base.config.n_embd) == ("x070", 128)
    assert base.tensors["emb.weight"].dtype == torch.bfloat16
    given = ["--train_stage", "1", "--data_file", "d", "--proj_dir", str(stand_ins / "x070")]
    argv = [*given, "--load_model", str(stand_ins / "x060/rwkv-init.pth"), "--peft", "lora"]
    with pytest.raises(UserError, match="(?s)3 things .*would overwrite.*with --load_model .*with --peft lora"):
        main(argv)


def test_a_stage_trains_what_the_one_before_made(stand_ins, tmp_path):
    flags = RWKV_LM_SCRIPTS["v7 run"] | {"n_layer": 2, "n_embd": 128, "vocab_size": 80, "ctx_len": 16, "micro_bsz": 2}
    flags |= {"wandb": "", "precision": "fp32", "my_exit_tokens": 90, "strategy": "deepspeed_stage_1"}
    (tmp_path / "rwkv-init.pth").symlink_to(stand_ins / "x070/rwkv-init.pth")
    argv = [sys.executable, str(ROOT / "train.py"), *command(stand_ins, flags, proj_dir=tmp_path)]
    out, _ = finish(start(argv))
    assert f"--train_stage 3: all of the model trains, from {tmp_path}/rwkv-init.pth" in out
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]  # of 32 tokens
    _, err = finish(start(argv), code=2)
    assert "already holds a run; add --resume to continue it" in err


def test_a_base_knows_better_than_my_testing(stand_ins, capsys):
    flags = RWKV_PEFT_SCRIPTS["run_disha"]
    argv = command(stand_ins, flags | {"my_testing": "x070"})
    argv[argv.index("--my_testing") + 1] = "x060"  # as the script has it beside an RWKV-7
    assert main([*argv, "--check_flags"]) == 0
    assert "note: --my_testing x060 is not read: " in capsys.readouterr().out


TIME, NF4 = {"train_parts": '["time", "ln"]'}, {"train_parts": "[]", "quant": "nf4"}
NF4 |= {"lora_config": '{"lora_load":"","lora_r":8,"lora_alpha":32,"lora_dropout":0.01,"lora_parts":"att"}'}
BEGUN = {"pissa_config": '{"pissa_load":"rwkv-0.pth","pissa_init":"init_pissa.pth","pissa_r":32}'}
WHOLE = {"train_type": "finetune", "fla": True, "peft": "none", "train_parts": "[ln, emb]"}
SIZES = {"op": "cuda", "head_size_a": 64, "head_size_divisor": 8, "dim_att": 0, "dim_ffn": 0}
MEANT = (  # a script, its changes, and what trains
    ("run_bone", {}, {"method": "bone", "mode": "bat-in", "rank": 64}),
    ("run_sft", {"fla": True}, {"method": "bone", "mode": "bone", "rank": 64}),
    ("run_disha", {"disha_config": '{"mode":"bat","load":"","r":16}'}, {"mode": "bat-in", "rank": 16}),
    ("miss", {"micro_bsz": 8}, {"method": "bone", "mode": "bone", "rank": 64}),
    ("run_lora", TIME | SIZES, {"method": "lora", "rank": 32, "alpha": 32, "train_parts": ("time", "ln")}),
    ("run_lora", NF4, {"alpha": 32, "dropout": 0.01, "train_parts": (), "targets": TARGETS[:5], "quant": "nf4"}),
    ("run_pissa", {}, {"method": "pissa", "rank": 32, "svd_niter": 4, "init": ""}),
    ("run_pissa", BEGUN, {"method": "pissa", "load": "rwkv-0.pth", "init": "init_pissa.pth"}),
    ("", WHOLE, {"method": "none", "train_parts": ("ln", "emb")}),
    ("state tuning", {}, {"states_alone": True}),
)


@pytest.mark.parametrize("name, changes, expected", MEANT, ids=range(len(MEANT)))
def test_words_of_rwkv_peft_mean_ours(stand_ins, logged_in, name, changes, expected):
    for schedule, ours in ((None, "cosine"), ("cos_decay", "rwkv-peft")):
        flags = RWKV_PEFT_SCRIPTS.get(name, RWKV_PEFT) | changes | ({"lr_schedule": schedule} if schedule else {})
        config = parse_run(command(stand_ins, flags)).config
        assert {name: getattr(config.adapter, name) for name in expected} == expected
        assert (config.train.lr_schedule, config.data.micro_bsz, config.train.grad_cp) == (ours, 8, True)
        assert config.data.data_type == ("sft" if flags["data_type"] == "jsonl" else flags["data_type"])
