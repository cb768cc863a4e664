"""Supervised fine-tuning of a Hugging Face causal language model with Bone, through trl's SFTTrainer.

    python demo/bone_finetuning.py --base_model_name_or_path meta-llama/Llama-2-7b-hf --output_dir out/llama \\
        --data_path fxmeng/pissa-dataset --dataset_split train[:100000] --dataset_field query response \\
        --bone_r 64 --init_weights bat-in --bits bf16 --merge_and_save --bf16 True --learning_rate 2e-5

The adapter goes to OUTPUT_DIR/bone_ft and, with --merge_and_save, the merged model to OUTPUT_DIR/bone_merged;
docs/guides/hugging-face.md says what rows and arguments are taken.
"""

import signal
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..errors import UserError, told
from ..files.lock import alone_in
from ..files.peft_folder import is_adapter_folder, read_config
from ..numeric import all_finite
from . import register
from .finetune_data import as_learned, load_data, only_answers
from .finetune_flags import BoneArguments, bone_config, model_settings, parse
from .finetune_resume import ADAPTER, check_folder, check_layers, checkpoint_to_resume
from .refusals import refusals_of


def main(argv: list[str]) -> int:
    """Train, save, merge and push as asked; -> 0, or 130 after Ctrl-C. Raises UserError for arguments that cannot be
    honoured, and if the hub does not take the adapter."""
    register(replace=True)
    arguments, config = parse(argv)
    with alone_in(Path(config.output_dir), flag="--output_dir") if config.should_save else nullcontext():
        return run(arguments, config)


def run(arguments: BoneArguments, config: Any) -> int:
    """Do the work of main, in a folder that no other run uses."""
    from trl import SFTTrainer

    adapter_config = bone_config(arguments)
    resumed = checkpoint_to_resume(config, adapter_config)
    base = Path(arguments.base_model_name_or_path)
    check_folder(config.output_dir, base, resumed)
    if config.push_to_hub:
        check_hub(config.hub_token)
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
    tokenizer = load_tokenizer(arguments.base_model_name_or_path, settings)
    had_template = tokenizer.chat_template is not None
    data = load_data(arguments, "dataset_split", tokenizer)
    eval_data = load_data(arguments, "eval_split", tokenizer) if arguments.eval_split else None
    if "messages" in data.column_names:
        only_answers(config)
    model = load_model(arguments.base_model_name_or_path, arguments.bits, settings)
    check_targets(arguments.target_modules or (), model)
    with refusals_of("these arguments"):
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=data,
            eval_dataset=eval_data,
            processing_class=tokenizer,
            peft_config=adapter_config,
        )
    if resumed is not None:
        check_layers(resumed, trainer.model)
    notes = [as_learned(trainer.train_dataset, len(data), "dataset_split", arguments, config)]
    if eval_data is not None:
        notes.append(as_learned(trainer.eval_dataset, len(eval_data), "eval_split", arguments, config))
    if tokenizer.chat_template is not None and not had_template:
        notes.append("the tokenizer has no chat template: turns are laid out as ### USER: … ### ASSISTANT: …")
    if arguments.bits in ("nf4", "int8"):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:  # trl casts them to bfloat16 on quantized models, which loses small steps
                parameter.data = parameter.data.float()
    if trainer.is_world_process_zero():
        print("\n".join(filter(None, notes)), end="\n" * any(notes))
        trainer.model.print_trainable_parameters()
    stopping = StopAtCtrlC()
    trainer.add_callback(stopping)
    try:
        trainer.train(resume_from_checkpoint=resumed)
    except (ValueError, ImportError) as error:
        if stopping.begun:
            raise
        # train() makes the optimizer and the schedule
        raise UserError(*f"these arguments: {error}".splitlines()) from error
    if stopping.asked and trainer.state.global_step < trainer.state.max_steps:
        print(f"checkpoint-{trainer.state.global_step} is saved; --resume_from_checkpoint True goes on from there")
        return 130
    trainer.save_state()
    check_finite(trainer.model, config.learning_rate)
    adapter = Path(config.output_dir) / ADAPTER
    trainer.save_model(str(adapter), _internal_call=True)  # an internal call does not push: merging comes first
    if trainer.is_world_process_zero():
        print(f"the adapter is in {adapter}")
        if arguments.merge_and_save:
            merge_and_save(arguments, settings, adapter, Path(config.output_dir) / "bone_merged", tokenizer)
    if config.push_to_hub:
        push(trainer, adapter)
    return 0


