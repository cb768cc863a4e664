"""The command line of train.py: flags -> one frozen RunConfig, and the base that it names, opened once.

Names that RWKV-LM and RWKV-PEFT scripts use are kept. Every contradiction is refused here, in the flags' own words,
before a weight is read, and what the flags tell by themselves before torch is imported.
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import CHUNK_CTX, STATE_LR, AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from ..errors import UserError
from ..files.readable import home_meant
from ..names import AUTO, FINETUNE, GENERATIONS, INFCTX, NONE, STATE
from .adapter_flags import adapter_config
from .graph_flags import check_graphs
from .loggers import check_wandb
from .markers import markers_of
from .overwriting import check_overwriting
from .parser import DIMENSIONS, build_parser, settings_of
from .preference_flags import check_preferences
from .question_flags import check_questions
from .seed import DRAWN, draw_seed
from .world import World, find_world

if TYPE_CHECKING:
    from ..files.base import Base
    from ..models.family import Family

MOST_TOKENS = 2**31 - 1  # of a micro batch: kernels count them in 32 bits


class Request(NamedTuple):
    """What a command line asks for: config; base, the model that it starts from, or None for a new one; layers, the
    names of the modules that get an adapter; world, this process among those of the run; argv, the flags for the
    others, with the seed where one was drawn; check_flags, whether nothing but the flags is to be checked."""

    config: RunConfig
    base: "Base | None"
    layers: tuple[str, ...]
    world: World
    argv: tuple[str, ...] = ()
    check_flags: bool = False


class Flags(NamedTuple):
    """What the flags say by themselves: as parsed, and as settings; world and argv as in Request."""

    args: Namespace
    adapter: AdapterConfig
    data: DataConfig
    train: TrainConfig
    world: World
    argv: tuple[str, ...]


def judge(argv: Sequence[str]) -> None:
    """Before torch is imported: parse_flags, and for several ranks what torch reads once, at its import. A rank that
    is gone is told in our words, and not in torch's stacks of C++ frames."""
    if parse_flags(argv).world.size > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def parse_flags(argv: Sequence[str]) -> Flags:
    """argv -> Flags. Raises UserError for flags that are mistaken or contradict each other; torch is not imported."""
    args = build_parser().parse_args(argv)
    world = find_world(settings_of(args, TrainConfig))
    if args.random_seed == DRAWN:
        args.random_seed = draw_seed(args, world)
        argv = [*argv, "--random_seed", str(args.random_seed)]
    return flags_of(args, world, tuple(argv))


def flags_of(args: Namespace, world: World, argv: tuple[str, ...] = ()) -> Flags:
    """What a parser made of argv, on a World -> Flags."""
    args.peft = args.peft or (NONE if args.train_type in (FINETUNE, STATE) else AdapterConfig.method)
    if args.train_type in (FINETUNE, STATE):
        check_train_type(args)
    adapter = adapter_config(args)
    data = data_config(args)
    flags = Flags(args, adapter, data, train_config(args, adapter, data), world, argv)
    check_together(flags.adapter, flags.data, flags.train)
    return flags


def check_together(adapter: AdapterConfig, data: DataConfig, train: TrainConfig) -> None:
    """Refuse settings that contradict each other, whatever the model is."""
    check_train(train)
    check_products(train, adapter)
    check_preferences(train, adapter, data)
    check_graphs(train)
    check_overwriting(adapter, data, train)


def check_train_type(args: Namespace) -> None:
    """Refuse a --train_type that contradicts what trains; state names that part."""
    what = {FINETUNE: "the model itself", STATE: "the states alone"}[args.train_type]
    if args.peft != NONE:
        raise UserError(
            f"--train_type {args.train_type} trains {what}, and --peft is {args.peft}; leave --peft out"
            + ("" if args.train_type != STATE else ", or give --train_parts state instead to tune them along")
        )
    if args.train_type == STATE:
        others = [part for group in args.train_parts for part in group if part != STATE]
        if others:
            raise UserError(
                f"--train_type state trains {what}, and --train_parts names {others[0]}; leave one of the two out"
            )
        args.train_parts = [(STATE,)]


def rates_left(args: Namespace) -> tuple[str, ...]:
    """The learning rates that the flags leave to be chosen, beside the first."""
    return ("lr_init",) if args.lr_final is not None else ("lr_init", "lr_final")


