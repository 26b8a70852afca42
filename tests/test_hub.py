"""Runs to the Hub: pushed whole or not at all, by the real clients, against a Hub on 127.0.0.1 with faults."""

import contextlib
import json
import os
import shutil
import signal
import time

import pytest

from mixup_recipes.hub import publisher, push
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs.run import Run
from mixup_recipes.typed import UserError

REPO = "tester/run"
COMMIT, LFS = f"POST /api/models/{REPO}/commit", "PUT /lfs/"
PUSH = """
from mixup_recipes import cli
from mixup_recipes.hub import push
push.PAUSES = (0.01, 0.02)
cli.main()
"""

# Whole clients against a server are slow: a handful runs by default, one of each kind.


def command(clients, run, *args, **env):
    """mixup-recipes push, with short pauses."""
    return clients.run(PUSH, "push", run, *args, env=env)


def pushed(clients, run, *args):
    """What a push prints last, that must succeed."""
    done = command(clients, run, *args)
    assert done.returncode == 0, done.output
    return done.output.splitlines()[-1]


def refused(done, words):
    """Whether a command has ended in one line with these words, and status 2."""
    return done.returncode == 2 and words in done.output and len(done.output.splitlines()) == 1


def wait_until(happened, most=120.0):
    """Wait for something that must happen within ``most`` seconds."""
    deadline = time.monotonic() + most
    while not happened():
        assert time.monotonic() < deadline, f"it did not happen within {most:g} s"
        time.sleep(0.01)


def asked(hub, start):
    """Whether the Hub was asked something."""
    return any(request.startswith(start) for request in hub.requests)


def mine(hub):
    """The commits behind the Hub's own first one."""
    return hub.repos["model", REPO].commits[1:]


def card(hub):
    return hub.files(REPO)["README.md"]


def edit(hub):
    """A person writes into the card on the Hub."""
    hub.write(REPO, {"README.md": card(hub) + b"\nWritten on the Hub.\n"})


def own_files(hub):
    """What was pushed; the card is its own tests' business."""
    return {k: v for k, v in hub.files(REPO).items() if k not in (".gitattributes", "README.md") and k[:6] != ".eval_"}


def published(run, *folders):
    """What the documents say is published, walked through independently."""
    names = "config.json model.safetensors recipe.yaml env.json data.json log.jsonl summary.csv eval_results.json"
    paths = [run / n for n in (*names.split(), "predictions.safetensors")]
    for folder in ("models", "runs", "samples", *folders):
        paths += [p for p in (run / folder).rglob("*") if p.is_file()]
    return {str(p.relative_to(run)): p.read_bytes() for p in paths}


def test_a_push_is_one_commit_of_what_a_reader_needs_another_is_none_and_a_third_sends_what_has_changed(
    clients, hub, run
):
    assert pushed(clients, run, "--repo_id", REPO) == f"{hub.url}/{REPO}: published"
    assert own_files(hub) == published(run) and any("tfevents" in name for name in own_files(hub))
    assert pushed(clients, run) == f"{hub.url}/{REPO}: up to date"  # to where it went before
    assert len(mine(hub)) == 1
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join([*lines, lines[0]]))
    sheet = sorted((run / "samples").iterdir())[0]
    sheet.unlink()
    hub.write(REPO, {"notes/of-a-person.txt": b"stays"})
    pushed(clients, run)
    before, after = (commit.files.items() for commit in mine(hub)[-2:])
    assert {name for name, _ in before ^ after} - {"README.md"} == {"log.jsonl", f"samples/{sheet.name}"}
    assert f"samples/{sheet.name}" not in hub.files(REPO)
    assert hub.files(REPO)["notes/of-a-person.txt"] == b"stays"


