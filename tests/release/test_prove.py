"""A proof of a run names what is wrong at an endpoint, and nothing where nothing is."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
import unicodedata
from contextlib import contextmanager

import pytest
import torch

from inference.serve.serving import Server
from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.cli.commands import main
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.chat import CHAT
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.release import probe
from training.runs import ROOT, finish, start

OPENAI, OLLAMA = "", "/api"
BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that taught the demo to answer with "Aye!", and its proof."""
    folder = tmp_path_factory.mktemp("prove")
    assert main(["demo", str(folder)]) == 0
    command = [sys.executable, str(ROOT / "train.py"), "--load_model", str(folder / "rwkv7-demo.pth")]
    command += ["--data_file", str(folder / "demo-chats.jsonl"), "--data_type", "sft", "--tokenizer", "bytes"]
    command += ["--precision", "fp32", "--ctx_len", "256", "--micro_bsz", "8", "--lr_init", "3e-3"]
    command += ["--epoch_count", "2", "--answer_rows", "0", "--proj_dir", str(folder / "out")]
    finish(start(command))
    assert main(["prove", str(folder / "out"), "--rows", "3", "--max_tokens", "40"]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def proof(run):
    return probe.read_proof(str(run / "proof.py"))


def verdicts(path, url, *flags, code=0, texts=True):
    """{part: verdict} that a proof prints of an endpoint, which continues texts, too, or chats alone."""
    command = subprocess.run(  # the script by itself, without this package
        [sys.executable, "-I", str(path), "--url", url, *flags], capture_output=True, text=True, cwd="/"
    )
    assert command.returncode == code, command.stderr + command.stdout
    assert not (texts and "texts are refused" in command.stdout)
    lines = command.stdout.splitlines()[1:]
    assert [line[:14].strip() for line in lines] == list(probe.PARTS)
    return {line[:14].strip(): line[14:].split()[0] for line in lines}


def wrong(found):
    return [part for part, verdict in found.items() if verdict == probe.WRONG]


class Replay:
    """An endpoint that gives a proof's answers, with one fault or none, over OpenAI's and Ollama's interface."""

    def __init__(self, proof, fault="", counts=True):
        self.proof, self.fault, self.counts, self.asked = proof, fault, counts, 0
        self.answers = {each["prompt"]: each for each in proof["prompts"]}
        lettered = [
            (margin, text, place)
            for text, each in self.answers.items()
            for place, margin in enumerate(each["answer"]["margins"][: len(each["answer"]["ends"])])
            if len({0, *each["answer"]["ends"][: place + 1]}) == place + 2  # no token without letters up to here
        ]
        firm = [one for one in lettered if one[0] >= proof["tie"]]
        self.changed = min(lettered if fault == "a tie" else firm)  # what rounding changes first

    def encode(self, text):
        return BYTES.encode(unicodedata.normalize("NFC", text) if self.fault == "tokenizer" else text)

    def tokenize(self, body):
        return {"tokens": self.encode(body["content"])} if "content" in body else {"tokens": []}

    def reply(self, body, most):
        """(text, end, tokens of the prompt)."""
        self.asked += 1
        chat = "messages" in body
        if chat:
            text = "".join(CHAT.prompt(body["messages"]))
        else:
            text = body["prompt"] if isinstance(body["prompt"], str) else BYTES.decode(body["prompt"])
        tokens = len(self.encode(text)) + 7 * (chat and self.fault == "template")
        each = self.answers.get(text)
        if each is None:  # an awkward text
            return "x", "length", tokens
        answer = each["base" if self.fault == "adapter" else "answer"]
        said, end = answer["text"], "stop" if answer["end"] != "length" else "length"
        if self.fault == "model file" or (chat and self.fault == "template"):
            said, end = f"Nay, {said}", "stop"
        elif self.fault == "sampling":
            said = said[: len(said) // 2] + f" {self.asked}"
        elif self.fault in ("a tie", "quantization") and text == self.changed[1]:
            said = BYTES.decode(answer["tokens"][: self.changed[2]]) + "\\"
        elif self.fault == "stop" and chat and answer["end"] != "length":
            said, end = f"{said}\n\nUser: And", "length"
        elif self.fault == "early stop" and chat:
            said = said[: len(said) // 2]
        return said, end, tokens


@contextmanager
def served(answer):
    """Serve answer(handler, path, body) on a free port -> its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self, self.path, None)

        def do_POST(self):
            answer(self, self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def send(handler, status, content, kind="application/json"):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def replaying(replay, refused=()):
    def answer(handler, path, body):
        if path in refused or (path == "/tokenize" and not replay.counts):
            return send(handler, 404, {"error": "no such path"})
        if path == "/v1/models":
            return send(handler, 200, {"data": [{"id": "only"}]})
        if path == "/api/tags":
            return send(handler, 200, {"models": [{"name": "only:latest"}]})
        if path == "/tokenize":
            return send(handler, 200, replay.tokenize(body))
        if not (path.startswith(("/v1/", "/api/")) and body):
            return send(handler, 404, b"<html>not here</html>", "text/html")
        if path.startswith("/api"):
            text, end, count = replay.reply(body, body["options"]["num_predict"])
            part = {"message": {"content": text}} if "messages" in body else {"response": text}
            return send(handler, 200, part | {"done_reason": end, "prompt_eval_count": count})
        text, end, count = replay.reply(body, body["max_tokens"])
        part = {"message": {"content": text.strip()}} if "messages" in body else {"text": text}
        usage = {"usage": {"prompt_tokens": count}} if replay.counts else {}
        send(handler, 200, {"choices": [part | {"finish_reason": end}]} | usage)

    return answer


FAULTS = ("tokenizer", "sampling", "model file", "adapter", "quantization", "template", "stop", "early stop")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("interface", [OPENAI, OLLAMA])
def test_a_planted_fault_is_named_and_nothing_else(run, proof, fault, interface):
    with served(replaying(Replay(proof, fault))) as url:
        found = verdicts(run / "proof.py", url + interface, code=1)
    assert wrong(found) == [fault.removeprefix("early ")]


@pytest.mark.parametrize("fault", ["", "a tie"])
@pytest.mark.parametrize("interface", [OPENAI, OLLAMA])
def test_an_endpoint_without_a_fault_is_in_order_however_it_breaks_ties(run, proof, fault, interface):
    with served(replaying(Replay(proof, fault))) as url:
        assert set(verdicts(run / "proof.py", url + interface).values()) == {probe.OK}


@pytest.mark.parametrize("fault", ["", "adapter", "template", "stop"])
def test_an_endpoint_of_chats_alone_is_judged_by_them(run, proof, fault):
    with served(replaying(Replay(proof, fault), refused=["/v1/completions", "/tokenize"])) as url:
        found = verdicts(run / "proof.py", url, code=int(bool(fault)), texts=False)
    assert wrong(found) == ([fault] if fault else []) and found["tokenizer"] == probe.UNKNOWN


def test_without_counts_a_wrong_chat_may_be_the_template_or_the_model(run, proof, capsys):
    replay = Replay(proof, "model file", counts=False)
    with served(replaying(replay, refused=["/v1/completions"])) as url:
        assert main(["prove", str(run / "proof.py"), "--url", url]) == 1
    assert "model file    WRONG" in (table := capsys.readouterr().out) and "or the template" in table


@pytest.fixture(scope="module")
def server(run):
    """serve itself, with the base, the adapter, and a model in which a matrix has another sign."""
    pytest.importorskip("fastapi")
    running = Server("--model", run.parent / "rwkv7-demo.pth", "--adapter", f"taught={run}")
    yield running
    running.stop()


@pytest.mark.parametrize("interface", [OPENAI, OLLAMA])
def test_serve_gives_the_answers_of_the_run_and_its_base_those_of_no_adapter(run, server, interface):
    url = server.url + interface
    assert set(verdicts(run / "proof.py", url, "--model", "taught").values()) == {probe.OK}
    assert wrong(verdicts(run / "proof.py", url, "--model", "rwkv7-demo", code=1)) == ["adapter"]


@pytest.mark.parametrize("form", ["f16", "q8_0"])
def test_llama_cpp_gives_no_false_alarm(run, form, tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp")
    merged, gguf = run.parent / "merged.pth", tmp_path / f"{form}.gguf"
    if not merged.exists():
        base = str(run.parent / "rwkv7-demo.pth")
        assert main(["merge", "--base_model", base, "--adapter", str(run), "--output", str(merged)]) == 0
    assert main(["convert", str(merged), str(gguf), "--gguf_type", form, "--tokenizer", "bytes"]) == 0
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(gguf), 1024, 1, -1
    params.port, params.warmup, params.cpuparams.n_threads = 0, False, 1
    llama = xllamacpp.Server(params)
    assert set(verdicts(run / "proof.py", llama.listening_address).values()) == {probe.OK}


def test_another_file_of_the_same_base_is_a_wrong_model(run, tmp_path, monkeypatch):
    """A merge with a matrix of another sign, which no quantization makes."""
    pytest.importorskip("fastapi")
    tensors = torch.load(run.parent / "rwkv7-demo.pth", weights_only=True)
    tensors["blocks.1.ffn.key.weight"] *= -1
    save_model(tmp_path / "other.pth", tensors)
    other = Server("--model", tmp_path / "other.pth")
    try:
        assert wrong(verdicts(run / "proof.py", other.url, code=1)) == ["model file"]
    finally:
        other.stop()


def test_rounding_here_sets_the_ties(proof):
    assert 0.05 <= proof["tie"] < proof["coarse"] / 2 + 1e-9
    for each in proof["prompts"]:
        answer = each["answer"]
        assert len(answer["tokens"]) == len(answer["margins"]) >= len(answer["ends"])
        assert answer["ends"] == sorted(answer["ends"]) and min(answer["margins"]) >= 0
        assert BYTES.encode(each["prompt"]) == each["tokens"]


def test_the_rows_of_token_files_are_asked_too(run, tmp_path):
    assert (
        main(
            [
                "preprocess",
                str(run.parent / "demo-chats.jsonl"),
                "--output",
                str(tmp_path / "t"),
                "--tokenizer",
                "bytes",
            ]
        )
        == 0
    )
    (tmp_path / "out").mkdir()
    for name in ("config.json", "adapter.safetensors", "metrics.jsonl"):
        (tmp_path / "out" / name).write_bytes((run / name).read_bytes())
    settings = json.loads((run / "config.json").read_text())
    settings["data"] |= {"data_type": "binidx", "path": str(tmp_path / "t")}  # as a run records them
    (tmp_path / "out/config.json").write_text(json.dumps(settings))
    assert main(["prove", str(tmp_path / "out"), "--rows", "1", "--max_tokens", "2"]) == 0
    (prompt, *_) = probe.read_proof(str(tmp_path / "out/proof.py"))["prompts"]
    assert prompt["messages"][0]["role"] == "user" and prompt["tokens"]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda run: os.rename(run.parent / "demo-chats.jsonl", run.parent / "moved.jsonl"), "--data_file FILE"),
        (lambda run: os.rename(run.parent / "rwkv7-demo.pth", run.parent / "moved.pth"), "--load_model FILE"),
        (lambda run: (run / "config.json").unlink(), "config.json does not exist"),
        (lambda run: (run / "config.json").write_text('{"train": {}}'), "holds no settings of a run"),
        (lambda run: (run / "adapter.safetensors").unlink(), "has saved nothing yet"),
    ],
)
def test_a_run_that_lacks_a_file_is_refused_and_no_proof_written(run, tmp_path, change, words):
    for path in (
        "rwkv7-demo.pth",
        "demo-chats.jsonl",
        "out/config.json",
        "out/adapter.safetensors",
        "out/metrics.jsonl",
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((run.parent / path).read_bytes())
    settings = tmp_path / "out" / "config.json"
    settings.write_text(settings.read_text().replace(str(run.parent), str(tmp_path)))
    change(tmp_path / "out")
    with pytest.raises(UserError) as refused:
        main(["prove", str(tmp_path / "out")])
    assert words in str(refused.value) and not (tmp_path / "out" / "proof.py").exists()


def drip(handler, path, body):
    """A reply that begins at once and never ends."""
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" ")
            time.sleep(0.05)
    except OSError:
        pass


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda handler, *_: send(handler, 404, b"<html>", "text/html"), "answers 404, '<html>'"),
        (lambda handler, *_: send(handler, 200, b"<!doctype html>", "text/html"), "answers 200, '<!doctype html>'"),
        (lambda handler, *_: send(handler, 200, [1]), "answers 200, '[1]'"),
        (lambda handler, *_: send(handler, 401, {"error": "no key"}), "answers 401"),
        (
            lambda handler, *_: send(handler, 200, {"data": [{"id": "a"}, {"id": "b"}]}),
            "lists a, b; name one by --model",
        ),
        (lambda handler, *_: handler.close_connection, "start the endpoint, or check the address"),
        (drip, "no whole answer in 0.3 s; allow more by --seconds"),
    ],
    ids=["404", "html", "list", "key", "models", "silent", "slow"],
)
def test_an_endpoint_that_is_none_is_a_message(run, answer, words, capsys):
    with served(answer) as url, pytest.raises(UserError) as refused:
        main(["prove", str(run / "proof.py"), "--url", url, "--seconds", "0.3"])
    assert words in str(refused.value) and refused.value.code == 2


def test_an_answer_of_another_form_is_a_message(run):
    def answer(handler, path, body):
        send(handler, 200, {"data": [{"id": "a"}]} if body is None else {"choices": []})

    with served(answer) as url, pytest.raises(UserError, match="answers in another form"):
        main(["prove", str(run / "proof.py"), "--url", url])


def test_the_script_says_so_too_and_shows_no_traceback(run, tmp_path):
    (tmp_path / "other.py").write_text("print(1)\n")
    for path, flags, words in (
        (run / "proof.py", ["--url", "http://127.0.0.1:9"], "start the endpoint"),
        (run / "proof.py", ["--url", "localhost"], "http://HOST:PORT"),
        (run / "proof.py", ["--url", "http://127.0.0.1:9", "--api_key", "missing"], "--api_key missing"),
    ):
        command = subprocess.run([sys.executable, "-I", path, *flags], capture_output=True, text=True, cwd=tmp_path)
        assert command.returncode == 2 and words in command.stderr and "Traceback" not in command.stderr
    with pytest.raises(UserError, match="other.py is no proof"):
        main(["prove", str(tmp_path / "other.py"), "--url", "http://127.0.0.1:9"])
