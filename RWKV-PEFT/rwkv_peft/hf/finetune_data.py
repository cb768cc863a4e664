"""The rows of a fine-tuning: read from files, folders or the hub, as chats or as prompts and completions, and a note on
those that are cut or left out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cli import counted
from ..errors import UserError
from .finetune_chat import as_messages, give_template, system_of
from .finetune_flags import BoneArguments
from .refusals import refusals_of

# The columns that are taken if --dataset_field names none: a question and its answer, or the turns of a chat.
COLUMNS = (["query", "response"], ["messages"], ["conversations"])


def load_data(arguments: BoneArguments, split: str, tokenizer: Any) -> Any:
    """Load the rows of the split that the flag --`split` names, as messages, or as prompt and completion with the
    tokenizer's eos_token at the end. A tokenizer without a chat template gets one if the rows are messages. Raises
    UserError if there is no such data or column, or if a row has another form."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(
        Path(arguments.data_path).suffix.lower()
    )
    if kind is not None and not Path(arguments.data_path).is_file():
        raise UserError(f"--data_path {arguments.data_path} does not exist")
    if kind is None and Path(arguments.data_path).is_file():
        raise UserError(
            f"--data_path {arguments.data_path} is no .jsonl, .json, .csv or .parquet file; convert it to one of them"
        )
    if kind is not None and not Path(arguments.data_path).stat().st_size:
        raise UserError(f"--data_path {arguments.data_path} is empty")
    files = {} if kind is None else {"data_files": arguments.data_path}
    if (Path(arguments.data_path) / "state.json").is_file():  # Dataset.save_to_disk wrote it
        kind, files = "arrow", {"data_files": str(Path(arguments.data_path) / "*.arrow")}
    rows = getattr(arguments, split)
    with refusals_of(f"--data_path {arguments.data_path} --{split} {rows}"):
        try:
            data = load_dataset(kind or arguments.data_path, split=rows, **files)
        except DatasetGenerationError as error:
            raise UserError(f"--data_path {arguments.data_path}: {error.__cause__ or error}") from error
        except ConnectionError as error:
            raise UserError(
                f"--data_path {arguments.data_path} is no folder and no .jsonl, .json, .csv or .parquet file here, and "
                f"the hub cannot be reached: {error}"
            ) from error
    columns = columns_of(arguments, data.column_names)
    if len(columns) == 1 and tokenizer.chat_template is None:
        give_template(tokenizer)

    def made(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        where = f"row {index + 1} of {arguments.data_path}"
        if arguments.dataset_field is None and row.get("history"):
            raise UserError(
                f"{where} has a history, which would be lost; lay its turns out as messages, or name "
                f"--dataset_field {' '.join(columns)}, which learns without it"
            )
        if len(columns) == 1:
            return as_messages(row, columns[0], where, tokenizer)
        return as_prompt(row, columns, where, tokenizer.eos_token or "")

    with refusals_of(f"--data_path {arguments.data_path}"):  # text is decoded only here
        return data.map(made, with_indices=True, remove_columns=data.column_names)


def columns_of(arguments: BoneArguments, names: Sequence[str]) -> list[str]:
    """The columns of question and answer, or the one of turns, chosen among `names`. Raises UserError if one is
    missing."""
    wanted = arguments.dataset_field
    if wanted is None:
        wanted = next((columns for columns in COLUMNS if set(columns) <= set(names)), COLUMNS[0])
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UserError(
            f"{arguments.data_path} has no column {', '.join(missing)}; it has {', '.join(names)}: name two of them "
            "with --dataset_field QUESTION ANSWER, or one of turns"
        )
    return wanted


def as_prompt(row: Mapping[str, Any], columns: Sequence[str], where: str, end: str) -> dict[str, str]:
    """A question and its answer -> {"prompt": …, "completion": …}; the row's system text leads the prompt. Raises
    UserError, which names `where`, if one is neither text nor a number."""
    question, answer = columns
    for name in columns:
        if row[name] is None:
            raise UserError(f"{where} has no {name}; drop such rows from the file")
        if not isinstance(row[name], (str, int, float)):
            raise UserError(
                f"{where} has a {type(row[name]).__name__} for its {name}, and text is due; write it out as a question "
                "and its answer"
            )
    system = system_of(row, where)
    opening = f"### SYSTEM: {system}\n" if system else ""
    return {"prompt": f"{opening}### USER: {row[question]}\n### ASSISTANT:", "completion": f" {row[answer]}{end}"}


def as_learned(dataset: Any, rows: int, split: str, arguments: BoneArguments, config: Any) -> str:
    """Say how many of the `rows` rows of the flag --`split` the trainer has cut or left out; "" if none, without a
    --max_length, or if rows are packed and can no longer be told apart. Raises UserError if no row is left."""
    limit = f"--max_length {config.max_length}"
    if not len(dataset):
        raise UserError(
            f"none of the {rows} rows of --data_path {arguments.data_path} --{split} {getattr(arguments, split)} has a "
            f"token of an answer within {limit}; raise that"
        )
    if config.packing or config.max_length is None:
        return ""
    dropped, cut = rows - len(dataset), full(dataset, config.max_length)
    notes = [f"{dropped:,} left out, without a token of an answer within it"] * bool(dropped)
    notes += [f"{cut:,} as long as it, or cut there"] * bool(cut)
    return f"{limit}, of the {counted(rows, 'row')} of --{split}: {'; '.join(notes)}" if notes else ""


def full(dataset: Any, length: int) -> int:
    """Count the rows of a tokenized Dataset that have `length` tokens or more."""
    from pyarrow import compute

    batches = dataset.select_columns("input_ids").with_format("arrow").iter(10_000)
    sizes = (compute.list_value_length(batch["input_ids"]) for batch in batches)
    return sum(compute.sum(compute.greater_equal(size, length)).as_py() for size in sizes)
