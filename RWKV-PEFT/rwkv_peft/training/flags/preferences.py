"""Refuse flags that do not go with preference training (--data_type pairs), before there is a model."""

from collections.abc import Iterator

from ...config import AdapterConfig, DataConfig, TrainConfig
from ...names import NONE

OWN = ("dpo_beta", "dpo_nll")  # the flags that nothing else reads


def check_preferences(train: TrainConfig, adapter: AdapterConfig, data: DataConfig) -> Iterator[str]:
    """Yield refusals of flags that do not go with --data_type pairs, or for other data of flags that only pairs
    read."""
    if data.data_type != "pairs":
        for name in OWN:
            if getattr(train, name) != getattr(TrainConfig, name):
                yield (
                    f"--{name} {getattr(train, name):g} belongs to --data_type pairs, and the data is "
                    f"{data.data_type}; add --data_type pairs, or leave --{name} out"
                )
        return
    before = "answers are compared with what the base says of them, and"
    for contradicts, flag, why in (
        (adapter.method == NONE, "--peft none", f"{before} this trains the base itself"),
        (bool(adapter.train_parts), "--train_parts", f"{before} these are parts of it that train"),
        (bool(adapter.load), f"an adapter to start from ({adapter.load})", f"{before} not of it; merge it first"),
        (adapter.method == "lora-ga", "--peft lora-ga", "it begins with the gradient of another loss"),
        (bool(train.lr_chosen), "--lr_init auto", "its rule is for the loss of tokens; give a number, such as 5e-6"),
        (train.chunk_ctx > 0, "--train_type infctx", "an answer's probability is that of all its tokens at once"),
        (data.dataload != "pack", f"--dataload {data.dataload}", "pairs are packed; leave the flag out"),
        (data.loss_mask != "file", f"--loss_mask {data.loss_mask}", "answers alone count; leave the flag out"),
    ):
        if contradicts:
            yield f"--data_type pairs does not go with {flag}: {why}"
