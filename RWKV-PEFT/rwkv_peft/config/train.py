"""Settings of training: its optimizer, learning rate and schedules, validation, and the files of a run."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from ..cli.parser import above_zero, alias, below_one, count, not_negative, positive, rate, seed, stop_text, switch
from ..cli.tables import OPTIMS, TASKS
from .setting import setting

WSD_DECAY = 0.1  # the share of the run that warmup-stable-decay spends on its final descent


@dataclass(frozen=True)
class Run:
    """The settings of a schedule: total steps, warm-up steps, and the learning rates --lr_init and --lr_final."""

    total_steps: int
    warmup_steps: int
    lr_init: float
    lr_final: float

    def after_warm_up(self, step: int) -> float:
        """The progress from the last step of warm-up to the last of the run."""
        return self.progress(step, self.warmup_steps, self.total_steps - 1)

    def progress(self, step: int, start: int, end: int) -> float:
        """The progress at a step: 0 up to step `start`, 1 from step `end` on, and linear between them."""
        return min(1.0, max(0.0, (step - start) / max(1, end - start)))

    def line(self, progress: float) -> float:
        return self.lr_init + (self.lr_final - self.lr_init) * progress

    def half_wave(self, progress: float) -> float:
        return self.lr_final + (self.lr_init - self.lr_final) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(run: Run, step: int) -> float:
    start = max(run.warmup_steps, run.total_steps - math.ceil(run.total_steps * WSD_DECAY))
    return run.line(run.progress(step, start, run.total_steps - 1))


def exp(run: Run, step: int) -> float:
    """RWKV-LM's schedule without --my_exit_tokens: exponential, or linear if one of the rates is 0."""
    progress = run.progress(step, run.warmup_steps - 1, run.total_steps - 1)
    if run.lr_init == 0 or run.lr_final == 0:
        return run.line(progress)
    return run.lr_init * (run.lr_final / run.lr_init) ** progress


def from_the_first(run: Run, step: int) -> float:
    """The share of the rate in a warm-up of W steps: 1 / W at the first step, 1 at the last."""
    return (step + 1) / run.warmup_steps


def from_a_hundredth(run: Run, step: int) -> float:
    """The share of the rate in RWKV-LM's warm-up: 0.01 at its first step, 1 at the first step after it."""
    return 0.01 + 0.99 * step / run.warmup_steps


class Schedule(NamedTuple):
    """A value of --lr_schedule: its formula in --help, the rate after warm-up, and the share of it during warm-up."""

    formula: str
    rate: Callable[[Run, int], float]
    warm_up: Callable[[Run, int], float] = from_the_first


# formulas give the rate at step s = 0 … S - 1 of a run of S steps, W of them warm-up, from a = lr_init to z = lr_final;
# clip keeps a number within 0 and 1, and W = 0 is no warm-up
SCHEDULES = MappingProxyType(
    {
        "cosine": Schedule(
            "min(1, (s + 1) / W) * (z + (a - z) * (1 + cos(pi * clip((s - W) / (S - 1 - W)))) / 2)",
            lambda run, step: run.half_wave(run.after_warm_up(step)),
        ),
        "linear": Schedule(
            "min(1, (s + 1) / W) * (a + (z - a) * clip((s - W) / (S - 1 - W)))",
            lambda run, step: run.line(run.after_warm_up(step)),
        ),
        "constant": Schedule("min(1, (s + 1) / W) * a", lambda run, step: run.lr_init),
        "wsd": Schedule(
            "min(1, (s + 1) / W) * (a + (z - a) * clip((s - D) / (S - 1 - D))), D = max(W, S - ceil(S / 10))", wsd
        ),
        "exp": Schedule(
            "min(1, 0.01 + 0.99 * s / W) * a * (z / a) ** clip((s - W + 1) / (S - W))", exp, from_a_hundredth
        ),
        # RWKV-LM's with --my_exit_tokens, and RWKV-PEFT's cos_decay, would reach lr_final one step after the run
        "rwkv-lm": Schedule(
            "min(1, 0.01 + 0.99 * s / W) * (z + (a - z) * (1 + cos(pi * clip((s - W) / (S - W)))) / 2)",
            lambda run, step: run.half_wave(run.progress(step, run.warmup_steps, run.total_steps)),
            from_a_hundredth,
        ),
        "rwkv-peft": Schedule(
            "z + (a - z) * (1 + cos(pi * s / S)) / 2",
            lambda run, step: run.half_wave(run.progress(step, 0, run.total_steps)),
            lambda run, step: 1.0,
        ),
    }
)


