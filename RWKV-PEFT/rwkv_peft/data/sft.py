"""Tokenizes rows of questions and answers once into a cache, for the data types of rows.

The cache holds a .bin/.idx/.mask set named by a hash of the rows' content and of every setting
that shapes the tokens, so that a second run, or another rank, reads what the first one wrote.
"""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from ..checkpoints.atomic import CannotWrite, write_text
from ..checkpoints.readable import files_below, object_in, require_readable
from ..cli.errors import UserError, told
from ..cli.names import user_cache
from ..config import DATA_TYPES, DataConfig
from .answer_samples import ROWS
from .encode_settings import EncodeSettings
from .prefix import ENDINGS
from .preprocess import write
from .report import laid_out, left_out
from .rows import JSON_ENDINGS, KINDS

FORMAT = 10
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILES = (*ENDINGS, ROWS)  # ROWS only of prompts


def prepare_sft(config: DataConfig, cache: str | Path | None = None) -> tuple[str, list[str]]:
    """Tokenize the rows of a DataConfig -> (prefix of the token files, notes on its rows, as report.py makes them).

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
    except CannotWrite as error:
        raise UserError(
            f"{error}; the tokens of --data_type {config.data_type} are kept there, and XDG_CACHE_HOME names another "
            "place"
        ) from error
    except OSError as error:
        raise UserError(
            f"the tokens of --data_type {config.data_type} are kept in {cache}, which cannot be written "
            f"({told(error)}); make it writable, or point XDG_CACHE_HOME elsewhere"
        ) from error
    return str(prefix), notes


def settings_of(config: DataConfig) -> EncodeSettings:
    """The settings by which the rows of a DataConfig become documents. Raises UserError for fields that its kind of
    rows does not have, and for rows that are not there."""
    DATA_TYPES[config.data_type].judge(config.sft_field)
    settings = EncodeSettings(
        config.tokenizer,
        fields=config.sft_field,
        think=config.sft_think,
        clean_turns=config.clean_turns,
        skip_bad_rows=config.skip_bad_rows,
        too_long=config.sft_long,
        command="train" if config.data_type == "sft" else config.data_type,
        max_tokens=0 if config.dataload == "get" else config.longest,
        end_token=not config.of_prompts,
    )
    refuse_hub_name(config)
    path = Path(config.path)
    if not path.is_dir():
        require_readable(
            path,
            f"{path}: no such file; --data_type {config.data_type} takes {KINDS}. Nothing is downloaded: "
            "of a data set on Hugging Face give the files of its rows",
            again=True,
        )
    return settings


def refuse_hub_name(config: DataConfig) -> None:
    """Raise UserError for rows that are named like a data set on Hugging Face's hub, and are not here."""
    path = Path(config.path)
    named = HUB_NAME.fullmatch(config.path) and not config.path.endswith(JSON_ENDINGS)  # of files that will be written
    if config.of_rows and named and not path.parent.exists():
        raise UserError(
            f"{path}: no such file, and nothing is downloaded; if it is a data set on Hugging Face, `hf "
            f"download {path} --repo-type dataset --local-dir {path.name}` fetches it; give that folder, "
            "or the file of its rows"
        )


def notes_of(done: Path) -> list[str] | None:
    """The notes on rows in a set's .json; None if it is missing, or if the files beside it have not the sizes that it
    names: caches are cleared file by file, and a full disk or a crash may leave less."""
    written = object_in(done)
    return written.get("notes") if written.get("sizes") == sizes_beside(done) else None


def sizes_beside(done: Path) -> dict[str, int]:
    """The sizes of those of FILES that lie beside a set's .json: {ending: bytes}."""
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
    """A hash of the settings and of the names and content of the files, the tokenizer's among them."""
    digest = hashlib.blake2b(json.dumps([FORMAT, asdict(settings), split], sort_keys=True).encode(), digest_size=16)
    tokenizer = Path(settings.tokenizer)
    for file in files_below(path) + [tokenizer] * tokenizer.is_file():
        digest.update(file.name.encode())
        with open(file, "rb") as content:
            while block := content.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
