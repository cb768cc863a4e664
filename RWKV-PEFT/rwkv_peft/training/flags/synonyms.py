"""Tell what other trainers' flags and values are called here, by meaning, because spellings mislead."""

from types import MappingProxyType

from ...config import OF_ROWS
from ...names import QUANTS, called
from ...objectives import OBJECTIVES

# (what to give here, the names of that flag in Hugging Face's trainers and their like)
MEANINGS = (
    ("--lr_init (and --lr_final, where it ends)", ("learning_rate", "lr")),
    ("--lr_final", ("min_lr", "min_learning_rate")),
    ("--proj_dir", ("output_dir", "out_dir", "save_dir")),
    ("--epoch_count", ("num_train_epochs", "num_epochs", "epochs")),
    ("--epoch_steps with --epoch_count 1", ("max_steps", "max_train_steps", "num_steps")),
    ("--micro_bsz", ("per_device_train_batch_size", "per_device_batch_size", "train_batch_size", "batch_size")),
    ("--micro_bsz", ("micro_batch_size",)),
    ("--accumulate_grad_batches", ("gradient_accumulation_steps", "accumulation_steps", "grad_accum")),
    ("--load_model", ("model_name_or_path", "base_model_name_or_path", "base_model", "pretrained_model", "model")),
    ("--data_file", ("data_path", "dataset", "dataset_name", "dataset_path", "train_file", "train_data", "datasets")),
    ("--sft_field", ("dataset_field", "dataset_text_field")),
    ("--sft_split", ("dataset_split", "train_split")),
    ("--val_data", ("validation_file", "eval_dataset", "eval_file")),
    ("--val_split", ("val_set_size", "val_size", "eval_split_ratio")),
    ("--val_every", ("eval_steps", "evaluation_strategy", "eval_strategy")),
    ("--early_stop", ("early_stopping_patience",)),
    ("--ctx_len", ("max_seq_length", "max_length", "seq_length", "block_size", "cutoff_len", "sequence_len")),
    ("--dataload pack", ("packing", "sample_packing")),
    ("--peft", ("adapter", "finetuning_type")),
    ("--peft lora", ("lora", "use_lora")),
    ("--peft pissa", ("PISSA",)),
    ("svd_niter in --pissa_config", ("svd_niter",)),
    ("--disha_config with --peft disha", ("miss_config",)),
    ("--train_type state", ("state_tune",)),
    ("lora_r in --lora_config", ("lora_r", "lora_rank")),
    ("lora_alpha in --lora_config", ("lora_alpha",)),
    ("lora_dropout in --lora_config", ("lora_dropout",)),
    ("lora_load in --lora_config", ("lora_load",)),
    ("--target_modules", ("lora_target_modules", "lora_target")),
    ("--train_parts", ("modules_to_save", "additional_target", "lora_parts")),
    ("--bone_r", ("r", "rank")),
    ("--quant nf4", ("load_in_4bit",)),
    ("--quant int8", ("load_in_8bit",)),
    ("--random_seed", ("seed", "data_seed")),
    ("--precision", ("bf16", "fp16", "dtype", "torch_dtype", "mixed_precision")),
    ("--grad_cp 1", ("gradient_checkpointing",)),
    ("--gradient_clip_val", ("max_grad_norm", "grad_clip")),
    ("--lr_schedule", ("lr_scheduler_type", "lr_scheduler")),
    ("--objective", ("loss_type", "pref_loss", "rl", "stage")),
    ("--dpo_beta, or that of another --objective", ("beta", "pref_beta")),
    ("--simpo_gamma", ("gamma",)),
    ("--kto_desirable", ("desirable_weight", "kto_chosen_weight")),
    ("--kto_undesirable", ("undesirable_weight", "kto_rejected_weight")),
    ("--warmup_steps, a number of steps", ("warmup_ratio",)),
    ("--beta1", ("adam_beta1",)),
    ("--beta2", ("adam_beta2",)),
    ("--adam_eps", ("adam_epsilon", "eps")),
    ("--save_every", ("save_steps",)),
    ("--epoch_save or --save_every", ("save_strategy",)),
    ("--keep_checkpoints", ("save_total_limit", "keep_last_n", "max_checkpoints", "max_to_keep")),
    ("--resume", ("resume_from_checkpoint",)),
    ("--wandb, --trackio or --swanlab PROJECT", ("report_to", "wandb_project")),
    ("--strategy", ("deepspeed", "fsdp")),
    ("--merge_on_save", ("merge_and_save",)),
    ("--optim", ("optimizer", "optimizer_name", "optim_type")),
    ("--config", ("config_file", "config_path", "cfg")),
    ("LISA's, which is no method here (--peft names those that are)", ("LISA", "lisa_r", "lisa_k")),
)
SYNONYMS = MappingProxyType({f"--{name}": ours for ours, names in MEANINGS for name in names})

# (flag, what to give here, the values for it in RWKV-LM, RWKV-PEFT, Hugging Face and Lightning)
VALUE_MEANINGS = (
    ("--peft", "--peft miss", ("MISS", "MiSS", "DiSHA")),
    ("--peft", "--peft bone --bone_mode bat-in", ("bat", "bat-in")),
    ("--peft", "--peft bone --bone_mode bat-in-scaled", ("bat-in-scaled",)),
    ("--peft", "--peft bone --bone_mode bat-out", ("bat-out",)),
    ("--peft", "--peft none", ("full", "finetune")),
    ("--train_type", "--train_type finetune", ("full",)),
    ("--train_type", "--data_type pairs", ("rlhf", "preference")),
    ("--data_type", "--data_type pairs", ("preference", "preferences", "ranking")),
    *(
        (flag, f"--data_type {objective.rows[-1]} --objective {name}", (name,))
        for flag in ("--train_type", "--data_type")
        for name, objective in OBJECTIVES.items()
    ),
    ("--data_type", "--data_type sft", ("json", "parquet")),
    ("--data_type", "binidx, which `rwkv-peft preprocess` makes of a text,", ("utf-8", "utf-16le", "text", "txt")),
    *QUANTS,
    ("--precision", "--precision bf16", ("bf16-mixed", "bf16-true", "bfloat16")),
    ("--precision", "--precision fp16", ("float16", "half", "16", "16-mixed", "16-true")),
    ("--precision", "--precision fp32", ("tf32", "float32", "32", "32-true")),
    ("--optim", "--optim adamw", ("adam", "adamw_torch", "adamw_torch_fused", "adamw_hf", "fused_adam")),
    ("--optim", "--optim adamw8bit", ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")),
    ("--optim", "--optim lion", ("lion_32bit",)),
    ("--optim", "--optim schedule_free", ("schedule_free_adamw",)),
    ("--accelerator", "--accelerator gpu", ("cuda",)),
    ("--strategy", "--strategy deepspeed_stage_1", ("auto", "ddp", "deepspeed", "single", "single_device")),
    ("--strategy", "--strategy deepspeed_stage_1", ("single-device",)),
    ("--strategy", "--strategy deepspeed_stage_3", ("fsdp",)),
)
VALUES = MappingProxyType(
    {**{(flag, value): called(value, ours) for flag, ours, values in VALUE_MEANINGS for value in values}}
)

# the remedy if several files are given to a flag that takes one
JOINED = (
    "`rwkv-peft preprocess FILE FILE … --output PREFIX` makes one PREFIX of several, and a folder that holds files "
    f"of rows is one input of --data_type {', '.join(OF_ROWS)}"
)
SEVERAL = MappingProxyType(
    {"--retain_data": JOINED, "--eval_data": "write their rows into one file, as by cat FILE FILE > all.jsonl"}
)