def learning_rate(
    step: int, *, total_steps: int, lr_init: float, lr_final: float, warmup_steps: int = 0, schedule: str = "cosine"
) -> float:
    """The learning rate of optimizer step `step` (0-based) of `total_steps`, by the formula in SCHEDULES.

    Sources of other projects' schedules: RWKV-LM's RWKV-v5/src/trainer.py (exp, rwkv-lm), RWKV-PEFT's
    rwkvt/trick/lrs.py (rwkv-peft).
    """
    run = Run(total_steps, warmup_steps, lr_init, lr_final)
    _, rate, warm_up = SCHEDULES[schedule]
    share = warm_up(run, step) if step < warmup_steps else 1.0
    return rate(run, step) * share


SCHEDULE_ALIASES = (("cos_decay", "rwkv-peft"), ("cos", "cosine"))
# learning rates of time states, beside other tensors and alone; docs/benchmarks/training.md and guides/states.md have
# the measurements
STATE_LR, STATE_LR_ALONE = 1e-2, 0.3


@dataclass(frozen=True)
class OptimizerConfig:
    """The settings of the optimizer. Rates are per step; lr_chosen names those that are left to be chosen."""

    lr_init: float = setting(
        2e-5,
        f"learning rate after warm-up (default: auto); auto: chosen by the method, its rank, the model's width and the "
        f"objective, {STATE_LR_ALONE:g} if only states train (docs/guides/learning-rates.md)",
        unset=True,
        type=rate,
    )
    lr_final: float = setting(
        2e-5,
        f"learning rate at the end (default: a tenth of an automatic --lr_init, else 2e-5; if only states train, "
        f"{STATE_LR:g}; at most --lr_init)",
        unset=True,
        type=not_negative,
    )
    lr_chosen: tuple[str, ...] = setting(())
    state_lr: float = setting(
        STATE_LR,
        "learning rate of --train_parts state if other tensors train, too, with --lr_init; it follows the same "
        f"schedule (default {STATE_LR:g})",
        unset=True,
        type=not_negative,
    )
    optim: str = setting(
        "adamw",
        "optimizer. adamw: the usual one; adamw8bit: AdamW with moments of 8 bits, 6 bytes in place of 12 for each "
        "number that trains; muon: updates of matrices with all singular values alike, 8 bytes for each of their "
        "numbers, at AdamW's rate or a higher one, AdamW for what is no matrix of a block. adamw8bit takes a "
        "package of the extra optim (sh scripts/setup.sh optim)",
        type=alias((("none", "adamw"),)),
        choices=("adamw", *OPTIMS),
    )
    lr_schedule: str = setting(
        "cosine",
        "schedule of the learning rate from a = lr_init to z = lr_final, at step s = 0 … S - 1, W of them warm-up: "
        + "; ".join(f"{name}: {schedule.formula}" for name, schedule in SCHEDULES.items())
        + ". exp is RWKV-LM's schedule, and rwkv-lm that of its --my_exit_tokens; rwkv-peft is RWKV-PEFT's cos_decay, "
        "which has no warm-up; RWKV-PEFT's wsd is not this one, but our cosine to a z of 0 (default cosine; with "
        "--my_exit_tokens and --magic_prime rwkv-lm)",
        unset=True,
        type=alias(SCHEDULE_ALIASES),
        choices=tuple(SCHEDULES),
    )
    warmup_steps: int = setting(0, "steps of linear warm-up, as --lr_schedule says (default 0)", type=count)
    beta1: float = setting(0.9, "Adam", type=below_one)
    beta2: float = setting(0.99, "Adam", type=below_one)
    adam_eps: float = setting(1e-8, "Adam", type=above_zero)
    weight_decay: float = setting(0.0, "on matrices only (default 0)", type=not_negative)
    layerwise_lr: bool = setting(
        True,
        "RWKV-LM's rules for the model's own parameters: the decay (time_decay, RWKV-7: w0) learns at twice the rate, "
        "and --weight_decay leaves out w1, w2 and the mixes' other parameters. 0: one rate for all, and weight decay "
        "on every matrix, as 0 does in RWKV-LM for RWKV-6",
        type=switch,
    )
    gradient_clip_val: float = setting(1.0, "largest gradient norm; 0: any", type=not_negative)
    accumulate_grad_batches: int = setting(
        1,
        "forward passes of a step; with --resume they follow from the samples that a step of the run has; for hundreds "
        "of them with --precision bf16 take stage 2, which adds their gradients up in float32",
        type=positive,
    )


