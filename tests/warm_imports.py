"""Imports what most commands need, and asks about the machine, in the process that warm.py forks."""

import importlib
import os
from contextlib import suppress

# Runs and tests import these themselves; a name that a version lacks is passed over.
IMPORTS = (
    "rwkv_peft.hf",
    "trl.trainer.sft_trainer",
    "datasets",
    "rwkv_peft.training.run",
    "torch.distributed.launcher.api",
    "rwkv_peft.training.saving.loggers",
    "rwkv_peft.training.zero",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "setuptools",  # which deepspeed looks for a compiler with
    "deepspeed.module_inject.auto_ep_layer",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
    "tensorboard.plugins.hparams.api_pb2",
    "tensorboard.plugins.hparams.plugin_data_pb2",
)


def load():
    """Import IMPORTS, and do once what each run would: DeepSpeed looks for compilers, and matplotlib for fonts."""
    for name in IMPORTS:
        with suppress(ImportError):
            importlib.import_module(name)
    import deepspeed
    from matplotlib.figure import Figure

    deepspeed.ops.__compatible_ops__  # noqa: B018 - found when it is asked for
    Figure().subplots().figure.savefig(os.devnull, format="png")


def draw_at_once():
    """Draw pictures without looking for the best place of each part, and without ticks and their labels, which take
    a fourth of a short run; tests/test_plots.py has them."""
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    Figure.set_layout_engine = Axis.draw = lambda *_, **__: None
