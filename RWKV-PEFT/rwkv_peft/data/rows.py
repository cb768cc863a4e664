"""Rows of files, of folders of them and datasets, one after the other; containers.py unpacks, texts.py decodes."""

import codecs
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, count, islice, product
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeGuard

from ..checkpoints.readable import choice_in, files_below, object_in, read_settings, reading, require_readable
from ..cli.errors import UserError, short, some, summarize
from .containers import ARCHIVES, DOCUMENTS, PACKED, SHEETS, document, kind_of, opened, packing_of, sheet, unpacked
from .exports import LINES, WHATSAPP, card_in, opens_log, opens_whatsapp, require_card
from .texts import BYTES, ROWS, Reading, documents, in_utf8

BATCH_ROWS = 1000  # of a table that are in memory at once
ROW_BYTES = 1 << 26  # of a line, at most: a few compressed bytes may unpack to any length
JSON_LINES = (".jsonl", ".ndjson")
JSON_ENDINGS = (*JSON_LINES, *(ending + packing for ending in JSON_LINES for packing in PACKED), ".json")
CSV_ENDINGS = (".csv", ".tsv")
TEXTS = (".txt", ".md")
ENDINGS = (*JSON_ENDINGS, *CSV_ENDINGS, *TEXTS, ".parquet", *SHEETS, *DOCUMENTS, *PACKED, *ARCHIVES)
IN_FOLDERS = (*JSON_LINES, *CSV_ENDINGS, ".parquet", *SHEETS)  # not .json, which settings have, too
KINDS = (
    f".jsonl, .json, .csv (or .tsv), .txt, .md, .parquet, {', '.join((*SHEETS, *DOCUMENTS[:-1]))}; one of them as "
    f"{', '.join(PACKED)}; a character card (.png); several as .zip or .tar (.tar.gz, …), or in a folder; or one of "
    "datasets.save_to_disk"
)
# files about the others in a folder of texts
ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|copying|authors|changelog|contributing|metadata|dataset_infos?|config)\b"
)
LISTS = ("data", "rows", "examples", "instances")  # fields of a .json that hold all rows
Items = Iterator[tuple[str, object]]
Bounds = tuple[int, int | None]  # of rows, counted from 0
TO_UTF_8 = "name its encoding, as --encoding gb18030 (or big5, shift_jis, cp1252, utf-16), or convert the file to UTF-8"
BINARY = (".parquet", *ARCHIVES, *SHEETS, *DOCUMENTS)
STARTS = (  # the first bytes of a file that is named as a text, its kind and the remedy
    (b"PK\3\4", "a zip file, as office programs write them, whatever its name; name it .zip, .xlsx or .docx as it is"),
    (b"PAR1", "a .parquet file; name it so"),
    (b"\x1f\x8b", "compressed by gzip; name it so, as .jsonl.gz, or unpack it"),
    (b"%PDF", "a PDF; `pdftotext -enc UTF-8 {path} {text}` (of poppler-utils) makes a text of it, which is read"),
)
DELIMITERS = ",;\t"
MOST_CHARACTERS = 1 << 24  # of a cell: without a bound an unclosed quote would take in all that follows
TRAIN = "train"
HELD_OUT = ("validation", "valid", "val", "dev", "test")  # splits to validate on, the first that exists
WORDS = MappingProxyType(  # a word in the name of a file -> its split
    {TRAIN: TRAIN, "training": TRAIN} | dict.fromkeys(HELD_OUT, "validation") | {"test": "test", "testing": "test"}
)
SAVED, SPLITS = "state.json", "dataset_dict.json"  # one of them lies in a folder of datasets.save_to_disk