@pytest.mark.slow
def test_a_run_before_its_first_evaluation_goes_with_its_checkpoints_and_without_a_card(clients, hub, run):
    evaluated = "eval_results.json", "model.safetensors", "config.json", "predictions.safetensors", "summary.csv"
    for name in (*evaluated, "README.md"):
        (run / name).unlink()
    first, second = sorted(p.name for p in (run / "checkpoints").iterdir())
    for strategy, expected in (("all_checkpoints", {first, second}), ("checkpoint", {second})):
        pushed(clients, run, "--repo_id", REPO, "--strategy", strategy)
        assert {n.split("/")[1] for n in own_files(hub) if n.startswith("checkpoints/")} == expected
    assert mine(hub)[0].summary == "tiny: checkpoint"
    assert "README.md" not in hub.files(REPO) and not (run / "README.md").exists()
    hub.write(REPO, {"README.md": b"A person's.\n"})
    pushed(clients, run)
    assert card(hub) == (run / "README.md").read_bytes() == b"A person's.\n"


def test_links_and_hidden_files_stay_here(run, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.png").write_bytes(b"secret")
    expected = push.published_files(run).keys()
    (run / "samples" / "link.png").symlink_to(secret / "key.png")
    (run / "samples" / "linked").symlink_to(secret)
    (run / "models" / ".git").mkdir(parents=True)
    for name in ("samples/.hidden", "models/.git/config", "unknown.txt"):
        (run / name).write_bytes(b"secret")
    assert push.published_files(run).keys() == expected
    shutil.rmtree(run / "samples")
    (run / "samples").symlink_to(secret)
    assert push.published_files(run).keys() == {n for n in expected if not n.startswith("samples/")}


def test_the_default_name_is_model_mixer_epochs_and_data_and_always_valid():
    found = [
        push.default_name(load_recipe("deit_s_cutmix")),
        push.default_name(load_recipe("quickstart_vanilla")),
        push.default_name(load_recipe("tiny_r18_fmix", seed=2)),
        push.default_name(load_recipe("cifar10_r18_200e_mixup", dataset="/data/..my--set/")),
    ]
    assert found[:2] == ["deit_small_patch16_224.cutmix_e300_in1k", "resnet10t.vanilla_e40_groceries"]
    assert [name.endswith("_seed2") for name in found] == [False, False, True, False]
    for name in found:
        push.check_repo_id(name)


def test_a_strategy_that_is_none_is_refused_with_the_names_of_all(run):
    """Where no command line has looked at it."""
    with pytest.raises(UserError, match=r"strategy: expected one of end, every_save, .*, got 'always'"):
        push.push(Run.open(run), REPO, strategy="always")


def there(**files):
    """Something is on the Hub already."""
    return lambda run, hub: hub.write(REPO, {name.replace("_", "."): content for name, content in files.items()})


def another_seed_there(run, hub):
    there(recipe_yaml=(run / "recipe.yaml").read_bytes().replace(b"\nseed: 0", b"\nseed: 5"))(run, hub)


def the_token_in_a_file(run, hub):
    hub.write(REPO, {})
    (run / "env.json").write_text(json.dumps(json.loads((run / "env.json").read_text()) | {"note": hub.token}))


def other_weights(run, hub):
    """Killed between writing weights and results."""
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-4] + bytes(4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "args", "words"),
    [
        (another_seed_there, [REPO], "seed: 5 there, 0 here"),
        (there(recipe_yaml=b"!!python/object/apply:os.system [touch pwned]"), [REPO], "holds another recipe"),
        (there(tokenizer_json=b"{}"), [REPO], "holds something else (tokenizer.json, ...)"),
        (there(README_md=b"\xff"), [REPO], "README.md on the Hub is not UTF-8 text"),
        (there(), [REPO, "--private"], "exists and is public"),
        (the_token_in_a_file, [REPO], "env.json holds your token"),
        (lambda run, _: (run / "eval_results.json").unlink(), [REPO], "not evaluated yet"),
        (lambda run, _: (run / "recipe.yaml").unlink(), [REPO], "is not a run folder: recipe.yaml is missing"),
        (other_weights, [REPO], "eval_results.json belongs to other weights"),
        (None, ["a--b/c/d"], "expected NAME or OWNER/NAME"),
        (None, [REPO], "needs a token"),
        (lambda run, _: shutil.rmtree(run), [REPO], "no run folder"),
        (None, [REPO], "a run or another push is at work"),
    ],
)
def test_what_cannot_be_pushed_is_one_line_and_status_2_and_leaves_the_hub_as_it_was(
    clients, hub, run, spoil, args, words
):
    if spoil:
        spoil(run, hub)
    before = {name: list(repo.commits) for name, repo in hub.repos.items()}
    with push.alone(run) if "at work" in words else contextlib.nullcontext():
        env = {"HF_TOKEN": ""} if words == "needs a token" else {}
        done = command(clients, run, "--repo_id", *args, **env)
    assert refused(done, words) and hub.token not in done.output, done.output
    assert {name: repo.commits for name, repo in hub.repos.items()} == before


