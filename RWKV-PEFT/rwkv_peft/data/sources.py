"""Builds the samples that settings name: their data, sampling and mask.

Rows are tokenized once into a cache. It holds a .bin/.idx/.mask set named by a hash of the rows' content and of every
setting that shapes the tokens, so that a second run, or another rank, reads the first one's files.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from os.path import realpath
from pathlib import Path
from types import MappingProxyType

import numpy as np
from filelock import FileLock

from ..checkpoints.atomic import CannotWrite, write_text
from ..checkpoints.readable import files_below, object_in
from ..cli.errors import UserError, summarize
from ..cli.names import user_cache
from ..cli.parser import counted
from ..cli.rules import in_one
from ..cli.tables import SAMPLINGS
from ..config import DataConfig
from ..config.rules import check_settings
from .answer_samples import ROWS, ContextSamples, LabelSamples, PairSamples, PromptSamples
from .binidx import BinidxDataset
from .encoding import EncodeSettings
from .masks import describe_mask, make_mask, weighted
from .mixture import Joined, Mixture
from .preprocess import write
from .recorded import (
    ENDINGS,
    default_mask,
    find_tokenizer,
    recorded_of_data,
    require_fitting,
    require_same,
    vocabulary_of,
)
from .report import laid_out, left_out
from .row_settings import settings_of
from .samples import DocumentSamples, Permutation, Samples

FORMAT = 15  # of the cache
FILES = (*ENDINGS, ROWS)  # of a set in the cache; ROWS only of prompts
# --data_type -> the samples of data that no --dataload cuts otherwise
OF_TYPES: MappingProxyType[str, type[DocumentSamples]] = MappingProxyType(
    {"pairs": PairSamples, "labels": LabelSamples, "prompts": PromptSamples, "contexts": ContextSamples}
)


def build_samples(config: DataConfig, vocab_size: int) -> Samples:
    """Build the samples that a DataConfig names, over tokens checked to be below the model's vocab_size; their
    `vocabulary` is the Vocabulary that made the tokens, None if it is unknown.

    Rows in config.path are tokenized first, once. Raises UserError for files that are missing or damaged, ids or a
    tokenizer outside the vocabulary, a ctx_len longer than the data, and settings that contradict each other.
    """
    if refusals := [*check_settings(config)]:
        raise in_one(refusals)
    if config.more or config.replay:
        return mixed({name: build_samples(part, vocab_size) for name, part in parts_of(config).items()}, config)
    notes: list[str] = []
    vocabulary = recorded_of_data(config.path)
    if config.of_rows:
        vocabulary = vocabulary_of(find_tokenizer(config.tokenizer, vocab_size))  # before hours of tokenizing
        prefix, notes = prepare_sft(config)
        config = replace(config, path=prefix)
    dataset = BinidxDataset(config.path)
    require_fitting(vocabulary, config.path, vocab_size)
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
    """Raise UserError if one of the files in a DataConfig is missing, or is of another kind."""
    for part in parts_of(config).values():
        if part.of_rows:
            settings_of(part)
        else:
            BinidxDataset(part.path)


def split_samples(
    config: DataConfig, vocab_size: int, fraction: float, seed: int | None = None
) -> tuple[Samples, Samples]:
    """Split the samples of build_samples -> (training samples, validation samples); `fraction` of them validate, drawn
    by `seed`, or if it is None by the seed of the order.

    The two share no sample; with dataload "get" a document on the edge of a window may lie in both. Samples to replay
    all train.
    """
    if config.more or config.replay:
        parts = parts_of(config)
        replayed = dict([parts.popitem()]) if config.replay else {}
        halves = {name: split_samples(part, vocab_size, fraction, seed) for name, part in parts.items()}
        train, held_out = ({name: pair[half] for name, pair in halves.items()} for half in (0, 1))
        train |= {name: build_samples(part, vocab_size) for name, part in replayed.items()}
        return mixed(train, config), Joined(held_out) if config.more else next(iter(held_out.values()))
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
    """The settings of each data file of a flag, by the file's name, or its whole path if names are alike; config.replay
    is the last. Token files without a .mask count every token, even beside others that have one."""
    paths = config.files
    names, real = [Path(path).name for path in paths], [realpath(path) for path in paths]
    found = {}
    for number, (name, path) in enumerate(zip(names, paths)):
        masked = config.loss_mask == "file" and not config.of_rows
        mask = default_mask(path) if masked else config.loss_mask
        key = name if names.count(name) == 1 else path
        replayed = number > len(config.more)
        repeated = real[number] in real[:number]
        if repeated and replayed:
            raise UserError(f"--replay {path} is the data itself; name text or rows that the base knows")
        if repeated:
            raise UserError(
                f"{flag} {path} is given twice; leave one out (of --data_file, give its share to the other)"
            )
        found[key] = replace(config.own, path=path, more=(), mix=(), loss_mask=mask)
        if replayed:  # flags on the form of rows are for the run's own
            found[key] = replace(
                found[key], sft_field=(), sft_split="", sft_as="", sft_think="", think_labels=(), turns_in_text=""
            )
    return found


def mixed(sources: Mapping[str, Samples], config: DataConfig) -> Mixture:
    """Mix samples of several data files by --data_mix, the last by --replay_share if it is config.replay's. Raises
    UserError if they were made with different tokenizers."""
    first, *others = sources.items()
    for number, (name, other) in enumerate(others):
        flag = "--replay" if number == len(config.more) else "--data_file"
        require_same(first[1].vocabulary, first[0], other.vocabulary, f"{flag} {name}")
    return Mixture(sources, config.mix, config.replay_share if config.replay else 0.0)


def require_counted(samples: Samples, config: DataConfig) -> None:
    """Raise UserError if no sample has a target that counts in the loss."""
    if not any(samples.count(n) for n in range(len(samples))):
        raise UserError(
            f"{config.path}: the loss counts no token of {counted(len(samples), 'sample')} of up to --ctx_len "
            f"{config.ctx_len}, so that there is nothing to learn; give a longer --ctx_len if the tokens that count "
            "come later in the documents, or --loss_mask none"
        )


def prepare_sft(config: DataConfig, cache: str | Path | None = None) -> tuple[str, list[str]]:
    """Tokenize the rows of a DataConfig -> (prefix of the token files, the notes of report.py on its rows).

    config.path is a file or folder of rows (rows.KINDS); config.sft_field names its fields, config.sft_split its
    rows. Documents longer than ctx_len, or prompts that leave no room there for an answer, lose the front of their
    prompt (sft_long "left") or are left out ("skip"), and a .txt is cut into several; the stream of dataload "get"
    keeps them whole. cache is a folder, by default rwkv_peft/data under the user's cache folder.
    """
    settings, path = settings_of(config), Path(config.path)
    cache = Path(cache or cache_folder())
    prefix = cache / key_of(path, settings, config.sft_split)
    done = prefix.with_suffix(".json")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(prefix.with_suffix(".lock")):  # one rank writes, the others wait for it
            if (notes := notes_of(done)) is None:
                totals = write([path], prefix, settings, split=config.sft_split)
                notes = laid_out(totals) + left_out(totals)
                if totals.rows:
                    write_text(prefix.with_suffix(ROWS), "".join(f"{row}\n" for row in totals.rows))
                # last: it says that the files before it are whole
                write_text(done, json.dumps({"notes": notes, "sizes": sizes_beside(done)}))
    except (CannotWrite, OSError) as error:
        why = error if isinstance(error, CannotWrite) else f"{cache} cannot be written ({summarize(error)})"
        kept = f"the tokens of --data_type {config.data_type} are kept there"
        raise UserError(f"{why}; {kept}, and XDG_CACHE_HOME names another place") from error
    return str(prefix), notes


def notes_of(done: Path) -> list[str] | None:
    """The notes on rows in a set's .json; None if it is missing, or if the files beside it have other sizes than it
    records: caches are cleared file by file, and a full disk or a crash may leave less."""
    written = object_in(done)
    return written.get("notes") if written.get("sizes") == sizes_beside(done) else None


def sizes_beside(done: Path) -> dict[str, int]:
    """{ending: bytes} of the FILES beside a set's .json."""
    files = {end: done.with_suffix(end) for end in FILES}
    return {end: file.stat().st_size for end, file in files.items() if file.is_file()}


def cache_folder() -> Path:
    folder = user_cache()
    if folder is None:
        raise UserError(
            "this user has no home folder to keep the tokens of --data_type sft in; point XDG_CACHE_HOME at one"
        )
    return folder / "data"


def key_of(path: Path, settings: EncodeSettings, split: str) -> str:
    """A hash of the settings and of the names and content of the files, with the tokenizer's."""
    digest = hashlib.blake2b(json.dumps([FORMAT, asdict(settings), split], sort_keys=True).encode(), digest_size=16)
    tokenizer = Path(settings.tokenizer)
    for file in files_below(path) + [tokenizer] * tokenizer.is_file():
        digest.update(file.name.encode())
        with open(file, "rb") as content:
            while block := content.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
