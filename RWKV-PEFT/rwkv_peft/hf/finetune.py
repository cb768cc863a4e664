"""Supervised fine-tuning of a Hugging Face causal language model with Bone, through trl's SFTTrainer.

    python demo/bone_finetuning.py --base_model_name_or_path meta-llama/Llama-2-7b-hf --output_dir out/llama \\
        --data_path fxmeng/pissa-dataset --dataset_split train[:100000] --dataset_field query response \\
        --bone_r 64 --init_weights bat-in --bits bf16 --merge_and_save --bf16 True --learning_rate 2e-5

Model and data are names on the hub or local paths. The adapter goes to OUTPUT_DIR/bone_ft and, with
--merge_and_save, the merged model to OUTPUT_DIR/bone_merged. All arguments of trl's SFTConfig are taken.
Only the answers count in the loss (--completion_only_loss False: the questions too).
"""

import contextlib
import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import UserError
from ..files.adapter_folder import CONFIG, is_adapter_folder, read_config
from .config import BoneConfig
from .register import register

BITS = ("bf16", "fp16", "fp32", "nf4", "int8")
# (name in older trl and transformers, name in newer ones)
RENAMED = (
    ("max_seq_length", "max_length"),
    ("warmup_ratio", "warmup_steps"),
    ("evaluation_strategy", "eval_strategy"),
    ("no_cuda", "use_cpu"),
    ("use_liger", "use_liger_kernel"),
)
# (name that newer ones dropped, what they do instead)
DROPPED = (
    ("overwrite_output_dir", "files of the same name are replaced"),
    ("save_safetensors", "checkpoints are safetensors"),
    ("logging_dir", "TensorBoard's files go to OUTPUT_DIR/runs"),
)


