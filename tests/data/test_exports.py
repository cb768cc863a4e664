"""Exports of programs in which people chat become chats, by preprocess; what is not read is counted in a note."""

import base64
import io
import json
import re
import zipfile
from dataclasses import replace

import pytest

from data.documents import texts
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data import exports
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.exports import EXPORTS
from rwkv_peft.data.preprocess import main
from rwkv_peft.data.sources import build_samples

HI = "User: Hi?\n\nAssistant: Yes."
TREE = [("root", None, None), ("a", "root", "Hi?"), ("b", "a", "No."), ("c", "a", "Yes.")]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def said(name, words, **more):
    return {
        "name": name,
        "is_user": name == "Max",
        "is_system": False,
        "mes": words,
        "swipes": [words, "Other."],
    } | more


def gpt(node, parent, role, kind="text", content=None, **more):
    message = {"author": {"role": role}, "content": {"content_type": kind} | (content or {}), "metadata": {}} | more
    return node, {"id": node, "parent": parent, "children": [], "message": message}


def parts(*words):
    return {"parts": list(words)}


SILLY = lines(
    {"user_name": "Max", "character_name": "Ada", "create_date": "2024-1-1", "chat_metadata": {}},
    said("Ada", "Welcome."),
    said("Max", "Hi?"),
    said("Max", "Are you there?", swipes=[]),
    said("System", "A rule.", is_system=True),
    said("Ada", "Yes.", extra={"reasoning": "Hm.", "image": "a.png"}),
)
CARD = {
    "name": "Ada",
    "description": "{{char}} counts.",
    "personality": "calm",
    "scenario": "",
    "first_mes": "Hello, {{user}}.",
    "mes_example": "<START>\n{{user}}: Hi?\n{{char}}: Yes.\nAlways.\n<START>\n{{user}}: 1?\n{{char}}: 2.",
}
ABOUT = "System: You are Ada.\nAda counts.\nPersonality: calm\n\n"
CARD_TEXTS = [
    f"{ABOUT}Assistant: Hello, User.",
    f"{ABOUT}User: Hi?\n\nAssistant: Yes.\nAlways.",
    f"{ABOUT}User: 1?\n\nAssistant: 2.",
]
V2 = {"spec": "chara_card_v2", "spec_version": "2.0", "data": CARD | {"alternate_greetings": [], "tags": []}}


def png(*chunks):
    found = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", bytes(13)), *chunks, (b"IEND", b"")):
        found += len(data).to_bytes(4, "big") + kind + data + bytes(4)
    return found


def carded(keyword, card):
    return b"tEXt", keyword + b"\0" + base64.b64encode(json.dumps(card).encode())


