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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoints.atomic import scratch_folder
from ..checkpoints.base import Base
from ..checkpoints.tensors import save_pth
from ..cli.errors import UserError, summarize
from ..config import ModelConfig
from ..data.tokenizer import WorldTokenizer
from ..models import family_named
from ..models.parts import LanguageModel
from ..models.rwkv7a.keys import RWKV7aConfig
from ..models.state import State, split_time_states, state_of
from .formats import write_gguf
from .vocabulary import table_vocabulary

# The largest difference allowed between a format's logits and the reference, in standard deviations of the logits.
LIMITS = (("fp32", 1e-4), ("f32", 1e-3), ("f16", 2e-2), ("bf16", 1e-1), ("q8_0", 3e-1))


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


def runtimes_agree(model: Base, length: int, gguf_types: Sequence[str]) -> bool:
    """Print a table of each runtime's largest difference from a Base's logits; False if one differs or breaks. Raises
    UserError if none runs."""
    tokens = random_tokens(model.config.vocab_size, length)
    reference = reference_logits(model, tokens)
    reasons, ran, agree = [], False, True
    print_row("runtime", "version", "format", "max difference", "allowed")
    print(f"|{'-' * 13}|{'-' * 18}|{'-' * 8}|{'-' * 16}|{'-' * 9}|")
    with scratch_folder() as folder:
        for runtime in RUNTIMES:
            without = "takes no initial state" if model.has_states and runtime.form == "gguf" else ""
            reason = runtime.missing() or runtime.refuses(model.config) or without
            for form in ("fp32",) if runtime.form == "pth" else gguf_types:
                if reason:
                    reasons.append(reason)
                    print_row(runtime.name, "", form, f"not run: {reason}", "")
                    continue
                path, ran = written(folder, form, model), True
                try:
                    logits = runtime.logits(path, tokens, model.config)
                    version = importlib.metadata.version(runtime.package)
                except Exception as error:  # another project's; the other runtimes run all the same
                    agree = False
                    print_row(runtime.name, "", form, f"failed: {summarize(error, named=True)}", "")
                    continue
                difference, limit = compare(logits, reference, form, runtime.shifted)
                agree = agree and difference <= limit
                failed = "" if difference <= limit else "  FAILED"
                print_row(runtime.name, version, form, f"{difference:14.1e}", f"{limit:7.1e}{failed}")
    if not ran:
        installable = any("pip install" in reason for reason in reasons)
        remedy = "install one of them" if installable else "none takes this model"
        raise UserError(f"no runtime ran, for the reasons above; {remedy}")
    return agree


def print_row(runtime: str, version: str, form: str, found: str, limit: str) -> None:
    """Print a row of the table."""
    print(f"| {runtime:<11} | {version:<16} | {form:<6} | {found:<14} | {limit:<7} |")


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


def compare(logits: torch.Tensor, reference: torch.Tensor, form: str, shifted: bool) -> tuple[float, float]:
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


def rwkv_sequence(path: Path, tokens: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Logits (T, V) float32 of the `rwkv` package, in one call. It does not look for tuned states in an RWKV-7's file,
    nor for shifts in any, so they are put into its list of states."""
    model, state = rwkv_model(path, config.version), None
    family, tensors = family_named(config.version), torch.load(path, weights_only=True, mmap=True)
    tuned = split_time_states(tensors)[1]
    if tuned and family.unread_states(tuned):
        layers = state_of(tuned, State.zeros(config, 1), family.rows_are_keys, path)
        state = [field[0].clone() for layer in layers for field in layer]
    with torch.inference_mode():
        logits: torch.Tensor = model.forward(tokens.tolist(), state, full_output=True)[0]
    return logits.float().view(len(tokens), -1)


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
    entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    row = torch.full((config.vocab_size,), float("nan"))
    for entry in entries:
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


RUNTIMES = (
    Runtime("rwkv", "rwkv", "rwkv", "pth", rwkv_sequence, refused_by_rwkv),
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
