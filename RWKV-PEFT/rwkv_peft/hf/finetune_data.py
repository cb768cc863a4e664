"""The rows of a fine-tuning: from files, folders or the hub, as prompts and completions; what of them is learned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cli import counted
from ..errors import UserError
from .finetune_flags import BoneArguments
from .refusals import refusals_of


def load_data(arguments: BoneArguments, split: str, end: str | None) -> Any:
    """The rows of the split that --`split` names, as prompt and completion; end (or None) closes each answer. Raises
    UserError where there is no such data or column."""
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
    missing = [name for name in arguments.dataset_field if name not in data.column_names]
    if missing:
        raise UserError(
            f"{arguments.data_path} has no column {', '.join(missing)}; it has {', '.join(data.column_names)}: "
            + ("name two of them with" if len(data.column_names) > 1 else "write two such columns, and name them with")
            + " --dataset_field QUESTION ANSWER"
        )
    question, answer = arguments.dataset_field

    def as_prompt(row: Mapping[str, Any], index: int) -> dict[str, str]:
        for name in (question, answer):
            if row[name] is None:
                raise UserError(f"row {index + 1} of {arguments.data_path} has no {name}; drop such rows from the file")
            if not isinstance(row[name], (str, int, float)):
                raise UserError(
                    f"row {index + 1} of {arguments.data_path} has a {type(row[name]).__name__} for its {name}, and "
                    "text is due; write it out as a question and its answer"
                )
        return {"prompt": f"### USER: {row[question]}\n### ASSISTANT:", "completion": f" {row[answer]}{end or ''}"}

    with refusals_of(f"--data_path {arguments.data_path}"):  # text is decoded only here
        return data.map(as_prompt, with_indices=True, remove_columns=data.column_names)


def as_learned(dataset: Any, rows: int, split: str, arguments: BoneArguments, config: Any) -> str:
    """A line on the rows of --`split`, of which there were `rows`, that the trainer has cut or left out, "" where it
    has none; UserError where none is left. Packed rows are not told apart any more."""
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
    """How many rows of a tokenized Dataset have `length` tokens or more."""
    from pyarrow import compute

    batches = dataset.select_columns("input_ids").with_format("arrow").iter(10_000)
    sizes = (compute.list_value_length(batch["input_ids"]) for batch in batches)
    return sum(compute.sum(compute.greater_equal(size, length)).as_py() for size in sizes)
