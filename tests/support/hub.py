"""A local stand-in for the Hugging Face hub, to test downloads without the network.

It implements what huggingface_hub and transformers need to read whole repositories (repository info,
tree, auth-check and resolve: HEAD, GET, Range) and to push models (create, validate-yaml, preupload,
commit, and LFS, which clients use without Xet). Point a client at it in a fresh process, because
huggingface_hub reads `HF_ENDPOINT` on import:

    with Hub() as hub:
        hub.add("datasets", "acme/qa", folder, revision="a" * 40)
        subprocess.run([...], env=os.environ | hub.environment(tmp_path / "home"))
        assert ("GET", f"/datasets/acme/qa/resolve/{'a' * 40}/train.jsonl", False) in hub.requests
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Lock, Thread
from typing import Literal, NamedTuple, Self
from urllib.parse import parse_qs, unquote

Kind = Literal["models", "datasets"]
Files = dict[str, bytes]
Entry = dict[str, object]

# The part of a new repository's .gitattributes that tests are likely to need.
LFS_SUFFIXES = {".bin", ".gguf", ".gz", ".model", ".parquet", ".safetensors", ".zip"}
API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(.*)|/(auth-check))?"
)
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
RANGE = re.compile(r"bytes=(\d+)-")
WRITE = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")
LFS_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
LFS_FILE = re.compile(r"/lfs/([0-9a-f]{64})")


class Request(NamedTuple):
    """One request as received: the path unquoted, without its query."""

    method: str
    path: str
    authorized: bool


class Refusal(Exception):
    """An error response with the hub's own headers."""

    def __init__(self, status: int, code: str | None, message: str, commit: str | None = None):
        super().__init__(message)
        self.status = status
        named = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self.headers = {name: value for name, value in named.items() if value}


class Hub:
    """Repositories served on 127.0.0.1 at `url` during the `with` block."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._repos: dict[tuple[Kind, str], dict[str, Files]] = {}
        self.gates: dict[tuple[Kind, str], dict[str, bool]] = {}
        self.cuts: dict[tuple[str, str], int] = {}
        self.writers: dict[str, set[str]] = {}
        self.private: set[tuple[Kind, str]] = set()
        self.messages: dict[str, str] = {}
        self.stored: dict[str, bytes] = {}
        self.room: int | None = None
        self.storing = Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.socket.listen(128)  # a client connects per file; the default of 5 refuses some
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, kind: Kind, repo: str, folder: Path, *, revision: str) -> None:
        """Commit the folder's current files as `revision` (40 hex digits); `main` moves to it."""
        if not re.fullmatch("[0-9a-f]{40}", revision):
            raise ValueError(f"{repo}: revision {revision!r} is not 40 hex digits")
        revisions = self._repos.setdefault((kind, repo), {})
        revisions.pop(revision, None)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        revisions[revision] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}

    def gate(self, kind: Kind, repo: str, *, token: str, accepted: bool) -> None:
        """Gate the repository's files: `token` identifies a user, `accepted` puts the user on the list.

        Call it once per user. As on the real hub, the info and the tree stay public, and an unknown token is
        refused for every repository, gated or not.
        """
        self.gates.setdefault((kind, repo), {})[token] = accepted

    def allow(self, token: str, owner: str | None = None) -> None:
        """Register a user's token; with it, models of `owner` may be pushed and private ones read."""
        self.writers.setdefault(token, set()).update({owner} if owner else ())

    def create(self, repo: str, *, private: bool, token: str | None) -> None:
        """Create an empty model repository, if `writes` allows it."""
        self.writes(repo, token)
        if ("models", repo) in self._repos:
            there = {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}
            raise Refusal(409, None, json.dumps(there))
        self._repos["models", repo] = {hashlib.sha1(repo.encode()).hexdigest(): {}}
        if private:
            self.private.add(("models", repo))

    def writes(self, repo: str, token: str | None) -> None:
        """Refuse a token that may not write to models of the repository's owner."""
        if token is None:
            raise Refusal(401, None, "Invalid username or password.")
        owner = repo.split("/")[0]
        if owner not in self.writers.get(token, set()):
            message = f"You don't have the rights to create a model under the namespace {owner!r}"
            raise Refusal(403, None, message)

    def push(self, repo: str, lines: list[dict[str, dict[str, str]]]) -> str:
        """Commit the client's lines on top of `main`, and return the commit hash."""
        revisions = self._repos["models", repo]
        files = dict(revisions[next(reversed(revisions))])
        (header,) = [line["value"] for line in lines if line["key"] == "header"]  # type: ignore[comparison-overlap]
        for line in lines:
            match line:
                case {"key": "file", "value": value}:
                    files[value["path"]] = base64.b64decode(value["content"])
                case {"key": "lfsFile", "value": value}:
                    files[value["path"]] = self.stored[value["oid"]]
                case {"key": "deletedFile", "value": value}:
                    del files[value["path"]]
        sha = hashlib.sha1(repr((list(revisions), sorted(files.items()))).encode()).hexdigest()
        revisions[sha] = files
        self.messages[sha] = header["summary"]
        return sha

    def files(self, repo: str) -> Files:
        """Return the files of a model's newest commit."""
        revisions = self._repos["models", repo]
        return revisions[next(reversed(revisions))]

    def commits(self, repo: str) -> list[str]:
        """Return the messages of a model's pushed commits, oldest first."""
        return [self.messages[sha] for sha in self._repos["models", repo] if sha in self.messages]

    def cut(self, repo: str, file: str, *, after_bytes: int) -> None:
        """Drop the connection before byte `after_bytes` of the file, on every attempt."""
        self.cuts[repo, file] = after_bytes

    def mend(self) -> None:
        """Undo every cut, and accept uploads without limit again."""
        self.cuts.clear()
        self.room = None

    def environment(self, home: Path) -> dict[str, str]:
        """Return a new process's variables: this hub only, with the cache in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),  # this and the next override HF_HOME
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets would count the load on another host
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def commit(self, kind: Kind, repo: str, revision: str, token: str | None) -> tuple[str, Files]:
        """Find the commit that `revision` names: its hash and its files."""
        revisions = self._repos.get((kind, repo))
        secret = (kind, repo) in self.private
        if secret and repo.split("/")[0] not in self.writers.get(token or "", set()):
            revisions = None
        if revisions is None:  # strangers cannot tell private from missing
            status, message = (404, "Repository not found") if token else (401, "Invalid username")
            raise Refusal(status, "RepoNotFound", message)
        sha = next(reversed(revisions)) if revision == "main" else revision
        if sha not in revisions:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, revisions[sha]

    def knows(self, token: str) -> bool:
        """Return whether this is a user's token."""
        return token in self.writers or any(token in users for users in self.gates.values())

    def pass_gate(self, kind: Kind, repo: str, token: str | None) -> None:
        """Refuse the files of a gated repository to users who are not on its list."""
        users = self.gates.get((kind, repo))
        if users is None or (token and users.get(token)):
            return
        message = f"Access to {kind[:-1]} {repo} is restricted"
        if token is None:
            raise Refusal(401, "GatedRepo", f"{message}. You must be authenticated to access it.")
        message += f" and you are not in the authorized list. Visit {self.url}/{repo} to ask."
        raise Refusal(403, "GatedRepo", message)


