"""Adapter files: safetensors with the trained tensors and their description.

An adapter's own tensors are named by their module and a parameter (`blocks.0.att.receptance.bone`, `….lora_A`,
`….lora_B`); tensors of the base that were trained whole keep the base's key (`blocks.0.ln1.weight`). Time states
(`blocks.0.att.time_state`) are (H, N value, N key), as in RWKV's .pth files.
"""

import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..adapters.method import Method
from ..adapters.methods import METHODS, adapter_parameter, is_saved, method_of, words_of
from ..cli.errors import UserError
from ..cli.names import NONE, all_finite, is_finite, is_whole
from ..cli.tables import GENERATIONS
from ..config import QUANTIZATIONS, AdapterConfig
from ..config.adapter import LEFT
from ..models.family import Family
from .atomic import atomic_write
from .base import Base
from .readable import object_of, reading
from .tensors import DTYPES, read_safetensors, save_safetensors

ENTRY = "rwkv_peft_run"
MOST = 1000  # characters of a text
FORMAT_VERSION = 1
DIGEST_KEY = "rwkv_peft_digest"  # the entry with the digest of the tensors; files of earlier versions lack it
METADATA_KEY = "rwkv_peft"  # the entry of the safetensors header that holds AdapterMetadata as JSON
PRECISIONS = ("bf16", "fp16", "fp32")  # values of --precision, the dtype in which a run keeps its base
FORGOTTEN = ("config",)  # metadata that earlier versions wrote and nothing reads
COPY = "copy the file that the training wrote"


@dataclass(frozen=True)
class Origin:
    """A training's history for people: file name of the base, flags of the data, learning rate; "": unknown."""

    base: str = ""
    tokenizer: str = ""
    data: str = ""
    rate: str = ""
    versions: str = ""

    def to_json(self) -> str:
        return json.dumps({name: shown(text) for name, text in asdict(self).items()}, sort_keys=True)


def shown(text: str) -> str:
    """A text with "?" for characters that are not printable, cut to MOST, because names of files may hold any."""
    return "".join(character if character.isprintable() else "?" for character in text)[:MOST]


def read_origin(header: dict[str, str]) -> Origin:
    """The Origin in a file's header, made printable; empty if there is none."""
    metadata = object_of(header.get(ENTRY, "{}"))
    return Origin(**{field.name: shown(str(metadata.get(field.name, ""))) for field in fields(Origin)})


@dataclass(frozen=True)
class AdapterMetadata:
    """Describes an adapter, so that merging needs no retyped flags.

    variant is a method's name ("none": only whole tensors); rank and mini_rank are AdapterConfig's (0: the method has
    none); scale multiplies lora_B lora_A; targets and train_parts name the trained places, quant the quantization of
    the frozen weights. base_fingerprint identifies the base, and generation is its --model_version ("": unknown).
    precision is the dtype that the base was cast to for training, before anything was quantized or taken out of it ("":
    none, or unknown). source is the tool that wrote the file; origin the history for people.
    """

    variant: str
    rank: int = 0
    mini_rank: int = 0
    scale: float = 1.0
    targets: tuple[str, ...] = ()
    train_parts: tuple[str, ...] = ()
    quant: str = "none"
    base_fingerprint: str = ""
    generation: str = ""
    precision: str = ""
    source: str = "rwkv_peft"
    format_version: int = FORMAT_VERSION
    origin: Origin = Origin()

    @classmethod
    def from_config(
        cls, config: AdapterConfig, base_fingerprint: str = "", precision: str = "", generation: str = ""
    ) -> "AdapterMetadata":
        """The metadata of an adapter that was made with an AdapterConfig."""
        method = method_of(config)
        return cls(
            variant=NONE if method is None else method.file_name,
            rank=config.rank if method is None or "rank" in method.tensors.size else 0,
            mini_rank=config.mini_rank,
            scale=1.0 if method is None else method.scale(config),
            targets=tuple(config.targets),
            train_parts=tuple(config.train_parts),
            quant=config.quant,
            base_fingerprint=base_fingerprint,
            generation=generation,
            precision=precision,
        )

    @property
    def base_words(self) -> str:
        """The base's name in messages: its file's name, if recorded, and its fingerprint."""
        words = [self.origin.base, self.base_fingerprint and f"fingerprint {self.base_fingerprint}"]
        return ", ".join(filter(None, words)) or "unknown"

    def require_base(self, name: str | Path, base: Base, remedy: str) -> None:
        """Raise UserError, which ends in `remedy`, if the file called `name` records another base than this one."""
        if self.base_fingerprint not in ("", base.fingerprint):
            raise UserError(
                f"{name} was trained on another base: {self.base_words}; {base.path} has the fingerprint "
                f"{base.fingerprint}; {remedy}"
            )

    @property
    def method(self) -> Method | None:
        """The Method that variant names; None if no layer is adapted."""
        return None if self.variant == NONE else METHODS[self.variant]

    @property
    def size_words(self) -> str:
        """The size of the method's tensors in words, "rank 8"; "" if no layer is adapted."""
        return "" if self.method is None else self.method.size_words(asdict(self))

    @property
    def alpha(self) -> float:
        """LoRA's alpha, from which other tools compute the scale; 0 if the method has none."""
        alpha = None if self.method is None else self.method.alpha
        return 0.0 if alpha is None else alpha.alpha(self.scale, self.rank)

    def base_dtype(self) -> torch.dtype | None:
        """The dtype that `precision` names; None if it names none."""
        return DTYPES.get(self.precision)