@pytest.mark.slow
def test_a_token_that_may_not_write_is_one_line_and_a_private_run_is_not_read_by_others(clients, hub, run):
    pushed(clients, run, "--repo_id", REPO, "--private")
    assert hub.repos["model", REPO].private
    (run / "summary.csv").write_text("changed")
    for token, words in ((hub.read_token, "403"), (hub.stranger_token, "403"), ("hf_wrong", "401")):
        done = command(clients, run, HF_TOKEN=token)
        assert refused(done, f"the Hub answered {words}") and token not in done.output, done.output
    assert len(mine(hub)) == 1
    for token, words in ((hub.stranger_token, "404"), ("", "401")):
        done = clients.run(PUSH, "verify", f"hf-hub:{REPO}", env={"HF_TOKEN": token})
        assert done.returncode == 2 and f"the Hub answered {words}" in done.output, done.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "fault", "words"),
    [
        # passing: a new attempt overcomes it
        (COMMIT, {"status": 500}, None),
        (COMMIT, {"status": 429, "headers": {"Retry-After": "1"}}, None),
        (COMMIT, {"after_bytes": 300}, None),
        (COMMIT, {"no_answer": True}, None),  # done, and nobody knows
        (LFS, {"after_bytes": 1000}, None),
        (LFS, {"wrong_bytes": True}, None),
        ("POST /api/repos/create", {"status": 503}, None),
        (f"GET /api/models/{REPO}", {"no_answer": True}, None),
        # lasting: told in one line
        (COMMIT, {"status": 401}, "answered 401: the Hub does not take this token"),
        (COMMIT, {"status": 403}, "answered 403: this token may not do that"),
        (COMMIT, {"status": 409}, "answered 409"),
        (COMMIT, {"status": 429, "headers": {"Retry-After": "100000"}}, "answered 429"),
        (COMMIT, {"after_bytes": 300}, "cannot reach the Hub"),
        (COMMIT, {"status": 200, "body": b"<html>log in</html>"}, "JSONDecodeError"),
    ],
)
def test_a_fault_is_overcome_or_one_line_after_which_a_later_push_completes_by_one_commit(
    clients, hub, run, pattern, fault, words
):
    hub.fault(pattern, times=100 if words else 1, **fault)
    done = command(clients, run, "--repo_id", REPO)
    assert hub.token not in done.output and "Traceback" not in done.output
    if words is None:
        assert done.returncode == 0, done.output
        assert hub.faults[0].times == 0  # it happened
    else:
        last = done.output.splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error:") and words in last, done.output
        assert not mine(hub)
        hub.faults.clear()
        hub.requests.clear()
        pushed(clients, run, "--repo_id", REPO)
        assert not asked(hub, LFS)  # what had arrived is not sent again
    assert own_files(hub) == published(run) and len(mine(hub)) == 1


@pytest.mark.slow
def test_a_push_that_is_killed_or_finds_no_hub_leaves_nothing_half_published(clients, hub, run):
    before = set(run.rglob("*"))
    nowhere = "import huggingface_hub.constants as c\nc.ENDPOINT = 'http://127.0.0.1:9'\n"
    done = clients.run(nowhere + PUSH, "push", run, "--repo_id", REPO)
    *attempts, last = done.output.splitlines()
    assert done.returncode == 2 and "cannot reach the Hub" in last and len(attempts) == 2
    for pattern in (LFS, COMMIT):
        hub.requests.clear()
        hub.fault(pattern, delay=1.0, status=500)
        started = clients.start(PUSH, "push", run, "--repo_id", REPO)
        wait_until(lambda pattern=pattern: asked(hub, pattern))
        os.kill(started[0], signal.SIGKILL)
        assert clients.wait(started).returncode == -signal.SIGKILL
        hub.faults.clear()
        assert not mine(hub)
    left = {str(p.relative_to(run)) for p in set(run.rglob("*")) - before}
    assert left <= {
        "README.md",
        ".lock",
        ".dataset.json",
        ".hub.json",
        ".eval_results",
        ".eval_results/mixup-recipes.yaml",
    }
    pushed(clients, run, "--repo_id", REPO)
    assert own_files(hub) == published(run) and len(mine(hub)) == 1