def _entry(path: str, files: Files) -> Entry:
    """Describe a file as in the tree's response."""
    data = files[path]
    git_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: Entry = {"type": "file", "path": path, "oid": git_id, "size": len(data)}
    if PurePosixPath(path).suffix in LFS_SUFFIXES:
        sha256 = hashlib.sha256(data).hexdigest()
        # the tree calls the hash oid, the info sha256
        entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": 130}
    return entry


def _info(repo: str, sha: str, files: Files, *, private: bool) -> Entry:
    """Describe a repository, always including file sizes."""
    entries = [_entry(file, files) for file in files]
    siblings = [{**e, "rfilename": e["path"], "blobId": e["oid"]} for e in entries]
    return {"_id": sha[:24], "id": repo, "sha": sha, "siblings": siblings, "private": private}


def _mode(path: str, files: Files) -> Entry:
    """Describe the upload mode of a file, and the hash of the existing file of that name."""
    lfs = PurePosixPath(path).suffix in LFS_SUFFIXES
    entry: Entry = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
    if path in files:
        there = _entry(path, files)
        sha256 = there.get("lfs")
        entry["oid"] = sha256["oid"] if isinstance(sha256, dict) else there["oid"]
    return entry


def _tree(folder: str, sha: str, files: Files, *, deep: bool) -> list[Entry]:
    """List the files and folders in a folder."""
    start = f"{folder}/" if folder else ""
    inside = [path.removeprefix(start) for path in sorted(files) if path.startswith(start)]
    if folder and not inside:
        raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {sha}", sha)
    parents = [parent.as_posix() for path in inside for parent in PurePosixPath(path).parents]
    folders = [name for name in dict.fromkeys(parents) if name != "."]
    listed: list[Entry] = [
        {"type": "directory", "path": start + name, "oid": sha, "size": 0}
        for name in folders
        if deep or "/" not in name
    ]
    return listed + [_entry(start + p, files) for p in inside if deep or "/" not in p]


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0 with one request per connection, so that a stopped hub leaves no open connection."""

    def __init__(self, hub: Hub, *args: object) -> None:
        self.hub = hub
        super().__init__(*args)  # type: ignore[arg-type]  # socketserver's three arguments

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet: `Hub.requests` is the log."""

    def do_GET(self) -> None:
        self._answer(self._route)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self._write)

    do_PUT = do_POST

    def _answer(self, route: Callable[[str, dict[str, list[str]], str | None], None]) -> None:
        path, _, query = self.path.partition("?")
        bearer = self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, unquote(path), bearer is not None))
        try:
            token = bearer.removeprefix("Bearer ") if bearer else None
            if token and not self.hub.knows(token):
                raise Refusal(401, None, "Invalid credentials in Authorization header")
            route(path, parse_qs(query), token)
        except Refusal as refusal:
            self._send(refusal.status, refusal.headers, str(refusal).encode())

    def _route(self, path: str, query: dict[str, list[str]], token: str | None) -> None:
        kind: Kind
        if match := RESOLVE.fullmatch(path):
            kind = "datasets" if match[1] else "models"
            self._resolve(kind, match[2], unquote(match[3]), unquote(match[4]), token)
        elif match := API.fullmatch(path):
            kind = "models" if match[1] == "models" else "datasets"
            sha, files = self.hub.commit(kind, match[2], unquote(match[4] or "main"), token)
            if match[3] == "tree":
                deep = query.get("recursive") == ["true"]
                self._json(_tree(unquote(match[5].strip("/")), sha, files, deep=deep))
            elif match[6]:
                self.hub.pass_gate(kind, match[2], token)
                self._json({})
            else:
                private = (kind, match[2]) in self.hub.private
                self._json(_info(match[2], sha, files, private=private))
        else:  # 501: clients retry most other server errors, which would hide the gap
            raise Refusal(501, None, f"this hub does not serve {self.command} {path}")

    def _write(self, path: str, query: dict[str, list[str]], token: str | None) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if match := LFS_FILE.fullmatch(path):
            self._store(match[1], body)
        elif match := LFS_BATCH.fullmatch(path):
            self.hub.writes(match[1], token)
            self._json(
                {"transfer": "basic", "objects": self._lfs_batch(json.loads(body)["objects"])}
            )
        elif match := WRITE.fullmatch(path):
            self.hub.writes(match[1], token)
            _, files = self.hub.commit("models", match[1], "main", token)
            if match[2] == "preupload":
                self._json({"files": [_mode(f["path"], files) for f in json.loads(body)["files"]]})
            else:
                sha = self.hub.push(match[1], [json.loads(line) for line in body.splitlines()])
                url = f"{self.hub.url}/{match[1]}/commit/{sha}"
                self._json({"commitUrl": url, "commitOid": sha})
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.hub.create(repo, private=asked["visibility"] == "private", token=token)
            self._json({"url": f"{self.hub.url}/{repo}"})
        else:
            raise Refusal(501, None, f"this hub does not serve {self.command} {path}")

    def _validate(self, card: str) -> None:
        """Refuse a model card whose base is a path; no other rule of the hub is checked."""
        if path := re.search(r"^base_model: (/.*)$", card, re.MULTILINE):
            message = f'"base_model" with value "{path[1]}" is not valid. Use a model id.'
            raise Refusal(400, None, json.dumps({"errors": [{"message": message}]}))
        self._json({"errors": [], "warnings": []})

    def _lfs_batch(self, objects: list[dict[str, str]]) -> list[Entry]:
        """Return an upload address for each object that is not stored yet."""
        return [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
            if each["oid"] not in self.hub.stored
            else {**each}
            for each in objects
        ]

    def _store(self, oid: str, body: bytes) -> None:
        """Store an object if it is complete and there is room."""
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, None, "BadDigest")
        with self.hub.storing:  # clients send several at once
            if self.hub.room == 0:
                raise Refusal(400, None, "RequestTimeout: the connection was idle")
            if self.hub.room:
                self.hub.room -= 1
            self.hub.stored[oid] = body
        self._send(200, {}, b"")

    def _resolve(self, kind: Kind, repo: str, rev: str, file: str, token: str | None) -> None:
        sha, files = self.hub.commit(kind, repo, rev, token)
        self.hub.pass_gate(kind, repo, token)
        if file not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found", sha)
        data, entry = files[file], _entry(file, files)
        lfs = entry.get("lfs")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if isinstance(lfs, dict):
            headers |= {"X-Linked-ETag": f'"{lfs["oid"]}"', "X-Linked-Size": str(len(data))}
        status, start = 200, 0
        if span := RANGE.fullmatch(self.headers.get("Range", "")):
            status, start = 206, int(span[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if start >= len(data):
                raise Refusal(416, None, f"{file} has {len(data)} bytes, none at {start}", sha)
        rest = data[start : self.hub.cuts.get((repo, file), len(data))]
        self._send(status, headers, rest, missing=len(data) - start - len(rest))

    def _json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes, missing: int = 0) -> None:
        """Send a response whose announced length includes the `missing` bytes, then close the connection."""
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body) + missing)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
