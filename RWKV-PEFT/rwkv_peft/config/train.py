"""Settings of training, and of the files that a run writes."""

from dataclasses import dataclass

from ..cli.parser import above_zero, count, not_negative, positive, seed, switch
from .optimizer import OptimizerConfig
from .setting import setting
from .validation import ValidationConfig

STRATEGIES = tuple(f"deepspeed_stage_{stage}" for stage in ("1", "2", "2_offload", "3", "3_offload"))
BUCKET = 200_000_000  # the most elements of a bucket in which ranks exchange gradients
CHUNK_CTX = 512  # tokens of a segment
# steps that a few rows are read for, the most times, and the fewest steps all the same; docs/guides/learning-rates.md
AIM, MOST_EPOCHS, FEW = 200, 15, 50


@dataclass(frozen=True)
class ModelSettings:
    """The model to begin with."""

    load_model: str = setting(
        "",
        "base checkpoint; dimensions are read from it. Empty: a new model from --n_layer, --n_embd, --vocab_size "
        "(needs --peft none)",
        metavar="PTH",
    )


@dataclass(frozen=True)
class RunSettings:
    """The length of a run, and its files. epochs_chosen: epoch_count is to be chosen, because no flag sets it."""

    proj_dir: str = setting("out", "folder that the run writes to", metavar="DIR")
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
        f"epochs; the run ends after them (default 1; of rows up to {MOST_EPOCHS}, as many as make some "
        f"{AIM} steps, or more if these are fewer than {FEW})",
        unset=True,
        type=positive,
    )
    epochs_chosen: bool = setting(False)
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
        "and steps that are skipped if a gradient overflows; fp32: twice the memory, for comparisons",
        choices=("bf16", "fp16", "fp32"),
    )
    chunk_ctx: int = setting(
        0,
        "with --train_type infctx: tokens of a segment (default 512); accepted and not used with other types",
        unset=True,
        type=positive,
    )
    bptt_segments: int = setting(
        0,
        "stop the gradient of the states at every so many segments; 0: it goes back to the row's first token",
        type=count,
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
