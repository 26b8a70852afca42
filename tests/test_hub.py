"""Runs on the Hub: pushed whole or not at all, by the real clients, against a Hub on 127.0.0.1 with faults."""

import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from driver import ROOT, Server
from forks import Done, Forks
from hub_server import HubServer
from resuming import LOG, Reference
from safetensors.numpy import load_file

from mixup_recipes.hub import publisher, push
from mixup_recipes.resolve import load_recipe

COMMAND = "import mixup_recipes; mixup_recipes.main()"
IMPORTS = """
import huggingface_hub, mixup_recipes, timm, torch
from mixup_recipes.hub import publisher, push as hub
from training import backbones, run
"""

# Whole clients against a server are slow: a handful runs by default, one of each kind.


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """One Hub for the tests of this file: each uses a repository of its own."""
    with HubServer(tmp_path_factory.mktemp("shared")) as hub:
        yield hub


@pytest.fixture(scope="module")
def clients(shared: HubServer) -> Iterator[Forks]:
    """Processes that know this Hub."""
    with Forks(shared.env, IMPORTS) as forks:
        yield forks


@pytest.fixture
def hub(shared: HubServer) -> Iterator[HubServer]:
    """The Hub, without faults that a test has left."""
    yield shared
    shared.faults.clear()


@pytest.fixture(scope="module")
def finished(reference: Reference) -> Path:
    """A finished run of 3 epochs."""
    return reference("--epochs", 2, "--protocol_epochs", 1, "--precise_bn_samples", "none")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


def command(clients: Forks, *args: object, **env: str) -> Done:
    """mixup-recipes push, with short pauses."""
    quick = "from mixup_recipes.hub import push as hub; hub.PAUSES = (0.01, 0.02)\n"
    return clients.run(quick + COMMAND, "push", *args, env=env)


def wait_until(happened: Callable[[], bool], most: float = 120.0) -> None:
    """Wait for something that must happen within ``most`` seconds."""
    deadline = time.monotonic() + most
    while not happened():
        assert time.monotonic() < deadline, f"it did not happen within {most:g} s"
        time.sleep(0.01)


def mine(hub: HubServer, repo: str) -> list[dict]:
    """The commits behind the Hub's own first one."""
    return hub.commits(repo)[1:]


def own_files(hub: HubServer, repo: str) -> dict[str, bytes]:
    """What was pushed; the card is its own tests' business."""
    return {k: v for k, v in hub.files(repo).items() if k not in (".gitattributes", "README.md") and k[:6] != ".eval_"}


def published(run: Path, *folders: str) -> dict[str, bytes]:
    """What the documents say is published, walked through independently."""
    names = "config.json model.safetensors recipe.yaml env.json data.json log.jsonl summary.csv eval_results.json"
    paths = [run / n for n in (*names.split(), "predictions.safetensors")]
    for folder in ("models", "runs", "samples", *folders):
        paths += [p for p in (run / folder).rglob("*") if p.is_file()]
    return {str(p.relative_to(run)): p.read_bytes() for p in paths}


# --------------------------------------------------------------------------------------------- what is pushed


def test_a_push_is_one_commit_of_what_a_reader_needs_and_another_push_is_none(
    clients: Forks, hub: HubServer, run: Path
) -> None:
    done = command(clients, run, "--repo_id", "tester/first")
    assert done.returncode == 0, done.output
    assert done.output.splitlines()[-1] == f"{hub.url}/tester/first: published"
    assert own_files(hub, "tester/first") == published(run)
    assert any("tfevents" in name for name in own_files(hub, "tester/first"))
    assert len(mine(hub, "tester/first")) == 1
    again = command(clients, run)  # to where it went before
    assert again.returncode == 0 and again.output.splitlines()[-1].endswith("tester/first: up to date")
    assert len(mine(hub, "tester/first")) == 1


@pytest.mark.slow
def test_a_push_sends_what_changed_and_removes_what_is_gone(clients: Forks, hub: HubServer, run: Path) -> None:
    command(clients, run, "--repo_id", "tester/changes")
    lines = (run / "log.jsonl").read_text().splitlines()
    with (run / "log.jsonl").open("a") as log:
        log.write(lines[0] + "\n")
    sheet = sorted((run / "samples").iterdir())[0]
    sheet.unlink()
    hub.write("tester/changes", {"notes/of-a-person.txt": b"stays"})
    done = command(clients, run)
    assert done.returncode == 0, done.output
    changed = set(mine(hub, "tester/changes")[-1]["paths"]) - {"README.md"}
    assert changed == {"log.jsonl", f"samples/{sheet.name}"}
    assert f"samples/{sheet.name}" not in hub.files("tester/changes")
    assert hub.files("tester/changes")["notes/of-a-person.txt"] == b"stays"


@pytest.mark.slow
def test_training_state_goes_only_when_asked_for_and_a_newer_checkpoint_replaces_the_one_before(
    clients: Forks, hub: HubServer, run: Path
) -> None:
    first, second = sorted(p.name for p in (run / "checkpoints").iterdir())
    for strategy, expected in (("all_checkpoints", {first, second}), ("checkpoint", {second})):
        done = command(clients, run, "--repo_id", "tester/state", "--strategy", strategy)
        assert done.returncode == 0, done.output
        sent = {n: d for n, d in own_files(hub, "tester/state").items() if n.startswith("checkpoints/")}
        assert {n.split("/")[1] for n in sent} == expected
    assert own_files(hub, "tester/state") == published(run, f"checkpoints/{second}")


def test_links_and_hidden_files_stay_here(run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.png").write_bytes(b"secret")
    expected = push.files(run).keys()
    (run / "samples" / "link.png").symlink_to(secret / "key.png")
    (run / "samples" / "linked").symlink_to(secret)
    (run / "samples" / ".hidden").write_bytes(b"secret")
    (run / "models").mkdir(exist_ok=True)
    (run / "models" / ".git").mkdir()
    (run / "models" / ".git" / "config").write_bytes(b"secret")
    (run / "unknown.txt").write_bytes(b"secret")
    assert push.files(run).keys() == expected
    shutil.rmtree(run / "samples")
    (run / "samples").symlink_to(secret)
    assert push.files(run).keys() == {n for n in expected if not n.startswith("samples/")}


@pytest.mark.slow
def test_a_token_in_a_file_is_not_published(clients: Forks, hub: HubServer, run: Path) -> None:
    environment = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(environment | {"note": hub.token}))
    done = command(clients, run, "--repo_id", "tester/secret")
    assert done.returncode == 2 and "env.json holds your token" in done.output
    assert hub.token not in done.output
    assert not mine(hub, "tester/secret")


