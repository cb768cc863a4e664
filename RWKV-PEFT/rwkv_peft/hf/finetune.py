"""Supervised fine-tuning of a Hugging Face causal language model with Bone, on trl's SFTTrainer.

    python demo/bone_finetuning.py --base_model_name_or_path meta-llama/Llama-2-7b-hf --output_dir out/llama \\
        --data_path fxmeng/pissa-dataset --dataset_split train[:100000] --dataset_field query response \\
        --bone_r 64 --init_weights bat-in --bits bf16 --merge_and_save --bf16 True --learning_rate 2e-5

The arguments are ScriptArguments and trl's SFTConfig. Rows are a question and its answer, or of any form that
SFTTrainer takes, such as chats in `messages`. The adapter goes to OUTPUT_DIR/bone_ft and, with --merge_and_save, the
merged model to OUTPUT_DIR/bone_merged.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from ..cli.errors import UserError
from ..cli.parser import unknown_flag
from ..data.forms import LABELLED
from ..gpus import count_gpus
from .config import BoneConfig, option

DTYPES = MappingProxyType({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32})
BITS = (*DTYPES, "nf4", "int8")
ADAPTER, MERGED = "bone_ft", "bone_merged"  # folders in --output_dir
COLUMNS = ("query", "response")
RENAMED = (("max_seq_length", "max_length"), ("warmup_ratio", "warmup_steps"))  # by newer trl and transformers


@dataclass
class ScriptArguments:
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
        None, "The columns of question and answer; default: query and response if there are such, else trl's own."
    )
    bits: str = option("bf16", f"How the frozen model is kept: {', '.join(BITS)}.")
    bone_r: int = option(64, "Rank.")
    init_weights: str = option("True", "True (bone), bat-in, bat-out (also: bat), mini, or False (random bone).")
    mini_r: int = option(0, "Width of the repeated update, with --init_weights mini.")
    bone_dropout: float = option(0.0, "Dropout of the adapter's input.")
    target_modules: list[str] | None = option(None, "Modules to adapt; default: all linear layers but the head.")
    merge_and_save: bool = option(False, "Also write the merged model.")


def main(argv: list[str]) -> int:
    """Train, save and merge; -> 0. Raises UserError for arguments and rows that cannot be honoured."""
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    arguments, config = parse(argv)
    adapter, resumed = Path(config.output_dir) / ADAPTER, resume_of(config)
    settings = {"trust_remote_code": getattr(config, "trust_remote_code", False)} | (config.model_init_kwargs or {})
    config.model_init_kwargs = None  # trl applies them only to a model that it loads itself
    with library_errors(f"--base_model_name_or_path {arguments.base_model_name_or_path}"):
        named = {name: settings[name] for name in ("revision", "trust_remote_code") if name in settings}
        tokenizer = AutoTokenizer.from_pretrained(arguments.base_model_name_or_path, **named)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data, held_out = (
        load_rows(arguments, split, tokenizer.eos_token or "") if split else None
        for split in (arguments.dataset_split, arguments.eval_split)
    )
    model = load_model(arguments.base_model_name_or_path, arguments.bits, settings)
    with library_errors("these arguments"):
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=data,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=bone_config(arguments),
        )
    for parameter in trainer.model.parameters() if arguments.bits not in DTYPES else ():
        if parameter.requires_grad:  # trl casts them to bfloat16 on quantized models, which loses small steps
            parameter.data = parameter.data.float()
    if trainer.is_world_process_zero():
        trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=resumed)
    trainer.save_state()
    trainer.save_model(str(adapter))
    if trainer.is_world_process_zero():
        print(f"the adapter is in {adapter}")
        if arguments.merge_and_save:
            merge_and_save(arguments, settings, adapter, Path(config.output_dir) / MERGED, tokenizer)
    return 0


def parse(argv: list[str]) -> tuple[ScriptArguments, Any]:
    """argv -> (ScriptArguments, SFTConfig). Raises UserError for arguments that are unknown or wrong."""
    from transformers import HfArgumentParser
    from trl import SFTConfig

    argv = adapt(argv, {item.name for item in fields(SFTConfig)}, torch.accelerator.is_available())
    parser = HfArgumentParser((ScriptArguments, SFTConfig), allow_abbrev=False, prog="bone_finetuning.py")
    parser.error = refuse
    with library_errors("these arguments"):
        arguments, config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise UserError(unknown_flag(unknown[0], parser._option_string_actions, {}, "see --help"))
    if arguments.bits not in BITS:
        raise UserError(f"--bits {arguments.bits} is unknown; give {', '.join(BITS)}")
    if arguments.dataset_field is not None and len(set(arguments.dataset_field)) != 2:
        raise UserError(
            f"--dataset_field {' '.join(arguments.dataset_field)}: two columns are due, question and answer"
        )
    return arguments, config


def refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; see bone_finetuning.py --help")


def adapt(argv: list[str], known: Collection[str], accelerator: bool) -> list[str]:
    """Translate older names of arguments, and add the settings of a machine without GPUs. Raises UserError if there are
    GPUs that torch cannot use."""
    argv = [part for argument in argv for part in (argument.split("=", 1) if argument.startswith("--") else [argument])]
    for old, new in RENAMED:
        if old not in known and new in known:
            argv = [f"--{new}" if part == f"--{old}" else part for part in argv]
    if ("--bits", "fp32") in pairwise(argv) and not {"--bf16", "--fp16"} & set(argv):
        argv += ["--bf16", "False"]  # trl switches it on by default
    if not accelerator and "--tf32" in argv:
        argv += ["--tf32", "False"]  # the last one counts
    if "--use_cpu" not in argv:
        count_gpus("train on the CPU with --use_cpu True")
        argv += [] if accelerator else ["--use_cpu", "True"]
    return argv


def resume_of(config: Any) -> str | None:
    """The folder of --resume_from_checkpoint, for True the newest checkpoint; None without the flag. Raises UserError
    if there is none, and for an --output_dir with a run that is not resumed."""
    from transformers.trainer_utils import get_last_checkpoint

    given, output = str(config.resume_from_checkpoint), Path(config.output_dir)
    if given.lower() in ("none", "false"):
        if (output / ADAPTER).exists():
            raise UserError(
                f"--output_dir {output} holds a run ({ADAPTER}); add --resume_from_checkpoint True if it has a "
                "checkpoint, or name another folder"
            )
        return None
    if given.lower() == "true":
        given = (get_last_checkpoint(output) if output.is_dir() else None) or str(output / "checkpoint-1")
    if not (Path(given) / "trainer_state.json").is_file():
        raise UserError(f"--resume_from_checkpoint {config.resume_from_checkpoint}: there is no checkpoint {given}")
    return given


@contextmanager
def library_errors(subject: str) -> Iterator[None]:
    """Within, a library's error about its arguments or files becomes a UserError that names `subject`."""
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        raise UserError(*f"{subject}: {error}".splitlines()) from error