class Adapter(NamedTuple):
    """An adapter's tensors, {name: tensor} as in the module's docstring, its metadata, and the factor of its change."""

    tensors: dict[str, torch.Tensor]
    metadata: AdapterMetadata
    amount: float = 1.0

    def modules(self) -> dict[str, dict[str, torch.Tensor]]:
        """The adapter's own tensors: {module name: {parameter name: tensor}}."""
        modules: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in self.tensors.items():
            if split := adapter_parameter(key):
                modules.setdefault(split[0], {})[split[1]] = tensor
        return modules

    def whole(self) -> dict[str, torch.Tensor]:
        """The tensors that replace the base's: {base key: tensor}."""
        return {key: tensor for key, tensor in self.tensors.items() if not adapter_parameter(key)}

    def config(self, family: Family) -> AdapterConfig:
        """The AdapterConfig that rebuilds its layers: their places and shapes."""
        metadata = self.metadata
        # files of other tools name single tensors, not parts; they need none, because every tensor of a file is loaded
        parts = tuple(part for part in metadata.train_parts if part in family.parts)
        targets = tuple(self.modules()) or tuple(metadata.targets)  # some files adapt only some layers
        if metadata.method is None:
            return AdapterConfig(method=NONE, targets=targets, train_parts=parts)
        return AdapterConfig(
            **words_of(metadata.method),
            **{field: getattr(metadata, field) for field in metadata.method.tensors.size},
            alpha=metadata.alpha,
            targets=targets,
            train_parts=parts,
            quant=metadata.quant,
        )


def target_names(modules: Iterable[str]) -> tuple[str, ...]:
    """The targets of module names: ("blocks.0.att.key", …) -> ("att.key", …), each once, in order."""
    return tuple(dict.fromkeys(".".join(module.split(".")[-2:]) for module in modules))