@dataclass(frozen=True)
class ValidationConfig:
    """Validation runs on val_data and more_val, or on the share val_split of the data, and retain_data is measured with
    it; eval_data holds questions that the model answers, as answer_rows rows of the data."""

    val_data: str = setting(
        "",
        "data to validate on, read like --data_file; of several the loss of each is told, too",
        nargs="+",
        metavar="PREFIX",
    )
    more_val: tuple[str, ...] = setting(())
    val_split: float = setting(
        0.0, "keep this share of the data, such as 0.01, for validation", type=below_one, metavar="SHARE"
    )
    val_seed: int | None = setting(
        None,
        "seed that draws the samples of --val_split, so that runs with different seeds validate on the same (default: "
        "--random_seed)",
        type=count,
    )
    val_every: int = setting(
        0, "validate after every so many steps, and after the last; 0: after every epoch", type=count
    )
    early_stop: int = setting(0, "end after so many validations without a lower loss; 0: never", type=count)
    retain_data: str = setting(
        "",
        "data whose loss measures what the run forgets, read like --data_file; measured before the first step and "
        "with each validation (even without --val_data); the run does not depend on it",
        metavar="PREFIX",
    )
    forget_at_most: float | None = setting(
        None,
        "the most nats a token that --retain_data may lose; if it loses more, what was trained is scaled back after "
        "the last step, along the line from the run's start, to the largest scale that holds (default: any)",
        type=not_negative,
        metavar="NATS",
    )
    answer_rows: int = setting(
        4,
        "answer so many rows of the data, and as many held-out ones, before the first step and after the last, and "
        "show both beside the rows' own answers (rows.jsonl in --proj_dir); 0: none",
        type=count,
    )
    eval_data: str = setting(
        "",
        "also score answers during training: rows of questions as rwkv-peft eval takes them; questions, answers and "
        "scores are written to answers.jsonl in --proj_dir",
        metavar="FILE",
    )
    eval_task: str = setting("jsonl", "their task, as in rwkv-peft eval", choices=tuple(TASKS), metavar="TASK")
    eval_every: int = setting(
        0,
        "ask the questions of --eval_data after every so many steps, and at the end; 0: after every epoch",
        type=count,
    )
    eval_limit: int = setting(100, "ask the first so many of them; 0: all", type=count)
    eval_template: str = setting("", "template of a question, as --template of rwkv-peft eval", metavar="NAME")
    eval_max_tokens: int = setting(256, "the most tokens of an answer", type=positive)
    eval_stop: tuple[str, ...] = setting(
        (),
        "texts that end an answer, in addition to the template's own, also to rows (--answer_rows); \\n and \\t are "
        "newline and tab",
        type=stop_text,
        metavar="TEXT",
    )
    eval_batch: int = setting(16, "answers written or scored at once, on each device", type=positive)


