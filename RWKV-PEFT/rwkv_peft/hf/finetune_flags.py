"""The arguments of the fine-tuning: Bone's own, and those of trl's SFTConfig, under older names too."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from ..cli import unknown_flag
from ..errors import UserError
from ..gpus import count_gpus
from ..refusals import Refusals
from .config import BoneConfig, option
from .refusals import refusals_of

BITS = ("bf16", "fp16", "fp32", "nf4", "int8")
# (name in older trl and transformers, name in newer ones)
RENAMED = (
    ("max_seq_length", "max_length"),
    ("warmup_ratio", "warmup_steps"),
    ("evaluation_strategy", "eval_strategy"),
    ("no_cuda", "use_cpu"),
    ("use_liger", "use_liger_kernel"),
)
# (name that newer ones dropped, what happens instead)
DROPPED = (
    ("overwrite_output_dir", "an output folder that holds a run is refused"),
    ("save_safetensors", "checkpoints are safetensors"),
    ("logging_dir", "TensorBoard's files go to OUTPUT_DIR/runs"),
)
# (the argument here, its names in train.py and in other trainers)
MEANINGS = (
    ("--base_model_name_or_path", ("load_model", "base_model", "model_name_or_path", "model_name", "model")),
    ("--data_path", ("data_file", "data", "dataset", "dataset_name", "train_file")),
    ("--dataset_field", ("sft_field",)),
    ("--dataset_split", ("sft_split", "train_split")),
    ("--eval_split with --eval_strategy steps", ("val_data", "val_split", "val_set_size", "eval_data")),
    ("--output_dir", ("proj_dir", "out_dir", "save_dir")),
    ("--bits", ("quant", "precision", "dtype", "torch_dtype")),
    ("--bits nf4", ("load_in_4bit",)),
    ("--bits int8", ("load_in_8bit",)),
    ("--bits fp32", ("fp32",)),
    ("--bits fp16", ("half",)),
    ("--bone_r", ("r", "rank", "lora_r", "lora_rank", "miss_r")),
    ("--bone_dropout", ("lora_dropout", "miss_dropout")),
    ("--target_modules", ("lora_target_modules", "lora_target")),
    ("what always happens", ("use_peft", "use_bone", "do_lora")),
    ("given by flags, each by itself", ("config", "config_file")),
    ("--init_weights", ("bone_mode",)),
    ("--bone_r and --init_weights", ("bone_config", "peft", "peft_config")),
    ("--merge_and_save", ("merge_on_save", "merge")),
    ("--learning_rate", ("lr", "lr_init")),
    ("--lr_scheduler_type", ("lr_schedule", "lr_scheduler")),
    ("--num_train_epochs", ("epoch_count", "num_epochs", "epochs")),
    ("--per_device_train_batch_size", ("micro_bsz", "batch_size", "train_batch_size")),
    ("--gradient_accumulation_steps", ("accumulate_grad_batches", "grad_accum")),
    ("--gradient_checkpointing True", ("grad_cp",)),
    ("--max_grad_norm", ("gradient_clip_val", "grad_clip")),
    ("--max_length", ("ctx_len", "seq_length", "block_size", "cutoff_len")),
    ("--save_steps with --save_strategy steps", ("save_every",)),
    ("--save_total_limit", ("keep_checkpoints",)),
    ("--resume_from_checkpoint True", ("resume",)),
    ("--seed", ("random_seed",)),
    ("--report_to wandb", ("wandb",)),
)
SYNONYMS = MappingProxyType({f"--{name}": ours for ours, names in MEANINGS for name in names})
# (argument, its least value, the value that it must be below, the rest of the refusal)
NUMBERS = (
    ("per_device_train_batch_size", 1, math.inf, "is no number of rows; give 1 or more"),
    ("gradient_accumulation_steps", 1, math.inf, "is no number of batches; give 1 or more"),
    ("max_length", 1, math.inf, "is no number of tokens; give 1 or more, or a large one for no limit"),
    ("learning_rate", 0, math.inf, "is no rate; give a number such as 2e-5"),
    ("weight_decay", 0, math.inf, "is no decay; give 0, or a number such as 0.01"),
    ("max_grad_norm", 0, math.inf, "is no norm; give a number such as 1, or 0 to clip nothing"),
    ("dataloader_num_workers", 0, math.inf, "is no number of processes; give 0 or more"),
)


@dataclass
class BoneArguments:
    """The arguments of this command beside SFTConfig's."""

    base_model_name_or_path: str = field(metadata={"help": "Base model: a name on the hub, or a folder."})
    data_path: str = field(
        metadata={"help": "Data: a name on the hub, a folder, or a .jsonl, .json, .csv or .parquet file."}
    )
    dataset_split: str = option("train", "Split, such as train[:100000].")
    eval_split: str | None = option(
        None, "Split to validate on, with --eval_strategy: test, or train[95%%:] beside train[:95%%]."
    )
    dataset_field: list[str] | None = option(
        None,
        "The columns of question and answer, or the one that holds a chat's turns; default: those that "
        "exist of query and response, messages, and conversations.",
    )
    bits: str = option("bf16", f"How the frozen model is kept: {', '.join(BITS)}.")
    bone_r: int = option(64, "Rank.")
    init_weights: str = option("True", "True (bone), bat-in, bat-out (also: bat), mini, or False (random bone).")
    mini_r: int = option(0, "Width of the repeated update, with --init_weights mini.")
    bone_dropout: float = option(0.0, "Dropout of the adapter's input.")
    target_modules: list[str] | None = option(None, "Modules to adapt; default: all linear layers but the head.")
    merge_and_save: bool = option(False, "Also write the merged model.")


