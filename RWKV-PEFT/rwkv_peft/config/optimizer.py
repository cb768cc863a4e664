"""Settings of the optimizer and of its learning rate."""

from dataclasses import dataclass

from ..cli.parser import above_zero, alias, below_one, count, not_negative, positive, rate, switch
from ..cli.tables import OPTIMS
from .schedules import SCHEDULES
from .setting import setting

SCHEDULE_ALIASES = (("cos_decay", "rwkv-peft"), ("cos", "cosine"))
SCHEDULE_FREE = "schedule_free"
STATE_LR = 1e-2  # the learning rate of time states; docs/benchmarks/training.md has the measurement


@dataclass(frozen=True)
class OptimizerConfig:
    """The settings of the optimizer. Rates are per step; lr_chosen names those that are left to be chosen."""

    lr_init: float = setting(
        2e-5,
        f"learning rate after warm-up (default: auto); auto: chosen by the method, its rank, the model's width and the "
        f"objective, {STATE_LR:g} if only states train (docs/guides/learning-rates.md)",
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
        "number that trains; lion: moves each number by the rate, up or down, with one moment (8 bytes), at AdamW's "
        "rate or a lower one; muon: updates of matrices with all singular values alike, 8 bytes for each of their "
        "numbers, at AdamW's rate or a higher one, AdamW for what is no matrix of a block; schedule_free: AdamW that "
        "averages its weights, at a rate that stays, for runs whose end is open. All but adamw and muon take packages "
        "of the extra optim (sh scripts/setup.sh optim)",
        type=alias((("none", "adamw"), ("schedulefree", SCHEDULE_FREE))),
        choices=("adamw", *OPTIMS),
    )
    lr_schedule: str = setting(
        "cosine",
        "schedule of the learning rate from a = lr_init to z = lr_final, at step s = 0 … S - 1, W of them warm-up: "
        + "; ".join(f"{name}: {schedule.formula}" for name, schedule in SCHEDULES.items())
        + ". exp is RWKV-LM's schedule, and rwkv-lm that of its --my_exit_tokens; rwkv-peft is RWKV-PEFT's cos_decay, "
        "which has no warm-up; RWKV-PEFT's wsd is not this one, but our cosine to a z of 0 (default cosine; with "
        "--my_exit_tokens and --magic_prime rwkv-lm, with --optim schedule_free constant)",
        unset=True,
        type=alias(SCHEDULE_ALIASES),
        choices=tuple(SCHEDULES),
    )
    warmup_steps: int = setting(0, "steps of linear warm-up, as --lr_schedule says (default 0)", type=count)
    beta1: float = setting(0.9, "Adam, and Lion", type=below_one)
    beta2: float = setting(0.99, "Adam, and Lion", type=below_one)
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
