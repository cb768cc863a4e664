"""Flags as users of RWKV-LM, RWKV-PEFT and Hugging Face type them: accepted if they ask for what happens anyway, else
refused with our flag of the same meaning."""

import json
import re

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import WORDS
from rwkv_peft.data.preprocess import main as preprocess
from rwkv_peft.data.sources import build_samples
from rwkv_peft.training.flags.legacy import SYNONYMS, WITHOUT_EFFECT
from rwkv_peft.training.flags.parser import build_parser
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.run import main
from training.command_lines import refused
from training.runs import finish, start

INERT = (
    "--chunk_ctx 512 --avg_loss 0 --fused_kernel --ds_bucket_mb 2 --load_partial 0 --my_pile_version 1 "
    "--my_pile_shift -1 --my_pile_edecay 0 --my_exit_tokens 0 --my_exit 99999999 --my_sample_len 0 --my_ffn_shift 1 "
    "--my_att_shift 1 --my_random_steps 0 --tiny_att_layer -999 --merge 0 --op triton --num_workers 8 "
    "--persistent_workers --prefetch_factor 2 --kernel @rwkv3 --head_chunk 65536"
).split()

NESTED = '{"a":' * 20_000


def flags(files, *more):
    where = ["--load_model", str(files / "base.pth"), "--data_file", str(files / "data")]
    return [*where, "--proj_dir", str(files / "flags"), "--ctx_len", "16", *more]


def config(files, *more):
    return parse_run(flags(files, *more)).config


@pytest.mark.parametrize("lisa", ['{"lisa_r":2,"lisa_k":100}', '{"lisa_k": 100, "lisa_r": 2}'])
def test_what_sets_nothing_here_is_taken(files, lisa):
    plain = config(files, "--bone_r", "16")
    assert config(files, "--bone_r", "16", *INERT, "--lisa_config", lisa) == plain


@pytest.mark.parametrize(
    "more, words",
    [
        ("--load_partial 1", "a base must be complete here"),
        ("--avg_loss 1", "every token of a step weighs the same"),
        ("--chunk_ctx many", "--chunk_ctx: "),
        ("--context_parallel 2", "--context_parallel 2 groups ranks by so many, and there are 1 ("),
        ("--context_parallel 2 --devices 2 --strategy deepspeed_stage_3", "ranks would wait for weights and states of"),
        (
            "--context_parallel 2 --devices 2 --objective dpo --data_type pairs",
            "an answer's probability is that of all",
        ),
        ('--lisa_config {"lisa_r":4}', "LISA, which is no method here"),
        ("--merge 1", "--merge_on_save writes one here"),
        ("--my_testing x051", "x051 is RWKV-5, which is not supported yet; there is x060 (RWKV-6) or x070 (RWKV-7)"),
        ("--model_version x070", "contradicts"),
        ("--generation 7", "which is RWKV-6 (x060)"),
        ("--model_version x052", "x052 is RWKV-5"),
        ("--learning_rate 1e-4", "there is no --learning_rate here; it is --lr_init"),
        ("--learning-rate=1e-4", "there is no --learning-rate here; it is --lr_init"),
        ("--output_dir out", "--proj_dir"),
        ("--num_train_epochs 3", "--epoch_count"),
        ("--max_steps 3", "--epoch_steps with --epoch_count 1"),
        ("--lora_r 8", "lora_r in --lora_config"),
        ("--per_device_train_batch_size 4", "--micro_bsz"),
        ("--gradient_accumulation_steps 4", "--accumulate_grad_batches"),
        ("--PISSA --svd_niter 4", "there is no --PISSA here; it is --peft pissa"),
        ("--svd_niter 4", "svd_niter in --pissa_config"),
        ('--miss_config {"r":8}', "--disha_config with --peft disha"),
        ("--state_tune", "it is --train_type state"),
        ("--strategy single_device", "is --strategy deepspeed_stage_1 here"),
        ("--strategy fsdp", "is --strategy deepspeed_stage_3 here"),
        ("--mask_id {mask0", "is not JSON"),
        ('--mask_id {"mask0":"a"}', "other keys than mask0 and mask1"),
        ('--bone_r 16 --loss_mask qa --mask_id {"mask0":"0","mask1":"1"}', "needs --mask_id"),
        ('--loss_mask qa --mask_id {"mask0":"","mask1":[1,-2]}', "neither a text nor token ids"),
        ("--check_flags --loss_mask qa", """--mask_id '{"mask0":"User:","mask1":"Assistant:"}'"""),
        ("--check_flags --loss_mask se --mask_id 1", "needs --mask_end_id"),
        ("--mask_id " + NESTED, "is not JSON ("),
        ("--bone_config " + NESTED, "is not JSON ("),
        ("--lisa_config " + NESTED, "LISA, which is no method here"),
        ('--peft lora --peft_config {"rank":8}', "unknown key 'rank'"),
        ('--peft none --peft_config {"r":8}', "--peft_config belongs to --peft bone or"),
    ],
)
def test_what_is_not_here_is_told_by_its_meaning(files, more, words):
    with pytest.raises(UserError, match=re.escape(words)):
        main(flags(files, *more.split()))


@pytest.mark.parametrize("value", ['{"a":1}', '{"mask0":1.5,"mask1":"x"}'])
def test_a_marker_that_cannot_be_read_is_one_mistake(files, value):
    with pytest.raises(UserError) as refusal:
        main(flags(files, "--bone_r", "16", "--loss_mask", "se", "--mask_id", value))
    assert "--mask_id" in str(refusal.value) and "things are wrong" not in str(refusal.value)


