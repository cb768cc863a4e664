"""The models that requests name: the base, and adapters and states on it, loaded and dropped while the server runs."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ...checkpoints.adapters import adapter_of_run, source_of
from ...checkpoints.base import open_base
from ...checkpoints.readable import within
from ...cli.errors import UserError, short
from ...data.asked import clean_beside, note_on_chats
from ...data.recorded import find_tokenizer, recorded_beside
from ..loading import load_model, resolve_device
from ..voices import Voice, adapter_voice, state_voice
from .flags import NAME
from .gate import Refused


def tell(text: str) -> None:
    print(text, file=sys.stderr)


class Catalog:
    """Voices by name: those that the command line names, and what `load` adds from below --files."""

    def __init__(self, args: argparse.Namespace) -> None:
        device = resolve_device(args.device)
        precision = args.precision or ("bf16" if device == "cuda" else "fp32")
        self.args, self.base = args, open_base(args.model)
        rounds = {"weights": args.weights, "keep": args.keep_weights}
        model, start = load_model(args.model, (), precision, device, **rounds, say=tell)
        self.own = Voice(args.name, model, start)
        files = [given.path for given in (*args.adapter, *args.state)]
        files = [*reversed(files), args.model]
        recorded = recorded_beside(*files)
        self.clean = clean_beside(*files) if args.clean_turns is None else args.clean_turns
        if note := note_on_chats(*files):
            tell(note)
        self.tokenizer = find_tokenizer(args.tokenizer, model.config.vocab_size, recorded)
        self.voices = {args.name: self.own}
        self.pairs: dict[tuple[Voice, Voice], Voice] = {}
        self.since = int(time.time())
        for given in args.adapter:
            self.voices[given.name] = self._adapter(given.name, given.path)
        for given in args.state:
            self.voices[given.name] = self._state(given.name, given.path)
        self.lasting = frozenset(self.voices)
        self.most = len(self.voices) + args.max_loaded

    def __getitem__(self, name: str) -> Voice:
        """The voice of a name. Raises Refused for an unknown one."""
        if name not in self.voices:
            message = f"there is no model {short(name)!r} here; GET /v1/models lists them"
            raise Refused(404, message, "model", "model_not_found")
        return self.voices[name]

    def voice(self, name: str, state: str | None) -> Voice:
        """The voice of a name, from the start of another that is a state. Raises Refused for unknown ones."""
        voice, other = self[name], None if state is None else self[state]
        if other is None:
            return voice
        if other.model is not self.own.model or other.start is None:
            raise Refused(400, f"state: {state} is none; load one by --state, or as the kind state", "state")
        return self.pairs.setdefault((voice, other), Voice(name, voice.model, other.start))

    def told(self, name: str) -> dict[str, Any]:
        """A model as OpenAI lists it."""
        self[name]
        parent = None if name == self.own.name else self.own.name
        return {"id": name, "object": "model", "created": self.since, "owned_by": "rwkv-peft", "parent": parent}

    def load(self, name: str, file: str, kind: str) -> None:
        """Load an adapter or a state from below --files, one at a time. Raises Refused for a name that is taken or
        none, for one too many, for a file that lies elsewhere, and for what is in it."""
        path = self.below(file)
        if not NAME.fullmatch(name):
            raise Refused(400, "a name has at most 64 letters, digits and ._:+-", "name")
        if name in self.voices:
            raise Refused(409, f"there is a model {name} already; drop it first, or give another name", "name")
        if len(self.voices) >= self.most:
            raise Refused(409, f"{self.args.max_loaded} are loaded; drop one, or start with a larger --max_loaded")
        try:
            voice = self._adapter(name, path) if kind == "adapter" else self._state(name, path)
        except (UserError, OSError) as error:
            message = str(error).replace(str(path), file).replace(str(self.args.model), self.own.name)
            raise Refused(400, message, "file") from error
        self.voices[name] = voice

    def drop(self, name: str) -> list[Voice]:
        """Take an adapter or a state out -> the voices that nobody can ask for any more; answers that they are giving
        go on. Raises Refused for those that the command line names."""
        voice = self[name]
        if name in self.lasting:
            raise Refused(400, f"{name} was named when the server started, and stays", "name")
        del self.voices[name]
        gone = [pair for pair in [*self.pairs] if voice in pair]
        return [voice, *map(self.pairs.pop, gone)]

    def below(self, file: str) -> Path:
        """The path of a file, or a folder of files, below --files. Raises Refused for any other: also one that a link
        leads to."""
        if self.args.files is None:
            raise Refused(403, "no files are loaded while this server runs; start it with --files FOLDER", "file")
        root = Path(self.args.files).resolve()
        missing = Refused(404, f"there is no such file below --files: {short(file)!r}", "file")
        try:
            if (found := within(root, file)) is None:
                raise missing
            path = adapter_of_run(found)
            for one in (path, *path.glob("*")):
                if within(root, one) is None or not (one.is_file() or one.is_dir()):
                    raise missing
        except UserError as error:  # a run that has no adapter to take
            raise Refused(400, str(error).replace(str(root), "."), "file") from error
        except (OSError, ValueError) as error:  # a name that is none
            raise missing from error
        return path

    def _adapter(self, name: str, path: str | Path) -> Voice:
        return adapter_voice(name, source_of(self.args, path), self.own, self.base, self.args.any_base)

    def _state(self, name: str, path: str | Path) -> Voice:
        return state_voice(name, path, self.own, None if self.args.any_base else self.base)
