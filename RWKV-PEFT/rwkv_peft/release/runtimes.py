"""Compute the logits of one token sequence with our own model, and in runtimes that this project did not write.

Each runtime is optional: Runtime.missing says how to install it, Runtime.refuses why it cannot take a model."""

import importlib.metadata
import importlib.util
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoints.atomic import scratch_folder
from ..checkpoints.base import Base
from ..children import python_command
from ..config import ModelConfig
from ..models.parts import LanguageModel
from ..models.rwkv6.keys import RWKV6Config
from ..models.rwkv7a.keys import RWKV7aConfig
from ..models.state import State, split_time_states, state_of
from .rwkv_package import logits_of, rwkv_model

NOT_LOOKED_FOR = (
    "time states: the rwkv package does not look for them in an {} file; here they are put into its list of states, as "
    "a program that uses them must"
)


class Runtime(NamedTuple):
    """One runtime and how to ask it.

    package is its name on PyPI, module its import name, form what it reads ("pth", a float32 copy, or "gguf");
    refuses(config) is a reason why it cannot take a model, or ""; logits(path, tokens, config) -> float32 logits
    (T, V), or log-probabilities (of the last positions, as many as it gives) if shifted is True.
    """

    name: str
    package: str
    module: str
    form: str
    logits: Callable[[Path, torch.Tensor, Any], torch.Tensor]
    refuses: Callable[[Any], str]
    shifted: bool = False

    def missing(self) -> str:
        """The command that installs what the runtime and the writer of its files lack; "" if nothing is missing."""
        needed = ((self.module, self.package), *((("gguf", "gguf"),) if self.form == "gguf" else ()))
        packages = [package for module, package in needed if not importlib.util.find_spec(module)]
        return f"pip install {' '.join(packages)}" if packages else ""

    def version(self) -> str:
        return importlib.metadata.version(self.package)


def rwkv_sequence(path: Path, tokens: torch.Tensor, config: ModelConfig, mode: str = "sequence") -> torch.Tensor:
    """Ask the `rwkv` package; mode is that of logits_of."""
    if config.version != "x060":
        return rwkv_elsewhere(path, tokens, config.version, mode)
    return logits_of(rwkv_model(path, config.version), tokens.tolist(), None, mode)


def rwkv_elsewhere(path: Path, tokens: torch.Tensor, version: str, mode: str) -> torch.Tensor:
    """Ask the `rwkv` package about an RWKV-7 or 7a in a process of its own. Raises RuntimeError if that fails."""
    with scratch_folder() as folder:
        given, answer = folder / "tokens.pt", folder / "logits.pt"
        torch.save(tokens, given)
        command = python_command("rwkv_peft.release.rwkv_package", path, given, answer, version, mode)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the rwkv package failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
        logits: torch.Tensor = torch.load(answer, weights_only=True)
        return logits


