"""train.py's command line: what it accepts, and that each mistake is one message with exit code 2, before any work."""

import math
import os
import pickle
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from rwkv_peft.config import AdapterConfig, DataConfig, TrainConfig
from rwkv_peft.data.binidx import BinidxWriter
from rwkv_peft.errors import UserError, exit_on_user_error
from rwkv_peft.files.alone import alone_in
from rwkv_peft.models.rwkv6.keys import TARGETS
from rwkv_peft.training.flags import parse_run
from rwkv_peft.training.header import describe_adapter
from rwkv_peft.training.parser import DIMENSIONS, build_parser, flag_of, table
from rwkv_peft.training.run import find_state, main
from rwkv_peft.training.synonyms import VALUES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path, tiny_state):
    """A base model base.pth (C 64, F 96, vocabulary 80) and data of 300 tokens below 80."""
    torch.save(tiny_state(), tmp_path / "base.pth")
    with BinidxWriter(tmp_path / "data", vocab_size=80) as writer:
        for start in range(3):
            writer.add([1 + (start + i) % 79 for i in range(99)] + [0])
    return tmp_path


def flags(files, *more):
    return [
        "--load_model",
        str(files / "base.pth"),
        "--data_file",
        str(files / "data"),
        "--ctx_len",
        "16",
        "--bone_r",
        "16",
        "--proj_dir",
        str(files / "out"),
        "--accelerator",
        "cpu",
        "--precision",
        "fp32",
        *more,
    ]


