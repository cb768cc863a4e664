"""The flags of RWKV-LM's and RWKV-PEFT's training scripts, version by version: {script: {flag: value}}; a flag without
a value has True, one with several a tuple. Paths and widths are those of the test's files."""


def settings(text):
    """{flag: value} of words flag=value."""
    return dict(word.split("=", 1) for word in text.split())


RWKV_LM = settings(
    "ctx_len=512 data_file=data data_type=binidx n_layer=12 n_embd=768 vocab_size=65536 num_nodes=1 "
    "devices=1 precision=bf16 strategy=deepspeed_stage_2 my_exit_tokens=1498226207 magic_prime=2926181 "
    "epoch_begin=0 warmup_steps=10 beta1=0.9 beta2=0.99 grad_cp=1"
)
PREPARE = settings(
    "wandb= epoch_count=1 epoch_save=1 weight_decay=0 micro_bsz=1 accelerator=cpu lr_init=1e-05 "
    "lr_final=1e-05 adam_eps=1e-08"
)
RUN = {"load_model": 0} | settings(
    "wandb=Test epoch_count=999999 epoch_save=10 weight_decay=0.001 micro_bsz=16 lr_init=0.0006 "
    "lr_final=6e-05 accelerator=gpu adam_eps=1e-18"
)
PILE = settings("vocab_size=50304 ctx_len=4096 my_exit_tokens=332115325534 magic_prime=81082817")
PILE_RUN = settings("micro_bsz=30 lr_init=0.0008 lr_final=3e-05 weight_decay=0.1 devices=8 epoch_save=50")
V5 = {"pre_ffn": 0, "head_qk": 0, "my_pile_edecay": 0, "head_size_a": 64}
V7 = {"my_testing": "x070", "head_size": 64}
BAR, NO_BAR = {"enable_progress_bar": True}, {"enable_progress_bar": False}
CHUNKS = {"kernel": "@rwkv3", "head_chunk": 0}
WIDE = {"ds_bucket_mb": 200, "wandb": "RWKV-7-Pile"}

RWKV_LM_SCRIPTS = {
    "v5 prepare": RWKV_LM | PREPARE | V5 | {"my_pile_stage": 1, "grad_cp": 0, "ds_bucket_mb": 200} | NO_BAR,
    "v5 run": RWKV_LM | RUN | V5 | {"my_pile_stage": 3, "adam_eps": 1e-8, "grad_cp": 0, "ds_bucket_mb": 200} | BAR,
    "v5 run x052": RWKV_LM | RUN | V5 | {"my_pile_stage": 3, "my_testing": "x052", "ds_bucket_mb": 2} | BAR,
    "v5 prepare x060": RWKV_LM | PREPARE | V5 | {"my_pile_stage": 1, "my_testing": "x060"},
    "v5 run x060": RWKV_LM | RUN | V5 | {"my_pile_stage": 3, "my_testing": "x060", "ds_bucket_mb": 2} | BAR,
    "v5 prepare pile": RWKV_LM | PREPARE | V5 | PILE | {"my_pile_stage": 1, "my_testing": "x070"},
    "v5 run pile": RWKV_LM | RUN | V5 | PILE | PILE_RUN | {"my_pile_stage": 3, "my_testing": "x070"} | BAR | WIDE,
    "v7 prepare": RWKV_LM | PREPARE | V7 | {"train_stage": 1},
    "v7 run": RWKV_LM | RUN | V7 | {"train_stage": 3} | BAR,
    "v7 run with buckets": RWKV_LM | RUN | V7 | {"train_stage": 3, "ds_bucket_mb": 2} | BAR,
    "v7 prepare, 2026": RWKV_LM | PREPARE | V7 | {"train_stage": 1} | CHUNKS,
    "v7 run, 2026": RWKV_LM | RUN | V7 | {"train_stage": 3} | CHUNKS | BAR,
    "v7 prepare pile": RWKV_LM | PREPARE | V7 | PILE | {"train_stage": 1},
    "v7 run pile": RWKV_LM | RUN | V7 | PILE | PILE_RUN | {"train_stage": 3, "wandb": "RWKV-7-Pile"} | BAR,
}

