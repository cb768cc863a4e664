"""The bodies of requests: OpenAI's fields and a few of ours, and the prompts in them. A field that is not here is
refused, not ignored, unless its value changes no answer: an unknown field that is null, false or empty is ignored, and
the response names it. Other protocols' bodies become these (`RequestBody.of`).

`state`, `save_state`, `adapter_scale`, `adapters`, `top_k`, `penalty_decay` and `think` are ours; `reasoning_format`
and `chat_template_kwargs` are llama.cpp's. `None` stands for a field that was left out; so does null in a body,
whatever the field.
"""

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from ...cli.errors import UserError, quoted
from ...data.chat import CHAT, EFFORTS, ENABLED, LEADS, TURN_END, ChatLayout, begins_answer, shown_opening, stops_of
from ...data.tokenizer import Tokenizer
from ..prompts import encode
from ..settings import Sampling
from .web import RequestError

SEEDS = 1 << 48  # of requests without one
LONG = 16  # characters for each token of a prompt: longer texts are refused before they are tokenized
BUDGETS = ((1024, "low"), (8192, "medium"))  # up to so many tokens of a thinking, its mode; above them "high"
# other servers' name of a field -> ours
ALIASES = MappingProxyType(
    {
        **dict.fromkeys(("max_new_tokens", "n_predict", "num_predict", "max_output_tokens"), "max_tokens"),
        **dict.fromkeys(("rep_pen", "repeat_penalty"), "repetition_penalty"),
        "sampler_seed": "seed",
        **dict.fromkeys(("stopping_strings", "stop_sequences"), "stop"),
    }
)
# fields without effect on an answer here: of OpenAI, llama.cpp and the clients of docs/guides/serving.md; some of them
# belong to a field of OFF
NO_EFFECT = frozenset(
    "metadata parallel_tool_calls prompt_cache_key safety_identifier service_tier store user "
    "cache_prompt reasoning_control return_progress sse_ping_interval timings_per_token "
    "add_bos_token api_server api_type include_reasoning num_ctx skip_special_tokens truncation_length "
    "adaptive_decay dry_allowed_length dry_base dry_penalty_last_n dry_sequence_breakers dynatemp_exponent min_keep "
    "mirostat_eta mirostat_tau negative_prompt rep_pen_slope smoothing_curve xtc_threshold "
    "ctx_len keep_alive mode presystem prompt_cache_retention".split()
)
EMPTY: tuple[Any, ...] = (None, "", [], {})  # values at which, beside false, any unknown field is off
RANGES = frozenset(("rep_pen_range", "repeat_last_n", "repetition_penalty_range"))  # where penalties look, if there are
PENALTIES = MappingProxyType({"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0})  # off
# fields that are not supported, or only at other values -> the values at which they are off
OFF: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        name: values
        for names, values in (
            ("dry_multiplier dynatemp_range epsilon_cutoff eta_cutoff max_tokens_second min_length min_tokens", (0,)),
            ("mirostat mirostat_mode no_repeat_ngram_size penalty_alpha skew smoothing_factor top_a", (0,)),
            ("prompt_lookup_num_tokens xtc_probability", (0,)),
            ("best_of dynatemp_high dynatemp_low guidance_scale num_beams tfs tfs_z typ_p typical typical_p", (1,)),
            ("encoder_repetition_penalty", (1,)),
            ("do_sample", (True,)),
            ("backend_sampling ban_eos_token dynamic_temperature ignore_eos legacy_api", (False,)),
            ("banned_strings custom_token_bans grammar grammar_string model suffix", ("", [])),
            ("nsigma rep_pen_range repeat_last_n repetition_penalty_range top_n_sigma", (0, -1)),
            ("adaptive_target", (-0.01, -1)),
            ("seed", (-1,)),
            ("modalities", (["text"],)),
            ("user_name", ("User",)),
            ("assistant_name", ("Assistant",)),
        )
        for name in names.split()
    }
)

Body = TypeVar("Body", bound="RequestBody")
Kind = TypeVar("Kind")
EXACT = 1 << 53
KINDS: Mapping[type, str] = MappingProxyType({dict: "an object", list: "a list", str: "a text"})