@pytest.mark.parametrize(
    ("recipe", "changes", "name"),
    [
        ("deit_s_cutmix", {}, "deit_small_patch16_224.cutmix_e300_in1k"),
        ("tiny_r18_fmix", {"seed": 2}, None),
        ("cifar10_r18_200e_mixup", {"dataset": "/data/..my--set/"}, None),
        ("quickstart_vanilla", {}, "resnet10t.vanilla_e40_groceries"),
    ],
)
def test_the_default_name_is_model_mixer_epochs_and_data_and_always_valid(
    recipe: str, changes: dict, name: str | None
) -> None:
    found = push.default_name(load_recipe(recipe, **changes))
    push.check_name(found)
    assert name is None or found == name
    assert found.endswith("_seed2") == ("seed" in changes)


@pytest.mark.slow
def test_a_private_run_is_never_put_into_a_public_repository(clients: Forks, hub: HubServer, run: Path) -> None:
    assert command(clients, run, "--repo_id", "tester/closed", "--private").returncode == 0
    assert hub.repos["model", "tester/closed"].private
    hub.write("tester/open", {})
    done = command(clients, run, "--repo_id", "tester/open", "--private")
    assert done.returncode == 2 and "exists and is public" in done.output
    assert set(hub.files("tester/open")) <= {".gitattributes"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({"recipe.yaml": b"SEED"}, "seed: 5 there, 0 here"),
        ({"recipe.yaml": b"!!python/object/apply:os.system [touch pwned]"}, "holds another recipe"),
        ({"tokenizer.json": b"{}"}, "holds something else (tokenizer.json, ...)"),
    ],
)
def test_what_is_not_this_run_is_not_overwritten(
    clients: Forks, hub: HubServer, run: Path, there: dict[str, bytes], words: str, request: pytest.FixtureRequest
) -> None:
    repo = f"tester/other-{len(words)}"
    seed = (run / "recipe.yaml").read_bytes().replace(b"\nseed: 0", b"\nseed: 5")
    hub.write(repo, {k: seed if v == b"SEED" else v for k, v in there.items()})
    before = hub.files(repo)
    done = command(clients, run, "--repo_id", repo)
    assert done.returncode == 2 and words in done.output and "Traceback" not in done.output
    assert hub.files(repo) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("eval_results.json", "not evaluated yet"),
        ("recipe.yaml", "is not a run"),
        ("weights", "eval_results.json is of other weights"),
        ("name", "expected NAME or OWNER/NAME"),
        ("token", "needs a token"),
        ("strategy", "expected one of end, every_save"),
        ("folder", "no run folder"),
    ],
)
def test_what_cannot_be_pushed_is_one_line_and_status_2(
    clients: Forks, hub: HubServer, run: Path, damage: str, words: str
) -> None:
    args, env = ["--repo_id", "tester/never"], {}
    if (run / damage).exists():
        (run / damage).unlink()
    elif damage == "weights":  # killed between writing weights and results
        weights = (run / "model.safetensors").read_bytes()
        (run / "model.safetensors").write_bytes(weights[:-4] + bytes(4))
    elif damage == "name":
        args = ["--repo_id", "a--b/c/d"]
    elif damage == "strategy":
        args += ["--strategy", "always"]
    elif damage == "folder":
        shutil.rmtree(run)
    else:
        env = {"HF_TOKEN": ""}
    done = command(clients, run, *args, **env)
    assert done.returncode == 2 and words in done.output, done.output
    assert len(done.output.splitlines()) == 1
    assert ("model", "tester/never") not in hub.repos


@pytest.mark.slow
def test_a_run_that_is_going_on_is_left_alone(clients: Forks, run: Path) -> None:
    with push.alone(run):
        done = command(clients, run, "--repo_id", "tester/busy")
    assert done.returncode == 2 and "a run or another push is at work" in done.output


# --------------------------------------------------------------------------------------------- faults


def forget_weights(hub: HubServer, run: Path) -> None:
    """The Hub has not seen these weights: other tests push the same."""
    hub.blobs.pop(hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(), None)


COMMIT, LFS = "POST /api/models/tester/{}/commit", "PUT /lfs/"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        (COMMIT, {"status": 500}),
        (COMMIT, {"status": 429, "headers": {"Retry-After": "1"}}),
        (COMMIT, {"after_bytes": 300}),
        (COMMIT, {"no_answer": True}),  # done, and nobody knows
        (LFS, {"after_bytes": 1000}),
        (LFS, {"wrong_bytes": True}),
        ("POST /api/repos/create", {"status": 503}),
        ("GET /api/models/tester/{}", {"no_answer": True}),
    ],
)
def test_a_passing_fault_is_overcome_by_one_commit(
    clients: Forks, hub: HubServer, run: Path, pattern: str, fault: dict
) -> None:
    repo = "passing-" + hashlib.sha1(f"{pattern}{fault}".encode()).hexdigest()[:8]
    forget_weights(hub, run)
    hub.fault(pattern.format(repo), **fault)
    done = command(clients, run, "--repo_id", f"tester/{repo}")
    assert done.returncode == 0, done.output
    assert not hub.faults or hub.faults[0].times == 0  # it happened
    assert own_files(hub, f"tester/{repo}") == published(run)
    assert len(mine(hub, f"tester/{repo}")) == 1
    assert hub.token not in done.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 401}, "answered 401: the Hub does not take this token"),
        ({"status": 403}, "answered 403: this token may not do that"),
        ({"status": 409}, "answered 409"),
        ({"status": 429, "headers": {"Retry-After": "100000"}}, "answered 429"),
        ({"after_bytes": 300}, "cannot reach the Hub"),
    ],
)
def test_a_lasting_fault_is_one_line_leaves_the_hub_as_it_was_and_a_later_push_completes(
    clients: Forks, hub: HubServer, run: Path, fault: dict, words: str
) -> None:
    repo = "lasting-" + words.replace(" ", "-").replace(":", "")[:20]
    hub.fault(COMMIT.format(repo), times=100, **fault)
    done = command(clients, run, "--repo_id", f"tester/{repo}")
    assert done.returncode == 2, done.output
    last = done.output.splitlines()[-1]
    assert last.startswith("error:") and words in last
    assert hub.token not in done.output and "Traceback" not in done.output
    assert not mine(hub, f"tester/{repo}")
    hub.faults.clear()
    hub.requests.clear()
    assert command(clients, run, "--repo_id", f"tester/{repo}").returncode == 0
    assert own_files(hub, f"tester/{repo}") == published(run)
    assert not [r for r in hub.requests if r.startswith("PUT /lfs/")]  # what had arrived is not sent again


