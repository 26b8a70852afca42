"""What the Hub of the tests answers over HTTP, and what can go wrong with it."""

import hashlib
import http.server
import json
import re
import socket
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import Commit, Entry, Refused, Repo, card_data, is_lfs

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space", None: "model"}
OWNERS = {"tester": {"tester", "lab"}, "stranger": {"stranger"}, None: set()}  # whose repos a user may change


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose "METHOD /path?query" ``pattern`` is found in.

    ``status`` (with ``headers`` and ``body``): answered so, nothing is done. ``after_bytes``: the connection is cut
    after so many bytes of the request's body or, for a GET, of the answer's. ``wrong_bytes``: the first byte of that
    body is another. ``no_answer``: it is done, but the connection is cut before the answer. ``delay``: seconds
    waited first; alone, all goes well afterwards.
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
    """Knows its connections, so that they can be cut."""

    daemon_threads, request_queue_size = False, 64
    hub: Any

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
        fault = self.hub.faulty(line) or Fault("")
        sends, data = self.command in ("POST", "PUT"), bytearray()
        self.fault = Fault("") if sends else fault  # what is left of it for the answer
        self.hub.stopping.wait(fault.delay)
        for piece in self.body():
            data += piece
            if len(data) >= fault.after_bytes:
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
        except ConnectionError:
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
            self.send_header(key, value.encode("ascii", "replace").decode().replace("\n", " "))
        self.end_headers()
        if self.fault.wrong_bytes and data:
            data = bytes([data[0] ^ 255]) + data[1:]
        if self.command != "HEAD":
            self.wfile.write(data[: int(min(self.fault.after_bytes, len(data)))])
        if self.fault.after_bytes < len(data):
            self.cut()

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
        member = name.split("/")[0] in OWNERS[user]
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
            kind, name, what = KINDS[match[1]], *match.groups()[1:]
            repo = self.repo(kind, name, write=True)
            return (self.lfs_batch if what == "objects/batch" else self.lfs_verify)(repo, json.loads(data))
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo = self.repo(KINDS[match[1]], match[2])
            return self.resolve(repo, *map(unquote, match.groups()[2:]))
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
            if name is None:
                raise Refused(401, "", "Invalid username or password.")
            orgs = [{"type": "org", "name": "lab", "roleInOrg": "write"}] if name == "tester" else []
            auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
            return {"type": "user", "id": name, "name": name, "fullname": name, "orgs": orgs, "auth": auth}
        elif about == "POST /api/validate-yaml":
            problem = card_data(json.loads(data)["content"])[1]
            return {"errors": [{"message": problem}] if problem else [], "warnings": []}
        elif about == "POST /api/repos/create":
            return self.create(json.loads(data))
        raise Refused(404, "", f"Sorry, we can't find {about}")

    def create(self, asked: dict[str, Any]) -> Any:
        """A new repo."""
        (user, role), kind = self.user(), asked.get("type") or "model"
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if role != "write" or owner not in OWNERS[user]:
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
        commit, more = self.hub.find(repo, revision), self.query.get("blobs")
        tree = [{"rfilename": p} | (self.describe(p, e) if more else {}) for p, e in commit.files.items()]
        readme = self.hub.blobs[commit.files["README.md"].oid] if "README.md" in commit.files else b""
        meta = card_data(readme.decode(errors="replace"))[0]
        return {
            "_id": "1", "id": repo.name, "modelId": repo.name, "author": repo.name.split("/")[0], "sha": commit.oid,
            "private": repo.private, "gated": "auto" if repo.gated else False, "disabled": False, "downloads": 0,
            "likes": 0, "siblings": tree, "cardData": meta, "tags": meta.get("tags") or [],
            "lastModified": commit.date, "createdAt": commit.date,
        }  # fmt: skip

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
        asked = json.loads(data) if "json" in self.headers.get("Content-Type", "") else parse_qs(data.decode())
        everything = self.listing(self.hub.find(repo, revision))
        return [everything[p] for p in asked.get("paths", []) if p in everything]

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
            header, head = lines[0]["value"], self.hub.find(repo, branch)
            if branch != "main":
                raise Refused(400, "", "Commits go to a branch, and this server has main only")
            if header.get("parentCommit") not in (None, head.oid):
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for line in lines[1:]:
                self.hub.change(files, line["key"], line["value"])
            oid = self.hub.commit(repo, header["summary"], files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo.name}/commit/{oid}"}

    # ----------------------------------------------------------------------------------------- Xet

    def get_xet_write_token(self, *_: object) -> Any:
        """hf-xet keeps its store in a folder: it takes a local path for the address of one."""
        if not self.hub.xet:
            raise Refused(404, "", "This server has no Xet storage")
        cas, until = f"local://{self.hub.folder}/cas", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until)}
        return {"casUrl": cas, "accessToken": "xet", "exp": until}, 200, headers

    get_xet_read_token = get_xet_write_token
