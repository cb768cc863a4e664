"""Endpoints of one trained model, in order and with planted faults, and what `rwkv-peft prove` says of each.

    python benchmarks/prove.py [--epochs 4] [--rows 8]

Trains the demo's RWKV-7 to answer with "Aye!", and writes a proof of the run. By it are asked `rwkv-peft serve`,
llama.cpp's server (`xllamacpp`), and, behind a small server of this file, the `rwkv` package and transformers, in order
and with one fault each. The part that the proof names should be the one that was planted.
"""

import contextlib
import io
import json
import random
import subprocess
import sys
import tempfile
import threading
import unicodedata
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common import Parser, head, require, row

from rwkv_peft.children import python_command


def main():
    parser = Parser(__doc__, epochs=2, rows=1, faults=1, alone=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="rows in the proof")
    parser.add_argument("--faults", type=int, default=len(FAULTS), help="so many of those of the small server")
    parser.add_argument("--alone", action="store_true", help="only the small server of this file")
    args = parser.parse_args()
    require("rwkv", *(() if args.alone else ("fastapi", "gguf", "xllamacpp", "transformers")))
    with tempfile.TemporaryDirectory() as folder:
        Subjects(Path(folder), args).table()


def command(*words):
    """Run a command of the package, without its words."""
    from rwkv_peft.cli.commands import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main([*map(str, words)]) == 0


class Package:
    """A .pth in the `rwkv` package."""

    def __init__(self, path):
        from rwkv_peft.data.chat import CHAT
        from rwkv_peft.data.tokenizer import load_tokenizer
        from rwkv_peft.release.runtimes import rwkv_model

        self.model, self.tokenizer, self.chat = rwkv_model(path, "x070"), load_tokenizer("bytes"), CHAT

    def prompt(self, messages):
        return "".join(self.chat.prompt(messages))

    def encode(self, text):
        return self.tokenizer.encode(text)

    def next(self, tokens, choose, ends, most):
        """Continue tokens by choose(logits, tokens so far), to ends(token) or at most so many -> the new ones."""
        logits, state = self.model.forward(tokens, None)
        new = []
        while len(new) < most:
            new.append(choose(logits, new))
            if ends(new[-1]):
                break
            logits, state = self.model.forward(new[-1:], state)
        return new

    def decode(self, tokens):
        return self.tokenizer.decode([token for token in tokens if token])