@pytest.mark.slow
def test_without_a_hub_a_push_says_so(clients: Forks, run: Path, tmp_path: Path) -> None:
    with HubServer(tmp_path / "gone") as gone:
        env = gone.env
    with Forks(env, "from mixup_recipes.hub import push as hub") as nobody:
        done = command(nobody, run, "--repo_id", "tester/nobody")
    assert done.returncode == 2 and "cannot reach the Hub" in done.output.splitlines()[-1]
    assert len(done.output.splitlines()) == 3  # two new attempts and the end


@pytest.mark.slow
def test_a_push_that_is_killed_leaves_nothing_half_published(clients: Forks, hub: HubServer, run: Path) -> None:
    before = {p: p.stat().st_size for p in run.rglob("*")}
    forget_weights(hub, run)
    for pattern in (LFS, COMMIT.format("killed")):
        hub.requests.clear()
        hub.fault(pattern, delay=1.0, status=500)
        started = clients.start(COMMAND, "push", run, "--repo_id", "tester/killed")
        start = pattern.split("{")[0]
        wait_until(lambda start=start: any(r.startswith(start) for r in hub.requests))
        os.kill(started[0], signal.SIGKILL)
        assert clients.wait(started).returncode == -signal.SIGKILL
        hub.faults.clear()
        assert not mine(hub, "tester/killed")
    names = {run / n for n in ("README.md", ".lock", ".eval_results", ".hub.json")}
    left = {p for p in run.rglob("*") if p not in before} - names
    assert not {p for p in left if p.parent.name != ".eval_results"}
    assert command(clients, run, "--repo_id", "tester/killed").returncode == 0
    assert own_files(hub, "tester/killed") == published(run)
    assert len(mine(hub, "tester/killed")) == 1


@pytest.mark.slow
def test_a_commit_of_somebody_else_in_between_is_seen_and_the_publication_is_whole(
    clients: Forks, hub: HubServer, run: Path
) -> None:
    repo = "tester/between"
    assert command(clients, run, "--repo_id", repo).returncode == 0
    with (run / "summary.csv").open("a") as file:
        file.write("9,9,9,9\n")
    hub.fault(COMMIT.format("between"), delay=1.5)
    hub.requests.clear()
    started = clients.start(
        "from mixup_recipes.hub import push as hub; hub.PAUSES = (0.01, 0.02)\n" + COMMAND, "push", run
    )
    wait_until(lambda: any(r.startswith(COMMIT.format("between")) for r in hub.requests))
    hub.write(repo, {"log.jsonl": b"of another push\n"})  # what this push saw no need to send
    done = clients.wait(started)
    assert done.returncode == 0, done.output
    assert "the Hub answered 412" in done.output and "trying again" in done.output
    assert own_files(hub, repo) == published(run)


@pytest.mark.slow
def test_what_a_person_writes_into_the_card_stays_wherever_it_was_written(
    clients: Forks, hub: HubServer, run: Path
) -> None:
    repo, here = "tester/written", run / "README.md"
    assert command(clients, run, "--repo_id", repo).returncode == 0
    hub.write(repo, {"README.md": hub.files(repo)["README.md"] + b"\nWritten on the Hub.\n"})
    assert command(clients, run).returncode == 0
    assert here.read_bytes().endswith(b"\nWritten on the Hub.\n") and hub.files(repo)["README.md"] == here.read_bytes()
    # here, after a push that arrived without our knowing
    count = len(mine(hub, repo))
    here.write_text(here.read_text() + "\nFirst, here.\n")
    hub.fault(COMMIT.format("written"), no_answer=True)
    started = clients.start(COMMAND, "push", run)
    wait_until(lambda: len(mine(hub, repo)) > count)
    os.kill(started[0], signal.SIGKILL)
    clients.wait(started)
    here.write_text(here.read_text() + "\nSecond, here.\n")
    assert command(clients, run).returncode == 0
    text = hub.files(repo)["README.md"].decode()
    assert all(words in text for words in ("Written on the Hub.", "First, here.", "Second, here."))
    # a card on the Hub that cannot be taken over is not, and what is here can be mended
    mended, before = here.read_bytes(), hub.files(repo)["README.md"]
    hub.write(repo, {"README.md": before.replace(b"<!-- mixup-recipes: end -->", b"")})
    done = command(clients, run)
    assert done.returncode == 2 and "tester/written: README.md on the Hub: expected the line" in done.output
    assert len(done.output.splitlines()) == 1 and here.read_bytes() == mended
    hub.write(repo, {"README.md": before})
    assert command(clients, run).returncode == 0


PUSH_PICTURE = """
from pathlib import Path
from mixup_recipes.hub import push as hub
picture, run, repo = sys.argv[1:]
hub.publish(Path(picture), Path(run), repo, False, "end", hub.find_token(None))
"""


@pytest.mark.slow
def test_an_edit_that_was_taken_over_after_the_picture_stays(clients: Forks, hub: HubServer, run: Path) -> None:
    repo, here = "tester/later", run / "README.md"
    assert command(clients, run, "--repo_id", repo).returncode == 0
    taken = publisher.picture(run, "end")
    hub.write(repo, {"README.md": hub.files(repo)["README.md"] + b"\nWritten on the Hub.\n"})
    assert command(clients, run).returncode == 0
    done = clients.run(PUSH_PICTURE, taken, run, repo)
    assert done.returncode == 0, done.output
    assert here.read_bytes().endswith(b"\nWritten on the Hub.\n") and hub.files(repo)["README.md"] == here.read_bytes()


