"""The page's server: who may use it, which files it shows, and the commands that it starts."""

import contextlib
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.tools.ui.files import Places
from rwkv_peft.tools.ui.flags import parse_flags
from rwkv_peft.tools.ui.form import CHAT, FIRST, chat_form, form
from tools.ui.pages import CHILDREN


@pytest.mark.parametrize(
    "headers, refusal",
    [
        ({"Cookie": ""}, 401),
        ({"Cookie": "rwkv-peft-1=wrong"}, 401),
        ({"Cookie": "rwkv-peft-{port}=wrong"}, 401),
        ({"Host": "evil.example:{port}"}, 421),  # a name that was bound to 127.0.0.1
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "iframe"}, 403),
    ],
    ids=str,
)
def test_only_the_page_itself_is_answered(server, folder, headers, refusal):
    given = {name: value.format(port=server.port) for name, value in headers.items()}
    for path, body in (
        ("/", None),
        ("/?key=wrong", None),
        ("/page/main.js", None),
        ("/api/files", None),
        ("/api/jobs", {"words": ["doctor"]}),
        ("/api/files?name=a&begin=0&size=1", b"a"),
    ):
        status, text = server.ask(path, body, **given)
        assert status == refusal and str(folder) not in text and "script" not in text
    assert server.json("/api/jobs") == []


def test_the_printed_address_gives_the_key_as_a_cookie_that_other_sites_do_not_send(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", f"/?key={server.key}")
    response = connection.getresponse()
    cookie = response.getheader("Set-Cookie")
    assert response.status == 303 and response.getheader("Location") == "/"
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie and "Max-Age=" in cookie  # a browser may be started anew
    assert "default-src 'self'" in response.getheader("Content-Security-Policy")


def test_a_browser_without_the_key_is_told_what_to_do(server):
    for path in ("/", "/?key=wrong"):
        status, text = server.ask(path, Cookie="")
        assert status == 401 and text.startswith("<!doctype html>") and "Open the address that" in text
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}  # in a chat, or in notes
    assert server.ask("/", **link)[0] == 200


def test_the_key_is_on_no_command_line(folder, tmp_path):
    """A browser is started with a file that only its owner reads, and that leads to the printed address."""
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/part && mv {tmp_path}/part {tmp_path}/told\n')
    browser.chmod(0o755)
    command = [sys.executable, CHILDREN, "rwkv_peft", "ui", "--files", folder, "--port", "0"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"BROWSER": f"{browser} %s"}, **streams) as ui:
        address = ui.stdout.readline().split()[1]
        while not (tmp_path / "told").exists():
            assert ui.poll() is None
            time.sleep(0.05)
        told = (tmp_path / "told").read_text().strip()
        file = Path(urllib.request.url2pathname(told.removeprefix("file://")))
        assert address.partition("key=")[2] not in told and stat.S_IMODE(file.stat().st_mode) == 0o600
        assert f"url={address}" in file.read_text()
        ui.send_signal(signal.SIGINT)
        _, errors = ui.communicate(timeout=120)
    assert ui.returncode == 0 and errors == "stopped\n" and not file.exists()


def test_a_thousand_connections_that_ask_for_nothing_stop_nobody(server):
    with contextlib.ExitStack() as stack:
        for _ in range(600):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        assert server.ask("/api/about")[0] == 200


HOSTILE = [5, None, True, [], {}, [[]], "", "x\0y", "x" * 70_000, [["x"]], {"a": 1}, 10**400, -1, 1e308]


def hostile_bodies(name):
    """Bodies of a JSON object whose field holds what nobody expects, as bytes."""
    yield from (b"", b"{", b"[]", b"\xff", b"NaN", b"[" * 5000, b'"\\ud800"')
    texts = ["NaN", "[NaN]", "-Infinity", '"\\ud800"', '["\\ud800"]', "1" * 5000, "[" * 500 + "]" * 500]
    for text in [*map(json.dumps, HOSTILE), *texts]:
        yield f'{{"{name}": {text}}}'.encode()


@pytest.mark.parametrize(
    "path, name",
    [("preview", "path"), ("jobs", "words"), ("chat", "model"), ("runs/stop", "folder"), ("plan", "words")],
)
def test_no_body_is_an_error_of_the_server(server, path, name):
    for body in hostile_bodies(name):
        if path != "plan" or b"[" not in body:  # no plan of some seconds for each
            status, text = server.ask(f"/api/{path}", body)
            assert status == 200 or 0 < len(json.loads(text)["error"]["message"]) < 3000
            assert status in (200, 400, 413), body


