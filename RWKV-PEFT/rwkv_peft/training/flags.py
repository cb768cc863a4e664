"""The command line of train.py: flags -> one frozen RunConfig.

Names that RWKV-LM and RWKV-PEFT scripts use are kept. Every contradiction is refused here, in the flags' own words,
before a weight is read.
"""

import argparse
import importlib.util
import re
from dataclasses import fields
from pathlib import Path

from ..adapters import check_adapter
from ..checkpoint import load_base, model_config_from_state
from ..cli import HelpFormatter, Parser, above_zero, alias, count, not_negative, positive, switch
from ..config import STRATEGIES, DataConfig, ModelConfig, RunConfig, TrainConfig
from ..data.masks import LOSS_MASKS
from ..data.samples import DATALOADS
from ..errors import UserError
from .adapter_flags import adapter_config, add_adapter_flags
from .legacy import add_legacy_flags
from .schedule import SCHEDULES

# RWKV-PEFT's name -> ours
SCHEDULE_ALIASES = (("cos_decay", "cosine"), ("cos", "cosine"))


def build_parser():
    """The parser, its flags grouped as --help shows them."""
    parser = Parser(
        prog="train.py",
        usage="train.py --load_model PTH --data_file PREFIX [flags]",
        formatter_class=HelpFormatter,
        description="Train an RWKV-6 model, or a Bone adapter on one, on CPU or GPU under DeepSpeed ZeRO.",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--load_model",
        default="",
        metavar="PTH",
        help="base checkpoint; dimensions are read from it. Empty: a new model from --n_layer, --n_embd, "
        "--vocab_size (needs --peft none)",
    )
    model.add_argument(
        "--model_version", "--my_testing", "--rwkv_version", default="x060", choices=("x060",), help="architecture"
    )
    for name, text in (
        ("n_layer", "blocks"),
        ("n_embd", "channels"),
        ("vocab_size", "vocabulary"),
        ("dim_att", "attention channels (new model: n_embd)"),
        ("dim_ffn", "feed-forward channels (new model: 3.5 n_embd, down to a multiple of 32)"),
        ("head_size", "head size (new model: 64)"),
    ):
        flags = ["--head_size", "--head_size_a"] if name == "head_size" else [f"--{name}"]
        # RWKV-PEFT's scripts write 0 for widths that follow from others
        model.add_argument(*flags, type=count if name in ("dim_att", "dim_ffn") else positive, default=None, help=text)

    add_adapter_flags(parser)

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_file",
        required=True,
        metavar="PREFIX",
        help="PREFIX of PREFIX.bin and PREFIX.idx; a .jsonl, .json, .parquet or datasets folder for sft",
    )
    data.add_argument(
        "--data_type",
        default="binidx",
        choices=("binidx", "sft"),
        help="binidx: tokens; sft: rows of questions and answers, tokenized once into a cache",
    )
    data.add_argument("--tokenizer", default="world", metavar="NAME", help="sft: world, bytes or a tokenizer.json")
    data.add_argument(
        "--sft_field",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="sft: the field that holds the text, or those of question and answer (default: recognised)",
    )
    data.add_argument("--sft_split", default="", metavar="SPLIT", help="sft: rows to take, such as train[:1000]")
    data.add_argument(
        "--sft_long",
        default="left",
        choices=("left", "skip"),
        help="sft: rows longer than --ctx_len lose the front of their prompt, or are left out",
    )
    data.add_argument("--ctx_len", type=positive, default=1024, help="tokens a sample")
    data.add_argument(
        "--dataload",
        default=None,
        choices=DATALOADS,
        help="get: windows of the token stream; pad: one document a row, padded; only: one document, alone; "
        "pack: several whole documents a row, none seeing another (default get; sft: pad)",
    )
    data.add_argument(
        "--loss_mask",
        default=None,
        choices=LOSS_MASKS,
        help="tokens that count: none and pad count all but padding, qa what follows --mask_id, se what "
        "stands between --mask_id and --mask_end_id, file reads PREFIX.mask",
    )
    data.add_argument(
        "--mask_id",
        type=count,
        nargs="+",
        default=[],
        metavar="ID",
        help="token ids that open an answer, for --loss_mask qa and se",
    )
    data.add_argument(
        "--mask_end_id",
        type=count,
        nargs="+",
        default=[],
        metavar="ID",
        help="token ids that close it (se), or open the next question (qa)",
    )
    data.add_argument(
        "--data_shuffle",
        type=switch,
        default=True,
        metavar="0|1",
        help="0: samples come in the order of the file, in every epoch",
    )
    data.add_argument("--micro_bsz", type=positive, default=1, help="samples a device and forward pass")

    validation = parser.add_argument_group("validation")
    validation.add_argument(
        "--val_data", default="", metavar="PREFIX", help="data to validate on, read like --data_file"
    )
    validation.add_argument(
        "--val_split",
        type=not_negative,
        default=0.0,
        metavar="SHARE",
        help="keep this share of the data, such as 0.01, for validation",
    )
    validation.add_argument("--val_every", type=count, default=0, help="steps between validations; 0: every epoch")
    validation.add_argument(
        "--early_stop", type=count, default=0, help="end after so many validations without a lower loss; 0: never"
    )

    run = parser.add_argument_group("run")
    run.add_argument("--proj_dir", default="out", metavar="DIR", help="where the run writes")
    run.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --proj_dir exactly where it stopped, on the same data",
    )
    run.add_argument(
        "--fresh_optimizer",
        action="store_true",
        help="with --resume: keep weights and place in the data, start the optimizer anew; for another number "
        "of devices, strategy or precision",
    )
    run.add_argument("--epoch_steps", type=count, default=0, help="optimizer steps an epoch; 0: one pass over the data")
    run.add_argument("--epoch_count", type=positive, default=1, help="epochs; the run ends after them")
    run.add_argument(
        "--epoch_begin",
        type=count,
        default=0,
        help="number of the first epoch: the schedule and the data start there (with --bone_load)",
    )
    run.add_argument("--epoch_save", type=count, default=1, help="save every so many epochs; 0: at the end alone")
    run.add_argument("--random_seed", type=seed, default=42, help="seed of initialization, dropout and data order")
    run.add_argument("--wandb", default="", metavar="PROJECT", help="also log to this Weights & Biases project")

    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--lr_init", type=not_negative, default=2e-5, help="learning rate after warm-up")
    optimizer.add_argument("--lr_final", type=not_negative, default=2e-5, help="learning rate at the end")
    optimizer.add_argument(
        "--lr_schedule",
        type=alias(SCHEDULE_ALIASES),
        default="cosine",
        choices=SCHEDULES,
        help="from lr_init to lr_final; cosine is also called cos_decay",
    )
    optimizer.add_argument("--warmup_steps", type=count, default=0, help="steps of linear warm-up")
    optimizer.add_argument("--beta1", type=not_negative, default=0.9, help="Adam")
    optimizer.add_argument("--beta2", type=not_negative, default=0.99, help="Adam")
    optimizer.add_argument("--adam_eps", type=above_zero, default=1e-8, help="Adam")
    optimizer.add_argument("--weight_decay", type=not_negative, default=0.0, help="on matrices only")
    optimizer.add_argument(
        "--layerwise_lr", type=switch, default=True, metavar="0|1", help="RWKV-LM's doubled learning rate of time_decay"
    )
    optimizer.add_argument("--gradient_clip_val", type=not_negative, default=1.0, help="largest gradient norm; 0: any")
    optimizer.add_argument("--accumulate_grad_batches", type=positive, default=1, help="forward passes a step")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu"), help="where to train")
    machine.add_argument("--devices", type=positive, default=1, help="GPUs, or CPU processes, a node")
    machine.add_argument("--num_nodes", type=positive, default=1, help="nodes")
    machine.add_argument("--strategy", default="deepspeed_stage_1", choices=STRATEGIES, help="how memory is shared")
    machine.add_argument("--precision", default="bf16", choices=("bf16", "fp32"), help="weights and activations")
    machine.add_argument(
        "--grad_cp",
        type=switch,
        default=False,
        metavar="0|1",
        help="recompute blocks in the backward pass, to save memory",
    )
    add_legacy_flags(parser)
    return parser


