"""States on disk: by name in the folder of --states, where clients upload, save, download and delete them, and the
cache of prefixes in --cache_folder, from one run of the server to the next."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.atomic import atomic_write, scratch_folder
from ...checkpoints.base import Base, save_model
from ...checkpoints.readable import reading, within
from ...checkpoints.state_file import read_states
from ...checkpoints.tensors import TensorSpec, read_safetensors, write_safetensors
from ...cli.errors import UserError, short
from ...models import family_named
from ...models.state import State, keyed, state_tensors
from ..chat import remark
from ..loading import read_state, read_state_file, save_state_file
from ..requests import CachedPrefix, PrefixCache
from ..speakers import Speaker, state_speaker
from .flags import NAME
from .web import RequestError

LOADED = 32  # the most states that stay in memory; a state of a large model takes 30 MB
TOKEN = 4  # bytes in packed tokens
ABOUT = "rwkv_peft.cache"  # the entry of the cache file's header: the digests of the model and of each prefix's speaker
NAMES = "a name has at most 64 letters, digits and ._:+-"


class StateFolder:
    """States NAME.pth of a folder (None: there is none, and every name is refused) for the model of a speaker, the last
    LOADED of them in memory. `base` is the only one that a file may name (None: any). `most` is the largest file in
    bytes: twice a state, of so many tokens if it grows."""

    def __init__(self, folder: str | None, speaker: Speaker, base: Base | None, tokens: int) -> None:
        self.folder, self.plain, self.base = folder, speaker, base
        self.loaded: dict[str, Speaker] = {}  # least recently used first
        self.most = 2 * State.zeros(speaker.model.config, 1, "meta", tokens=tokens).nbytes + (1 << 20)

    def path(self, name: str, new: bool = False) -> Path:
        """The file of a name. Raises RequestError for a name that is none, or that has no file unless it is `new`."""
        if self.folder is None:
            raise RequestError(400, "no states are kept by name; start the server with --states FOLDER", "state")
        if not NAME.fullmatch(name):
            raise RequestError(400, f"{short(name)!r}: {NAMES}", "state")
        path = within(Path(self.folder).resolve(), f"{name}.pth")
        if path is None or not (new or path.is_file()):
            raise RequestError(404, f"there is no state {name} here; GET /v1/states lists them", "state")
        return path

    def listing(self, name: str) -> dict[str, Any]:
        """A state in a list of OpenAI's form."""
        found = self.path(name).stat()
        return {"id": name, "object": "state", "created": int(found.st_mtime), "bytes": found.st_size}

    def names(self) -> list[str]:
        """The names of all states."""
        if self.folder is None:
            return []
        root = Path(self.folder).resolve()
        found = (path for path in sorted(root.glob("*.pth")) if NAME.fullmatch(path.stem))
        return [path.stem for path in found if (place := within(root, path.name)) is not None and place.is_file()]

    def speaker(self, name: str) -> Speaker:
        """The model's speaker from a state on. Raises RequestError for an unknown one, or one that does not fit."""
        path = self.path(name)
        found = self.loaded.pop(name, None)
        if found is None:
            try:
                found = state_speaker(name, path, self.plain, self.base)
            except UserError as error:
                raise RequestError(400, str(error).replace(str(path), name), "state") from error
        self.loaded[name] = found
        if len(self.loaded) > LOADED:
            del self.loaded[next(iter(self.loaded))]
        return found

    def upload(self, name: str, content: bytes) -> None:
        """Write a file's content, in any layout of states, under a name. Raises RequestError if it is none, or one that
        does not fit the model."""
        place = self.path(name, new=True)
        with scratch_folder() as folder:
            path = folder / (f"{name}.safetensors" if content[8:9] == b"{" else f"{name}.pth")
            path.write_bytes(content)
            try:
                read_state_file(path, self.plain.model, self.base)
                save_model(place, read_states(path).tensors)
            except UserError as error:
                message = str(error).replace(str(path), name).replace(str(place), name)
                raise RequestError(400, message, "state") from error
        self.loaded.pop(name, None)

    def save(self, name: str, state: State) -> None:
        """Write the State of one sequence under a name. Raises RequestError if it cannot be written."""
        place = self.path(name, new=True)
        try:
            save_state_file(place, state, self.plain.model)
        except UserError as error:  # whose paths are the server's
            message = str(error).replace(str(place), name).replace(str(place.parent), "--states")
            raise RequestError(500, message, "save_state") from error
        self.loaded.pop(name, None)

    def delete(self, name: str) -> None:
        """Delete the file of a name. Raises RequestError for an unknown one."""
        self.path(name).unlink()
        self.loaded.pop(name, None)


class CacheFile:
    """The file of a PrefixCache in a folder, for the model of a speaker. Prefixes of its adapters and states are there
    too, each under the digest of the speaker that read it."""

    def __init__(self, folder: str, cache: PrefixCache, speaker: Speaker) -> None:
        self.path, self.cache, self.speaker = Path(folder) / "cache.safetensors", cache, speaker

    def read(self) -> None:
        """Fill the cache. A note is printed for a file of another model, or one that is damaged."""
        if not self.path.exists():
            return
        try:
            with reading(self.path):
                found = self._prefixes(*read_safetensors(self.path, weights=False))
        except UserError as error:
            return remark(f"note: the cache of prefixes begins empty: {error}")
        for key, prefix in found.items():
            self.cache.put(key, prefix)

    def _prefixes(
        self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]
    ) -> dict[tuple[str, bytes], CachedPrefix]:
        """The prefixes in a file of `write`. Raises UserError for a file of another model."""
        about, model, entries = json.loads(header[ABOUT]), self.speaker.model, list[dict[str, torch.Tensor]]()
        if about["model"] != self.speaker.digest:
            raise UserError(f"{self.path} is of another model, or of another --precision")
        entries = [{} for _ in about["speakers"]]
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            entries[int(number)][name] = tensor
        found = dict[tuple[str, bytes], CachedPrefix]()
        for digest, entry in zip(about["speakers"], entries):
            tokens, logits = entry.pop("tokens").numpy().tobytes(), entry.pop("logits").to(model.emb.weight.device)
            state = read_state(entry, model, self.path)
            found[digest, tokens] = CachedPrefix(len(tokens) // TOKEN, logits, state)
        return found

    def write(self) -> None:
        """Write the prefixes, one in memory at a time. A note is printed if the disk refuses them."""
        rows_are_keys = family_named(self.speaker.model.config.version).rows_are_keys
        speakers, specs = list[str](), dict[str, TensorSpec]()
        for (owner, tokens), prefix in self.cache.prefixes.items():
            sizes = {"tokens": TensorSpec((len(tokens),), torch.uint8), "logits": TensorSpec.of(prefix.logits)}
            sizes |= {key: TensorSpec(tuple(x.shape[1:]), torch.float32) for key, x in keyed(prefix.state)}
            specs |= {f"{len(speakers)}.{key}": spec for key, spec in sizes.items()}
            speakers.append(str(owner))

        def tensors() -> Iterator[torch.Tensor]:
            for (_, tokens), prefix in self.cache.prefixes.items():
                yield torch.frombuffer(bytearray(tokens), dtype=torch.uint8)
                yield prefix.logits
                yield from state_tensors(prefix.state, rows_are_keys).values()

        about = {ABOUT: json.dumps({"model": self.speaker.digest, "speakers": speakers})}
        try:
            with atomic_write(self.path) as temporary:
                write_safetensors(temporary, specs, zip(specs, tensors()), about)
        except UserError as error:
            remark(f"note: {error}")