WEBUI = [
    {
        "id": "1",
        "title": "T",
        "chat": {
            "params": {"system": "Be brief."},
            "messages": [],
            "history": {
                "currentId": "c",
                "messages": {
                    "a": {"id": "a", "parentId": None, "role": "user", "content": "Hi?", "files": [{"type": "image"}]},
                    "b": {"id": "b", "parentId": "a", "role": "assistant", "content": "No."},
                    "c": {
                        "id": "c",
                        "parentId": "a",
                        "role": "assistant",
                        "content": '<details type="reasoning" done="true" duration="3">\n<summary>Thought for 3 seconds'
                        "</summary>\n&gt; Hm.\n</details>\nYes.".replace("&gt;", ">"),
                    },
                },
            },
        },
    }
]
GPT = [
    {
        "title": "T",
        "current_node": "e",
        "mapping": dict(
            [
                ("r", {"id": "r", "parent": None, "children": ["s"], "message": None}),
                gpt("s", "r", "system", content=parts("")),
                gpt("a", "s", "user", "multimodal_text", parts({"content_type": "image_asset_pointer"}, "Hi?")),
                gpt("b", "a", "assistant", content=parts("No.")),
                gpt("c", "a", "assistant", "thoughts", {"thoughts": [{"summary": "S", "content": "Hm."}]}),
                gpt("d", "c", "assistant", "code", {"text": "search()"}, recipient="web"),
                gpt("e", "d", "assistant", content=parts("Yes."), recipient="all"),
            ]
        ),
    }
]
CLAUDE = [
    {
        "uuid": "1",
        "name": "T",
        "chat_messages": [
            {
                "uuid": "a",
                "sender": "human",
                "text": "Hi?",
                "content": [{"type": "text", "text": "Hi?"}],
                "attachments": [{"file_name": "a.txt", "extracted_content": "A file."}],
                "files": [{"file_name": "b.png"}],
            },
            {
                "uuid": "b",
                "sender": "assistant",
                "text": "Yes.",
                "content": [
                    {"type": "thinking", "thinking": "Hm."},
                    {"type": "tool_use", "name": "f", "input": {}},
                    {"type": "text", "text": "Yes."},
                ],
                "attachments": [],
                "files": [],
            },
        ],
    }
]
WHATSAPP = """\
31.12.23, 18:00 - Messages and calls are end-to-end encrypted.
31.12.23, 18:01 - Ada: Hi?
31.12.23, 18:01 - Ada: Are you
there?
31.12.23, 18:02 - Max: <Media omitted>
31.12.23, 18:02 - Max: Yes. <This message was edited>
01.01.24, 12:00 - Ada: Again?
01.01.24, 12:01 - Max: No: never.
"""
IPHONE = """\
[1/30/24, 6:01:02\u202fPM] Ada: Hi?
\u200e[1/30/24, 6:02:02\u202fPM] Max: \u200eimage omitted
[1/30/24, 6:02:03\u202fPM] Max: Yes.
[1/31/24, 6:02:03\u202fAM] Bo: Hm?
[1/31/24, 6:02:04\u202fAM] Ada: Ho?
[1/31/24, 6:02:09\u202fAM] Max: No.
"""
TELEGRAM = {"name": "Ada", "type": "personal_chat", "id": 1}
TELEGRAM["messages"] = [
    {
        "id": number,
        "type": "message",
        "date": f"2024-01-0{day}T12:00:0{number}",
        "from": name,
        "from_id": "u",
        "text": text,
    }
    for number, (day, name, text) in enumerate(
        [
            (1, "Ada", "Hi?"),
            (1, "Ada", ["Are ", {"type": "bold", "text": "you"}, " there?"]),
            (1, "Max", ""),
            (1, "Max", "Yes."),
            (2, "Ada", "Again?"),
            (2, "Max", "No."),
        ]
    )
]
TELEGRAM["messages"][2]["photo"] = "photo_1.jpg"
TELEGRAM["messages"].insert(1, {"id": 9, "type": "service", "date": "2024-01-01T12:00:00", "action": "pin", "text": ""})
DISCORD = {
    "guild": {"id": "0", "name": "G"},
    "channel": {"id": "1", "type": "GuildTextChat", "name": "general"},
    "messages": [
        {"id": "1", "type": "Default", "timestamp": f"2024-01-01T12:00:0{second}.123+00:00", "content": text}
        | {"author": {"id": "2", "name": name, "nickname": name.title(), "isBot": False}, "attachments": files}
        for second, name, text, files in [(1, "ada", "Hi?", []), (2, "max", "", [{"url": "u"}]), (3, "max", "Yes.", [])]
    ],
}
DISCORD["messages"].append(DISCORD["messages"][0] | {"type": "ChannelPinnedMessage", "content": "Pinned a message."})


def reply(role, words, rank=None, *replies):
    return {"message_id": words, "role": role, "text": words, "rank": rank, "replies": list(replies)}


OASST = {
    "message_tree_id": "Hi?",
    "tree_state": "ready_for_export",
    "prompt": reply(
        "prompter", "Hi?", None, reply("assistant", "No.", 1), reply("assistant", "Yes.", 0, reply("prompter", "So?"))
    ),
}
PIPPA = {"bot_id": "1", "bot_name": "Ada", "bot_description": "{{char}} counts.", "categories": None}
PIPPA["conversation"] = [
    {"message": "Hello, {{user}}.", "is_human": False},
    {"message": "Hi?", "is_human": True},
    {"message": "Yes.", "is_human": False},
]


def activity(title, *answers, **more):
    return {
        "header": "Gemini Apps",
        "title": title,
        "time": "2025-01-01T12:00:00.000Z",
        "products": ["Gemini Apps"],
        "activityControls": ["Gemini Apps Activity"],
        "safeHtmlItem": [{"html": answer} for answer in answers],
    } | more


