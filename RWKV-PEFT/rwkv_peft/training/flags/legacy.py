"""Flags of RWKV-LM's, RWKV-PEFT's and other trainers' scripts: a table of spellings, and those that are translated.

In the tables are flags that set nothing here, with the values that are accepted; flags and values with another name
here, which the refusal gives. Meanings go by effect: spellings mislead.

RWKV-LM trains whole models in stages. --train_stage 1 writes a new model, PROJ_DIR/rwkv-init.pth; stages 2 and 3 train
the newest rwkv-N.pth there, or rwkv-init.pth, or a new model if there is neither. Its epochs are 40,320 samples each. A
run ends at --my_exit_tokens, or without it after as many epochs as --magic_prime holds.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...cli.errors import UserError, short, summarize
from ...cli.names import NONE, QUANTS, STATE, called, is_whole
from ...cli.parser import count, counted
from ...config import OF_ROWS
from ...config.adapter import LEFT, refusal_of
from ...objectives import OBJECTIVES
from ..ranks.world import step_samples

KERNELS = "the device chooses the kernels, and all compute the same"
LOADING = "the data is mapped from its file, and no processes load it"
# (flag, the values that ask for what training does anyway, what another value asks for), and of those that take any
# value or none (flag, (), why it is ignored)
WITHOUT_EFFECT: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("kernel", (), KERNELS),
    ("fla", (), KERNELS),
    ("fused_kernel", (), KERNELS),
    ("fused", (), "every run computes blocks by the same kernels, and --compile fuses what lies between them"),
    ("cuda_graphs", (), "training records no graphs; --compile takes fewer launches"),
    ("draw_ahead", (), "a step samples its completions by the weights that learn from them"),
    ("stall_minutes", (), "--timeout_minutes ends a run in which a rank waits for another in vain"),
    ("bptt_segments", (), "the gradient of a row's states goes back to its first token"),
    ("head_chunk", (), "the loss holds a few rows of logits at a time, whatever is asked"),
    ("ds_bucket_mb", (), "the size of communication buckets follows from what trains"),
    ("num_workers", (), LOADING),
    ("prefetch_factor", (), LOADING),
    ("persistent_workers", (), LOADING),
    ("op", ("cuda", "fla", "triton"), "other kernels, and the device chooses them here"),
    ("pre_ffn", ("0",), "a feed-forward layer in place of the first attention, which RWKV-6 and RWKV-7 do not have"),
    ("head_qk", ("0",), "a copying head, which RWKV-6 and RWKV-7 do not have"),
    ("tiny_att_dim", ("0",), "a tiny attention, which RWKV-6 and RWKV-7 do not have"),
    ("my_pos_emb", ("0",), "position embeddings, which RWKV-6 and RWKV-7 do not have"),
    ("head_size_divisor", ("8",), "another epsilon of ln_x, and RWKV-6 and RWKV-7 have that of 8"),
    ("dropout", ("0",), "dropout in the model; lora_dropout in --lora_config is that of LoRA"),
    ("weight_decay_final", ("-1",), "a weight decay that changes, and it is constant here"),
    ("my_qa_mask", ("0",), "RWKV-LM's mask of questions; --loss_mask qa is that mask here"),
    ("l2warp_sparse", ("0",), "L2Wrap in a sparse form, and it is dense here"),
    ("load_partial", ("0",), "a base with missing tensors, and a base must be complete here"),
    ("tiny_att_layer", ("-999",), "a tiny attention, which RWKV-6 and RWKV-7 do not have"),
    ("my_ffn_shift", ("1",), "a feed-forward without token shift, which RWKV-6 and RWKV-7 do not have"),
    ("my_att_shift", ("1",), "an attention without token shift, which RWKV-6 and RWKV-7 do not have"),
    ("my_pile_version", ("1",), "another version of RWKV-LM's Pile, and --data_file names the data here"),
    ("my_pile_shift", ("-1", "0"), "another order of RWKV-LM's Pile, and samples come in an order of their own here"),
    ("my_pile_edecay", ("0",), "another fall of the rate on RWKV-LM's Pile; --lr_final and --lr_schedule set it here"),
    ("my_sample_len", ("0",), "samples of another length; --ctx_len sets it here"),
    ("my_random_steps", ("0",), "RWKV-LM's random steps, and samples come in a random order without repetition here"),
    ("my_exit", ("99999999",), "an end after so many epochs; --epoch_count sets it here"),
    ("avg_loss", ("0",), "another mean over the segments of a row, and every token of a step weighs the same here"),
    ("lisa_config", ('{"lisa_r":2,"lisa_k":100}',), "LISA, which is no method here; --peft names those that are"),
    ("merge", ("0",), "a merged model at each save; --merge_on_save writes one here"),
    ("enable_progress_bar", ("True", "False"), "something else than a progress bar, which only a terminal shows"),
)
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
    ("--load_model", ("model_name_or_path", "base_model_name_or_path", "base_model", "pretrained_model")),
    ("--data_file", ("data_path", "dataset", "dataset_name", "dataset_path", "train_file", "train_data", "datasets")),
    ("--sft_field", ("dataset_field", "dataset_text_field")),
    ("--sft_split", ("dataset_split", "train_split")),
    ("--val_data", ("validation_file", "eval_dataset", "eval_file")),
    ("--val_split", ("val_set_size", "val_size", "eval_split_ratio")),
    ("--val_every", ("eval_steps", "evaluation_strategy", "eval_strategy")),
    ("--early_stop", ("early_stopping_patience",)),
    ("--ctx_len", ("max_seq_length", "max_length", "seq_length", "block_size", "cutoff_len", "sequence_len")),
    ("--dataload pack", ("packing", "sample_packing")),
    ("--peft", ("finetuning_type",)),
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
    ("--teacher_model, merged with it by merge_bone.py", ("teacher_adapter", "teacher_state")),
    ("--epoch_save or --save_every", ("save_strategy",)),
    ("--keep_checkpoints", ("save_total_limit", "keep_last_n", "max_checkpoints", "max_to_keep")),
    ("--resume", ("resume_from_checkpoint",)),
    ("--wandb, --trackio or --swanlab PROJECT", ("report_to", "wandb_project")),
    ("--strategy", ("deepspeed", "fsdp")),
    ("--merge_on_save", ("merge_and_save",)),
    ("--optim", ("optimizer", "optimizer_name", "optim_type")),
    ("--config", ("config_file", "config_path", "cfg")),
    ("--eval_data, or after the run rwkv-peft eval TASK --adapter PROJ_DIR", ("lm_eval",)),
    ("LISA's, which is no method here (--peft names those that are)", ("LISA", "lisa_r", "lisa_k")),
)
SYNONYMS = MappingProxyType({f"--{name}": ours for ours, names in MEANINGS for name in names})

# (flag, what to give here, the values for it in RWKV-LM, RWKV-PEFT, Hugging Face and Lightning)
VALUE_MEANINGS = (
    ("--peft", "--peft miss", ("MISS", "MiSS", "DiSHA")),
    ("--peft", "--peft bone --bone_mode bat-in", ("bat", "bat-in")),
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
    ("--accelerator", "--accelerator gpu", ("cuda",)),
    ("--strategy", "--strategy deepspeed_stage_1", ("auto", "ddp", "deepspeed", "single", "single_device")),
    ("--strategy", "--strategy deepspeed_stage_1", ("single-device",)),
    ("--strategy", "--strategy deepspeed_stage_3", ("fsdp",)),
)
VALUES = MappingProxyType(
    {(flag, value): called(value, ours) for flag, ours, values in VALUE_MEANINGS for value in values}
    | {("--peft", name): refusal_of(name) for name in LEFT}
)

# the remedy if several files are given to a flag that takes one
JOINED = (
    "`rwkv-peft preprocess FILE FILE … --output PREFIX` makes one PREFIX of several, and a folder that holds files "
    f"of rows is one input of --data_type {', '.join(OF_ROWS)}"
)
SEVERAL = MappingProxyType(
    {"--retain_data": JOINED, "--eval_data": "write their rows into one file, as by cat FILE FILE > all.jsonl"}
)


def add_legacy_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of WITHOUT_EFFECT to a parser; --help leaves them out."""
    group = parser.add_argument_group("flags of RWKV-LM's and RWKV-PEFT's scripts, which set nothing here")
    for flag, values, asked in WITHOUT_EFFECT:
        if values:
            group.add_argument(f"--{flag}", type=inert(values, asked), help=argparse.SUPPRESS)
        else:
            group.add_argument(f"--{flag}", nargs="?", const="", help=argparse.SUPPRESS)


