"""Logits of our own model and of runtimes of other projects, and their comparison: `rwkv-peft check --runtimes`.

One random token sequence is read by our model in float64 and by each runtime. Runtimes read a float32 copy of the file,
so that the table shows their arithmetic and not the file's dtype; llama.cpp reads a GGUF of each requested type. Each
runtime is optional.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoints.atomic import scratch_folder
from ..checkpoints.base import Base
from ..checkpoints.tensors import save_pth
from ..cli.errors import UserError, told
from ..config import ModelConfig
from ..data.tokenizer import WorldTokenizer
from ..models.parts import LanguageModel
from ..models.rwkv6.keys import RWKV6Config
from ..models.rwkv7a.keys import RWKV7aConfig
from ..models.state import State, split_time_states, state_of
from .gguf import write_gguf
from .vocabulary import table_vocabulary

# The largest difference allowed between a format's logits and the reference, in standard deviations of the logits.
LIMITS = (("fp32", 1e-4), ("f32", 1e-3), ("f16", 2e-2), ("bf16", 1e-1), ("q8_0", 3e-1))


class RuntimeResult(NamedTuple):
    """One line of the table; difference is None if the runtime did not run or broke, for the reason in note."""

    runtime: str
    version: str
    form: str
    difference: float | None
    limit: float | None
    note: str
    broke: bool = False

    @property
    def failed(self) -> bool:
        return self.broke or (
            self.difference is not None and self.limit is not None and not self.difference <= self.limit
        )


def runtimes_agree(model: Base, length: int, gguf_types: Sequence[str]) -> bool:
    """Print the table of a Base; False if a runtime differs or breaks. Raises UserError if none runs."""
    rows = run_all(model, length, gguf_types)
    print_table(rows)
    if not any(row.broke or row.difference is not None for row in rows):
        remedy = "install one of them" if any("pip install" in row.note for row in rows) else "none takes this model"
        raise UserError(f"no runtime ran, for the reasons above; {remedy}")
    return not any(row.failed for row in rows)


def run_all(model: Base, length: int = 50, gguf_types: Sequence[str] = ("f32", "f16")) -> list[RuntimeResult]:
    """Run every runtime over a Base -> the table's rows."""
    config = model.config
    tokens = random_tokens(config.vocab_size, length)
    reference = reference_logits(model, tokens)
    rows = []
    with scratch_folder() as folder:
        for runtime in all_runtimes():
            without = "takes no initial state" if model.has_states and runtime.package != "rwkv" else ""
            reason = runtime.missing() or runtime.refuses(config) or without
            for form in ("fp32",) if runtime.form == "pth" else gguf_types:
                if reason:
                    rows.append(RuntimeResult(runtime.name, "", form, None, None, f"not run: {reason}"))
                    continue
                path = written(folder, form, model)
                try:
                    logits = runtime.logits(path, tokens, config)
                    judged = judge(logits, reference, form, runtime.shifted)
                    rows.append(RuntimeResult(runtime.name, runtime.version(), form, *judged, ""))
                except Exception as error:  # another project's; the other runtimes run all the same
                    note = f"failed: {told(error, named=True)}"
                    rows.append(RuntimeResult(runtime.name, "", form, None, None, note, broke=True))
    return rows


def written(folder: Path, form: str, model: Base) -> Path:
    """The path of a Base as fp32 .pth or as GGUF of a type; the first call for it writes the file."""
    path = folder / (f"{form}.pth" if form == "fp32" else f"{form}.gguf")
    if path.exists():
        return path
    if form == "fp32":
        save_pth(path, model.tensors, dict.fromkeys(model.tensors, torch.float32))
    else:
        # any vocabulary will do, because the runtime is given token ids
        write_gguf(path, model, form, table_vocabulary(WorldTokenizer().token_bytes, model.config.vocab_size))
    return path


def judge(logits: torch.Tensor, reference: torch.Tensor, form: str, shifted: bool) -> tuple[float, float]:
    """Compare logits with the reference -> (largest absolute difference, largest allowed).

    If `shifted`, log-probabilities are compared, at the last positions only, as many as the runtime gives. They are
    normalized again in float64, because a float32 sum over a large vocabulary shifts all of them alike, whatever
    the model. A NaN counts as an infinite difference.
    """
    logits = logits.double()
    if shifted:
        logits, reference = logits.log_softmax(-1), reference.log_softmax(-1)[-len(logits) :]
    difference = (logits - reference).abs().max().item()
    limit = dict(LIMITS)[form] * reference.std().item()
    return (float("inf") if difference != difference else difference), limit


