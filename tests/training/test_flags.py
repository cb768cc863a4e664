"""train.py's command line: what it accepts, and that each mistake is one message with exit code 2, before any work."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rwkv_peft.cli.errors import UserError, exit_on_user_error
from rwkv_peft.training.flags.legacy import VALUES
from rwkv_peft.training.flags.parser import build_parser, table
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.header import describe_adapter
from rwkv_peft.training.run import main
from training.command_lines import flags, refused, small_files, without_rank

ROOT = Path(__file__).resolve().parents[2]

files = small_files


def test_dimensions_are_read_from_the_base(files):
    config = parse_run(flags(files)).config
    assert (config.model.n_layer, config.model.n_embd, config.model.dim_ffn, config.model.head_size) == (2, 64, 96, 16)
    assert (config.adapter.method, config.adapter.mode, config.adapter.rank) == ("bone", "bat-in", 16)


def test_the_json_form_means_the_same(files):
    settings = '{"bone_mode":"bat","bone_load":"","bone_r":16}'
    config = parse_run(without_rank(files, "--peft", "bone", "--bone_config", settings)).config
    assert config.adapter == parse_run(flags(files, "--bone_mode", "bat-in")).config.adapter


def test_json_and_single_flags_that_agree_go_together(files):
    more = (
        *"--bone_mode bat-in --bone_load earlier.safetensors --bone_config".split(),
        '{"bone_mode":"bat","bone_r":16}',
    )
    config = parse_run(flags(files, *more)).config
    assert (config.adapter.mode, config.adapter.load) == ("bat-in", "earlier.safetensors")


def test_targets_need_an_adapter(files, monkeypatch, capsys):
    told = refused(monkeypatch, capsys, without_rank(files, "--peft", "none", "--target_modules", "att.key"))
    assert "--target_modules att.key does not go with --peft none: it names layers that get an adapter" in told


def test_rows_of_questions_and_answers_count_their_answers(files):
    sft = parse_run(flags(files, "--data_type", "sft")).config.data
    assert (sft.dataload, sft.loss_mask) == ("pad", "file")
    stream = parse_run(flags(files)).config.data
    assert (stream.dataload, stream.loss_mask) == ("get", "none")


def test_rows_in_the_order_of_the_file(files):
    more = shlex.split("--data_shuffle 0 --data_type sft --sft_field query response --sft_split 'train[:1000]'")
    assert parse_run(flags(files, *more)).config.data.seed is None
    assert parse_run(flags(files, "--data_shuffle", "1", "--random_seed", "7")).config.data.seed == 7


@pytest.mark.parametrize(
    "more, words",
    [
        (["--pre_ffn", "1"], "--pre_ffn: '1' asks for a feed-forward layer in place of the first attention"),
        (["--head_size_divisor", "16"], "give 8, or leave the flag out"),
        (["--op", "hip"], "other kernels, and the device chooses them here; give cuda or fla or triton"),
        (["--train_type", "lisa"], "--train_type: invalid choice: 'lisa'"),
        (["--peft", "bone", "--train_type", "finetune"], "--peft bone: it trains the model itself; leave --peft out"),
        (["--dropout", "0.1"], "lora_dropout"),
        (["--train_parts", '["time", "lm"]'], "--train_parts lm"),
        (["--lr_schedule", "sin"], "invalid choice: 'sin'"),
        (["--lr_schedule", "cosin"], "did you mean cosine?"),
        (["--peft", "MiSS"], "MiSS of other tools is --peft miss here"),
        (["--peft", "bat"], "is --peft bone --bone_mode bat-in here"),
        (["--data_type", "json"], "is --data_type sft here"),
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


def test_all_that_is_wrong_is_told_at_once(files, monkeypatch, capsys):
    more = "--lr 1 --ctx_len 0 --precision fp64 --beta1 2 --epoch_begin 3 --val_every 5 --merge_on_save --peft none"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(files, *more.split())])
    with pytest.raises(SystemExit) as exit_info:
        exit_on_user_error(main)
    told = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2 and told[0] == "error: 8 things are wrong with this command:"
    for words in (
        "there is no --lr here; it is --lr_init",
        "--ctx_len: 0 is below 1",
        "--precision: invalid choice: 'fp64'",
        "--bone_r belongs to --peft bone",
        "--beta1: 2 must be below 1",
        "--epoch_begin 3 leaves no epoch",
        "--val_every 5 needs --val_data or --val_split",
        "--merge_on_save does not go with a model that trains itself",
    ):
        assert sum(words in line for line in told[1:]) == 1, words


def test_what_ends_the_reading_is_told_with_the_rest(files):
    with pytest.raises(UserError, match="(?s)2 things .*no --lr here.*--ctx_len: expected one argument"):
        parse_run(["--data_file", "data", "--lr", "1", "--ctx_len"])


def test_what_was_refused_contradicts_nothing(files):
    with pytest.raises(UserError) as refusal:
        parse_run(flags(files, "--data_type", "text", "--sft_field", "query"))
    assert "text of other tools" in str(refusal.value) and "--sft_field" not in str(refusal.value)


def test_all_that_contradicts_the_base_is_told_at_once(files):
    with pytest.raises(UserError, match="(?s)3 things .*--model_version.*--n_layer 9.*--vocab_size 7"):
        parse_run(flags(files, "--n_layer", "9", "--vocab_size", "7", "--generation", "7"))


def test_the_values_that_are_led_to_ours_are_none_of_ours():
    parser = build_parser()
    for (flag, value), meant in VALUES.items():
        action = parser._option_string_actions[flag]
        assert action.choices and value not in action.choices
        if ours := re.search(r"(--.*) here$", meant):
            parser.parse_args(["--data_file", "d", *ours[1].split()])


def test_bone_mini_from_single_flags(files, monkeypatch, capsys):
    adapter = parse_run(flags(files, "--bone_mode", "bone-mini", "--bone_mini_r", "4")).config.adapter
    assert (adapter.mode, adapter.rank, adapter.mini_rank) == ("bone-mini", 16, 4)
    assert "try --bone_mini_r 16" in refused(monkeypatch, capsys, flags(files, "--bone_mode", "bone-mini"))
    told = refused(monkeypatch, capsys, flags(files, "--bone_mini_r", "4"))
    assert "--bone_mini_r 4 needs --bone_mode bone-mini" in told


def test_the_summary_names_what_else_trains_and_how_the_base_is_kept(files):
    adapter = parse_run(flags(files, "--quant", "nf4", "--train_parts", "time", "ln")).config.adapter
    assert describe_adapter(adapter) == "Bone bat-in, rank 16, --quant nf4, --train_parts time ln"
    assert describe_adapter(replace(adapter, quant="none", train_parts=())) == "Bone bat-in, rank 16"


def test_the_table_of_flags_is_what_the_parser_says():
    written = (ROOT / "docs" / "reference" / "flags.md").read_text()
    assert written == table(), "python -m rwkv_peft.training.flags.parser > docs/reference/flags.md"
    assert max(map(len, written.splitlines())) < 500  # characters: no cell fills a screen
    more = {*re.findall(r"\(#(\w+)-more\)", written)}
    assert more == {*re.findall(r"^### (\w+): more$", written, re.M)} and "objective" in more
    assert "\n- `dpo`: the chosen answer above the rejected" in written
    assert "\n- lora-ga: not with --objective dpo" in written


@pytest.mark.parametrize(
    "more, words",
    [
        (["--bone_rank", "8"], "no --bone_rank; did you mean --bone_r"),
        (["--gpus", "8"], "no --gpus; see train.py --help"),
        (["--bone_mode", "bats"], "'bats' does not exist"),
        (
            ["--bone_mode", "bat-in-scaled"],
            "version 0.3.0 is the last that trains bat-in-scaled; take --bone_mode bone-s",
        ),
        (["--peft", "vera"], "version 0.3.0 is the last that trains vera; take --peft lora of a small rank"),
        (["--peft_config", '{"bone_mode": "bat-in-scaled"}'], "version 0.3.0 is the last that trains bat-in-scaled"),
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
        (["--beta2", "1.5"], "--beta2: 1.5 must be below 1"),
        (["--epoch_begin", "3"], "leaves no epoch"),
        (["--compile", "--strategy", "deepspeed_stage_3"], "leave --compile out"),
        (["--resume"], "no complete checkpoint"),
        (["--bone_load", "nothing.safetensors"], "nothing.safetensors"),
        (["--model_version", "x070"], "x060"),
        (["--optimizer", "adamw"], "there is no --optimizer here; it is --optim"),
        (["--cfg", "run.yaml"], "there is no --cfg here; it is --config"),
        (["--loss_mask", "qa"], "--mask_id"),
        (["--dataload", "only", "--micro_bsz", "2"], "--micro_bsz 2"),
        (["--accelerator", "gpu", "--devices", "99"], "--devices 99"),
        (["--mask_id", "5"], "--mask_id 5 does not go with --loss_mask none: that mask reads no"),
        (["--loss_mask", "pad", "--dataload", "pad", "--mask_end_id", "5"], "5 does not go with --loss_mask pad"),
        (["--tokenizer", "bytes"], "--tokenizer bytes does not go with --data_type binidx: its tokens are made "),
        (["--retain_data", "a.jsonl", "b.jsonl"], "--retain_data takes one value, and a.jsonl b.jsonl follow it"),
        (["--retain_data", "a", "b"], "and a folder that holds files of rows is one input of --data_type sft"),
        (["--eval_data", "a", "b", "--ctx_len", "8"], "--eval_data takes one value, and a b follow it; write"),
        (["--ctx_len", "8", "16"], "--ctx_len takes one value, and 8 16 follow it; leave all but one out"),
        (["--random_seed", "9223372036854775808"], "--random_seed: 9223372036854775808 does not fit in 64 bits"),
        (["--adam_eps", "0"], "--adam_eps: 0 is not above 0"),
        (["--proj_dir", ""], "--proj_dir is empty"),
        (["--proj_dir", "~/out"], "and so not here; give"),
    ],
)
def test_mistakes_in_flags(files, monkeypatch, capsys, more, words):
    assert words in refused(monkeypatch, capsys, flags(files, *more))
    assert not (files / "out").exists()


def test_a_new_model_needs_its_dimensions_and_no_adapter(files):
    with pytest.raises(UserError, match="--peft none"):
        parse_run(["--data_file", str(files / "data")])
    with pytest.raises(UserError, match="--n_embd"):
        parse_run(["--data_file", str(files / "data"), "--peft", "none", "--n_layer", "2", "--vocab_size", "80"])
    words = f"--data_file {files}/data --peft none --n_layer 2 --vocab_size 80 --n_embd 8 --head_size 8"
    assert parse_run(words.split()).config.model.dim_ffn == 32


def test_the_command_itself_shows_no_traceback(files):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags(files, "--bone_r", "7")], text=True, capture_output=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr and not done.stdout