GEMINI = [
    activity("Gave feedback: Good response"),
    activity(
        "Prompted Hi?\nAre you there?",
        "<p>No.</p>",
        '<p>Yes, <strong>I &amp; you</strong>:</p>\n<ol start="2">\n<li><p>One</p>\n<ul><li>in</li></ul></li><li>Two'
        '</li></ol>\n<pre><code class="language-python">f()\n\n\ng()\n</code></pre><table><thead><tr><th>a</th>'
        "<th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr>"
        '</tbody></table><h3>See</h3><p><a href="u">it</a><br>there'
        "</p>",
        imageFile="a.png",
    ),
    activity("Eingegebener Prompt: Hi?", "<p>Yes.</p>"),
]
ANSWER = """Yes, **I & you**:

2. One
    - in
3. Two

```python
f()


g()
```

| a | b |
| --- | --- |
| 1 | 2 |

### See

[it](u)
there"""
STUDIO = {
    "runSettings": {"temperature": 1.0, "model": "models/gemini-2.5-pro"},
    "systemInstruction": {"parts": [{"text": "Be brief."}]},
    "chunkedPrompt": {
        "chunks": [
            {"driveImage": {"id": "1"}, "role": "user", "tokenCount": 258},
            {"text": "Hi?", "role": "user", "tokenCount": 2},
            {"text": "Hm.", "role": "model", "isThought": True, "parts": [{"text": "Hm.", "thought": True}]},
            {"role": "model", "parts": [{"executableCode": {"language": "PYTHON", "code": "1"}}]},
            {"text": "Yes.", "role": "model", "finishReason": "STOP", "parts": [{"text": "Y"}, {"text": "es."}]},
        ],
        "pendingInputs": [{"text": "", "role": "user"}],
    },
}


def step(*parts, **more):
    return {"type": "contentBlock", "content": list(parts)} | more


def words(text):
    return {"type": "text", "text": text, "fromDraftModel": False, "tokensCount": 1, "isStructural": False}