@pytest.mark.slow
def test_a_late_push_of_an_older_picture_leaves_newer_numbers_in_the_run(
    clients: Forks, hub: HubServer, run: Path
) -> None:
    repo, here = "tester/older", run / "README.md"
    assert command(clients, run, "--repo_id", repo).returncode == 0
    before, taken = here.read_bytes(), publisher.picture(run, "end")
    results = json.loads((taken / "eval_results.json").read_text())
    (taken / "eval_results.json").unlink()  # a link to the run's own
    main = "ema_top1" if load_recipe(str(run / "recipe.yaml")).report_ema else "top1"
    results["exported"][main] = 7.77
    (taken / "eval_results.json").write_text(json.dumps(results))
    hub.write(repo, {"README.md": hub.files(repo)["README.md"] + b"\nWritten on the Hub.\n"})
    done = clients.run(PUSH_PICTURE, taken, run, repo)
    assert done.returncode == 0, done.output
    there = hub.files(repo)["README.md"]
    assert b"7.77" in there and there.endswith(b"\nWritten on the Hub.\n")
    assert b"7.77" not in before and here.read_bytes() == before + b"\nWritten on the Hub.\n"
    assert command(clients, run).returncode == 0
    assert hub.files(repo)["README.md"] == here.read_bytes() == before + b"\nWritten on the Hub.\n"


@pytest.mark.slow
def test_a_token_that_may_not_write_is_one_line_and_a_private_run_is_not_read_by_others(
    clients: Forks, hub: HubServer, run: Path
) -> None:
    assert command(clients, run, "--repo_id", "tester/mine", "--private").returncode == 0
    before = len(mine(hub, "tester/mine"))
    (run / "summary.csv").write_text("changed")
    for token, words in ((hub.read_token, "403"), (hub.stranger_token, "403"), ("hf_wrong", "401")):
        done = command(clients, run, HF_TOKEN=token)
        assert done.returncode == 2 and f"the Hub answered {words}" in done.output, done.output
        assert len(done.output.splitlines()) == 1 and token not in done.output
    assert len(mine(hub, "tester/mine")) == before
    for token, words in ((hub.stranger_token, "404"), ("", "401")):
        with Forks(hub.env | {"HF_TOKEN": token}, "import mixup_recipes") as others:
            done = others.run(COMMAND, "verify", "hf-hub:tester/mine", env={"HF_TOKEN": token})
        assert done.returncode == 2 and f"the Hub answered {words}" in done.output, done.output


# --------------------------------------------------------------------------------------------- from the job

SHORT = ("--epochs", 2, "--protocol_epochs", 1, "--precise_bn_samples", "none")


def job(
    server: Server, hub_env: dict[str, str], recipe: Path, out: Path, *args: object, before: str = "", **more: object
):
    """Start a run that pushes to this Hub; ``before``: code that the run begins with."""
    script = out.with_suffix(".py")
    script.write_text(f"import os\nos.environ.update({hub_env!r})\n{before}")
    given = ("--recipe", recipe, "--output_dir", out, "--dataloader_num_workers", 0, *LOG, *SHORT, "--push_to_hub")
    return server.start(*given, *args, faults=[["script", str(script)], *more.get("faults", [])])


@pytest.mark.slow
def test_a_run_that_saves_often_is_only_ever_published_whole_and_its_token_nowhere(
    server: Server, hub: HubServer, tiny_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "job"
    args = ("--hub_model_id", "tester/job", "--hub_strategy", "checkpoint", "--hub_token", hub.token)
    env = hub.env | {"HF_TOKEN": ""}
    run = job(server, env, tiny_recipe, out, *args, "--hub_private_repo", "--checkpointing_steps", 2)
    assert run.wait() == [0], run.output()
    assert run.output().rstrip().endswith(f"published: {hub.url}/tester/job"), run.output()
    repo = hub.repos["model", "tester/job"]
    assert repo.private and len(repo.commits) > 1
    for commit in repo.commits[1:]:
        files = {name: hub.blobs[entry.oid] for name, entry in commit.files.items()}
        assert files["log.jsonl"][-2:] in (b"", b"}\n")
        assert len({n.split("/")[1] for n in files if n.startswith("checkpoints/")}) == 1
        if "model.safetensors" in files:
            claimed = json.loads(files["eval_results.json"])["weights_sha256"]
            assert hashlib.sha256(files["model.safetensors"]).hexdigest() == claimed
    newest = sorted((out / "checkpoints").iterdir())[-1].name
    assert own_files(hub, "tester/job") == published(out, f"checkpoints/{newest}")
    assert hub.token not in run.output()
    kept = [p for p in out.rglob("*") if p.is_file()]
    assert not [p for p in kept if hub.token.encode() in p.read_bytes()]
    assert "***" in json.loads((out / "env.json").read_text())["command"]
    assert not [p for p in kept if ".push-" in str(p)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 403}, "answered 403"),
        ({"status": 500}, "not waiting any longer"),
    ],
)
def test_a_push_that_fails_is_one_line_and_the_run_is_done(
    server: Server, clients: Forks, hub: HubServer, tiny_recipe: Path, tmp_path: Path, fault: dict, words: str
) -> None:
    name, out = f"failing-{fault['status']}", tmp_path / "job"
    hub.fault(COMMIT.format(name), times=100, **fault)
    before = "import mixup_recipes.hub.publisher as p\np.PATIENCE = 10\n" if fault["status"] == 500 else ""
    run = job(server, hub.env, tiny_recipe, out, "--hub_model_id", f"tester/{name}", before=before)
    assert run.wait() == [0], run.output()
    last = run.output().rstrip().splitlines()[-1]
    assert last.startswith("warning: push to the Hub: ") and words in last
    assert last.endswith(f"push it with: mixup-recipes push {out}")
    hub.faults.clear()
    done = command(clients, out)  # remembers where to
    assert done.returncode == 0, done.output
    assert own_files(hub, f"tester/{name}") == published(out)
    assert len(mine(hub, f"tester/{name}")) == 1


@pytest.mark.slow
def test_a_full_disk_keeps_a_run_from_its_push_only(
    server: Server, hub: HubServer, tiny_recipe: Path, tmp_path: Path
) -> None:
    full = [["no_space", "mixup_recipes.hub.publisher:picture", 1]]
    run = job(server, hub.env, tiny_recipe, tmp_path / "job", "--hub_model_id", "tester/full", faults=full)
    assert run.wait() == [0], run.output()
    assert "warning: push to the Hub: the Hub: No space left on device" in run.output()
    assert (tmp_path / "job" / "eval_results.json").exists()


