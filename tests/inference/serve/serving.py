"""Runs `rwkv-peft serve` as a process of its own, and sends it requests of any kind."""

import json
import os
import select
import socket
import sys
import time
import urllib.error
import urllib.request

import warm

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"  # of a raw request


class Server:
    """A running `rwkv-peft serve`."""

    def __init__(self, *flags, program=(warm.CHILDREN, "rwkv_peft"), **variables):
        argv = [sys.executable, *map(str, program), "serve", "--port", "0", *map(str, flags)]
        self.process = warm.Command(argv, {**os.environ, "OMP_NUM_THREADS": "1", **variables})
        while not (line := self.process.outputs[0].read_text()).endswith("/v1\n"):
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)
        self.url = line.split()[-1].removesuffix("/v1")
        self.address = ("127.0.0.1", int(self.url.rpartition(":")[2]))

    def send(self, method, path, body=None, **headers):
        """-> (status, headers, body)."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **{name.replace("_", "-"): v for name, v in headers.items()}}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            text = answer.read().decode()
        return (
            answer.status,
            answer.headers,
            json.loads(text) if answer.headers["Content-Type"] == "application/json" else text,
        )

    def client(self):
        """The official client, whose package is installed."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=1, timeout=60)

    def figure(self, name):
        """A figure of /metrics."""
        lines = self.send("GET", "/metrics")[2].splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"rwkv_peft_{name} "))

    def raw(self, data):
        """A socket on which these bytes were sent."""
        connection = socket.create_connection(self.address, timeout=60)
        connection.sendall(data)
        return connection

    def stop(self):
        self.process.kill()
        self.process.communicate(timeout=60)


def wait_until(holds, seconds=300):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(connection, seconds=300):
    """Read until the other side ends a connection -> what it sent."""
    found = b""
    while True:
        assert select.select([connection], [], [], seconds)[0], "the connection stays open"
        try:
            part = connection.recv(1 << 16)
        except ConnectionResetError:
            part = b""
        if not part:
            return found
        found += part
