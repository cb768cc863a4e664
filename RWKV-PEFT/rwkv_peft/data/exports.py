"""Exports of programs in which people chat, in one table: the fields that recognize one, and a function to its chats.

A file's first rows decide for the whole file. Its chats become rows of messages, which are read like any other.
"""

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.readable import reading
from ..cli.errors import UserError, some
from . import assistants
from .assistants import MEDIA, OTHER_REPLIES, SYSTEM, LeftOut, thought
from .dialogues import BRACKETS, bracket_calls, glaive
from .fields import CALLS, LISTS, Row, UnknownForm
from .forms import Form
from .tools import as_list

LINES, WHATSAPP = "lines", "whatsapp"  # fields of rows that stand for a whole file
PAUSE = 6 * 3600  # seconds without a message behind which a dialogue of people is another document
LEFT_OUT, CHATS_OF = "left out: ", "chats of "  # before the words of a count in Totals.counts
OTHERS_ALONE = "chats without the one whose words are learned"
PNG, CARDS = b"\x89PNG\r\n\x1a\n", (b"ccv3", b"chara")  # the keywords of a card's text, the newer first
# the beginning of a message in WhatsApp's texts: [date, time] as on iPhones, or date, time -
STAMP = re.compile(
    r"\u200e?\[?(\d{1,4})[./-](\d{1,2})[./-](\d{1,4})\.?,?\s(上午|下午|[ap]\.?\s?m\.?\s)?\s?"
    r"(\d{1,2})[:.](\d{2})(?:[:.](\d{2}))?\s?([ap]\.?\s?m\.?)?(?:\]| -)\s(.*)",
    re.IGNORECASE,
)
SAID = re.compile(r"([^:]{1,60}):(?:\s(.*)|)", re.DOTALL)
# a message in WhatsApp's texts that stands for a file, in any language: <Media omitted>, photo.jpg (file attached)
OMITTED = re.compile(r"\u200e.*|<[^<>\n]{3,60}>|\S+\.\w{2,4} \([^()\n]{3,40}\)(?:\n.*)?|null", re.DOTALL)
EDITED = re.compile(r"\s*\u200e?<This message was edited>$")


class Said(NamedTuple):
    """A message of somebody with a name, at `time` in seconds. role is "user" or "assistant" if the export says so;
    thinking is what a model thought before its words."""

    name: str
    words: str
    time: float = 0.0
    role: str = ""
    thinking: str = ""


Message = dict[str, Any] | Said | LeftOut  # a turn {role, content} if its speaker has no name


def silly_tavern(row: Row) -> Iterator[list[Message]]:
    messages = list[Message]()
    for line in row[LINES]:
        extra = line.get("extra") or {}
        words = line["mes"].strip()
        if line.get("is_system") or extra.get("type") == "narrator":
            messages.append(LeftOut(SYSTEM))
            continue
        messages += [LeftOut(MEDIA)] * any(extra.get(name) for name in ("image", "media", "file", "video"))
        role = "user" if line.get("is_user") else "assistant"
        messages.append(Said(line["name"], words, role=role, thinking=extra.get("reasoning") or ""))
    yield messages


def pippa(row: Row) -> Iterator[list[Message]]:
    name, about = row["bot_name"], row.get("bot_description") or ""
    yield [
        {"role": "system", "content": filled(f"You are {name}.\n{about}", name)},
        *(
            {"role": "user" if each["is_human"] else "assistant", "content": filled(each["message"], name)}
            for each in row["conversation"]
        ),
    ]


def filled(words: str, name: str) -> str:
    """The words of a character of that name, without its program's marks."""
    words = re.sub(r"\{\{original\}\}", "", words, flags=re.IGNORECASE)
    words = re.sub(r"\{\{char\}\}|<BOT>", lambda _: name, words, flags=re.IGNORECASE)
    return re.sub(r"\{\{user\}\}|<USER>", "User", words, flags=re.IGNORECASE).strip()


