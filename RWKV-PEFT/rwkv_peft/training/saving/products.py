"""Write a run's files for others, each for every label (epoch-N, "best", "" for the newest):

adapter-LABEL.safetensors   the trained tensors
rwkv-LABEL.pth              --peft none: the model, with the keys, order and dtypes (or --save_dtype) of its base
merged-LABEL.pth            --merge_on_save: base and adapter, as merge_bone.py merges them
state-LABEL.pth             --train_parts state: the time states alone, as runtimes take them beside a model
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch
from tqdm import tqdm

from ... import __version__
from ...checkpoints.adapter_file import Adapter, AdapterMetadata, Origin, save_adapter
from ...checkpoints.atomic import atomic_write, require_room
from ...checkpoints.base import Base
from ...checkpoints.best import labelled
from ...checkpoints.state_file import write_states
from ...checkpoints.tensors import DTYPES, dtype_name, save_pth, stream_tensors, write_pth
from ...cli.errors import UserError
from ...cli.names import ADAPTER, MERGED, MODEL, STATE, TUNED, all_finite
from ...config import AdapterConfig, DataConfig, RunConfig
from ...data.recorded import recorded_of_data
from ...models import family_named
from ...models.layout import time_state_shapes
from ...models.state import split_time_states
from ...release.merge import Merge, MergeOptions

# bytes a number that trains: a float32 copy, and the moments
OPTIMIZER = MappingProxyType({"adamw": 12, "adamw8bit": 6, "muon": 12})
MATRIX = MappingProxyType({**OPTIMIZER, "muon": 8})  # of the matrices of blocks and adapters
SMALLEST = 2  # least bytes of a number in a model's file


def newest_name(adapter: AdapterConfig) -> str:
    """The name of the file of the newest trained tensors."""
    return MODEL if adapter.whole_model else ADAPTER


def model_dtypes(config: RunConfig, base: Base | None) -> dict[str, torch.dtype]:
    """{key: dtype} of the file of a model that trains whole, in its order.

    They are the base's, or for a new model the official keys in the training's dtype; and the keys of time states that
    train. --save_dtype replaces the dtypes.
    """
    train = config.train
    if base is not None:
        dtypes = {key: tensor.dtype for key, tensor in base.tensors.items()}
    else:
        keys = family_named(config.model.version).shapes(config.model)
        dtypes = dict.fromkeys(keys, DTYPES[train.precision])
    if STATE in config.adapter.train_parts:
        states = time_state_shapes(config.model, config.adapter.state_parts)
        dtypes |= dict.fromkeys(states, dtypes["emb.weight"]) | dtypes
    save_dtype = DTYPES.get(train.save_dtype)
    return {key: save_dtype or dtype for key, dtype in dtypes.items()}


def keeps_all(config: RunConfig, base: Base | None) -> bool:
    """True if the file of a model that trains whole holds every bit of the trained tensors."""
    exact = {torch.float32, DTYPES[config.train.precision]}
    return set(model_dtypes(config, base).values()) <= exact


def data_flags(data: DataConfig) -> str:
    """The flags by which rows became samples, as on a command line."""
    names = "data_type sft_field sft_think think_labels dataload loss_mask mask_id mask_end_id ctx_len".split()
    values = {name: getattr(data, name) for name in names}
    reads_rows = data.of_rows or data.tool_form != DataConfig.tool_form  # or token files record a form
    values |= {"tool_form": data.tool_form if reads_rows else "", "clean_turns": "" if data.clean_turns else "0"}
    words = {name: map(str, value if isinstance(value, tuple) else (value,)) for name, value in values.items() if value}
    return " ".join(f"--{name} {' '.join(word)}" for name, word in words.items())


class RunProducts:
    """Write the products of a run. fingerprint is the base's; base is None for a new model."""

    def __init__(self, folder: Path, config: RunConfig, fingerprint: str, base: Base | None = None) -> None:
        self.folder, self.config, self.base = folder, config, base
        self.fingerprint = fingerprint

    @property
    def newest(self) -> Path:
        """The file of the newest trained tensors."""
        return self.folder / newest_name(self.config.adapter)

    def write(self, tensors: dict[str, torch.Tensor], labels: Sequence[str]) -> None:
        """Write {name: trained tensor} for each label: adapter or model, states, and the merged model."""
        train = self.config.train
        paths = [labelled(self.newest, label) for label in labels]
        # The first path is written; the other labels are further names of the same file.
        if self.config.adapter.whole_model:
            write_model(paths[0], tensors, model_dtypes(self.config, self.base))
        else:
            save_adapter(paths[0], tensors, self.metadata())
        add_names(paths)
        if states := split_time_states(tensors)[1]:
            paths = [labelled(self.folder / TUNED, label) for label in labels]
            write_states(paths[0], states)
            add_names(paths)
        if train.merge_on_save:
            self.write_merged(tensors, [labelled(self.folder / MERGED, label) for label in labels])

    def metadata(self) -> AdapterMetadata:
        """The metadata that the adapter's files hold."""
        config = self.config
        metadata = AdapterMetadata.from_config(
            config.adapter, self.fingerprint, config.train.precision, config.model.version
        )
        return replace(metadata, origin=self.origin)

    @cached_property
    def origin(self) -> Origin:
        """The run's history for people, a part of the metadata."""
        data, train = self.config.data, self.config.train
        recorded = None if data.of_rows else recorded_of_data(data.path)
        tokenizer = Path(data.tokenizer).name if data.of_rows else ""
        if recorded is not None:
            tokenizer = str(recorded._replace(name=Path(recorded.name).name))
        rate = f"{train.lr_init:g}" + f" to {train.lr_final:g}" * (train.lr_final != train.lr_init)
        return Origin(
            base=Path(train.load_model).name,
            tokenizer=tokenizer,
            data=data_flags(data),
            rate=f"{rate}, {train.lr_schedule}",
            versions=f"rwkv_peft {__version__}, torch {torch.__version__}",
        )

    def write_merged(self, tensors: dict[str, torch.Tensor], paths: Sequence[Path]) -> None:
        """Merge once for all paths. A UserError is only printed: merge_bone.py can merge the adapter later."""
        assert self.base is not None  # an adapter has one
        # By the code of merge_bone.py, so that both write the same bytes.
        options = MergeOptions(dtype=DTYPES.get(self.config.train.save_dtype))
        try:
            merge = Merge(self.base, [(self.newest, Adapter(tensors, self.metadata()))], options)
            # Band by band from the mapped base: the merged model is never whole in memory.
            with atomic_write(paths[0]) as temporary:
                write_pth(temporary, merge.specs, merge.bands(stream_tensors(self.base.path)))
            add_names(paths)
        except UserError as error:
            tqdm.write(f"--merge_on_save: {paths[0]} was not written: {error}", file=sys.stderr)


