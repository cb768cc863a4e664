"""Ollama's interface over the one form of requests: its bodies become chats and texts, and answers become its lines.

Its clients ask /api/version, /api/tags and /api/show first. Names may end in ":latest", the tag that Ollama adds.
Streams are lines of JSON, and the default.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from hashlib import sha256
from typing import Any

from .catalog import Catalog
from .requests import ChatBody, CompletionBody, checked, optional, wrong
from .responses import ChatResponse, CompletionPart, Fields, Usage, finish_reason, line
from .web import RequestError

LATEST = ":latest"
MARKS = ("format", "images", "keep_alive", "options", "think")  # fields of Ollama's own in both bodies
TEXTS = ("prompt", "suffix", "system", "template", "context", "raw")  # of a text to continue
# without effect on an answer: how Ollama runs a model, and where it cuts a prompt
RUNNER = frozenset(
    "f16_kv logits_all low_vram main_gpu num_batch num_gpu num_keep num_thread numa penalize_newline shift truncate "
    "use_mlock use_mmap vocab_only embedding_only".split()
)
ENDLESS = (-1, -2)  # values of num_predict without a limit


def error_fields(error: RequestError) -> Fields:
    return {"error": error.message}


def settings_of(body: Mapping[str, Any]) -> Fields:
    """The fields of our requests for those that chats and texts have in common."""
    options = optional(body.get("options"), dict, "options") or {}
    fields = {name: value for name, value in body.items() if name not in (*MARKS, *TEXTS)} | options
    fields = {name: value for name, value in fields.items() if name not in RUNNER}
    if optional(body.get("images"), list, "images") or body.get("logprobs"):
        field = "images" if body.get("images") else "logprobs"
        raise wrong(field, "it is not supported here; leave it out")
    if fields.get("num_predict") in ENDLESS:
        fields["num_predict"] = -1
    if isinstance(name := fields.get("model"), str):
        fields["model"] = name.removesuffix(LATEST)
    think, form = body.get("think"), body.get("format")
    if think is not None:
        fields["think"] = {True: "on", False: "off"}.get(think, think) if isinstance(think, bool) else think
    if form == "json":
        fields["response_format"] = {"type": "json_object"}
    elif form:
        schema = checked(form, dict, "format")
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    return {"stream": True} | {name: value for name, value in fields.items() if value is not None}


def turn_of(number: int, message: object) -> Fields:
    """A message in OpenAI's form. Its thinking is left out of prompts."""
    turn = dict(checked(message, dict, f"messages.{number}"))
    if optional(turn.pop("images", None), list, f"messages.{number}.images"):
        raise wrong(f"messages.{number}.images", "this model reads text alone; leave them out")
    turn.pop("thinking", None)
    if turn.get("tool_calls") is None:
        turn.pop("tool_calls", None)
    return turn


def chat_of(body: Mapping[str, Any]) -> Fields:
    """The fields of a ChatBody for a body of /api/chat."""
    messages = checked(body.get("messages"), list, "messages")
    return settings_of(body) | {"messages": [turn_of(number, message) for number, message in enumerate(messages)]}


def text_of(body: Mapping[str, Any]) -> tuple[type[ChatBody] | type[CompletionBody], Fields]:
    """The kind of body, and its fields, for a body of /api/generate: a chat of one turn, or with `raw` a text."""
    for name in ("suffix", "template", "context"):
        if body.get(name):
            raise wrong(name, "it is not supported; leave it out, and give raw for a prompt that is laid out already")
    fields = settings_of(body)
    if body.get("raw"):
        return CompletionBody, {"num_predict": -1} | fields | {"prompt": body.get("prompt")}
    system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
    return ChatBody, fields | {"messages": [*system, {"role": "user", "content": body.get("prompt")}]}


