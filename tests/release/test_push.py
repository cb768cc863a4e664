"""rwkv-peft push: an adapter, a model and their card reach a hub, here one of this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.cli.errors import UserError
from rwkv_peft.release.card import MARK, cell, write_card
from rwkv_peft.release.push import files_of, main


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's interface that a push asks for; `server.stored` is {path: bytes} of the last commit."""

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        server, host = self.server, f"http://127.0.0.1:{self.server.server_port}"
        if self.headers["Authorization"] != "Bearer hf_right":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            server.made.append(json.loads(asked))
            return self.answer({"url": f"{host}/me/mine", "id": "me/mine", "name": "me/mine"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            kinds = [
                {"path": file["path"], "uploadMode": "regular" if file["size"] < 4000 else "lfs", "shouldIgnore": False}
                for file in json.loads(asked)["files"]
            ]
            return self.answer({"files": kinds})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**file, "actions": {"upload": {"href": f"{host}/store/{file['oid']}", "header": {}}}}
                for file in json.loads(asked)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        assert self.path == "/api/models/me/mine/commit/main"
        for line in map(json.loads, asked.splitlines()):
            if line["key"] == "file":
                server.stored[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                server.stored[line["value"]["path"]] = server.objects[line["value"]["oid"]]
            else:
                server.said.append(line["value"]["summary"])
        self.answer({"commitUrl": f"{host}/me/mine/commit/1", "commitOid": "1", "success": True, "hookOutput": ""})

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self):
        self.answer({"id": "me/mine", "sha": "0", "siblings": []})

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def adapter_file(tmp_path):
    (tmp_path / "run").mkdir()
    told = AdapterMetadata("bone", 8, targets=("ffn.key",), generation="x070")
    save_adapter(tmp_path / "run" / "adapter.safetensors", {"blocks.0.ffn.key.bone": torch.zeros(8, 192)}, told)
    return tmp_path / "run" / "adapter.safetensors"


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.made, server.stored, server.objects, server.said = [], {}, {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def push(*argv, token="hf_right"):
        variables = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-m", "rwkv_peft", "push", *map(str, argv)]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    yield SimpleNamespace(server=server, push=push)
    server.shutdown()


def test_a_run_reaches_the_hub_with_its_card(hub, adapter_file):
    pytest.importorskip("huggingface_hub")
    folder = adapter_file.parent
    (folder / "config.json").write_text("{}")
    code, out, err = hub.push(folder, "me/mine", "--private", "--message", "First")
    assert code == 0, err
    assert f"to http://127.0.0.1:{hub.server.server_port}/me/mine/commit/1" in out
    stored = hub.server.stored
    assert sorted(stored) == ["README.md", "adapter.safetensors"]  # config.json names folders of this machine
    assert stored["adapter.safetensors"] == adapter_file.read_bytes() and hub.server.said == ["First"]
    assert b"--bone_checkpoint adapter.safetensors" in stored["README.md"]
    made = hub.server.made[0]
    assert made.get("private") is True or made["visibility"] == "private"  # versions of its package differ
    code, _, err = hub.push(folder, "me/mine", token="hf_wrong")
    assert code == 2 and "me/mine was not pushed" in err and "Traceback" not in err


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(UserError, match="holds none of adapter.safetensors, rwkv.pth"):
        files_of(tmp_path, None)
    with pytest.raises(UserError, match="adapter-best.safetensors: no such file"):
        files_of(tmp_path, ["adapter-best.safetensors"])
    (tmp_path / "merged.pth").touch()
    assert files_of(tmp_path / "merged.pth", None) == files_of(tmp_path, None) == [tmp_path / "merged.pth"]
    with pytest.raises(UserError, match="--files a.pth are files in a folder"):
        files_of(tmp_path / "merged.pth", ["a.pth"])


def test_no_link_in_a_folder_of_a_stranger_is_pushed(adapter_file):
    (adapter_file.parent / "README.md").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="README.md: a link may lead to any file of yours"):
        main([str(adapter_file.parent), "me/mine", "--dry_run"])


def test_a_readme_of_the_user_stays(tmp_path):
    assert write_card(tmp_path, f"{MARK}\nold\n") and write_card(tmp_path, f"{MARK}\nnew\n")
    assert "new" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    assert not write_card(tmp_path, "other") and (tmp_path / "README.md").read_text() == "mine"


def test_no_name_of_a_file_writes_markup_into_a_card():
    assert cell("a|b<img>\n[x](y)_*`") == "a\\|b&lt;img> \\[x\\](y)\\_\\*\\`"


def test_a_card_of_ours_tells_of_what_is_pushed(adapter_file, monkeypatch):
    pushed, folder = {}, adapter_file.parent
    monkeypatch.setattr("rwkv_peft.release.push.push", lambda repo, contents, *_: pushed.update(contents))
    for name, written in (("adapter-best.safetensors", False), ("adapter.safetensors", True)):
        write_card(folder, f"{MARK}\n`{name}`:\n")
        assert main([str(folder), "me/mine"]) == 0
        assert (
            pushed["README.md"] == folder / "README.md" if written else b"`adapter.safetensors`:" in pushed["README.md"]
        )