def rwkv_simple(path: Path, tokens: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Ask `rwkv-simple`, which loads strictly, one token at a time: over several it raises decays to at least 0.005."""
    from rwkv_simple import RWKV

    model = RWKV(
        config.n_embd,
        d_head=config.head_size,
        expand=config.dim_ffn / config.n_embd,
        n_layer=config.n_layer,
        vocab_size=config.vocab_size,
    )
    model.load_state_dict(torch.load(path, weights_only=True, mmap=True), strict=True)
    state, rows = None, []
    with torch.inference_mode():
        for token in tokens:
            logits, state = model(token[None, None], state)
            rows.append(logits[0, 0].float())
    return torch.stack(rows)


def refused_by_rwkv_simple(config: ModelConfig) -> str:
    """Say why `rwkv-simple` cannot take a model, or "". It takes any head size (4, 8, 12, 16, 32 and 64 were tried with
    0.1.1); its other widths are fixed."""
    if not isinstance(config, RWKV6Config):
        return "takes only RWKV-6"
    if (config.maa_rank, config.decay_rank) != (32, 64):
        return f"takes only low-rank widths 32 and 64, and these are {config.maa_rank} and {config.decay_rank}"
    if config.dim_att != config.n_embd:
        return f"takes as many attention channels as channels, and these are {config.dim_att} and {config.n_embd}"
    return ""


def llama_cpp(path: Path, tokens: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Ask llama.cpp through `xllamacpp` -> its log-probabilities (1, V) of the whole vocabulary after the prompt."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = max(2 * len(tokens), 256), 1, -1, False
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {
            "prompt": tokens.tolist(),
            "n_predict": 1,
            "n_probs": config.vocab_size,
            "temperature": 0.0,
            "cache_prompt": False,
        }
    )
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    row = torch.full((config.vocab_size,), float("nan"))
    for entry in found:
        row[entry["id"]] = entry["logprob"]
    return row[None]


def refused_by_rwkv(config: ModelConfig) -> str:
    """Say why `rwkv` cannot take a model, or ""."""
    if config.version not in ("x060", "x070", "x070a"):
        return "takes only RWKV-6, RWKV-7 and RWKV-7a"
    if isinstance(config, RWKV7aConfig) and config.deep_size != RWKV7aConfig.deep_size:
        return f"takes only deep embeddings of size {RWKV7aConfig.deep_size}, and these are of {config.deep_size}"
    return ""


def refused_by_llama_cpp(config: ModelConfig) -> str:
    """Say why llama.cpp cannot take a model, or ""."""
    return "" if config.version in ("x060", "x070") else "takes only RWKV-6 and RWKV-7"


def all_runtimes() -> tuple[Runtime, ...]:
    """All runtimes, installed or not, in the order of the table."""
    rwkv_tokens = partial(rwkv_sequence, mode="tokens")
    return (
        Runtime("rwkv, sequence", "rwkv", "rwkv", "pth", rwkv_sequence, refused_by_rwkv),
        Runtime("rwkv, token by token", "rwkv", "rwkv", "pth", rwkv_tokens, refused_by_rwkv),
        Runtime("rwkv-simple", "rwkv-simple", "rwkv_simple", "pth", rwkv_simple, refused_by_rwkv_simple),
        Runtime("llama.cpp", "xllamacpp", "xllamacpp", "gguf", llama_cpp, refused_by_llama_cpp, shifted=True),
    )


def random_tokens(vocab_size: int, length: int) -> torch.Tensor:
    """Draw (length,) int64 tokens, the same on every run."""
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(0))


def reference_logits(base: Base, tokens: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Compute the logits (T, V) of a Base over tokens (T,) int64, in float64 unless dtype says otherwise. The sequence
    starts from the base's time states, if it has any."""
    family, states = base.family, split_time_states(base.tensors)[1]
    start = State.zeros(base.config, 1, dtype=dtype)
    if states:
        start = state_of(states, start, family.rows_are_keys, base.path)
    return logits_by_parts(family.load(base.tensors, base.config), tokens, start, dtype)


def logits_by_parts(
    model: LanguageModel,
    tokens: torch.Tensor,
    state: State,
    dtype: torch.dtype,
    prepare: Callable[[str, nn.Module], None] = lambda name, part: None,
) -> torch.Tensor:
    """Compute the logits (T, V) of a model over tokens (T,) in dtype, from a State. Memory holds one block in dtype at
    a time.

    Weights stay mapped to their file, in that file's dtype, until their block, the last norm or the head is reached.
    It is cast, prepare(name, part) may change it, and after its forward it is emptied; the model serves once.
    """

    def fill(part: nn.Module, name: str) -> None:
        for module in part.modules():
            for parameter in module.parameters(recurse=False):
                if not isinstance(module, nn.Embedding):  # of which the tokens' rows are enough
                    parameter.data = parameter.data.to(dtype)
        prepare(name, part)

    def empty(part: nn.Module, *_: object) -> None:
        for module in part.modules():
            for name in dict((*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))):
                setattr(module, name, None)

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _, __, rows: rows.to(dtype))
    for name, part in (*model.blocks.named_children(), ("ln_out", model.ln_out), ("head", model.head)):
        part.register_forward_pre_hook(lambda part, _, name=name: fill(part, name))
        part.register_forward_hook(empty)
    with torch.no_grad():
        logits: torch.Tensor = model(tokens[None], state)[0][0]
        return logits


class Difference(NamedTuple):
    """The difference of two sets of logits (T, V): norm of the difference over the reference's norm, and the share of
    positions with the same top token."""

    relative: float
    top_agreement: float

    @classmethod
    def between(cls, logits: torch.Tensor, reference: torch.Tensor) -> "Difference":
        return cls(
            float((logits - reference).norm() / reference.norm()),
            float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
        )

    def __str__(self) -> str:
        return f"relative difference {self.relative:.1e}, same top token in {self.top_agreement:.0%}"
