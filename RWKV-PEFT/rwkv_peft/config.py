"""The settings of a run as frozen dataclasses, made once from the command line.

Each field that a flag sets carries it: its help, its type, its name where that is another than the field's. The parser
of train.py, its --help and docs/train_flags.md are made of these fields (training/flags.py).
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

from .cli import above_zero, alias, count, names, not_negative, positive, rate, seed, switch
from .names import EVAL_TASKS, NONE, SCHEDULES, STATE

MODE_ALIASES = (("bat", "bat-in"),)  # RWKV-PEFT's name for it
METHOD_ALIASES = (("disha", "bone"),)
SCHEDULE_ALIASES = (("cos_decay", "rwkv-peft"), ("cos", "cosine"))
QUANTIZATIONS = ("none", "nf4", "int8")
STRATEGIES = tuple(f"deepspeed_stage_{stage}" for stage in ("1", "2", "2_offload", "3", "3_offload"))
DATA_TYPES = ("binidx", "sft", "pairs")
BUCKET = 200_000_000  # the most elements of a bucket in which ranks exchange gradients
CHUNK_CTX = 512  # tokens a segment
STATE_LR = 1e-2  # of time states; benchmarks/README.md holds the measurement
Value = TypeVar("Value")


def setting(
    default: Value,
    help: str | None = None,
    *,
    flag: str | None = None,
    group: str = "",
    unset: bool = False,
    **options: Any,
) -> Value:
    """A field that a flag sets: default, the flag's help, its name where it is not the field's, the group of --help
    that it stands in, and argparse's options. With unset the flag's default is None, which stands for what the help
    says. Without help the field has no flag of its own."""
    metadata = {"help": help, "flag": flag, "group": group, "unset": unset, "options": options}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a model that every generation has: n_layer blocks over n_embd (C) channels; dim_att (A) = heads x
    head_size attention channels, dim_ffn (F) feed-forward channels. A generation's own class adds its others, and names
    its `version`."""

    n_layer: int
    n_embd: int
    vocab_size: int
    dim_att: int
    dim_ffn: int
    head_size: int = 64
    version: ClassVar[str]

    @property
    def n_head(self) -> int:
        return self.dim_att // self.head_size


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapter replaces which linear layers, and which other parameters train.

    method and mode name one of METHODS (adapters/methods.py), mode where several forms share the word; "none" is full
    fine-tuning. targets are module-name suffixes such as "att.key", () all that the generation has; alpha is the LoRA
    scale times rank (0 means alpha = rank), svd_niter the power iterations of PiSSA's randomized SVD (0: an exact SVD),
    init the file of the factors that a PiSSA of RWKV-PEFT in `load` began with.
    """

    method: str = setting(
        "bone",
        "adapter method; none trains the model itself (all of it, or --train_parts); default bone, and none with "
        "--train_type finetune or state",
        flag="peft",
        unset=True,
        type=alias(METHOD_ALIASES),
    )
    mode: str = setting(
        "bat-in",
        "bat-in (block affine by input block, also called bat), bat-in-scaled (its two terms of one size), bat-out, "
        "bone, bone-mini or bone-signed (default bat-in)",
        flag="bone_mode",
        unset=True,
        type=alias(MODE_ALIASES),
        metavar="MODE",
    )
    rank: int = setting(
        64,
        "block size r (default 64); for the bat modes it divides all dimensions",
        flag="bone_r",
        unset=True,
        type=positive,
    )
    mini_rank: int = setting(
        0,
        "bone-mini: width of its (bone_r, bone_mini_r) matrix, which repeats over a layer's outputs and divides their "
        "number",
        flag="bone_mini_r",
        unset=True,
        type=positive,
    )
    alpha: float = setting(0.0)
    dropout: float = setting(0.0)
    svd_niter: int = setting(4)
    lora_plus_ratio: float = setting(
        16.0,
        "lora-plus: learning rate of lora_B over lora_A's (default 16)",
        flag="loraplus_lr_ratio",
        unset=True,
        type=above_zero,
    )
    targets: tuple[str, ...] = setting(
        (),
        "linear layers that get an adapter, as ends of their names (default: all of a block)",
        flag="target_modules",
        unset=True,
        nargs="+",
        metavar="NAME",
    )
    train_parts: tuple[str, ...] = setting(
        (),
        "what trains along: some of time ln emb head, parameters of the base, and state, the wkv states before the "
        "first token, which start at zero or from --state_load",
        nargs="*",
        type=names,
        metavar="PART",
    )
    quant: str = setting("none", "keep the frozen matrices quantized (needs bitsandbytes)", choices=QUANTIZATIONS)
    load: str = setting("", "adapter to start from", flag="bone_load", unset=True, metavar="FILE")
    init: str = setting("")

    @property
    def states_alone(self) -> bool:
        """Whether nothing but time states trains."""
        return self.method == NONE and self.train_parts == (STATE,)

    @property
    def whole_model(self) -> bool:
        """Whether a run's file is a model: no layer is adapted, and parameters of the model itself train."""
        return self.method == NONE and not self.states_alone


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in which order.

    path is the prefix of a .bin/.idx pair (data_type "binidx"), or rows of questions and answers (data_type "sft"), or
    of two answers each ("pairs"), which tokenizer turns into tokens. seed draws the order of the samples; None keeps
    that of the file.
    """

    path: str = setting(
        "",
        "PREFIX of PREFIX.bin and PREFIX.idx; a .jsonl, .json, .parquet or datasets folder for sft and pairs",
        flag="data_file",
        required=True,
        metavar="PREFIX",
    )
    data_type: str = setting(
        "binidx",
        "binidx: tokens; sft: rows of questions and answers, tokenized once into a cache; pairs: rows of a prompt, a "
        "chosen and a rejected answer, for preference training (DPO)",
        choices=DATA_TYPES,
    )
    tokenizer: str = setting("world", "sft, pairs: world, bytes or a tokenizer.json", metavar="NAME")
    sft_field: tuple[str, ...] = setting(
        (),
        "sft: the field that holds the text, or those of question and answer; pairs: those of prompt, chosen and "
        "rejected (default: recognised)",
        nargs="+",
        metavar="FIELD",
    )
    sft_split: str = setting(
        "",
        "sft, pairs: rows of --data_file to take, such as train[:1000]; of --val_data and --retain_data all are taken, "
        "in a folder of several splits those of the same name",
        metavar="SPLIT",
    )
    sft_long: str = setting(
        "left",
        "sft, pairs: rows longer than --ctx_len lose the front of their prompt, or are left out",
        choices=("left", "skip"),
    )
    sft_think: str = setting(
        "",
        "sft, pairs: how chats open their answers for RWKV-7 G1: on with the thinking that a row holds, else an empty "
        "one; off with an empty one everywhere (default: as rows have them)",
        choices=("on", "off"),
    )
    ctx_len: int = setting(1024, "tokens a sample", type=positive)
    dataload: str = setting(
        "get",
        "get: windows of the token stream; pad: one document a row, padded; only: one document, alone; "
        "pack: several whole documents a row, none seeing another (default get; sft: pad; pairs: pack)",
        unset=True,
    )
    loss_mask: str = setting(
        "none",
        "tokens that count: none and pad count all but padding, qa what follows --mask_id, se what stands between "
        "--mask_id and --mask_end_id, file reads PREFIX.mask, which preprocess writes where answers alone count "
        "(default file where there is a PREFIX.mask, else none; sft: file)",
        unset=True,
    )
    mask_id: tuple[int, ...] = setting(
        (),
        "token ids that open an answer, for --loss_mask qa and se; or RWKV-PEFT's JSON of two texts, mask1, which "
        "opens what counts, and mask0, which closes it",
        nargs="+",
        metavar="ID",
    )
    mask_end_id: tuple[int, ...] = setting(
        (), "token ids that close it (se), or open the next question (qa)", type=count, nargs="+", metavar="ID"
    )
    seed: int | None = setting(42)
    micro_bsz: int = setting(1, "samples a device and forward pass; a pair of answers is one", type=positive)

    @property
    def of_rows(self) -> bool:
        """Whether the data is rows that are yet to be tokenized."""
        return self.data_type != "binidx"

    @property
    def documents(self) -> int:
        """Of a sample, or the windows of one."""
        return 2 if self.data_type == "pairs" else 1


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains, on what, and where it writes.

    A step is one optimizer step of devices x num_nodes x micro_bsz x accumulate_grad_batches samples; an epoch is
    epoch_steps of them. Learning rates are per step, and lr_chosen names those that --lr_init auto chose; epoch_save
    counts epochs. Validation runs on val_data, or on the share val_split of the data, and retain_data is measured with
    it. Rows are computed in segments of chunk_ctx tokens where that is not 0.
    """

    load_model: str = setting(
        "",
        "base checkpoint; dimensions are read from it. Empty: a new model from --n_layer, --n_embd, --vocab_size "
        "(needs --peft none)",
        group="model",
        metavar="PTH",
    )
    val_data: str = setting("", "data to validate on, read like --data_file", group="validation", metavar="PREFIX")
    val_split: float = setting(
        0.0,
        "keep this share of the data, such as 0.01, for validation",
        group="validation",
        type=not_negative,
        metavar="SHARE",
    )
    val_seed: int | None = setting(
        None,
        "seed that draws what --val_split keeps, for runs of other seeds that validate on the same (default: "
        "--random_seed)",
        group="validation",
        type=count,
    )
    val_every: int = setting(
        0,
        "steps between validations, of which one follows the last step; 0: every epoch",
        group="validation",
        type=count,
    )
    early_stop: int = setting(
        0, "end after so many validations without a lower loss; 0: never", group="validation", type=count
    )
    retain_data: str = setting(
        "",
        "data whose loss tells what the run forgets, read like --data_file; measured before the first step and with "
        "each validation (--val_data or not), and decides nothing",
        group="validation",
        metavar="PREFIX",
    )
    eval_data: str = setting(
        "",
        "questions that the model answers while it trains, rows as rwkv-peft eval takes them; scored, and written with "
        "the answers to answers.jsonl in --proj_dir",
        group="validation",
        metavar="FILE",
    )
    eval_task: str = setting(
        "jsonl", "what they are, as rwkv-peft eval says", group="validation", choices=EVAL_TASKS, metavar="TASK"
    )
    eval_every: int = setting(
        0,
        "steps between such rounds of questions, of --eval_data and --lm_eval, beside the one at the end; 0: every "
        "epoch",
        group="validation",
        type=count,
    )
    eval_limit: int = setting(
        100, "ask the first so many of them, and of each task of --lm_eval; 0: all", group="validation", type=count
    )
    eval_template: str = setting(
        "", "how a question is put, as --template of rwkv-peft eval", group="validation", metavar="NAME"
    )
    eval_max_tokens: int = setting(256, "longest answer", group="validation", type=positive)
    eval_stop: tuple[str, ...] = setting(
        (),
        "texts that end an answer, besides the template's own; \\n and \\t are newline and tab",
        group="validation",
        nargs="+",
        metavar="TEXT",
    )
    eval_batch: int = setting(
        16, "answers written or scored at once, on each device", group="validation", type=positive
    )
    lm_eval: tuple[str, ...] = setting(
        (),
        "tasks of EleutherAI's lm-evaluation-harness, groups or patterns of them, that the model is asked while it "
        "trains; scored, and the results written to lm_eval.jsonl in --proj_dir (pip install -r requirements-eval.txt)",
        group="validation",
        nargs="+",
        metavar="TASK",
    )
    lm_eval_include_path: str = setting(
        "", "a folder with tasks of your own, as --include_path of rwkv-peft lm_eval", group="validation", metavar="DIR"
    )
    lm_eval_num_fewshot: int | None = setting(
        None,
        "solved examples before each question, as --num_fewshot of rwkv-peft lm_eval (default: the task's)",
        group="validation",
        type=count,
        metavar="N",
    )
    proj_dir: str = setting("out", "where the run writes", group="run", metavar="DIR")
    resume: str = setting(
        "",
        "continue the run in --proj_dir exactly where it stopped, on the same data; auto: or begin it where there is "
        "no checkpoint yet, for a command that is run again and again",
        group="run",
        nargs="?",
        const="must",
        choices=("must", "auto"),
        metavar="auto",
    )
    fresh_optimizer: bool = setting(
        False,
        "with --resume: keep weights and place in the data, start the optimizer anew; for another number of devices, "
        "strategy or precision",
        group="run",
        action="store_true",
    )
    show_samples: int = setting(
        0,
        "print the first N samples as the run reads them, what counts in the loss marked, <end> for the end token, and "
        "train nothing",
        group="run",
        type=count,
    )
    epoch_steps: int = setting(
        0, "optimizer steps an epoch; 0: one pass over the data, and on to the end of a step", group="run", type=count
    )
    epoch_count: int = setting(1, "epochs; the run ends after them", group="run", type=positive)
    epoch_begin: int = setting(
        0,
        "number of the first epoch: the schedule and the data start there (with --bone_load)",
        group="run",
        type=count,
    )
    epoch_save: int = setting(1, "save every so many epochs; 0: at the end alone", group="run", type=count)
    save_every: int = setting(
        0,
        "also save every so many optimizer steps, as at the end of an epoch; 0: at epochs alone",
        group="run",
        type=count,
    )
    save_minutes: float = setting(
        0.0,
        "also save when so many minutes have passed since the last save, at the end of a step; 0: never",
        group="run",
        type=not_negative,
    )
    keep_checkpoints: int | None = setting(
        None,
        "keep the newest so many checkpoints, and the files of the newest so many epochs; 0: all (default: 2 "
        "checkpoints, and the files of all epochs)",
        group="run",
        type=count,
    )
    save_dtype: str = setting(
        "keep",
        "dtype of rwkv.pth (--peft none) and of --merge_on_save's models: keep is that of the base, or for a new model "
        "--precision",
        group="run",
        choices=("keep", "bf16", "fp32"),
    )
    merge_on_save: bool = setting(
        False,
        "also write the merged model, merged.pth, whenever the adapter is saved",
        group="run",
        action="store_true",
    )
    random_seed: int = setting(
        42, "seed of initialization, dropout and data order; -1: one that is drawn and told", group="run", type=seed
    )
    wandb: str = setting(
        "",
        "also log to this Weights & Biases project (after `wandb login`, or with WANDB_MODE=offline)",
        group="run",
        metavar="PROJECT",
    )
    state_load: str = setting(
        "",
        "time states that --train_parts state starts from: a .pth, a .st, or a run that tuned states alone",
        group="run",
        metavar="FILE",
    )
    lr_init: float = setting(
        2e-5,
        f"learning rate after warm-up (default 2e-5; where states alone train, {STATE_LR:g}); auto: one by the method, "
        "its rank and the model's width, where docs/learning_rates.md has a rule for them",
        group="optimizer",
        unset=True,
        type=rate,
    )
    lr_final: float = setting(
        2e-5,
        f"learning rate at the end (default 2e-5; where states alone train, {STATE_LR:g}; with --lr_init auto a tenth "
        "of it)",
        group="optimizer",
        unset=True,
        type=not_negative,
    )
    lr_chosen: tuple[str, ...] = setting(())
    state_lr: float = setting(
        STATE_LR,
        "learning rate of --train_parts state beside others, whose own is --lr_init; it follows the same schedule "
        f"(default {STATE_LR:g})",
        group="optimizer",
        unset=True,
        type=not_negative,
    )
    lr_schedule: str = setting(
        "cosine",
        "how the learning rate goes from a = lr_init to z = lr_final, at step s = 0 … S - 1 of S, W of them warm-up: "
        + "; ".join(f"{name}: {formula}" for name, formula in SCHEDULES.items())
        + ". exp is RWKV-LM's, rwkv-lm what --my_exit_tokens makes of it there; rwkv-peft is RWKV-PEFT's cos_decay, "
        "which has no warm-up; its wsd is another, our cosine to a z of 0",
        group="optimizer",
        type=alias(SCHEDULE_ALIASES),
    )
    warmup_steps: int = setting(
        0, "steps of linear warm-up, as --lr_schedule says (default 0)", group="optimizer", type=count
    )
    dpo_beta: float = setting(
        0.1,
        "with --data_type pairs: how much a margin between two answers weighs; the higher, the nearer the model stays "
        "to its base",
        group="optimizer",
        type=above_zero,
    )
    dpo_nll: float = setting(
        0.0,
        "with --data_type pairs: add so many times the chosen answers' own loss, which keeps them likely",
        group="optimizer",
        type=not_negative,
    )
    beta1: float = setting(0.9, "Adam", group="optimizer", type=not_negative)
    beta2: float = setting(0.99, "Adam", group="optimizer", type=not_negative)
    adam_eps: float = setting(1e-8, "Adam", group="optimizer", type=above_zero)
    weight_decay: float = setting(0.0, "on matrices only (default 0)", group="optimizer", type=not_negative)
    layerwise_lr: bool = setting(
        True, "RWKV-LM's doubled learning rate of time_decay", group="optimizer", type=switch, metavar="0|1"
    )
    gradient_clip_val: float = setting(1.0, "largest gradient norm; 0: any", group="optimizer", type=not_negative)
    accumulate_grad_batches: int = setting(
        1,
        "forward passes a step; from hundreds on with --precision bf16 take stage 2, which adds their gradients up in "
        "float32",
        group="optimizer",
        type=positive,
    )
    accelerator: str = setting("auto", "where to train", group="machine", choices=("auto", "cpu", "gpu"))
    devices: int = setting(1, "GPUs, or CPU processes, a node", group="machine", type=positive)
    num_nodes: int = setting(
        1,
        "nodes, on each of which this command runs, with MASTER_ADDR and NODE_RANK set, or started by torchrun or srun",
        group="machine",
        type=positive,
    )
    join_minutes: float = setting(
        10.0, "how long the processes of a run wait for each other to come", group="machine", type=above_zero
    )
    stall_minutes: float = setting(
        30.0,
        "end a run in which no step, validation batch or save has ended for so long; 0: never",
        group="machine",
        type=not_negative,
    )
    strategy: str = setting("deepspeed_stage_1", "how memory is shared", group="machine", choices=STRATEGIES)
    precision: str = setting("bf16", "weights and activations", group="machine", choices=("bf16", "fp32"))
    chunk_ctx: int = setting(
        0,
        "with --train_type infctx: tokens a segment (default 512); taken and not used with another",
        group="machine",
        unset=True,
        type=positive,
    )
    bptt_segments: int = setting(
        0,
        "with --train_type infctx: the gradient of the states stops at every so many segments; 0: it goes back to the "
        "row's first token",
        group="machine",
        type=count,
    )
    grad_cp: bool = setting(
        False, "recompute blocks in the backward pass, to save memory", group="machine", type=switch, metavar="0|1"
    )
    compile: bool = setting(
        False,
        "have torch.compile fuse what each block does between its products and kernels; the first steps take a minute "
        "or more, and stage 3 does not allow it",
        group="machine",
        action="store_true",
    )
    cuda_graphs: bool = setting(
        False,
        "on a GPU, record the launches of all blocks, forward and backward, in the first step and replay them: for "
        "small micro batches, whose launches take longer than they do; documents of --dataload pad and only are padded "
        "on to a quarter, half, three quarters or all of --ctx_len, pairs to such parts of what two answers may take, "
        "packed rows to all of it, these with a graph for each power of 2 of documents that they hold; "
        "not with stage 3, offload, --grad_cp, --compile and infctx",
        group="machine",
        type=switch,
        metavar="0|1",
    )

    @property
    def stage(self) -> int:
        """ZeRO's stage."""
        return int(self.strategy.split("_")[2])

    @property
    def offload(self) -> bool:
        """Whether the optimizer lives in main memory."""
        return self.strategy.endswith("offload")


@dataclass(frozen=True)
class RunConfig:
    """All settings of one training run."""

    model: ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    train: TrainConfig


def to_json(config: RunConfig | AdapterConfig) -> str:
    """A config dataclass as stable JSON text, for config.json."""
    return json.dumps(asdict(config), sort_keys=True, indent=2)