def card(row: Row) -> Iterator[list[Message]]:
    """The greetings and examples of a character card, each behind a system text of its name and descriptions."""
    data: Row = row["data"] if isinstance(row.get("data"), dict) else row
    name = data["name"]

    parts = [
        heading + filled(data[field], name)
        for heading, field in (
            ("", "system_prompt"),
            ("", "description"),
            ("Personality: ", "personality"),
            ("Scenario: ", "scenario"),
        )
        if data.get(field)
    ]
    system = {"role": "system", "content": "\n".join([f"You are {name}.", *parts])}
    for greeting in (data.get("first_mes"), *(data.get("alternate_greetings") or ())):
        if greeting:
            yield [system, {"role": "assistant", "content": filled(greeting, name)}]
    for example in re.split("<START>", data.get("mes_example") or "", flags=re.IGNORECASE):
        pieces = re.split(r"^(\{\{user\}\}|\{\{char\}\}|<USER>|<BOT>):", example, flags=re.IGNORECASE | re.MULTILINE)
        turns = [
            {"role": "user" if "user" in who.lower() else "assistant", "content": filled(words, name)}
            for who, words in zip(pieces[1::2], pieces[2::2])
        ]
        if turns:
            yield [system, *turns]


def whatsapp(row: Row) -> Iterator[list[Message]]:
    entries = list[tuple[re.Match[str], list[str]]]()
    for line in row[WHATSAPP].splitlines():
        stamp = STAMP.match(line)
        if stamp:
            entries.append((stamp, [stamp[9]]))
        elif entries:
            entries[-1][1].append(line)
    times = times_of([stamp for stamp, _ in entries])
    messages = list[Message]()
    for time, (_, lines) in zip(times, entries):
        said = SAID.fullmatch("\n".join(lines))
        words = EDITED.sub("", said[2] or "").strip(" \t\n") if said else ""
        if not said:
            messages.append(LeftOut(SYSTEM))
        elif not words or OMITTED.fullmatch(words):
            messages.append(LeftOut(MEDIA))
        else:
            messages.append(Said(said[1].strip("\u200e\u202a\u202c ~"), words, time))
    yield from by_pauses(messages)


def telegram(row: Row) -> Iterator[list[Message]]:
    """Words that are partly bold or linked are a list of texts and of objects with a text."""
    messages = list[Message]()
    for each in row["messages"]:
        parts = each["text"] if isinstance(each["text"], list) else [each["text"]]
        words = "".join(part if isinstance(part, str) else part["text"] for part in parts).strip()
        if each["type"] != "message":
            messages.append(LeftOut(SYSTEM))
            continue
        messages += [LeftOut(MEDIA)] * any(
            name in each for name in ("photo", "file", "media_type", "location_information")
        )
        if words:
            messages.append(Said(each["from"] or str(each["from_id"]), words, seconds(each["date"])))
    yield from by_pauses(messages)


def discord(row: Row) -> Iterator[list[Message]]:
    messages = list[Message]()
    for each in row["messages"]:
        if each["type"] not in ("Default", "Reply"):
            messages.append(LeftOut(SYSTEM))
            continue
        messages += [LeftOut(MEDIA)] * (len(each.get("attachments") or ()) + len(each.get("stickers") or ()))
        if words := each["content"].strip():
            author = each["author"]
            messages.append(Said(author.get("nickname") or author["name"], words, seconds(each["timestamp"])))
    yield from by_pauses(messages)


def seconds(date: str) -> float:
    """The seconds of a date, of its own place if it names none."""
    moment = datetime.fromisoformat(date)
    return moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp()


def tree(row: Row) -> Iterator[list[Message]]:
    """The path of a tree of messages on which every reply is the best by its rank."""
    message, messages = row["prompt"], list[Message]()
    while message:
        messages.append({"role": "user" if message["role"] == "prompter" else "assistant", "content": message["text"]})
        replies = message.get("replies") or []
        messages += [LeftOut(OTHER_REPLIES)] * (len(replies) - 1)
        ranks = [math.inf if reply.get("rank") is None else reply["rank"] for reply in replies]
        message = replies[ranks.index(min(ranks))] if replies else None
    yield messages


def times_of(stamps: list[re.Match[str]]) -> list[float]:
    """The seconds of WhatsApp's stamps. Phones write the day, the month or the year first: the order is the one in
    which all are dates, and time runs backwards least."""
    best, fewest = [0.0] * len(stamps), len(stamps) + 1
    for year, month, day in ((3, 2, 1), (3, 1, 2), (1, 2, 3)):
        times = list[float]()
        try:
            for stamp in stamps:
                half = (stamp[4] or stamp[8] or "").lower()
                hour = int(stamp[5])
                hour = hour % 12 + 12 * (half.startswith("p") or half == "下午") if half else hour
                years = int(stamp[year]) + 2000 * (len(stamp[year]) == 2)
                moment = datetime(years, int(stamp[month]), int(stamp[day]), hour, int(stamp[6]), int(stamp[7] or 0))
                times.append((moment - datetime(1970, 1, 1)).total_seconds())
        except ValueError:
            continue
        backwards = sum(second < first for first, second in zip(times, times[1:]))
        if backwards < fewest:
            best, fewest = times, backwards
    return best