def refused(monkeypatch, capsys, argv):
    """The message of a command that must end with exit code 2 and one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as exit_info:
        exit_on_user_error(main)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_dimensions_are_read_from_the_base(files):
    config = parse_run(flags(files)).config
    assert (config.model.n_layer, config.model.n_embd, config.model.dim_ffn, config.model.head_size) == (2, 64, 96, 16)
    assert (config.adapter.method, config.adapter.mode, config.adapter.rank) == ("bone", "bat-in", 16)


def test_the_json_form_means_the_same(files):
    argv = flags(files)
    del argv[argv.index("--bone_r") : argv.index("--bone_r") + 2]
    config = parse_run(
        argv + ["--peft", "bone", "--bone_config", '{"bone_mode":"bat","bone_load":"","bone_r":16}']
    ).config
    assert config.adapter == parse_run(flags(files, "--bone_mode", "bat-in")).config.adapter


def test_json_and_single_flags_that_agree_go_together(files):
    config = parse_run(
        flags(
            files,
            "--bone_mode",
            "bat-in",
            "--bone_load",
            "earlier.safetensors",
            "--bone_config",
            '{"bone_mode":"bat","bone_load":"","bone_r":16}',
        )
    ).config
    assert (config.adapter.mode, config.adapter.load) == ("bat-in", "earlier.safetensors")


def test_targets_need_an_adapter(files, monkeypatch, capsys):
    argv = flags(files, "--peft", "none", "--target_modules", "att.key")
    del argv[argv.index("--bone_r") : argv.index("--bone_r") + 2]
    assert "--target_modules att.key names layers that get an adapter" in refused(monkeypatch, capsys, argv)


def test_rows_of_questions_and_answers_count_their_answers(files):
    sft = parse_run(flags(files, "--data_type", "sft")).config.data
    assert (sft.dataload, sft.loss_mask) == ("pad", "file")
    stream = parse_run(flags(files)).config.data
    assert (stream.dataload, stream.loss_mask) == ("get", "none")


# The commands of RWKV-PEFT's scripts for x060 models, with this base's dimensions, and what each must come to.
SCRIPT = """--load_model {base} --proj_dir {out} --data_file {data} --vocab_size 80 --ctx_len 512 --epoch_steps 1000
    --epoch_count 1 --epoch_begin 0 --epoch_save 1 --micro_bsz 8 --n_layer 2 --n_embd 64 --pre_ffn 0 --head_qk 0
    --lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --accelerator gpu --devices
    1
    --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1 --my_testing "x060" """
SCRIPTS = (
    (
        """--data_type binidx --dataload pad --loss_mask pad --peft bone --bone_config
        '{"bone_load":"","bone_r":16}'""",
        {"method": "bone", "mode": "bat-in", "rank": 16},
    ),
    (
        """--data_type binidx --peft bone --bone_config '{"bone_mode":"bone","bone_load":"","bone_r":16}' --fla
        --lr_schedule cos_decay""",
        {"method": "bone", "mode": "bone", "rank": 16},
    ),
    (
        """--data_type binidx --peft disha --disha_config '{"mode":"bat","load":"","r":16}'""",
        {"method": "bone", "mode": "bat-in", "rank": 16},
    ),
    (
        """--data_type binidx --peft lora --lora_config
        '{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_dropout":0.0}'
        --train_parts '["time", "ln"]' --op cuda --head_size_a 16 --head_size_divisor 8 --dim_att 0 --dim_ffn 0""",
        {"method": "lora", "rank": 32, "alpha": 32, "train_parts": ("time", "ln")},
    ),
    (
        """--data_type binidx --train_parts [] --quant nf4 --peft lora
        --lora_config '{"lora_load":"","lora_r":8,"lora_alpha":32,"lora_dropout":0.01,"lora_parts":"att"}'""",
        {"method": "lora", "alpha": 32, "dropout": 0.01, "train_parts": (), "targets": TARGETS[:5], "quant": "nf4"},
    ),
    (
        """--data_type binidx --dataload pad --loss_mask pad
        --peft pissa --pissa_config '{"pissa_load":"","pissa_init":"","pissa_r":32,"svd_niter":4}'""",
        {"method": "pissa", "rank": 32, "svd_niter": 4, "init": ""},
    ),
    (
        """--data_type binidx
        --peft pissa --pissa_config '{"pissa_load":"rwkv-0.pth","pissa_init":"init_pissa.pth","pissa_r":32}'""",
        {"method": "pissa", "load": "rwkv-0.pth", "init": "init_pissa.pth"},
    ),
    (
        """--data_type binidx --train_type "finetune" --dataload pad --fla --peft none --train_parts [ln, emb]""",
        {"method": "none", "train_parts": ("ln", "emb")},
    ),
)


@pytest.mark.parametrize("text, expected", SCRIPTS, ids=range(len(SCRIPTS)))
def test_rwkv_pefts_commands_mean_here_what_they_say(files, text, expected):
    script = SCRIPT.format(base=files / "base.pth", out=files / "out", data=files / "data")
    config = parse_run(shlex.split(script + text)).config
    assert {name: getattr(config.adapter, name) for name in expected} == expected
    schedule = "rwkv-peft" if "cos_decay" in text else "cosine"
    assert (config.train.lr_schedule, config.data.micro_bsz, config.train.grad_cp) == (schedule, 8, True)


def test_rows_in_the_order_of_the_file(files):
    more = shlex.split("--data_shuffle 0 --data_type sft --sft_field query response --sft_split 'train[:1000]'")
    assert parse_run(flags(files, *more)).config.data.seed is None
    assert parse_run(flags(files, "--data_shuffle", "1", "--random_seed", "7")).config.data.seed == 7


@pytest.mark.parametrize(
    "more, words",
    [
        (["--pre_ffn", "1"], "--pre_ffn: '1' asks for a feed-forward layer in place of the first attention"),
        (["--head_size_divisor", "16"], "give 8, or leave the flag out"),
        (["--op", "hip"], "other kernels; those here are chosen by the device; give cuda or fla or triton"),
        (["--train_type", "lisa"], "--train_type: invalid choice: 'lisa'"),
        (
            ["--peft", "bone", "--train_type", "finetune"],
            "trains the model itself, and --peft is bone; leave --peft out",
        ),
        (["--dropout", "0.1"], "lora_dropout"),
        (["--train_parts", '["time", "lm"]'], "--train_parts lm"),
        (["--lr_schedule", "sin"], "invalid choice: 'sin'"),
        (["--lr_schedule", "cosin"], "did you mean cosine?"),
        (["--peft", "miss"], "what others call miss is --peft bone --bone_mode bone here"),
        (["--peft", "bat"], "is --peft bone --bone_mode bat-in here"),
        (["--data_type", "jsonl"], "is --data_type sft here"),
        (["--data_type", "utf-8"], "is binidx, which `rwkv-peft preprocess` makes of a text, here"),
        (["--quant", "4bit"], "is --quant nf4 here"),
        (["--precision", "bf16-mixed"], "is --precision bf16 here"),
        (["--lora"], "there is no --lora here; it is --peft lora"),
        (["--data_shuffle", "2"], "neither 0 nor 1"),
    ],
)
def test_what_other_scripts_ask_for_and_this_does_not_do(files, monkeypatch, capsys, more, words):
    assert words in refused(monkeypatch, capsys, flags(files, *more))


def test_a_misspelt_flag_is_told_before_the_one_that_is_missing(files, monkeypatch, capsys):
    argv = ["--data_flie" if word == "--data_file" else word for word in flags(files)]
    assert refused(monkeypatch, capsys, argv).startswith("error: there is no --data_flie; did you mean --data_file?")


def test_the_values_that_are_led_to_ours_are_none_of_ours():
    parser = build_parser()
    for (flag, value), meant in VALUES.items():
        action = parser._option_string_actions[flag]
        assert action.choices and value not in action.choices
        words = meant.split()
        if words[0].startswith("--"):
            parser.parse_args(["--data_file", "d", *words])


def lora(files, method, settings, *more):
    """The flags of a method that has a JSON value."""
    name = "pissa_config" if method == "pissa" else "lora_config"
    argv = flags(files, "--peft", method, f"--{name}", settings, *more)
    del argv[argv.index("--bone_r") : argv.index("--bone_r") + 2]
    return argv


@pytest.mark.parametrize(
    "flag, value",
    [
        *(
            (flag, "nan")
            for flag in (
                "lr_init",
                "lr_final",
                "weight_decay",
                "beta1",
                "beta2",
                "adam_eps",
                "gradient_clip_val",
                "val_split",
                "save_minutes",
            )
        ),
        ("lr_init", "1e400"),
        ("lr_final", "-inf"),
    ],
)
def test_flags_take_finite_numbers(files, monkeypatch, capsys, flag, value):
    assert f"--{flag}: {value} is not a finite number" in refused(
        monkeypatch, capsys, flags(files, f"--{flag}={value}")
    )


@pytest.mark.parametrize(
    "method, settings, words",
    [
        ("lora", '{"lora_r":4,"lora_alpha":NaN}', "lora_alpha nan is not a finite number"),
        ("lora", '{"lora_r":4,"lora_alpha":1' + 400 * "0" + "}", "not a finite number"),
        ("lora", '{"lora_r":4,"lora_dropout":Infinity}', "lora_dropout inf is not a finite number"),
        ("lora", '{"lora_r":4,"lora_alpha":0}', "lora_alpha 0 must be above 0"),
        ("lora", '{"lora_r":4,"lora_alpha":-8}', "lora_alpha -8 must be above 0"),
        ("lora", '{"lora_r":4,"lora_parts":"att,time"}', "--train_parts"),
        ("pissa", '{"pissa_r":4,"svd_niter":-1}', "svd_niter -1"),
        ("pissa", '{"pissa_r":4,"pissa_init":"init_pissa.pth"}', "pissa_init init_pissa.pth"),
    ],
)
def test_numbers_of_the_json_forms_have_bounds(files, monkeypatch, capsys, method, settings, words):
    assert words in refused(monkeypatch, capsys, lora(files, method, settings))


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("keep_checkpoints", "-1", "-1 is negative"),
        ("keep_checkpoints", "2.5", "'2.5' is not a whole number"),
        ("save_every", "-1", "-1 is negative"),
        ("save_minutes", "-1", "-1 is negative"),
        ("save_total_limit", "3", "it is --keep_checkpoints"),
    ],
)
def test_how_often_and_how_much_is_saved_is_a_number_that_can_be_meant(files, monkeypatch, capsys, flag, value, words):
    assert words in refused(monkeypatch, capsys, flags(files, f"--{flag}={value}"))


@pytest.mark.parametrize(
    "ratio, words", [("inf", "not a finite number"), ("nan", "not a finite number"), ("0", "not above 0")]
)
def test_the_ratio_of_lora_plus_is_finite_and_above_0(files, monkeypatch, capsys, ratio, words):
    argv = lora(files, "lora-plus", '{"lora_r":4}', "--loraplus_lr_ratio", ratio)
    assert f"--loraplus_lr_ratio: {ratio} is {words}" in refused(monkeypatch, capsys, argv)


def test_bone_mini_from_single_flags(files, monkeypatch, capsys):
    adapter = parse_run(flags(files, "--bone_mode", "bone-mini", "--bone_mini_r", "4")).config.adapter
    assert (adapter.mode, adapter.rank, adapter.mini_rank) == ("bone-mini", 16, 4)
    assert "try --bone_mini_r 16" in refused(monkeypatch, capsys, flags(files, "--bone_mode", "bone-mini"))
    assert "belongs to --bone_mode bone-mini" in refused(monkeypatch, capsys, flags(files, "--bone_mini_r", "4"))


def test_the_summary_names_what_else_trains_and_how_the_base_is_kept(files):
    adapter = parse_run(flags(files, "--quant", "nf4", "--train_parts", "time", "ln")).config.adapter
    assert describe_adapter(adapter) == "Bone bat-in, rank 16, --quant nf4, --train_parts time ln"
    assert describe_adapter(replace(adapter, quant="none", train_parts=())) == "Bone bat-in, rank 16"


def test_every_flag_is_read():
    """No flag is parsed and then forgotten."""
    training = ROOT / "RWKV-PEFT" / "rwkv_peft" / "training"
    source = "".join((training / name).read_text() for name in ("flags.py", "adapter_flags.py", "legacy.py"))
    own = {flag_of(field) for config in (AdapterConfig, DataConfig, TrainConfig) for field in fields(config)}
    for action in build_parser()._actions:
        if action.dest in ("help", "model_version") or action.dest in dict(DIMENSIONS):
            continue
        assert action.dest in own or f"args.{action.dest}" in source or f'"{action.dest}"' in source, action.dest


def test_the_table_of_flags_is_what_the_parser_says():
    assert (ROOT / "docs" / "train_flags.md").read_text() == table(), (
        "python -m rwkv_peft.training.parser > docs/train_flags.md"
    )


@pytest.mark.parametrize(
    "more, words",
    [
        (["--bone_rank", "8"], "no --bone_rank; did you mean --bone_r"),
        (["--bone_mode", "bats"], "'bats' does not exist"),
        (["--bone_r", "64"], "64"),
        (["--bone_mode", "bat-out", "--bone_r", "64"], "96"),
        (["--n_embd", "512"], "--n_embd 512 contradicts"),
        (["--vocab_size", "65536"], "--vocab_size 65536 contradicts"),
        (["--peft", "lora"], "--bone_r belongs to --peft bone"),
        (["--bone_config", '{"bone_rr": 4}'], "did you mean 'bone_r'"),
        (["--bone_config", "{bone_r: 4}"], "not JSON"),
        (["--bone_config", '{"bone_r": 8}'], "give one of them"),
        (["--target_modules", "att.kay"], "att.kay"),
        (["--ctx_len", "5000"], "5000"),
        (["--micro_bsz", "0"], "below 1"),
        (["--micro_bsz", "99999999999"], "tokens, and a micro batch has 2,147,483,647 at most; lower one of them"),
        (["--beta2", "1.5"], "--beta2 1.5"),
        (["--epoch_begin", "3"], "leaves no epoch"),
        (["--compile", "--strategy", "deepspeed_stage_3"], "leave --compile out"),
        (["--resume"], "no complete checkpoint"),
        (["--bone_load", "nothing.safetensors"], "nothing.safetensors"),
        (["--my_testing", "x070"], "x060"),
        (["--loss_mask", "qa"], "--mask_id"),
        (["--dataload", "only", "--micro_bsz", "2"], "--micro_bsz 2"),
        (["--accelerator", "gpu", "--devices", "99"], "--devices 99"),
        (["--accelerator", "cpu", "--cuda_graphs", "1"], "--cuda_graphs 1 records what a GPU is told to do, and this"),
        (["--mask_id", "5"], "--mask_id belongs to --loss_mask qa or se, and the mask is none"),
        (["--loss_mask", "pad", "--dataload", "pad", "--mask_end_id", "5"], "--mask_end_id belongs to"),
        (["--tokenizer", "bytes"], "--tokenizer belongs to --data_type sft"),
        (["--sft_field", "query", "response"], "--sft_field belongs to --data_type sft"),
        (["--sft_split", "train[:10]"], "--sft_split belongs to --data_type sft"),
        (["--sft_long", "skip"], "--sft_long belongs to --data_type sft"),
        (["--random_seed", "9223372036854775808"], "--random_seed: 9223372036854775808 does not fit in 64 bits"),
        (["--adam_eps", "0"], "--adam_eps: 0 is not above 0"),
        (["--proj_dir", ""], "--proj_dir is empty"),
    ],
)
def test_mistakes_in_flags(files, monkeypatch, capsys, more, words):
    assert words in refused(monkeypatch, capsys, flags(files, *more))
    assert not (files / "out").exists()


def test_a_folder_that_cannot_be_written_is_told_before_any_work(files, monkeypatch, capsys):
    (files / "file").touch()
    assert "a file stands where" in refused(
        monkeypatch, capsys, flags(files, "--proj_dir", str(files / "file" / "out"))
    )
    (files / "out").mkdir()
    (files / "out" / "checkpoints").touch()
    assert "a file stands where" in refused(monkeypatch, capsys, flags(files))


@pytest.mark.parametrize("leftover", ["adapter.safetensors", "adapter-best.safetensors"])
def test_what_a_new_run_would_overwrite_is_named_with_or_without_resume(files, monkeypatch, capsys, leftover):
    (files / "out").mkdir()
    for name in ("metrics.jsonl", leftover):
        (files / "out" / name).touch()
    fresh, resumed = (refused(monkeypatch, capsys, flags(files, *more)) for more in ([], ["--resume"]))
    assert f"already holds {leftover}" in fresh and "add --resume" not in fresh
    assert f"{leftover} away and leave --resume out" in resumed


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_ended_before_its_first_checkpoint_starts_anew(tmp_path, resume):
    train, identity = TrainConfig(resume=resume), {"adapter": {"method": "bone"}}
    (tmp_path / "metrics.jsonl").touch()
    assert find_state(tmp_path, train, identity) == (None, None)
    (tmp_path / "adapter-epoch-1.safetensors").touch()
    with pytest.raises(UserError, match="already holds adapter-epoch-1|move .*adapter-epoch-1"):
        find_state(tmp_path, train, identity)


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_folder_has_one_run_at_a_time(files, monkeypatch, capsys, more):
    with alone_in(files / "out"):
        assert f"a run is training there (process {os.getpid()} on " in refused(
            monkeypatch, capsys, flags(files, *more)
        )
    assert not (files / "out").exists()


def damaged_base(path, kind, tiny_state):
    """Write a base.pth that is wrong in one way."""
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "code":

        class Evil:
            def __reduce__(self):
                return Path.touch, (path.parent / "executed",)

        path.write_bytes(pickle.dumps({"emb.weight": Evil()}))
    elif kind == "states":
        torch.save(tiny_state() | {f"blocks.{i}.att.time_state": torch.zeros(4, 16, 16) for i in range(2)}, path)
    elif kind == "rwkv5":
        state = {key: value for key, value in tiny_state().items() if "maa" not in key and "decay_w" not in key}
        state |= {f"blocks.{i}.att.time_mix_{name}": torch.ones(1, 1, 64) for i in range(2) for name in "kvrg"}
        torch.save(state, path)
    elif kind == "rwkv7":
        state = {key: value for key, value in tiny_state().items() if "time_" not in key}
        state |= {
            f"blocks.{i}.att.{name}": torch.ones(1, 1, 64) for i in range(2) for name in ("x_r", "w0", "a0", "r_k")
        }
        torch.save(state, path)


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "code", "rwkv5", "rwkv7", "states"])
def test_bad_base_models(files, tiny_state, monkeypatch, capsys, kind):
    damaged_base(files / "base.pth", kind, tiny_state)
    assert "base.pth" in refused(monkeypatch, capsys, flags(files))
    assert not (files / "executed").exists()


@pytest.mark.parametrize("name", ["data.idx", "data.bin"])
@pytest.mark.parametrize("size", [None, 0, 40])
def test_bad_data_files(files, monkeypatch, capsys, name, size):
    path = files / name
    path.unlink() if size is None else path.write_bytes(path.read_bytes()[:size])
    assert name in refused(monkeypatch, capsys, flags(files))


def test_a_base_that_is_not_finite_is_named_before_any_step(files, tiny_state, monkeypatch, capsys):
    """Also in a row of the embedding that no token reads."""
    state = tiny_state()
    state["emb.weight"][79, 3] = math.nan
    torch.save(state, files / "base.pth")
    error = refused(monkeypatch, capsys, flags(files))
    assert "base.pth is not finite: emb.weight holds NaN or Inf, at [79, 3] first" in error
    assert not (files / "out").exists()


@pytest.mark.parametrize("more", [[], ["--dataload", "pad"], ["--dataload", "pack"], ["--val_split", "0.2"]])
@pytest.mark.parametrize("counts", [False, True])
def test_a_mask_that_leaves_nothing_to_learn_is_refused(files, monkeypatch, capsys, more, counts):
    """Where it counts no token, and where it counts those alone that are never read: the first, and with --dataload
    pad those behind --ctx_len."""
    mask = bytearray(300)
    mask[0] = counts
    if "--dataload" in more:
        mask[99] = counts
    (files / "data.mask").write_bytes(mask)
    words = "the loss counts no token of" if counts else "data.mask counts none of 300 tokens"
    assert words in refused(monkeypatch, capsys, flags(files, *more))


def test_tokens_outside_the_vocabulary(files, monkeypatch, capsys):
    with BinidxWriter(files / "data", vocab_size=300) as writer:
        writer.add([5] * 50 + [80])
    assert "80" in refused(monkeypatch, capsys, flags(files))


def test_a_new_model_needs_its_dimensions_and_no_adapter(files):
    with pytest.raises(UserError, match="--peft none"):
        parse_run(["--data_file", str(files / "data")])
    with pytest.raises(UserError, match="--n_embd"):
        parse_run(["--data_file", str(files / "data"), "--peft", "none", "--n_layer", "2", "--vocab_size", "80"])
    small = parse_run(
        [
            "--data_file",
            str(files / "data"),
            "--peft",
            "none",
            "--n_layer",
            "2",
            "--vocab_size",
            "80",
            "--n_embd",
            "8",
            "--head_size",
            "8",
        ]
    ).config
    assert small.model.dim_ffn == 32


def test_the_command_itself_shows_no_traceback(files):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags(files, "--bone_r", "7")], text=True, capture_output=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr and not done.stdout