@pytest.mark.slow
def test_a_signal_ends_the_wait_for_a_push(server: Server, hub: HubServer, tiny_recipe: Path, tmp_path: Path) -> None:
    hub.fault(COMMIT.format("slow"), delay=20)
    run = job(server, hub.env, tiny_recipe, tmp_path / "job", "--hub_model_id", "tester/slow")
    wait_until(lambda: any("tester/slow/commit" in r for r in hub.requests))
    began = time.monotonic()
    run.send(signal.SIGTERM)
    assert run.wait() == [0], run.output()
    assert time.monotonic() - began < 15 and "not waiting any longer" in run.output()
    assert not [p for p in (tmp_path / "job").iterdir() if p.name.startswith(".push-")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--push_to_hub", "--hub_model_id", "a/b/c"], "expected NAME or OWNER/NAME, got 'a/b/c'"),
        (["--push_to_hub"], "needs a token"),
        (["--push_to_hub", "--hub_token", "two words"], "has blanks or unusual characters"),
        (["--push_to_hub", "--hub_strategy", "often"], "end, every_save, checkpoint, all_checkpoints"),
        (["--hub_model_id", "a/b"], "pass --push_to_hub too"),
    ],
)
def test_what_cannot_be_pushed_is_told_before_training(
    server: Server, tiny_recipe: Path, tmp_path: Path, args: list[str], words: str
) -> None:
    home = tmp_path / "no.py"
    home.write_text(
        f"import os\nos.environ.update(HF_TOKEN='')\nimport huggingface_hub.constants as c\n"
        f"c.HF_TOKEN_PATH = {str(tmp_path / 'none')!r}\n"
    )
    given = ("--recipe", tiny_recipe, "--output_dir", tmp_path / "job")
    status, output = server.run(*given, *args, faults=[["script", str(home)]])
    assert status == 2 and words in output and "two words" not in output
    assert not (tmp_path / "job").exists()


# --------------------------------------------------------------------------------------------- pull

LOGITS = """
import json, sys, torch, timm
from training import backbones
repo, folder, out = sys.argv[1:]
torch.manual_seed(0)
x = torch.randn(2, 3, 32, 32)
from transformers import AutoModelForImageClassification, pipeline
from PIL import Image
nets = {
    "folder": backbones.load_model(folder),
    "hub": backbones.load_model(f"hf-hub:{repo}"),
    "timm": timm.create_model(f"hf-hub:{repo}", pretrained=True),
    "transformers": AutoModelForImageClassification.from_pretrained(repo),
}
with torch.no_grad():
    logits = {k: net.eval()(x) for k, net in nets.items()}
logits["transformers"] = logits["transformers"].logits
named = pipeline("image-classification", model=repo, device="cpu")(Image.new("RGB", (40, 40), "red"))
print(json.dumps({
    "equal": [torch.equal(v, logits["folder"]) for v in logits.values()],
    "names": sorted(p["label"] for p in named),
    "timm": list(nets["timm"].pretrained_cfg["label_names"]),
    "id2label": list(nets["transformers"].config.id2label.values()),
}))
"""


def test_timm_transformers_and_this_project_pull_the_same_model_with_its_class_names(
    clients: Forks, hub: HubServer, run: Path
) -> None:
    command(clients, run, "--repo_id", "tester/pulled")
    done = clients.run(LOGITS, "tester/pulled", run, "x")
    assert done.returncode == 0, done.output
    found = json.loads(done.output.splitlines()[-1])
    assert found["equal"] == [True] * 4
    assert found["names"] == found["timm"] == found["id2label"] == tiny.CLASSES


@pytest.mark.slow
@pytest.mark.parametrize("model", ["moganet_tiny", "pvt_tiny"])
def test_models_that_timm_lacks_are_pulled_too_and_say_what_to_import(
    clients: Forks, hub: HubServer, model: str, tmp_path: Path
) -> None:
    code = """
import json, sys, timm, torch
from pathlib import Path
from training import backbones, run
from recipes import load
name, folder = sys.argv[1], Path(sys.argv[2])
recipe = load("quickstart_vanilla", model=name, num_classes=3, eval_size=224, eval_resize=256)
net = backbones.create_model(recipe)
run.export(net, folder, recipe, ["a", "b", "c"])
from huggingface_hub import HfApi
HfApi().create_repo(f"tester/{name}")
HfApi().upload_folder(repo_id=f"tester/{name}", folder_path=str(folder))
from transformers import AutoModelForImageClassification
pulled = backbones.load_model(f"hf-hub:tester/{name}")
other = AutoModelForImageClassification.from_pretrained(f"tester/{name}")
x = torch.randn(1, 3, 224, 224)
with torch.no_grad():
    print(torch.equal(pulled.eval()(x), net.eval()(x)), torch.equal(other.eval()(x).logits, net(x)))
"""
    done = clients.run(code, model, tmp_path)
    assert done.returncode == 0 and done.output.splitlines()[-1] == "True True", done.output
    plain = "import timm\ntimm.create_model(sys.argv[1], pretrained=True)"
    with Forks(hub.env, "import timm") as strangers:
        assert "Unknown model" in strangers.run(plain, f"hf-hub:tester/{model}").output
    assert "mixup_recipes.training.backbones" in (ROOT / "docs/hub.md").read_text()


EVALUATE = "import evaluate_mixup; from recipes import cli; cli.run(evaluate_mixup.main)"


def test_a_pulled_model_is_evaluated_by_its_own_recipe_and_verified(
    clients: Forks, hub: HubServer, run: Path, tmp_path: Path
) -> None:
    command(clients, run, "--repo_id", "tester/checked")
    done = clients.run(EVALUATE, "--model", "hf-hub:tester/checked", "--output", tmp_path / "scores.json")
    assert done.returncode == 0, done.output
    scores, claimed = (json.loads(p.read_text()) for p in (tmp_path / "scores.json", run / "eval_results.json"))
    assert scores["top1"] == claimed["exported"]["top1"]
    good = clients.run(COMMAND, "verify", "hf-hub:tester/checked")
    assert good.returncode == 0 and "differs" not in good.output, good.output
    assert len(good.output.splitlines()) >= 9


@pytest.mark.slow
def test_each_lie_is_found_and_where_it_is(clients: Forks, hub: HubServer, run: Path) -> None:
    command(clients, run, "--repo_id", "tester/checked")
    files = hub.files("tester/checked")
    weights = bytearray(files["model.safetensors"])
    weights[-400:] = bytes(400)
    lies = {
        "model.safetensors": (bytes(weights), "weights and eval_results.json"),
        "summary.csv": (files["summary.csv"] + b"4,1,1,1\n", "log and summary.csv"),
        "README.md": (re.sub(rb"value: [\d.]+", b"value: 99.99", files["README.md"], count=1), "card and"),
        "eval_results.json": (files["eval_results.json"].replace(b'"top1": ', b'"top1": 1'), "log and eval_results"),
    }
    for name, (lie, words) in lies.items():
        hub.write("tester/checked", {name: lie})
        found = clients.run(COMMAND, "verify", "hf-hub:tester/checked")
        assert found.returncode == 1, found.output
        assert any(row.startswith("differs") and words in row for row in found.output.splitlines()), found.output
        hub.write("tester/checked", {name: files[name]})


