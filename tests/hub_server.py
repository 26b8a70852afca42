"""A Hub on 127.0.0.1: what the unmodified clients use of the Hugging Face Hub's HTTP API, with faults on demand.

    with HubServer(folder) as hub:
        subprocess.run([sys.executable, "push.py"], env=os.environ | hub.env)  # the endpoint is read at import
        hub.files("tester/model"), hub.repos["model", "tester/model"].commits, hub.requests

Its users: ``tester`` with ``hub.token`` and the read-only ``hub.read_token``, and ``stranger`` with
``hub.stranger_token``. A new repo has one commit with ``.gitattributes``, as on the Hub; a commit is all or nothing.
"""

import base64
import fnmatch
import hashlib
import http.server
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from tiny import ROOT

LARGE = 10 * 2**20  # bytes from which any file is LFS
LFS = "7z arrow bin bz2 ckpt gz h5 msgpack npy npz onnx parquet pb pickle pkl pt pth safetensors tar tgz xz zip zst"
PATTERNS = [f"*.{e}" for e in LFS.split()] + ["*tfevents*"]
ATTRIBUTES = "".join(f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in PATTERNS).encode()
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space", None: "model"}

Entry = namedtuple("Entry", "oid size lfs")  # a file: git's SHA-1 of a regular one, the SHA-256 of one in LFS
Commit = namedtuple("Commit", "oid summary files date")  # all files by path, as they are after it
# One branch, main: commits, oldest first. Those who are not members read no private or gated one.
Repo = namedtuple("Repo", "kind name private gated commits")


class Refused(Exception):
    """An error answer: status, ``X-Error-Code`` (or "") and message."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message} | headers
        self.headers |= {"X-Error-Code": code} if code else {}


def is_lfs(path: str, size: int) -> bool:
    """Whether the Hub's .gitattributes, or its size, makes a file LFS."""
    return size >= LARGE or any(fnmatch.fnmatch(path.lower(), p) for p in PATTERNS)


def card_data(content: bytes) -> tuple[Any, str | None]:
    """Metadata of a README, and what is wrong with it."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content.decode(errors="replace"), re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as e:
        return {}, f"Invalid metadata in README.md: {' '.join(str(e).split())}"
    return (data, None) if isinstance(data, dict) else ({}, '"metadata" must be of type object')


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose "METHOD /path?query" ``pattern`` is found in.

    ``status`` (with ``headers`` and ``body``): answered so, nothing is done. ``after_bytes``: the connection is cut
    after so many bytes of the request's body or, for a GET, of the answer's. ``wrong_bytes``: the first byte of the
    request's body is another. ``no_answer``: it is done, but the connection is cut before the answer. ``delay``:
    seconds waited first; alone, all goes well afterwards.
    """

    pattern: str  # a regular expression
    times: float = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    after_bytes: float = float("inf")
    wrong_bytes: bool = False
    no_answer: bool = False
    delay: float = 0


