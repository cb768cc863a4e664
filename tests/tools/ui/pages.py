"""A page's server for tests: `rwkv-peft ui` over a folder with the demo's RWKV-7 and rows."""

import http.client
import json
import re
import subprocess
import urllib.parse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CHILDREN = ROOT / "RWKV-PEFT" / "rwkv_peft" / "children.py"
NAMES = ("Ann", "Ben", "Cora", "Dan", "Eve")
ROWS = [
    {
        "prompt": f"{name} has {count} red cups.\nQ: What is there, as JSON?\nA:",
        "completion": f' {{"name": "{name}"}}\n',
    }
    for name in NAMES
    for count in range(2, 10)
]


def make_folder(folder):
    """Put a base model and a file of rows into a folder."""
    (folder / "base.pth").write_bytes((ROOT / "demo" / "rwkv7-demo.pth").read_bytes())
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "Q: Rain?\nA:", "chosen": " yes", "rejected": " no"}))
    return folder


LONG = 120_000  # milliseconds that a browser waits, because other tests may slow all down


def go(page, name):
    """Press the link to a page, and wait for it."""
    from playwright.sync_api import expect

    page.get_by_role("navigation").get_by_role("link", name=name).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(name)
    expect(page).to_have_title(f"{name}: rwkv-peft")


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


class Server:
    """A running `rwkv-peft ui`, and requests to it."""

    def __init__(self, python, folder):
        command = [python, CHILDREN, "rwkv_peft", "ui", "--files", folder, "--port", "0", "--no_browser"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = re.search(r"http\S+", self.process.stdout.readline())[0]
        found = urllib.parse.urlsplit(self.url)
        self.port, self.key = found.port, urllib.parse.parse_qs(found.query)["key"][0]
        self.home = f"http://127.0.0.1:{self.port}/"

    def ask(self, path, body=None, **headers):
        """A request of the key's holder, with `headers` instead of those that a browser sends -> (status, text)."""
        own = {"Host": f"127.0.0.1:{self.port}", "Cookie": f"rwkv-peft-{self.port}={self.key}"}
        if body is not None:
            own["Content-Type"] = "application/json"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request("POST" if data is not None else "GET", path, data, own | headers)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def json(self, path, body=None):
        status, text = self.ask(path, body)
        assert status == 200, text
        return json.loads(text)

    def close(self):
        self.process.terminate()
        self.process.wait(120)
        self.process.stdout.close()