# --------------------------------------------------------------------------------------------- metrics as Spaces

HF = "from huggingface_hub.cli.hf import main\nsys.argv[0] = 'hf'\nmain()"
USE = """
import json, os, socket
if os.environ["HF_HUB_OFFLINE"] == "1":
    def refuse(*_): raise AssertionError("the metric asked for a connection")
    socket.socket.connect = refuse
import evaluate
inputs = {"predictions": [[3, 7, 1, 0, 2], [2, 0, 5, 1, 3]], "references": [3, 5]}
if sys.argv[1].endswith("calibration"):
    inputs |= {"confidences": [1, 0.5], "nlls": [0, 2]}
print(json.dumps(evaluate.load(sys.argv[1], cache_dir=sys.argv[2]).compute(**inputs)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [("topk_accuracy", {"top1": 50.0, "top5": 100.0}), ("calibration", {"ece": 25.0, "nll": 1.0})],
)
def test_the_documented_commands_make_a_metric_a_space_that_loads_from_there_and_from_a_copy(
    clients: Forks, hub: HubServer, tmp_path: Path, name: str, expected: dict
) -> None:
    section = re.search(r"^## Metrics as Spaces\n.*?```bash\n(.*?)```", (ROOT / "docs/hub.md").read_text(), re.S | re.M)
    lines = section[1].replace("OWNER", "tester").replace("topk_accuracy", name).splitlines()
    assert [shlex.split(line)[:2] for line in lines] == [["hf", "repos"], ["hf", "upload"], ["hf", "download"]]
    for line in lines:
        words = [w if w.startswith("--") else w.replace("copies/", f"{tmp_path}/") for w in shlex.split(line)[1:]]
        done = clients.run(f"import os\nos.chdir({str(ROOT)!r})\n{HF}", *words)
        assert done.returncode == 0, done.output
    here = {p.name: p.read_bytes() for p in (ROOT / "metrics" / name).iterdir() if p.is_file()}
    there = {k: v for k, v in hub.files(f"tester/{name}", "space").items() if k != ".gitattributes"}
    assert there == here and {"README.md", "app.py", "requirements.txt"} <= there.keys()
    copy = [tmp_path / name, {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}]
    for source, env in ([f"tester/{name}", {}], copy):
        with Forks(hub.env | env, "") as one:
            done = one.run(USE, source, tmp_path / "cache", env=env)
        assert done.returncode == 0, done.output
        assert json.loads(done.output.splitlines()[-1]) == pytest.approx(expected)


@pytest.mark.slow
def test_damaged_and_hostile_files_of_a_run_are_one_line_for_verify(clients: Forks, hub: HubServer, run: Path) -> None:
    command(clients, run, "--repo_id", "tester/odd")
    files = hub.files("tester/odd")
    recipe, deep = files["recipe.yaml"], b"[" * 100000
    results, data = (json.loads(files[name]) for name in ("eval_results.json", "data.json"))

    def exported(**changes: object) -> bytes:
        """The results with other scores; without those that are None."""
        scores = {k: v for k, v in (results["exported"] | changes).items() if v is not None}
        return json.dumps(results | {"exported": scores}).encode()

    lies = {k: 99.0 for k in results["exported"] if k.endswith("top1")}  # found first
    nlls = [k for k in results["exported"] if k.endswith("nll")]
    cases = [
        ("README.md", b"---\nmodel-index: " + deep + b"\n---\n", "damaged files: RecursionError"),
        ("README.md", b"---\nmodel-index: 5\n---\n", "damaged files: TypeError"),
        ("eval_results.json", deep, "damaged files: RecursionError"),
        ("eval_results.json", b"[]", "damaged files: TypeError"),
        ("eval_results.json", exported(**lies, **dict.fromkeys(nlls)), "damaged files: KeyError"),
        ("eval_results.json", exported(**lies, **dict.fromkeys(nlls, "low")), "damaged files: ValueError"),
        ("eval_results.json", exported(**lies, **{key: [1] for key in nlls}), "damaged files: TypeError"),
        ("data.json", json.dumps({"classes": data["classes"]}).encode(), "damaged files: KeyError"),
        ("data.json", json.dumps(data | {"splits": {}}).encode(), "damaged files: KeyError"),
        ("data.json", json.dumps(data | {"splits": 5}).encode(), "damaged files: TypeError"),
        ("data.json", deep, "damaged files: RecursionError"),
        ("config.json", config(run, global_pool="", model_args={"global_pool": ""}), "does not take 64 images"),
        ("predictions.safetensors", pickle.dumps({}), "damaged files: SafetensorError"),
        ("log.jsonl", b"", "hf-hub:tester/odd: no validation line"),
        ("log.jsonl", b"\xff\n", "damaged files: UnicodeDecodeError"),
        ("recipe.yaml", re.sub(rb"eval_resize: \d+", b"eval_resize: 1000000", recipe), "at most 4096 pixels"),
    ]
    for name, lie, words in cases:
        hub.write("tester/odd", {name: lie})
        done = clients.run(COMMAND, "verify", "hf-hub:tester/odd")
        assert done.returncode == 2 and words in done.output, (name, done.output)
        assert len(done.output.splitlines()) == 1, done.output
        hub.write("tester/odd", {name: files[name]})


# --------------------------------------------------------------------------------------------- fine-tune


@pytest.mark.slow
def test_fine_tuning_starts_from_the_pulled_weights_and_replaces_the_head_of_other_classes(
    clients: Forks, hub: HubServer, run: Path
) -> None:
    command(clients, run, "--repo_id", "tester/start")
    code = """
import json, sys
import torch
import recipes
from training import backbones
repo, folder = sys.argv[1:]
own = json.loads(open(folder + "/config.json").read())["label_names"]
answers = []
for start in ("hf-hub:" + repo, folder):
    for count, classes in ((4, own), (4, ["w", "x", "y", "z"]), (7, list("abcdefg"))):
        recipe = load_recipe(folder + "/recipe.yaml", pretrained=start, num_classes=count)
        fresh, model = backbones.create_model(recipe), backbones.create_model(recipe)
        source = backbones.load_start(recipe)
        said = backbones.start_from(model, source, classes)
        a, b, c = (m.state_dict() for m in (model, source, fresh))
        body = all(torch.equal(a[k], b[k]) for k in a if not k.startswith("fc."))
        head = "theirs" if count == 4 and torch.equal(a["fc.weight"], b["fc.weight"]) else "?"
        head = "fresh" if torch.equal(a["fc.weight"], c["fc.weight"]) else head
        answers.append([body, head, said])
