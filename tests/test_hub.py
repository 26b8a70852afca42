"""Runs on the Hub: pushed whole or not at all, by the real clients, against a Hub on 127.0.0.1 with faults."""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from driver import Server
from forks import Done, Forks
from hub_server import HubServer
from resuming import LOG, Reference

from model_cards import hub as push
from model_cards import publisher
from recipes import UserError, load

COMMAND = "import mixup_recipes; mixup_recipes.main()"
IMPORTS = """
import huggingface_hub, mixup_recipes, timm, torch
from model_cards import hub, publisher
from training import backbones, run
"""


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
    quick = "from model_cards import hub; hub.PAUSES = (0.01, 0.02)\n"
    return clients.run(quick + COMMAND, "push", *args, env=env)


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
    found = push.default_name(load(recipe, **changes))
    push.check_name(found)
    assert name is None or found == name
    assert found.endswith("_seed2") == ("seed" in changes)


def test_a_private_run_is_never_put_into_a_public_repository(clients: Forks, hub: HubServer, run: Path) -> None:
    assert command(clients, run, "--repo_id", "tester/closed", "--private").returncode == 0
    assert hub.repos["model", "tester/closed"].private
    hub.write("tester/open", {})
    done = command(clients, run, "--repo_id", "tester/open", "--private")
    assert done.returncode == 2 and "exists and is public" in done.output
    assert set(hub.files("tester/open")) <= {".gitattributes"}


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


def test_a_run_that_is_going_on_is_left_alone(clients: Forks, run: Path) -> None:
    with push.alone(run):
        done = command(clients, run, "--repo_id", "tester/busy")
    assert done.returncode == 2 and "a run or another push is at work" in done.output


# --------------------------------------------------------------------------------------------- faults


def forget_weights(hub: HubServer, run: Path) -> None:
    """The Hub has not seen these weights: other tests push the same."""
    hub.blobs.pop(hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(), None)


COMMIT, LFS = "POST /api/models/tester/{}/commit", "PUT /lfs/"


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        (COMMIT, {"status": 500}),
        (COMMIT, {"status": 409}),
        (COMMIT, {"status": 429, "headers": {"Retry-After": "1"}}),
        (COMMIT, {"after_bytes": 300}),
        (COMMIT, {"no_answer": True}),  # done, and nobody knows
        (LFS, {"after_bytes": 1000}),
        (LFS, {"wrong_bytes": True}),
        ("POST /api/repos/create", {"status": 503}),
        ("POST /api/models/tester/{}/preupload", {"status": 502}),
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


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 401}, "answered 401: the Hub does not take this token"),
        ({"status": 403}, "answered 403: this token may not write there"),
        ({"status": 404}, "answered 404"),
        ({"status": 500}, "answered 500"),
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


def test_without_a_hub_a_push_says_so(clients: Forks, run: Path, tmp_path: Path) -> None:
    with HubServer(tmp_path / "gone") as gone:
        env = gone.env
    with Forks(env, "from model_cards import hub") as nobody:
        done = command(nobody, run, "--repo_id", "tester/nobody")
    assert done.returncode == 2 and "cannot reach the Hub" in done.output.splitlines()[-1]
    assert len(done.output.splitlines()) == 3  # two new attempts and the end


def test_a_push_that_is_killed_leaves_nothing_half_published(clients: Forks, hub: HubServer, run: Path) -> None:
    before = {p: p.stat().st_size for p in run.rglob("*")}
    forget_weights(hub, run)
    for pattern in (LFS, COMMIT.format("killed")):
        hub.requests.clear()
        hub.fault(pattern, delay=1.0, status=500)
        started = clients.start(COMMAND, "push", run, "--repo_id", "tester/killed")
        while not any(r.startswith(pattern.split("{")[0]) for r in hub.requests):
            time.sleep(0.01)
        os.kill(started[0], signal.SIGKILL)
        assert clients.wait(started).returncode == -signal.SIGKILL
        hub.faults.clear()
        assert not mine(hub, "tester/killed")
    left = {p for p in run.rglob("*") if p not in before} - {run / "README.md", run / ".lock", run / ".eval_results"}
    assert not {p for p in left if p.parent.name != ".eval_results"}
    assert command(clients, run, "--repo_id", "tester/killed").returncode == 0
    assert own_files(hub, "tester/killed") == published(run)
    assert len(mine(hub, "tester/killed")) == 1
