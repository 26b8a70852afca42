"""A Hub on 127.0.0.1: what the unmodified clients use of the Hugging Face Hub's HTTP API, with faults on demand.

    with HubServer(folder) as hub:
        subprocess.run([sys.executable, "push.py"], env=os.environ | hub.env)  # the endpoint is read at import
        hub.files("tester/model"), hub.commits("tester/model"), hub.requests

Its users: ``tester`` (also in the organisation ``lab``) with ``hub.token`` and the read-only ``hub.read_token``, and
``stranger`` with ``hub.stranger_token``. A new repo has one commit with ``.gitattributes``, as on the Hub. Repos and
blobs are kept in memory and outlive ``hub.stop()``; a commit is all or nothing.
"""

import base64
import contextlib
import fnmatch
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
LARGE = 10 * 2**20  # bytes from which any file is LFS
LFS = """7z arrow bin bz2 ckpt gz h5 joblib model msgpack npy npz onnx parquet pb pickle pkl pt pth safetensors tar
    tar.* tflite tgz wasm xz zip zst"""
PATTERNS = [f"*.{e}" for e in LFS.split()] + ["*tfevents*"]
MEDIA = ["*.jpg", "*.jpeg", "*.png", "*.webp"]  # LFS in datasets only
ATTRIBUTES = "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in PATTERNS).encode()


class Entry(NamedTuple):
    """A file of a commit; ``oid`` is git's SHA-1 of a regular file, the SHA-256 of one in LFS."""

    oid: str
    size: int
    lfs: bool


class Commit(NamedTuple):
    """All files as they are after it."""

    oid: str
    summary: str
    files: dict[str, Entry]
    date: str


@dataclass
class Repo:
    """``branches`` are lists of commits, oldest first."""

    kind: str
    name: str
    private: bool
    branches: dict[str, list[Commit]]
    gated: bool = False


@dataclass
class Fault:
    """What goes wrong with the next ``times`` matching requests, see ``HubServer.fault``."""

    pattern: str
    times: float
    status: int | None
    headers: dict[str, str]
    body: bytes
    after_bytes: int | None
    wrong_bytes: bool
    no_answer: bool
    delay: float


