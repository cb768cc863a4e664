"""That a run leaves what it reads as it is."""

import os
from pathlib import Path

from ..config import AdapterConfig, DataConfig, TrainConfig
from ..errors import UserError
from ..names import METRICS
from .checkpoints import ANSWERS, LM_EVAL, TRAINED


def check_overwriting(adapter: AdapterConfig, data: DataConfig, train: TrainConfig) -> None:
    """Refuse a file to read that has, in --proj_dir, a name under which runs write: at a save it would be replaced, and
    what is merged into it then would be merged twice; a run that begins anew would clear it away."""
    folder = Path(train.proj_dir)
    models = (train.load_model, train.state_load, adapter.load, adapter.init)
    rows = (data.path, train.val_data, train.retain_data, train.eval_data)
    sources = {os.path.realpath(path): path for path in (*models, *rows) if path}
    for file in folder.iterdir() if folder.is_dir() else ():
        written = TRAINED.fullmatch(file.name) or file.name in (METRICS, ANSWERS, LM_EVAL)
        if written and (source := sources.get(os.path.realpath(file))):
            raise UserError(
                f"{source} is to be read, and --proj_dir {folder} is where this run writes its own {file.name}; move "
                "it elsewhere, or name another folder"
            )
