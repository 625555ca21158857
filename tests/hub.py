"""A Hub on 127.0.0.1 for tests: what `huggingface_hub` asks for to create a repository and commit files to it."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test_token"


@dataclass
class Hub:
    """What was put on the Hub.

    Attributes:
        url: of the server.
        files: content by "kind/owner/name" and path.
        commits: summaries, in order.
        refuse: status and message that every commit is answered with, if set.
    """

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    refuse: tuple[int, str] | None = None

    def run(self, code: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run Python in a process that knows this Hub; the address is read when huggingface_hub is imported."""
        environment = {**os.environ, "HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", **variables}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )


@contextmanager
def serving() -> Iterator[Hub]:
    """A running Hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if match := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)(?:/revision/[\w%]+)?(?:\?.*)?", self.path):
                files = hub.files.get(match[1])
                if files is None:
                    return self.answer(404, {"error": "not found"})
                siblings = [{"rfilename": name} for name in files]
                return self.answer(200, {"id": match[1].split("/", 1)[1], "sha": "0" * 40, "siblings": siblings})
            if match := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)/tree/main(?:\?.*)?", self.path):
                files = hub.files.get(match[1], {})
                listed = [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name, content in files.items()
                ]
                return self.answer(200, listed)
            return self.answer(404, {"error": f"not here: {self.path}"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid credentials"})
            if self.path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                key = f"{asked.get('type', 'model')}s/{asked.get('organization') or 'tester'}/{asked['name']}"
                hub.files.setdefault(key, {})
                return self.answer(200, {"url": f"{hub.url}/{key}", "name": key.split("/", 1)[1]})
            if match := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)/preupload/main(?:\?.*)?", self.path):
                asked = json.loads(body)["files"]
                modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
                return self.answer(200, {"files": modes})
            if match := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)/commit/main(?:\?.*)?", self.path):
                if hub.refuse is not None:
                    return self.answer(hub.refuse[0], {"error": hub.refuse[1]})
                self.commit(match[1], [json.loads(line) for line in body.splitlines()])
                oid = f"{len(hub.commits):040x}"
                return self.answer(200, {"commitUrl": f"{hub.url}/{match[1]}/commit/{oid}", "commitOid": oid})
            return self.answer(404, {"error": f"not here: {self.path}"})

        def commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
            files = hub.files[repository]
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)

    return Handler
