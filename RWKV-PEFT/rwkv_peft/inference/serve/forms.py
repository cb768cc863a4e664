"""The bodies of requests: OpenAI's fields, and a few of ours. A field that is not here is refused, not passed over.

`state`, `top_k`, `penalty_decay` and `think` are ours. `None` stands for a field that was left out;
so does null in a body, whatever the field.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Whole = Annotated[int, Field(strict=True)]
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Tokens = Annotated[list[Annotated[Whole, Field(ge=0)]], Field(fail_fast=True)]  # a million mistakes are told as one
Several = Field(fail_fast=True, max_length=4096)  # prompts, more than a batch has places


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, body: Any) -> Any:
        """Drop fields that are null, which some clients send for all that nobody set, and all unknown ones but the
        first, which is told."""
        if not isinstance(body, dict):
            return body
        told = {*cls.model_fields, next((name for name in body if name not in cls.model_fields), "")}
        return {name: value for name, value in body.items() if value is not None and name in told}


class StreamOptions(Form):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Asked(Form):
    """The fields of all requests for answers. Fields from `user` on say nothing to a model."""

    model: str
    state: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Seed | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    penalty_decay: float | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def tells_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class TextAsked(Asked):
    """POST /v1/completions."""

    prompt: str | Tokens | Annotated[list[str], Several] | Annotated[list[Tokens], Several]
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt  # which of the four forms it is, mypy does not see
        return [given] if isinstance(given, str) or not given or isinstance(given[0], int) else given

    @property
    def odds(self) -> int | None:
        """The number of most probable tokens that are told with each token; None without log-probabilities."""
        return self.logprobs


class ChatAsked(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    think: Literal["on", "off"] | None = None

    @property
    def odds(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def calls(self) -> bool:
        """Tell whether an answer may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def must_call(self) -> bool:
        """Tell whether an answer is to be a call of a tool."""
        return self.tool_choice not in (None, "auto", "none")


class Tokenized(Form):
    """POST /tokenize, as vLLM has it, whose clients tokenize by the server."""

    prompt: str
    model: Any = None
    add_special_tokens: Any = None


class Detokenized(Form):
    """POST /detokenize."""

    tokens: Tokens
    model: Any = None


class Loaded(Form):
    """POST /v1/adapters: the file lies below the folder of --files."""

    name: str
    file: Annotated[str, Field(min_length=1, max_length=4096)]
    kind: Literal["adapter", "state"] = "adapter"