def seed(text):
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} does not fit in 64 bits")
    return value


def parse_config(argv):
    """argv -> RunConfig. Raises UserError for whatever cannot work together."""
    args = build_parser().parse_args(argv)
    if args.train_type == "finetune" and args.peft != "none":
        raise UserError(f"--train_type finetune trains the model itself, and --peft is {args.peft}; add --peft none")
    adapter = adapter_config(args)
    base = load_base(args.load_model) if args.load_model else None
    if base is None and (adapter.method != "none" or adapter.load):
        raise UserError(
            f"--peft {args.peft} adapts a base model and none is given; "
            "name it with --load_model, or train a new model with --peft none"
        )
    model = new_model_config(args) if base is None else base_model_config(args, base)
    check_adapter(
        adapter,
        {
            name.removesuffix(".weight"): tuple(tensor.shape)
            for name, tensor in (base or {}).items()
            if name.endswith(".weight") and tensor.ndim == 2
        },
    )
    sft = args.data_type == "sft"
    data = DataConfig(
        path=args.data_file,
        dataload=args.dataload or ("pad" if sft else "get"),
        loss_mask=args.loss_mask or ("file" if sft else "none"),
        mask_id=tuple(args.mask_id),
        mask_end_id=tuple(args.mask_end_id),
        seed=args.random_seed if args.data_shuffle else None,
        sft_field=tuple(args.sft_field),
        **{
            name: getattr(args, name)
            for name in ("data_type", "ctx_len", "tokenizer", "sft_split", "sft_long", "micro_bsz")
        },
    )
    check_data(data)
    train = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    check_train(train)
    return RunConfig(model, adapter, data, train)


