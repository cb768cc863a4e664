"""Models in Python. rp.load gives a Model. It computes logits, generates text and trains like any torch module."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import cached_property, partial
from itertools import count
from numbers import Integral
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import torch
from torch import nn

from ..checkpoints.adapters import AdapterSource
from ..checkpoints.base import Base, open_base
from ..checkpoints.tensors import DTYPES
from ..cli.errors import UserError, quoted
from ..cli.names import LARGEST_SCALE, is_finite, is_scale, is_whole
from ..config import AdapterConfig
from ..data.chat import CHAT, THINK
from ..data.recorded import chat_beside, find_tokenizer, recorded_beside
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..inference.decode import generate
from ..inference.flags import WEIGHTS
from ..inference.forward import prefill
from ..inference.loading import merged_base, model_of, read_state_file, resolve_device
from ..inference.settings import Sampling
from ..inference.speakers import DecodingCopy
from ..inference.text import Continuation
from ..inference.weights import quantize_products
from ..models.parts import LanguageModel
from ..models.state import State
from .completions import PendingCompletion, Piece, encode_prompt, prompts_in

DEVICES = ("cpu", "cuda")
Source = str | Path | AdapterSource
# the settings of generate, and other libraries' names for them
SETTINGS = (
    *("max_tokens", "n", "stop", "state", "think", "details", "batch"),
    *(field.name for field in fields(Sampling) if field.name != "measured"),  # which the commands set
)
NAMES = MappingProxyType(
    {
        **dict.fromkeys(("max_new_tokens", "max_length", "num_predict", "max_completion_tokens"), "max_tokens"),
        **dict.fromkeys(("prompt", "inputs", "input_ids", "text", "messages"), "prompts"),
        **dict.fromkeys(("num_return_sequences", "num_samples"), "n"),
        **dict.fromkeys(("stop_strings", "stop_sequences"), "stop"),
        **{"do_sample": "temperature", "logprobs": "top_logprobs", "repeat_penalty": "repetition_penalty"},
        **{"batch_size": "batch", "enable_thinking": "think", "reasoning_effort": "think"},
    }
)


class Model(nn.Module):
    """A model with all that belongs to it: network is the generation's own torch module, base the file it was read
    from, start the State of one sequence before the first token (None: zeros), adapter the settings of rp.add_adapter's
    adapter (None: nothing).

    It is frozen and in eval mode until rp.add_adapter.
    """

    __call__: Callable[..., tuple[Any, ...]]

    def __init__(self, base: Base, precision: str, device: str, weights: str | None = None) -> None:
        super().__init__()

        def prepare(network: LanguageModel) -> None:
            if weights:
                quantize_products(network, weights, lambda text: None)

        self.base = base
        self.network, self.start = model_of(base, precision, device, prepare)
        self._decoding = DecodingCopy()
        self.adapter: AdapterConfig | None = None
        self.chat = CHAT  # the layout of messages and tools, as in the rows of the files' run
        self._find_tokenizer: Callable[[], Tokenizer] = partial(find_tokenizer, None, base.config.vocab_size)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that load was given, or else the one that the files' run recorded or the vocabulary's size
        implies. Raises UserError if none is known."""
        return self._find_tokenizer()

    @property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        return self.network.emb.weight.device

    def begun(self) -> State | None:
        """The State of one sequence before the first token, tuned or loaded, on the model's device; None for zeros."""
        if (tuned := self.network.tuned_states()) is not None or self.start is None:
            return tuned
        return self.start.each(lambda name, tensor: tensor.to(self.device))

    def forward(self, tokens: torch.Tensor, state: State | None = None, hidden_states: bool = False) -> tuple[Any, ...]:
        """Compute tokens (B, T) int64 from state on -> logits (B, T, V), the State after them.

        Without a state they are the beginning. A state of one sequence serves all B. With hidden_states also a tuple of
        n_layer + 1 tensors (B, T, C), as transformers has them: the embeddings, the outputs of all blocks but the last,
        and the input of the head.
        """
        if isinstance(tokens, (str, list, tuple)):
            raise UserError(
                f"{quoted(tokens)} is no tensor of tokens, and one (B, T) is due; model.generate takes texts, and "
                "torch.tensor([model.tokenizer.encode(text)]) gives the tokens of one"
            )
        if tokens.dim() != 2 or tokens.is_floating_point() or not tokens.shape[1]:
            raise UserError(f"tokens {tuple(tokens.shape)} {tokens.dtype}: (B, T) whole numbers are due, T at least 1")
        if state is None and self.start is not None:
            state = self.begun()
        if state is not None and state[0].wkv.shape[0] == 1 < len(tokens):
            state = state.repeated(len(tokens))
        if not hidden_states:
            return self.network(tokens, state)
        network, hidden = self.network, list[torch.Tensor]()
        x, after = network.through_blocks(network.emb(tokens), state, tokens=tokens, hidden=hidden)
        hidden.append(network.ln_out(x))
        return network.head(hidden[-1]), after, tuple(hidden)

    @overload
    def generate(self, prompts: str, max_tokens: int = ..., **settings: Any) -> str: ...

    @overload
    def generate(self, prompts: Any, max_tokens: int = ..., **settings: Any) -> Any: ...

    def generate(
        self,
        prompts: Any = None,
        max_tokens: int = 256,
        *,
        details: bool = False,
        n: int | None = None,
        **settings: Any,
    ) -> Any:
        """Continue one prompt -> its text, or many at once -> a list of texts; with n, a list of n for each prompt.

        A prompt is a text, token ids, or messages ({"role", "content"} each); `stream` lists the settings. With
        details, each text is a CompletionOutput: the text, its tokens, their log-probabilities, the State after it.
        """
        if prompts is None:
            name = next((name for name in settings if NAMES.get(name) == "prompts"), "")
            raise UserError(
                f"generate has no {name}=; " * bool(name) + "its first argument is the prompt: generate('Hello')"
            )
        if details:
            settings = {"top_logprobs": 0} | settings
        prompt_list, alone = prompts_in(prompts)
        pieces = list(self.stream(prompt_list, max_tokens, n=n, **settings))
        ended = {piece.number: piece.completion for piece in pieces if piece.completion is not None}
        answers: list[Any] = [ended[number] if details else ended[number].text for number in sorted(ended)]
        if n is not None:
            answers = [answers[first : first + n] for first in range(0, len(answers), n)]
        return answers[0] if alone else answers

    def stream(
        self,
        prompts: Any,
        max_tokens: int = 256,
        *,
        n: int | None = None,
        stop: str | Iterable[str] | None = None,
        state: State | None = None,
        think: str = "",
        batch: int = 32,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Continue one prompt or many, each n times, `batch` at a time. Yield each Piece as soon as its text is
        certain, the last with the CompletionOutput.

        An answer ends before a text of `stop`, at the end of the document, or after max_tokens. stop=None stops where a
        known chat layout begins its next question, () nowhere. state, of one sequence, precedes each prompt (default:
        the model's own). think is the mode in which answers to messages open; {"messages": …, "tools": …} has tools
        beside messages. sampling are fields of rp.Sampling, such as temperature=0. The same arguments give the same
        answers; another seed gives others. The tokens equal `rwkv-peft generate`'s. Raises UserError.
        """
        if unknown := sorted(set(sampling) - {field.name for field in fields(Sampling)}):
            raise UserError(*no_setting("generate", unknown[0], sampling[unknown[0]], SETTINGS, NAMES))
        for name, value, least in (("max_tokens", max_tokens, 0), ("n", 1 if n is None else n, 1), ("batch", batch, 1)):
            if not isinstance(value, Integral) or value < least:
                raise UserError(f"{name}={value!r}: a whole number from {least} on is due")
        require_one_of("think", think or None, THINK)
        tokenizer, layout = self.tokenizer, replace(self.chat, think=think)
        vocab_size = min(tokenizer.vocab_size, self.network.config.vocab_size)
        if "logit_bias" in sampling:
            sampling["logit_bias"] = bias_of(sampling["logit_bias"], vocab_size)
        numbered = enumerate(prompts_in(prompts)[0])
        encoded = [encode_prompt(prompt, number, tokenizer, vocab_size, layout) for number, prompt in numbered]
        if think and not all(prompt.closing for prompt in encoded):
            raise UserError(f"think={think!r} opens the answers to messages; write the opening into another prompt")
        stops = None if stop is None else tuple(texts_in("stop", stop))
        if "" in (stops or ()):
            raise UserError("stop='': an empty text would stop before the first token; leave it out")
        if state is not None and (not isinstance(state, State) or len(state[0].wkv) != 1):
            raise UserError(
                f"state={quoted(state)}: the State of one sequence is due, as model(tokens) gives it; rp.load takes "
                "the file of one"
            )
        requests = [prompt for prompt in encoded for _ in range(n or 1)]
        texts = [Continuation({}, tokenizer, prompt.stops if stops is None else stops) for prompt in requests]
        pending = [PendingCompletion(*each, partial(self._read, state=state)) for each in zip(count(), requests, texts)]
        steps = generate(
            self._decoding.of(self.network, self.base),
            [prompt.tokens for prompt in requests],
            Sampling(**sampling),
            max_tokens,
            lambda number, token: texts[number].feed(token),
            self.begun() if state is None else state,
            batch,
            tokenizer.vocab_size,
        )
        with self._evaluating():
            for step in steps:
                if (piece := pending[step.number].add(step)) is not None:
                    yield piece
        for one in pending if not max_tokens else ():
            yield one.finish("length")

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Within, the model is in eval mode."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def _read(self, tokens: list[int], *, state: State | None) -> State:
        """The State of one sequence after tokens. They go on from state (None: from the model's own beginning)."""
        start = self.begun() if state is None else state
        with self._evaluating():
            after = prefill(self._decoding.of(self.network, self.base), [tokens], start)[1]
        return after.each(lambda name, tensor: tensor.clone())  # autograd refuses tensors of inference mode


def no_setting(of: str, name: str, value: object, known: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """The message for a keyword that a function does not have, with the setting that it likely means and the known
    ones."""
    near = names.get(name) or next(iter(get_close_matches(name, known, 1)), "")
    meant = f"; did you mean {near}?" if near else ""
    return [f"{name}={quoted(value)} is no setting of {of}{meant}", f"its settings are {', '.join(known)}"]


def texts_in(name: str, argument: Any) -> list[str]:
    """The texts of an argument that may be one. Raises UserError for anything else."""
    texts = list(argument) if isinstance(argument, Iterable) and not isinstance(argument, str) else [argument]
    if wrong := [one for one in texts if not isinstance(one, str)]:
        raise UserError(f"{name}: {quoted(wrong[0])} is no text; a str is due, or several")
    return texts


def bias_of(argument: Any, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """The pairs of logit_bias, {token: number} or pairs, as Sampling has them. Raises UserError for anything else."""
    try:
        pairs = tuple(dict(argument).items())
    except (TypeError, ValueError):
        pairs = ((None, None),)
    if not all(is_whole(token, 0) and token < vocab_size and is_finite(value) for token, value in pairs):
        raise UserError(f"logit_bias={quoted(argument)}: {{token id: number}} is due, with ids below {vocab_size}")
    return pairs


def require_one_of(name: str, argument: object, known: Iterable[str], remedy: str = "") -> None:
    """Raise UserError for an argument that is neither None nor one of the known ones."""
    if argument not in (*known, None):
        raise UserError(f"{name}={argument!r} is not one of {', '.join(known)}{remedy}")


def sources_in(adapters: Iterable[Source] | Mapping[Source, float]) -> list[AdapterSource]:
    """The AdapterSources of an argument. Raises UserError for a scale that is no number, or 0."""
    sources = [one if isinstance(one, AdapterSource) else AdapterSource(one) for one in adapters]
    if not isinstance(adapters, Mapping):
        return sources
    for source, scale in zip(sources, adapters.values()):
        if not is_scale(scale):
            rule = f"a number from -{LARGEST_SCALE} to {LARGEST_SCALE} other than 0 is due"
            raise UserError(f"adapters: {source.path} has the scale {scale!r}; {rule}")
    return [replace(source, amount=float(scale)) for source, scale in zip(sources, adapters.values())]


def load(
    base: str | Path,
    adapters: Iterable[Source] | Mapping[Source, float] = (),
    state: str | Path | None = None,
    *,
    precision: str | None = None,
    weights: str | None = None,
    device: str | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    any_base: bool = False,
) -> Model:
    """Load the .pth of a model, with adapters merged into it in memory, as merge_bone.py would merge them, with
    precision "fp32" by --output_dtype fp32.

    base and adapters may be folders of runs; {adapter: scale} multiplies the change of each. state is a file of time
    states or a saved session that every sequence starts from. precision is "fp32", "bf16" or "fp16" (default: bf16 on a
    GPU, else fp32). weights "int8" or "int4" rounds the matrices to blocks of such integers, for speed and memory. No
    adapter trains on these. device is "cpu" or "cuda" (default, or "auto": the GPU if there is one). any_base takes an
    adapter or state of another base of the same shape. Raises UserError for files that cannot be read or do not fit
    together.
    """
    if device == "auto":
        device = None
    require_one_of("device", device, DEVICES, "; model.to moves a model to one of several GPUs")
    require_one_of("precision", precision, DTYPES)
    require_one_of("weights", weights, WEIGHTS)
    if isinstance(adapters, (str, Path)):
        raise UserError(f"adapters={str(adapters)!r} is one path, and a list is due; give [{str(adapters)!r}]")
    device = resolve_device(device)
    sources = sources_in(adapters)
    precision = precision or ("bf16" if device == "cuda" else "fp32")
    merged = merged_base(base, sources, any_base, torch.float32 if precision == "fp32" else None)
    model = Model(merged, precision, device, weights)
    if state is not None:
        model.start = read_state_file(state, model.network, None if any_base else open_base(base))
    files = (*(source.path for source in reversed(sources)), state, base)
    model.chat = chat_beside(*files)
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        model.tokenizer = tokenizer
    else:
        recorded = recorded_beside(*files)
        name = None if tokenizer is None else str(tokenizer)
        model._find_tokenizer = partial(find_tokenizer, name, model.base.config.vocab_size, recorded)
    return model


def tokenizer(name: str | Path = "world") -> Tokenizer:
    """Load a tokenizer, with encode(text) -> token ids and decode(ids): "world", "bytes", or the path of a World
    vocabulary (.txt) or a tokenizer.json. Raises UserError for any other name."""
    return load_tokenizer(name)