STUDIO_LM = {
    "name": "T",
    "pinned": False,
    "systemPrompt": "",
    "perChatPredictionConfig": {"fields": [{"key": "llm.prediction.systemPrompt", "value": "Be brief."}]},
    "messages": [
        {
            "versions": [
                {"type": "singleStep", "role": "user", "content": [words("Ho?")]},
                {
                    "type": "singleStep",
                    "role": "user",
                    "content": [words("Hi?"), {"type": "file", "fileIdentifier": "a.png", "fileType": "image"}],
                },
            ],
            "currentlySelected": 1,
        },
        {
            "versions": [
                {
                    "type": "multiStep",
                    "role": "assistant",
                    "senderInfo": {"senderName": "m"},
                    "steps": [
                        step(words("Hm."), style={"type": "thinking", "ended": True}, prefix="<think>"),
                        step({"type": "toolCallRequest", "callId": 1, "name": "f", "parameters": {}}),
                        {"type": "toolStatus", "statusState": {}},
                        step({"type": "toolCallResult", "callId": 1, "content": "3"}, roleOverride="tool"),
                        step(words("Yes.")),
                        {"type": "debugInfoBlock", "debugInfo": "D"},
                    ],
                }
            ],
            "currentlySelected": 0,
        },
    ],
}
PRICE = {"name": "price", "parameters": {"type": "dict", "properties": {"name": {"type": "string"}}}}
TOOLS = f"Tools:\n[{json.dumps(PRICE, separators=(',', ':'))}]\nTo use a tool, return only a JSON function call.\n\n"
CALL = '```json\n{"name":"price","arguments":{"name":"it\'s"}}\n```\n\nUser: Function output:\n3\n\nAssistant: 3.'
ASKED = f"User: Hi?\n\nAssistant: {CALL}"
GLAIVE = {
    "system": "SYSTEM: You have functions. Use them if required -\n" + json.dumps(PRICE, indent=4) + "\n\n",
    "chat": 'USER: Hi?\n\n\nASSISTANT: Well. <functioncall> {"name": "price", "arguments": \'{"name": "it\\\'s"}\'} '
    "<|endoftext|>\n\n\nFUNCTION RESPONSE: 3\n\n\nASSISTANT: 3. <|endoftext|>\n\n\n",
}
PLAIN_GLAIVE = {"system": "SYSTEM: Be brief.\n\n", "chat": "USER: Hi?\n\n\nASSISTANT: Yes. <|endoftext|>\n\n\n"}
TOOLACE = {
    "system": "You compose functions. Here is a list of functions in JSON format that you can invoke:\n"
    + json.dumps([PRICE | {"name": "Price (now) API"}])
    + ". \nShould you decide to return the function call(s). \nPut it in the format of [func1(params_name=params_value"
    ", params_name2=params_value2...), func2(params)]\n\nNO other text MUST be included.",
    "conversations": [
        {"from": "user", "value": "Hi?"},
        {
            "from": "assistant",
            "value": '[Price (now) API(from="a, b)", n=[1, true, null], $x=-2.5), Price (now) API()]',
        },
        {"from": "tool", "value": "[3]"},
        {"from": "assistant", "value": "3."},
    ],
}
TOOLACE_TEXT = (
    "System: You compose functions.\n"
    + TOOLS.replace('"price"', '"Price (now) API"')
    + "User: Hi?\n\nAssistant: ```json\n"
    '[{"name":"Price (now) API","arguments":{"from":"a, b)","n":[1,true,null],"$x":-2.5}'
    '},{"name":"Price (now) API","arguments":{}}]\n```\n\nUser: Function output:\n[3]\n\nAssistant: 3.'
)
BRIEF = "System: Be brief.\n"
MAX = ("--as", "Max")
CASES = {
    "SillyTavern": (
        SILLY,
        "a.jsonl",
        ("--think", "on"),
        ["Assistant: Welcome.\n\nUser: Hi?\nAre you there?\n\nAssistant: <think>\nHm.\n</think>\nYes."],
        "1 system lines, 1 pictures",
    ),
    "SillyTavern, the user learned": (
        SILLY,
        "a.jsonl",
        MAX,
        ["User: Welcome.\n\nAssistant: Hi?\nAre you there?\n\nUser: Yes."],
        "",
    ),
    "card 1": (json.dumps(CARD), "a.json", (), CARD_TEXTS, "3 chats"),
    "card 2": (json.dumps(V2, indent=4), "a.json", (), CARD_TEXTS, ""),
    "card 2 as picture": (png(carded(b"chara", V2)), "a.png", (), CARD_TEXTS, ""),
    "card 3 as picture": (
        png(carded(b"chara", {"data": CARD | {"name": "Old"}}), carded(b"ccv3", V2 | {"spec": "chara_card_v3"})),
        "a.png",
        (),
        CARD_TEXTS,
        "",
    ),
    "Open WebUI": (
        json.dumps(WEBUI),
        "a.json",
        ("--think", "on"),
        ["System: Be brief.\n\nUser: Hi?\n\nAssistant: <think>\nHm.\n</think>\nYes."],
        "1 pictures",
    ),
    "ChatGPT": (
        json.dumps(GPT),
        "conversations.json",
        ("--think", "on"),
        ["User: Hi?\n\nAssistant: <think>\nHm.\n</think>\nYes."],
        "1 pictures, files and sounds, 1 calls of tools",
    ),
    "Claude": (
        json.dumps(CLAUDE, indent=1),
        "conversations.json",
        ("--think", "on"),
        ["User: A file.\nHi?\n\nAssistant: <think>\nHm.\n</think>\nYes."],
        "1 pictures, files and sounds, 1 calls of tools",
    ),
    "WhatsApp": (
        WHATSAPP,
        "chat.txt",
        MAX,
        ["User: Hi?\nAre you\nthere?\n\nAssistant: Yes.", "User: Again?\n\nAssistant: No: never."],
        "1 system lines, 1 pictures",
    ),
    "Telegram": (
        json.dumps(TELEGRAM, indent=1),
        "result.json",
        MAX,
        ["User: Hi?\nAre you there?\n\nAssistant: Yes.", "User: Again?\n\nAssistant: No."],
        "1 system lines, 1 pictures",
    ),
    "Discord": (
        json.dumps(DISCORD, indent=2),
        "general.json",
        MAX,
        [HI],
        "1 pictures, files and sounds, 1 system lines",
    ),
    "PIPPA": (
        lines(PIPPA),
        "pippa.jsonl",
        (),
        ["System: You are Ada.\nAda counts.\n\nAssistant: Hello, User.\n\nUser: Hi?\n\nAssistant: Yes."],
        "1 chat",
    ),
    "Open Assistant": (lines(OASST), "oasst.jsonl", (), [f"{HI}\n\nUser: So?"], "1 other replies"),
    "Gemini": (
        json.dumps(GEMINI, indent=2),
        "MyActivity.json",
        (),
        [f"User: Hi?\nAre you there?\n\nAssistant: {ANSWER}", HI],
        "(2 chats); left out: 1 activities other than prompts, 1 pictures, files and sounds, 1 other replies",
    ),
    "AI Studio": (
        json.dumps(STUDIO, indent=2),
        "Notes on v1.5",
        ("--think", "on"),
        [f"{BRIEF}\nUser: Hi?\n\nAssistant: <think>\nHm.\n</think>\nYes."],
        "1 pictures, files and sounds, 1 calls of tools",
    ),
    "LM Studio": (
        json.dumps(STUDIO_LM, indent=2),
        "1.conversation.json",
        ("--think", "on"),
        [f"{BRIEF}\nUser: Hi?\n\nAssistant: <think>\nHm.\n</think>\nYes."],
        "2 calls of tools and their results, 1 pictures, files and sounds",
    ),
    "Glaive": (
        json.dumps([GLAIVE, PLAIN_GLAIVE]),
        "glaive.json",
        (),
        [
            f"System: You have functions. Use them if required\n{TOOLS}"
            + ASKED.replace("```json", "Well.\n```json", 1),
            f"{BRIEF}\n{HI}",
        ],
        "2 chats",
    ),
    "ToolACE": (json.dumps([TOOLACE], indent=1), "data.json", (), [TOOLACE_TEXT], "1 chat"),
    "WhatsApp, iPhone, three people": (
        IPHONE,
        "_chat.txt",
        MAX,
        ["User: Hi?\n\nAssistant: Yes.", "User: Bo: Hm?\nAda: Ho?\n\nAssistant: No."],
        "2 chats",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_export_becomes_chats_and_a_note_counts_what_is_left_out(preprocess, capsys, name):
    content, file, flags, chats, note = CASES[name]
    found = texts(preprocess(content, *flags, name=file))
    assert [text for text, _ in found] == chats
    assert all(words and "Hi?" not in words or "--as" in flags for _, words in found)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: read ")]
    assert note in line


def test_a_dialogue_of_people_asks_whose_words_are_learned_and_each_remedy_works(preprocess):
    with pytest.raises(UserError, match=r"Ada \(3\), Max \(2\)") as refused:
        preprocess(WHATSAPP, name="chat.txt")
    (name,) = re.findall(r"--as '(\w+)'", str(refused.value))
    (field,) = re.findall(r"--fields (\w+)", str(refused.value))
    assert texts(preprocess(WHATSAPP, "--as", name, name="chat.txt"))
    assert texts(preprocess(WHATSAPP, "--fields", field, name="chat.txt")) == [(WHATSAPP, WHATSAPP)]
    with pytest.raises(UserError, match="--as Eve: nobody has that name; give one of Ada"):
        preprocess(WHATSAPP, "--as", "Eve", name="chat.txt")
    with pytest.raises(UserError, match="--as Eve: these rows are no dialogue of people"):
        preprocess([{"text": "T"}], "--as", "Eve")
    group = SILLY + lines(said("Bo", "I, too."))
    with pytest.raises(UserError, match="Ada .2., Max .2., Bo .1."):
        preprocess(group, name="a.jsonl")


def test_train_reads_exports_by_the_same_code(answers, tmp_path):
    config = answers("sft")([], sft_as="Max", ctx_len=64)
    (tmp_path / "chat.txt").write_text(WHATSAPP)
    config = config.__class__(**vars(config) | {"path": str(tmp_path / "chat.txt")})
    samples = build_samples(config, 257)
    assert len(samples) and any("2 chats" in note for note in samples.row_notes)


def damaged(content, seed):
    """The content with a value of its JSON, or a piece of its text, replaced."""
    text = content.decode("latin-1") if isinstance(content, bytes) else content
    places = [match.start() for match in re.finditer(r'[\[{":,]', text)] or range(len(text))
    place = places[seed * 7919 % len(places)]
    broken = (text[:place], text[:place] + "7" + text[place + 1 :], text[:place] + "null" + text[place:])[seed % 3]
    return broken.encode("latin-1") if isinstance(content, bytes) else broken


VALUES = (None, 7, "x", [], {}, [7], {"x": None}, True)


def variants(value):
    """Copies of a value with each of its parts replaced, or left out."""
    yield from VALUES
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for name, part in pairs:
        for new in variants(part):
            yield {**value, name: new} if isinstance(value, dict) else [*value[:name], new, *value[name + 1 :]]
        if isinstance(value, dict):
            yield {other: part for other, part in pairs if other != name}


@pytest.mark.parametrize(
    "export",
    [V2, CARD, WEBUI[0], GPT[0], CLAUDE[0], OASST, PIPPA, GEMINI[1], STUDIO, STUDIO_LM, GLAIVE, TOOLACE],
    ids=lambda row: next(iter(row)),
)
def test_a_damaged_export_gets_a_message(preprocess, export):
    """In one file for each, whose bad rows are reported together."""
    rows = [row for row in variants(export) if isinstance(row, dict)]
    assert len(rows) > (15 if export is GLAIVE else 50)  # which has two texts alone
    preprocess([export, *rows], "--skip_bad_rows")


def test_words_behind_a_call_are_an_answer_of_their_own(preprocess):
    said = [*TOOLACE["conversations"][:2], {"from": "assistant", "value": "Wait."}]
    ((text, _),) = texts(preprocess([TOOLACE | {"conversations": said}]))
    assert text.endswith("```\n\nAssistant: Wait.")


@pytest.mark.parametrize("name", [["Ada"], {"x": 1}])
def test_a_name_that_is_no_text_gets_a_message(preprocess, name):
    with pytest.raises(UserError, match="no whole export of SillyTavern"):
        preprocess(SILLY.replace('"name": "Ada"', f'"name": {json.dumps(name)}', 1), name="a.jsonl")


@pytest.mark.parametrize("name", ["SillyTavern", "card 3 as picture", "WhatsApp", "Telegram", "Discord"])
def test_a_damaged_file_of_an_export_gets_a_message(preprocess, name):
    content, file, flags, *_ = CASES[name]
    for seed in range(40):
        try:
            preprocess(damaged(content, seed), *flags, name=file)
        except UserError as error:
            assert "Traceback" not in str(error)


@pytest.mark.parametrize("export, file", [("WhatsApp", "chat.txt"), ("SillyTavern", "a.jsonl")])
def test_a_file_that_is_one_dialogue_is_parsed_once(preprocess, monkeypatch, export, file):
    (form,) = [each for each in EXPORTS if each.name.startswith(export)]
    calls = []
    monkeypatch.setattr(exports, "EXPORTS", [replace(form, turns=lambda row: calls.append(1) or form.turns(row))])
    assert texts(preprocess(CASES[export][0], *MAX, name=file)) and len(calls) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_cards_in_a_folder_are_read_and_other_pictures_left_out(preprocess, tmp_path, capsys, packed):
    files = {"cards/ada.png": png(carded(b"chara", V2)), "cards/photo.png": png(), "README.md": b"x"}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, part in files.items():
            archive.writestr(name, part)
    path = tmp_path / "cards.zip"
    path.write_bytes(content.getvalue())
    if not packed:
        zipfile.ZipFile(path).extractall(path := tmp_path / "mine")
    assert main([str(path), "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]) == 0
    assert [text for text, _ in texts(BinidxDataset(tmp_path / "out"))] == CARD_TEXTS
    assert "left out README.md, cards/photo.png" in capsys.readouterr().out


def test_the_guide_lists_every_export(request):
    guide = (request.config.rootpath / "docs" / "guides" / "data.md").read_text(encoding="utf-8")
    assert all(export.name.partition(" (")[0] in guide for export in EXPORTS)