STRATEGIES = tuple(f"deepspeed_stage_{stage}" for stage in ("1", "2", "2_offload", "3", "3_offload"))
BUCKET = 200_000_000  # the most elements of a bucket in which ranks exchange gradients
CHUNK_CTX = 512  # tokens of a segment
# steps that a few rows are read for, by which both generations learned 20, 100 and 1,000 chats, with their ends; those
# of any other objective; and a number of steps that is few to learn from (docs/guides/learning-rates.md)
AIM, AIM_OF_OTHERS, FEW = 400, 200, 50


@dataclass(frozen=True)
class ModelSettings:
    """The model to begin with."""

    load_model: str = setting(
        "",
        "base: a .pth, or the folder of a Hugging Face model; dimensions are read from it. Empty: a new model from "
        "--n_layer, --n_embd, --vocab_size (needs --peft none)",
        aliases=("model",),
        metavar="MODEL",
    )


@dataclass(frozen=True)
class RunSettings:
    """The length of a run, and its files. epochs_chosen, rows_chosen: epoch_count and micro_bsz are to be chosen,
    because no flag sets them."""

    proj_dir: str = setting("out", "folder that the run writes to", aliases=("output",), metavar="DIR")
    resume: str = setting(
        "",
        "continue the run in --proj_dir exactly where it stopped, on the same data, on these or other devices; auto: "
        "or begin it if there is no checkpoint yet, for a command that is run again and again",
        nargs="?",
        const="must",
        choices=("must", "auto"),
        metavar="auto",
    )
    fresh_optimizer: bool = setting(
        False,
        "keep weights and place in the data, start the optimizer anew; for another precision, or for steps of another "
        "number of samples",
    )
    show_samples: int = setting(
        0,
        "print the first N samples as the run reads them, with the tokens that count in the loss marked and <end> for "
        "the end token, and train nothing",
        type=count,
    )
    epoch_steps: int = setting(
        0, "optimizer steps of an epoch; 0: one pass over the data, rounded up to whole steps", type=count
    )
    epoch_count: int = setting(
        1,
        f"epochs; the run ends after them (default 1; of rows as many as make {AIM} steps, "
        f"{AIM_OF_OTHERS} of pairs, labels and prompts, and with a teacher)",
        unset=True,
        type=positive,
    )
    epochs_chosen: bool = setting(False)
    rows_chosen: bool = setting(False)
    epoch_begin: int = setting(
        0, "number of the first epoch: the schedule and the data start there (with --bone_load)", type=count
    )
    epoch_save: int = setting(
        1,
        "save every so many epochs; 0: only at the end (default 1; 0 if the number of epochs is chosen automatically)",
        unset=True,
        type=count,
    )
    save_every: int = setting(
        0, "also save every so many optimizer steps, as at the end of an epoch; 0: only at epochs", type=count
    )
    save_minutes: float = setting(
        0.0,
        "also save when so many minutes have passed since the last save, at the end of a step; 0: never",
        type=not_negative,
    )
    keep_checkpoints: int | None = setting(
        None,
        "keep the newest so many checkpoints, and the files of the newest so many epochs; 0: all (default: 2 "
        "checkpoints, and the files of all epochs)",
        type=count,
    )
    save_dtype: str = setting(
        "keep",
        "dtype of rwkv.pth (--peft none) and of --merge_on_save's models: keep is that of the base, or for a new model "
        "--precision",
        choices=("keep", "bf16", "fp16", "fp32"),
    )
    merge_on_save: bool = setting(
        False,
        "also write the merged model whenever the adapter is saved: merged.pth, and one of each epoch that is saved "
        "(--epoch_save, --keep_checkpoints)",
    )
    random_seed: int = setting(
        42, "seed of initialization, dropout and data order; -1: draw one and print it", type=seed
    )
    wandb: str = setting(
        "",
        "also log to this Weights & Biases project (after `wandb login`, or with WANDB_MODE=offline)",
        metavar="PROJECT",
    )
    trackio: str = setting(
        "",
        "also log to this trackio project, on this machine (`trackio show`), or in the Space of TRACKIO_SPACE_ID",
        metavar="PROJECT",
    )
    swanlab: str = setting(
        "", "also log to this SwanLab project (after `swanlab login`, or with SWANLAB_MODE=offline)", metavar="PROJECT"
    )
    state_load: str = setting(
        "",
        "time states that --train_parts state starts from: a .pth, a .st, or a run that tuned only states",
        aliases=("state",),
        metavar="FILE",
    )