class OllamaResponse(ChatResponse):
    """An answer of /api/chat."""

    media = "application/x-ndjson"
    begun_at = 0.0  # when the first token came

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.asked_at = time.monotonic()

    def content(self, part: CompletionPart) -> Fields:
        message: Fields = {"role": "assistant", "content": part.text}
        message |= {"thinking": part.thinking} if part.thinking else {}
        if part.calls:
            functions = [{"name": call.name, "arguments": call.arguments} for call in part.calls]
            message["tool_calls"] = [{"function": function} for function in functions]
        return {"message": message}

    def fields(self, part: CompletionPart) -> Fields:
        return {"model": self.head["model"], "created_at": now(), **self.content(part), "done": False}

    def last(self, part: CompletionPart, usage: Usage) -> Fields:
        """The line that ends an answer, with its figures; times are in nanoseconds."""
        end = time.monotonic()
        begun = self.begun_at or end
        figures = {"prompt_eval_count": usage.prompt, "eval_count": usage.completions}
        seconds = {"total": end - self.asked_at, "load": 0.0, "prompt_eval": begun - self.asked_at, "eval": end - begun}
        durations = {f"{name}_duration": int(1e9 * value) for name, value in seconds.items()}
        done = {"done": True, "done_reason": finish_reason(part.end) or "stop"}
        return self.fields(part) | done | durations | figures | self.notes

    def whole(self, completions: Sequence[CompletionPart], usage: Usage) -> Fields:
        return self.last(completions[0], usage)

    def begin(self, usage: Usage) -> Iterator[bytes]:
        self.begun_at = time.monotonic()
        return iter(())

    def events(self, part: CompletionPart) -> Iterator[bytes]:
        if part.text or part.thinking or part.calls:
            yield line(self.fields(part))
        self.ended = part._replace(text="", thinking="", calls=())

    def ending(self, usage: Usage) -> Iterator[bytes]:
        yield line(self.last(self.ended, usage))

    def failure(self, error: RequestError) -> bytes:
        return line(error_fields(error))


class OllamaText(OllamaResponse):
    """An answer of /api/generate."""

    def content(self, part: CompletionPart) -> Fields:
        return {"response": part.text} | ({"thinking": part.thinking} if part.thinking else {})


def now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def details(catalog: Catalog) -> Fields:
    """What Ollama calls the details of a model."""
    base, weights = catalog.base, catalog.args.weights
    dtype = str(catalog.base_speaker.model.emb.weight.dtype)
    kind = {"int8": "Q8_0", "int4": "Q4_0"}.get(weights or "", {"torch.bfloat16": "BF16"}.get(dtype, "F32"))
    count = sum(tensor.numel() for tensor in base.tensors.values())
    family = base.family.name.lower().replace("-", "")
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
    return {
        "parent_model": "",
        "format": "pth",
        "family": family,
        "families": [family],
        "parameter_size": size,
        "quantization_level": kind,
    }


def listing(catalog: Catalog, name: str) -> Fields:
    """A model in Ollama's list."""
    speaker = catalog[name]
    size = sum(tensor.nbytes for tensor in catalog.base.tensors.values())
    digest = sha256(f"{name} {speaker.digest}".encode()).hexdigest()
    full = name + LATEST
    about = {**details(catalog), "parent_model": "" if speaker is catalog.base_speaker else catalog.base_speaker.name}
    since = datetime.fromtimestamp(catalog.since, timezone.utc).isoformat()
    return {"name": full, "model": full, "modified_at": since, "size": size, "digest": digest, "details": about}


def running(catalog: Catalog, name: str) -> Fields:
    """A model in Ollama's list of those in memory, where it stays."""
    found = listing(catalog, name)
    size = found["size"] if catalog.base_speaker.model.emb.weight.is_cuda else 0
    return found | {"expires_at": "9999-12-31T23:59:59Z", "context_length": catalog.args.max_prompt, "size_vram": size}


def shown(catalog: Catalog, body: Mapping[str, Any]) -> Fields:
    """What Ollama shows of a model. Raises RequestError for an unknown one."""
    found, config = listing(catalog, name_in(body, "model" if "model" in body else "name")), catalog.base.config
    family = found["details"]["family"]
    facts = {
        "general.architecture": family,
        "general.parameter_count": sum(tensor.numel() for tensor in catalog.base.tensors.values()),
        f"{family}.context_length": catalog.args.max_prompt,
        f"{family}.embedding_length": config.n_embd,
        f"{family}.block_count": config.n_layer,
    }
    abilities = ["completion", "tools", "thinking"]
    about = {"modelfile": "", "parameters": "", "template": "", "license": "", "capabilities": abilities}
    return about | {"details": found["details"], "modified_at": found["modified_at"], "model_info": facts}


def loaded(catalog: Catalog, body: Mapping[str, Any]) -> Fields:
    """The answer to a client that has a model loaded, or freed, beforehand: it is in memory, and stays."""
    reason = "unload" if body.get("keep_alive") in (0, "0") else "load"
    return {"model": catalog[name_in(body, "model")].name, "created_at": now(), "done": True, "done_reason": reason}


def name_in(body: Mapping[str, Any], field: str) -> str:
    return checked(body.get(field), str, field).removesuffix(LATEST)
