"""Reads an adapter in any format: ours, RWKV-PEFT's or Hugging Face peft's."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..cli.errors import UserError
from ..cli.names import ADAPTER, METRICS, MODEL, all_finite
from .adapter_file import Adapter, check_names, read_own
from .adapter_folders import is_adapter_folder, is_lightning, read_hf_folder, read_lightning
from .best import take
from .rwkv_peft_file import read_rwkv_peft


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's path, and facts that its file may lack (None: unknown).

    For RWKV-PEFT's files mode is the form of Bone, init the path of PiSSA's initial factors, alpha LoRA's alpha. guess
    is a form that is used if mode is None; a file of another form contradicts mode, but not guess. amount multiplies
    the adapter's change.
    """

    path: str | Path
    mode: str | None = None
    init: str | Path | None = None
    alpha: float | None = None
    guess: str | None = None
    amount: float = 1.0

    def read(self, base: Mapping[str, torch.Tensor] | None = None) -> Adapter:
        """Read the Adapter, ours or another tool's (rwkv_peft_file.py, adapter_folders.py).

        base is {key: tensor}; its shapes may decide the form. Raises UserError for a file that is missing, broken, of a
        later format or no adapter; a form that contradicts mode or is ambiguous; init or alpha that contradicts the
        file; a tensor that is empty or holds NaN or Inf.
        """
        path = adapter_of_run(self.path, tell=True)
        if is_lightning(path):
            adapter = read_lightning(path)
        elif path.is_dir():
            adapter = read_hf_folder(path)
        elif path.suffix == ".safetensors":
            adapter = read_own(path)
        else:
            adapter = read_rwkv_peft(path, self.mode or self.guess, base, self.init, self.alpha)
        check_names(path, adapter)
        self._check_facts(path, adapter)
        if self.mode is not None and adapter.modules() and adapter.metadata.variant != self.mode:
            raise UserError(f"{path} is a {adapter.metadata.variant} adapter, not {self.mode}; leave --bone_mode out")
        for key, tensor in adapter.tensors.items():
            if not tensor.numel():
                raise UserError(f"{path}: {key} has shape {tuple(tensor.shape)}, which holds no value; copy it again")
            if not all_finite(tensor):
                raise UserError(
                    f"{path}: {key} holds NaN or Inf: the training that wrote it had diverged; take an earlier one"
                )
        return adapter._replace(amount=self.amount)

    def _check_facts(self, path: Path, adapter: Adapter) -> None:
        """Raise UserError for init beside a file that needs none, and for an alpha that is not the adapter's."""
        metadata, alpha = adapter.metadata, self.alpha
        if self.init is not None and (path.is_dir() or path.suffix == ".safetensors"):
            raise UserError(
                f"--lora_init {self.init} is for RWKV-PEFT's PiSSA files, and {path} lacks nothing of the kind; "
                "leave it out"
            )
        if alpha is not None and adapter.modules() and not math.isclose(alpha, metadata.alpha):
            alpha_words = f" of alpha {metadata.alpha:g}" if metadata.alpha else ", which has no alpha"
            raise UserError(
                f"--lora_alpha {alpha:g} contradicts {path}, a {metadata.variant} adapter{alpha_words}; leave it out"
            )


def adapter_of_run(path: str | Path, tell: bool = False) -> Path:
    """The path of the adapter to take in the folder of a train.py run (best.py); any other path, also a folder of
    Hugging Face peft, unchanged. With `tell` a note is printed if it is not the newest. Raises UserError if the run
    trained the model itself or has saved nothing yet."""
    path = Path(path)
    if not path.is_dir() or is_adapter_folder(path) or is_lightning(path):
        return path
    if (path / ADAPTER).exists():
        return chosen_file(path, ADAPTER, tell)
    if (path / MODEL).exists():
        raise UserError(f"{path} is the folder of a run with --peft none; {path / MODEL} is its model, nothing merges")
    if (path / METRICS).exists():
        raise UserError(
            f"the run in {path} has saved nothing yet; a run saves at the end of an epoch, and with --save_every N "
            "every N steps as well"
        )
    return path


def product_of_run(path: str | Path, tell: bool = False) -> Path:
    """The path of the model or the adapter to take in the folder of a train.py run; any other path unchanged.
    Prints and raises UserError as adapter_of_run does."""
    path = Path(path)
    return chosen_file(path, MODEL, tell) if (path / MODEL).is_file() else adapter_of_run(path, tell)


def chosen_file(folder: Path, name: str, tell: bool) -> Path:
    """The file `name` of a run, or its best; with `tell` print a note on the choice."""
    run_file = take(folder, name)
    if tell and run_file.note:
        print(run_file.note, file=sys.stderr)
    return run_file.path


def read_adapter(path: str | Path, base: Mapping[str, torch.Tensor] | None = None, **facts: Any) -> Adapter:
    """The Adapter at path; facts are AdapterSource's other fields."""
    return AdapterSource(path, **facts).read(base)


def source_of(args: argparse.Namespace, path: str | Path) -> AdapterSource:
    """The AdapterSource of a path and a command's flags."""
    return AdapterSource(path, args.bone_mode, args.lora_init, args.lora_alpha)


def sources_of(args: argparse.Namespace, paths: Sequence[str]) -> list[AdapterSource]:
    """The AdapterSources of the paths of a flag of ScaledFiles, with their scales."""
    return [replace(source_of(args, path), amount=scale) for path, scale in zip(paths, args.scales)]