@pytest.mark.slow
def test_a_commit_of_somebody_else_in_between_is_seen_and_the_publication_is_whole(clients, hub, run):
    pushed(clients, run, "--repo_id", REPO)
    (run / "summary.csv").write_text((run / "summary.csv").read_text() + "9,9,9,9\n")
    hub.fault(COMMIT, delay=1.5)
    hub.requests.clear()
    started = clients.start(PUSH, "push", run)
    wait_until(lambda: asked(hub, COMMIT))
    hub.write(REPO, {"log.jsonl": b"of another push\n"})  # what this push saw no need to send
    done = clients.wait(started)
    assert done.returncode == 0 and "the Hub answered 412" in done.output and "trying again" in done.output, done.output
    assert own_files(hub) == published(run)


PUSH_PICTURE = f"""
from pathlib import Path
from mixup_recipes.hub import push
picture, run = map(Path, sys.argv[1:])
push.publish(picture, run, "{REPO}", False, "end", push.find_token(None))
"""


@pytest.mark.slow
def test_what_a_person_writes_into_the_card_stays_wherever_it_was_written(clients, hub, run):
    here = run / "README.md"
    pushed(clients, run, "--repo_id", REPO)
    taken = publisher.picture(run, "end")
    edit(hub)
    pushed(clients, run)
    assert here.read_bytes().endswith(b"\nWritten on the Hub.\n") and card(hub) == here.read_bytes()
    # pushed late, a picture from before the edit
    done = clients.run(PUSH_PICTURE, taken, run)
    assert done.returncode == 0, done.output
    assert here.read_bytes().endswith(b"\nWritten on the Hub.\n") and card(hub) == here.read_bytes()
    # here, after a push that arrived without our knowing
    count = len(mine(hub))
    here.write_text(here.read_text() + "\nFirst, here.\n")
    hub.fault(COMMIT, no_answer=True)
    started = clients.start(PUSH.replace("0.01", "60"), "push", run)
    wait_until(lambda: len(mine(hub)) > count)
    os.kill(started[0], signal.SIGKILL)
    clients.wait(started)
    here.write_text(here.read_text() + "\nSecond, here.\n")
    pushed(clients, run)
    assert all(words in card(hub) for words in (b"Written on the Hub.", b"First, here.", b"Second, here."))
    # a card on the Hub that cannot be taken over is not, and what is here can be mended
    mended, before = here.read_bytes(), card(hub)
    hub.write(REPO, {"README.md": before.replace(b"<!-- mixup-recipes: end -->", b"")})
    assert refused(command(clients, run), f"{REPO}: README.md on the Hub: expected the line")
    assert here.read_bytes() == mended
    hub.write(REPO, {"README.md": before})
    pushed(clients, run)


@pytest.mark.slow
def test_a_late_push_of_an_older_picture_leaves_newer_numbers_in_the_run(clients, hub, run):
    here = run / "README.md"
    pushed(clients, run, "--repo_id", REPO)
    before, taken = here.read_bytes(), publisher.picture(run, "end")
    results = json.loads((taken / "eval_results.json").read_text())
    (taken / "eval_results.json").unlink()  # a link to the run's own
    results["exported"]["top1"] = 7.77
    (taken / "eval_results.json").write_text(json.dumps(results))
    edit(hub)
    done = clients.run(PUSH_PICTURE, taken, run)
    assert done.returncode == 0, done.output
    assert b"7.77" in card(hub) and card(hub).endswith(b"\nWritten on the Hub.\n")
    assert b"7.77" not in before and here.read_bytes() == before + b"\nWritten on the Hub.\n"
    pushed(clients, run)
    assert card(hub) == here.read_bytes() == before + b"\nWritten on the Hub.\n"