@pytest.mark.parametrize(
    "value", ["", "x", "-1", str(1 << 63), str(10**30), "NaN", "%ff", "%00", "%ed%a0%80", "x" * 9000]
)
def test_no_number_is_an_error_of_the_server(server, value):
    for path in (
        "jobs/1?begin=",
        "runs/metrics?folder=.&begin=",
        "files?path=",
        "runs/card?folder=",
        "runs/taken?folder=",
    ):
        assert server.ask(f"/api/{path}{value}")[0] in (200, 400)
    for query in (f"begin={value}&size=1", f"begin=0&size={value}"):
        assert server.ask(f"/api/files?name=a&{query}", b"a")[0] == 400


def test_bodies_have_a_size(server):
    status, text = server.ask("/api/jobs", b"{}", **{"Content-Length": str(100 << 20)})
    assert status == 413 and "1,048,576" in text


@pytest.mark.parametrize("path", ["../..", "/etc", "a/../../..", "link", "link/passwd", "loop/../link/passwd", "x\0y"])
def test_no_name_leads_out_of_the_folder(server, folder, path):
    if not (folder / "link").is_symlink():
        (folder / "link").symlink_to("/etc")
        (folder / "loop").symlink_to("loop")
    places = Places(folder)
    with pytest.raises(UserError, match="not within|zero byte"):
        places.inside(path)
    assert all(entry["name"] != "link" for entry in places.entries(""))
    status, text = server.ask("/api/preview", {"path": path})
    assert status == 400 and "root:" not in text


def test_files_of_the_package_are_not_served_beside_those_of_the_page(server):
    assert server.ask("/page/main.js")[0] == 200
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/app.py", "/docs", "/openapi.json"):
        assert server.ask(path)[0] == 404


def test_every_flag_of_train_is_a_field_once():
    fields = [field for group in form() for field in group["fields"]]
    names = [field["flag"] for field in fields]
    assert len(set(names)) == len(names) > 100 and tuple(names[: len(FIRST)]) == FIRST
    assert {field["kind"] for field in fields} == {"on", "switch", "choice", "list", "path", "paths", "text"}
    assert "h" not in names and tuple(field["flag"] for field in chat_form()) == CHAT


def test_a_choice_says_when_each_value_is_taken():
    words = {field["flag"]: field["words"] for group in form() for field in group["fields"]}
    for flag in ("precision", "optim", "objective", "data_type", "peft"):
        field = next(field for group in form() for field in group["fields"] if field["flag"] == flag)
        assert list(words[flag]) == field["values"] and "; " not in field["help"].partition("(default")[0]
    assert all(field["help"] or field["words"] for group in form() for field in group["fields"])
    assert words["objective"]["dpo"].endswith("(rows: pairs)")
    assert words["precision"]["bf16"].startswith("on most machines")


def test_fields_have_the_defaults_of_their_flags():
    defaults = {field["flag"]: field["default"] for group in form() for field in group["fields"]}
    said = {"bone_r": "64", "peft": "bone", "lr_init": "auto", "clip_low": "0.2"}  # in the help alone
    assert defaults.items() >= (said | {"val_every": "0", "weight_decay": "0.0", "grad_cp": "0"}).items()


def test_a_preview_shows_what_counts(server):
    found = server.json("/api/preview", {"path": "rows.jsonl", "tokenizer": "bytes"})
    given, said = found["documents"][0]["turns"]
    assert (given["learned"], said["learned"]) == (False, True)
    assert said["pieces"] == [[' {"name": "Ann"}\n<end>', True]]
    assert len(found["sizes"]) == 40 and found["bad"] == 0
    assert 0 < found["counted"] < sum(found["sizes"])


def test_a_preview_shows_a_chat_turn_by_turn(server, folder):
    turns = [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "One.\n\nTwo."),
        ("user", "Bye"),
        ("assistant", "Aye"),
    ]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (folder / "chat.jsonl").write_text(json.dumps(row))
    found = server.json("/api/preview", {"path": "chat.jsonl", "tokenizer": "bytes"})["documents"][0]["turns"]
    assert [turn["speaker"].lower() for turn in found] == [role for role, _ in turns]
    assert [turn["learned"] for turn in found] == [False, False, False, True, False]  # "User:" ends an answer
    said = ["".join(text for text, _ in turn["pieces"]).strip() for turn in found]
    assert said == ["Be kind.", "Hi", "One.\n\nTwo.", "Bye", "Aye<end>"]
    assert [counts for turn in found for _, counts in turn["pieces"]] == [False, False, True, False, True]


