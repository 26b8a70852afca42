"""Publish a run while it goes on: pictures of its folder, pushed by a process beside it.

A process and not a thread: loader workers are forked while a push is under way, which threads with locks do not
survive; and nothing that happens to a push, not even a crash of a client's native code, happens to the run.
"""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from mixup_recipes import files
from mixup_recipes.hub import push as hub
from mixup_recipes.hub_errors import reason
from mixup_recipes.recipe import Recipe
from mixup_recipes.runs.run import Run
from mixup_recipes.training.job import Job
from mixup_recipes.typed import UserError

PATIENCE = 1800.0  # seconds that a finished run waits for its last push
NEWS = 30.0  # seconds between two lines about that
APPENDED = ("log.jsonl", "runs/")  # what is written in place; all else is replaced whole, so that a link is a copy


class Publisher:
    """Publishes one run. Its methods never raise and never wait, but for ``finish``."""

    def __init__(self, folder: Path, recipe: Recipe, job: Job, say: Callable[[str], object]):
        """Raises ``UserError`` for a name that cannot be one and a missing token. A wrong token is told later."""
        self.folder, self.strategy, self.private, self.say = folder, job.hub_strategy, job.hub_private_repo, say
        self.repo_id = job.hub_model_id or hub.default_name(recipe)
        hub.check_repo_id(self.repo_id)
        self.token = hub.find_token(job.hub_token)
        self.process: subprocess.Popen[str] | None = None
        self.pushing: Path | None = None
        self.waiting: Path | None = None
        atexit.register(self.leave)

    def begin(self) -> None:
        """Note where the run goes, and ask the Hub who we are: a warning comes with the next ``poll``."""
        try:
            before = dict(Run.open(self.folder).pushed)
            hub.note(self.folder, before, repo_id=self.repo_id, private=self.private, strategy=self.strategy)
            self.start({"do": "check"})
        except Exception as e:
            self.warn(reason(e, self.token))

    def saved(self) -> None:
        """A checkpoint was saved."""
        if self.strategy != "end":
            self.publish()

    def publish(self) -> None:
        """Push the folder as it is now, as soon as the push under way is done; one that waited is dropped."""
        try:
            if "checkpoint" not in self.strategy and not (self.folder / "eval_results.json").exists():
                return  # nothing was evaluated yet
            taken = picture(self.folder, self.strategy)
        except Exception as e:  # a full disk must not end the run
            self.warn(reason(e, self.token))
            return
        self.drop(self.waiting)
        self.waiting = taken
        self.poll()

    def poll(self) -> bool:
        """Look after the push under way and start the one that waits; whether any is left."""
        try:
            if self.process is not None and self.process.poll() is not None:
                said = self.process.communicate()[0].splitlines()
                outcome = said[-1] if said and said[-1].startswith(("done", "warn")) else ""
                if not outcome:
                    self.warn(f"the push ended with status {self.process.returncode}")
                elif outcome.startswith("warn"):
                    self.warn(outcome.removeprefix("warn "))
                elif url := outcome.removeprefix("done").strip():
                    self.say(f"published: {url}")
                self.process = None
                self.drop(self.pushing)
                self.pushing = None
            if self.process is None and self.waiting is not None:
                self.pushing, self.waiting = self.waiting, None
                self.start({"do": "push", "folder": str(self.pushing)})
        except Exception as e:
            self.process = None
            self.warn(reason(e, self.token))
        return self.process is not None

    def finish(self, stop: Callable[[], object]) -> None:
        """Publish the finished run and wait for it; ``stop``: whether to leave at once."""
        self.publish()
        began, told = time.monotonic(), 0.0
        while self.poll():
            waited = time.monotonic() - began
            if stop() or waited > PATIENCE:
                self.warn(f"the run stopped waiting after {waited:.0f} s")
                break
            if waited - told > NEWS:
                told = waited
                self.say(f"pushing to {self.repo_id}: {waited:.0f} s")
            time.sleep(0.05)
        self.leave()

    def leave(self) -> None:
        """End the push under way and remove what is left of it."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
        for taken in (self.pushing, self.waiting):
            self.drop(taken)
        self.pushing = self.waiting = None
        atexit.unregister(self.leave)

    # ----------------------------------------------------------------------------------------- inside

    def start(self, request: dict[str, Any]) -> None:
        """Start a process for one request. The token goes through a pipe, whose end also tells when the run is gone."""
        above = files.ROOT
        paths = os.pathsep.join([str(above), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mixup_recipes.hub.publisher"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"PYTHONPATH": paths}, start_new_session=True,
        )  # fmt: skip
        request |= {"run": str(self.folder.absolute()), "repo_id": self.repo_id, "private": self.private}
        request |= {"strategy": self.strategy, "token": self.token}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def warn(self, why: str) -> None:
        """One line that says what to do."""
        self.say(f"warning: push to the Hub: {why}; the run goes on; push it with: mixup-recipes push {self.folder}")

    def drop(self, taken: Path | None) -> None:
        """Remove a picture."""
        if taken is not None:
            shutil.rmtree(taken, ignore_errors=True)


def picture(run: Path, strategy: str) -> Path:
    """The run folder as it is at this moment, for publication: links where files are replaced whole, else copies."""
    aside = Path(tempfile.mkdtemp(prefix=".push-", suffix=".tmp", dir=run))  # a resumed run removes what is left
    try:
        for name, path in hub.published_files(run, strategy).items():
            target = aside / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name.startswith(APPENDED):
                shutil.copy2(path, target)
                continue
            try:
                os.link(path, target)
            except OSError:  # not every file system can
                shutil.copy2(path, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return aside


# --------------------------------------------------------------------------------------------- the other process


def serve(request: dict[str, Any]) -> str:
    """Do what was asked; the answer is ``done [URL]`` or ``warn WHY``."""
    token = request["token"]
    try:
        if request["do"] == "check":
            return check_token(request["repo_id"], token)
        folder, run = Path(request["folder"]), Path(request["run"])
        hub.check_whole(Run.open(folder), request["strategy"])
        pushed = hub.publish(
            folder, run, request["repo_id"], request["private"], request["strategy"], token, lambda _: None
        )
    except UserError as e:
        return f"warn {e}"
    except Exception as e:
        return f"warn {reason(e, token)}"
    return f"done {pushed.url}"


def check_token(repo_id: str, token: str) -> str:
    """Ask the Hub whose token this is, and whether the name is one of theirs."""
    me = HfApi(token=token).whoami()
    owners = [me["name"], *(o["name"] for o in me.get("orgs", []))]
    owner = repo_id.rpartition("/")[0]
    if owner and owner not in owners:
        return f"warn {repo_id}: the token belongs to {', '.join(owners)}, not to {owner}"
    return "done"


def main() -> None:
    """Read a request, answer it, and leave with the run that asked."""
    os.nice(10)  # the run comes first
    request = json.loads(sys.stdin.readline())

    def watch() -> None:
        sys.stdin.read()  # ends when the run does
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    answer = serve(request)
    print(" ".join(answer.split()), flush=True)
    os._exit(0)  # the thread holds stdin


if __name__ == "__main__":
    main()