class Refused(Exception):
    """An error answer: status, ``X-Error-Code`` (or "") and message."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message} | headers
        if code:
            self.headers["X-Error-Code"] = code


@dataclass
class HubServer:
    """A running Hub. ``folder`` holds the clients' cache and, with ``xet``, the store of hf-xet."""

    folder: Path
    xet: bool = False
    url: str = ""
    token: str = "hf_" + "w" * 34
    read_token: str = "hf_" + "r" * 34
    stranger_token: str = "hf_" + "s" * 34
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # "GET /path?query", and " bytes=0-9" where a range was asked for
    faults: list[Fault] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # the server's own mistakes

    def __enter__(self) -> "HubServer":
        self.folder = Path(self.folder).resolve()
        self.lock, self.port, self.stopping = threading.RLock(), 0, threading.Event()
        (self.folder / "cas").mkdir(parents=True, exist_ok=True)
        tokens = {self.token: ("tester", "write"), self.read_token: ("tester", "read")}
        self.tokens = tokens | {self.stranger_token: ("stranger", "write")}
        self.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.stop()
        if self.errors and kind is None:
            raise AssertionError("the server made mistakes:\n" + "\n".join(self.errors))

    def start(self) -> None:
        """Listen again, on the same port."""
        self.stopping.clear()
        self.server = Listener(("127.0.0.1", self.port), Handler)
        self.server.hub, self.port = self, self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def stop(self) -> None:
        """Cut all connections and refuse new ones."""
        self.stopping.set()
        self.server.shutdown()
        self.thread.join()
        for connection in list(self.server.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server.server_close()  # waits for the handlers

    @property
    def env(self) -> dict[str, str]:
        """Environment variables of a client. ``hub.env | {"HF_TOKEN": ""}`` is one that is not logged in."""
        home = self.folder / "home"
        places = {"HF_HOME": home, "HF_HUB_CACHE": home / "hub", "HF_DATASETS_CACHE": home / "datasets"}
        switches = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_EVALUATE_OFFLINE": "0"}
        switches |= {"HF_HUB_DISABLE_XET": str(int(not self.xet)), "HF_HUB_DISABLE_TELEMETRY": "1"}
        switches |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token} | switches | {k: str(v) for k, v in places.items()}

    def fault(
        self,
        pattern: str,
        times: float = 1,
        *,
        status: int | None = None,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        after_bytes: int | None = None,
        wrong_bytes: bool = False,
        no_answer: bool = False,
        delay: float = 0,
    ) -> None:
        """Make the next ``times`` requests fail whose "METHOD /path?query" the regular expression is found in.

        ``status`` (with ``headers`` and ``body``): answered so, nothing is done. ``after_bytes``: the connection is cut
        after so many bytes of the request's body or, for a GET, of the answer's. ``wrong_bytes``: the first byte
        of that body is another. ``no_answer``: it is done, but the connection is cut before the answer. ``delay``:
        seconds waited first; alone, all goes well afterwards.
        """
        fault = Fault(pattern, times, status, headers or {}, body, after_bytes, wrong_bytes, no_answer, delay)
        with self.lock:
            self.faults.append(fault)

    def faulty(self, request: str) -> Fault | None:
        """The first fault that is left for a request; it is used up."""
        with self.lock:
            fault = next((f for f in self.faults if f.times > 0 and re.search(f.pattern, request)), None)
            if fault:
                fault.times -= 1
            return fault

    def files(self, repo: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """All files of a revision with their bytes (files that went through Xet are in its store: KeyError)."""
        return {p: self.blobs[e.oid] for p, e in self.find(self.repos[kind, repo], revision).files.items()}

    def commits(self, repo: str, kind: str = "model", branch: str = "main") -> list[dict[str, Any]]:
        """Commits, oldest first (the first one is the Hub's): ``oid``, ``summary``, and the ``paths`` that changed."""
        answer, before = [], {}
        for c in self.repos[kind, repo].branches[branch]:
            paths = sorted(p for p in before | c.files if before.get(p) != c.files.get(p))
            answer.append({"oid": c.oid, "summary": c.summary, "paths": paths})
            before = c.files
        return answer

    def write(self, repo: str, files: dict[str, bytes], kind: str = "model", private: bool = False) -> str:
        """Commit files as they are, unchecked, into a repo that is made if need be."""
        with self.lock:
            at = self.repos.get((kind, repo)) or self.create(kind, repo, private)
            new = {path: self.keep(data, is_lfs(path, len(data), kind)) for path, data in files.items()}
            return self.commit(at, "main", "written", at.branches["main"][-1].files | new)

    def create(self, kind: str, name: str, private: bool) -> Repo:
        """A new repo with the Hub's first commit."""
        repo = self.repos[kind, name] = Repo(kind, name, private, {"main": []})
        self.commit(repo, "main", "initial commit", {".gitattributes": self.keep(ATTRIBUTES, False)})
        return repo

    def keep(self, data: bytes, lfs: bool) -> Entry:
        """Store the bytes of a file."""
        oid = hashlib.sha256(data) if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data)
        self.blobs[oid.hexdigest()] = data
        return Entry(oid.hexdigest(), len(data), lfs)

    def commit(self, repo: Repo, branch: str, summary: str, files: dict[str, Entry]) -> str:
        """Append a commit, unless it would change nothing; returns the head's id."""
        history = repo.branches[branch]
        if not history or history[-1].files != files:
            parent = history[-1].oid if history else f"{repo.kind}/{repo.name}"
            oid = hashlib.sha1(repr((parent, summary, sorted(files.items()))).encode()).hexdigest()
            history.append(Commit(oid, summary, files, time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())))
        return history[-1].oid

    def find(self, repo: Repo, revision: str) -> Commit:
        """The commit that a branch name or a commit id means."""
        if revision in repo.branches:
            return repo.branches[revision][-1]
        for history in repo.branches.values():
            for commit in history:
                if commit.oid == revision:
                    return commit
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def xet_hashes(self) -> dict[str, str]:
        """Xet hash by SHA-256 of every file in hf-xet's store, read from its shards."""
        found = {}
        for shard in (self.folder / "cas").rglob("*.mdb"):
            data, at = shard.read_bytes(), 48
            while data[at : at + 32] != b"\xff" * 32:
                flags, segments = struct.unpack_from("<II", data, at + 32)
                xet = "".join(f"{n:016x}" for n in struct.unpack_from("<4Q", data, at))
                at += 48 * (1 + segments * (2 if flags & 0x80000000 else 1))
                if flags & 0x40000000:
                    found["".join(f"{n:016x}" for n in struct.unpack_from("<4Q", data, at))] = xet
                    at += 48
        return found


