"""Write a new model's file, as RWKV-LM's --train_stage 1 does for the stages that train it."""

from collections.abc import Callable
from pathlib import Path

import torch

from ...config import RunConfig
from ...files.atomic import check_output
from ...files.pth_writer import DTYPES
from ...models import family_named
from ..saving.products import model_dtypes, write_model
from .upstream import INIT


def write_new_model(config: RunConfig, say: Callable[..., object]) -> int:
    """Write a new model, initialized by --random_seed, in the dtype of --save_dtype or else --precision. Returns the
    exit code."""
    path = Path(config.train.proj_dir) / INIT
    check_output("--proj_dir", path, [])
    family = family_named(config.model.version)
    torch.manual_seed(config.train.random_seed)
    model = family.build(config.model, False)
    family.init_weights(model)
    tensors = model.to(DTYPES[config.train.precision]).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_model(path, tensors, model_dtypes(config, None))
    say(f"wrote {path}, a new {family.name} of {sum(map(torch.numel, tensors.values())):,} parameters")
    return 0
