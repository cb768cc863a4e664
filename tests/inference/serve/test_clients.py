"""Requests as well-known clients send them are answered, and a value that would change the answer is refused."""

import json

import pytest
from serving import Server

from rwkv_peft.inference.serve.requests import ALIASES, NO_EFFECT, OFF, ChatBody, CompletionBody

MOST = 8  # tokens of an answer
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PENALTIES = {"presence_penalty": 0, "frequency_penalty": 0}
# the fields that these clients send, as the sources in docs/guides/serving.md make them
BODIES = {
    "SillyTavern, Chat Completion, Custom": (
        CHAT,
        {"messages": TURNS, "model": "", "temperature": 1, "max_tokens": 300, "stream": True, "top_p": 1, **PENALTIES}
        | {"top_k": 0, "stop": [], "logit_bias": {}, "n": 1, "logprobs": None, "top_logprobs": None},
    ),
    "SillyTavern, Chat Completion, a continued answer": (
        CHAT,
        {"messages": [*TURNS, {"role": "assistant", "content": "Well,"}], "model": "base", "max_tokens": 300},
    ),
    "SillyTavern, Text Completion, Generic": (
        TEXT,
        {"prompt": "User: Hi\n\nAssistant:", "model": "", "max_new_tokens": 350, "max_tokens": 350, "n_predict": 350}
        | {"num_predict": 350, "temperature": 1, "top_p": 1, "typical_p": 1, "typical": 1, "sampler_seed": -1}
        | {"seed": -1, "min_p": 0.1, "repetition_penalty": 1.1, "rep_pen": 1.1, "repeat_penalty": 1.1, "top_k": 0}
        | {"rep_pen_range": 0, "repetition_penalty_range": 0, "repeat_last_n": 0, "rep_pen_slope": 1, "skew": 0}
        | {"min_tokens": 0, "add_bos_token": True, "smoothing_factor": 0, "smoothing_curve": 1, "dry_multiplier": 0}
        | {"dry_allowed_length": 2, "dry_base": 1.75, "dry_sequence_breakers": '["\\n", ":"]', "dry_penalty_last_n": 0}
        | {"max_tokens_second": 0, "stopping_strings": ["\nUser:"], "stop": ["\nUser:"], "truncation_length": 2048}
        | {"num_ctx": 2048, "ban_eos_token": False, "ignore_eos": False, "skip_special_tokens": True, "top_a": 0}
        | {"include_reasoning": True, "tfs": 1, "mirostat_mode": 0, "mirostat": 0, "mirostat_tau": 5}
        | {"mirostat_eta": 0.1, "custom_token_bans": "", "banned_strings": [], "api_type": "generic"}
        | {"api_server": "http://127.0.0.1:8000", "xtc_threshold": 0.1, "xtc_probability": 0, "nsigma": 0}
        | {"top_n_sigma": 0, "min_keep": 0, "adaptive_target": -0.01, "adaptive_decay": 0.9, "guidance_scale": 1}
        | {"negative_prompt": "", "stream": True, **PENALTIES},
    ),
    "Open WebUI": (
        CHAT,
        {"stream": True, "model": "base", "messages": TURNS, "stream_options": {"include_usage": True}}
        | {"temperature": 0.8, "top_p": 0.9, "min_p": 0.05, "max_tokens": 128, "seed": 3, "stop": ["\n\n"]}
        | {"logit_bias": {"10": -100}, "response_format": {"type": "text"}, "reasoning_effort": "low"},
    ),
    "Open WebUI, a title": (CHAT, {"model": "base", "messages": TURNS, "stream": False, "max_tokens": 1000}),
    "llama.cpp": (
        CHAT,
        {"messages": TURNS, "stream": True, "return_progress": True, "reasoning_format": "auto", "temperature": 0.8}
        | {"chat_template_kwargs": {"enable_thinking": False}}
        | {"max_tokens": -1, "dynatemp_range": 0, "dynatemp_exponent": 1, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
        | {"xtc_probability": 0, "xtc_threshold": 0.1, "typ_p": 1, "repeat_last_n": -1, "repeat_penalty": 1.1}
        | {"dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1}
        | {"backend_sampling": False, "timings_per_token": True, "sse_ping_interval": 1, **PENALTIES},
    ),
    "RWKV-Runner, a chat": (
        CHAT,
        {"messages": TURNS, "stream": True, "model": "base", "max_tokens": 1000, "temperature": 1, "top_p": 0.3}
        | {"tools": [TOOL], "penalty_decay": 0.996, "user_name": "User", "assistant_name": "Assistant"}
        | {"presystem": True, **PENALTIES},
    ),
    "Cherry Studio, a thinking budget": (
        CHAT,
        {"model": "base", "messages": TURNS, "temperature": 0.7, "top_p": 1, "max_tokens": 4096, "stream": True}
        | {"stream_options": {"include_usage": True}, "enable_thinking": True, "thinking_budget": 8192},
    ),
    "Cherry Studio, as OpenRouter's": (
        CHAT,
        {"model": "base", "messages": TURNS, "stream": True, "reasoning": {"enabled": False, "exclude": True}},
    ),
    "Dify, extended": (
        CHAT,
        {"model": "base", "messages": TURNS, "temperature": 0.7, "top_p": 1, "max_tokens": 512, "stream": True}
        | {"stop": ["User:"], "user": "u1", "stream_options": {"include_usage": True}, "enable_thinking": True}
        | {"thinking": {"type": "enabled"}, "reasoning_effort": "low", "reasoning_format": "auto"}
        | {"chat_template_kwargs": {"enable_thinking": True, "thinking": True, "reasoning_effort": "low"}},
    ),
    "Jan": (
        CHAT,
        {"model": "base", "messages": TURNS, "stream": True, "stream_options": {"include_usage": True}}
        | {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repeat_penalty": 1, "repeat_last_n": 64, "ctx_len": 8192}
        | {"max_output_tokens": 2048, "stop_sequences": ["User:"], **PENALTIES},
    ),
    "KoboldAI Lite, a chat": (
        CHAT,
        {"max_tokens": 350, "model": "base", "temperature": 0.75, "top_p": 0.92, "presence_penalty": 0.07}
        | {"messages": [{"role": "user", "content": "Hi"}], "stream": True},
    ),
    "KoboldAI Lite, a text": (
        TEXT,
        {"max_tokens": 350, "model": "base", "temperature": 0.75, "top_p": 0.92, "presence_penalty": 0.07}
        | {"prompt": "User: Hi", "stop": ["User:", "\nUser "], "stream": True},
    ),
    "KoboldCpp's fields": (
        CHAT,
        {"messages": TURNS, "model": "base", "rep_pen": 1, "rep_pen_range": 360, "use_default_badwordsids": False}
        | {"seed": 1.0},
    ),
    "text-generation-webui, all defaults": (
        CHAT,
        {"messages": TURNS, "model": None, "mode": "instruct", "continue_": False, "n": 1, "stream": False}
        | dict.fromkeys("function_call functions instruction_template character bot_name context greeting".split())
        | {"preset": None, "sampler_priority": None, "max_tokens": None, "stop": None, "logit_bias": None, **PENALTIES}
        | {"dynatemp_low": 1, "dynatemp_high": 1, "dynatemp_exponent": 1, "smoothing_factor": 0, "smoothing_curve": 1}
        | {"min_p": 0, "top_k": 0, "typical_p": 1, "xtc_threshold": 0.1, "xtc_probability": 0, "epsilon_cutoff": 0}
        | {"eta_cutoff": 0, "tfs": 1, "top_a": 0, "top_n_sigma": 0, "dry_multiplier": 0, "dry_allowed_length": 2}
        | {"dry_base": 1.75, "repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0}
        | {"repetition_penalty_range": 1024, "penalty_alpha": 0, "guidance_scale": 1, "mirostat_mode": 0}
        | {"mirostat_tau": 5, "mirostat_eta": 0.1, "prompt_lookup_num_tokens": 0, "max_tokens_second": 0}
        | {"do_sample": True, "dynamic_temperature": False, "temperature_last": False, "auto_max_new_tokens": False}
        | {"ban_eos_token": False, "add_bos_token": True, "skip_special_tokens": True, "static_cache": False}
        | {"truncation_length": 0, "seed": -1, "custom_token_bans": "", "negative_prompt": "", "grammar_string": ""}
        | {"dry_sequence_breakers": '"\\n", ":", "\\"", "*"', "temperature": 1, "top_p": 1, "enable_thinking": False},
    ),
    "Copilot, a model of one's own": (
        CHAT,
        {"messages": [TURNS[0], {**TURNS[1], "copilot_cache_control": {"type": "ephemeral"}}], "model": "base"}
        | {"temperature": 0.1, "top_p": 1, "n": 1, "stream": True, "stream_options": {"include_usage": True}}
        | {"tools": [TOOL], "intent": False, "modalities": ["text"], "prompt_cache_retention": "24h"},
    ),
    "RWKV-Runner, a text with all fields": (
        TEXT,
        {"prompt": "Once", "model": "base", "max_tokens": 500, "global_penalty": False, "stop": ["\n\nUser"]},
    ),
    "RWKV-Runner, a text": (
        TEXT,
        {"prompt": "Once", "stream": True, "model": "base", "max_tokens": 500, "temperature": 1, "top_p": 0.3}
        | {"presence_penalty": 0.4, "frequency_penalty": 0.4, "stop": "\n\nUser"},
    ),
}


@pytest.fixture(scope="module")
def alone(files):
    """A server of one model, with short answers."""
    running = Server("--model", files / "base.pth", "--max_tokens", MOST)
    yield running
    running.stop()


def answers(server, path, body):
    """The objects of a response: one, or a stream's."""
    status, _, found = server.send("POST", path, body)
    assert status == 200, found
    if isinstance(found, dict):
        return [found]
    assert found.endswith("data: [DONE]\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in found.splitlines() if line.startswith("data: {")]


def text_of(objects):
    choices = [choice for found in objects for choice in found["choices"]]
    parts = [choice.get("delta") or choice.get("message") or {"content": choice["text"]} for choice in choices]
    return "".join(part["content"] or "" for part in parts)


@pytest.mark.parametrize("client", BODIES)
def test_a_clients_request_is_answered_as_without_its_own_fields(alone, client):
    path, body = BODIES[client]
    form = ChatBody if path == CHAT else CompletionBody
    seeded = {**body, "seed": 7} | ({"sampler_seed": 7} if "sampler_seed" in body else {})
    plain = {ALIASES.get(name, name): value for name, value in seeded.items()}
    plain = {name: value for name, value in plain.items() if name in form.model_fields}
    found = answers(alone, path, seeded)
    assert answers(alone, path, body) and text_of(found) == text_of(answers(alone, path, plain))
    assert {each["max_tokens"] for each in found} == {MOST}


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_value_that_would_change_the_answer_is_refused(alone, path):
    body = {"messages": TURNS} if path == CHAT else {"prompt": "x"}
    for name in OFF:
        status, _, found = alone.send("POST", path, {**body, name: 0.5, "frequency_penalty": 0.1})
        assert status == 400 and found["error"]["param"] == name
    assert not NO_EFFECT & OFF.keys() and not (NO_EFFECT | ALIASES.keys()) & ChatBody.model_fields.keys()


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_fields_at_neutral_values_are_named_and_others_refused(alone, stream):
    neutral = {"global_penalty": False, "intent": None, "suffix_of": "", "extras": [], "settings": {}}
    sent = {"messages": TURNS, "stream": stream, **neutral}
    assert {*map(str, neutral)} == {name for each in answers(alone, CHAT, sent) for name in each["ignored"]}
    assert not any("ignored" in each for each in answers(alone, CHAT, {"messages": TURNS, "stream": stream}))
    for name, value in {
        "global_penalty": True,
        "tempreature": 0,
        "extras": [1],
        "reasoning": {"exclude": True},
    }.items():
        status, _, found = alone.send("POST", CHAT, {"messages": TURNS, name: value})
        assert status == 400 and found["error"]["param"] == name


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path, asked, tokens",
    [(CHAT, -1, MOST), (CHAT, 0, MOST), (CHAT, 10**7, MOST), (CHAT, 5, 5), (TEXT, -1, MOST), (TEXT, 10**7, MOST)]
    + [(TEXT, 3, 3), (TEXT, 0, 0)],
)
def test_a_limit_beyond_the_servers_is_cut_and_reported(alone, path, asked, tokens, stream):
    body = {"messages": TURNS} if path == CHAT else {"prompt": "Once", "echo": True}
    body |= {"max_tokens": asked, "stream": stream, "stream_options": {"include_usage": True}}
    found = answers(alone, path, body)
    assert found[-1]["usage"]["completion_tokens"] == tokens
    assert [each.get("max_tokens") for each in found] == [None if tokens == asked else MOST] * len(found)
    assert path == CHAT or text_of(found).startswith("Once") and (tokens or text_of(found) == "Once")


@pytest.mark.parametrize("path", ["/health", "/models", "/props", "/models/base"])
def test_routes_answer_with_and_without_v1(alone, path):
    assert alone.send("GET", path)[0] == alone.send("GET", f"/v1{path}")[0] == 200
