"""The settings of a run as frozen dataclasses, made once from the command line."""

import json
from dataclasses import asdict, dataclass, field

ADAPTER_METHODS = ("bone", "lora", "pissa", "none")
BONE_MODES = ("bone", "bone-mini", "bat-in", "bat-out")
TARGETS = ("att.receptance", "att.key", "att.value", "att.gate", "att.output",
           "ffn.key", "ffn.receptance", "ffn.value")
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

    method is one of ADAPTER_METHODS; mode one of BONE_MODES (Bone alone); rank is the block
    size r (Bone) or the inner width (LoRA); targets are module-name suffixes such as
    "att.key"; train_parts are groups of base parameters that train in full; load is an
    adapter file to start from, or "".
    """

    method: str = "bone"
    mode: str = "bat-in"
    rank: int = 64
    mini_rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    train_parts: tuple[str, ...] = ()
    load: str = ""


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in which order.

    path is the prefix of a .bin/.idx pair; dataload "get" (windows of ctx_len from the token
    stream), "pad" (one document a row) or "only" (one document, alone); loss_mask "none",
    "pad", "qa" or "file"; mask_id are the token ids that open an answer (loss_mask "qa").
    """

    path: str
    data_type: str = "binidx"
    ctx_len: int = 1024
    dataload: str = "get"
    loss_mask: str = "none"
    mask_id: tuple[int, ...] = ()
    micro_bsz: int = 1
    seed: int = 42
    num_workers: int = 1


def to_json(config):
    """A config dataclass as stable JSON text, for metadata and config.json."""
    return json.dumps(asdict(config), sort_keys=True)