def print_table(rows: Iterable[RuntimeResult]) -> None:
    print(f"| {'runtime':<22} | {'version':<16} | {'format':<6} | max difference | allowed |")
    print(f"|{'-' * 24}|{'-' * 18}|{'-' * 8}|{'-' * 16}|{'-' * 9}|")
    for row in rows:
        found = row.note if row.note else f"{row.difference:14.1e}"
        limit = "" if row.limit is None else f"{row.limit:7.1e}" + ("  FAILED" if row.failed else "")
        print(f"| {row.runtime:<22} | {row.version:<16} | {row.form:<6} | {found:<14} | {limit:<7} |")


class Runtime(NamedTuple):
    """One runtime and its functions.

    package is its name on PyPI, module its import name, form its input ("pth", a float32 copy, or "gguf");
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
        """The command that installs missing packages of the runtime and of its files' writer; "" if none is missing."""
        needed = ((self.module, self.package), *((("gguf", "gguf"),) if self.form == "gguf" else ()))
        packages = [package for module, package in needed if not importlib.util.find_spec(module)]
        return f"pip install {' '.join(packages)}" if packages else ""

    def version(self) -> str:
        return importlib.metadata.version(self.package)


def rwkv_sequence(path: Path, tokens: torch.Tensor, config: ModelConfig, mode: str = "sequence") -> torch.Tensor:
    """Logits (T, V) float32 of the `rwkv` package, in one call with mode "sequence", or one token at a time with mode
    "tokens". It does not look for tuned states in an RWKV-7's file, so they are put into its list of states."""
    model, state, rows = rwkv_model(path, config.version), None, []
    tuned = torch.load(path, weights_only=True, mmap=True) if config.version != "x060" else {}
    if any(key.endswith(".att.time_state") for key in tuned):
        state = model.generate_zero_state()
        for layer in range(len(state) // 3):  # (H, N value, N key), the package's layout too
            state[3 * layer + 1] = tuned[f"blocks.{layer}.att.time_state"].float().clone()
    with torch.inference_mode():
        if mode == "sequence":
            logits: torch.Tensor = model.forward(tokens.tolist(), state, full_output=True)[0]
            return logits.float().view(len(tokens), -1)
        for token in tokens.tolist():
            row, state = model.forward([token], state)
            rows.append(row.float().clone())
    return torch.stack(rows)


def rwkv_model(path: str | Path, version: str) -> Any:
    """The .pth at path, of the generation `version` (x060, x070 or x070a), opened by the `rwkv` package in float32 on
    the CPU."""
    # The package reads at import if its models are RWKV-7, and with deep embeddings.
    settings = {"RWKV_V7_ON": str(int(version != "x060")), "RWKV_DE_VERSION": str(int(version == "x070a"))}
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.environ.update(settings)
        sys.modules.pop("rwkv.model", None)  # of another generation
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # the package uses it, newer torch deprecates it
        from rwkv.model import RWKV

        return RWKV(model=str(path).removesuffix(".pth"), strategy="cpu fp32")


def rwkv_simple(path: Path, tokens: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Logits (T, V) of `rwkv-simple`, one token at a time: over several it raises decays to at least 0.005."""
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
    """The reason why `rwkv-simple` cannot take a model, or "". Its widths are fixed, but not the heads' size (0.1.1 was
    tried with 4, 8, 12, 16, 32 and 64)."""
    if not isinstance(config, RWKV6Config):
        return "takes only RWKV-6"
    if (config.maa_rank, config.decay_rank) != (32, 64):
        return f"takes only low-rank widths 32 and 64, and these are {config.maa_rank} and {config.decay_rank}"
    if config.dim_att != config.n_embd:
        return f"takes as many attention channels as channels, and these are {config.dim_att} and {config.n_embd}"
    return ""


def llama_cpp(path: Path, tokens: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """llama.cpp's, through `xllamacpp`: log-probabilities (1, V) of the whole vocabulary after the prompt."""
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
    """The reason why `rwkv` cannot take a model, or ""."""
    if config.version not in ("x060", "x070", "x070a"):
        return "takes only RWKV-6, RWKV-7 and RWKV-7a"
    if isinstance(config, RWKV7aConfig) and config.deep_size != RWKV7aConfig.deep_size:
        return f"takes only deep embeddings of size {RWKV7aConfig.deep_size}, and these are of {config.deep_size}"
    return ""


def refused_by_llama_cpp(config: ModelConfig) -> str:
    """The reason why llama.cpp cannot take a model, or ""."""
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
    """Compute the logits (T, V) of a Base over tokens (T,) int64, in float64 unless dtype is another. The sequence
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
