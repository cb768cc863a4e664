"""Exports of programs in which people chat with models: a function each, of a document to its chats."""

import html
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from ..cli.errors import UserError, short
from .chat import THINKING
from .fields import Row
from .markup import markdown

MEDIA, SYSTEM, CALLS = "pictures, files and sounds", "system lines", "calls of tools and their results"
HIDDEN, OTHER_REPLIES = "hidden messages", "other replies to the same message"
ACTIVITIES = "activities other than prompts"
REASONING = re.compile(r'<details type="reasoning".*?</summary>(.*?)</details>\s*', re.DOTALL)
TOOL_DETAILS = re.compile(r'<details type="(?:tool_calls|code_interpreter)".*?</details>\s*', re.DOTALL)
# the title of a prompt in Google's My Activity, in English and German, and those of other activities
PROMPTED = re.compile(
    r"(?:Prompted(?: with:)?|Asked(?: (?:Gemini|Bard):)?|Said|Branched|Answered|Eingegebener Prompt:) (.*?)"
    r"(\s*Attached \d+ files?\.?)?",
    re.DOTALL,
)
ACTED = re.compile(r"(?:Created|Used|Added|Gave|Selected|Shared|Deleted|Viewed|Visited|Edited|Updated)\b")
GEMINI_CALLS = ("executableCode", "codeExecutionResult", "functionCall", "functionResponse")


class LeftOut(NamedTuple):
    """A message that is not read, by its kind."""

    what: str


Message = dict[str, Any] | LeftOut  # a turn {role, content}


def branch(nodes: Mapping[str, Any], last: str | None, parent: str) -> list[Any]:
    """The nodes of a tree from its root to the one named `last`, each of which names its parent."""
    path = dict[str, Any]()
    while last and last in nodes and last not in path:
        path[last] = nodes[last]
        last = nodes[last].get(parent)
    return list(path.values())[::-1]


