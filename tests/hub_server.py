"""A Hub on 127.0.0.1: what the unmodified clients use of the Hugging Face Hub's HTTP API, with faults on demand.

    with HubServer(folder) as hub:
        subprocess.run([sys.executable, "push.py"], env=os.environ | hub.env)  # the endpoint is read at import
        hub.files("tester/model"), hub.commits("tester/model"), hub.requests

Its users: ``tester`` (also in the organisation ``lab``) with ``hub.token`` and the read-only ``hub.read_token``, and
``stranger`` with ``hub.stranger_token``. A new repo has one commit with ``.gitattributes``, as on the Hub. Repos and
blobs are kept in memory and outlive ``hub.stop()``; a commit is all or nothing.
"""

import contextlib
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hub_api import Fault, Handler, Listener
from hub_store import Store
from tiny import ROOT


class HubServer(Store):
    """A running Hub. ``folder`` holds the clients' cache and, with ``xet``, the store of hf-xet.

    ``requests`` is the log: "GET /path?query", followed by " bytes=10-" where a range was asked for.
    """

    token, read_token, stranger_token = ("hf_" + letter * 34 for letter in "wrs")

    def __init__(self, folder: Path, xet: bool = False):
        self.folder, self.xet = Path(folder).resolve(), xet
        super().__init__(self.folder / "cas")
        self.cas.mkdir(parents=True, exist_ok=True)
        self.tokens = {self.token: ("tester", "write"), self.read_token: ("tester", "read")}
        self.tokens[self.stranger_token] = ("stranger", "write")
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.errors: list[str] = []  # the server's own mistakes
        self.port, self.stopping = 0, threading.Event()

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.stop()
        if self.errors and kind is None:
            raise AssertionError("the server made mistakes:\n" + "\n".join(self.errors))

    def clear(self) -> None:
        """Forget all repos, requests and faults."""
        for kept in (self.repos, self.blobs, self.requests, self.faults):
            kept.clear()

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