def base_model_config(args, base):
    """Dimensions of the base; a flag that contradicts them is refused."""
    config = model_config_from_state(base)
    if any(key.endswith("time_state") for key in base):
        raise UserError(
            f"{args.load_model} holds tuned time states, which training does not carry on; take the model without them"
        )
    for name in ("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "head_size"):
        given, real = getattr(args, name), getattr(config, name)
        if given and given != real:
            raise UserError(f"--{name} {given} contradicts {args.load_model}, which has {real}; leave the flag out")
    return config


def new_model_config(args):
    """Dimensions of a new model, upstream's defaults filled in."""
    for name in ("n_layer", "n_embd", "vocab_size"):
        if getattr(args, name) is None:
            raise UserError(f"a new model needs --{name}; or name a base with --load_model")
    dim_att = args.dim_att or args.n_embd
    head_size = args.head_size or 64
    if dim_att % head_size or head_size % 4 or head_size > 128:
        raise UserError(
            f"--head_size {head_size} must divide the attention channels ({dim_att}), be a multiple of 4 "
            "and at most 128"
        )
    wide = args.n_embd >= 4096
    return ModelConfig(
        n_layer=args.n_layer,
        n_embd=args.n_embd,
        vocab_size=args.vocab_size,
        dim_att=dim_att,
        dim_ffn=args.dim_ffn or max(32, int(args.n_embd * 3.5) // 32 * 32),
        head_size=head_size,
        maa_rank=64 if wide else 32,
        decay_rank=128 if wide else 64,
    )


def check_data(data):
    """Refuse flags of the data that nothing would read."""
    for name in ("mask_id", "mask_end_id"):
        if getattr(data, name) and data.loss_mask not in ("qa", "se"):
            raise UserError(
                f"--{name} belongs to --loss_mask qa or se, and the mask is {data.loss_mask}; give one of them, or "
                f"leave --{name} out"
            )
    plain = DataConfig(data.path)
    for name in ("tokenizer", "sft_field", "sft_split", "sft_long"):
        if data.data_type != "sft" and getattr(data, name) != getattr(plain, name):
            raise UserError(
                f"--{name} belongs to --data_type sft, and the data is {data.data_type}, whose tokens are made "
                f"already; add --data_type sft, or leave --{name} out"
            )


def check_train(train):
    """Contradictions among the remaining flags."""
    for name in ("beta1", "beta2"):
        if getattr(train, name) >= 1:
            raise UserError(f"--{name} {getattr(train, name)} must be below 1")
    if train.epoch_begin >= train.epoch_count:
        raise UserError(
            f"--epoch_begin {train.epoch_begin} leaves no epoch of --epoch_count {train.epoch_count} to train"
        )
    if train.wandb and re.search(r"[/\\#?%:]", train.wandb):
        raise UserError(f"--wandb {train.wandb!r} is a project name and may not contain / \\ # ? % :")
    if train.fresh_optimizer and not train.resume:
        raise UserError(
            "--fresh_optimizer says how to --resume, which is not given; a new run has a fresh optimizer anyway"
        )
    if train.val_data and train.val_split:
        raise UserError("--val_data and --val_split both name the validation samples; give one of them")
    for name in ("val_every", "early_stop"):
        if getattr(train, name) and not (train.val_data or train.val_split):
            raise UserError(f"--{name} {getattr(train, name)} needs samples to validate on: --val_data or --val_split")
    if train.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(f"--wandb {train.wandb} needs the wandb package: pip install wandb")
    if not train.proj_dir:
        raise UserError("--proj_dir is empty; name the folder of the run")
    folder = Path(train.proj_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--proj_dir {folder} is a file; name a folder")
