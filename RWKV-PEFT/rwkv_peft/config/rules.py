"""The table of settings that do not go together: train.py refuses flags by it, and shows it in their help."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from ..cli.names import INFCTX, NONE, STATE
from ..cli.rules import EXCLUDES, NEEDS, Given, Rule, contradictions
from .adapter import MINI, AdapterConfig
from .data import DataConfig
from .objective import LOADED, OWN_TEACHER, Objective
from .setting import flag_of
from .train import STRATEGIES, TrainConfig

# facts
ALONE, BESIDE = "states that train alone (--peft none --train_parts state)", "states that train beside others"
WHOLE = "a model that trains itself (--peft none)"
INIT = "pissa_init"
SEVERAL = "several --data_file"
FACTS = (ALONE, BESIDE, WHOLE, LOADED, INIT, SEVERAL, OWN_TEACHER)
# conditions
STAGE_3, OFFLOAD = (f"--strategy {'|'.join(name for name in STRATEGIES if part in name)}" for part in ("3", "offload"))
UNSCALED = "--train_type infctx, --context_parallel, --data_type prompts"
OF_ROWS = (
    "--tokenizer, --sft_field, --sft_split, --sft_as, --sft_long, --sft_think, --clean_turns 0, --tool_form, "
    "--turns_in_text, --encoding, --document_end, --skip_bad_rows"
)
OF_TASK = "--eval_task, --eval_template, --eval_max_tokens"
# reasons
MIXED = "only tokens and rows of sft are mixed"
APART = "ranks draw different numbers of tokens, and none holds a whole layer"
# remedies
TUNE = "leave --peft out, or give --train_parts state instead to tune them along"
BY_PARTS = "choose what trains with --train_parts, or name a --peft"
BOTH = "give both, or RWKV-PEFT's JSON of two texts to --mask_id"
SHARE = "take stage 1 or 2"
ABOVE_0, LOWER = "give a rate above 0", "take stage 1 or 2, or leave --compile out"
ROWS = "take --data_type sft, pairs, labels, prompts or contexts, or leave it out"
FULL = "take --precision bf16 or fp32"
ONE, OUT = "make one file of them", "leave it out"
NO_PAD = "take --loss_mask none, or --dataload pad"
OUTPUT = "give --output_dtype to merge_bone.py, or add --merge_on_save"
MARKER = """rwkv-peft preprocess --ids 'Assistant:' prints such ids, and RWKV-PEFT's qa means --mask_id """ + (
    """'{"mask0":"User:","mask1":"Assistant:"}'"""
)
ASK = "take stage 1 or 2, or ask what the run has saved with rwkv-peft eval"