def is_lfs(path: str, size: int, kind: str) -> bool:
    """Whether the Hub's .gitattributes, or its size, makes a file LFS."""
    patterns = PATTERNS + MEDIA * (kind == "dataset")
    return size >= LARGE or any(fnmatch.fnmatch(path.lower(), p) for p in patterns)


def card_data(text: str) -> tuple[Any, str | None]:
    """Metadata of a README, and what is wrong with it."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as e:
        return {}, f"Invalid metadata in README.md: {' '.join(str(e).split())}"
    return (data, None) if isinstance(data, dict) else ({}, '"metadata" must be of type object')


# --------------------------------------------------------------------------------------------- HTTP


class Listener(http.server.ThreadingHTTPServer):
    """Knows its connections, so that they can be cut."""

    daemon_threads, request_queue_size = False, 64
    hub: HubServer

    def __init__(self, *args: Any):
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, address: Any) -> None:
        """Clients may leave."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: Listener

    def log_message(self, *_: Any) -> None:
        """``hub.requests`` is the log."""

    def body(self) -> Iterator[bytes]:
        """The request's body in pieces, however it was sent."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, 2**16))
            if not piece:
                raise ConnectionError("the client left")
            left -= len(piece)
            yield piece

    def handle_request(self) -> None:
        """Answer a request, or spoil it."""
        self.hub, range_ = self.server.hub, self.headers.get("Range")
        line = f"{self.command} {self.path}"
        self.hub.requests.append(line + (f" {range_}" if range_ else ""))
        self.fault = self.hub.faulty(line)
        data = bytearray()
        if self.fault:
            self.hub.stopping.wait(self.fault.delay)
        sends = self.command in ("POST", "PUT")
        for piece in self.body():
            data += piece
            if self.fault and self.fault.after_bytes is not None and sends and len(data) >= self.fault.after_bytes:
                return self.cut()
        if self.fault and self.fault.wrong_bytes and sends and data:
            data[0] ^= 255
        if self.fault and self.fault.status:
            return self.answer(self.fault.body, self.fault.status, self.fault.headers)
        try:
            answer = self.route(bytes(data))
            if self.fault and self.fault.no_answer:
                return self.cut()
            return self.answer(*answer) if isinstance(answer, tuple) else self.answer(answer)
        except Refused as e:
            self.answer({"error": str(e)}, e.status, e.headers)
        except ConnectionError:
            raise
        except Exception:
            self.hub.errors.append(f"{line}\n{traceback.format_exc()}")
            self.answer({"error": "Internal error"}, 500)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def cut(self) -> None:
        """End the connection without an answer."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send JSON or bytes."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json; charset=utf-8"
        for key, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value.encode("ascii", "replace").decode().replace("\n", " "))
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self.fault if self.command == "GET" else None
        if fault and fault.wrong_bytes and data:
            data = bytes([data[0] ^ 255]) + data[1:]
        if fault and fault.after_bytes is not None:
            self.wfile.write(data[: fault.after_bytes])
            return self.cut()
        self.wfile.write(data)

    # ----------------------------------------------------------------------------------------- who may do what

    def user(self) -> tuple[str | None, str]:
        """Name and role ("read", "write") of who asks."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None, "read"
        if token not in self.hub.tokens:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def repo(self, kind: str, name: str, write: bool = False) -> Repo:
        """A repo that the user may read (or write)."""
        user, role = self.user()
        repo = self.hub.repos.get((kind, name))
        member = user is not None and name.split("/")[0] in (user, "lab" if user == "tester" else user)
        if repo is None or (repo.private and not member):
            message = "Invalid username or password." if user is None else "Repository not found"
            raise Refused(401 if user is None else 404, "RepoNotFound", message)
        if write and (user is None or not member or role == "read"):
            message = "You don't have the required permissions (write access to this repo)"
            raise Refused(401 if user is None else 403, "", message)
        if repo.gated and not member and "/api/" not in self.path:
            message = f"Access to {kind} {name} is restricted and you are not in the authorized list."
            raise Refused(401 if user is None else 403, "GatedRepo", message)
        return repo

    # ----------------------------------------------------------------------------------------- addresses

    def route(self, data: bytes) -> Any:
        """What to answer: JSON or bytes, or a tuple of it, status and headers."""
        parts = urlsplit(self.path)
        self.query = {k: v[-1] for k, v in parse_qs(parts.query).items()}
        path, about = parts.path, f"{self.command} {parts.path}"
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/(objects/batch|verify)", path):
            kind, name, what = KINDS[match[1] or "models"], *match.groups()[1:]
            repo = self.repo(kind, name, write=True)
            return (self.lfs_batch if what == "objects/batch" else self.lfs_verify)(repo, json.loads(data))
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo = self.repo(KINDS[match[1] or "models"], match[2])
            return self.resolve(repo, *map(unquote, match.groups()[2:]))
        if match := re.fullmatch(
            r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+)(?:/(.*))?)?)?", path
        ):
            action = getattr(self, f"{self.command.lower()}_{(match[3] or 'revision').replace('-', '_')}", None)
            if action:
                repo = self.repo(KINDS[match[1]], match[2], write=self.command != "GET" and match[3] != "paths-info")
                return action(repo, unquote(match[4] or "main"), unquote(match[5] or ""), data)
        elif match := re.fullmatch("PUT /lfs/([0-9a-f]{64})", about):
            if hashlib.sha256(data).hexdigest() != match[1]:
                raise Refused(400, "", "BadDigest: the bytes are not those of the SHA-256")
            self.hub.blobs[match[1]] = data
            return b""
        elif about == "GET /api/whoami-v2":
            name, role = self.user()
            if name is None:
                raise Refused(401, "", "Invalid username or password.")
            orgs = [{"type": "org", "name": "lab", "roleInOrg": "write"}] if name == "tester" else []
            auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
            return {"type": "user", "id": name, "name": name, "fullname": name, "orgs": orgs, "auth": auth}
        elif about == "POST /api/validate-yaml":
            problem = card_data(json.loads(data)["content"])[1]
            return {"errors": [{"message": problem}] if problem else [], "warnings": []}
        elif path in ("/api/repos/create", "/api/repos/delete"):
            return self.create_or_delete(json.loads(data))
        raise Refused(404, "", f"Sorry, we can't find {about}")

    def create_or_delete(self, asked: dict[str, Any]) -> Any:
        """POST repos/create, DELETE repos/delete."""
        (user, role), kind = self.user(), asked.get("type") or "model"
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if self.command == "DELETE":
            self.repo(kind, name, write=True)
            del self.hub.repos[kind, name]
            return b""
        if role != "write" or owner not in (user, "lab" if user == "tester" else user):
            raise Refused(403, "", f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        if kind == "space" and not asked.get("sdk"):
            raise Refused(400, "", "sdk is required for a space")
        answer = {"url": f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}", "name": name, "id": name}
        with self.hub.lock:
            if (kind, name) in self.hub.repos:
                return {"error": f"You already created this {kind} repo"} | answer, 409, {}
            self.hub.create(kind, name, asked.get("private") is True or asked.get("visibility") == "private")
        return answer

    # ----------------------------------------------------------------------------------------- reading

    def get_revision(self, repo: Repo, revision: str, *_: object) -> Any:
        """The info of a model, dataset or space; also its main address."""
        commit, tree = self.hub.find(repo, revision), {}
        for path, e in commit.files.items():
            tree[path] = {"rfilename": path} | (self.describe(path, e) if self.query.get("blobs") else {})
        readme = self.hub.blobs[commit.files["README.md"].oid] if "README.md" in commit.files else b""
        meta, _ = card_data(readme.decode(errors="replace"))
        answer = {"_id": "1", "id": repo.name, "modelId": repo.name, "author": repo.name.split("/")[0]}
        answer |= {"sha": commit.oid, "private": repo.private, "gated": "auto" if repo.gated else False}
        answer |= {"disabled": False, "downloads": 0, "likes": 0, "siblings": list(tree.values()), "cardData": meta}
        answer |= {"tags": meta.get("tags") or [], "lastModified": commit.date, "createdAt": commit.date}
        return json.loads(
            json.dumps(answer | {k: meta[k] for k in ("pipeline_tag", "library_name") if k in meta}, default=str)
        )

    def describe(self, path: str, e: Entry) -> dict[str, Any]:
        """A file as listings show it."""
        answer = {"type": "file", "path": path, "oid": e.oid, "blobId": e.oid, "size": e.size}
        if e.lfs:
            answer["lfs"] = {"oid": e.oid, "sha256": e.oid, "size": e.size, "pointerSize": 134}
            if self.hub.xet:
                answer["xetHash"] = self.hub.xet_hashes().get(e.oid)
        return answer

    def listing(self, commit: Commit) -> dict[str, dict[str, Any]]:
        """Files and directories by path."""
        answer = {path: self.describe(path, e) for path, e in commit.files.items()}
        for path in commit.files:
            for parent in [str(p) for p in Path(path).parents][:-1]:
                oid = hashlib.sha1(parent.encode()).hexdigest()
                answer[parent] = {"type": "directory", "path": parent, "oid": oid, "size": 0}
        if self.query.get("expand") == "true":
            last = {"id": commit.oid, "title": commit.summary, "date": commit.date}
            answer = {p: e | {"lastCommit": last} for p, e in answer.items()}
        return dict(sorted(answer.items()))

    def get_tree(self, repo: Repo, revision: str, folder: str, _: bytes) -> Any:
        """What a folder holds."""
        commit = self.hub.find(repo, revision)
        everything, start = self.listing(commit), f"{folder}/" if folder else ""
        if folder and everything.get(folder, {}).get("type") != "directory":
            message = f"{folder} does not exist on {revision}"
            raise Refused(404, "EntryNotFound", message, **{"X-Repo-Commit": commit.oid})
        inside = {p[len(start) :]: e for p, e in everything.items() if p.startswith(start)}
        return [e for p, e in inside.items() if self.query.get("recursive") == "true" or "/" not in p]

    def post_paths_info(self, repo: Repo, revision: str, _: str, data: bytes) -> Any:
        """Those of the paths that exist."""
        if "json" in self.headers.get("Content-Type", ""):
            asked = json.loads(data)
        else:
            asked = parse_qs(data.decode())
            self.query["expand"] = asked.get("expand", ["false"])[-1].lower()
        everything = self.listing(self.hub.find(repo, revision))
        return [everything[p] for p in asked.get("paths", []) if p in everything]

    def get_refs(self, repo: Repo, *_: object) -> Any:
        """Branches."""
        found = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": h[-1].oid} for n, h in repo.branches.items()]
        return {"branches": found, "tags": [], "converts": []}

    def get_commits(self, repo: Repo, revision: str, *_: object) -> Any:
        """History of a branch, newest first."""
        self.hub.find(repo, revision)
        history = repo.branches.get(revision, repo.branches["main"])[::-1]
        return [{"id": c.oid, "title": c.summary, "message": "", "date": c.date, "authors": []} for c in history]

    def resolve(self, repo: Repo, revision: str, path: str) -> Any:
        """The bytes of a file, or a range of them."""
        commit = self.hub.find(repo, revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if (e := commit.files.get(path)) is None:
            raise Refused(404, "EntryNotFound", "Entry not found", **headers)
        headers["ETag"] = f'"{e.oid}"'
        if e.lfs:  # sent from here: a redirect to the same host would be followed by the HEAD
            headers |= {"X-Linked-Etag": f'"{e.oid}"', "X-Linked-Size": str(e.size)}
        if e.lfs and self.hub.xet:
            headers["X-Xet-Hash"] = self.hub.xet_hashes()[e.oid]
            route = f"/api/{repo.kind}s/{repo.name}/xet-read-token/{commit.oid}"
            headers["X-Xet-Refresh-Route"] = route
            headers["Link"] = f'<{self.hub.url}{route}>; rel="xet-auth"'
            return b"", 200, headers | {"Content-Length": str(e.size)}
        data = self.hub.blobs[e.oid]
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(match[1]) if match[1] else max(0, e.size - int(match[2] or 0))
            last = min(int(match[2] or e.size - 1), e.size - 1) if match[1] else e.size - 1
            if first > last:
                return b"", 416, headers | {"Content-Range": f"bytes */{e.size}"}
            return data[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{e.size}"}
        return data, 200, headers

    # ----------------------------------------------------------------------------------------- writing

    def post_preupload(self, repo: Repo, revision: str, _: str, data: bytes) -> Any:
        """How each file is to be sent."""
        files, answer = self.hub.find(repo, revision).files, []
        for f in json.loads(data)["files"]:
            mode = "lfs" if is_lfs(f["path"], f["size"], repo.kind) else "regular"
            oid = {"oid": files[f["path"]].oid} if f["path"] in files else {}
            answer.append({"path": f["path"], "uploadMode": mode, "shouldIgnore": False} | oid)
        return {"files": answer}

    def lfs_batch(self, repo: Repo, asked: dict[str, Any]) -> Any:
        """Where to put the bytes that are not there yet."""
        base, objects = f"{self.hub.url}{self.path.split('/objects/batch')[0]}", []
        for o in asked["objects"]:
            there = o["oid"] in self.hub.blobs
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}, "verify": {"href": f"{base}/verify"}}
            objects.append(o | ({} if there else {"actions": actions}))
        return {"transfer": "basic", "objects": objects}

    def lfs_verify(self, repo: Repo, asked: dict[str, Any]) -> Any:
        """Whether the bytes have arrived."""
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "", "Object not found, or of another size")
        return b""

    def post_commit(self, repo: Repo, branch: str, _: str, data: bytes) -> Any:
        """All changes, or none."""
        try:
            lines = [json.loads(line) for line in data.splitlines() if line.strip()]
        except ValueError:
            raise Refused(400, "", "The body is not one JSON object a line") from None
        if not lines or lines[0].get("key") != "header" or "create_pr" in self.query:
            raise Refused(400, "", "A commit starts with its header; pull requests are not for this server")
        with self.hub.lock:
            if branch not in repo.branches:
                raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
            header, head = lines[0]["value"], repo.branches[branch][-1]
            if header.get("parentCommit") not in (None, head.oid):
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for line in lines[1:]:
                self.change(repo, files, line["key"], line["value"])
            oid = self.hub.commit(repo, branch, header["summary"], files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo.name}/commit/{oid}"}

    def change(self, repo: Repo, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        """Apply one line of a commit to a listing."""
        path = value["path"].rstrip("/") if key == "deletedFolder" else value["path"]
        if {"", ".", "..", ".git"} & set(path.split("/")):
            raise Refused(400, "", f"Invalid path: {path}")
        if key == "file":
            content = base64.b64decode(value["content"])
            problem = card_data(content.decode(errors="replace"))[1] if path == "README.md" else None
            if problem or len(content) >= LARGE:
                raise Refused(400, "", problem or f"{path}: files of 10 MB or more must be LFS")
            files[path] = self.hub.keep(content, False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.blobs and not (self.hub.xet and value["oid"] in self.hub.xet_hashes()):
                raise Refused(400, "", f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = Entry(value["oid"], value["size"], True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(path + "/"))]
            if not gone:
                raise Refused(404, "EntryNotFound", f"{path} does not exist")
            for p in gone:
                del files[p]
        else:
            raise Refused(400, "", f"Unknown operation {key!r}")

    def post_branch(self, repo: Repo, branch: str, *data: Any) -> Any:
        """A branch from main or another starting point."""
        with self.hub.lock:
            if branch in repo.branches:
                raise Refused(409, "", f"Reference already exists: {branch}")
            start = json.loads(data[1] or b"{}").get("startingPoint", "main")
            repo.branches[branch] = [self.hub.find(repo, start)]
        return b""

    # ----------------------------------------------------------------------------------------- Xet

    def get_xet_write_token(self, *_: object) -> Any:
        """hf-xet keeps its store in a folder: it takes a local path for the address of one."""
        if not self.hub.xet:
            raise Refused(404, "", "This server has no Xet storage")
        cas, until = f"local://{self.hub.folder}/cas", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until)}
        return {"casUrl": cas, "accessToken": "xet", "exp": until}, 200, headers

    get_xet_read_token: Callable[..., Any] = get_xet_write_token