def train_config(args: Namespace, adapter: AdapterConfig, data: DataConfig) -> TrainConfig:
    """The run's settings; the learning rates' defaults depend on what trains, and the number of epochs on the data."""
    states = STATE in adapter.train_parts
    if args.state_load and not states:
        raise UserError(
            f"--state_load {args.state_load} is where states start from, and none train; add --train_parts state"
        )
    if args.state_lr is not None and not states:
        raise UserError(f"--state_lr {args.state_lr:g} is that of states, and none train; add --train_parts state")
    if args.state_lr is not None and adapter.states_alone:
        raise UserError(f"--state_lr {args.state_lr:g}: where states alone train, their rate is --lr_init; give that")
    if args.lr_init == 0 and states and not adapter.states_alone:
        raise UserError("--lr_init 0: --state_lr follows its schedule, of which 0 leaves nothing; give a rate above 0")
    if args.bptt_segments and args.train_type != INFCTX:
        raise UserError(
            f"--bptt_segments {args.bptt_segments} counts segments of --train_type infctx, and the type is "
            f"{args.train_type}; give that type, or leave --bptt_segments out"
        )
    segment = (args.chunk_ctx or CHUNK_CTX) if args.train_type == INFCTX else 0
    chosen: tuple[str, ...] = ()
    if args.lr_init == AUTO:  # request_of knows the model that it depends on
        chosen, args.lr_init = rates_left(args), None
    epochs = args.epoch_count is None and not args.epoch_steps and not args.epoch_begin and data.of_answers
    others = {"epoch_save": 0} if epochs and args.epoch_save is None else {}  # what is read often is soon read through
    train = settings_of(args, TrainConfig, chunk_ctx=segment, lr_chosen=chosen, epochs_chosen=epochs, **others)
    if adapter.states_alone:
        given = {name: getattr(args, name) for name in ("lr_init", "lr_final")}
        rates: dict[str, Any] = {name: STATE_LR if rate is None else rate for name, rate in given.items()}
        train = replace(train, **rates)
    return train


def parse_run(argv: Sequence[str]) -> Request:
    """argv -> Request. Raises UserError for whatever cannot work together."""
    flags = parse_flags(argv)
    args, adapter = flags.args, flags.adapter
    if not args.load_model and (adapter.method != NONE or adapter.load):
        raise UserError(
            f"--peft {args.peft} adapts a base model and none is given; "
            "name it with --load_model, or train a new model with --peft none"
        )
    return request_of(flags)


def request_of(flags: Flags) -> Request:
    """Flags -> Request; an adapter without a base is one for a new model's shapes. Raises UserError for whatever cannot
    work together."""
    from ..adapters.inject import check_adapter
    from ..files.base import linear_shapes, open_base
    from ..models import family_named
    from .rates import automatic_rate, follows_rule, known_rate, with_chosen_rates

    args, adapter, data, train, world, argv = flags
    base = open_base(args.load_model) if args.load_model else None
    family = family_named(args.model_version or GENERATIONS[0][1]) if base is None else base.family
    model = new_model(args, family) if base is None else check_base(args, base)
    adapter = replace(adapter, targets=targets_of(adapter.targets, family))
    shapes = linear_shapes(family.shapes(model)) if base is None else base.linear_shapes
    layers = check_adapter(adapter, shapes, (*family.parts, STATE))
    if train.lr_chosen:
        train = with_chosen_rates(train, automatic_rate(adapter, model.n_embd).value)
    elif args.lr_init is None and follows_rule(adapter, data) and (rule := known_rate(adapter, model.n_embd)):
        train = with_chosen_rates(replace(train, lr_chosen=rates_left(args)), rule.value)
    if STATE not in adapter.train_parts and base is not None and base.has_states:
        raise UserError(
            f"{args.load_model} holds tuned time states, which training does not carry on unless they train; add "
            "--train_parts state, or take the model without them"
        )
    return Request(RunConfig(model, adapter, data, train), base, layers, world, argv, args.check_flags)


def targets_of(targets: tuple[str, ...], family: "Family") -> tuple[str, ...]:
    """The linear layers that get an adapter: all of a generation's where none are named, and all of a half of the block
    where that is ("att", "ffn")."""
    if not targets:
        return family.targets
    if all("." not in target for target in targets):
        return tuple(name for name in family.targets if name.split(".")[0] in targets) or targets
    return targets


def check_base(args: Namespace, base: "Base") -> ModelConfig:
    """Dimensions of the base; a flag that contradicts them, or its generation, is refused."""
    from ..models import family_named

    if args.model_version not in (None, base.config.version):
        raise UserError(
            f"--model_version {args.model_version} ({family_named(args.model_version).name}) contradicts "
            f"{args.load_model}, which is {base.family.name} ({base.config.version}); leave the flag (--generation) out"
        )
    for name, _ in DIMENSIONS:
        given, real = getattr(args, name), getattr(base.config, name)
        if given and given != real:
            raise UserError(f"--{name} {given} contradicts {args.load_model}, which has {real}; leave the flag out")
    return base.config