def open_webui(row: Row) -> Iterator[list[Message]]:
    chat = row["chat"]
    history = chat.get("history") or {}
    turns = branch(history.get("messages") or {}, history.get("currentId"), "parentId") or chat["messages"]
    system = (chat.get("params") or {}).get("system") or chat.get("system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        words = turn["content"]
        thinking = [
            html.unescape(re.sub(r"^\s*> ?", "", text, flags=re.MULTILINE)) for text in REASONING.findall(words)
        ]
        words, calls = TOOL_DETAILS.subn("", REASONING.sub("", words))
        messages += [LeftOut(CALLS)] * calls + [LeftOut(MEDIA)] * len(turn.get("files") or ())
        messages.append({"role": turn["role"], "content": words} | thought("\n".join(thinking)))
    yield messages


def thought(words: str) -> dict[str, str]:
    return {THINKING[0]: words.strip()} if words.strip() else {}


def chat_gpt(row: Row) -> Iterator[list[Message]]:
    messages, thoughts = list[Message](), list[str]()
    for node in branch(row["mapping"], row["current_node"], "parent"):
        message = node.get("message")
        if not message:
            continue
        role, content, about = message["author"]["role"], message["content"], message.get("metadata") or {}
        kind, parts = content["content_type"], content.get("parts") or []
        if kind == "thoughts":
            thoughts += [part["content"] for part in content["thoughts"]]
            continue
        if kind == "reasoning_recap":
            continue
        if role == "tool" or message.get("recipient", "all") != "all" or kind in ("code", "execution_output"):
            messages.append(LeftOut(CALLS))
            continue
        texts = [part if isinstance(part, str) else part.get("text") or "" for part in parts]
        words = "\n".join(filter(None, texts)).strip()
        if (
            role == "system"
            or about.get("is_visually_hidden_from_conversation")
            or kind not in ("text", "multimodal_text")
        ):
            messages += [LeftOut(HIDDEN)] * bool(words or content.keys() - {"content_type", "parts"})
            continue
        messages += [LeftOut(MEDIA)] * sum(isinstance(part, dict) and not part.get("text") for part in parts)
        if words:
            messages.append(
                {"role": role, "content": words} | thought("\n".join(thoughts) if role == "assistant" else "")
            )
            thoughts = []
    yield messages


def claude(row: Row) -> Iterator[list[Message]]:
    messages = row["chat_messages"]
    nodes = {message.get("uuid"): message for message in messages}
    threaded = any(message.get("parent_message_uuid") in nodes for message in messages)
    last = row.get("current_leaf_message_uuid") or messages[-1].get("uuid") if threaded else None
    read = list[Message]()
    for message in branch(nodes, last, "parent_message_uuid") or messages:
        parts = message.get("content") or []
        words = "\n\n".join(part["text"] for part in parts if part.get("type") == "text") or message.get("text") or ""
        thinking = "\n".join(part["thinking"] for part in parts if part.get("type") == "thinking")
        read += [LeftOut(CALLS) for part in parts if part.get("type") in ("tool_use", "tool_result")]
        read += [LeftOut(MEDIA) for _ in message.get("files") or ()]
        attached = [each["extracted_content"] for each in message.get("attachments") or () if each["extracted_content"]]
        words = "\n".join([*attached, words]).strip()
        read.append({"role": message["sender"], "content": words} | thought(thinking))
    yield read


def gemini(row: Row) -> Iterator[list[Message]]:
    """A prompt and its answer: nothing says which prompts belong together."""
    title, answers = row["title"], [each["html"] for each in row.get("safeHtmlItem") or ()]
    said = PROMPTED.fullmatch(title)
    if not said and answers and not ACTED.match(title):
        raise UserError(
            f"an activity has an answer and the title {short(title)!r}, which begins as no prompt does in English or "
            "German; export it again with your Google account in English"
        )
    if not said:
        yield [LeftOut(ACTIVITIES)]
        return
    files = said[2] or any(map(row.get, ("attachedFiles", "imageFile", "audioFiles")))
    yield [
        *[LeftOut(MEDIA)] * bool(files),
        *[LeftOut(OTHER_REPLIES)] * (len(answers) - 1),
        {"role": "user", "content": said[1]},
        *({"role": "assistant", "content": markdown(answer)} for answer in answers[-1:]),
    ]


def ai_studio(row: Row) -> Iterator[list[Message]]:
    system, thoughts = row.get("systemInstruction") or {}, list[str]()
    messages: list[Message] = [{"role": "system", "content": system.get("text") or texts_of(system)}]
    for chunk in row["chunkedPrompt"]["chunks"]:
        fields = [*chunk, *chain(*(chunk.get("parts") or ()))]
        messages += [LeftOut(MEDIA) for name in fields if name.startswith(("drive", "inline", "youtube", "fileData"))]
        messages += [LeftOut(CALLS) for name in fields if name in GEMINI_CALLS]
        thinks = bool(chunk.get("isThought"))
        words = chunk.get("text") or texts_of(chunk, thinks)
        thoughts.append(words if thinks else texts_of(chunk, True))
        if not words:
            messages += [LeftOut(SYSTEM)] * ("errorMessage" in chunk)
        elif not thinks:
            role = "assistant" if chunk["role"] == "model" else chunk["role"]
            messages.append({"role": role, "content": words} | thought("\n".join(thoughts) if role != "user" else ""))
            thoughts = []
    yield messages


def texts_of(chunk: Row, thinks: bool = False) -> str:
    """The texts of a chunk's parts, those of a thinking or the others."""
    parts = chunk.get("parts") or ()
    return "".join(part.get("text") or "" for part in parts if bool(part.get("thought")) == thinks)


def lm_studio(row: Row) -> Iterator[list[Message]]:
    settings = (row.get("perChatPredictionConfig") or {}).get("fields") or ()
    set_here = [each["value"] for each in settings if each["key"] == "llm.prediction.systemPrompt"]
    messages: list[Message] = [
        {"role": "system", "content": next(filter(None, set_here), row.get("systemPrompt") or "")}
    ]
    for each in row["messages"]:
        version = each["versions"][each.get("currentlySelected") or 0]
        words, thoughts = list[str](), list[str]()
        for step in version.get("steps") or [version]:
            parts = step.get("content") or ()
            messages += [
                LeftOut(CALLS if part["type"].startswith("toolCall") else MEDIA)
                for part in parts
                if part["type"] != "text"
            ]
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            if (step.get("style") or {}).get("type") == "thinking":
                thoughts.append(re.sub("</?think>", "", text))
            else:
                words.append(text)
        words = list(filter(None, words))
        messages.append({"role": version["role"], "content": "\n".join(words)} | thought("\n".join(thoughts)))
    yield messages