def read_rows(path: str | Path, split: str = "", how: Reading | None = None) -> Items:
    """Yield (place, item) for each row of one input: a line of JSON (bytes), a row (dict), the UserError of a row that
    cannot be read, or a text (str), and its file and number for messages.

    split selects rows: "train[:1000]", "[500:]"; the name matters only in a folder of splits. `how` says how texts are
    read, and takes the notes on what was found.
    """
    path, how = Path(path), how or Reading()
    name, bounds = parse_split(split)
    if bounds and kind_of(path) in (*TEXTS, *DOCUMENTS) and not how.document_end:
        raise UserError(f"{path}: a {kind_of(path)} file is one document, which {split!r} does not split")
    rows = folder_rows(path, name, how) if path.is_dir() else file_rows(path, name, how)
    rows = islice(rows, *bounds) if bounds else rows
    yield from islice(rows, ROWS) if how.sample else rows


def kind_within(path: Path) -> str:
    """The kind of a file by its name, or .json for one of no kind that begins so, as AI Studio's have no ending."""
    kind = kind_of(path)
    if kind in ENDINGS or packing_of(path) or not (path.is_file() and os.access(path, os.R_OK)):
        return kind
    with open(path, "rb") as file:
        return ".json" if file.read(1) in (b"{", b"[") else kind


def file_rows(path: Path, split: str, how: Reading) -> Items:
    kind, packing = kind_within(path), packing_of(path)
    again = packing or kind in (*ARCHIVES, *CSV_ENDINGS, *SHEETS, *DOCUMENTS, ".parquet")
    require_readable(path, f"{path}: no such file; inputs are {KINDS}", bool(again))
    if path.is_file():
        refuse_foreign(path)
    if kind in ARCHIVES:
        return archive_rows(path, split, how)
    if packing and kind in (*SHEETS, *DOCUMENTS, ".parquet"):
        raise UserError(f"{path}: {kind} files are compressed within; unpack it, and give that")
    if kind == ".parquet":
        return numbered(path, parquet_rows(path))
    if kind == ".png":
        return numbered(path, [require_card(path)])
    if kind in SHEETS:
        return numbered(path, sheet_rows(path, how))
    if kind in DOCUMENTS:
        return numbered(path, documents(document(path), path, how), "document")
    if kind in (*JSON_LINES, ".json", *CSV_ENDINGS, *TEXTS):
        return text_rows(path, kind, split, how)
    raise UserError(f"{path}: inputs are {KINDS}; export a table as .csv, a document as .txt")


def text_rows(path: Path, kind: str, split: str, how: Reading) -> Items:
    """The rows of a file of text, which may be compressed."""
    with (
        reading(path, "cannot be read to its end", "copy it again"),
        in_utf8(opened(path), path, how, kind in JSON_LINES) as file,
    ):
        try:
            if kind in CSV_ENDINGS:
                yield from numbered(path, csv_rows(file, path))
            elif kind in TEXTS:
                content = file.read(BYTES if how.sample else -1)
                whole = not how.sample or not file.peek(1)
                if not whole:
                    how.note(f"these are the first {BYTES:,} bytes of {path}")
                text = codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=whole).replace("\r\n", "\n")
                items = [{WHATSAPP: text}] if opens_whatsapp(text) else documents(text, path, how)
                yield from numbered(path, items)
            else:
                yield from json_rows(file, path, kind == ".json", split)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error.reason}); {TO_UTF_8}") from error


def archive_rows(path: Path, split: str, how: Reading) -> Items:
    """The rows of the files in an archive, as of a folder; places and messages name the archive."""
    with unpacked(path) as folder:
        notes = len(how.notes)
        try:
            for place, item in folder_rows(folder, split, how):
                yield place.replace(str(folder), str(path)), item
        except UserError as error:
            raise UserError(str(error).replace(str(folder), str(path))) from error
        finally:
            renamed = [note._replace(words=note.words.replace(str(folder), str(path))) for note in how.notes[notes:]]
            how.notes[notes:] = renamed


def numbered(path: Path, items: Iterable[object], unit: str = "row") -> Items:
    return ((f"{path}, {unit} {number}", item) for number, item in enumerate(items, 1))


