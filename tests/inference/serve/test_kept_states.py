"""States by name: what is uploaded, or saved after an answer, answers as its tokens would, and nothing else gets in."""

import re
import signal
import string
import urllib.request

import pytest
import torch
from serving import Server

from rwkv_peft.checkpoints.state_file import write_states
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.inference.loading import load_model
from rwkv_peft.inference.requests import PrefixCache
from rwkv_peft.inference.serve.states import CacheFile
from rwkv_peft.inference.speakers import Speaker

LETTERS = {str(BytesTokenizer().encode(letter)[0]): 100 for letter in string.ascii_lowercase}
ASK = {"model": "poet", "max_tokens": 12, "temperature": 0, "logit_bias": LETTERS}
PROMPT = ASK | {"prompt": "x"}
HI = {"role": "user", "content": "Hi"}
AND = {"role": "user", "content": "and?"}


def text_of(server, **fields):
    status, _, body = server.send("POST", "/v1/completions", PROMPT | fields)
    assert status == 200, body
    return body["choices"][0]["text"]


def chat_of(server, *messages, **fields):
    status, _, body = server.send("POST", "/v1/chat/completions", ASK | {"messages": messages} | fields)
    assert status == 200, body
    return body["choices"][0]["message"]["content"]


def names(server):
    return [state["id"] for state in server.send("GET", "/v1/states")[2]["data"]]


def test_a_state_is_uploaded_listed_downloaded_and_deleted(server, files, tmp_path):
    states = {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16) for i in range(2)}
    for name in ("tuned.pth", "web.st"):
        write_states(tmp_path / name, states)
    put = {"session": files / "state.pth", "tuned": tmp_path / "tuned.pth", "web": tmp_path / "web.st"}
    for name, path in put.items():
        status, _, body = server.send("PUT", f"/v1/states/{name}", path.read_bytes())
        assert (status, body["id"], body["object"]) == (200, name, "state")
    assert names(server) == ["session", "tuned", "web"]
    assert text_of(server, state="session") == text_of(server, state="calm") != text_of(server)
    assert text_of(server, state="tuned") == text_of(server, state="web") != text_of(server)
    with urllib.request.urlopen(f"{server.url}/v1/states/web", timeout=60) as answer:
        (tmp_path / "got.pth").write_bytes(answer.read())
    got = torch.load(tmp_path / "got.pth", weights_only=True)
    assert got.keys() == states.keys() and all(torch.equal(got[key], states[key]) for key in states)
    server.send("PUT", "/states/web", put["session"].read_bytes())
    assert text_of(server, state="web") == text_of(server, state="calm")
    for name in put:
        assert server.send("DELETE", f"/v1/states/{name}")[0] == 200
        assert server.send("POST", "/v1/completions", PROMPT | {"state": name})[0] == 404
    assert names(server) == []


@pytest.mark.parametrize(
    "name, content, status, message",
    [
        ("new", lambda files: b"no state", 400, "^new .*not a"),
        ("new", lambda files: (files / "base.pth").read_bytes(), 400, "^new is no state of this model of 2 layers"),
        ("new", lambda files: (files / "poet.safetensors").read_bytes(), 400, "tensors that are no time states"),
        ("new", lambda files: bytes(1 << 21), 413, "is larger than"),
        ("poet", lambda files: b"", 409, "there is a model poet already"),
        (".new", lambda files: b"", 400, "a name has at most 64 letters"),
        ("..%2Fnew", lambda files: b"", 404, "there is no"),
    ],
)
def test_what_is_no_state_or_no_name_is_refused(server, files, name, content, status, message):
    link = files / "states" / "out.pth"
    if not link.is_symlink():
        link.symlink_to(files / "state.pth")  # leads out of the folder
    for method in ("GET", "PUT", "DELETE"):
        assert server.send(method, "/v1/states/out", b"")[0] == 404
    found, _, body = server.send("PUT", f"/v1/states/{name}", content(files))
    assert found == status and re.search(message, body["error"]["message"])
    assert names(server) == [] and [path.name for path in files.glob("**/new*")] == []


