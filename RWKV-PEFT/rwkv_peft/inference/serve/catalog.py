"""The models of the server by name: the base, and adapters and states on it, loaded and dropped while it runs."""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...checkpoints.adapters import adapter_of_run, source_of
from ...checkpoints.base import open_base
from ...checkpoints.readable import within
from ...cli.errors import UserError, short
from ...data.recorded import chat_beside, find_tokenizer, note_on_chats, recorded_beside
from ...models.parts import LanguageModel
from ..chat import remark
from ..loading import load_model, resolve_device
from ..speakers import Speaker, adapter_speaker, combined, mixed_speaker, state_speaker
from .flags import NAME
from .states import NAMES, StateFolder
from .web import RequestError

MIXES = 8  # the most adapters, or sets of them, at scales of requests that are kept ready
Parts = tuple[tuple[Speaker, float], ...]  # adapters at scales, in order


class Catalog:
    """Speakers by name, named on the command line or loaded from below --files."""

    def __init__(self, args: argparse.Namespace) -> None:
        device = resolve_device(args.device)
        precision = args.precision or ("bf16" if device == "cuda" else "fp32")
        self.args, self.base = args, open_base(args.model)
        model, start = load_model(args.model, (), precision, device, weights=args.weights, log=remark)
        digest = combined(self.base.fingerprint, precision, args.weights)
        self.base_speaker = Speaker(args.name, model, start, digest=digest)
        files = [given.path for given in (*args.adapter, *args.state)]
        files = [*reversed(files), args.model]
        recorded = recorded_beside(*files)
        self.chat = chat_beside(*files, clean=args.clean_turns, tool_form=args.tool_form)
        if note := note_on_chats(*files):
            remark(note)
        self.tokenizer = find_tokenizer(args.tokenizer, model.config.vocab_size, recorded)
        self.speakers = {args.name: self.base_speaker}
        self.files: dict[str, str] = {}  # of adapters and states, by their names
        self.mixes: dict[Parts, Speaker] = {}  # least recently used first
        self.forget: Callable[[LanguageModel], object] = lambda model: None  # called with each model that has left
        self.since = int(time.time())
        for given in args.adapter:
            self.speakers[given.name] = self._adapter(given.name, given.path)
        for given in args.state:
            self.speakers[given.name] = self._state(given.name, given.path)
        trained = None if args.any_base else self.base
        self.states = StateFolder(args.states, self.base_speaker, trained, args.max_prompt)
        self.lasting = frozenset(self.speakers)
        self.most = len(self.speakers) + args.max_loaded

    def __getitem__(self, name: str) -> Speaker:
        """The speaker of a name. Raises RequestError for an unknown one."""
        if name not in self.speakers:
            message = f"there is no model {short(name)!r} here; GET /v1/models lists them"
            raise RequestError(404, message, "model", "model_not_found")
        return self.speakers[name]

    def speaker(
        self, name: str | None, state: str | None, scale: float | None = None, scales: Mapping[str, float] | None = None
    ) -> Speaker:
        """The speaker of a name, or the base, from the start of another that is a state. scale multiplies the
        change of an adapter; scales {adapter: scale} are of several on the base. Raises RequestError for unknown
        ones."""
        name = name or self.base_speaker.name
        speaker = self[name]
        if scale is not None:
            if scales is not None:
                raise RequestError(
                    400, "adapter_scale: adapters has a scale for each already; leave one out", "adapters"
                )
            speaker = self._mixed({name: scale}, "adapter_scale")
        elif scales is not None:
            if speaker is not self.base_speaker:
                message = f"adapters: they go on the base, and the model is {name}; name {self.base_speaker.name}"
                raise RequestError(400, message, "model")
            speaker = self._mixed(scales, "adapters")
        if state is None:
            return speaker
        by_name = state in self.speakers or self.states.folder is None
        other = self[state] if by_name else self.states.speaker(state)
        if other.model is not self.base_speaker.model or other.start is None:
            raise RequestError(400, f"state: {state} is none; load one by --state, or as the kind state", "state")
        return speaker.beginning(other)

    def _mixed(self, scales: Mapping[str, float], field: str) -> Speaker:
        """The speaker of the base with adapters at scales, made if it is not among the last MIXES. Raises RequestError
        for a name that is no adapter's."""
        parts = tuple((self[name], scale) for name, scale in scales.items())
        for own, _ in parts:
            if own.adapter is None:
                raise RequestError(400, f"{field}: {own.name} is no adapter; GET /v1/models lists them", field)
        parts = tuple((own, scale) for own, scale in parts if scale)
        if not parts or parts[1:] == () and parts[0][1] == 1:
            return parts[0][0] if parts else self.base_speaker
        name = "+".join(own.name for own, _ in parts)
        found = self.mixes.pop(parts, None) or mixed_speaker(name, parts, self.base_speaker, self.base)
        self.mixes[parts] = found
        if len(self.mixes) > MIXES:
            self._forget(self.mixes.pop(next(iter(self.mixes))))
        return found

    def listing(self, name: str) -> dict[str, Any]:
        """A model in OpenAI's list."""
        self[name]
        parent = None if name == self.base_speaker.name else self.base_speaker.name
        return {"id": name, "object": "model", "created": self.since, "owned_by": "rwkv-peft", "parent": parent}

    def load(self, name: str, file: str, kind: str) -> None:
        """Load an adapter or a state from below --files, one at a time. Raises RequestError for a name that is none or
        taken, for one too many, and for a file that lies elsewhere or does not fit."""
        path = self.below(file)
        if not NAME.fullmatch(name):
            raise RequestError(400, NAMES, "name")
        self.free(name)
        if len(self.speakers) >= self.most:
            raise RequestError(409, f"{self.args.max_loaded} are loaded; drop one, or start with a larger --max_loaded")
        try:
            speaker = self._adapter(name, path) if kind == "adapter" else self._state(name, path)
        except (UserError, OSError) as error:
            message = str(error).replace(str(path), file).replace(str(self.args.model), self.base_speaker.name)
            raise RequestError(400, message, "file") from error
        self.speakers[name] = speaker

    def free(self, name: str) -> str:
        """A name that no model has. Raises RequestError for another."""
        if name in self.speakers:
            raise RequestError(409, f"there is a model {name} already; drop it first, or give another name", "name")
        return name

    def drop(self, name: str) -> None:
        """Remove an adapter or a state, and all that was made of it; running answers go on. Raises RequestError for one
        that the command line names."""
        speaker = self[name]
        if name in self.lasting:
            raise RequestError(400, f"{name} was named when the server started, and stays", "name")
        del self.speakers[name]
        self._forget(speaker)

    def _forget(self, speaker: Speaker) -> None:
        """Remove a speaker that has left, and the mixes of it."""
        if speaker.model is not self.base_speaker.model:
            self.forget(speaker.model)
        for parts in [parts for parts in [*self.mixes] if any(own is speaker for own, _ in parts)]:
            self._forget(self.mixes.pop(parts))

    def below(self, file: str) -> Path:
        """The path of a file, or a folder of files, below --files. Raises RequestError for any other, also behind a
        link."""
        if self.args.files is None:
            raise RequestError(403, "no files are loaded while this server runs; start it with --files FOLDER", "file")
        root = Path(self.args.files).resolve()
        missing = RequestError(404, f"there is no such file below --files: {short(file)!r}", "file")
        try:
            if (found := within(root, file)) is None:
                raise missing
            path = adapter_of_run(found)
            for one in (path, *path.glob("*")):
                if within(root, one) is None or not (one.is_file() or one.is_dir()):
                    raise missing
        except UserError as error:  # a run that has no adapter to take
            raise RequestError(400, str(error).replace(str(root), "."), "file") from error
        except (OSError, ValueError) as error:  # a name that is none
            raise missing from error
        return path

    def _adapter(self, name: str, path: str | Path) -> Speaker:
        source, self.files[name] = source_of(self.args, path), str(path)
        return adapter_speaker(name, source, self.base_speaker, self.base, self.args.any_base)

    def _state(self, name: str, path: str | Path) -> Speaker:
        self.files[name] = str(path)
        return state_speaker(name, path, self.base_speaker, None if self.args.any_base else self.base)