def refuse_foreign(path: Path) -> None:
    """Raise UserError for a file named like a text that begins like something else."""
    with open(path, "rb") as file:
        start = file.read(4)
    for first, kind in STARTS:
        if start.startswith(first) and kind_of(path) not in BINARY and not packing_of(path):
            raise UserError(f"{path} is {kind.format(path=path, text=path.with_suffix('.txt'))}")


def folder_rows(path: Path, split: str, how: Reading) -> Items:
    if is_saved(path):
        yield from numbered(path, saved_rows(path, split))
    elif splits := row_files(path):
        name = choose(splits, split, path)
        note_rest(path, splits, "" if split else name, how)
        for file in splits[name]:
            yield from read_rows(file, how=how)
    else:
        raise UserError(
            f"{path}: not a folder that datasets.save_to_disk wrote, and no file in it can be read"
            + (choice_in(path, *ENDINGS) or "; name a file of rows")
        )


def note_rest(folder: Path, splits: dict[str, list[Path]], name: str, how: Reading) -> None:
    """Add the notes on the splits, if none was asked for, and the files of a folder that are not read."""
    others = [other for other in splits if other != name]
    if others and name:
        how.note(f"{folder}: the split {name} is read; {', '.join(others)} may validate (--val_data {folder})")
    read = {*chain(*splits.values())}
    rest = [file.relative_to(folder) for file in files_below(folder) if file not in read]
    if shown := [str(file) for file in rest if not any(part.startswith(".") for part in file.parts[:-1])]:
        how.note(f"{folder}: left out {some(shown, 10)}")


def parse_split(split: str) -> tuple[str, Bounds | None]:
    """Parse a split: "train[10:20]" -> ("train", (10, 20)); "" -> ("", None)."""
    match = re.fullmatch(r"([\w.-]*)(?:\[(\d*):(\d*)\])?", split)
    if not match:
        raise UserError(f"split {split!r}: write train, train[:1000], train[1000:2000] or [500:]")
    name, begin, end = match.groups()
    return name, (int(begin or 0), int(end) if end else None) if split.endswith("]") else None


def read_lines(file: io.BufferedReader, path: Path) -> Iterator[bytes]:
    """Yield the lines of an open file. Raises UserError for a line beyond ROW_BYTES."""
    for number in count(1):
        if not (line := file.readline(ROW_BYTES + 1)):
            return
        if len(line) > ROW_BYTES:
            raise UserError(
                f"{path}, line {number} has more than {ROW_BYTES:,} bytes, which no row may have; split it, or "
                "give a long text as a .txt"
            )
        yield line


def json_rows(file: io.BufferedReader, path: Path, may_be_one: bool, split: str) -> Items:
    """Yield the rows of a file of JSON: a row a line, a list of all rows, or one object over several lines, or on one
    line if it `may_be_one`, which is a row or holds all of them."""
    start = file.peek().lstrip(b"\xef\xbb\xbf \t\r\n")
    first, _, rest = start.partition(b"\n")
    one = first.strip() == b"{"
    whole = may_be_one and first[:1] == b"{" and (not rest.strip() or first.rstrip()[-1:] in (b"{", b"["))
    if not one and not whole and not start.startswith(b"["):
        lines = read_lines(file, path)
        yield from log_rows(path, lines) if b'"user_name"' in start else numbered(path, lines, "line")
        return
    text = file.read()
    try:
        rows = json.loads(text)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        if (whole and not one) or (first[:1] == b"[" and first.strip()[-1:] == b"]"):  # a list a line
            yield from numbered(path, read_lines(io.BufferedReader(io.BytesIO(text)), path), "line")
            return
        begins = "{, so that it is one row over several lines" if one else "[, so that it is one list of rows"
        raise UserError(
            f"{path} begins with {begins}, and is not JSON ({summarize(error)}); mend it there (rows stand a line "
            "each, or in one list, with no comma behind the last), or copy it again if its end is missing"
        ) from error
    if isinstance(rows, dict):
        rows = rows_within(rows, path, split)
    elif rows and all(isinstance(row, dict) and {"role", "content"} <= row.keys() for row in rows):
        rows = [{"messages": rows}]  # the turns of one chat
    yield from numbered(path, rows)