def inert(values: Sequence[str], asked: str) -> Callable[[str], str]:
    """Make an argparse type that takes only `values`, numbers and JSON in any spelling."""

    def parse(text: str) -> str:
        if not any(text.lower() == value.lower() or _meaning(text) == _meaning(value) is not None for value in values):
            raise argparse.ArgumentTypeError(
                f"{short(text)!r} asks for {asked}; give {' or '.join(values)}, or leave the flag out"
            )
        return text

    return parse


def _meaning(text: str) -> object:
    """The number or JSON object that a text spells, or None."""
    for read in (float, json.loads):
        with suppress(ValueError, RecursionError):
            return read(text)
    return None


INIT = "rwkv-init.pth"
SAVED = re.compile(r"rwkv-(init|\d{1,9})\.pth")
EPOCH = 40320  # samples
PLACEHOLDER = "0"  # --load_model in scripts whose stage chooses the model
MISS = "miss"  # RWKV-PEFT's later word for bone
WORDS = (MISS, STATE)  # further values of --peft
UNSET = MappingProxyType({"mask0": "0", "mask1": "1"})  # what RWKV-PEFT's scripts pass if no marker is meant


def add_upstream_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("flags of RWKV-LM's scripts, which set others")
    group.add_argument(
        "--train_stage",
        "--my_pile_stage",
        type=count,
        choices=range(4),
        default=0,
        help=f"1: write a new model, {INIT}, to --proj_dir and end; 2 and 3: train the newest rwkv-N.pth there, else "
        f"{INIT}, else a new model. All of them mean --peft none",
    )
    group.add_argument(
        "--my_exit_tokens",
        type=count,
        default=0,
        help="train on so many tokens in all: sets --epoch_steps and --epoch_count, and --lr_schedule rwkv-lm unless "
        "that is given",
    )
    group.add_argument(
        "--magic_prime",
        type=count,
        default=0,
        help=f"with --train_stage and without --my_exit_tokens: train on so many samples, in epochs of {EPOCH:,}; "
        "the order of the data needs no such number here",
    )


