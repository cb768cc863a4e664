"""The names of a token set's files, and its record beside them, in a PREFIX.json or a run's config.json: the tokenizer
that made the tokens, the layout of the rows. Nothing here imports numpy, so that flags are checked at once."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoints.atomic import same_file
from ..checkpoints.readable import object_in
from ..cli.errors import UserError, short
from ..cli.names import HERMES, RUN, is_whole
from .chat import CHAT, KNOWN, ChatLayout
from .tokenizer import KNOWN_SIZES, Tokenizer, load_tokenizer
from .tools import TOOL_FORMS

ENDINGS = (".bin", ".idx", ".mask", ".weights")  # of the files of a set; it may lack the last two
# entries of a record: the Vocabulary, the opening of answers
ENTRY, OPENING = "vocabulary", "opening"
# and of the layout of chats: false if turns are not cleaned, the name of the form of tools
CLEAN, TOOL_FORM = "clean_turns", "tool_form"
PROMPTS = {last: f"{openings[0]} …\\n\\n{last}" for openings, last in KNOWN if last != "Assistant:"}


class Vocabulary(NamedTuple):
    """A tokenizer's name (world, bytes or a path), a hash of its tokens, and the size of its vocabulary."""

    name: str
    hash: str
    size: int

    def __str__(self) -> str:
        return f"{short(self.name)} ({self.size:,} tokens, {short(self.hash)})"


