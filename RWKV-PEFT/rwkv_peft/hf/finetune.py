"""Supervised fine-tuning of a Hugging Face causal language model with Bone, through trl's SFTTrainer.

    python demo/bone_finetuning.py --base_model_name_or_path meta-llama/Llama-2-7b-hf --output_dir out/llama \\
        --data_path fxmeng/pissa-dataset --dataset_split train[:100000] --dataset_field query response \\
        --bone_r 64 --init_weights bat-in --bits bf16 --merge_and_save --bf16 True --learning_rate 2e-5

Model and data are names on the hub or local paths. The adapter goes to OUTPUT_DIR/bone_ft and, with
--merge_and_save, the merged model to OUTPUT_DIR/bone_merged. All arguments of trl's SFTConfig are taken.
Only the answers count in the loss (--completion_only_loss False: the questions too).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..files.adapter_folder import is_adapter_folder, read_config
from .finetune_flags import BoneArguments, bone_config, model_settings, parse
from .finetune_resume import check_layers, checkpoint_to_resume
from .refusals import refusals_of
from .register import register


def main(argv: list[str]) -> int:
    """Train, save, and merge if asked; -> 0. Raises UserError for arguments that cannot be honoured."""
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    register(replace=True)
    arguments, config = parse(argv)
    adapter_config = bone_config(arguments)
    resumed = checkpoint_to_resume(config, adapter_config)
    base = Path(arguments.base_model_name_or_path)
    if is_adapter_folder(base):
        raise UserError(
            f"--base_model_name_or_path {base} is an adapter of {read_config(base).get('base_model_name_or_path')}; "
            "give that model, or merge the adapter into it first"
        )
    settings = model_settings(config)
    if base.exists() and not (base / settings.get("subfolder", "") / "config.json").is_file():
        raise UserError(
            f"--base_model_name_or_path {base} has no config.json; give a model's folder, as save_pretrained writes "
            "it, or a name on the hub"
        )
    with refusals_of(f"--base_model_name_or_path {arguments.base_model_name_or_path}"):
        tokenizer = AutoTokenizer.from_pretrained(
            arguments.base_model_name_or_path,
            **{name: settings[name] for name in ("revision", "trust_remote_code") if name in settings},
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    data = load_data(arguments, tokenizer.eos_token)
    model = load_model(arguments.base_model_name_or_path, arguments.bits, settings)
    check_targets(arguments.target_modules or (), model)
    with refusals_of("these arguments"):
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=adapter_config
        )
    if resumed is not None:
        check_layers(resumed, trainer.model)
    if not len(trainer.train_dataset):
        raise UserError(
            f"none of the {len(data)} rows of --data_path {arguments.data_path} has a token of an answer within "
            f"--max_length {config.max_length}; raise that"
        )
    if arguments.bits in ("nf4", "int8"):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:  # trl makes them bfloat16 on quantized models, where small steps are lost
                parameter.data = parameter.data.float()
    if trainer.is_world_process_zero():
        trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=resumed)
    trainer.save_state()
    check_finite(trainer.model, config.learning_rate)
    adapter = Path(config.output_dir) / "bone_ft"
    trainer.save_model(str(adapter))
    if trainer.is_world_process_zero():
        print(f"the adapter is in {adapter}")
        if arguments.merge_and_save:
            merge_and_save(arguments, settings, adapter, Path(config.output_dir) / "bone_merged", tokenizer)
    return 0


def load_model(path: str, bits: str, settings: Mapping[str, Any]) -> Any:
    """The base model, its frozen weights kept as `bits` says."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(bits, torch.bfloat16)
    quantization = {
        "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
        "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    }.get(bits, lambda: None)()
    with refusals_of(f"--base_model_name_or_path {path}"):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=quantization, **settings)


def load_data(arguments: BoneArguments, end: str | None) -> Any:
    """The rows as prompt and completion. Raises UserError where there is no such data or column."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(
        Path(arguments.data_path).suffix.lower()
    )
    if kind is not None and not Path(arguments.data_path).is_file():
        raise UserError(f"--data_path {arguments.data_path} does not exist")
    if kind is None and Path(arguments.data_path).is_file():
        raise UserError(
            f"--data_path {arguments.data_path} is no .jsonl, .json, .csv or .parquet file; convert it to one of them"
        )
    if kind is not None and not Path(arguments.data_path).stat().st_size:
        raise UserError(f"--data_path {arguments.data_path} is empty")
    files = {} if kind is None else {"data_files": arguments.data_path}
    with refusals_of(f"--data_path {arguments.data_path} --dataset_split {arguments.dataset_split}"):
        try:
            data = load_dataset(kind or arguments.data_path, split=arguments.dataset_split, **files)
        except DatasetGenerationError as error:
            raise UserError(f"--data_path {arguments.data_path}: {error.__cause__ or error}") from error
        except ConnectionError as error:
            raise UserError(
                f"--data_path {arguments.data_path} is no folder and no .jsonl, .json, .csv or .parquet file here, and "
                f"the hub cannot be reached: {error}"
            ) from error
    missing = [name for name in arguments.dataset_field if name not in data.column_names]
    if missing:
        raise UserError(
            f"{arguments.data_path} has no column {', '.join(missing)}; it has {', '.join(data.column_names)}: "
            "name two of them with --dataset_field QUESTION ANSWER"
        )
    question, answer = arguments.dataset_field

    def as_prompt(row: Mapping[str, Any], index: int) -> dict[str, str]:
        for name in (question, answer):
            if row[name] is None:
                raise UserError(f"row {index + 1} of {arguments.data_path} has no {name}; drop such rows from the file")
            if not isinstance(row[name], (str, int, float)):
                raise UserError(
                    f"row {index + 1} of {arguments.data_path} has a {type(row[name]).__name__} for its {name}, and "
                    "text is due; write it out as a question and its answer"
                )
        return {"prompt": f"### USER: {row[question]}\n### ASSISTANT:", "completion": f" {row[answer]}{end or ''}"}

    with refusals_of(f"--data_path {arguments.data_path}"):  # text is decoded only here
        return data.map(as_prompt, with_indices=True, remove_columns=data.column_names)


def check_targets(targets: Sequence[str], model: nn.Module) -> None:
    """UserError for a target that is the end of no module's name."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if target != "all-linear" and not any(name == target or name.endswith("." + target) for name in names):
            leaves = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(f"--target_modules {target} matches no linear layer; there are {', '.join(leaves)}")


def check_finite(model: nn.Module, rate: float) -> None:
    """UserError where training has spoilt the adapter."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise UserError(
                f"training has diverged: {name} is not finite, and the adapter is not saved; lower "
                f"--learning_rate {rate}"
            )


def merge_and_save(
    arguments: BoneArguments, settings: Mapping[str, Any], adapter: Path, target: Path, tokenizer: Any
) -> None:
    """Merge a saved adapter into the base model, read anew without quantization, and save the result."""
    from peft import PeftModel
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under ZeRO-3 the base would be spread over the processes, and this one needs it whole
    bits = arguments.bits if arguments.bits in ("fp16", "fp32") else "bf16"
    model = PeftModel.from_pretrained(load_model(arguments.base_model_name_or_path, bits, settings), adapter)
    model.merge_and_unload(safe_merge=True).save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(f"the merged model is in {target}")