def log_rows(path: Path, lines: Iterator[bytes]) -> Items:
    """Yield the rows of lines, or one row of all lines if the first is that of a program's chat."""
    first = next(lines)
    try:
        head = json.loads(first)
    except (ValueError, RecursionError):
        head = None
    if not opens_log(head):
        yield from numbered(path, chain([first], lines), "line")
        return
    with reading(path, "is no whole chat", "export it again"):
        yield f"{path}, row 1", head | {LINES: [json.loads(line) for line in lines if line.strip()]}


def rows_within(value: dict[str, Any], path: Path, split: str) -> list[Any]:
    """The rows that an object holds: those of a split, in a field of LISTS, as in the hub's viewer each in a field row,
    or a column in each field, a list or, as pandas writes it, an object of numbered cells, or the rows behind the names
    of the columns; else the object is a row itself."""
    lists = {name: part for name, part in value.items() if isinstance(part, list) and dict in set(map(type, part))}
    if splits := [name for name in lists if name.lower() in WORDS]:
        return lists[choose(splits, split, path)]
    if held := next((name for name in LISTS if name in lists), None):
        rows = lists[held]
        in_viewer = all(isinstance(row, dict) and "row_idx" in row and "row" in row for row in rows)
        return [row["row"] for row in rows] if in_viewer else rows
    names, table = value.get("columns"), value.get("data")
    if are_all(names, str) and are_all(table, list) and {*map(len, table)} == {len(names)}:
        return [dict(zip(names, row)) for row in table]
    columns = [list(part.values()) if isinstance(part, dict) and "0" in part else part for part in value.values()]
    cells = (str, int, float, type(None))
    if len(columns) > 1 and all(are_all(part, cells) for part in columns) and len({*map(len, columns)}) == 1:
        return [dict(zip(value, row)) for row in zip(*columns)]
    return [value]


def are_all(value: object, kinds: type | tuple[type, ...]) -> TypeGuard[list[Any]]:
    """True for a list of values of these kinds."""
    return isinstance(value, list) and all(isinstance(each, kinds) for each in value)


def sheet_rows(path: Path, how: Reading) -> Iterator[dict[str, str] | UserError]:
    """Yield the rows of a workbook's first sheet as csv_rows does; columns without a name are left out."""
    names, *rows = sheet(path)
    if len(names) > 1:
        how.note(f"{path}: the sheet {names[0]} is read; left out {some(names[1:], 10)}")
    rows = [[cell_text(cell) for cell in row] for row in rows]
    head = next((place for place, row in enumerate(rows) if any(row)), 0)
    columns = [place for place, name in enumerate(rows[head] if rows else []) if name]
    filled = (row for row in rows[head:] if any(row))
    return named(([row[place] for place in columns] for row in filled), path)


def cell_text(cell: object) -> str:
    whole = isinstance(cell, float) and cell.is_integer()
    return str(int(cell) if whole else "" if cell is None else cell).strip()  # type: ignore[call-overload]


def csv_rows(file: io.BufferedReader, path: Path) -> Iterator[dict[str, str] | UserError]:
    """Yield each row as {name in the first line: cell}, or a UserError for a row with more or fewer cells than names.

    The most frequent of DELIMITERS in the first line separates cells. Raises UserError if the file is no CSV, and
    UnicodeDecodeError if it is not UTF-8.
    """
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    line = file.peek().partition(b"\n")[0]
    delimiter = max(DELIMITERS, key=lambda mark: line.count(mark.encode()))
    csv.field_size_limit(MOST_CHARACTERS)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        yield from named(reader, path)
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: not CSV ({summarize(error)}); a cell that holds a quote, a comma or "
            'a line end stands in quotes ("…"), its own quotes twice ("")'
        ) from error


