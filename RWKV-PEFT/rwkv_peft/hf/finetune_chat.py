"""Chats as rows of a fine-tuning: lists of turns, laid out by the tokenizer's chat template."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..errors import UserError
from ..names import SYSTEM_FIELDS

# Roles in turns of the form {from, value} -> the names that chat templates use.
ROLES = MappingProxyType(
    {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "observation": "tool"}
)
CALLS = ("tool_calls", "function_call")  # fields of a turn, beside its content
# For base models, which have no template: each turn is laid out as in rows of a question and its answer.
TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '### ' + message['role'] | upper + ':' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' ' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n### ASSISTANT:' }}{% endif %}"
)


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
    if not any(turn["role"] == "assistant" and (turn["content"] or calls(turn)) for turn in messages):
        raise UserError(f"{where} has no turn of the assistant's to learn from; drop such rows from the file")
    system = system_of(row, where)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    bare = [{name: value for name, value in turn.items() if name not in CALLS} for turn in messages]
    tools = row.get("tools")
    try:
        described = json.loads(tools) if isinstance(tools, str) else tools
        text = tokenizer.apply_chat_template(messages, tokenize=False, tools=described)
        without_tools = described and tokenizer.apply_chat_template(messages, tokenize=False)
        without_calls = bare != messages and tokenizer.apply_chat_template(bare, tokenize=False, tools=described)
    except (TemplateError, TypeError, ValueError) as error:
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
    """Return whether a turn calls a tool."""
    return any(turn.get(name) for name in CALLS)


def _message(turn: object, where: str) -> dict[str, Any]:
    """Return a turn as chat templates take it, with role and content. Raises UserError, which names `where`, if it
    cannot be one."""
    if isinstance(turn, dict) and turn.get("role") is None and turn.get("from") is not None:
        role = str(turn["from"])
        turn = {"role": ROLES.get(role, role), "content": turn.get("value")}
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise UserError(f"{where} has a turn that is no object with role and content (or from and value): {turn!r:.60}")
    if turn["role"] in CALLS:
        raise UserError(
            f"{where} has a turn of {turn['role']}, which chat templates do not take for the assistant's, so that the "
            "call would not be learned; write it as the tool_calls of an assistant's turn, or into that turn's words"
        )
    if turn.get("content") is None and calls(turn):
        turn = {**turn, "content": ""}
    if not isinstance(turn.get("content"), str):
        raise UserError(f"{where} has a turn whose content is {type(turn.get('content')).__name__}, and text is due")
    return {name: value for name, value in turn.items() if value or name not in CALLS and value is not None}