RWKV_PEFT = settings(
    "load_model=base.pth data_file=data data_type=binidx vocab_size=65536 ctx_len=512 n_layer=32 "
    "n_embd=2560 epoch_steps=1000 epoch_count=1 epoch_begin=0 epoch_save=1 micro_bsz=8 lr_init=2e-05 "
    "lr_final=2e-05 warmup_steps=0 beta1=0.9 beta2=0.99 adam_eps=1e-08 accelerator=gpu devices=1 "
    "precision=bf16 strategy=deepspeed_stage_1 grad_cp=1 my_testing=x060"
)
SHORT = {name: value for name, value in RWKV_PEFT.items() if name not in ("epoch_begin", "warmup_steps", "beta1")}
SHORT = {name: value for name, value in SHORT.items() if name not in ("beta2", "adam_eps")} | {"my_testing": "x070"}
OLD = {"pre_ffn": 0, "head_qk": 0}
PAD = {"dataload": "pad", "loss_mask": "pad"}
LOSS = {"wandb": "peft-loss"}
FIRST_LORA = {"lora": True, "lora_load": "rwkv-0", "lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.01}
FIRST_LORA |= {"lora_parts": "att,ffn,time,ln", "ctx_len": 1024}
BONE = {"peft": "bone", "bone_config": '{"bone_load":"","bone_r":64}'}
BONE_MODE = {"peft": "bone", "bone_config": '{"bone_mode":"bone","bone_load":"","bone_r":64}'}
LORA = {"peft": "lora", "lora_config": '{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_dropout":0.0}'}
PARTS = {"lora_config": '{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_dropout":0.0,"lora_parts":"att,ffn"}'}
PISSA = {"peft": "pissa", "pissa_config": '{"pissa_load":"","pissa_init":"","pissa_r":32,"svd_niter":4}'}
PISSA_PARTS = '{"pissa_load":"","pissa_init":"","pissa_r":32,"svd_niter":4,"pissa_parts":"att,ffn"}'
ROWS = {"data_type": "sft", "sft_field": ("query", "response")}
NEW = {name: value for name, value in RWKV_PEFT.items() if name != "load_model"} | {"n_layer": 12, "n_embd": 768}
INFCTX = settings("dataload=pad train_type=infctx ctx_len=4096 chunk_ctx=2048")
FINETUNE = settings("train_type=finetune dataload=pad accelerator=xpu") | {"fla": True}
SFT_2024 = {"data_file": "meta-math/MetaMathQA", "data_shuffle": 0, "sft_split": "train[:1000]"}
STATES = {"train_type": "state", "dataload": "pad", "lr_init": 1, "lr_final": 1e-2, "warmup_steps": 10, "fla": True}

RWKV_PEFT_SCRIPTS = {
    "demo-lora, the first": RWKV_PEFT | OLD | FIRST_LORA | {"quant": "fp4"},
    "demo-lora": RWKV_PEFT | OLD | FIRST_LORA | {"epoch_count": 20},
    "demo-pissa": RWKV_PEFT | OLD | FIRST_LORA | {"PISSA": True, "svd_niter": 4, "quant": "nf4"},
    "infctx": RWKV_PEFT | OLD | FIRST_LORA | {"PISSA": True, "svd_niter": 4, "fla": True} | INFCTX,
    "training-v6 lisa": RWKV_PEFT | OLD | {"LISA": True, "lisa_r": 2, "lisa_k": 100, "accumulate_grad_batches": 1},
    "demo-state-tuning": RWKV_PEFT | OLD | STATES,
    "demo-finetune": NEW | OLD | FINETUNE | {"strategy": "single_device", "wandb": "peft-test-platform"},
    "demo-finetune, later": NEW | OLD | FINETUNE | {"strategy": "single"},
    "pretrain": NEW | ROWS | {"sft_split": "train[:1000]", "lr_init": 3e-4, "lr_final": 1e-4},
    "run_bone": RWKV_PEFT | OLD | PAD | BONE | LOSS,
    "run_bone without parts": RWKV_PEFT | OLD | PAD | BONE | LOSS | {"train_parts": "[]"},
    "run_lora, 2024": RWKV_PEFT | OLD | PAD | LORA | LOSS,
    "run_lora": RWKV_PEFT | PAD | LORA,
    "run_lora_fp8": RWKV_PEFT | OLD | LORA | PARTS | LOSS | {"train_parts": "[]", "quant": "fp8"},
    "run_pissa, 2024": RWKV_PEFT | OLD | PAD | PISSA | LOSS,
    "run_pissa": RWKV_PEFT | PAD | PISSA | {"my_testing": "x070"},
    "run_pissa_fp8": RWKV_PEFT | OLD | PISSA | LOSS | {"pissa_config": PISSA_PARTS, "quant": "fp8"},
    "mask_se": RWKV_PEFT | OLD | BONE | {"dataload": "pad", "loss_mask": "se", "mask_id": '{"mask0":"a","mask01":"b"}'},
    "run_sft, 2024": RWKV_PEFT | BONE_MODE | ROWS | SFT_2024,
    "run_sft": RWKV_PEFT | BONE_MODE | ROWS | {"sft_split": "train", "my_testing": "x070", "wandb": "DiSHA"},
    "run_disha": RWKV_PEFT | PAD | {"peft": "disha", "disha_config": '{"mode":"bone","load":"","r":64}'},
    "run_lora, 2025": SHORT
    | {"peft": "lora", "peft_config": '{"r":8,"lora_alpha":32,"lora_dropout":0.05}', "data_type": "jsonl"},
    "miss": SHORT | {"peft": "miss", "peft_config": '{"r":64}', "data_type": "jsonl", "devices": 4, "ctx_len": 4096},
    "state tuning": SHORT | {"peft": "state", "op": "fla", "data_type": "jsonl", "lr_init": 1e-2, "lr_final": 1e-4},
}