RULES = (
    Rule("--train_stage 1", EXCLUDES, "--load_model, --peft !none", "it makes a new model"),
    Rule("--train_type finetune", EXCLUDES, "--peft !none", "it trains the model itself", "leave --peft out"),
    Rule("--train_type state", EXCLUDES, "--peft !none", "it trains the states alone", TUNE),
    Rule("--train_type state", EXCLUDES, "--train_parts !state", "it trains the states alone"),
    Rule("--target_modules", EXCLUDES, "--peft none", "it names layers that get an adapter", BY_PARTS),
    Rule("--quant", EXCLUDES, "--peft none", "it keeps weights that adapters leave frozen"),
    Rule("--bone_mini_r", NEEDS, f"--bone_mode {MINI}", "it is the width of that mode's matrix"),
    Rule(
        INIT, NEEDS, LOADED, "it is what the run that wrote pissa_load began with", "name that, or leave pissa_init out"
    ),
    Rule("--state_load", NEEDS, "--train_parts state", "it is where states start from", "add it"),
    Rule("--state_parts", NEEDS, "--train_parts state", "it is about the states that train", "add it"),
    Rule("--state_lr", NEEDS, "--train_parts state", "it is the rate of states"),
    Rule("--state_lr", EXCLUDES, ALONE, "their rate is --lr_init", "give that"),
    Rule("--lr_init 0", EXCLUDES, BESIDE, "--state_lr follows its schedule, and 0 leaves nothing of it", ABOVE_0),
    Rule(OF_ROWS, EXCLUDES, "--data_type binidx", "its tokens are made already", ROWS),
    Rule("--num_generations, --max_completion_length", EXCLUDES, "--data_type !prompts", "it is about drawn answers"),
    Rule("--data_type prompts", EXCLUDES, "--context_parallel", "a rank draws and learns whole answers", OUT),
    Rule("--data_type prompts", EXCLUDES, "--dataload !pack", "answers are packed", OUT),
    Rule("--data_type prompts", EXCLUDES, "--loss_mask !file", "answers alone count", OUT),
    Rule("--data_type prompts", EXCLUDES, "--retain_data", "it is measured by answers that rows hold", OUT),
    Rule("--data_type prompts", EXCLUDES, STAGE_3, APART, "take stage 1 or 2"),
    Rule(
        "--mask_id, --mask_end_id",
        EXCLUDES,
        "--loss_mask !qa|se",
        "that mask reads no marker",
        "take one that does: qa or se",
    ),
    Rule("--loss_mask qa|se", NEEDS, "--mask_id", "it counts what follows the ids that open an answer", MARKER),
    Rule("--loss_mask se", NEEDS, "--mask_end_id", "it counts up to the ids that close an answer", BOTH),
    Rule("--loss_mask pad", EXCLUDES, "--dataload get", "a stream has no padding", NO_PAD),
    Rule(
        "--dataload only",
        EXCLUDES,
        "--micro_bsz !1",
        "it reads one document at a time",
        "take --dataload pad, which batches",
    ),
    Rule("--sft_as", EXCLUDES, "--sft_field", "that reads rows as they are, without speakers", "leave one out"),
    Rule("--think_labels", NEEDS, "--sft_think on", "it labels the thinking that this lays out", "add it"),
    Rule("--think_labels", NEEDS, "--data_type sft", "other answers share a prompt, or are drawn", OUT),
    Rule("--data_mix", NEEDS, SEVERAL, "it is the share of each", "name several, or leave it out"),
    Rule(SEVERAL, EXCLUDES, "--data_type pairs|labels|prompts|contexts", MIXED, ONE),
    Rule("--replay", EXCLUDES, "--data_type pairs|labels|prompts|contexts", MIXED, OUT),
    Rule("--replay_share", NEEDS, "--replay", "it is the share of that file's tokens"),
    Rule("--val_data", EXCLUDES, "--val_split", "both name the validation samples"),
    Rule("--val_seed", NEEDS, "--val_split", "it draws what that keeps"),
    Rule("--val_every", NEEDS, "--val_data, --val_split, --retain_data", "it needs samples to validate on"),
    Rule("--forget_at_most", NEEDS, "--retain_data", "it bounds what those rows lose", "name them"),
    Rule("--forget_at_most", EXCLUDES, "--fresh_optimizer", "the start of the run's line is not known then", OUT),
    Rule("--early_stop", NEEDS, "--val_data, --val_split", "it needs samples to validate on"),
    Rule("--eval_every, --eval_limit, --eval_batch", NEEDS, "--eval_data", "it is about its questions"),
    Rule(OF_TASK, NEEDS, "--eval_data", "it is about the questions of that file"),
    Rule("--eval_max_tokens, --eval_stop", EXCLUDES, "--eval_task choices", "its answers are not written"),
    Rule("--eval_data", EXCLUDES, STAGE_3, "no rank holds a whole layer, to answer by itself", ASK),
    Rule("--merge_on_save", EXCLUDES, WHOLE, "rwkv.pth is the model already"),
    Rule("--save_dtype", NEEDS, f"{WHOLE}, --merge_on_save", "it is the dtype of a model's file", OUTPUT),
    Rule("--fresh_optimizer", NEEDS, "--resume", "a new run has a fresh optimizer anyway"),
    Rule("--data_type contexts", EXCLUDES, "--dataload !pack, --loss_mask !file", "its rows are laid out", OUT),
    Rule("--data_type contexts", EXCLUDES, "--context_parallel", "a teacher reads longer rows", OUT),
    Rule(
        OWN_TEACHER,
        EXCLUDES,
        f"{WHOLE}, --train_parts !state, {LOADED}",
        "its teacher is the base, which has to stay as it is",
        "name the base as --teacher_model too, or leave it out",
    ),
    Rule("--context_parallel", EXCLUDES, STAGE_3, "ranks would wait for weights and states of different blocks", SHARE),
    Rule("--optim !adamw", EXCLUDES, OFFLOAD, "the optimizer in main memory is AdamW", "take a stage without offload"),
    Rule("--optim muon", EXCLUDES, STAGE_3, "it gathers whole matrices of momenta, which lie apart there", SHARE),
    Rule("--optim muon", EXCLUDES, ALONE, "states are no matrices of layers", OUT),
    Rule("--precision fp16", EXCLUDES, UNSCALED, "they go back before the loss is scaled", FULL),
    Rule("--share_prompts 1", NEEDS, "--data_type pairs|labels", "other rows share no prompt"),
    Rule("--compile", EXCLUDES, STAGE_3, "it gathers weights inside of what would be compiled as one", LOWER),
)
Settings = AdapterConfig | DataConfig | TrainConfig | Objective
SETTINGS = tuple(field for config in (AdapterConfig, DataConfig, TrainConfig) for field in fields(config))
NO_FLAGS: Mapping[str, Any] = MappingProxyType({})
FLAGS = MappingProxyType({flag: field for field in SETTINGS if (flag := flag_of(field))})


def values_of(*settings: Settings) -> dict[str, Any]:
    """{flag: its value} of settings, and the facts that rules name."""
    values = {flag_of(field) or field.name: getattr(one, field.name) for one in settings for field in fields(one)}
    for one in settings:
        if isinstance(one, AdapterConfig):
            beside = STATE in one.train_parts and not one.states_alone
            values |= {
                ALONE: one.states_alone,
                BESIDE: beside,
                WHOLE: one.whole_model,
                LOADED: one.load,
                INIT: one.init,
            }
        if isinstance(one, DataConfig):
            values[SEVERAL] = bool(one.more)
        if isinstance(one, TrainConfig):
            values |= {"train_type": INFCTX if one.chunk_ctx else NONE}
        if isinstance(one, Objective):
            values["objective"] = one.name
    values[OWN_TEACHER] = values.get("data_type") == "contexts" and not values.get("teacher_model")
    return values


def given(values: Mapping[str, Any]) -> Given:
    """The flags that are not their defaults, and the facts that hold."""
    flags = {name for name, field in FLAGS.items() if values.get(name) not in (None, field.default)}
    return Given(values, flags | {fact for fact in FACTS if values.get(fact)})


def check_settings(
    *settings: Settings, rules: Sequence[Rule] = RULES, flags: Mapping[str, Any] = NO_FLAGS, names: Iterable[str] = ()
) -> Iterator[str]:
    """Yield the refusals of settings that do not go together. `flags` {name: value} are those of a command line, and
    settings have the last word on them. `names` are flags that count as given, whatever their values are."""
    values = {**flags, **values_of(*settings)}
    values |= {name: flags[name] for name in ("train_type",) if name in flags}  # settings show one of its values only
    judged = given(values)
    yield from contradictions(rules, judged._replace(names={*judged.names, *names}))
