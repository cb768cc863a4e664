"""A tokenizer's vocabulary and the layout of chats in the forms of other tools: GGUF's lists, a Hugging Face folder.

The chat template is the layout of training (data/chat.py) in Jinja, and holds its ToolForm (data/tools.py) as a
variable. It differs from the layout of rows in three things: a blank line ends the last turn, too; arguments of a call
that are given as text stay as they are spelled; results of tools stay in the order in which they are given. The parts
that count in the loss are marked as generated: an answer, the blank line behind it, and the name of the next speaker.
`think`, a mode of --think, opens the next answer, and ends the last turn of the user, as --think does.

World takes the longest token that begins at a place, which no order of merges does. A regular expression does: the tree
of the tokens' bytes, with branches that begin with different bytes and optional ends. The last token that ended on the
way remains where no branch goes on. It cuts the text; the model is then a table of whole words.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from ..cli.errors import UserError
from ..data.chat import CHAT, EFFORTS, ENABLED, LENGTHS, ONLY_CALLS, QUOTE, SPEAKERS, THINK, TURN_END, ChatLayout
from ..data.tokenizer import WORLD_END, JsonTokenizer, Tokenizer

SEPARATORS = (", ", ": ")  # tojson's own
CLEANING = (  # as ChatLayout.cleaned
    "{%- if name != 'Assistant' -%}"
    r"{%- set lines = turn.words.replace('\r\n', '\n').split('\n') -%}"
    "{%- set turn.words = '' -%}"
    "{%- for line in lines if line -%}"
    r"{%- set turn.words = turn.words + ('\n' if turn.words else '') + line -%}"
    "{%- endfor -%}"
    "{%- set turn.words = turn.words|trim -%}"
    "{%- if form.result and turn.words.startswith(form.result|trim) -%}"
    f"{{%- set turn.words = '{QUOTE}' + turn.words -%}}"
    "{%- endif -%}"
    "{%- endif -%}"
)
LENGTHENING = (  # as with_length
    "{%- if loop.index0 == told.asked and turn.words -%}"
    f"{{%- set told.ending = { {name: mode.words for name, mode in THINK.items()} }[think] if think else '' -%}}"
    f"{{%- for words in {list(LENGTHS)} -%}}"
    "{%- if turn.words.endswith(words) -%}{%- set told.ending = '' -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set turn.words = turn.words + told.ending -%}"
    "{%- endif -%}"
)
ENABLING = str(dict(ENABLED))
# llama.cpp gives enable_thinking=true unless a client says otherwise, so that true asks for nothing there
DISABLING = str({True: "", False: ENABLED[False]})
ASKED = (  # the mode of the thinking: of the three settings by which clients ask for it, the first that is given counts
    f"{{%- set modes = { {name: name for name in THINK} | dict(EFFORTS) } -%}}"
    f"{{%- set enabled = {ENABLING}[enable_thinking] if enable_thinking is boolean else '' -%}}"
    "{%- set asked = think or reasoning_effort or enabled -%}"
    "{%- if asked and asked not in modes -%}"
    "{{- raise_exception('the thinking ' + asked|string + ' is none of ' + modes.keys()|join(', ')) -}}"
    "{%- endif -%}"
    "{%- set think = modes[asked] if asked else '' -%}"
)
TEMPLATE = (  # of a layout with the ToolForm `form`
    f"{ASKED}"
    f"{{%- set names = { {role: name for role, name in SPEAKERS.items() if role not in ONLY_CALLS} } -%}}"
    "{%- set told = namespace(tools='', asked=-1, ending='') -%}"
    "{%- for message in messages -%}"
    "{%- if names[message['role']|lower] == 'User' -%}{%- set told.asked = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for tool in tools or [] -%}"
    "{%- set told.tools = told.tools + (form.listing[1] if told.tools else '') -%}"
    "{%- set told.tools = told.tools + (tool['function'] if tool['function'] is defined else tool)|tojson -%}"
    "{%- endfor -%}"
    "{%- if tools -%}"
    "{%- set told.tools = form.listing[0] + told.tools + form.listing[2] -%}"
    "{%- if names[messages[0]['role']|lower] != 'System' -%}{{- 'System: ' + told.tools + '\n\n' -}}{%- endif -%}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- set name = names[message['role']|lower] or raise_exception('the role ' + message['role'] + ' has no name') -%}"
    "{%- set content = message['content'] or '' -%}"
    "{%- set turn = namespace(words=content if content is string else '') -%}"
    "{%- for part in ([] if content is string else content) -%}"
    "{%- if part['text'] is not string -%}{{- raise_exception('a part of a content is no text') -}}{%- endif -%}"
    "{%- set turn.words = turn.words + part['text'] -%}"
    "{%- endfor -%}"
    f"{CLEANING}"
    "{%- set turn.words = turn.words|trim -%}"
    f"{LENGTHENING}"
    "{%- set calls = message['tool_calls'] or [] -%}"
    "{%- set brackets = form.brackets if calls|length > 1 else ['', ''] -%}"
    "{%- for called in calls -%}"
    "{%- set call = called['function'] if called['function'] is defined else called -%}"
    "{%- set given = call['arguments'] or {} -%}"
    "{%- set given = given if given is string else given|tojson -%}"
    "{%- set given = form.separators[0] + '\"arguments\"' + form.separators[1] + given -%}"
    "{%- set begin = ('\n' if turn.words else '') + form.calls[0] + brackets[0] if loop.first else form.calls[1] -%}"
    "{%- set call = begin + '{\"name\"' + form.separators[1] + call['name']|tojson + given + '}' -%}"
    "{%- set turn.words = turn.words + call + (brackets[1] + form.calls[2] if loop.last else '') -%}"
    "{%- endfor -%}"
    "{%- if loop.first and name == 'System' and tools -%}"
    "{%- set turn.words = turn.words + ('\n' if turn.words else '') + told.tools -%}"
    "{%- endif -%}"
    "{%- if name == 'Tool' -%}"
    "{%- set name = form.speaker -%}"
    "{%- set turn.words = (form.result + turn.words)|trim -%}"
    "{%- endif -%}"
    "{%- set words = ' ' + turn.words + '\n\n' -%}"
    "{%- if name == 'Assistant' -%}{{- 'Assistant:' -}}{% generation %}{{- words -}}{% endgeneration %}"
    "{%- elif loop.previtem is defined and names[loop.previtem['role']|lower] == 'Assistant' -%}"
    "{% generation %}{{- name + ':' -}}{% endgeneration %}{{- words -}}"
    "{%- else -%}{{- name + ':' + words -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    f"{{{{- 'Assistant:' + ({ {name: mode.opening for name, mode in THINK.items()} }[think] if think else '') -}}}}"
    "{%- endif -%}"
)
MARKS_OF_LOSS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
# Parts of llama.cpp do not interpret templates but recognize some by a piece of their text, which a comment holds here.
KNOWN_BY = r"{#- {{- 'User: ' + message['content']|trim + '\n\n' -}} -#}"


def chat_template(chat: ChatLayout = CHAT) -> str:
    """The template of a layout of chats."""
    form = {name: value if isinstance(value, str) else list(value) for name, value in vars(chat.tool_form).items()}
    template = TEMPLATE if chat.clean else TEMPLATE.replace(CLEANING, "")
    if chat.tool_form.separators != SEPARATORS:
        template = template.replace("|tojson", "|tojson(separators=form.separators)")
    return f"{{%- set form = {form} -%}}{template}"


def gguf_template(chat: ChatLayout = CHAT) -> str:
    """The template of a layout of chats for llama.cpp, without marks of the parts that count in the loss."""
    return KNOWN_BY + MARKS_OF_LOSS.sub("", chat_template(chat)).replace(ENABLING, DISABLING)


FOLDER_SETTINGS = MappingProxyType(
    {
        "chat_template": chat_template(),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ("input_ids", "attention_mask"),
        "padding_side": "left",  # what is generated goes on from the right
    }
)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens


MARKS = MappingProxyType(dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), WORLD_END))
VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
UNSEEN = tuple(byte for byte in range(256) if byte not in VISIBLE)
# the character that stands for each byte in the library's ByteLevel
CHARACTERS = "".join(chr(byte if byte in VISIBLE else 256 + UNSEEN.index(byte)) for byte in range(256))
Tree = dict[str, Any]  # {character: the tree behind it, "": whether a token ends here}


class GgufVocabulary(NamedTuple):
    """A vocabulary as GGUF holds it.

    model and pre are llama.cpp's names for the tokenizer and its pre-tokenizer; tokens and types have an entry for each
    id of the model; merges are byte-level BPE's; end is the token that ends a document and turn_end the one that
    ends a turn of a chat, or None; chat is the layout of its template.
    """

    model: str
    tokens: list[bytes]
    types: list[int]
    end: int | None
    turn_end: int | None
    pre: str = ""
    merges: tuple[str, ...] = ()
    chat: ChatLayout = CHAT


def gguf_vocabulary(tokenizer: Tokenizer, size: int) -> GgufVocabulary:
    """Make the GgufVocabulary of a tokenizer, padded to the model's size. Raises UserError for a tokenizer.json that
    llama.cpp cannot reproduce."""
    if isinstance(tokenizer, JsonTokenizer):
        return _byte_level_bpe(tokenizer, size)
    return table_vocabulary(tokenizer.token_bytes, size)


def table_vocabulary(table: Sequence[bytes | None], size: int) -> GgufVocabulary:
    """Make the GgufVocabulary of the first `size` entries of a table {id: bytes} (None: an unused id), as RWKV's own
    vocabularies have it: token 0 ends a document."""
    tokens, types = [], []
    for token in range(size):
        content = table[token] if token < len(table) else None
        # llama.cpp reads a token's text as the inside of a Python bytes literal
        text = "<s>" if token == 0 else f"[PAD{token}]" if content is None else repr(content)[2:-1]
        tokens.append(text.encode())
        types.append(CONTROL if token == 0 else UNUSED if content is None else NORMAL)
    turn_end = next((token for token, content in enumerate(table[:size]) if content == TURN_END.encode()), None)
    return GgufVocabulary("rwkv", tokens, types, 0, turn_end)


def _byte_level_bpe(tokenizer: JsonTokenizer, size: int) -> GgufVocabulary:
    """Make the GgufVocabulary of a byte-level BPE like GPT-2's, which GPT-NeoX and RWKV's Pile models use (llama.cpp:
    gpt-2). Raises UserError for any other tokenizer.json."""
    content = json.loads(tokenizer.path.read_text(encoding="utf-8"))
    model, before = content["model"], content.get("pre_tokenizer") or {}
    normalizer = (content.get("normalizer") or {}).get("type")
    if (
        model.get("type") != "BPE"
        or model.get("byte_fallback")
        or before.get("type") != "ByteLevel"
        or before.get("add_prefix_space")
        or not before.get("use_regex", True)
        or normalizer not in (None, "NFC")
    ):
        raise UserError(
            f"--tokenizer {tokenizer.name} is no byte-level BPE as GPT-2 and GPT-NeoX have it, the one kind of "
            "tokenizer.json that is written to GGUF here; convert to a Hugging Face folder, which holds any"
        )
    tokens = [f"[PAD{token}]".encode() for token in range(size)]
    types = [UNUSED] * size
    for text, token in model["vocab"].items():
        tokens[token], types[token] = text.encode(), NORMAL
    for token, text in tokenizer.added.items():
        tokens[token], types[token] = text.encode(), CONTROL if text in tokenizer.special else USER_DEFINED
    merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    turn_end = tokenizer.encode(TURN_END)
    one = turn_end[0] if len(turn_end) == 1 else None
    return GgufVocabulary("gpt2", tokens, types, tokenizer.end_id, one, "gpt-2", merges)


def hf_files(tokenizer: Tokenizer, size: int, chat: ChatLayout = CHAT) -> dict[str, bytes]:
    """Make {name: bytes} of a tokenizer's files in a Hugging Face folder, which transformers loads by itself, with
    the template of a layout of chats."""
    if isinstance(tokenizer, JsonTokenizer):
        content = tokenizer.path.read_bytes()
        marks: Mapping[str, str] = {"eos_token": tokenizer.end_token} if tokenizer.end_token else {}
    else:
        content, marks = world_json(tokenizer.token_bytes, size), MARKS
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **marks, **FOLDER_SETTINGS}
    settings["chat_template"] = chat_template(chat)
    return {"tokenizer.json": content, "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode()}


def world_json(table: Sequence[bytes | None], size: int) -> bytes:
    """Make the tokenizer.json of the first `size` entries of a table {id: bytes} (None: an id without a token)."""
    words: dict[str, int] = {WORLD_END: 0}
    for number in range(1, size):
        content = table[number] if number < len(table) else None
        words[f"[PAD{number}]" if content is None else "".join(CHARACTERS[byte] for byte in content)] = number
    tokens = [word for word, number in words.items() if number < len(table) and table[number]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": longest(tokens)}, "behavior": "Isolated", "invert": False}
    end = {"id": 0, "content": WORLD_END, "special": True}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [end | plain],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level, cut]},
            "decoder": byte_level,
            "model": {"type": "WordLevel", "vocab": words, "unk_token": ""},  # what has no token is an error
        },
        ensure_ascii=False,
    ).encode()


def longest(words: Iterable[str]) -> str:
    """Write a regular expression that matches the longest of the words which begins at a place."""
    root: Tree = {}
    for word in words:
        tree = root
        for character in word:
            tree = tree.setdefault(character, {})
        tree[""] = True
    return _expression(root)


def _expression(tree: Tree) -> str:
    """The expression of a tree's continuations; large branches come first, since they are the likely ones."""
    rest = {character: _expression(below) for character, below in tree.items() if character}
    last = "".join(_literal(character) for character, more in rest.items() if not more)
    branches = sorted((_literal(character) + more for character, more in rest.items() if more), key=len, reverse=True)
    leaves = ["[" + last.replace("-", r"\-") + "]"] if last else []
    either = "|".join(leaves + branches)
    return f"(?:{either})" + "?" * ("" in tree) if either else ""


def _literal(character: str) -> str:
    return "\\" + character if character in r"^$\.*+?()[]{}|/" else character