def parse(argv: list[str]) -> tuple[BoneArguments, Any]:
    """argv -> (BoneArguments, SFTConfig). Raises UserError for arguments that are unknown, wrong or contradictory."""
    from transformers import HfArgumentParser
    from trl import SFTConfig

    argv = adapt(
        argv, {item.name for item in fields(SFTConfig)}, torch.accelerator.is_available(), torch.cuda.is_available()
    )
    parser = HfArgumentParser((BoneArguments, SFTConfig), allow_abbrev=False, prog="bone_finetuning.py")
    parser.error = refuse
    known = parser._option_string_actions
    Refusals(
        [
            unknown_flag(part, known, SYNONYMS, "see --help")
            for part in argv
            if part.startswith("--") and part not in known
        ]
    ).tell()
    with refusals_of("these arguments"):
        arguments, config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise UserError(unknown_flag(unknown[0], known, SYNONYMS, "see --help"))
    if arguments.bits not in BITS:
        raise UserError(f"--bits {arguments.bits} is unknown; give {', '.join(BITS)}")
    for name, least, below, problem in NUMBERS:
        number = getattr(config, name)
        if number is not None and not least <= number < below:
            raise UserError(f"--{name} {number} {problem}")
    if config.max_steps < 1 and not 0 < config.num_train_epochs < math.inf:
        raise UserError(f"--num_train_epochs {config.num_train_epochs} trains nothing; give a number above 0")
    check_validation(arguments.eval_split, config)
    if (config.dataset_kwargs or {}).get("skip_prepare_dataset"):
        raise UserError(
            "--dataset_kwargs: the rows are text here, and are to be prepared; leave skip_prepare_dataset out"
        )
    check_installed(config)
    targets = arguments.target_modules or ()
    if len(targets) > 1 and "all-linear" in targets:
        raise UserError(
            f"--target_modules {' '.join(targets)}: all-linear goes with no other names; leave the names or it out"
        )
    columns = arguments.dataset_field
    if columns is not None and (len(columns) > 2 or len(set(columns)) < len(columns)):
        raise UserError(
            f"--dataset_field takes two columns, question and answer, or one of turns, and got {' '.join(columns)}"
        )
    return arguments, config


def check_validation(split: str | None, config: Any) -> None:
    """Raise UserError if arguments ask for a validation without rows, or speak of one that does not take place."""
    validates = config.eval_strategy != "no"
    if (validates or config.eval_on_start) and split is None:
        flag = f"--eval_strategy {config.eval_strategy.value}" if validates else "--eval_on_start"
        raise UserError(
            f"{flag} validates on rows of --data_path that --eval_split names, such as --eval_split test; give that too"
        )
    if split is not None and not (validates or config.eval_on_start):
        raise UserError(f"--eval_split {split} is read at --eval_strategy steps or epoch; give that too")
    if config.load_best_model_at_end and not validates:
        raise UserError(
            "--load_best_model_at_end finds the best by validating; give --eval_split and --eval_strategy too"
        )


def refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; see bone_finetuning.py --help")