def unfloated(value: Any) -> Any:
    """A whole number that a client wrote as 1.0, as an int, if it is small enough for the float to be exact."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT else value


Whole = Annotated[int, BeforeValidator(unfloated), Field(strict=True)]
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Tokens = Annotated[
    list[Annotated[int, Field(strict=True, ge=0)]], Field(fail_fast=True)
]  # one message for a million mistakes
Most = Annotated[Whole, Field(ge=-1)]  # tokens of a completion, -1 for as many as there may be
Value = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Bias = Annotated[
    dict[Annotated[int, Field(ge=0)], Value],
    Field(max_length=4096),
    AfterValidator(lambda bias: tuple(sorted(bias.items()))),
]
Several = Field(fail_fast=True, max_length=4096)  # prompts, more than a batch has places


class Prompt(NamedTuple):
    """Tokens to continue; the State after each of `marks` of them is worth caching."""

    tokens: list[int]
    marks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Limits:
    """The most completions of a request, tokens of a prompt and of a completion; the vocabulary's size; and the
    layout of chats."""

    completions: int
    prompt: int
    tokens: int
    vocabulary: int
    chat: ChatLayout = CHAT

    def check_length(self, *texts: str) -> None:
        """Raise RequestError for the texts of a prompt if they would take long to tokenize, to be refused then."""
        if (length := sum(map(len, texts))) > LONG * self.prompt:
            raise self.too_long(f"{length:,} characters")

    def too_long(self, length: str) -> RequestError:
        message = f"the prompt has {length}, and {self.prompt:,} tokens may be; shorten it"
        return RequestError(400, message, code="context_length_exceeded")


def wrong(field: str, words: str) -> RequestError:
    return RequestError(400, f"{field}: {words}", field)


def checked(value: object, kind: type[Kind], field: str) -> Kind:
    """The value of a field. Raises RequestError if it is of another kind."""
    if not isinstance(value, kind):
        raise wrong(field, f"{quoted(value)} is not {KINDS[kind]}, which is due")
    return value


def optional(value: object, kind: type[Kind], field: str) -> Kind | None:
    """The value of a field that may be left out. Raises RequestError if it is of another kind."""
    return None if value is None else checked(value, kind, field)


class RequestBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @classmethod
    def of(cls: type[Body], fields: Mapping[str, Any]) -> Body:
        """The body with these fields, which another protocol's became. Raises RequestValidationError."""
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            mistakes = [{**mistake, "loc": ("body", *mistake["loc"])} for mistake in error.errors()]
            raise RequestValidationError(mistakes, body=fields) from error

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, body: Any) -> Any:
        """Drop fields that are null, which some clients send for all unset ones, and all unknown fields but the first,
        which the message names."""
        if not isinstance(body, dict):
            return body
        named = {*cls.model_fields, next((name for name in body if name not in cls.model_fields), "")}
        return {name: value for name, value in body.items() if value is not None and name in named}


class StreamOptions(RequestBody):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(RequestBody):
    """The fields of all requests for completions."""

    model: str | None = None
    state: str | None = None
    save_state: str | None = None
    adapter_scale: Value | None = None
    adapters: Annotated[dict[str, Value], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] | None = None
    max_tokens: Most | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Seed | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    logit_bias: Bias | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    penalty_decay: float | None = None
    _ignored: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def without_foreign_fields(cls, body: Any, validate: Callable[[Any], "GenerationBody"]) -> "GenerationBody":
        """Rename the fields of ALIASES, drop the fields of NO_EFFECT, of OFF at the values there, and unknown ones that
        are neutral."""
        if not isinstance(body, dict):
            return validate(body)
        known = NO_EFFECT | OFF.keys() | ALIASES.keys() | cls.model_fields.keys()
        ignored = [name for name, value in body.items() if name not in known and (value is False or value in EMPTY)]
        body = {name: value for name, value in body.items() if value is not None and name not in ignored}
        for alias, name in ALIASES.items():
            if alias in body and body.setdefault(name, body[alias]) == body[alias]:
                del body[alias]
        if all(body.get(name, off) == off for name, off in PENALTIES.items()):
            body = {name: value for name, value in body.items() if name not in RANGES}
        body = {name: value for name, value in body.items() if name not in NO_EFFECT and value not in OFF.get(name, ())}
        found = validate(body)
        found._ignored = ignored
        return found

    @property
    def ignored(self) -> list[str]:
        """The names of unknown fields that the request has at neutral values."""
        return self._ignored

    @property
    def turn_end(self) -> str:
        """The text behind an answer in the state that is saved after it."""
        return ""

    @property
    def times(self) -> int:
        """The number of completions of each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def lead(self) -> re.Pattern[str]:
        """A pattern for the beginning of an answer that the client does not get."""
        return LEADS[None]

    @property
    def opening(self) -> str:
        """The part of the prompt that the client gets as the beginning of the answer."""
        return ""

    @property
    def max_tokens_asked(self) -> int:
        """The most tokens of a completion, -1 for as many as there may be."""
        raise NotImplementedError

    def longest(self, limits: Limits) -> int:
        """The most tokens of a completion within limits."""
        return self.max_tokens_asked if 0 <= self.max_tokens_asked <= limits.tokens else limits.tokens

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, defaults: Sampling) -> Sampling:
        """The Sampling of the request, with defaults for missing fields and a random seed for a missing one. Raises
        RequestError for a value out of range."""
        given = {name: getattr(self, name) for name in Sampling.__dataclass_fields__ if hasattr(self, name)}
        given = {name: value for name, value in given.items() if value is not None}
        given["top_logprobs"] = self.top_logprobs_due
        try:
            return replace(defaults, **{"seed": secrets.randbelow(SEEDS), **given})
        except UserError as error:
            message = str(error).removeprefix("--")
            raise RequestError(400, message, message.partition(" ")[0]) from error


Mode = Literal["off", "minimal", "on", "low", "medium", "high"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


Budget = Annotated[Whole, Field(ge=-1)]  # tokens of a thinking, -1 for as many as there may be


class Reasoning(RequestBody):
    """OpenRouter's and OpenAI's settings of the thinking."""

    effort: Effort | None = None
    max_tokens: Budget | None = None
    enabled: bool | None = None
    exclude: bool | None = None
    summary: Any = None
    generate_summary: Any = None

    @property
    def mode(self) -> str:
        return self.effort or switched(self.enabled, self.max_tokens)

    @model_validator(mode="after")
    def excludes_nothing(self) -> "Reasoning":
        if self.exclude and EFFORTS.get(self.mode, self.mode) != "off":
            raise ValueError("exclude: a thinking is reported in reasoning_content; leave exclude out")
        return self


class Thinking(RequestBody):
    """Anthropic's settings of the thinking, which others took over; "auto" and "adaptive" leave it to the model."""

    type: Literal["enabled", "disabled", "auto", "adaptive"]
    budget_tokens: Budget | None = None
    display: Any = None

    @property
    def mode(self) -> str:
        return switched({"enabled": True, "disabled": False}.get(self.type), self.budget_tokens)