def write_model(path: Path, tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Write {key: tensor} as a .pth in the order and dtypes of `dtypes`. If a value is too large for its dtype, all
    tensors keep the training's dtype, with a message."""
    # float16 ends at 65,504. Infinite weights in a released file would be found only when it answers nonsense.
    too_large = next((key for key, dtype in dtypes.items() if not all_finite(tensors[key].to(dtype))), None)
    if too_large is not None:
        name = dtype_name(dtypes[too_large])
        dtypes = {key: tensors[key].dtype for key in dtypes}
        tqdm.write(f"{path}: {too_large} is too large for {name}; kept in the training's dtype", file=sys.stderr)
    with atomic_write(path) as temporary:
        save_pth(temporary, tensors, dtypes)


def add_names(paths: Sequence[Path]) -> None:
    """Give the first file the other paths as further names: a model of 7B is 14 GB to write."""
    for path in paths[1:]:
        with atomic_write(path) as temporary:
            temporary.unlink()
            share_file(paths[0], temporary)


def share_file(path: Path, copy: Path) -> None:
    """Give a file a second name. It keeps the content when `path` is replaced. A disk without links gets a copy."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copyfile(path, copy)


def optimizer_size(optim: str, trains: int, matrices: int) -> int:
    """(the bytes of an optimizer, those of its state in a checkpoint) if `trains` numbers train by --optim, `matrices`
    of them in matrices."""
    return OPTIMIZER[optim] * (trains - matrices) + MATRIX[optim] * matrices


def require_room_to_save(folder: Path, config: RunConfig, trains: int) -> None:
    """Raise UserError if the disk of a run's folder cannot hold one save, the least that any run leaves."""
    item = DTYPES[config.train.precision].itemsize
    file = (SMALLEST if config.adapter.whole_model else item) * trains
    require_room("--proj_dir", folder, file + optimizer_size(config.train.optim, trains, trains), "a save")