def check_installed(config: Any) -> None:
    """Raise UserError for an argument whose package or device is missing: training would fail late, or oddly."""
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.utils import is_liger_kernel_available

    for name in config.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, ImportError, RuntimeError) as error:
            raise UserError(f"--report_to {name}: {error}; --report_to none does without") from error
    if config.activation_offloading and not torch.accelerator.is_available():
        raise UserError(
            "--activation_offloading True moves activations from an accelerator to the CPU, and this machine has none; "
            "leave it out"
        )
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("--use_liger_kernel needs a package that is missing: pip install liger-kernel, or leave it out")


def adapt(argv: list[str], known: Collection[str], accelerator: bool, cuda: bool) -> list[str]:
    """Translate arguments into those that the installed trl and transformers take, and print a line about each that is
    renamed or ignored.

    known: the names of SFTConfig's arguments; accelerator, cuda: whether this machine has a device beside the CPU,
    and a CUDA device. Raises UserError if an argument is given under both its names, for a --warmup_ratio outside
    [0, 1), and if there are GPUs that torch cannot use.
    """
    argv = [part for argument in argv for part in (argument.split("=", 1) if argument.startswith("--") else [argument])]
    argv = [part.replace("-", "_").replace("__", "--", 1) if part.startswith("--") else part for part in argv]
    for flag, value in pairwise(argv):
        if flag == "--warmup_ratio":
            check_share(value)
    for old, new in RENAMED:
        if f"--{old}" in argv and old not in known and new in known:
            if f"--{new}" in argv:
                raise UserError(f"--{old} and --{new} are two names of one argument; give only --{new}")
            argv = [f"--{new}" if part == f"--{old}" else part for part in argv]
            print(f"--{old} is --{new} in the installed trl and transformers, and is taken as that")
    for name, instead in DROPPED:
        if f"--{name}" in argv and name not in known:
            drop(argv, f"--{name}")
            print(f"--{name} is gone from the installed trl and transformers, and is ignored: {instead}")
    if ("--bits", "fp32") in pairwise(argv) and not {"--bf16", "--fp16"} & set(argv):
        argv += ["--bf16", "False"]  # trl switches it on by default
    if not cuda and "--tf32" in argv:
        drop(argv, "--tf32")
        print("--tf32 is for CUDA devices; there is none here, and it is ignored")
    if "--use_cpu" not in argv:
        count_gpus("train on the CPU with --use_cpu True")
        if not accelerator:
            argv += ["--use_cpu", "True"]
    return argv


def check_share(ratio: str) -> None:
    """Raise UserError for a --warmup_ratio that newer trainers would take for a number of steps. The parser refuses
    one that is not a number."""
    try:
        share = float(ratio)
    except ValueError:
        return
    if not 0 <= share < 1:
        raise UserError(
            f"--warmup_ratio {ratio} is no share of the steps; give 0 or more and below 1, such as 0.03, or a number "
            "of steps as --warmup_steps"
        )


def drop(argv: list[str], flag: str) -> None:
    """Remove a flag and its value, if it has one, each time it is given."""
    while flag in argv:
        at = argv.index(flag)
        has_value = at + 1 < len(argv) and not argv[at + 1].startswith("--")
        del argv[at : at + 1 + has_value]


def bone_config(arguments: BoneArguments) -> BoneConfig:
    init_weights = {"true": True, "false": False}.get(arguments.init_weights.lower(), arguments.init_weights)
    targets = arguments.target_modules or ["all-linear"]
    return BoneConfig(
        r=arguments.bone_r,
        init_weights=init_weights,
        mini_r=arguments.mini_r,
        bone_dropout=arguments.bone_dropout,
        target_modules=targets[0] if len(targets) == 1 and targets[0] == "all-linear" else targets,
        task_type="CAUSAL_LM",
    )


def model_settings(config: Any) -> dict[str, Any]:
    """Take --trust_remote_code and --model_init_kwargs out of config as settings for from_pretrained, because trl
    applies them only to a model that it loads itself. Raises UserError if they give a dtype or a quantization."""
    settings = {"trust_remote_code": True} if getattr(config, "trust_remote_code", False) else {}
    settings |= config.model_init_kwargs or {}
    for name in ("dtype", "torch_dtype", "quantization_config"):
        if name in settings:
            raise UserError(
                f"--model_init_kwargs gives {name}, and --bits says how the model is kept; leave {name} out"
            )
    config.model_init_kwargs = None
    return settings