def load_model(path: str, bits: str, settings: Mapping[str, Any]) -> Any:
    """Load the base model, its frozen weights in the dtype or quantization that `bits` names."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype, quantization = DTYPES.get(bits, torch.bfloat16), None
    if bits == "nf4":
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    elif bits == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    with library_errors(f"--base_model_name_or_path {path}"):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=quantization, **settings)


def bone_config(arguments: ScriptArguments) -> BoneConfig:
    init_weights = {"true": True, "false": False}.get(arguments.init_weights.lower(), arguments.init_weights)
    return BoneConfig(
        r=arguments.bone_r,
        init_weights=init_weights,
        mini_r=arguments.mini_r,
        bone_dropout=arguments.bone_dropout,
        target_modules=arguments.target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )


def load_rows(arguments: ScriptArguments, split: str, end: str) -> Any:
    """The rows of a split: {prompt, completion}, which `end` ends, of the columns of question and answer; without such
    columns the rows as they are. Raises UserError if there is no such data or column, or a question without answer."""
    from datasets import load_dataset

    path = arguments.data_path
    kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(Path(path).suffix.lower())
    if kind is not None and not Path(path).is_file():
        raise UserError(f"--data_path {path} does not exist")
    with library_errors(f"--data_path {path}, split {split}"):
        data = load_dataset(kind or path, split=split, **({"data_files": path} if kind else {}))
    names = data.column_names
    for label in (name for name in LABELLED if name in names):
        bad = next((number for number, value in enumerate(data[label], 1) if value is False), None)
        if bad is not None:
            raise UserError(
                f"row {bad} of {path} has the {label} false, and here every answer is learned as a good one; leave "
                f"such rows out, or rename {label} if it means something else"
            )
    columns = arguments.dataset_field or (COLUMNS if set(COLUMNS) <= set(names) else None)
    if columns is None:
        return data
    if missing := [name for name in columns if name not in names]:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}: name two of them")
    question, answer = columns

    def laid_out(row: Mapping[str, Any], index: int) -> dict[str, str]:
        if odd := next((name for name in columns if not isinstance(row[name], (str, int, float))), None):
            raise UserError(f"row {index + 1} of {path}: {odd} is {type(row[odd]).__name__}, and text is due")
        return {"prompt": f"### USER: {row[question]}\n### ASSISTANT:", "completion": f" {row[answer]}{end}"}

    return data.map(laid_out, with_indices=True, remove_columns=names)


def merge_and_save(
    arguments: ScriptArguments, settings: Mapping[str, Any], adapter: Path, target: Path, tokenizer: Any
) -> None:
    """Merge a saved adapter into the base model, read anew without quantization, and save the result."""
    from peft import PeftModel
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under ZeRO-3 the base would be sharded over the processes; this one needs all of it
    bits = arguments.bits if arguments.bits in DTYPES else "bf16"
    model = PeftModel.from_pretrained(load_model(arguments.base_model_name_or_path, bits, settings), adapter)
    model.merge_and_unload(safe_merge=True).save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(f"the merged model is in {target}")