@dataclass(frozen=True)
class MachineSettings:
    """The machine that computes a step, and its ways."""

    accelerator: str = setting("auto", "train on this device", choices=("auto", "cpu", "gpu"))
    devices: int = setting(1, "GPUs, or CPU processes, of each node", type=positive)
    num_nodes: int = setting(
        1,
        "nodes; this command runs on each, with MASTER_ADDR and NODE_RANK set, or started by torchrun or srun; under "
        "torchrun, whose ranks are those that it started, this and --devices only say how many samples a step has",
        type=positive,
    )
    join_minutes: float = setting(10.0, "end a run whose nodes have not met after so many minutes", type=above_zero)
    timeout_minutes: float = setting(
        60.0,
        "end a run in which a rank has waited so many minutes for another; longer than the largest save takes",
        type=above_zero,
    )
    context_parallel: int = setting(
        1,
        "ranks that share each row: each computes a part of its time and hands the states on, for rows that are too "
        "long for one device; --devices times --num_nodes is a multiple of it",
        type=positive,
    )
    strategy: str = setting("deepspeed_stage_1", "ZeRO stage, by which devices share memory", choices=STRATEGIES)
    precision: str = setting(
        "bf16",
        "dtype of weights and activations. bf16: on most machines, with products in float32 on CPUs that multiply it "
        "slowly; fp16: for GPUs below compute capability 8.0, which multiply bf16 slowly, with a loss that is scaled, "
        "and steps that are skipped if a gradient overflows, chosen there unless the run cannot take it; fp32: twice "
        "the memory, for comparisons",
        choices=("bf16", "fp16", "fp32"),
    )
    chunk_ctx: int = setting(
        0,
        "with --train_type infctx: tokens of a segment (default 512); accepted and not used with other types",
        unset=True,
        type=positive,
    )
    grad_cp: bool = setting(False, "recompute blocks in the backward pass, to save memory", type=switch)
    share_prompts: bool | None = setting(
        None,
        "pairs and labels: compute a prompt once for both answers, which go on from its state (1), or each answer with "
        "its prompt (0) (default: 1 if that saves so many tokens of a micro batch in the mean that they are worth a "
        "further pass, which is 64, and on a GPU 4,096)",
        type=switch,
    )
    compile: bool = setting(
        False,
        "let torch.compile fuse each block's operations between its products and kernels; the first steps take a "
        "minute or more",
    )


@dataclass(frozen=True)
class TrainConfig(MachineSettings, RunSettings, ModelSettings, ValidationConfig, OptimizerConfig):
    """The settings of training, each base a group of --help.

    A step is one optimizer step of groups x micro_bsz x accumulate_grad_batches samples; an epoch is epoch_steps of
    them, and epoch_save counts epochs. Rows are computed in segments of chunk_ctx tokens if that is not 0.
    """

    def rate_at(self, step: int, total_steps: int) -> float:
        """The base learning rate of optimizer step `step` (0-based) of total_steps."""
        return learning_rate(
            step,
            total_steps=total_steps,
            lr_init=self.lr_init,
            lr_final=self.lr_final,
            warmup_steps=self.warmup_steps,
            schedule=self.lr_schedule,
        )

    @property
    def ranks(self) -> int:
        """The processes of the run."""
        return self.devices * self.num_nodes

    @property
    def groups(self) -> int:
        """The groups of ranks, each with rows of its own."""
        return self.ranks // self.context_parallel

    @property
    def stage(self) -> int:
        """ZeRO's stage."""
        return int(self.strategy.split("_")[2])

    @property
    def offload(self) -> bool:
        """True if the optimizer is in main memory."""
        return self.strategy.endswith("offload")

    @property
    def uses_zero(self) -> bool:
        """True if DeepSpeed's ZeRO moves the weights: with several ranks, stage 3, or offload."""
        return self.ranks > 1 or self.stage == 3 or self.offload
