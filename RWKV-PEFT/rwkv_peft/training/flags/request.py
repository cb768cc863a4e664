"""Turn the command line of train.py into one frozen RunConfig in three steps, each with a frozen result.

    parse          argv -> CommandLine: the flags, and those that they imply
    validate       CommandLine -> Flags: settings that go together, whatever the model is
    open_request   Flags -> Request: the base that they name, opened once, and the RunConfig that fits it

Names that RWKV-LM and RWKV-PEFT scripts use are kept. Every contradiction is refused here, in the flags' own words,
before a weight is read; those that the flags show by themselves are refused before torch is imported.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import objectives
from ...children import when_orphaned
from ...cli.errors import UserError
from ...cli.names import AUTO, FINETUNE, INFCTX, NONE, STATE
from ...cli.parser import Parser
from ...cli.rules import Refusals
from ...cli.tables import GENERATIONS
from ...config import CHUNK_CTX, STATE_LR, AdapterConfig, DataConfig, ModelConfig, Objective, RunConfig, TrainConfig
from ...config.data import OF_ROWS, think_bounds
from ...config.rules import FLAGS, check_settings
from ...data.recorded import default_mask
from ...objectives import takers_of
from ..ranks.world import World, find_world, match_world
from ..saving.checkpoints import how_to_go_on, saved_state
from .adapter import adapter_config, check_adapter_flags, parts_of
from .checks import (
    DRAWN,
    check_base,
    check_model,
    check_objective,
    check_overwriting,
    check_tokens,
    check_train,
    check_tuned_states,
    draw_seed,
)
from .legacy import PLACEHOLDER, adopt, check_stage, markers_of
from .parser import DIMENSIONS, READ, RULES, WRITE, Entries, entries_of, first_of, parser_of_train, settings_of

if TYPE_CHECKING:
    from ...checkpoints.base import Base
    from ...models.family import Family


class CommandLine(NamedTuple):
    """A command line as it is meant. Nothing changes it after parse().

    args: the flags as parsed, with what others imply; world: this process among those of the run; argv: the flags for
    the other processes, with the seed if one was drawn; given: the flags that stand on the command line or in a
    settings file; notes: how they were read; mistakes: what was refused so far.
    """

    args: Namespace
    world: World
    argv: tuple[str, ...]
    given: Entries
    notes: tuple[str, ...]
    mistakes: tuple[str, ...]


class Flags(NamedTuple):
    """The settings of a command line that go together, whatever the model is and wherever files lie."""

    args: Namespace
    adapter: AdapterConfig
    data: DataConfig
    train: TrainConfig
    objective: Objective
    world: World
    argv: tuple[str, ...]
    given: Entries
    notes: tuple[str, ...]


class Request(NamedTuple):
    """The run that a command line asks for.

    base: the model that it starts from, or None for a new one; layers: the names of the modules that get an adapter;
    world, argv, notes: as in CommandLine; teacher: the model that it learns from, or None; checks, writes, makes_model:
    --check_flags, --write_config and --train_stage 1, which do something else than training.
    """

    config: RunConfig
    base: "Base | None"
    layers: tuple[str, ...]
    world: World
    argv: tuple[str, ...]
    notes: tuple[str, ...]
    teacher: "Base | None"
    checks: bool
    writes: str
    makes_model: bool


def parse_run(argv: Sequence[str]) -> Request:
    """argv -> the Request of train.py. Raises UserError for settings that cannot work together, or not here."""
    return open_request(parse_flags(argv), here=True)


def parse_flags(argv: Sequence[str]) -> Flags:
    """argv -> Flags, without torch. Raises one UserError of all mistakes and contradictions."""
    return validate(parse(argv, parser_of_train()))


def check_flags(argv: Sequence[str]) -> None:
    """Check the flags before torch is imported. For several ranks, also silence torch's C++ log: torch reads its level
    at import. A lost rank is reported without stacks of C++ frames. A rank ends with its torchrun from here on."""
    flags = parse_flags(argv)
    if flags.world.size > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if flags.world.elastic:
        when_orphaned(partial(end_without_launcher, flags.world, Path(flags.train.proj_dir)))


def end_without_launcher(world: World, folder: Path) -> None:
    """End this rank because its torchrun, or the command that started it, is gone."""
    try:
        if world.leads:
            words = f"error: the launcher of {world.name(world.rank)} is gone; {how_to_go_on(folder)}"
            print(words, file=sys.stderr, flush=True)
    finally:
        os._exit(1)


# parse


def parse(argv: Sequence[str], parser: Parser, here: bool = True) -> CommandLine:
    """Read argv and set what it implies. Without `here` the run is planned for another machine, however this process
    was started. validate reports all mistakes at once."""
    argv = with_settings(argv, parser)
    args, parsed = parser.parse_with_mistakes(argv)
    refusals = Refusals(parsed.messages)
    entries = entries_of(argv, parser._option_string_actions)
    entries.pop(WRITE[2:], None)
    state = saved_state(args.proj_dir, args.resume)
    world, notes = World(args.num_nodes, args.devices), list[str]()
    with refusals.collecting():
        if here:
            world = find_world(args.num_nodes, args.devices)
            if args.random_seed == DRAWN:
                args.random_seed = draw_seed(state, world)
                argv = [*argv, "--random_seed", str(args.random_seed)]
                entries["random_seed"] = str(args.random_seed)
        notes += match_world(args, world, state, keeps_rows="micro_bsz" not in entries)
    if here and args.peft is None and args.load_model in ("", PLACEHOLDER) and args.n_layer:
        args.peft = NONE  # flags describe a new model, which has nothing to adapt; a plan stands for its base
    args.data_file, args.more_data = first_of(args.data_file)
    args.val_data, args.more_val = first_of(args.val_data)
    notes += adopt(args)  # after match_world: the steps of --my_exit_tokens follow from the number of ranks
    args.peft = args.peft or (NONE if args.train_type in (FINETUNE, STATE) else AdapterConfig.method)
    if args.train_type == STATE and not args.train_parts:
        args.train_parts = [(STATE,)]
    if args.lr_init == AUTO:  # as if it were not given: open_request chooses it, by the model
        args.lr_init = None
    return CommandLine(args, world, tuple(argv), entries, tuple(notes), tuple(refusals.messages))


def with_settings(argv: Sequence[str], parser: Parser) -> Sequence[str]:
    """Put the flags of the file that --config names, if it is given, before those of argv."""
    if all(word.partition("=")[0] != READ for word in argv):
        return argv
    from .settings_file import expanded  # it needs a package, and --help needs none

    return expanded(argv, parser)


# validate


class Draft(NamedTuple):
    """Settings before all of them are known to fit. None stands for those that were refused."""

    adapter: AdapterConfig | None
    data: DataConfig | None
    train: TrainConfig | None
    objective: Objective


def validate(line: CommandLine, here: bool = True) -> Flags:
    """Make the settings of a CommandLine; judge them by the table of rules. `here`: as in look_up.

    Raises one UserError of all refusals. If there are any, the base and the data are looked at as well, to report their
    mistakes too; only then is torch imported."""
    args, world, argv, entries, notes, mistakes = line
    refusals, adapter, data, train = Refusals(mistakes), None, None, None
    with refusals.collecting():
        adapter = adapter_config(args)
    with refusals.collecting():  # the rates and epochs of a TrainConfig depend on the data
        data = data_config(args)
        train = train_config(args, data, rows_chosen="micro_bsz" not in entries)
    # Without --objective, the first that takes rows of this kind.
    objective: Objective = settings_of(args, objectives.OBJECTIVES[args.objective or takers_of(args.data_type)[0]])
    draft = Draft(adapter, data, train, objective)
    refusals.add(*check_stage(args), *check_adapter_flags(args), *check_objective(args, objective))
    # settings that were refused are left out, and those of an objective that the data is not for
    fitting = objective if args.data_type in objective.rows else None
    settings = [each for each in (adapter, data, train, fitting) if each is not None]
    parsed = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items()}
    flags = {name: value for name, value in parsed.items() if name not in (*FLAGS, "objective")}
    # a flag without a default of its own counts as given, whatever its value is
    names = [name for name, field in FLAGS.items() if field.metadata["unset"] and parsed[name] is not None]
    names += [name for name, field in objectives.FLAGS.items() if parsed[name] != field.default]
    refusals.add(*check_settings(*settings, rules=RULES, flags=flags, names=names))
    if data is not None:
        refusals.add(*check_tokens(data))
    if train is not None:
        refusals.add(*objective.problems(train), *check_train(train))
    if adapter is not None and data is not None and train is not None:
        refusals.add(*check_overwriting(adapter, data, train, objective))
    if refusals.messages and (args.load_model or args.data_file):
        with suppress(ModuleNotFoundError):  # no torch: these mistakes come first
            look_up(args, draft, refusals, here)
    # One error with all refusals: nobody mends flags one by one.
    refusals.raise_all()
    assert adapter is not None and data is not None and train is not None
    return Flags(args, adapter, data, train, objective, world, argv, entries, notes)


def goes_together(adapter: AdapterConfig, data: DataConfig, train: TrainConfig, objective: Objective) -> bool:
    """Tell whether no settings contradict each other, whatever the model is and wherever files lie."""
    return not any(check_settings(adapter, data, train, objective, rules=RULES))


def train_config(args: Namespace, data: DataConfig, rows_chosen: bool) -> TrainConfig:
    """Make the TrainConfig. Default learning rates depend on what trains, the default number of epochs on the data.
    rows_chosen: micro_bsz may be chosen once the data is known."""
    segment = (args.chunk_ctx or CHUNK_CTX) if args.train_type == INFCTX else 0
    epochs = args.epoch_count is None and not args.epoch_steps and not args.epoch_begin
    epochs = epochs and (data.of_rows or data.of_answers)
    # rates that open_request chooses, by the model
    rates = () if args.lr_init is not None else ("lr_init",) if args.lr_final is not None else ("lr_init", "lr_final")
    others: dict[str, Any] = {"lr_chosen": rates, "epochs_chosen": epochs, "rows_chosen": rows_chosen}
    if epochs and args.epoch_save is None:
        others["epoch_save"] = 0  # short epochs have little to save
    train = settings_of(args, TrainConfig, chunk_ctx=segment, more_val=args.more_val, **others)
    if args.lr_final is not None:
        return train
    final = STATE_LR if args.peft == NONE and parts_of(args) == (STATE,) else train.lr_final
    return replace(train, lr_final=min(train.lr_init, final))


def data_config(args: Namespace) -> DataConfig:
    """Make the DataConfig. The defaults of --dataload and --loss_mask depend on the data."""
    files = (args.data_file, *args.more_data)
    loss_mask = args.loss_mask or ("file" if args.data_type in OF_ROWS else min(map(default_mask, files)))
    kind = DataConfig(data_type=args.data_type, loss_mask=loss_mask)
    return settings_of(
        args,
        DataConfig,
        dataload=args.dataload or ("pad" if kind.of_answers else "pack" if kind.of_rows else "get"),
        loss_mask=loss_mask,
        more=args.more_data,
        seed=args.random_seed if args.data_shuffle else None,
        think_labels=think_bounds(args.think_labels),
        **markers_of(args),
    )


# open


def open_request(flags: Flags, here: bool = False) -> Request:
    """Open what Flags name; `here` as in look_up. Without a base, an adapter is fitted to a new model's shapes. Raises
    UserError for settings that the base or this machine contradicts."""
    from ...gpus import slow_at_bf16
    from ..rates import automatic_rate, with_chosen_rates

    args, adapter, data, train, objective, world, argv, entries, notes = flags
    refusals = Refusals()
    # Opens files: the headers are read here, and weights stay on the disk, mapped.
    base, model, fitted, layers, teacher = look_up(args, Draft(adapter, data, train, objective), refusals, here)
    refusals.raise_all()
    assert model is not None and fitted is not None and layers is not None
    if base is not None and args.my_testing not in (None, base.config.version):
        notes += (f"--my_testing {args.my_testing} is not read: {args.load_model} is {base.family.name}",)
    if here and "precision" not in entries and train.accelerator != "cpu" and (card := slow_at_bf16()):
        half = replace(train, precision="fp16")
        if goes_together(adapter, data, half, objective):
            train, notes = half, (*notes, f"--precision fp16 is chosen, because {card} multiplies bf16 slowly")
    if train.lr_chosen:
        train = with_chosen_rates(train, automatic_rate(fitted, model.n_embd, objective, base is None).value)
    config = RunConfig(model, fitted, data, train, objective, entries)
    others = (args.check_flags, args.write_config or "", args.train_stage == 1)
    return Request(config, base, layers, world, argv, notes, teacher, *others)


class Opened(NamedTuple):
    """What flags name: base, layers and teacher as in Request; the model's dimensions; the adapter with the layers of
    its generation. None stands for what they do not name and for what was refused."""

    base: "Base | None"
    model: ModelConfig | None
    adapter: AdapterConfig | None
    layers: tuple[str, ...] | None
    teacher: "Base | None"


def look_up(args: Namespace, draft: Draft, refusals: Refusals, here: bool) -> Opened:
    """Open what flags name; add to Refusals all that contradicts the settings there. `here`: the run is to be on this
    machine (its GPUs are counted). The data and the run's folder are looked at only beside other refusals: a run opens
    them by itself."""
    from ...adapters.inject import check_adapter
    from ...checkpoints.base import linear_shapes, open_base
    from ...data.sources import find_data
    from ...gpus import grow_segments, resolve_accelerator
    from ...models import family_named
    from ..saving.resume import find_state
    from ..step.compiling import require_compiler
    from ..step.teacher import open_teacher

    adapter, data, train, objective = draft
    base, model, layers, teacher = None, None, None, None
    with refusals.collecting():  # without a model there are no layers to adapt
        if args.load_model:
            base = open_base(args.load_model)
            family, model = base.family, base.config
        else:
            family = family_named(args.model_version or args.my_testing or next(iter(GENERATIONS)))
            model = new_model(args, family)
        # The names of layers are the generation's, so that "att" means other layers in RWKV-6 than in RWKV-7.
        if adapter is not None:
            adapter = replace(adapter, targets=targets_of(adapter.targets, family))
            layers = check_adapter(adapter, linear_shapes(family.shapes(model)), (*family.parts, STATE))
    with refusals.collecting():
        if model is not None:
            teacher = open_teacher(objective, model.vocab_size)
    if base is not None:
        refusals.add(*check_base(args, base))
        if base.has_states and adapter is not None and data is not None:
            refusals.add(*check_tuned_states(base, adapter, data, objective))
    if model is not None and train is not None:
        refusals.add(*check_model(train, model))
    if here:
        if not args.load_model and adapter is not None and (adapter.method != NONE or adapter.load):
            refusals.add(
                f"--peft {args.peft} adapts a base model and none is given; "
                "name it with --load_model, or train a new model with --peft none"
            )
        if data is not None and data.dataload in ("pad", "only"):
            grow_segments()  # before CUDA starts
        if train is not None:
            with refusals.collecting():
                resolve_accelerator(train)
            with refusals.collecting():
                if train.compile:
                    require_compiler()
    reads = args.data_file and not (args.check_flags or args.write_config or args.train_stage == 1)
    if refusals.messages and reads:
        with refusals.collecting():
            if data is not None:
                find_data(data)
        with refusals.collecting():
            if train is not None and adapter is not None and not train.resume:
                find_state(Path(train.proj_dir), train, {"adapter": asdict(adapter)})
    return Opened(base, model, adapter, layers, teacher)


def targets_of(targets: tuple[str, ...], family: "Family") -> tuple[str, ...]:
    """The linear layers that get an adapter: those named, of a half of the block ("att", "ffn"), or all."""
    if not targets:
        return family.targets
    if any("." in target for target in targets):
        return targets
    halves = tuple(f"{target}." for target in targets)
    return tuple(name for name in family.targets if name.startswith(halves)) or targets


def new_model(args: Namespace, family: "Family") -> ModelConfig:
    """The dimensions of a new model, with upstream's defaults. Raises UserError if one without a default is missing."""
    missing = [f"--{name}" for name in ("n_layer", "n_embd", "vocab_size") if getattr(args, name) is None]
    if missing:
        raise UserError(f"a new model needs {', '.join(missing)}; or name a base with --load_model")
    return family.new_dimensions(**{name: getattr(args, name) or 0 for name, _ in DIMENSIONS})