print(json.dumps(answers))
"""
    done = clients.run(code, "tester/start", run)
    assert done.returncode == 0, done.output
    kept, replaced = [True, "theirs", "with its head"], [True, "fresh", "with a new head for {} classes"]
    others = [[*replaced[:2], replaced[2].format(n)] for n in (4, 7)]
    assert json.loads(done.output.splitlines()[-1]) == [kept, *others] * 2


@pytest.mark.slow
def test_a_run_starts_from_a_run_folder_and_resumes_without_it(
    server: Server, tiny_recipe: Path, run: Path, tmp_path: Path
) -> None:
    given = ("--recipe", tiny_recipe, "--output_dir", tmp_path / "tuned", "--dataloader_num_workers", 0, *LOG, *SHORT)
    given = (*given, "--pretrained", run, "--lr", 1e-9, "--warmup_epochs", 0, "--ema_decay", "none")
    given = (*given, "--ema_warmup_epochs", 0)
    status, output = server.run(*given)
    assert status == 0 and f"starts from {run} with its head" in output, output
    before, after = (load_file(f / "model.safetensors") for f in (run, tmp_path / "tuned"))
    for key in (k for k in before if "running" not in k and "num_batches" not in k):
        assert np.allclose(before[key], after[key], atol=1e-5), key
    shutil.rmtree(run)
    status, output = server.run(*given, "--resume_from_checkpoint", "auto")
    assert status == 0 and "starts from" not in output, output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pretrained", "words"),
    [
        ("nowhere", "neither a run folder"),
        ("RUN", "pass --model test_resnet"),
        ("timm", "timm has no weights of 'resnet18_cifar'"),
        ("resnet5", "did you mean 'resnet50'"),
    ],
)
def test_a_start_that_cannot_be_is_one_line(
    server: Server, tiny_recipe: Path, run: Path, tmp_path: Path, pretrained: str, words: str
) -> None:
    start = run if pretrained == "RUN" else pretrained
    given = ("--recipe", tiny_recipe, "--output_dir", tmp_path / "tuned", "--model", "resnet18_cifar")
    status, output = server.run(*given, "--pretrained", start)
    assert status == 2 and words in output and "Traceback" not in output, output
    assert not (tmp_path / "tuned").exists()


# --------------------------------------------------------------------------------------------- strangers

LOAD = """
import sys
from recipes import cli
from training import backbones
cli.run(lambda: print(type(backbones.load_model(sys.argv[1])).__name__))
"""


class Trap:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def config(run: Path, **changes: object) -> bytes:
    """A run's config.json with changes."""
    return json.dumps(json.loads((run / "config.json").read_text()) | changes).encode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "os.system"}, "is a 'os.system'"),
        ({"architecture": "hf-hub:stranger/other"}, "is a 'hf-hub:stranger/other'"),
        ({"architecture": ["resnet10t"]}, "names no architecture"),
        ({"architecture": "resnet5"}, "did you mean"),
        ({"model_args": {"checkpoint_path": "PICKLE"}}, "the argument 'checkpoint_path'"),
        ({"model_args": {"pretrained_cfg": {"file": "PICKLE"}}}, "the argument 'pretrained_cfg'"),
        ({"model_args": {"layers": [2, 2, 10**9, 2]}}, "no classifier is that large"),
        ({"model_args": {"no_such_argument": 1}}, "no_such_argument"),
        ({"model_args": "rm"}, "must be tables"),
        ({"num_classes": 10**9}, "no classifier is that large"),
    ],
)
def test_a_hostile_configuration_is_refused_in_one_line(
    clients: Forks, hub: HubServer, run: Path, tmp_path: Path, changes: dict, words: str
) -> None:
    mark, trap = tmp_path / "read", tmp_path / "trap.pth"
    trap.write_bytes(pickle.dumps(Trap(mark)))
    weights = (run / "model.safetensors").read_bytes()
    said = config(run, **json.loads(json.dumps(changes).replace("PICKLE", str(trap))))
    hub.write("stranger/config", {"config.json": said, "model.safetensors": weights})
    done = clients.run(LOAD, "hf-hub:stranger/config")
    assert done.returncode == 2 and words in done.output, done.output
    assert len(done.output.splitlines()) == 1 and not mark.exists()


@pytest.mark.slow
def test_where_a_configuration_says_that_weights_lie_is_passed_over(
    clients: Forks, hub: HubServer, run: Path, tmp_path: Path
) -> None:
    mark, trap = tmp_path / "read", tmp_path / "trap.pth"
    trap.write_bytes(pickle.dumps(Trap(mark)))
    nested = json.loads((run / "config.json").read_text())["pretrained_cfg"]
    sources = {"file": str(trap), "url": f"file://{trap}", "custom_load": True, "hf_hub_filename": "pytorch_model.bin"}
    sources |= {"source": "url", "hf_hub_id": "stranger/other", "state_dict": {"a": 1}}
    said = config(run, pretrained_cfg=nested | sources)
    weights = (run / "model.safetensors").read_bytes()
    hub.write(
        "stranger/sources",
        {"config.json": said, "model.safetensors": weights, "pytorch_model.bin": trap.read_bytes()},
    )
    done = clients.run(LOAD, "hf-hub:stranger/sources")
    assert done.returncode == 0 and done.output.split()[-1] == "ResNet", done.output
    assert not mark.exists() and not any(r.endswith("pytorch_model.bin") for r in hub.requests)


@pytest.mark.slow
def test_pickles_are_not_read_and_broken_or_foreign_weights_are_one_line(
    clients: Forks, hub: HubServer, run: Path, tmp_path: Path
) -> None:
    trap = pickle.dumps(Trap(tmp_path / "read"))
    weights = (run / "model.safetensors").read_bytes()
    cases = {
        "pickle": ({"pytorch_model.bin": trap}, "has no model.safetensors; weights in other files, such as pickles"),
        "posing": ({"model.safetensors": trap + bytes(len(weights))}, "SafetensorError"),
        "huge": ({"model.safetensors": (2**63 - 1).to_bytes(8, "little") + weights[8:]}, "SafetensorError"),
        "cut": ({"model.safetensors": weights[:-100]}, "SafetensorError"),
        "deep": ({"model.safetensors": weights, "config.json": b"[" * 100000}, "config.json cannot be read"),
        "none": ({"notes.txt": b""}, "has no config.json"),
    }
    for name, (files, words) in cases.items():
        kept = {} if name == "none" else {"config.json": config(run)}
        hub.write(f"stranger/{name}", kept | files)
        done = clients.run(LOAD, f"hf-hub:stranger/{name}")
        assert done.returncode == 2 and words in done.output, done.output
        assert len(done.output.splitlines()) == 1
    missing = clients.run(LOAD, "hf-hub:stranger/nobody")
    assert missing.returncode == 2 and "the Hub answered 404" in missing.output
    assert not (tmp_path / "read").exists()


