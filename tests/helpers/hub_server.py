"""A Hub on 127.0.0.1 for tests: what `huggingface_hub`'s released client asks for to publish, read and list models.

Everything is in memory. Faults are rules that a test adds: what kind of request, what goes wrong, how often.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, READ_ONLY = "hf_test_token", "hf_read_only_token"
OWNER = "tester"
NAME = r"(?P<id>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets)/{NAME}"
REV = r"(?P<rev>[^/?]+)"
SECONDS_SLOW = 0.3


@dataclass
class Repo:
    """A repository: every commit is a mapping of paths to contents."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    proposed: list[str] = field(default_factory=list)

    def add(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{branch}{message}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def commit_of(self, revision: str) -> str | None:
        named = {**self.branches, **self.tags, **{oid: oid for oid in self.commits}}
        return named.get(revision.removeprefix("refs/heads/"))


@dataclass
class Fault:
    """What goes wrong.

    Attributes:
        kind: of request: create, info, preupload, batch, put, commit, resolve, list, paths, tree, tag, branch, refs,
            discussions, yaml.
        action: "status"; "drop" before anything is done; "lose" the answer after it is done; "cut" a body in the
            middle, "truncate" it, "corrupt" a byte of it; "slow"; "hang" for `seconds`; "late", done and
            answered after `seconds`.
        status: for "status".
        headers: for "status".
        times: how often.
    """

    kind: str
    action: str
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    seconds: float = 30.0


@dataclass
class Hub:
    """What was put on the Hub.

    Attributes:
        url: of the server.
        repos: by "models/owner/name".
        uploaded: large files by hash.
        faults: to come.
        asked: (kind of request, status) in order.
        siblings: names of files that every repository claims to have besides.
        meanwhile: what others do just before a request of a kind is answered, once.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    uploaded: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, int]] = field(default_factory=list)
    siblings: list[str] = field(default_factory=list)
    meanwhile: dict[str, Callable[[], object]] = field(default_factory=dict)

    def files(self, key: str, revision: str = "main") -> dict[str, bytes]:
        """Paths and contents at a revision."""
        repo = self.repos[key]
        return repo.commits[repo.commit_of(revision) or ""]

    def count(self, kind: str) -> int:
        return sum(asked == kind for asked, _ in self.asked)


@contextmanager
def serving() -> Iterator[Hub]:
    """A running Hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


def _pointer(content: bytes) -> bytes:
    sha = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(content)}\n".encode()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png", ".parquet", ".bin"))


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    routes: list[tuple[str, str, str, Callable[..., None]]] = []

    def route(method: str, pattern: str, kind: str) -> Callable[..., Any]:
        def mark(function: Callable[..., None]) -> Callable[..., None]:
            routes.append((method, rf"{pattern}$", kind, function))
            return function

        return mark

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        fault: Fault | None = None

        def log_message(self, format: str, *args: object) -> None:
            pass

        # Requests in, faults, answers out

        def handle_any(self) -> None:
            parts = urlsplit(self.path)
            path = parts.path
            self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            length = int(self.headers.get("Content-Length") or 0)
            self.body = self.rfile.read(length) if length else b""
            command = self.command.replace("HEAD", "GET")
            found = [(m, kind, f) for method, p, kind, f in routes if method == command and (m := re.match(p, path))]
            if not found:
                return self.send(404, {"error": f"not here: {self.command} {path}"})
            match, kind, function = found[0]
            self.kind = kind
            if (others := hub.meanwhile.pop(kind, None)) is not None:
                others()
            self.fault = self.due(kind)
            action = self.fault.action if self.fault else ""
            if action == "drop":
                return self.cut_off()
            if action == "hang" and self.fault:
                time.sleep(self.fault.seconds)
                return self.cut_off()
            if action in ("slow", "late") and self.fault:
                time.sleep(SECONDS_SLOW if action == "slow" else self.fault.seconds)
            if action == "status" and self.fault:
                return self.send(self.fault.status, {"error": "a fault"}, self.fault.headers)
            try:
                function(self, **{name: unquote(value) for name, value in match.groupdict().items() if value})
            except Refused as refused:
                headers = {"X-Error-Code": refused.code} if refused.code else {}
                self.send(refused.status, {"error": str(refused)}, headers)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def due(self, kind: str) -> Fault | None:
            for fault in hub.faults:
                if fault.kind == kind and fault.times > 0 and not (kind == "resolve" and self.command == "HEAD"):
                    fault.times -= 1
                    return fault
            return None

        def cut_off(self) -> None:
            hub.asked.append((self.kind, 0))
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
            if self.fault and self.fault.action == "lose":
                return self.cut_off()
            hub.asked.append((getattr(self, "kind", "?"), status))
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            action = self.fault.action if self.fault else ""
            if action == "truncate":
                body = body[: len(body) // 2]
            if action == "corrupt":
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if action == "cut":
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.wfile.write(body)

        # Who asks, and for what

        def writer(self) -> None:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token == READ_ONLY:
                raise Refused(403, "Forbidden: your token is read-only")
            if token != TOKEN:
                raise Refused(401, "Invalid credentials in Authorization header")

        def repo(self, kind: str, id: str) -> Repo:
            found = hub.repos.get(f"{kind}/{id}")
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if found is None or (found.private and token not in (TOKEN, READ_ONLY)):
                raise Refused(404 if token else 401, "Repository not found", "RepoNotFound")
            return found

        def at(self, repo: Repo, revision: str) -> str:
            oid = repo.commit_of(revision)
            if oid is None:
                raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return oid

        # Repositories

        @route("POST", r"/api/validate-yaml", "yaml")
        def validate(self) -> None:
            self.send(200, {"errors": [], "warnings": []})

        @route("POST", r"/api/repos/create", "create")
        def create(self) -> None:
            self.writer()
            asked = json.loads(self.body)
            kind, owner = f"{asked.get('type', 'model')}s", asked.get("organization") or OWNER
            if owner != OWNER:
                raise Refused(403, f"You don't have the rights to create a model under {owner}")
            key = f"{kind}/{owner}/{asked['name']}"
            url = {"url": f"{hub.url}/{key.removeprefix('models/')}", "name": f"{owner}/{asked['name']}"}
            if key in hub.repos:
                return self.send(409, {"error": "You already created this repo", **url})
            hub.repos[key] = Repo(private=bool(asked.get("private")) or asked.get("visibility") == "private")
            hub.repos[key].add("main", {".gitattributes": b""}, "initial commit")
            self.send(200, url)

        @route("GET", rf"{API}(?:/revision/{REV})?", "info")
        def info(self, kind: str, id: str, rev: str | None = None) -> None:
            repo = self.repo(kind, id)
            self.send(200, self.described(repo, id, self.at(repo, rev or "main")))

        def described(self, repo: Repo, id: str, oid: str) -> dict[str, Any]:
            files = repo.commits[oid]
            text = files.get("README.md", b"").decode()
            found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
            card = yaml.safe_load(found[1]) if found else {}
            return {
                "id": id,
                "modelId": id,
                "sha": oid,
                "private": repo.private,
                "tags": card.get("tags", []),
                "cardData": card,
                "siblings": [{"rfilename": name} for name in [*files, *hub.siblings]],
            }

        @route("GET", r"/api/models", "list")
        def listed(self) -> None:
            found = [
                self.described(repo, key.removeprefix("models/"), repo.branches["main"])
                for key, repo in hub.repos.items()
                if key.startswith("models/")
            ]
            tag, author = self.query.get("filter"), self.query.get("author")
            self.send(
                200,
                [
                    one
                    for one in found
                    if (not tag or tag in one["tags"]) and (not author or one["id"].startswith(f"{author}/"))
                ],
            )

        def entry(self, path: str, content: bytes) -> dict[str, Any]:
            one: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
            if _is_large(path):
                pointer = _pointer(content)
                sha = hashlib.sha256(content).hexdigest()
                one |= {
                    "oid": _git_hash(pointer),
                    "lfs": {"oid": sha, "size": len(content), "pointerSize": len(pointer)},
                }
            return one

        @route("GET", rf"{API}/tree/{REV}", "tree")
        def tree(self, kind: str, id: str, rev: str) -> None:
            repo = self.repo(kind, id)
            files = repo.commits[self.at(repo, rev)]
            listed = [self.entry(path, content) for path, content in files.items()]
            extra = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in hub.siblings]
            self.send(200, listed + extra)

        @route("POST", rf"{API}/paths-info/{REV}", "paths")
        def paths(self, kind: str, id: str, rev: str) -> None:
            repo = self.repo(kind, id)
            files = repo.commits[self.at(repo, rev)]
            json_body = "json" in (self.headers.get("Content-Type") or "")
            asked = json.loads(self.body)["paths"] if json_body else parse_qs(self.body.decode()).get("paths", [])
            self.send(200, [self.entry(path, files[path]) for path in asked if path in files])

        # Uploads

        @route("POST", rf"{API}/preupload/{REV}", "preupload")
        def preupload(self, kind: str, id: str, rev: str) -> None:
            self.writer()
            repo = self.repo(kind, id)
            present = repo.commits[self.at(repo, rev)]

            def mode(path: str) -> dict[str, Any]:
                answer = {"path": path, "uploadMode": "lfs" if _is_large(path) else "regular", "shouldIgnore": False}
                if path not in present:
                    return answer
                # by which the client leaves out what is there already
                content = present[path]
                return {**answer, "oid": hashlib.sha256(content).hexdigest() if _is_large(path) else _git_hash(content)}

            modes = [mode(file["path"]) for file in json.loads(self.body)["files"]]
            self.send(200, {"files": modes})

        @route("POST", rf"/(?:datasets/)?{NAME}\.git/info/lfs/objects/batch", "batch")
        def batch(self, id: str) -> None:
            self.writer()
            objects = []
            for one in json.loads(self.body)["objects"]:
                upload = {"upload": {"href": f"{hub.url}/_store/{one['oid']}", "header": {}}}
                known = one["oid"] in hub.uploaded
                objects.append({"oid": one["oid"], "size": one["size"], **({} if known else {"actions": upload})})
            self.send(200, {"transfer": "basic", "objects": objects})

        @route("PUT", r"/_store/(?P<oid>\w+)", "put")
        def put(self, oid: str) -> None:
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refused(400, "BadDigest")
            hub.uploaded[oid] = self.body
            self.send(200, b"")

        @route("POST", rf"{API}/commit/{REV}", "commit")
        def commit(self, kind: str, id: str, rev: str) -> None:
            self.writer()
            repo = self.repo(kind, id)
            parent = self.at(repo, rev)
            lines = [json.loads(line) for line in self.body.splitlines()]
            header = next(line["value"] for line in lines if line["key"] == "header")
            if header.get("parentCommit") and header["parentCommit"] != parent and not self.query.get("create_pr"):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.commits[parent])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in hub.uploaded:
                        raise Refused(400, f"LFS pointer {value['path']} points to a file that does not exist")
                    files[value["path"]] = hub.uploaded[value["oid"]]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"])
            answer = {}
            if self.query.get("create_pr"):
                repo.proposed.append(header["summary"])
                rev = f"refs/pr/{len(repo.proposed)}"
                answer["pullRequestUrl"] = f"{hub.url}/{id}/discussions/{len(repo.proposed)}"
            oid = repo.add(rev, files, header["summary"])
            place = f"{hub.url}/{kind}/{id}".replace("/models/", "/")
            self.send(200, {"success": True, "commitOid": oid, "commitUrl": f"{place}/commit/{oid}", **answer})

        @route("POST", rf"{API}/branch/{REV}", "branch")
        def branch(self, kind: str, id: str, rev: str) -> None:
            self.writer()
            repo = self.repo(kind, id)
            if rev in repo.branches:
                raise Refused(409, f"Reference already exists: {rev}")
            repo.branches[rev] = repo.branches["main"]
            self.send(200, {})

        @route("POST", rf"{API}/tag/{REV}", "tag")
        def tag(self, kind: str, id: str, rev: str) -> None:
            self.writer()
            repo, name = self.repo(kind, id), json.loads(self.body)["tag"]
            if name in repo.tags:
                raise Refused(409, f"Tag reference exists already: {name}")
            repo.tags[name] = self.at(repo, rev)
            self.send(200, {})

        @route("GET", rf"{API}/refs", "refs")
        def refs(self, kind: str, id: str) -> None:
            repo = self.repo(kind, id)

            def listed(named: dict[str, str], prefix: str) -> list[dict[str, str]]:
                return [
                    {"name": name, "ref": f"{prefix}{name}", "targetCommit": oid}
                    for name, oid in named.items()
                    if not name.startswith("refs/")
                ]

            branches, tags = listed(repo.branches, "refs/heads/"), listed(repo.tags, "refs/tags/")
            self.send(200, {"branches": branches, "tags": tags, "converts": []})

        @route("GET", rf"{API}/discussions", "discussions")
        def discussions(self, kind: str, id: str) -> None:
            repo = self.repo(kind, id)
            listed = [
                {
                    "title": title,
                    "num": number,
                    "author": {"name": OWNER},
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "status": "open",
                    "repo": {"name": id, "type": "model"},
                    "isPullRequest": True,
                }
                for number, title in enumerate(repo.proposed, start=1)
            ]
            self.send(200, {"discussions": listed, "count": len(listed), "start": 0})

        # Downloads

        @route("GET", rf"/(?!api/)(?:datasets/)?{NAME}/resolve/{REV}/(?P<path>.+)", "resolve")
        def resolve(self, id: str, rev: str, path: str) -> None:
            repo = self.repo("models", id)
            oid = self.at(repo, rev)
            content = repo.commits[oid].get(path)
            if content is None:
                raise Refused(404, "Entry not found", "EntryNotFound")
            large = _is_large(path)
            etag = hashlib.sha256(content).hexdigest() if large else _git_hash(content)
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
            if large:
                headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            if (wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")) is not None:
                start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
                return self.send(206, content[start:stop], headers)
            self.send(200, content, headers)

    return Handler
