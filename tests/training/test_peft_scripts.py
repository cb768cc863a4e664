"""The commands of RWKV-PEFT's scripts mean here what they say."""

import shlex

import pytest

from rwkv_peft.models.rwkv6.keys import TARGETS
from rwkv_peft.training.flags.request import parse_run

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