def save_adapter(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: AdapterMetadata) -> None:
    """Write {name: tensor} and AdapterMetadata to a .safetensors file, atomically. The tensors are sorted by name, so
    that equal adapters give equal files in whichever order they were gathered or read.

    Raises UserError if the file cannot be written, ValueError for a tensor that is not finite.
    """
    for key, tensor in tensors.items():
        if not all_finite(tensor):
            raise ValueError(f"{key} holds NaN or Inf; an adapter with it is of no use, so nothing is written")
    values = {name: value for name, value in asdict(metadata).items() if name != "origin"}
    header = {"format": "pt", METADATA_KEY: json.dumps(values, sort_keys=True), ENTRY: metadata.origin.to_json()}
    header[DIGEST_KEY] = tensors_digest(tensors)
    with atomic_write(path) as temporary:
        save_safetensors(temporary, dict(sorted(tensors.items())), header)


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of {name: tensor}, by which a bit that changed on a disk or on the way is found: 32 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def read_own(path: str | Path) -> Adapter:
    """The Adapter in a .safetensors file of `save_adapter`. Raises UserError for a file that is broken, of a later
    format or without adapter metadata, and for an adapter's tensors under metadata that names no method."""
    tensors, header = read_safetensors(path)
    if METADATA_KEY not in header:
        hint = (
            "its folder with adapter_config.json"
            if any("base_model." in key for key in tensors)
            else "an adapter that train.py saved"
        )
        raise UserError(f"{path} does not say which adapter it holds (its header has no {METADATA_KEY!r}); give {hint}")
    if header.get(DIGEST_KEY) not in (None, tensors_digest(tensors)):
        raise UserError(f"{path}: its tensors are not those that were written, by their digest; {COPY}")
    metadata = replace(_parse_metadata(path, header[METADATA_KEY]), origin=read_origin(header))
    adapter = Adapter(tensors, metadata)
    if adapter.metadata.method is None and (modules := adapter.modules()):
        raise UserError(
            f"{path}: its metadata names no method (variant = {NONE!r}), and it holds tensors of an adapter on "
            f"{len(modules)} layers, such as {next(iter(modules))}; {COPY}"
        )
    return adapter


def check_names(path: str | Path, adapter: Adapter) -> None:
    """Raise UserError unless each adapted layer of an Adapter, read from path, has the tensors of its method."""
    method = adapter.metadata.method
    names = set() if method is None else {*method.parameters, *method.constants}
    for module, params in adapter.modules().items():
        if set(params) != names:
            raise UserError(
                f"{path}: {module} holds {', '.join(sorted(params))}, and a {adapter.metadata.variant} adapter has "
                f"{', '.join(sorted(names)) or 'none'}; the file is damaged, or describes itself wrongly: copy it again"
            )


def _parse_metadata(path: str | Path, text: str) -> AdapterMetadata:
    with reading(f"{path}: its metadata", remedy=COPY):
        values = json.loads(text)
        version = int(values["format_version"])
        values = {key: value for key, value in values.items() if key not in FORGOTTEN}
    if values.get("variant") in LEFT:  # before entries that only these methods had
        raise UserError(
            f"{path} is a {values['variant']} adapter, and version 0.3.0 of rwkv-peft is the last that reads "
            "them: merge it into its base there, and take the merged model"
        )
    known = {field.name for field in fields(AdapterMetadata)} - {"origin"}
    if version > FORMAT_VERSION or set(values) - known:
        raise UserError(
            f"{path} has adapter format {version}, and this version reads up to {FORMAT_VERSION}; update this package"
        )
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    _check_metadata(path, values)
    return AdapterMetadata(**values)


def _check_metadata(path: str | Path, values: dict[str, Any]) -> None:
    """Raise UserError unless metadata names a variant, quantization, precision and generation of the tables, and its
    other entries have the right types."""
    known = {
        "variant": (*filter(is_saved, METHODS), NONE),
        "quant": QUANTIZATIONS,
        "precision": ("", *PRECISIONS),
        "generation": ("", *GENERATIONS),
    }
    for name, value in ({"variant": None} | values).items():
        if name in known:
            fits, rule = value in known[name], "one of " + ", ".join(filter(None, known[name]))
        elif name in ("rank", "mini_rank", "format_version"):
            fits, rule = is_whole(value, 0), "a whole number"
        elif name == "scale":
            fits, rule = is_finite(value), "a finite number"
        elif name in ("targets", "train_parts"):
            fits, rule = isinstance(value, tuple) and all(isinstance(item, str) for item in value), "a list of names"
        else:
            fits, rule = isinstance(value, str), "a text"
        if not fits:
            raise UserError(f"{path}: its metadata has {name} = {reprlib.repr(value)}, and {rule} is due; {COPY}")