class Listener(http.server.ThreadingHTTPServer):
    request_queue_size = 64
    hub: "HubServer"

    def handle_error(self, request: Any, address: Any) -> None:
        """Clients may leave."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: Listener

    def log_message(self, *_: Any) -> None:
        """``hub.requests`` is the log."""

    def handle_request(self) -> None:
        """Answer a request, or spoil it."""
        self.hub, line = self.server.hub, f"{self.command} {self.path}"
        self.hub.requests.append(line)
        fault, length = self.hub.faulty(line) or Fault(""), int(self.headers.get("Content-Length") or 0)
        self.most = fault.after_bytes if self.command == "GET" else float("inf")
        time.sleep(fault.delay)
        data = bytearray(self.rfile.read(int(min(length, fault.after_bytes))))
        if len(data) < length or len(data) >= fault.after_bytes:
            return self.cut()
        if fault.wrong_bytes and data:
            data[0] ^= 255
        if fault.status:
            return self.answer(fault.body, fault.status, fault.headers)
        try:
            answer = self.route(bytes(data))
            if fault.no_answer:
                return self.cut()
            self.answer(*answer) if isinstance(answer, tuple) else self.answer(answer)
        except Refused as e:
            self.answer({"error": str(e)}, e.status, e.headers)
        except OSError:  # the client left
            raise
        except Exception:
            self.hub.errors.append(f"{line}\n{traceback.format_exc()}")
            self.answer({"error": "Internal error"}, 500)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def cut(self) -> None:
        """End the connection without an answer."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send JSON or bytes."""
        data = content if isinstance(content, bytes) else json.dumps(content, default=str).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json; charset=utf-8"
        for key, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, " ".join(value.encode("ascii", "replace").decode().split()))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: int(min(self.most, len(data)))])
        if self.most < len(data):
            self.cut()

    def user(self) -> tuple[str | None, str]:
        """Name and role ("read", "write") of who asks."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens[token] if token else (None, "read")

    def repo(self, kind: str, name: str, write: bool = False) -> Repo:
        """A repo that the user may read (or write)."""
        user, role = self.user()
        repo, member, status = self.hub.repos.get((kind, name)), name.split("/")[0] == user, 403 if user else 401
        if repo is None or (repo.private and not member):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and (not member or role == "read"):
            raise Refused(status, "", "You don't have the required permissions (write access to this repo)")
        if repo.gated and not member and "/api/" not in self.path:
            raise Refused(status, "GatedRepo", f"Access to {kind} {name} is restricted and you are not in the list.")
        return repo

    def route(self, data: bytes) -> Any:
        """What to answer: JSON or bytes, or a tuple of it, status and headers."""
        path, self.query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        about = f"{self.command} {path}"
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.repo(KINDS[match[1]], match[2], write=True)
            return self.lfs_batch(json.loads(data)["objects"])
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(self.repo(KINDS[match[1]], match[2]), unquote(match[3]), unquote(match[4]))
        if match := re.fullmatch(r"/api/(\w+s)/([^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+)(?:/(.*))?)?)?", path):
            action = getattr(self, f"{self.command.lower()}_{(match[3] or 'revision').replace('-', '_')}", None)
            if action and match[1] in KINDS:
                repo = self.repo(KINDS[match[1]], match[2], write=self.command != "GET" and match[3] != "paths-info")
                return action(repo, unquote(match[4] or "main"), unquote(match[5] or ""), data)
        elif match := re.fullmatch("PUT /lfs/([0-9a-f]{64})", about):
            if hashlib.sha256(data).hexdigest() != match[1]:
                raise Refused(400, "", "BadDigest: the bytes are not those of the SHA-256")
            self.hub.blobs[match[1]] = data
            return b""
        elif about == "GET /api/whoami-v2":
            name, role = self.user()
            auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
            return {"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": auth}
        elif about == "POST /api/validate-yaml":
            problem = card_data(json.loads(data)["content"].encode())[1]
            return {"errors": [{"message": problem}] if problem else [], "warnings": []}
        elif about == "POST /api/repos/create":
            return self.create(json.loads(data))
        raise Refused(404, "", f"Sorry, we can't find {about}")

    def create(self, asked: dict[str, Any]) -> Any:
        """A new repo."""
        (user, role), kind = self.user(), asked.get("type") or "model"
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if role != "write" or name.split("/")[0] != user:
            raise Refused(403 if user else 401, "", f"You don't have the rights to create the {kind} {name}")
        answer = {"url": f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}", "name": name, "id": name}
        with self.hub.lock:
            if (kind, name) in self.hub.repos:
                return {"error": f"You already created this {kind} repo"} | answer, 409, {}
            self.hub.create(kind, name, asked.get("private") is True or asked.get("visibility") == "private")
        return answer

    def get_revision(self, repo: Repo, revision: str, *_: object) -> Any:
        """The info of a model, dataset or space; also its main address."""
        commit, more = self.hub.find(repo, revision), "blobs" in self.query
        tree = [{"rfilename": p} | (self.describe(p, e) if more else {}) for p, e in commit.files.items()]
        meta = card_data(self.hub.blobs[commit.files["README.md"].oid])[0] if "README.md" in commit.files else {}
        info = {"id": repo.name, "private": repo.private, "gated": "auto" if repo.gated else False, "sha": commit.oid}
        return info | {"siblings": tree, "cardData": meta, "tags": meta.get("tags") or [], "lastModified": commit.date}

    def describe(self, path: str, e: Entry) -> dict[str, Any]:
        """A file as listings show it."""
        answer = {"type": "file", "path": path, "oid": e.oid, "blobId": e.oid, "size": e.size}
        return answer | ({"lfs": {"oid": e.oid, "sha256": e.oid, "size": e.size, "pointerSize": 134}} if e.lfs else {})

    def listing(self, commit: Commit) -> dict[str, dict[str, Any]]:
        """Files and directories by path."""
        answer = {path: self.describe(path, e) for path, e in commit.files.items()}
        for parent in {str(p) for path in commit.files for p in Path(path).parents} - {"."}:
            oid = hashlib.sha1(parent.encode()).hexdigest()
            answer[parent] = {"type": "directory", "path": parent, "oid": oid, "size": 0}
        return dict(sorted(answer.items()))

    def get_tree(self, repo: Repo, revision: str, folder: str, _: bytes) -> Any:
        """What a folder holds."""
        commit = self.hub.find(repo, revision)
        everything, start = self.listing(commit), f"{folder}/" if folder else ""
        if folder and everything.get(folder, {}).get("type") != "directory":
            raise Refused(404, "EntryNotFound", "There is no such folder", **{"X-Repo-Commit": commit.oid})
        inside = {p[len(start) :]: e for p, e in everything.items() if p.startswith(start)}
        return [e for p, e in inside.items() if "true" in self.query.get("recursive", ()) or "/" not in p]

    def post_paths_info(self, repo: Repo, revision: str, _: str, data: bytes) -> Any:
        """Those of the paths that exist."""
        asked = json.loads(data) if "json" in self.headers.get("Content-Type", "") else parse_qs(data.decode())
        everything = self.listing(self.hub.find(repo, revision))
        return [everything[p] for p in asked.get("paths", []) if p in everything]

    def resolve(self, repo: Repo, revision: str, path: str) -> Any:
        """The bytes of a file, or a range of them."""
        commit = self.hub.find(repo, revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if (e := commit.files.get(path)) is None:
            raise Refused(404, "EntryNotFound", "Entry not found", **headers)
        data, headers["ETag"] = self.hub.blobs[e.oid], f'"{e.oid}"'
        if e.lfs:  # sent from here: a redirect to the same host would be followed by the HEAD
            headers |= {"X-Linked-Etag": f'"{e.oid}"', "X-Linked-Size": str(e.size)}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or e.size - 1), e.size - 1)
            return data[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{e.size}"}
        return data, 200, headers

    def post_preupload(self, repo: Repo, revision: str, _: str, data: bytes) -> Any:
        """How each file is to be sent."""
        files, answer = self.hub.find(repo, revision).files, []
        for f in json.loads(data)["files"]:
            mode = "lfs" if is_lfs(f["path"], f["size"]) else "regular"
            oid = {"oid": files[f["path"]].oid} if f["path"] in files else {}
            answer.append({"path": f["path"], "uploadMode": mode, "shouldIgnore": False} | oid)
        return {"files": answer}

    def lfs_batch(self, objects: list[dict[str, Any]]) -> Any:
        """Where to put the bytes that are not there yet."""
        for o in objects:
            there = o["oid"] in self.hub.blobs
            o |= {} if there else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
        return {"transfer": "basic", "objects": objects}

    def post_commit(self, repo: Repo, branch: str, _: str, data: bytes) -> Any:
        """All changes, or none."""
        head_line, *changes = (json.loads(line) for line in data.splitlines() if line.strip())
        header = head_line["value"]
        with self.hub.lock:
            head = self.hub.find(repo, branch)
            if header.get("parentCommit") not in (None, head.oid):
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for change in changes:
                self.hub.change(files, change["key"], change["value"])
            oid = self.hub.commit(repo, header["summary"], files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo.name}/commit/{oid}"}


class HubServer:
    """A running Hub: repos by (kind, "owner/name"), blobs by hash. ``folder`` holds the clients' cache."""

    token, read_token, stranger_token = ("hf_" + letter * 34 for letter in "wrs")

    def __init__(self, folder: Path):
        self.folder, self.lock = Path(folder).resolve(), threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        users = ("tester", "write"), ("tester", "read"), ("stranger", "write")
        self.tokens = dict(zip((self.token, self.read_token, self.stranger_token), users, strict=True))
        self.requests: list[str] = []  # "GET /path?query"
        self.faults: list[Fault] = []
        self.errors: list[str] = []  # the server's own mistakes
        self.server = Listener(("127.0.0.1", 0), Handler)
        self.server.hub, self.url = self, f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.02,)).start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        if self.errors and kind is None:
            raise AssertionError("the server made mistakes:\n" + "\n".join(self.errors))

    def clear(self) -> None:
        """Forget all repos, requests and faults."""
        for kept in (self.repos, self.blobs, self.requests, self.faults):
            kept.clear()

    @property
    def env(self) -> dict[str, str]:
        """Environment variables of a client. ``hub.env | {"HF_TOKEN": ""}`` is one that is not logged in."""
        home = self.folder / "home"
        places = {"HF_HOME": home, "HF_HUB_CACHE": home / "hub", "HF_DATASETS_CACHE": home / "datasets"}
        places["MIXUP_RECIPES_CACHE"] = home / "recipes"
        off = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")
        on = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY")
        env = {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token} | {k: str(v) for k, v in places.items()}
        return (
            env | dict.fromkeys(off, "0") | dict.fromkeys(on, "1") | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        )

    def client(self, function: Callable[..., Any], *args: Any, **env: str) -> Any:
        """``function(*args)`` in a process of its own, whose clients talk to this Hub. It does its imports itself;
        arguments and result are JSON. ``env`` replaces environment variables."""
        name, source = function.__name__, textwrap.dedent(inspect.getsource(function))
        code = f"import json, sys\n{source}\nprint('\\n' + json.dumps({name}(*json.loads(sys.argv[1]))))"
        command = [sys.executable, "-c", code, json.dumps(args, default=str)]
        env = os.environ | self.env | {"PYTHONPATH": str(ROOT)} | env
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise AssertionError(f"{name} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    def fault(self, pattern: str, times: float = 1, **what: Any) -> None:
        """Let something go wrong, see ``Fault``; ``hub.faults.clear()`` ends it."""
        self.faults.append(Fault(pattern, times, **what))

    def faulty(self, request: str) -> Fault | None:
        """The first fault that is left for a request; it is used up."""
        with self.lock:
            fault = next((f for f in self.faults if f.times > 0 and re.search(f.pattern, request)), None)
            if fault:
                fault.times -= 1
            return fault

    # ------------------------------------------------------------------------------------- what it keeps

    def files(self, repo: str, kind: str = "model") -> dict[str, bytes]:
        """All files of a repo with their bytes."""
        return {p: self.blobs[e.oid] for p, e in self.repos[kind, repo].commits[-1].files.items()}

    def write(self, repo: str, files: dict[str, bytes], kind: str = "model", **visibility: bool) -> str:
        """Commit files as they are, unchecked, into a repo that is made if need be (``private``, ``gated``)."""
        with self.lock:
            at = self.repos.get((kind, repo)) or self.create(kind, repo, **visibility)
            new = {path: self.keep(data, is_lfs(path, len(data))) for path, data in files.items()}
            return self.commit(at, "written", at.commits[-1].files | new)

    def create(self, kind: str, name: str, private: bool = False, gated: bool = False) -> Repo:
        """A new repo with the Hub's first commit."""
        repo = self.repos[kind, name] = Repo(kind, name, private, gated, [])
        self.commit(repo, "initial commit", {".gitattributes": self.keep(ATTRIBUTES, False)})
        return repo

    def keep(self, data: bytes, lfs: bool) -> Entry:
        """Store the bytes of a file."""
        oid = hashlib.sha256(data) if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data)
        self.blobs[oid.hexdigest()] = data
        return Entry(oid.hexdigest(), len(data), lfs)

    def commit(self, repo: Repo, summary: str, files: dict[str, Entry]) -> str:
        """Append a commit, unless it would change nothing; returns the head's id."""
        if not repo.commits or repo.commits[-1].files != files:
            parent = repo.commits[-1].oid if repo.commits else f"{repo.kind}/{repo.name}"
            oid = hashlib.sha1(repr((parent, summary, sorted(files.items()))).encode()).hexdigest()
            repo.commits.append(Commit(oid, summary, files, time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())))
        return repo.commits[-1].oid

    def find(self, repo: Repo, revision: str) -> Commit:
        """The commit that "main" or a commit id means."""
        commits = {c.oid: c for c in repo.commits} | {"main": repo.commits[-1]}
        if revision not in commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commits[revision]

    def change(self, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        """Apply one line of a commit to a listing."""
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            if path == "README.md" and (problem := card_data(content)[1]):
                raise Refused(400, "", problem)
            files[path] = self.keep(content, False)
        elif key == "lfsFile" and value["oid"] in self.blobs:
            files[path] = Entry(value["oid"], value["size"], True)
        elif key == "deletedFile" and path in files:
            del files[path]
        else:
            raise Refused(400, "", f"{key!r} of {path}: there is no such file, or this is not for this server")