class TemplateSettings(RequestBody):
    """llama.cpp's settings of a chat template, as clients use them to set the thinking."""

    think: Mode | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    thinking: bool | None = None
    thinking_budget: Budget | None = None

    @property
    def mode(self) -> str:
        on = self.thinking if self.enable_thinking is None else self.enable_thinking
        return self.think or self.reasoning_effort or switched(on, self.thinking_budget)


def switched(on: bool | None, budget: int | None) -> str:
    """The mode of a thinking that is on or off, with so many tokens at most; "" if neither is given."""
    if on is None and budget is None:
        return ""
    if on is False or budget is None or budget < 1:
        return ENABLED[on is not False and budget != 0]
    return next((mode for most, mode in BUDGETS if budget <= most), "high")


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | Tokens | Annotated[list[str], Several] | Annotated[list[Tokens], Several]
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def without_scores_of_prompts(self) -> "CompletionBody":
        if self.echo and self.logprobs is not None:
            raise ValueError("echo repeats the prompt's text, without logprobs; rwkv-peft eval scores texts")
        return self

    @property
    def texts(self) -> list[str | list[int]]:
        """The prompts, each a text or tokens."""
        given: Any = self.prompt  # mypy does not see which of the four forms it has
        return [given] if isinstance(given, str) or not given or isinstance(given[0], int) else given

    @property
    def top_logprobs_due(self) -> int | None:
        """The number of most probable tokens to report with each token; None without log-probabilities."""
        return self.logprobs

    @property
    def max_tokens_asked(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    def prompt_count(self) -> int:
        return len(self.texts)

    def encode(self, tokenizer: Tokenizer, limits: Limits) -> list[Prompt]:
        prompts = []
        for number, text in enumerate(self.texts):
            if isinstance(text, str):
                limits.check_length(text)
            try:
                tokens = encode(tokenizer, text, number) if isinstance(text, str) else list(text)
            except UserError as error:
                raise RequestError(400, str(error), "prompt") from error
            if not tokens or max(tokens) >= limits.vocabulary:
                message = f"prompt {number}: tokens from 0 to {limits.vocabulary - 1} are due"
                raise RequestError(400, message, "prompt")
            prompts.append(Prompt(tokens))
        return prompts


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Most | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: Any = None
    think: Mode | None = None
    reasoning_effort: Effort | None = None
    reasoning_format: Literal["none", "auto", "deepseek"] | None = None
    reasoning: Reasoning | None = None
    thinking: Thinking | None = None
    enable_thinking: bool | None = None
    thinking_budget: Budget | None = None
    chat_template_kwargs: TemplateSettings | None = None

    @property
    def mode(self) -> str:
        """The mode of thinking, a key of THINK; "" for none, and if the answer has begun. The first field counts."""
        nested = (one.mode for one in (self.reasoning, self.thinking) if one is not None)
        own = switched(self.enable_thinking, self.thinking_budget)
        template = self.chat_template_kwargs.mode if self.chat_template_kwargs else ""
        asked = next(filter(None, (self.think, self.reasoning_effort, *nested, own, template)), "")
        return "" if self.prefilled else EFFORTS.get(asked, asked)

    @property
    def splits(self) -> bool:
        """True if the thinking of an answer is reported beside its words."""
        return self.reasoning_format != "none" and not self.prefilled

    @property
    def stops(self) -> tuple[str, ...]:
        return (*stops_of("Assistant:"), *super().stops)

    @property
    def top_logprobs_due(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def lead(self) -> re.Pattern[str]:
        return LEADS[None if self.prefilled else self.mode]

    @property
    def opening(self) -> str:
        return shown_opening(self.mode)

    @property
    def turn_end(self) -> str:
        return TURN_END

    @property
    def calls(self) -> bool:
        """True if an answer may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def must_call(self) -> bool:
        """True if an answer has to be a call of a tool."""
        return self.tool_choice not in (None, "auto", "none")

    @property
    def max_tokens_asked(self) -> int:
        return self.max_completion_tokens or self.max_tokens or -1

    @property
    def prefilled(self) -> bool:
        """True if the last message is the beginning of the answer."""
        return begins_answer(self.messages[-1])

    def prompt_count(self) -> int:
        return 1

    def encode(self, tokenizer: Tokenizer, limits: Limits) -> list[Prompt]:
        """The messages in the layout of chat data up to the opening of the answer, or to its beginning if that is the
        last one, each part tokenized by itself."""
        if (parts := len(self.messages) + len(self.tools or ())) > limits.prompt:
            raise limits.too_long(f"{parts:,} messages and tools")
        if self.prefilled and self.think:
            raise RequestError(400, "think: the last message has begun the answer already; leave think out", "think")
        try:
            layout = replace(limits.chat, think=self.mode)
            texts = layout.prompt(self.messages, self.tools if self.calls else None)
            limits.check_length(*texts)
            encoded = [tokenizer.encode(text) for text in texts]
        except UserError as error:
            raise RequestError(400, str(error), "messages") from error
        tokens = [token for part in encoded for token in part]
        begins = sum(map(len, encoded[:2]))  # the system text, which other chats have in common
        marked = texts[0].startswith("System:") and begins < len(tokens)
        return [Prompt(tokens, (begins,) if marked else ())]


def prompts_within(body: CompletionBody | ChatBody, tokenizer: Tokenizer, limits: Limits) -> list[Prompt]:
    """The prompts of a request as tokens. Raises RequestError for too many or too long ones, if possible before they
    are tokenized."""
    if (count := body.prompt_count() * body.times) > limits.completions:
        raise RequestError(400, f"{count} answers in one request, and {limits.completions} may be: ask for fewer")
    if body.logit_bias and max(dict(body.logit_bias)) >= limits.vocabulary:
        raise RequestError(400, f"logit_bias: tokens from 0 to {limits.vocabulary - 1} are due", "logit_bias")
    prompts = body.encode(tokenizer, limits)
    for prompt in prompts:
        if len(prompt.tokens) > limits.prompt:
            raise limits.too_long(f"{len(prompt.tokens):,} tokens")
    return prompts


class TokenizeBody(RequestBody):
    """POST /tokenize, as vLLM has it, for clients that tokenize by the server."""

    prompt: str
    model: Any = None
    add_special_tokens: Any = None


class DetokenizeBody(RequestBody):
    """POST /detokenize."""

    tokens: Tokens
    model: Any = None


class LoadBody(RequestBody):
    """POST /v1/adapters: the file lies below the folder of --files."""

    name: str
    file: Annotated[str, Field(min_length=1, max_length=4096)]
    kind: Literal["adapter", "state"] = "adapter"


class FeedbackBody(RequestBody):
    """POST /v1/feedback: the id of a chat's response, and a better text, or a mark."""

    id: str
    index: Annotated[Whole, Field(ge=0)] = 0
    text: str | None = None
    mark: Literal["good", "bad"] | None = None

    @model_validator(mode="after")
    def says_one_thing(self) -> "FeedbackBody":
        if (self.text is None) == (self.mark is None):
            raise ValueError("text, a better answer, or mark, good or bad, is due; give one of them")
        return self