def named(rows: Iterator[list[str]], path: Path) -> Iterator[dict[str, str] | UserError]:
    """Yield the rows after the first as csv_rows does, without blank lines. Raises UserError for a name twice."""
    names = [name.strip() for name in next(rows, [])]
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise UserError(
            f"{path}: the first line names {short(twice[0])!r} twice; give each column a name of its own, or write a "
            "line of names, such as question,answer, above if it is a row"
        )
    for cells in filter(None, rows):
        if len(cells) == len(names):
            yield dict(zip(names, cells))
        else:
            yield UserError(f"a row has {len(cells)} cells, and the first line names {len(names)}")


@contextmanager
def reading_arrow(path: Path) -> Iterator[ModuleType]:
    """Yield pyarrow; within, its exceptions for a damaged file become a UserError."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:  # pyarrow is missing, or does not fit numpy
        what = path.suffix or "a datasets folder"
        raise UserError(
            f"{path}: reading {what} needs pyarrow ({summarize(error)}): pip install --upgrade pyarrow numpy"
        ) from None
    kind = "a parquet file" if path.suffix == ".parquet" else "a file of Arrow"
    with reading(path, f"is not {kind}, or a damaged one", "copy it again"):
        yield pyarrow


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file."""
    with reading_arrow(path) as arrow:
        for batch in arrow.parquet.ParquetFile(path).iter_batches(BATCH_ROWS):
            yield from rows_of(batch)