@dataclass
class BoneArguments:
    """What this command takes beside SFTConfig's arguments."""

    base_model_name_or_path: str = field(metadata={"help": "Base model: a name on the hub, or a folder."})
    data_path: str = field(
        metadata={"help": "Data: a name on the hub, a folder, or a .jsonl, .json, .csv or .parquet file."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split, such as train[:100000]."})
    dataset_field: list[str] = field(
        default_factory=lambda: ["query", "response"], metadata={"help": "The columns of question and answer."}
    )
    bits: str = field(default="bf16", metadata={"help": f"How the frozen model is kept: {', '.join(BITS)}."})
    bone_r: int = field(default=64, metadata={"help": "Rank."})
    init_weights: str = field(
        default="True", metadata={"help": "True (bone), bat-in, bat-out (also: bat), mini, or False (random bone)."}
    )
    mini_r: int = field(default=0, metadata={"help": "Width of the repeated update, with --init_weights mini."})
    bone_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's input."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt; default: all linear layers but the head."}
    )
    merge_and_save: bool = field(default=False, metadata={"help": "Also write the merged model."})


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
    adapter = Path(config.output_dir) / "bone_ft"
    trainer.save_model(str(adapter))
    if trainer.is_world_process_zero():
        print(f"the adapter is in {adapter}")
        if arguments.merge_and_save:
            merge_and_save(arguments, settings, adapter, Path(config.output_dir) / "bone_merged", tokenizer)
    return 0


@contextlib.contextmanager
def refusals_of(what: str) -> Iterator[None]:
    """What a library says of its arguments or files, as a UserError about `what`."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        raise UserError(f"{what}: {error}") from error


def checkpoint_to_resume(config: Any, adapter_config: BoneConfig) -> str | None:
    """The checkpoint of --resume_from_checkpoint, a folder, or True for the newest in --output_dir; None without it.

    Raises UserError where there is none, or where its adapter has other settings than the arguments say.
    """
    from transformers.trainer_utils import get_last_checkpoint

    given = config.resume_from_checkpoint
    if given is None or str(given).lower() == "false":
        return None
    if str(given).lower() == "true":
        given = get_last_checkpoint(config.output_dir) if Path(config.output_dir).is_dir() else None
        if given is None:
            raise UserError(f"--resume_from_checkpoint True, and --output_dir {config.output_dir} has no checkpoint")
    if not all((Path(given) / name).is_file() for name in (CONFIG, "trainer_state.json")):
        raise UserError(
            f"--resume_from_checkpoint {given} is no folder with an {CONFIG} and a trainer_state.json; give a "
            "checkpoint-N folder"
        )
    saved, due = read_config(given), adapter_config.to_dict()
    for flag, name in (("bone_r", "r"), ("init_weights", "init_weights"), ("mini_r", "mini_r")):
        wanted, found = due.get(name, 0), saved.get(name, 0)
        if wanted != found:
            raise UserError(
                f"--{flag} {wanted} differs from the checkpoint's {found} ({given}); give the same, or start anew "
                "without --resume_from_checkpoint"
            )
    return str(given)


def check_layers(checkpoint: str, model: nn.Module) -> None:
    """UserError where a checkpoint's adapter is one of other layers than the model's."""
    from peft import get_peft_model_state_dict, load_peft_weights

    with refusals_of(f"--resume_from_checkpoint {checkpoint}"):
        saved, due = set(load_peft_weights(checkpoint, device="cpu")), set(get_peft_model_state_dict(model))
    if saved != due:
        raise UserError(
            f"the adapter of --resume_from_checkpoint {checkpoint} is one of other layers than this run's, such as "
            f"{min(saved ^ due)}; give the same --target_modules, or start anew without --resume_from_checkpoint"
        )


def parse(argv: list[str]) -> tuple[BoneArguments, Any]:
    """argv -> (BoneArguments, SFTConfig)."""
    from transformers import HfArgumentParser
    from trl import SFTConfig

    argv = adapt(
        argv, {item.name for item in fields(SFTConfig)}, torch.accelerator.is_available(), torch.cuda.is_available()
    )
    parser = HfArgumentParser((BoneArguments, SFTConfig), allow_abbrev=False, prog="bone_finetuning.py")
    parser.error = refuse
    with refusals_of("these arguments"):
        arguments, config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
        raise UserError(f"there is no {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    if arguments.bits not in BITS:
        raise UserError(f"--bits {arguments.bits} is unknown; give {', '.join(BITS)}")
    for name, unit in (("per_device_train_batch_size", "rows"), ("gradient_accumulation_steps", "batches")):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} is no number of {unit}; give 1 or more")
    if config.max_length is not None and config.max_length < 1:
        raise UserError(
            f"--max_length {config.max_length} is no number of tokens; give 1 or more, or a large one for no limit"
        )
    if not 0 <= config.learning_rate < float("inf"):
        raise UserError(f"--learning_rate {config.learning_rate} is no rate; give a number such as 2e-5")
    targets = arguments.target_modules or ()
    if len(targets) > 1 and "all-linear" in targets:
        raise UserError(f"--target_modules {' '.join(targets)}: all-linear stands alone; leave the names or it out")
    if len(arguments.dataset_field) != 2:
        raise UserError(f"--dataset_field takes two columns, question and answer, and got {arguments.dataset_field}")
    return arguments, config


def refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; see bone_finetuning.py --help")


def adapt(argv: list[str], known: Collection[str], accelerator: bool, cuda: bool) -> list[str]:
    """Arguments as the installed trl and transformers take them, with a word about each that is changed.

    known: the names of SFTConfig's arguments; accelerator, cuda: whether this machine has any device beside the CPU,
    and a CUDA one. Raises UserError where an argument is given under both its names.
    """
    argv = [part for argument in argv for part in (argument.split("=", 1) if argument.startswith("--") else [argument])]
    argv = [part.replace("-", "_").replace("__", "--", 1) if part.startswith("--") else part for part in argv]
    for old, new in RENAMED:
        if f"--{old}" in argv and old not in known and new in known:
            if f"--{new}" in argv:
                raise UserError(f"--{old} and --{new} are two names of one argument; give --{new} alone")
            argv = [f"--{new}" if part == f"--{old}" else part for part in argv]
            print(f"--{old} is --{new} in the installed trl and transformers, and is taken as that")
    for name, instead in DROPPED:
        if f"--{name}" in argv and name not in known:
            drop(argv, f"--{name}")
            print(f"--{name} is gone from the installed trl and transformers, and is ignored: {instead}")
    if ("--bits", "fp32") in zip(argv, argv[1:], strict=False) and not {"--bf16", "--fp16"} & set(argv):
        argv += ["--bf16", "False"]  # which trl switches on by itself
    if not cuda and "--tf32" in argv:
        drop(argv, "--tf32")
        print("--tf32 is for CUDA devices; there is none here, and it is ignored")
    if not accelerator and "--use_cpu" not in argv:
        argv += ["--use_cpu", "True"]
    return argv


def drop(argv: list[str], flag: str) -> None:
    """Remove a flag and its value, if it has one, wherever it is given."""
    while flag in argv:
        at = argv.index(flag)
        has_value = at + 1 < len(argv) and not argv[at + 1].startswith("--")
        del argv[at : at + 1 + has_value]


def bone_config(arguments: BoneArguments) -> BoneConfig:
    """The BoneConfig that the arguments describe."""
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
    """--trust_remote_code and --model_init_kwargs, which trl heeds only for a model that it loads itself, taken from
    config."""
    settings = {"trust_remote_code": True} if getattr(config, "trust_remote_code", False) else {}
    settings |= config.model_init_kwargs or {}
    for name in ("dtype", "torch_dtype", "quantization_config"):
        if name in settings:
            raise UserError(
                f"--model_init_kwargs gives {name}, and --bits says how the model is kept; leave {name} out"
            )
    config.model_init_kwargs = None
    return settings


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
