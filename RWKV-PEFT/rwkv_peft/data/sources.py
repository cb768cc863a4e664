"""Builds the samples that settings name: their data, sampling and mask."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ..cli.errors import UserError
from ..cli.parser import counted
from ..cli.refusals import require_none
from ..cli.tables import SAMPLINGS
from ..config import DataConfig
from ..config.rules import check_settings
from .answer_samples import ContextSamples, LabelSamples, PairSamples, PromptSamples
from .masks import describe_mask, make_mask, weighted
from .mixture import Joined, Mixture
from .order import Permutation
from .prefix import default_mask
from .recorded import Vocabulary, find_tokenizer, recorded_of_data, require_same, require_within, vocabulary_of
from .samples import DocumentSamples, Samples
from .sft import prepare_sft, settings_of
from .shards import open_dataset
from .stream_samples import StreamSamples

# --data_type -> the samples of data that no --dataload cuts otherwise
OF_TYPES: MappingProxyType[str, type[DocumentSamples]] = MappingProxyType(
    {"pairs": PairSamples, "labels": LabelSamples, "prompts": PromptSamples, "contexts": ContextSamples}
)


def build_samples(config: DataConfig, vocab_size: int) -> Samples:
    """Build the samples that a DataConfig names, over tokens checked to be below the model's vocab_size; their
    `vocabulary` is the Vocabulary that made the tokens, None if it is unknown.

    Data of rows tokenizes config.path first, once (sft.py). Raises UserError for files that are
    missing or damaged, ids or a tokenizer outside the vocabulary, a ctx_len longer than the data, and settings that
    contradict each other.
    """
    require_none(check_settings, config)
    if config.more:
        return mixed({name: build_samples(part, vocab_size) for name, part in parts_of(config).items()}, config)
    notes: list[str] = []
    vocabulary = recorded_of_data(config.path)
    if config.of_rows:
        vocabulary = vocabulary_of(find_tokenizer(config.tokenizer, vocab_size))  # before hours of tokenizing
        if config.stream:
            return streamed(config, vocabulary)
        prefix, notes = prepare_sft(config)
        config = replace(config, path=prefix)
    dataset = open_dataset(config.path)
    require_within(vocabulary, config.path, vocab_size)
    dataset.check_vocab(vocab_size)
    if config.of_rows and config.loss_mask == "file" and dataset.mask is None:
        mask = None  # every token of these rows counts
    else:
        mask = make_mask(dataset, config)
    mask = weighted(mask, dataset)
    sampling = OF_TYPES.get(config.data_type) or SAMPLINGS[config.dataload]
    samples: Samples = sampling(dataset, config.ctx_len, config.seed, mask)
    samples.bucket(config.buckets)
    samples.vocabulary = vocabulary
    counts = [] if config.of_prompts else [describe_mask(dataset, config)]
    if dataset.weights is not None:
        counts.append(
            f"rows weigh {dataset.weights.min():g} to {dataset.weights.max():g}; the loss is the mean by weight"
        )
    samples.notes, samples.row_notes = [*counts, *notes, *samples.notes], notes
    require_counted(samples, config)
    return samples


def find_data(config: DataConfig) -> None:
    """Raise UserError if one of the files that a DataConfig names is not there, or is of another kind."""
    for part in parts_of(config).values():
        if part.of_rows:
            settings_of(part)
        else:
            open_dataset(part.path)


def streamed(config: DataConfig, vocabulary: Vocabulary) -> Samples:
    """The samples of rows that are tokenized as they are read (--stream)."""
    samples = StreamSamples(config, settings_of(config))
    samples.bucket(config.buckets)
    samples.vocabulary = vocabulary
    require_counted(samples, config)
    return samples


def split_samples(
    config: DataConfig, vocab_size: int, fraction: float, seed: int | None = None
) -> tuple[Samples, Samples]:
    """Split the samples of build_samples -> (training samples, validation samples); `fraction` of them validate, drawn
    by `seed`, or if it is None by the seed of the order.

    The two share no sample; with dataload "get" a document on the edge of a window may lie in both.
    """
    if config.more:
        parts = parts_of(config)
        halves = {name: split_samples(part, vocab_size, fraction, seed) for name, part in parts.items()}
        train, held_out = ({name: pair[half] for name, pair in halves.items()} for half in (0, 1))
        return mixed(train, config), Joined(held_out)
    samples = build_samples(config, vocab_size)
    count = max(1, round(fraction * len(samples)))
    if not 0 < fraction < 1 or count >= len(samples):
        raise UserError(
            f"--val_split {fraction}: leaves {len(samples) - count} of {config.path}'s "
            f"{counted(len(samples), 'sample')} to train on; "
            "it is a fraction such as 0.01, and both parts need a sample"
        )
    drawn = Permutation(len(samples), config.seed if seed is None else seed, "validation")
    validation = np.sort(np.fromiter((drawn[i] for i in range(count)), dtype=np.int64, count=count))
    training = np.setdiff1d(np.arange(len(samples)), validation, assume_unique=True)
    kept, held = samples.subset(training), samples.subset(validation)
    require_counted(kept, config)
    require_counted(held, config)
    kept.notes.append(f"{len(validation)} of {len(samples)} samples are kept for validation")
    return kept, held


def parts_of(config: DataConfig, flag: str = "--data_file") -> dict[str, DataConfig]:
    """The settings of each data file that a flag names, by the file's name, or its whole path if names are alike. Token
    files without a .mask count every token, even beside others that have one."""
    paths = (config.path, *config.more)
    names = [Path(path).name for path in paths]
    found = {}
    for name, path in zip(names, paths):
        masked = config.loss_mask == "file" and not config.of_rows
        mask = default_mask(path) if masked else config.loss_mask
        key = name if names.count(name) == 1 else path
        if key in found:
            raise UserError(
                f"{flag} {path} is given twice; leave one out (of --data_file, give its share to the other)"
            )
        found[key] = replace(config, path=path, more=(), mix=(), loss_mask=mask)
    return found


def mixed(sources: Mapping[str, Samples], config: DataConfig) -> Mixture:
    """Mix samples of several data files by --data_mix. Raises UserError if they were made with different tokenizers."""
    first, *others = sources.items()
    for name, other in others:
        require_same(first[1].vocabulary, first[0], other.vocabulary, f"--data_file {name}")
    return Mixture(sources, config.mix)


def require_counted(samples: Samples, config: DataConfig) -> None:
    """Raise UserError if none of the samples has a target that counts in the loss."""
    if not any(samples.count(n) for n in range(len(samples))):
        raise UserError(
            f"{config.path}: the loss counts no token of {counted(len(samples), 'sample')} of up to --ctx_len "
            f"{config.ctx_len}, so that there is nothing to learn; give a longer --ctx_len if the tokens that count "
            "come later in the documents, or --loss_mask none"
        )