def saved_rows(path: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a folder that datasets.save_to_disk wrote; of several splits only `split`."""
    for file in saved_files(path, split):
        columns = object_in(file.with_name(SAVED)).get("_format_columns")
        with reading_arrow(file) as arrow, arrow.memory_map(str(file)) as mapped:
            for batch in arrow.ipc.open_stream(mapped):
                yield from rows_of(batch.select(columns) if isinstance(columns, list) else batch)


def rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a group of columns. Objects lose fields that are null, because all objects of a column have the
    fields of all others, such as arguments of calls; JSON becomes its value."""
    batch.validate(full=True)  # offsets that lead out of a mapped file would crash the process
    kinds = {column.name: column.type for column in batch.schema}
    for first in range(0, len(batch), BATCH_ROWS):
        for row in batch.slice(first, BATCH_ROWS).to_pylist():
            yield {name: plain(value, kinds[name]) for name, value in row.items()}


def plain(value: Any, kind: Any) -> Any:
    """A value of an Arrow type, without null fields."""
    if value is None:
        return None
    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads(value)
    kind = getattr(kind, "storage_type", kind)
    if isinstance(value, dict):
        parts = {name: plain(part, kind.field(name).type) for name, part in value.items()}
        return {name: part for name, part in parts.items() if part is not None}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [plain(part, kind.value_type) for part in value]
    return value


def is_saved(folder: Path) -> bool:
    """True for a folder that datasets.save_to_disk wrote."""
    return (folder / SAVED).exists() or (folder / SPLITS).exists()


def saved_files(path: Path, split: str) -> Iterator[Path]:
    """Yield the files of a folder that datasets.save_to_disk wrote; of several splits only `split`. Raises UserError
    for a folder that is damaged, incomplete, or in an order of its own."""
    root = path
    if (path / SPLITS).is_file():
        path = path / choose(saved_splits(path), split, path)
    state = path / SAVED
    settings = read_settings(require_readable(state, f"{state} is missing; copy the folder again", again=True))
    if settings.get("_indices_data_files"):
        raise UserError(f"{path} keeps its rows in an order of its own; save it again with a newer datasets")
    with reading(state, "names no files of rows", "copy the folder again"):
        names = [str(entry["filename"]) for entry in settings["_data_files"]]
    for name in names:
        file = require_readable(path / name, f"{path / name} is missing; copy the folder again", again=True)
        yield require_within(root, file)


def saved_splits(folder: Path) -> list[str]:
    """The splits that datasets.save_to_disk wrote; [] for one data set, or if the file that names them cannot be read,
    which is an error as soon as rows are read."""
    splits = object_in(folder / SPLITS).get("splits")
    return [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []


def row_files(folder: Path) -> dict[str, list[Path]]:
    """The {split: files} of a folder: its files of rows or, if it has none, those of the one folder in it that has
    some, or of folders named as splits; else all texts and documents below it, or all .json files and characters'
    cards; {} if there are none. Files without one of WORDS in their names are of the split train, as are texts.

    Raises UserError for files of several kinds, for several such folders, and for a link out of the folder."""
    found, place = files_in(folder), folder
    splits: dict[str, list[Path]] = {}
    if not found:
        places = [path for path in below(folder) if path.is_dir() and files_in(path)]
        if len(places) > 1 and not all(path.name.lower() in WORDS for path in places):
            raise UserError(f"{folder} holds several folders of rows; give one of {', '.join(map(str, places))}")
        place = places[0] if len(places) == 1 else folder
        found = [file for each in places for file in files_in(each)]
    kinds = sorted({ending_of(path) for path in found})
    if len(kinds) > 1:
        raise UserError(
            f"{place} holds files of several kinds ({', '.join(kinds)}), which may be the same rows twice; name a "
            "file, or leave one kind in the folder"
        )
    for path in found:
        words = re.split("[^a-z]+", str(path.relative_to(place)).lower())
        splits.setdefault(next((WORDS[word] for word in words if word in WORDS), TRAIN), []).append(path)
    others = {} if splits else {path: kind_within(path) for path in every_file(folder)}
    for about, endings in product((False, True), ((*TEXTS, *DOCUMENTS), (".json", ".png"))):
        files = [path for path, kind in others.items() if kind in endings]
        files = [path for path in files if about or not ABOUT.match(path.name.lower())]
        if texts := [path for path in files if others[path] != ".png" or card_in(path)]:
            splits[TRAIN] = texts
            break
    for path in sum(splits.values(), []):
        require_within(folder, path)
    return splits


def every_file(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, by name, without hidden ones. Links to folders are not followed."""
    for path in below(folder):
        if path.is_dir() and not path.is_symlink():
            yield from every_file(path)
        elif path.is_file():
            yield path


def require_within(folder: Path, path: Path) -> Path:
    """The path itself. Raises UserError for a link out of a folder of rows: a downloaded data set could read any file,
    such as a key, into the tokens."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(
            f"{path} leads out of {folder} by a link, to {os.path.realpath(path)}, and only files within a folder are "
            "read as its rows; name that file itself, or put a copy in the link's place"
        )
    return path


def choose(splits: Iterable[str], name: str, folder: Path) -> str:
    """The split called name; without a name the only split, or else train."""
    splits = list(splits)
    chosen = name or (splits[0] if len(splits) == 1 else TRAIN)
    if chosen not in splits:
        raise UserError(f"{folder}: no split {chosen!r}; it has {', '.join(splits)}")
    return chosen


def held_out_split(path: str | Path) -> str:
    """The split to validate on, one of HELD_OUT, in a folder of several splits; "" if there is none, and for a file."""
    folder = Path(path)
    if not folder.is_dir():
        return ""
    splits = saved_splits(folder) if is_saved(folder) else list(row_files(folder))
    return next((name for name in HELD_OUT if name in splits and len(splits) > 1), "")


def files_in(folder: Path) -> list[Path]:
    """The files of rows directly in a folder, by name."""
    return [path for path in below(folder) if ending_of(path) and path.is_file()]


def below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def ending_of(path: Path) -> str:
    """The ending of a file of rows, as .jsonl or .jsonl.gz, or ""."""
    return kind_of(path) + packing_of(path) if kind_of(path) in IN_FOLDERS else ""
