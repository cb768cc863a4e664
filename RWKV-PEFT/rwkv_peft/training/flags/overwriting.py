"""Refuse runs that would overwrite a file that they read."""

import os
from collections.abc import Iterator
from pathlib import Path

from ...config import AdapterConfig, DataConfig, Objective, TrainConfig
from ...names import METRICS
from ..saving.checkpoints import ANSWERS, LM_EVAL, TRAINED
from .run_folder import entries_of


def check_overwriting(
    adapter: AdapterConfig, data: DataConfig, train: TrainConfig, objective: Objective
) -> Iterator[str]:
    """Yield a refusal for each file to read that has, in --proj_dir, a name under which runs write. A save would
    replace it, and what was merged into it would then be merged twice; a run that begins anew would delete it."""
    folder = Path(train.proj_dir)
    models = (train.load_model, train.state_load, adapter.load, adapter.init)
    teacher = (objective.teacher, objective.stored, *objective.teacher_adapters, objective.teacher_state)
    rows = (data.path, *data.more, train.val_data, *train.more_val, train.retain_data, train.eval_data)
    sources = {os.path.realpath(path): path for path in (*models, *teacher, *rows) if path}
    for name in (entry.name for entry in entries_of(folder)):
        written = TRAINED.fullmatch(name) or name in (METRICS, ANSWERS, LM_EVAL)
        if written and (source := sources.get(os.path.realpath(folder / name))):
            yield (
                f"{source} is to be read, and --proj_dir {folder} is where this run writes its own {name}; move "
                "it elsewhere, or name another folder"
            )
