"""Find what a run reads: the samples that it trains on, and those whose loss it measures."""

from dataclasses import replace
from os.path import realpath

from ..config import RunConfig
from ..data.folders import held_out_split
from ..data.mask_kinds import default_mask
from ..data.recorded import recorded_beside, remarks, require_same
from ..data.rows import parse_split
from ..data.samples import Samples
from ..data.sources import build_samples, split_samples
from .measuring.validate import RETAINED, VALIDATION


def find_samples(config: RunConfig) -> tuple[Samples, dict[str, Samples]]:
    """Find (training samples, {VALIDATION and RETAINED, if flags name them: samples whose loss is measured}). Notes on
    all join those of the training samples. Raises UserError if their tokenizers differ."""
    data, train, vocab_size = config.data, config.train, config.model.vocab_size
    measured: dict[str, Samples] = {}
    # --sft_split's range of rows is only for the training data; its name also chooses the split of other folders
    whole = replace(data, sft_split=parse_split(data.sft_split)[0])
    if train.val_split:
        samples, measured[VALIDATION] = split_samples(data, vocab_size, train.val_split, train.val_seed)
    else:
        samples = build_samples(data, vocab_size)
    if train.val_data:
        split = held_out_split(train.val_data) if data.of_rows else ""
        other = replace(whole, path=train.val_data, sft_split=split or whole.sft_split)
        measured[VALIDATION] = held_out = build_samples(other, vocab_size)
        require_same(samples.vocabulary, data.path, held_out.vocabulary, f"--val_data {train.val_data}")
        named = f"{train.val_data}, split {split}" if split else train.val_data
        samples.notes.append(f"validation on {len(held_out):,} samples of {named}: {held_out.notes[0]}")
        if realpath(data.path) == realpath(train.val_data) and other.sft_split == whole.sft_split:
            samples.notes.append(
                f"note: --val_data {named} is the training data, so that its loss says nothing about other text; "
                "--val_split 0.01 keeps samples back for validation"
            )
    if train.retain_data:
        other = replace(whole, path=train.retain_data)
        if data.loss_mask == "file" and not data.of_rows:  # data to retain may have no .mask file
            other = replace(other, loss_mask=default_mask(other.path))
        measured[RETAINED] = kept = build_samples(other, vocab_size)
        require_same(samples.vocabulary, data.path, kept.vocabulary, f"--retain_data {train.retain_data}")
        samples.notes.append(f"forgetting is measured on {len(kept):,} samples of {other.path}: {kept.notes[0]}")
    for flag, path, name in (
        ("--val_data", train.val_data, VALIDATION),
        ("--retain_data", train.retain_data, RETAINED),
    ):
        if path:
            samples.notes += [f"{flag} {path}: {note}" for note in measured[name].row_notes]
    samples.notes += remarks(samples.vocabulary, recorded_beside(train.load_model), vocab_size)
    return samples, measured