def by_pauses(messages: Iterable[Message]) -> Iterator[list[Message]]:
    """Yield messages in parts, which end where nobody says anything for PAUSE."""
    part, last = list[Message](), 0.0
    for message in messages:
        if isinstance(message, Said):
            if part and last and message.time - last > PAUSE:
                yield part
                part = []
            last = message.time
        part.append(message)
    if part:
        yield part


def opens_log(first: object) -> bool:
    """True for the first line of SillyTavern's chats, which says who talks."""
    return isinstance(first, dict) and "user_name" in first and "character_name" in first


def holds_messages(field: str) -> Callable[[Row], bool]:
    """True for a row of messages with a field."""
    return lambda row: any(isinstance(each, dict) and field in each for each in as_list(row["messages"]))


EXPORTS = (
    Form("SillyTavern's chats (.jsonl)", (LINES,), silly_tavern, "export", opens_log, people=True),
    Form(
        "character cards (.json or .png)",
        ("spec", "data"),
        card,
        "export",
        lambda row: "chara_card" in str(row["spec"]),
    ),
    Form("character cards (version 1)", ("name", "first_mes", "mes_example"), card, "export"),
    Form(
        "Open WebUI",
        ("chat",),
        assistants.open_webui,
        "export",
        lambda row: isinstance(row["chat"], dict) and bool(row["chat"].keys() & {"history", "messages"}),
    ),
    Form("ChatGPT (conversations.json)", ("mapping", "current_node"), assistants.chat_gpt, "export"),
    Form("Claude (conversations.json)", ("chat_messages",), assistants.claude, "export"),
    Form(
        "Gemini (MyActivity.json)",
        ("header", "title", "time"),
        assistants.gemini,
        "export",
        lambda row: "Gemini" in str(row["header"]),
    ),
    Form("AI Studio (saved prompts)", ("chunkedPrompt",), assistants.ai_studio, "export"),
    Form("LM Studio (conversation.json)", ("messages",), assistants.lm_studio, "export", holds_messages("versions")),
    Form(
        "Glaive's function calls",
        ("system", "chat"),
        lambda row: [glaive(row)],
        "export",
        lambda row: "USER:" in str(row["chat"]),
    ),
    Form(
        "ToolACE",
        ("system", "conversations"),
        lambda row: [bracket_calls(row)],
        "export",
        lambda row: BRACKETS in str(row["system"]),
    ),
    Form("WhatsApp (.txt)", (WHATSAPP,), whatsapp, "export", people=True),
    Form("Discord (DiscordChatExporter's .json)", ("guild", "channel", "messages"), discord, "export", people=True),
    Form(
        "Telegram (result.json)", ("name", "type", "messages"), telegram, "export", holds_messages("date"), people=True
    ),
    Form("PIPPA", ("bot_name", "conversation"), pippa, "export"),
    Form(
        "Open Assistant's trees",
        ("message_tree_id", "prompt"),
        tree,
        "export",
        lambda row: isinstance(row["prompt"], dict),
    ),
)


def export_of(rows: Iterable[Any]) -> Form | None:
    """The export whose fields one of a file's first rows has."""
    rows = list(rows)
    return next((export for export in EXPORTS if any(map(export.recognizes, rows))), None)


