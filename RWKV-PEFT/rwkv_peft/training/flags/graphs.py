"""Refuse flags that --cuda_graphs does not go with, before there is a model."""

from collections.abc import Iterator

from ...config import TrainConfig


def check_graphs(train: TrainConfig) -> Iterator[str]:
    """Yield refusals of flags with which a step cannot be recorded and replayed."""
    if not train.cuda_graphs:
        return
    zero = f"--strategy {train.strategy}"
    for contradicts, flag, why in (
        (train.stage == 3, zero, "stage 3 gathers and frees the weights, which have to stay where they are"),
        (train.offload, zero, "a step waits for the optimizer in main memory, not for launches"),
        (train.grad_cp, "--grad_cp 1", "a graph keeps what backward needs"),
        (train.compile, "--compile", "both take the blocks"),
        (train.chunk_ctx > 0, f"--chunk_ctx {train.chunk_ctx}", "segments hand states on, and a graph takes none"),
    ):
        if contradicts:
            yield f"--cuda_graphs 1 does not go with {flag}: {why}; leave one of them out"