TEACHERS = """
import json, sys
import torch
from mixers import AttentiveMix, taps
said = {}
for name in sys.argv[1:]:
    try:
        teacher = taps.Frozen(name)
        said[name] = list(teacher(torch.zeros(2, 3, 32, 32)).shape)
    except ValueError as e:
        said[name] = str(e)
mixer = AttentiveMix(teacher=sys.argv[1])
mixer.setup(torch.nn.Identity())
print(json.dumps(said))
"""


def test_a_hostile_teacher_does_no_harm(clients: Forks, hub: HubServer, run: Path, tmp_path: Path) -> None:
    mark = tmp_path / "read"
    trap, weights = pickle.dumps(Trap(mark)), (run / "model.safetensors").read_bytes()
    nested = json.loads((run / "config.json").read_text())["pretrained_cfg"]
    good = {"config.json": config(run), "model.safetensors": weights}
    sources = {"file": str(tmp_path / "trap.pth"), "custom_load": True, "hf_hub_filename": "pytorch_model.bin"}
    cases = {
        "good": (good | {"pytorch_model.bin": trap}, None),
        "sources": (good | {"config.json": config(run, pretrained_cfg=nested | sources)}, None),
        "pickle": ({"config.json": config(run), "pytorch_model.bin": trap}, "has no model.safetensors"),
        "posing": (good | {"model.safetensors": trap + bytes(len(weights))}, "SafetensorError"),
        "code": (
            good | {"config.json": config(run, architecture="os.system")},
            "'os.system', which timm does not have",
        ),
        "large": (good | {"config.json": config(run, model_args={"width": 10**9})}, "no classifier is that large"),
        "path": (good | {"config.json": config(run, model_args={"checkpoint_path": "trap.pth"})}, "'checkpoint_path'"),
        "deep": (good | {"config.json": b"[" * 100000}, "config.json cannot be read"),
    }
    (tmp_path / "trap.pth").write_bytes(trap)
    expected = {}
    for name, (files, words) in cases.items():
        hub.write(f"stranger/teacher-{name}", files)
        expected[f"hf-hub:stranger/teacher-{name}"] = words
        folder = tmp_path / name
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        expected[str(folder)] = words
    done = clients.run(TEACHERS, *expected)
    assert done.returncode == 0, done.output
    for name, answer in json.loads(done.output.splitlines()[-1]).items():
        words = expected[name]
        if words is None:
            assert answer == [2, 4], (name, answer)
        else:
            assert answer.startswith(f"no weights for the teacher {name!r} (") and words in answer, answer
            assert "\n" not in answer
    assert not mark.exists()
    assert not [r for r in hub.requests if r.endswith("pytorch_model.bin")]


@pytest.mark.slow
def test_what_is_announced_too_large_is_not_begun(clients: Forks, hub: HubServer, run: Path) -> None:
    hub.write("stranger/large", {"config.json": b" " * 2**24, "model.safetensors": b"x"})
    hub.requests.clear()
    done = clients.run(LOAD, "hf-hub:stranger/large")
    assert done.returncode == 2 and "config.json has 17 MB, and 8 MB are the most here" in done.output, done.output
    assert not [r for r in hub.requests if r.startswith("GET")]
    hub.write("stranger/large", {"config.json": config(run), "model.safetensors": bytes(2**21)})
    full = "import shutil; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(2**40, 2**40, 2**20)\n"
    done = clients.run(full + LOAD, "hf-hub:stranger/large")
    assert done.returncode == 2 and "model.safetensors has 2 MB, and 1 MB are the most here" in done.output, done.output


@pytest.mark.slow
def test_names_that_leave_the_folder_and_code_for_python_are_never_touched(
    clients: Forks, hub: HubServer, run: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    evil = f"open({str(mark)!r}, 'w')".encode()
    files = {n: (run / n).read_bytes() for n in ("config.json", "model.safetensors", "recipe.yaml", "data.json")}
    files["config.json"] = config(run, auto_map={"AutoModelForImageClassification": "modeling.Evil"})
    files |= {n: evil for n in ("modeling.py", "../../escaped.py", "../escaped.py", "/tmp/escaped-hub.py")}
    files |= {
        "README.md": b"---\nlicense: !!python/object/apply:os.system ['touch ran']\n---\n<script>alert(1)</script>"
    }
    hub.write("stranger/escape", files)
    hub.requests.clear()
    for code, args in ((LOAD, ["hf-hub:stranger/escape"]), (COMMAND, ["verify", "hf-hub:stranger/escape"])):
        clients.run(code, *args)
    assert not mark.exists()
    assert not [r for r in hub.requests if "escaped" in r or "modeling" in r]
    assert not [*hub.folder.rglob("escaped*"), *Path("/tmp").glob("escaped*")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("!!python/object/apply:os.system ['touch ran']", "not valid YAML"),
        ("a: &a [*a]", "not valid YAML"),
        ("mixer_args: {vanilla: {exec: 1}}\n", "exec"),
        ("dataset: x\nunknown: 1\n", "unknown recipe field"),
    ],
)
def test_a_hostile_recipe_is_one_line(
    clients: Forks, hub: HubServer, run: Path, recipe: str, words: str, tmp_path: Path
) -> None:
    files = {n: (run / n).read_bytes() for n in ("config.json", "model.safetensors")}
    hub.write("stranger/recipe", files | {"recipe.yaml": recipe.encode()})
    for code, args in ((COMMAND, ["verify"]), (EVALUATE, ["--model"])):
        done = clients.run(f"import os; os.chdir({str(tmp_path)!r})\n{code}", *args, "hf-hub:stranger/recipe")
        assert done.returncode == 2 and words in done.output, done.output
        assert "Traceback" not in done.output and not (tmp_path / "ran").exists()