def binidx_prefix(path: str | Path) -> str:
    """PREFIX, PREFIX.bin or PREFIX.idx -> PREFIX."""
    text = str(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


def default_mask(prefix: str | Path) -> str:
    """The --loss_mask of token files if none is given: "file" if they have a .mask file, else "none"."""
    return "file" if Path(binidx_prefix(prefix) + ".mask").is_file() else "none"


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The Vocabulary of a tokenizer; a file is named by its absolute path, so that it is found from other folders."""
    digest = hashlib.blake2b(tokenizer.content(), digest_size=8).hexdigest()
    name = tokenizer.name if tokenizer.name in dict(KNOWN_SIZES).values() else str(Path(tokenizer.name).resolve())
    return Vocabulary(name, digest, tokenizer.vocab_size)


def record_path(prefix: str | Path) -> Path:
    return Path(binidx_prefix(prefix) + ".json")


def record_of(tokenizer: Tokenizer, inputs: Iterable[str | Path], chat: ChatLayout = CHAT) -> str:
    """The text of PREFIX.json: the Vocabulary of a tokenizer, a hash of the inputs' names, TOOL_FORM, and CLEAN if it
    is false."""
    names = "\n".join(str(Path(path).resolve()) for path in inputs)
    made_of = hashlib.blake2b(names.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    record = {ENTRY: vocabulary_of(tokenizer)._asdict(), "inputs": made_of, TOOL_FORM: chat.tool_form.name}
    return json.dumps(record | ({} if chat.clean else {CLEAN: False})) + "\n"


def check_record(prefix: str, inputs: Iterable[str | Path], record: str, overwrite: bool = False) -> None:
    """Raise UserError if the record of PREFIX would replace an input, or a file of another tool; and if there is a data
    set PREFIX of other inputs or another tokenizer, unless it is to be overwritten."""
    path = record_path(prefix)
    if any(same_file(path, file) for file in inputs):
        raise UserError(f"--output {prefix} writes {path}, which is an input; choose another PREFIX")
    found = object_in(path)
    if path.exists() and not isinstance(found.get(ENTRY), dict):
        raise UserError(f"--output {prefix} writes {path}, which another tool made; choose another PREFIX")
    old = next((file for end in ENDINGS if os.path.lexists(file := prefix + end)), None)
    if old is not None and not overwrite and found != json.loads(record):
        raise UserError(
            f"--output {prefix}: {old} exists, made from other inputs, with another tokenizer, --clean_turns or "
            "--tool_form; choose another PREFIX, or replace the old files with --overwrite"
        )


def read_record(path: str | Path) -> Vocabulary | None:
    """The Vocabulary in a PREFIX.json or a run's config.json; None if it is missing, or another tool's."""
    entry = object_in(path).get(ENTRY)
    if not isinstance(entry, dict):
        return None
    name, digest, size = map(entry.get, Vocabulary._fields)
    if isinstance(name, str) and isinstance(digest, str) and is_whole(size):
        return Vocabulary(name, digest, size)
    return None


def recorded_of_data(prefix: str | Path) -> Vocabulary | None:
    return read_record(record_path(prefix))


def chat_of(settings: Mapping[str, Any]) -> ChatLayout:
    """The layout of chats by a record's entries, or a run's settings of data. Those without a form of tools are of
    versions that knew Hermes alone."""
    form = TOOL_FORMS.get(str(settings.get(TOOL_FORM)), TOOL_FORMS[HERMES])
    return ChatLayout(clean=settings.get(CLEAN) is not False, tool_form=form)


def chat_in(prefix: str | Path) -> ChatLayout:
    """The layout of the chats in the token files PREFIX, by their record, the default one without."""
    found = object_in(record_path(prefix))
    return chat_of(found) if ENTRY in found else CHAT


def runs_beside(*paths: str | Path | None) -> Iterator[Path]:
    """Yield the paths of a run's settings in the folders that are, or hold, these paths."""
    return (Path(path if os.path.isdir(path) else Path(path).parent, RUN) for path in paths if path)


def recorded_beside(*paths: str | Path | None) -> Vocabulary | None:
    """The Vocabulary of the first run with a folder that is, or holds, one of these paths; None if there is none."""
    return next(filter(None, map(read_record, runs_beside(*paths))), None)


def chat_beside(*paths: str | Path | None, clean: bool | None = None, tool_form: str | None = None) -> ChatLayout:
    """The layout of the chats of that run, or the default one, unless flags give another."""
    runs = (object_in(path).get("data") for path in runs_beside(*paths))
    data = next((data for data in runs if isinstance(data, dict)), None)
    found = CHAT if data is None else chat_of(data)
    form = TOOL_FORMS[tool_form] if tool_form else found.tool_form
    return replace(found, clean=found.clean if clean is None else clean, tool_form=form)


def prompt_beside(*paths: str | Path | None) -> str:
    """The prompt, with escapes, in the layout of the rows of that run; "" if they are chats, or of no known layout."""
    opening = next(filter(None, map(object_in, runs_beside(*paths))), {}).get(OPENING)
    return PROMPTS.get(opening, "") if isinstance(opening, str) else ""


def flags_beside(*paths: str | Path | None) -> str:
    """The flags of generate for a prompt in the layout of the rows of that run: --prompt, or --chat."""
    prompt = prompt_beside(*paths)
    return f"--escapes --prompt '{prompt}'" if prompt else "--chat"


def note_on_chats(*paths: str | Path | None) -> str:
    """A note for a chat with a model that learned another layout; "" for any other."""
    prompt = prompt_beside(*paths)
    return prompt and (
        "note: the rows of this run ask in another layout than a chat, in which it may answer as if it had learned "
        f"nothing; a prompt in theirs is '{prompt}'"
    )


def remarks(data: Vocabulary | None, base: Vocabulary | None, vocab_size: int) -> list[str]:
    """The lines to print on the Vocabularies of data and base (None: unknown), for a base of vocab_size tokens."""
    if data is None:
        return []
    if base is not None and base.hash != data.hash:
        return [f"note: the data was made with {data}, and the base's run with {base}"]
    if base is None and (why := doubt(data, vocab_size)):
        return [f"note: the data was made with {data}, and {why}"]
    return [f"tokenizer {data}"]


def doubt(vocabulary: Vocabulary, vocab_size: int) -> str:
    """The reason why a model of vocab_size tokens was probably trained with another Vocabulary, "" if there is none."""
    known = dict(KNOWN_SIZES)
    if vocab_size in known and vocabulary.name in known.values() and vocabulary.name != known[vocab_size]:
        return f"a vocabulary of {vocab_size:,} tokens is that of {known[vocab_size]}"
    if 2 * vocabulary.size <= vocab_size:
        return f"it lacks most of the model's {vocab_size:,} tokens; is it the model's tokenizer?"
    return ""


def usual(vocab_size: int) -> str:
    """The tokenizer of most models of vocab_size tokens, as the end of a sentence; "" if none is known."""
    known = dict(KNOWN_SIZES).get(vocab_size)
    return f", such as {known}" if known else ""


def require_fitting(data: Vocabulary | None, path: str, vocab_size: int) -> None:
    """Raise UserError if the Vocabulary of the data at path has more tokens than the model, used or not."""
    if data is not None and data.size > vocab_size:
        raise UserError(
            f"{path} was made with {data}, and the model has {vocab_size:,} tokens; make the data with the tokenizer "
            f"that the model was trained with{usual(vocab_size)}"
        )


def require_same(data: Vocabulary | None, path: str, measured: Vocabulary | None, given: str) -> None:
    """Raise UserError if the data to train on and the data to measure have different Vocabularies (None: unknown)."""
    if data is not None and measured is not None and data.hash != measured.hash:
        raise UserError(
            f"{given} was made with {measured}, and --data_file {path} with {data}, so that one number "
            "is another text in each; preprocess both with one tokenizer"
        )


def find_tokenizer(
    name: str | None, vocab_size: int, recorded: Vocabulary | None = None, say: Callable[[str], object] | None = None
) -> Tokenizer:
    """Load the tokenizer called name; without a name the recorded one, or else the usual one for vocab_size.

    It calls say(text) with a line if the tokenizer differs from the recorded one, or if none is recorded and it is
    probably not the model's."""
    given = name
    if name is None and recorded is not None:
        name = recorded.name
        if not (name in dict(KNOWN_SIZES).values() or Path(name).is_file()):
            raise UserError(f"the run's tokenizer was {recorded}, and that file is gone; give it as --tokenizer")
    if name is None:
        name = dict(KNOWN_SIZES).get(vocab_size)
    if name is None:
        raise UserError(
            f"the model has a vocabulary of {vocab_size} tokens, which no known tokenizer has; give --tokenizer "
            "world, bytes, or the file that it was trained with"
        )
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > vocab_size:
        what = "--tokenizer" if given else "the tokenizer"
        raise UserError(
            f"{what} {name} has {tokenizer.vocab_size:,} tokens, and the model {vocab_size:,}; give the tokenizer that "
            f"it was trained with{usual(vocab_size)}"
        )
    if recorded is not None and say is not None and vocabulary_of(tokenizer).hash != recorded.hash:
        changed = "" if given else ": the file has changed since"
        say(f"note: the run was trained with {recorded}, and this is {vocabulary_of(tokenizer)}{changed}")
    if recorded is None and say is not None and (why := doubt(vocabulary_of(tokenizer), vocab_size)):
        say(f"note: the tokenizer is {vocabulary_of(tokenizer)}, and {why}")
    return tokenizer