def test_a_preview_reads_named_columns_a_folder_and_the_start_of_a_text(server, folder):
    (folder / "表 格.csv").write_text("甲,乙\n几？,一\n", "utf-8-sig")
    asked = {"path": "表 格.csv", "tokenizer": "bytes"}
    status, text = server.ask("/api/preview", asked)
    assert status == 400 and "name yours, as --sft_field QUESTION ANSWER" in text
    found = server.json("/api/preview", asked | {"sft_field": ["甲", "乙"]})
    assert found["documents"][0]["turns"][1]["pieces"] == [[" 一<end>", True]]
    (folder / "texts").mkdir()
    for name in "ab":
        (folder / f"texts/{name}.txt").write_text("é" * 10)
    assert server.json("/api/preview", {"path": "texts", "tokenizer": "bytes"})["sizes"] == [21, 21]


def test_a_preview_follows_no_link_out_of_a_folder(server, folder, tmp_path):
    (tmp_path / "secret.jsonl").write_text('{"text": "of mine"}')
    (folder / "linked").mkdir()
    (folder / "linked" / "rows.jsonl").symlink_to(tmp_path / "secret.jsonl")
    status, text = server.ask("/api/preview", {"path": "linked", "tokenizer": "bytes"})
    assert status == 400 and "of mine" not in text


def test_a_preview_tells_which_rows_are_refused(server, folder):
    (folder / "bad.jsonl").write_text('{"text": "good"}\nnot json\n{"nothing": 1}\n')
    found = server.json("/api/preview", {"path": "bad.jsonl", "tokenizer": "bytes"})
    assert found["bad"] == 2 and any("not JSON" in line for line in found["notes"])
    (folder / "worse.jsonl").write_text("not json\n")
    status, text = server.ask("/api/preview", {"path": "worse.jsonl", "tokenizer": "bytes"})
    assert status == 400 and "not JSON" in json.loads(text)["error"]["message"]


def test_a_plan_refuses_flags_in_their_own_words(server):
    for path in ("/api/plan", "/api/check"):
        found = server.json(path, {"words": ["--load_model", "base.pth", "--bone_r", "7", "--micro_bz", "2"]})
        assert found["code"] == 2 and "did you mean --micro_bsz" in found["text"]
    found = server.json("/api/plan", {"words": ["--load_model", "base.pth", "--data_type", "sft", "--data_file", "x"]})
    assert found["code"] == 2 and "--tokenizer world has 65,536 tokens" in found["text"]


