"""What the Hub of the tests keeps: repos with commits and branches, blobs by hash; files that went through Xet."""

import base64
import fnmatch
import hashlib
import re
import struct
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

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


class Repo(NamedTuple):
    """It has one branch, main; ``commits`` oldest first. Those who are not members read no private or gated repo."""

    kind: str
    name: str
    private: bool
    gated: bool
    commits: list[Commit]


class Refused(Exception):
    """An error answer: status, ``X-Error-Code`` (or "") and message."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message} | headers
        if code:
            self.headers["X-Error-Code"] = code


class Store:
    """Repos by (kind, "owner/name"), in memory. ``cas``: folder of hf-xet's store."""

    def __init__(self, cas: Path):
        self.cas, self.lock = cas, threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}

    def files(self, repo: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """All files of a revision with their bytes (files that went through Xet are in its store: KeyError)."""
        return {p: self.blobs[e.oid] for p, e in self.find(self.repos[kind, repo], revision).files.items()}

    def commits(self, repo: str, kind: str = "model") -> list[dict[str, Any]]:
        """Commits, oldest first (the first one is the Hub's): ``oid``, ``summary``, and the ``paths`` that changed."""
        answer: list[dict[str, Any]] = []
        before: dict[str, Entry] = {}
        for c in self.repos[kind, repo].commits:
            paths = sorted(p for p in before | c.files if before.get(p) != c.files.get(p))
            answer.append({"oid": c.oid, "summary": c.summary, "paths": paths})
            before = c.files
        return answer

    def write(self, repo: str, files: dict[str, bytes], kind: str = "model", **visibility: bool) -> str:
        """Commit files as they are, unchecked, into a repo that is made if need be (``private``, ``gated``)."""
        with self.lock:
            at = self.repos.get((kind, repo)) or self.create(kind, repo, **visibility)
            new = {path: self.keep(data, is_lfs(path, len(data), kind)) for path, data in files.items()}
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
            date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
            repo.commits.append(Commit(oid, summary, files, date))
        return repo.commits[-1].oid

    def find(self, repo: Repo, revision: str) -> Commit:
        """The commit that "main" or a commit id means."""
        commits = {c.oid: c for c in repo.commits} | {"main": repo.commits[-1]}
        if revision not in commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commits[revision]

    def xet_hashes(self) -> dict[str, str]:
        """Xet hash by SHA-256 of every file in hf-xet's store, read from its shards."""
        found = {}
        for shard in self.cas.rglob("*.mdb"):
            data, at = shard.read_bytes(), 48
            while data[at : at + 32] != b"\xff" * 32:
                flags, segments = struct.unpack_from("<II", data, at + 32)
                xet = "".join(f"{n:016x}" for n in struct.unpack_from("<4Q", data, at))
                at += 48 * (1 + segments * (2 if flags & 0x80000000 else 1))
                if flags & 0x40000000:
                    found["".join(f"{n:016x}" for n in struct.unpack_from("<4Q", data, at))] = xet
                    at += 48
        return found

    def change(self, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        """Apply one line of a commit to a listing."""
        path = value["path"].rstrip("/") if key == "deletedFolder" else value["path"]
        if {"", ".", "..", ".git"} & set(path.split("/")):
            raise Refused(400, "", f"Invalid path: {path}")
        if key == "file":
            content = base64.b64decode(value["content"])
            problem = card_data(content.decode(errors="replace"))[1] if path == "README.md" else None
            if problem or len(content) >= LARGE:
                raise Refused(400, "", problem or f"{path}: files of 10 MB or more must be LFS")
            files[path] = self.keep(content, False)
        elif key == "lfsFile":
            if value["oid"] not in self.blobs and value["oid"] not in self.xet_hashes():
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