def test_a_state_is_saved_after_an_answer_and_goes_on(server, files):
    read = f"User: Hi\n\nAssistant:{chat_of(server, HI, save_state='talk')}\n\nUser: and?\n\nAssistant:"
    whole = text_of(server, prompt=read)
    assert chat_of(server, AND, state="talk", save_state="talk") == whole
    assert chat_of(server, AND, state="talk") != whole  # because it has replaced the first
    text = text_of(server, save_state="text")
    assert text_of(server, prompt=" more", state="text") == text_of(server, prompt=f"x{text} more")
    stopped = text_of(server, save_state="text", stop=text[4:6], stream=False)
    assert text_of(server, prompt=" more", state="text") == text_of(server, prompt=f"x{stopped} more")
    stream = server.send("POST", "/v1/completions", PROMPT | {"save_state": "text", "stream": True})[2]
    assert stream.endswith("data: [DONE]\n\n")
    assert text_of(server, prompt=" more", state="text") == text_of(server, prompt=f"x{text} more")
    text_of(server, save_state="read", max_tokens=0)
    assert text_of(server, prompt="y", state="read") == text_of(server, prompt="xy")
    for more in ({"n": 2}, {"prompt": ["a", "b"]}, {"save_state": "a/b"}, {"save_state": "calm"}):
        status = server.send("POST", "/v1/completions", PROMPT | {"save_state": "text"} | more)[0]
        assert status == (409 if "calm" in more.values() else 400)
    assert names(server) == ["read", "talk", "text"]
    again = Server(
        "--model", files / "base.pth", "--adapter", f"poet={files}/poet.safetensors", "--states", files / "states"
    )
    try:
        assert text_of(again, prompt=" more", state="text") == text_of(server, prompt=f"x{text} more")
    finally:
        again.stop()
        for name in names(server):
            server.send("DELETE", f"/v1/states/{name}")


def stopped(server, sign):
    server.process.send_signal(sign)
    return server.process.communicate(timeout=600)


def test_a_restart_reads_no_token_twice(server, files, tmp_path, capsys):
    """Of the base, an adapter, one at a scale, and a state; not for another model, and not from a damaged file."""
    (tmp_path / "states").mkdir()
    flags = ("--model", files / "base.pth", "--adapter", f"poet={files}/poet.safetensors")
    flags += ("--states", tmp_path / "states", "--cache_folder", tmp_path)
    asked = [{"model": "base"}, {"model": "poet"}, {"model": "poet", "adapter_scale": 0.5}]
    asked += [{"model": "poet", "state": "calm"}]
    turns = [HI, {"role": "assistant", "content": "Well"}, AND]

    def answers(to, messages):
        found = (
            to.send("POST", "/v1/chat/completions", ASK | {"messages": messages, "n": 2} | more)[2] for more in asked
        )
        choices, usages = zip(*((answer["choices"], answer["usage"]) for answer in found))
        cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
        return choices, [usage["prompt_tokens"] for usage in usages], cached

    first = Server(*flags)
    assert first.send("PUT", "/v1/states/calm", (files / "state.pth").read_bytes())[0] == 200
    read = answers(first, [HI])[1]
    stopped(first, signal.SIGTERM)
    second = Server(*flags)
    choices, all_read, cached = answers(second, turns)
    assert cached == read and choices == answers(server, turns)[0]
    stopped(second, signal.SIGINT)
    third = Server(*flags)
    assert answers(third, turns) == (choices, all_read, all_read)
    third.stop()
    cache, model = PrefixCache(1 << 30), load_model(files / "base.pth")[0]
    for message, cut in (("is of another model", None), ("is not a readable safetensors file", -9)):
        (tmp_path / "cache.safetensors").write_bytes((tmp_path / "cache.safetensors").read_bytes()[:cut])
        CacheFile(tmp_path, cache, Speaker("base", model, digest="other")).read()
        printed = capsys.readouterr().err
        assert "the cache of prefixes begins empty" in printed and message in printed and not cache.prefixes