def load_tokenizer(path: str, settings: Mapping[str, Any]) -> Any:
    """Load the base model's tokenizer; its eos_token pads if it has no pad_token. Raises UserError without either."""
    from transformers import AutoTokenizer

    known = {name: settings[name] for name in ("revision", "trust_remote_code") if name in settings}
    with refusals_of(f"--base_model_name_or_path {path}"):
        tokenizer = AutoTokenizer.from_pretrained(path, **known)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of --base_model_name_or_path {path} has neither an eos_token nor a pad_token, and batches "
            "need one; write one into its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: str, bits: str, settings: Mapping[str, Any]) -> Any:
    """Load the base model, its frozen weights in the dtype or quantization that `bits` names."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(bits, torch.bfloat16)
    quantization = {
        "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
        "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    }.get(bits, lambda: None)()
    with refusals_of(f"--base_model_name_or_path {path}"):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=quantization, **settings)


def check_targets(targets: Sequence[str], model: nn.Module) -> None:
    """Raise UserError for a target that no linear layer's name ends with."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if target != "all-linear" and not any(name == target or name.endswith("." + target) for name in names):
            leaves = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(f"--target_modules {target} matches no linear layer; there are {', '.join(leaves)}")


def check_finite(model: nn.Module, rate: float) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not all_finite(parameter):
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

    unset_hf_deepspeed_config()  # under ZeRO-3 the base would be sharded over the processes; this one needs all of it
    bits = arguments.bits if arguments.bits in ("fp16", "fp32") else "bf16"
    model = PeftModel.from_pretrained(load_model(arguments.base_model_name_or_path, bits, settings), adapter)
    model.merge_and_unload(safe_merge=True).save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(f"the merged model is in {target}")


class StopAtCtrlC(TrainerCallback):
    """Let Ctrl-C ask for a checkpoint and a stop after the current step; a second Ctrl-C stops at once. Only training
    in one process: several would have to agree on the step, so they still stop at once."""

    def __init__(self) -> None:
        self.begun = self.asked = False  # whether training has begun, and whether Ctrl-C has asked for its end

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun = True
        if args.world_size == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.ask)

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step; again to stop at once, without saving", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if signal.getsignal(signal.SIGINT) == self.ask:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def check_hub(token: str | None) -> None:
    """Raise UserError if the hub cannot be reached or does not know the token (None: that of `hf auth login`)."""
    from huggingface_hub import whoami

    try:
        whoami(token)
    except Exception as error:  # raised by this library, its HTTP client or the system: a push would fail with any
        raise UserError(
            f"--push_to_hub: the hub cannot be reached, or knows no login ({told(error)}); log in (hf auth login), or "
            "leave the flag out and upload the adapter later"
        ) from error


def push(trainer: Any, adapter: Path) -> None:
    """Upload a saved adapter to the trainer's repository. Raises UserError, with the command that tries again."""
    from huggingface_hub import HfApi

    if not trainer.is_world_process_zero():
        return
    config, name = trainer.args, trainer.hub_model_id
    try:
        HfApi(token=config.hub_token).upload_folder(
            repo_id=name, folder_path=adapter, revision=config.hub_revision, commit_message="End of training"
        )
    except Exception as error:  # as in check_hub
        raise UserError(
            f"--push_to_hub: everything is saved, and the hub did not take it ({told(error)}); try again with "
            f"hf upload {name} {adapter}"
        ) from error
    print(f"the adapter is pushed to {name}")