def chats_in(
    items: Iterable[tuple[str, object]], export: Form, parse: Callable[[object], Any], speaker: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield the items of an export's file, with a list of chats in place of each document, each its messages and its
    turns; a row of another form, and the UserError of a damaged one, stay. `speaker` is the name of the one whose words
    are learned."""
    for place, item in items:
        try:
            row = parse(item)
            with reading(place, f"is no whole export of {export.name}", "export it again"):
                read = export.recognizes(row)
                chats: Any = [(chat, turns_of(chat, speaker)) for chat in export.turns(row)] if read else row
        except UserError as error:
            chats = error
        yield place, chats


def speakers_in(items: Iterable[tuple[str, Any]]) -> Counter[tuple[str, str]]:
    """{(name, role): messages} of those who talk in items of chats_in."""
    chats = chain.from_iterable(item for _, item in items if isinstance(item, list))
    return Counter((each.name, each.role) for messages, _ in chats for each in messages if isinstance(each, Said))


def rows_of(
    items: Iterable[tuple[str, Any]], export: Form, speaker: str, counts: Counter[str]
) -> Iterator[tuple[str, object]]:
    """Yield items of chats_in as rows of messages; what is left out is counted."""
    for place, item in items:
        if not isinstance(item, list):
            yield place, item
            continue
        for messages, turns in item:
            counts.update(LEFT_OUT + each.what for each in messages if isinstance(each, LeftOut))
            if speaker and not any(turn["role"] == "assistant" for turn in turns):
                counts[LEFT_OUT + OTHERS_ALONE] += bool(turns)
            elif turns:
                counts[CHATS_OF + export.name] += 1
                yield place, {"messages": turns}


def turns_of(messages: list[Message], speaker: str) -> list[dict[str, Any]]:
    """The turns of messages, those of one speaker behind each other joined. If more than one other speaks, each of
    their messages begins with a name."""
    speakers = {(each.name, role_of(each, speaker)) for each in messages if isinstance(each, Said)}
    others = [name for name, role in speakers if role == "user"]
    turns = list[dict[str, Any]]()
    for each in messages:
        if isinstance(each, Said):
            role = role_of(each, speaker)
            words = f"{each.name}: {each.words}" if role == "user" and len(others) > 1 else each.words
            each = {"role": role, "content": words} | thought(each.thinking if role == "assistant" else "")
        if isinstance(each, LeftOut):
            continue
        if not any(map(each.get, (*CALLS, *LISTS))) and not each["content"].strip():
            continue
        before = turns[-1] if turns else {}
        if before.get("role") == each["role"] and len(each) == 2 and not any(map(before.get, CALLS)):
            turns[-1] = turns[-1] | {"content": f"{turns[-1]['content']}\n{each['content']}"}
        else:
            turns.append(each)
    return turns


def role_of(said: Said, speaker: str) -> str:
    return ("assistant" if said.name == speaker else "user") if speaker else said.role


def require_speaker(speakers: Counter[tuple[str, str]], export: Form, speaker: str, flag: str) -> None:
    """Raise UserError if a dialogue of people needs a `speaker`, or does not have this one, with all names."""
    numbers = Counter[str]()
    for (name, _), number in speakers.items():
        numbers[name] += number
    names = [f"{name} ({number})" for name, number in numbers.most_common()]
    if speaker and speaker not in numbers:
        raise UserError(
            f"{flag} {speaker}: nobody has that name; "
            + (f"give one of {some(names, 20)}" if names else f"{export.name} has no names, so leave it out")
        )
    heads = {name for name, role in speakers if role == "assistant"}
    if names and not speaker and (len(heads) != 1 or not all(role for _, role in speakers)):
        raise UnknownForm(
            f"it is a dialogue of {some(names, 20)} (messages); say whose words are learned, as {flag} "
            f"{next(iter(numbers))!r}, or learn all of it as a text",
            [[WHATSAPP]] if export.fields == (WHATSAPP,) else [],
        )


def opens_whatsapp(text: str) -> bool:
    """True for a text of WhatsApp's, in which two of the first lines begin with a date, a time and a name."""
    stamps = [STAMP.match(line) for line in text[:4000].splitlines()[:30]]
    return sum(bool(stamp and SAID.match(stamp[9])) for stamp in stamps) > 1


def card_in(path: Path) -> bytes:
    """The character card in a picture, JSON in base64; b"" for a picture without one."""
    data, texts, place = path.read_bytes(), dict[bytes, bytes](), len(PNG)
    while data.startswith(PNG) and place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] == b"tEXt":
            keyword, _, words = data[place + 8 : place + 8 + size].partition(b"\0")
            texts[keyword.lower()] = words
        place += size + 12  # its length, its type and its check sum
    return next((texts[name] for name in CARDS if name in texts), b"")


def require_card(path: Path) -> dict[str, Any]:
    """The row of the character card in a picture. Raises UserError for a picture without one."""
    words = card_in(path)
    if not words:
        raise UserError(
            f"{path} is a picture without a character card; those who edit or send pictures remove it, so download the "
            "card again, or take its .json"
        )
    with reading(path, "holds a damaged character card", "download it again"):
        described = json.loads(base64.b64decode(words))
        return {"spec": "chara_card", "data": described.get("data") or described}