def test_a_check_refuses_what_start_refuses(server, folder):
    (folder / "taken").mkdir()
    (folder / "taken" / "adapter.safetensors").touch()
    sound = {"--load_model": "base.pth", "--data_file": "rows.jsonl", "--data_type": "sft", "--tokenizer": "bytes"}
    for change, words in (
        ({"--proj_dir": "taken"}, "taken already holds adapter.safetensors"),
        ({"--data_file": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"--data_file": "base.pth"}, "base.pth"),
        ({"--val_data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({}, ""),
    ):
        given = sound | {"--proj_dir": "new"} | change
        found = server.json("/api/check", {"words": [word for pair in given.items() for word in pair]})
        assert words in found["text"] and found["code"] == (2 if change else 0)
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    "words, flag",
    [
        ("batch size", "micro_bsz"),
        ("gradient accumulation", "accumulate_grad_batches"),
        ("scheduler", "lr_schedule"),
        ("lora alpha", "lora_config"),
        ("learning rate", "lr_init"),
        ("4bit", "quant"),
    ],
)
def test_a_flag_is_found_by_the_words_of_other_tools(words, flag):
    (field,) = (field for group in form() for field in group["fields"] if field["flag"] == flag)
    assert words in field["search"]


def test_other_commands_are_not_started(server):
    for words in ([], ["--version"], ["ui"], ["-c", "print()"]):
        status, text = server.ask("/api/jobs", {"words": words})
        assert status == 400 and "the page starts" in text
    assert server.ask("/api/jobs/..%2f..")[0] in (400, 404)
    assert server.ask("/api/jobs/1%D9%A3")[0] in (400, 404)


def test_the_newest_answers_and_the_card_of_a_run_are_shown(server, folder):
    (folder / "drawing").mkdir()
    (folder / "drawing/README.md").write_text("# mine")
    assert server.json("/api/runs/card?folder=drawing") == {"text": "# mine"}
    assert server.json("/api/runs/card?folder=none") == {"text": ""}
    assert server.ask("/api/runs/card?folder=..")[0] == 400
    lines = [{"step": step, "prompt": "Hi", "completion": "said", "reward": None} for step in range(4)]
    (folder / "drawing" / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert server.json("/api/runs/answers?folder=drawing")["answers.jsonl"] == lines


def wait_for(server, job, state="ended"):
    for _ in range(3000):
        found = server.json(f"/api/jobs/{job}")
        if found["state"] != "running":
            assert found["state"] == state, found
            return found
        time.sleep(0.1)
    raise AssertionError(found)


def test_a_command_outlives_nothing_that_it_needs(server, folder):
    job = server.json("/api/jobs", {"words": ["inspect", "base.pth"]})["id"]
    found = wait_for(server, job)
    assert found["code"] == 0 and "RWKV-7" in found["output"]
    assert server.json(f"/api/jobs/{job}?begin={found['next']}")["output"] == ""
    refused = wait_for(server, server.json("/api/jobs", {"words": ["inspect", "missing.pth"]})["id"])
    assert refused["code"] == 2 and "error: " in refused["output"]


def test_a_command_that_is_killed_is_told(server, folder):
    train = "train --load_model base.pth --data_file rows.jsonl --data_type sft --tokenizer bytes --proj_dir killed"
    words = [*train.split(), "--epoch_count", "10000", "--precision", "fp32"]
    job = server.json("/api/jobs", {"words": words})["id"]
    lock = folder / "killed" / ".run.lock"
    for _ in range(3000):
        if server.json("/api/runs") and lock.exists() and server.json("/api/runs/metrics?folder=killed")["lines"]:
            break
        time.sleep(0.1)
    (run,) = [run for run in server.json("/api/runs") if run["folder"] == "killed"]
    assert run["state"] == "running" and run["flags"]["load_model"] == "base.pth" and run["steps"] >= 500
    os.kill(json.loads(lock.with_name(".run.lock.json").read_text())["process"], signal.SIGKILL)
    assert wait_for(server, job)["code"] not in (0, None)
    status, text = server.ask("/api/runs/stop", {"folder": "killed"})
    assert status == 400 and "does not run" in text


def test_a_command_is_stopped_before_it_has_begun(server):
    train = "train --load_model base.pth --data_file rows.jsonl --data_type sft --tokenizer bytes --proj_dir early"
    job = server.json("/api/jobs", {"words": [*train.split(), "--epoch_count", "10000"]})["id"]
    assert server.json(f"/api/jobs/{job}/stop", {}) == {"id": job}
    assert wait_for(server, job)["code"] == 130


def test_strangers_folders_hide_no_other_run(server, folder, tmp_path):
    secret, deep = tmp_path / "secret.jsonl", "[" * 300 + "]" * 300
    secret.write_text('{"secret": 1}\n')
    contents = {
        "config.json": [deep, '{"flags": {"a": 1e999, "b": "\\ud800"}}', "pipe", secret],
        "metrics.jsonl": [f'{deep}\n{{"step": 1, "loss": 1e999}}\n', '{"a": "\\ud800"}\n', "pipe", secret],
        ".run.lock": ["", "", "pipe", secret],
        ".run.lock.json": ["", "", "pipe", secret],
        "answers.jsonl": ["", "", "pipe", secret],
        os.fsdecode(b"\xff"): ["", "", "pipe", secret],
    }
    (folder / "strange" / "loop").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (folder / "strange" / "loop" / name).symlink_to(name)
    for name, kinds in contents.items():
        for number, content in enumerate(kinds):
            path = folder / "strange" / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to(content) if content is secret else path.write_text(content)
    assert {f"strange/{number}" for number in range(4)} <= {run["folder"] for run in server.json("/api/runs")}
    assert server.json("/api/runs/metrics?folder=strange/0")["lines"] == [{"step": 1, "loss": None}]
    assert server.json("/api/runs/metrics?folder=strange/1")["lines"] == [{"a": "\ud800"}]
    assert server.json("/api/runs/metrics?folder=strange/2")["lines"] == []
    for kind in ("metrics", "answers", "card", "taken"):
        assert "secret" not in server.ask(f"/api/runs/{kind}?folder=strange/3")[1]
    assert len(server.json("/api/files?path=strange/1")) == 4  # one of the names is not Unicode


def test_mistaken_flags_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        parse_flags(["--files", str(tmp_path / "none")])
    with pytest.raises(UserError, match="--port"):
        parse_flags(["--port", "70000"])
    with pytest.raises(UserError, match="ssh -L"):
        parse_flags(["--host", "0.0.0.0"])


def test_a_folder_that_cannot_be_written_is_told(server, folder):
    """Root may write everywhere, so that a file stands in the way."""
    (jobs := folder / ".rwkv-peft").mkdir(exist_ok=True)
    jobs.rename(folder / "aside")
    jobs.write_text("")
    try:
        for path, body in (("/api/jobs", {"words": ["doctor"]}), ("/api/chat", {"model": "base.pth"})):
            status, text = server.ask(path, body)
            assert status == 400 and ".rwkv-peft" in json.loads(text)["error"]["message"]
    finally:
        jobs.unlink()
        (folder / "aside").rename(jobs)
