"""The rows of a fine-tuning: read from files, folders or the hub, as chats or as prompts and completions, and a note on
those that are cut or left out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..cli import counted
from ..data.arrow_rows import restorer, unchanged
from ..data.tools import TURN_CALLS
from ..data.turns import CALLS, WEIGHT, is_learned, refuse_media
from ..errors import UserError
from ..names import SYSTEM_FIELDS
from .finetune_flags import BoneArguments
from .refusals import refusals_of

# Roles in turns of the form {from, value} -> the names that chat templates use.
ROLES = MappingProxyType(
    {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "observation": "tool"}
)
# For base models, which have no template: each turn is laid out as in rows of a question and its answer.
TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '### ' + message['role'] | upper + ':' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' ' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n### ASSISTANT:' }}{% endif %}"
)
NEW = "new "  # before the names of columns of JSON, in which an object keeps its own fields, and only these
# The columns that are taken if --dataset_field names none: a question and its answer, or the turns of a chat.
COLUMNS = (["query", "response"], ["messages"], ["conversations"])


def only_answers(config: Any) -> None:
    """Set trl's config so that only the assistant's turns of a chat count in the loss, as only completions do in other
    rows; with completion_only_loss False everything counts."""
    config.assistant_only_loss = config.completion_only_loss is not False
    config.completion_only_loss = None


def give_template(tokenizer: Any) -> None:
    """Give TEMPLATE to a tokenizer that has no template; it is saved with the tokenizer. Raises UserError if there is
    no eos_token to end an answer with."""
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no chat template, and no eos_token to end an answer with; write one of them")
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + TEMPLATE


def as_messages(row: Mapping[str, Any], column: str, where: str, tokenizer: Any) -> dict[str, Any]:
    """A row's turns, {role, content} or {from, value} -> {"messages": …}, led by the row's system text, and "tools" if
    the row has them.

    Raises UserError, which names `where`, for turns of another form, if no turn of the assistant holds anything, if
    the template refuses the turns, or if it leaves out tools or calls of tools.
    """
    from jinja2 import TemplateError

    turns = row[column]
    if not isinstance(turns, list):
        raise UserError(f"{where} has a {type(turns).__name__} for its {column}, and a list of turns is due")
    messages = [_message(turn, where) for turn in turns]
    refuse_lost(row, messages, where)
    if not any(turn["role"] == "assistant" and (turn["content"] or calls(turn)) for turn in messages):
        raise UserError(f"{where} has no turn of the assistant's to learn from; drop such rows from the file")
    system = system_of(row, where)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    bare = [{name: value for name, value in turn.items() if name not in TURN_CALLS} for turn in messages]
    tools = row.get("tools")
    try:
        described = json.loads(tools) if isinstance(tools, str) else tools
        text = tokenizer.apply_chat_template(messages, tokenize=False, tools=described)
        without_tools = described and tokenizer.apply_chat_template(messages, tokenize=False)
        without_calls = bare != messages and tokenizer.apply_chat_template(bare, tokenize=False, tools=described)
    except (TemplateError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} is refused by the tokenizer's chat template: {error}") from error
    for what, other in (("tools", without_tools), ("calls of tools", without_calls)):
        if text == other:
            raise UserError(
                f"{where} holds {what}, which the tokenizer's chat template leaves out, so that they would be lost; "
                "take a base whose template includes them, write them out in the turns' words, or remove them"
            )
    return {"messages": messages, **({"tools": tools} if "tools" in row else {})}


def system_of(row: Mapping[str, Any], where: str) -> str:
    """The system text beside a row's turns or question, "" if it has none. Raises UserError if it is not text."""
    words = next((row[name] for name in SYSTEM_FIELDS if row.get(name)), "")
    if not isinstance(words, str):
        raise UserError(f"{where} has a {type(words).__name__} for its system text, and text is due")
    return words


def calls(turn: Mapping[str, Any]) -> bool:
    return any(turn.get(name) for name in TURN_CALLS)


def _message(turn: object, where: str) -> dict[str, Any]:
    """Return a turn as chat templates take it. Raises UserError, which names `where`, if it cannot be one."""
    if isinstance(turn, dict) and turn.get("role") is None and turn.get("from") is not None:
        role = str(turn["from"])
        turn = {"role": ROLES.get(role, role), "content": turn.get("value")}
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise UserError(f"{where} has a turn that is no object with role and content (or from and value): {turn!r:.60}")
    if turn["role"] in (*CALLS, *TURN_CALLS):
        raise UserError(
            f"{where} has a turn of {turn['role']}, which chat templates do not take for the assistant's, so that the "
            "call would not be learned; write it as the tool_calls of an assistant's turn, or into that turn's words"
        )
    if turn.get("content") is None and calls(turn):
        turn = {**turn, "content": ""}
    if not isinstance(turn.get("content"), str):
        raise UserError(f"{where} has a turn whose content is {type(turn.get('content')).__name__}, and text is due")
    return {name: value for name, value in turn.items() if value or name not in TURN_CALLS and value is not None}


def load_data(arguments: BoneArguments, split: str, tokenizer: Any) -> Any:
    """Load the rows of the split that the flag --`split` names, as messages, or as prompt and completion with the
    tokenizer's eos_token at the end. A tokenizer without a chat template gets one if the rows are messages. Raises
    UserError if there is no such data or column, or if a row has another form."""
    from datasets import Features, Json, load_dataset
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
    restorers = {column.name: restorer(column.type, unchanged) for column in data.features.arrow_schema}
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
            row = {name: restorers[name](row[name]) for name in row}
            return {NEW + name: value for name, value in as_messages(row, columns[0], where, tokenizer).items()}
        return as_prompt(row, columns, where, tokenizer.eos_token or "")

    kept = [name for name in ("messages", "tools") if len(columns) == 1 and name in ("messages", *data.column_names)]
    features = Features({NEW + name: Json() for name in kept}) if kept else None
    with refusals_of(f"--data_path {arguments.data_path}"):  # text is decoded only here
        data = data.map(made, with_indices=True, remove_columns=data.column_names, features=features)
    return data.rename_columns({NEW + name: name for name in kept})


def refuse_lost(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise UserError, which names `where`, for a row with a weight, for an answer that does not count, because all do
    here, and for anything that is no text."""
    try:
        for holder in (row, *messages):
            refuse_media(holder)
        if row.get(WEIGHT) not in (None, "", 1):
            raise UserError(f"field {WEIGHT!r} holds {row[WEIGHT]!r}, and rows have no weights here; leave it out")
        if not all(is_learned(turn) for turn in messages if turn["role"] == "assistant"):
            raise UserError("a turn is not to count, and every answer does; end the chat before that turn")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def columns_of(arguments: BoneArguments, names: Sequence[str]) -> list[str]:
    """The columns of question and answer, or the one of turns, among `names`. Raises UserError if one is missing."""
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
    refuse_lost(row, (), where)
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