class Transformers:
    """A model's folder in transformers, with the tokenizer and the chat template of the folder."""

    def __init__(self, path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import rwkv_peft.hf  # noqa: F401 (the class of RWKV models)

        folder = path.with_suffix("")
        command("convert", path, folder, "--to", "hf", "--tokenizer", "bytes")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def prompt(self, messages):
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def next(self, tokens, choose, ends, most):
        import torch

        tokens = torch.tensor([tokens])
        return self.model.generate(tokens, max_new_tokens=most, do_sample=False)[0, tokens.shape[1] :].tolist()

    def decode(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class Small:
    """An endpoint of OpenAI's interface over a runtime, perhaps with a fault: before, tokens put before each prompt;
    prompt, another layout of chats; encode, a change of each text; stops, the tokens that end an answer; choose, a
    choice of the next token by logits and the tokens so far."""

    def __init__(self, runtime, before=(), prompt=None, change=str, stops=(0,), choose=None):
        self.runtime, self.before, self.change, self.stops = runtime, [*before], change, stops
        self.prompt, self.choose = prompt or runtime.prompt, choose or (lambda logits, _: int(logits.argmax()))

    def answer(self, path, body):
        """The fields of a reply."""
        if path == "/v1/models":
            return {"data": [{"id": "only"}]}
        if path == "/tokenize":
            return {"tokens": self.runtime.encode(self.change(body.get("prompt") or body["content"]))}
        chat = "messages" in body
        text = self.prompt(body["messages"]) if chat else body["prompt"]
        tokens = [*self.before, *(self.runtime.encode(self.change(text)) if isinstance(text, str) else text)]
        new = self.runtime.next(tokens, self.choose, self.stops.__contains__, body["max_tokens"])
        text, end = self.runtime.decode(new), "stop" if new[-1] in self.stops else "length"
        choice = {"message": {"content": text.strip()}} if chat else {"text": text}
        return {"choices": [choice | {"finish_reason": end}], "usage": {"prompt_tokens": len(tokens)}}


def at_random(logits, _):
    return random.choices(range(len(logits)), logits.softmax(-1).tolist())[0]


def penalized(logits, new):
    """As of a server that ignores the request's penalties, and has one of 4 for each time that a token came."""
    logits = logits.clone()
    for token, times in Counter(new).items():
        logits[token] -= 4 * times
    return int(logits.argmax())


def human(messages):
    """A template of another model."""
    names = {"user": "Human", "assistant": "AI", "system": "System"}
    return "".join(f"{names[one['role']]}: {one['content']}\n" for one in messages) + "AI:"


def thinking(messages):
    """Our layout, in which a thinking is opened unasked."""
    return "\n\n".join([*(f"{one['role'].title()}: {one['content']}" for one in messages), "Assistant: <think"])


FAULTS = (  # (words, the part that is to be named, the faults of a Small)
    ("Human and AI for User and Assistant", "template", {"prompt": human}),
    ("a thinking opened unasked", "template", {"prompt": thinking}),
    ("accents composed (NFC)", "tokenizer", {"change": lambda text: unicodedata.normalize("NFC", text)}),
    ("the end's token before each prompt", "tokenizer", {"before": [0]}),
    ("no stop", "stop", {"stops": ()}),
    ("! is a stop", "stop", {"stops": (0, 34)}),
    ("temperature 1 whatever is asked", "sampling", {"choose": at_random}),
    ("a penalty whatever is asked", "model file", {"choose": penalized}),
)


@contextlib.contextmanager
def served(small):
    """Serve a Small on a free port -> its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(None)

        def do_POST(self):
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body):
            found = self.path.startswith("/v1/") or self.path == "/tokenize"
            data = json.dumps(small.answer(self.path, body) if found else {"error": "no such path"}).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def serve(model, *flags):
    """Run `rwkv-peft serve` on a free port -> its address."""
    command = python_command("rwkv_peft", "serve", "--model", model, "--port", "0", *flags)
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE)
    try:
        yield process.stdout.readline().split()[-1].removesuffix("/v1")
    finally:
        process.terminate()
        process.communicate()


def llama(path):
    """llama.cpp's server of a GGUF, which runs as long as it is referred to."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(path), 2048, 1, -1
    params.port, params.warmup, params.cpuparams.n_threads = 0, False, 1
    return xllamacpp.Server(params)


class Subjects:
    """A run, its proof, and the endpoints that are asked by it."""

    def __init__(self, folder, args):
        self.folder, self.args, self.base = folder, args, folder / "rwkv7-demo.pth"
        command("demo", folder)
        flags = [
            "--data_type",
            "sft",
            "--tokenizer",
            "bytes",
            "--precision",
            "fp32",
            "--ctx_len",
            256,
            "--micro_bsz",
            8,
        ]
        flags += ["--lr_init", "3e-3", "--epoch_count", args.epochs, "--answer_rows", 0, "--epoch_save", 1]
        command(
            *("train", "--load_model", self.base, "--data_file", folder / "demo-chats.jsonl"),
            *(*flags, "--proj_dir", folder / "out"),
        )
        self.proof, self.merged = folder / "out" / "proof.py", self.merge("adapter")
        command("prove", folder / "out", "--rows", args.rows)

    def merge(self, adapter):
        """Merge the adapter of this name into the base -> the path of the .pth."""
        path = self.folder / "out" / f"merged-{adapter}.pth"
        file = self.folder / "out" / f"{adapter}.safetensors"
        command("merge", "--base_model", self.base, "--adapter", file, "--output", path)
        return path

    def table(self):
        head("endpoint", "planted", "named", "unknown")
        names = [
            ("rwkv package, fp32", "", {}),
            *((f"rwkv package, {what}", part, faults) for what, part, faults in FAULTS[: self.args.faults]),
        ]
        model = Package(self.merged)
        for name, planted, faults in names:
            with served(Small(model, **faults)) as url:
                self.judge(name, planted, url)
        if self.args.alone:
            return
        with served(Small(Transformers(self.merged))) as url:
            self.judge("transformers, fp32", "", url)
        with served(Small(Package(self.merge("adapter-epoch-1")))) as url:
            self.judge("rwkv package, the file of epoch 1", "model file", url)
        for name, planted, flags in (
            ("serve, fp32", "", ["--adapter", f"mine={self.folder / 'out'}"]),
            ("serve, int8", "", ["--adapter", f"mine={self.folder / 'out'}", "--weights", "int8"]),
            ("serve, int4", "quantization", ["--adapter", f"mine={self.folder / 'out'}", "--weights", "int4"]),
            ("serve, without the adapter", "adapter", []),
        ):
            asked = "mine" if "--adapter" in flags else self.base.stem
            for interface in ("", "/api"):
                with serve(self.base, *flags) as url:
                    self.judge(name + interface.replace("/api", ", as Ollama"), planted, url + interface, asked)
        for form in ("f16", "bf16", "q8_0"):
            gguf = self.folder / f"{form}.gguf"
            command("convert", self.merged, gguf, "--gguf_type", form, "--tokenizer", "bytes")
            server = llama(gguf)
            self.judge(f"llama.cpp, {form}", "", server.listening_address)

    def judge(self, name, planted, url, model=""):
        """Print a row on the endpoint at url."""
        asked = [sys.executable, "-I", self.proof, "--url", url, *(("--model", model) if model else ())]
        lines = subprocess.run(asked, stdout=subprocess.PIPE, text=True).stdout.splitlines()[1:]
        verdicts = {line[:14].strip(): line[14:].split()[0] for line in lines}
        named, unknown = (
            ", ".join(part for part in verdicts if verdicts[part] == word) for word in ("WRONG", "unknown")
        )
        row(name, planted or "nothing", (named or "nothing") + ("" if named == planted else ", MISSED"), unknown)


if __name__ == "__main__":
    main()