def test_a_seed_of_several_nodes_is_given(files, monkeypatch):
    monkeypatch.setenv("NODE_RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match="--random_seed -1 draws a seed, and each.*give a number"):
        main(flags(files, "--random_seed", "-1", "--num_nodes", "2"))


def test_a_meaning_is_never_that_of_a_flag_that_exists():
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert not known & SYNONYMS.keys()
    assert all(set(re.findall(r"--\w+", ours)) <= known for ours in SYNONYMS.values())


def test_help_leaves_out_what_sets_nothing():
    shown = set(re.findall(r"^  --(\w+)", build_parser().format_help(), flags=re.M))
    assert len(WITHOUT_EFFECT) == 37 and "my_exit_tokens" in shown
    assert not shown & {flag for flag, _, _ in WITHOUT_EFFECT}


def test_peft_config_is_the_json_of_any_method(files):
    lora = config(files, "--peft", "lora", "--peft_config", '{"r":8,"lora_alpha":32,"lora_dropout":0.05}').adapter
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 32, 0.05)
    bone = config(files, "--peft_config", '{"mode":"bat","load":"","r":16}').adapter
    assert (bone.mode, bone.rank) == ("bat-in", 16)
    for peft in WORDS:
        assert config(files, "--peft", peft, "--peft_config", '{"r":8}').adapter.rank == 8


def test_markers_of_rwkv_peft_are_texts_or_ids(files):
    masked = ("--loss_mask", "se", "--dataload", "pad", "--bone_r", "16", "--mask_id")
    data = config(files, *masked, '{"mask0":[7],"mask1":[8, 15]}').data
    assert (data.mask_id, data.mask_end_id) == ((8, 15), (7,))
    data = config(files, *masked, '{"mask0":"User:","mask1":"Assistant:"}').data
    assert (data.mask_id, data.mask_end_id) == ((5585, 41693, 59), (24281, 59))
    assert config(files, "--bone_r", "16", "--mask_id", '{"mask0":"0","mask1":"1"}').data.mask_id == ()


def drawn_seed(said):
    return int(re.search(r"^seed +(\d+)$", said, re.M)[1])


def test_a_drawn_seed_is_one_for_all_ranks(files, command):
    more = ("--random_seed", "-1", "--devices", "2", "--precision", "fp32", "--epoch_count", "1")
    out, _ = finish(start(command("drawn", *more)))  # which starts the other rank itself
    recorded = json.loads((files / "drawn" / "config.json").read_text())
    assert recorded["train"]["random_seed"] == recorded["data"]["seed"] == drawn_seed(out)
    assert "do not train: time (" in out and "--train_parts time ln trains time and ln along, as RWKV-PEFT" in out


def test_a_drawn_seed_is_kept_by_what_goes_on(train):
    more = ("--random_seed", "-1", "--precision", "fp32", "--epoch_steps", "1", "--epoch_count")
    first, _ = train("kept", *more, "1")
    second, _ = train("kept", *more, "2", "--resume")
    assert drawn_seed(first) == drawn_seed(second)


def test_the_type_of_a_training_says_that_no_layer_is_adapted(files):
    states = config(files, "--train_type", "state", "--dataload", "pad", "--fla").adapter
    assert (states.method, states.train_parts) == ("none", ("state",))
    assert config(files, "--train_type", "finetune").adapter.method == "none"
    assert config(files, "--train_type", "infctx", "--bone_r", "16").adapter.method == "bone"


def test_markers_are_texts_of_the_data_s_own_tokenizer(tmp_path, files):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "User: hi. Assistant: ho."}\n')
    preprocess([str(rows), "--output", str(tmp_path / "bytes"), "--tokenizer", "bytes"])
    masked = ("--loss_mask", "qa", "--bone_r", "16", "--mask_id", '{"mask0":"User:","mask1":"Assistant:"}')
    data = config(files, *masked, "--data_file", str(tmp_path / "bytes")).data
    assert data.mask_id == tuple(byte + 1 for byte in b"Assistant:")


@pytest.mark.parametrize("kind", ["binidx", "sft"])
def test_a_folder_of_data_is_named_as_one(tmp_path, files, kind):
    given = ["--bone_r", "16", "--data_type", kind, "--data_file", str(tmp_path)]
    folder = {"binidx": "is a folder, and the PREFIX", "sft": "not a folder that datasets.save_to_disk wrote"}[kind]
    with pytest.raises(UserError, match=rf"{folder}.*; (name|give) a"):
        build_samples(config(files, *given).data, 65536)
    (tmp_path / "mine.jsonl").touch()
    found = {"binidx": rf"{folder}.*; give {tmp_path}/mine.jsonl", "sft": "there is no row"}[kind]  # it is read as rows
    with pytest.raises(UserError, match=found):
        build_samples(config(files, *given).data, 65536)
    for name in ("b.idx", "a.idx", "a.bin"):
        (tmp_path / name).touch()
    pairs = rf"; give one of {tmp_path}/a.idx, {tmp_path}/b.idx$"
    with pytest.raises(UserError, match=pairs if kind == "binidx" else found):
        build_samples(config(files, *given).data, 65536)


def test_a_name_that_no_disk_takes_is_told(files, monkeypatch, capsys):
    error = refused(monkeypatch, capsys, flags(files, "--data_file", "a" * 5000))
    assert len(error) < 400 and "file name too long; choose a shorter one" in error
