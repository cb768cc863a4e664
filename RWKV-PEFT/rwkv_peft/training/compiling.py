"""--compile: torch.compile takes the blocks of a model for the time of a run.

All blocks share their code, and torch compiles it at most 8 times (its recompile_limit), for one block or another,
before it goes on without. Once each is due for the first block, those between, and the last; so that no batch asks for
more, shapes are variables from the start where batches differ in them, and passes that are not of the training go
uncompiled. Still more than 8 are due for infctx, and for base and adapter in turn, as DPO has them; so the limit is
raised for the time of the run.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from ..config import DataConfig
from ..models.parts import LanguageModel

FORMS = 64  # in which the code of blocks is compiled at the most


@contextmanager
def compiled(model: LanguageModel, data: DataConfig) -> Iterator[None]:
    """Compile the blocks of a model at the batches, of DataConfig, that they meet within."""
    varies = data.dataload != "get" or data.data_type == "pairs"  # lengths, and numbers of packed sequences
    for block in model.blocks:
        block.compile(dynamic=varies or None)
    # dynamic would make variables of an adapter's numbers, too, which no autograd Function takes; cache_size_limit is
    # recompile_limit, by the name that torch 2.6 knows
    with torch._dynamo.config.patch(specialize_float=True, cache_size_limit=FORMS):
        yield


def uncompiled(compile: bool) -> AbstractContextManager[object]:
    """Meanwhile blocks run as they are, where the run may `compile` them: for passes without gradients, over shapes of
    all kinds, each of which would be compiled."""
    return torch.compiler.set_stance("force_eager") if compile else nullcontext()