def new_model(args: Namespace, family: "Family") -> ModelConfig:
    """Dimensions of a new model, upstream's defaults filled in."""
    for name in ("n_layer", "n_embd", "vocab_size"):
        if getattr(args, name) is None:
            raise UserError(f"a new model needs --{name}; or name a base with --load_model")
    return family.new_dimensions(**{name: getattr(args, name) or 0 for name, _ in DIMENSIONS})


def data_config(args: Namespace) -> DataConfig:
    """The data's settings; what depends on --data_type filled in."""
    from ..data.masks import default_mask, require_markers  # after the flags are judged by themselves

    of_rows = args.data_type != "binidx"
    loss_mask = args.loss_mask or ("file" if of_rows else default_mask(args.data_file))
    of_answers = DataConfig(data_type=args.data_type, loss_mask=loss_mask).of_answers
    data = settings_of(
        args,
        DataConfig,
        dataload=args.dataload or ("pad" if of_answers else "pack" if args.data_type == "pairs" else "get"),
        loss_mask=loss_mask,
        seed=args.random_seed if args.data_shuffle else None,
        **markers_of(args),
    )
    check_data(data)
    require_markers(data)
    return data


def check_data(data: DataConfig) -> None:
    """Refuse a micro batch that nothing could hold, and flags of the data that nothing would read."""
    tokens = data.micro_bsz * data.ctx_len * data.documents
    if tokens > MOST_TOKENS:
        raise UserError(
            f"--micro_bsz {data.micro_bsz} rows of --ctx_len {data.ctx_len} are {tokens:,} tokens, and a "
            f"micro batch has {MOST_TOKENS:,} at most; lower one of them"
        )
    for name in ("mask_id", "mask_end_id"):
        if getattr(data, name) and data.loss_mask not in ("qa", "se"):
            raise UserError(
                f"--{name} belongs to --loss_mask qa or se, and the mask is {data.loss_mask}; give one of them, or "
                f"leave --{name} out"
            )
    plain = DataConfig(data.path)
    for name in ("tokenizer", "sft_field", "sft_split", "sft_long", "sft_think", "skip_bad_rows"):
        if not data.of_rows and getattr(data, name) != getattr(plain, name):
            raise UserError(
                f"--{name} belongs to --data_type sft and pairs, and the data is {data.data_type}, whose tokens are "
                f"made already; add --data_type sft (or pairs), or leave --{name} out"
            )


def check_products(train: TrainConfig, adapter: AdapterConfig) -> None:
    """Refuse flags of files that the run would not write."""
    full = adapter.whole_model
    if train.merge_on_save and full:
        raise UserError("--merge_on_save merges an adapter, and --peft none has none: rwkv.pth is the model already")
    if train.save_dtype != "keep" and not full and not train.merge_on_save:
        raise UserError(
            f"--save_dtype {train.save_dtype} is the dtype of a model's file, and this run writes an adapter; give "
            "--output_dtype to merge_bone.py, or add --merge_on_save"
        )


def check_train(train: TrainConfig) -> None:
    """Contradictions among the remaining flags."""
    for name in ("beta1", "beta2"):
        if getattr(train, name) >= 1:
            raise UserError(f"--{name} {getattr(train, name)} must be below 1")
    if train.compile and train.stage == 3:
        raise UserError(
            f"--compile with --strategy {train.strategy}: stage 3 gathers and frees weights between operations that "
            "would be compiled as one; take stage 1 or 2, or leave --compile out"
        )
    if train.epoch_begin >= train.epoch_count:
        raise UserError(
            f"--epoch_begin {train.epoch_begin} leaves no epoch of --epoch_count {train.epoch_count} to train"
        )
    if train.fresh_optimizer and not train.resume:
        raise UserError(
            "--fresh_optimizer says how to --resume, which is not given; a new run has a fresh optimizer anyway"
        )
    if train.val_data and train.val_split:
        raise UserError("--val_data and --val_split both name the validation samples; give one of them")
    if train.val_seed is not None and not train.val_split:
        raise UserError(f"--val_seed {train.val_seed} draws what --val_split keeps, which is not given; leave it out")
    validates = bool(train.val_data or train.val_split)
    for name, serves in (("val_every", validates or bool(train.retain_data)), ("early_stop", validates)):
        if getattr(train, name) and not serves:
            raise UserError(f"--{name} {getattr(train, name)} needs samples to validate on: --val_data or --val_split")
    check_questions(train)
    if train.wandb:
        check_wandb(train.wandb)
    if not train.proj_dir:
        raise UserError("--proj_dir is empty; name the folder of the run")
    folder = Path(train.proj_dir)
    if meant := home_meant(folder):
        raise UserError(f"--proj_dir {folder}: {meant}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--proj_dir {folder} is a file; name a folder")
