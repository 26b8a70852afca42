"""A run that pushes while it trains: published whole, a failure is one line, and the run is done all the same."""

import hashlib
import json
import signal
import time

import pytest
from resuming import LOG, SHORT
from test_hub import COMMIT, REPO, asked, mine, own_files, published, pushed, wait_until


@pytest.fixture
def job(server, hub, tiny_recipe, tmp_path):
    """Start a run into the folder ``job`` that pushes to this Hub; ``before``: code that the run begins with."""

    def start(*args, before="", faults=(), token=hub.token):
        script = tmp_path / "job.py"
        script.write_text(f"import os\nos.environ.update({hub.env | {'HF_TOKEN': token}!r})\n{before}")
        given = ("--recipe", tiny_recipe, "--output_dir", tmp_path / "job", "--dataloader_num_workers", 0, *LOG, *SHORT)
        given = (*given, "--push_to_hub", "--hub_model_id", REPO, *args)
        return server.start(*given, faults=[["script", str(script)], *faults])

    return start


@pytest.mark.slow
def test_a_run_that_saves_often_is_only_ever_published_whole_and_its_token_nowhere(job, hub, tmp_path):
    out = tmp_path / "job"
    args = ("--hub_strategy", "checkpoint", "--hub_token", hub.token, "--hub_private_repo", "--checkpointing_steps", 2)
    run = job(*args, token="")
    assert run.wait() == [0] and run.output().rstrip().endswith(f"published: {hub.url}/{REPO}"), run.output()
    assert hub.repos["model", REPO].private and mine(hub)
    for commit in mine(hub):
        files = {name: hub.blobs[entry.oid] for name, entry in commit.files.items()}
        assert files["log.jsonl"][-2:] in (b"", b"}\n")
        assert len({n.split("/")[1] for n in files if n.startswith("checkpoints/")}) == 1
        if "model.safetensors" in files:
            claimed = json.loads(files["eval_results.json"])["weights_sha256"]
            assert hashlib.sha256(files["model.safetensors"]).hexdigest() == claimed
    newest = sorted((out / "checkpoints").iterdir())[-1].name
    assert own_files(hub) == published(out, f"checkpoints/{newest}")
    kept = [p for p in out.rglob("*") if p.is_file()]
    assert hub.token not in run.output() and not [p for p in kept if hub.token.encode() in p.read_bytes()]
    assert "***" in json.loads((out / "env.json").read_text())["command"]
    assert not [p for p in kept if ".push-" in str(p)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 403}, "answered 403"),
        ({"status": 500}, "the run stopped waiting"),
        (None, "the Hub: No space left on device"),
    ],
)
def test_a_push_that_fails_is_one_line_and_the_run_is_done(job, clients, hub, tmp_path, fault, words):
    full = [] if fault else [["no_space", "mixup_recipes.hub.publisher:picture", 1]]
    hub.fault(COMMIT, times=100, **fault or {"delay": 0})
    impatient = "import mixup_recipes.hub.publisher as p\np.PATIENCE = 10\n" if "waiting" in words else ""
    run = job(before=impatient, faults=full)
    assert run.wait() == [0], run.output()
    last = run.output().rstrip().splitlines()[-1]
    assert last.startswith("warning: push to the Hub: ") and words in last
    assert last.endswith(f"push it with: mixup-recipes push {tmp_path / 'job'}")
    hub.faults.clear()
    pushed(clients, tmp_path / "job")  # it remembers where to
    assert own_files(hub) == published(tmp_path / "job") and len(mine(hub)) == 1


@pytest.mark.slow
def test_a_signal_ends_the_wait_for_a_push(job, hub, tmp_path):
    hub.fault(COMMIT, delay=20, status=500)
    run = job()
    wait_until(lambda: asked(hub, COMMIT))
    began = time.monotonic()
    run.send(signal.SIGTERM)
    assert run.wait() == [0], run.output()
    assert time.monotonic() - began < 15 and "the run stopped waiting" in run.output()
    assert not [p for p in (tmp_path / "job").iterdir() if p.name.startswith(".push-")]


@pytest.mark.slow
def test_what_cannot_be_pushed_is_told_before_training(server, tiny_recipe, tmp_path):
    home = tmp_path / "no.py"
    home.write_text(
        f"import os\nos.environ.update(HF_TOKEN='')\nimport huggingface_hub.constants as c\n"
        f"c.HF_TOKEN_PATH = {str(tmp_path / 'none')!r}\n"
    )
    for args, words in (
        (["--push_to_hub", "--hub_model_id", "a/b/c"], "(at most 96), got 'a/b/c'"),
        (["--push_to_hub"], "needs a token"),
        (["--push_to_hub", "--hub_token", "two words"], "has blanks or unusual characters"),
        (["--push_to_hub", "--hub_strategy", "often"], "end, every_save, checkpoint, all_checkpoints"),
        (["--hub_model_id", "a/b"], "pass --push_to_hub too"),
    ):
        given = ("--recipe", tiny_recipe, "--output_dir", tmp_path / "job", *args)
        status, output = server.run(*given, faults=[["script", str(home)]])
        assert status == 2 and words in output and "two words" not in output, output
        assert not (tmp_path / "job").exists()