def check_stage(args: argparse.Namespace) -> Iterator[str]:
    """Yield the refusal of a --train_stage 1 that would overwrite a model."""
    if args.train_stage == 1 and os.path.lexists(path := Path(args.proj_dir) / INIT):
        yield f"--train_stage 1 would overwrite {path}; delete it for another model, or go on with --train_stage 3"


def adopt(args: argparse.Namespace) -> list[str]:
    """Set the flags that a script means in a parsed command line -> notes on the changes, and on each given flag of
    WITHOUT_EFFECT that takes any value."""
    notes = [
        f"--{flag}{' ' * bool(value)}{short(value)} is ignored: {why}"
        for flag, values, why in WITHOUT_EFFECT
        if not values and (value := getattr(args, flag)) is not None
    ]
    if args.load_model == PLACEHOLDER:
        args.load_model = ""
    if args.train_stage:
        args.peft = args.peft or NONE
    if args.train_stage > 1 and not args.load_model:
        folder = Path(args.proj_dir)
        saved = [match for name in (os.listdir(folder) if folder.is_dir() else ()) if (match := SAVED.fullmatch(name))]
        newest = max(saved, key=lambda match: -1 if match[1] == "init" else int(match[1]), default=None)
        args.load_model = str(folder / newest[0]) if newest else ""
        source = args.load_model or f"no rwkv-N.pth or {INIT} is in --proj_dir: a new model"
        notes.append(f"--train_stage {args.train_stage}: all of the model trains, from {source}")
    if args.peft == MISS:
        args.peft, args.bone_mode = "bone", args.bone_mode or "bone"
    if args.peft == STATE:
        args.peft, args.train_type = NONE, STATE
    samples, steps = step_samples(args), 0
    if args.my_exit_tokens:
        steps = -(-args.my_exit_tokens // (args.ctx_len * samples))
    elif args.train_stage and args.magic_prime:
        steps = max(1, args.magic_prime // EPOCH * (EPOCH // samples))
    if steps:
        epoch = max(1, EPOCH // samples) if args.train_stage else args.epoch_steps
        args.save_every = args.save_every or (args.epoch_save or 0) * epoch
        args.epoch_steps, args.epoch_count = steps, 1
        args.lr_schedule = args.lr_schedule or "rwkv-lm"
        often = f", a save every {args.save_every:,}" if args.save_every else ""
        notes.append(f"--{'my_exit_tokens' if args.my_exit_tokens else 'magic_prime'}: {counted(steps, 'step')}{often}")
    return notes


def marker(text: str) -> int | dict[str, Any]:
    """Parse an argument (an argparse type) -> a token id, or the JSON object {"mask0": …, "mask1": …} as a dict."""
    if not text.lstrip().startswith("{"):
        return count(text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{short(text)!r} is not JSON ({summarize(error)})") from error
    if set(value) != set(UNSET):
        raise argparse.ArgumentTypeError(f"{short(text)!r} has other keys than mask0 and mask1, which are due")
    return value


def markers_of(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Return {"mask_id", "mask_end_id": token ids} if --mask_id is the JSON, else {}. Its mask1 opens the part that
    counts, its mask0 closes it. Raises UserError if other markers are given too."""
    objects = [item for item in args.mask_id or () if isinstance(item, dict)]
    if not objects:
        return {}
    if len(args.mask_id) > 1 or args.mask_end_id:
        named = short(json.dumps(objects[0]))
        raise UserError(f"--mask_id {named} names both markers; leave other ids and --mask_end_id out")
    texts = objects[0]
    if texts == UNSET:
        return {"mask_id": (), "mask_end_id": ()}
    tokenizer = tokenizer_of(args)
    return {"mask_id": token_ids(texts["mask1"], tokenizer), "mask_end_id": token_ids(texts["mask0"], tokenizer)}


def tokenizer_of(args: argparse.Namespace) -> str:
    """The name of the data's tokenizer: that recorded beside token files, if any, else --tokenizer."""
    from ...data.recorded import recorded_of_data

    recorded = None if args.data_type != "binidx" else recorded_of_data(args.data_file)
    return args.tokenizer if recorded is None else recorded.name


def token_ids(marked: object, tokenizer: str) -> tuple[int, ...]:
    """The ids of one value of the JSON: a text, a token id or a list of ids. Raises UserError for anything else."""
    if isinstance(marked, str):
        from ...data.tokenizer import load_tokenizer

        return tuple(load_tokenizer(tokenizer).encode(marked))
    ids = marked if isinstance(marked, list) else [marked]
    if not all(is_whole(token, 0) for token in ids):
        raise UserError(f"--mask_id: {short(json.dumps(marked))} is neither a text nor token ids")
    return tuple(ids)
