"""A hub of one file on 127.0.0.1, as the Hugging Face hub and its mirrors answer for it."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Serves `content` as repository/resolve/main/NAME; it ends the first `cut` answers after half of their bytes."""

    def __init__(self, repository, name, content, cut=0):
        self.path, self.content, self.cut = f"/{repository}/resolve/main/{name}", content, cut
        self.ranges = []  # that were asked for
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(b"")

            def do_GET(self):
                hub.ranges.append(self.headers.get("Range", ""))
                first = int((hub.ranges[-1] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
                content = hub.content[first:]
                hub.cut, cuts = hub.cut - 1, hub.cut > 0
                self.answer(content[: len(content) // 2] if cuts else content, first)

            def answer(self, body, first=0):
                if self.path.partition("?")[0] != hub.path:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206 if first else 200)
                self.send_header("Content-Length", str(len(hub.content) - first))
                self.send_header("Content-Range", f"bytes {first}-{len(hub.content) - 1}/{len(hub.content)}")
                self.send_header("ETag", f'"{hashlib.sha256(hub.content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Accept-Ranges", "bytes")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
