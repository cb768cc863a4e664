"""The settings of a run as frozen dataclasses, made once from the command line."""

import json
from dataclasses import asdict, dataclass

ADAPTER_METHODS = ("bone", "lora", "lora-plus", "pissa", "olora", "lora-ga", "none")
BONE_MODES = ("bone", "bone-mini", "bat-in", "bat-out")
MODE_ALIASES = (("bat", "bat-in"),)  # RWKV-PEFT's name for it
TARGETS = ("att.receptance", "att.key", "att.value", "att.gate", "att.output", "ffn.key", "ffn.receptance", "ffn.value")
QUANTIZATIONS = ("none", "nf4", "int8")
TRAIN_PARTS = ("time", "ln", "emb", "head")
STRATEGIES = tuple(f"deepspeed_stage_{stage}" for stage in ("1", "2", "2_offload", "3", "3_offload"))


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of an RWKV-6 (x060) model.

    n_layer blocks over n_embd (C) channels; dim_att (A) = heads x head_size attention channels,
    dim_ffn (F) feed-forward channels; maa_rank and decay_rank are the widths of the low-rank
    token-shift and decay projections (32 and 64, or 64 and 128 at C = 4096).
    """

    n_layer: int
    n_embd: int
    vocab_size: int
    dim_att: int
    dim_ffn: int
    head_size: int = 64
    maa_rank: int = 32
    decay_rank: int = 64
    head_size_divisor: int = 8

    @property
    def n_head(self):
        return self.dim_att // self.head_size


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapter replaces which linear layers, and which other parameters train.

    method is one of ADAPTER_METHODS ("none" is full fine-tuning); mode one of BONE_MODES (Bone
    alone); rank is the block size r (Bone) or the inner width (LoRA family); mini_rank the width
    of bone-mini; alpha the LoRA scale times rank (0 means alpha = rank); dropout LoRA's alone;
    svd_niter the power iterations of PiSSA's randomized SVD (0: an exact SVD); lora_plus_ratio
    the learning rate of lora_B over that of lora_A (lora-plus alone); targets are module-name
    suffixes such as "att.key"; train_parts are groups of base parameters that train in full;
    quant is one of QUANTIZATIONS, for the frozen weights under adapters; load is an adapter file
    to start from, or ""; init the file of the factors that a PiSSA of RWKV-PEFT in `load` began
    with, or "".
    """

    method: str = "bone"
    mode: str = "bat-in"
    rank: int = 64
    mini_rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    svd_niter: int = 4
    lora_plus_ratio: float = 16.0
    targets: tuple[str, ...] = TARGETS
    train_parts: tuple[str, ...] = ()
    quant: str = "none"
    load: str = ""
    init: str = ""

    @property
    def variant(self):
        """The adapter's name in ADAPTERS and in metadata; "none" where no adapter is used."""
        if self.method == "bone":
            return self.mode
        return "lora" if self.method == "lora-plus" else self.method

    @property
    def scale(self):
        """What multiplies lora_B lora_A."""
        return self.alpha / self.rank if self.alpha else 1.0


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in which order.

    path is the prefix of a .bin/.idx pair (data_type "binidx"), or rows of questions and answers
    (data_type "sft": .jsonl, .json, .parquet, a datasets folder), which tokenizer turns into tokens;
    sft_field names their fields, sft_split their rows, sft_long ("left" or "skip") what happens to
    rows longer than ctx_len. dataload is "get" (windows of ctx_len from the token stream), "pad" (one
    document a row), "only" (one document, alone) or "pack" (several whole documents a row); loss_mask
    "none", "pad", "qa", "se" or "file"; mask_id are the token ids that open an answer (loss_mask "qa" and
    "se"), mask_end_id those that open the next question ("qa", optional) or close the answer ("se"). seed draws the
    order of the samples; None keeps that of the file.
    """

    path: str
    data_type: str = "binidx"
    ctx_len: int = 1024
    dataload: str = "get"
    loss_mask: str = "none"
    mask_id: tuple[int, ...] = ()
    mask_end_id: tuple[int, ...] = ()
    tokenizer: str = "world"
    sft_field: tuple[str, ...] = ()
    sft_split: str = ""
    sft_long: str = "left"
    micro_bsz: int = 1
    seed: int | None = 42


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains, on what, and where it writes.

    A step is one optimizer step of devices x num_nodes x micro_bsz x accumulate_grad_batches samples; an epoch is
    epoch_steps of them (0: one pass over the data). Learning rates are per step, epoch_save counts epochs. Validation
    runs every val_every steps (0: every epoch) on val_data, or on the share val_split of the data; after early_stop
    of them without a lower loss (0: never) the run ends.
    """

    load_model: str = ""
    proj_dir: str = "out"
    resume: bool = False
    fresh_optimizer: bool = False
    epoch_steps: int = 0
    epoch_count: int = 1
    epoch_begin: int = 0
    epoch_save: int = 1
    lr_init: float = 2e-5
    lr_final: float = 2e-5
    lr_schedule: str = "cosine"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.99
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    layerwise_lr: bool = True
    gradient_clip_val: float = 1.0
    accumulate_grad_batches: int = 1
    grad_cp: bool = False
    random_seed: int = 42
    strategy: str = "deepspeed_stage_1"
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: str = "bf16"
    wandb: str = ""
    val_data: str = ""
    val_split: float = 0.0
    val_every: int = 0
    early_stop: int = 0


@dataclass(frozen=True)
class RunConfig:
    """All settings of one training run."""

    model: ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    train: TrainConfig


def to_json(config):
    """A config dataclass as stable JSON text, for metadata and config.json."""
    return json.dumps(asdict(config), sort_keys=True)
