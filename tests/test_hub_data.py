"""Runs on a dataset of the Hub, copied or streamed, against a server with photos."""

import hashlib
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from driver import Server
from hub_server import HubServer
from resuming import differences, finish, log
from safetensors.numpy import load_file

from mixup_recipes.data.repository import one_commit
from mixup_recipes.resolve import load_recipe
from mixup_recipes.typed import UserError

SET = "tester/photos"

pytestmark = pytest.mark.slow  # whole clients and runs against a server: minutes


def push(photos):
    import datasets

    splits = datasets.load_dataset(photos)
    splits.push_to_hub("tester/photos", num_shards={"train": 4, "test": 3})
    splits.push_to_hub("tester/private", private=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """72 training and 30 test photos in a folder."""
    return tiny.make_photos(tmp_path_factory.mktemp("photos") / "set")


@pytest.fixture(scope="module")
def hub(tmp_path_factory, photos):
    """A Hub with these photos, public and private; gated and damaged sets beside them."""
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        hub.client(push, photos)
        files = hub.files(SET, "dataset")
        parquet = {p: d for p, d in files.items() if p.endswith(".parquet")}
        hub.write("stranger/private", files, "dataset", private=True)
        hub.write("stranger/gated", files, "dataset", gated=True)
        hub.write("tester/bare", parquet, "dataset")
        hub.write("tester/damaged", {p: b"no parquet" for p in parquet}, "dataset")
        yield hub


@pytest.fixture(scope="module")
def runs(hub):
    """Starts runs that know this Hub and no other."""
    with Server(**hub.env) as server:
        yield server


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The tiny recipe over the Hub's photos: 2 epochs of 4 updates."""
    recipe = tiny.make_recipe(tmp_path_factory.mktemp("recipe"), Path(SET), epochs=2)
    return "--recipe", recipe, "--dataloader_num_workers", 0, "--report_to", "none"


def shown(run):
    from mixup_recipes.pages import errors
    from mixup_recipes.runs.run import Run

    (found,), said = errors.with_images(Run.open(run), [errors.Error(3, "blue", "red", 0.9)])
    return [found.file, found.picture is not None, said]


def test_a_run_on_the_hubs_dataset_is_that_on_the_same_photos_in_a_folder(hub, runs, given, photos, tmp_path):
    hub_server, hub, folder = hub, tmp_path / "hub", tmp_path / "folder"
    for name, out in ((SET, hub), (photos, folder)):
        finish(runs, *given, "--output_dir", out, "--dataset", name)
    for name in ("model.safetensors", "predictions.safetensors", "eval_results.json", "summary.csv"):
        assert (hub / name).read_bytes() == (folder / name).read_bytes()
    assert log(hub) == log(folder)
    record, other = (json.loads((run / "data.json").read_text()) for run in (hub, folder))
    for found in (*record["splits"].values(), *other["splits"].values()):
        del found["fingerprint"]  # of the commit here, of the files there
    assert record == other | {"dataset": SET, "commit": record["commit"]}
    # a report shows images that were copied before, and copies none
    assert hub_server.client(shown, hub) == ["test-3.jpg", True, ""]
    nowhere = {"HF_DATASETS_CACHE": str(tmp_path / "nowhere")}
    says = f"No pictures: dataset {SET!r} is not on this machine."
    assert hub_server.client(shown, hub, **nowhere) == ["", False, says]
    assert not list(tmp_path.glob("nowhere/**/*.arrow"))


def test_a_streamed_run_resumed_at_an_evaluation_is_that_of_one_never_stopped(runs, hub, given, tmp_path):
    def copies():
        return {*(hub.folder / "home/datasets").rglob("*.arrow"), *(hub.folder / "home").rglob("*.parquet")}

    before, whole = copies(), tmp_path / "whole"
    finish(runs, *given, "--streaming", "true", "--output_dir", whole, processes=2)
    again = (*given, "--streaming", "true", "--output_dir", tmp_path / "two")
    stop = [["receive", "mixup_recipes.training.evaluation:evaluate", 1, 15]]
    stopped = runs.start(*again, processes=2, faults=stop)
    assert stopped.wait() == [75, 75] and "SIGTERM at update 4: saved" in stopped.output()
    assert "drawn anew" not in finish(runs, *again, "--resume_from_checkpoint", "auto", processes=2)
    assert differences(whole, tmp_path / "two") == []

    predictions = load_file(whole / "predictions.safetensors")
    assert predictions["index"].tolist() == list(range(30))
    assert predictions["label"].tolist() == [i % 4 for i in range(30)]
    splits = json.loads((whole / "data.json").read_text())["splits"]
    assert {k: s["images"] for k, s in splits.items()} == {"train": 72, "test": 30}
    start = f"hf://datasets/{SET}@{hub.repos['dataset', SET].commits[-1].oid}/data/"
    for split, count in (("train", 4), ("test", 3)):  # what was read, down to the commit
        files = "\n".join(f"{start}{split}-{i:05}-of-{count:05}.parquet" for i in range(count))
        assert splits[split]["labels_sha256"] == hashlib.sha256(files.encode()).hexdigest()
    train = [line for line in log(whole) if line["mode"] == "train"]
    assert sum(line["images"] for line in train) == 2 * 4 * 16 and np.isfinite([line["loss"] for line in train]).all()
    assert copies() == before


def test_a_run_on_streamed_image_files_is_that_on_their_copy_also_when_it_was_stopped_within_an_epoch(
    runs, hub, given, photos, tmp_path
):
    tables = {s: pq.read_table(next(photos.rglob(f"{s}*.parquet"))).to_pylist() for s in ("train", "test")}
    files = {
        f"{s}/{tiny.CLASSES[row['label']]}/{i:02}.jpg": row["image"]["bytes"]
        for s, rows in tables.items()
        for i, row in enumerate(rows)
    }
    hub.write("tester/files", files, "dataset")
    for streamed in ("true", "false"):
        run = tmp_path / streamed
        arguments = (*given, "--dataset", "tester/files", "--streaming", streamed, "--output_dir", run)
        stop = [["receive", "mixup_recipes.training.optimisation:set_learning_rates", 2, 15]]
        assert runs.start(*arguments, processes=2, faults=stop).wait() == [75, 75]
        said = finish(runs, *arguments, "--resume_from_checkpoint", "auto", processes=2)
        assert "drawn anew" not in said
    for name in ("model.safetensors", "predictions.safetensors", "eval_results.json", "data.json", "summary.csv"):
        assert (tmp_path / "true" / name).read_bytes() == (tmp_path / "false" / name).read_bytes(), name
    ((record, _),) = hub.client(opened, [(hub.token, "tester/files", {})], HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert record["image"] == hashlib.sha256(files["train/blue/00.jpg"]).hexdigest()  # the copy is there


def test_a_streamed_run_stopped_within_an_epoch_says_that_the_rest_is_drawn_anew(runs, given, tmp_path):
    arguments = (*given, "--streaming", "true", "--epochs", 1, "--output_dir", tmp_path / "run")
    stop = [["receive", "mixup_recipes.training.optimisation:set_learning_rates", 2, 15]]
    status, printed = runs.run(*arguments, faults=stop)
    assert status == 75 and "SIGTERM at update 2: saved" in printed
    printed = finish(runs, *arguments, "--resume_from_checkpoint", "auto")
    assert "streaming: the rest of this epoch is drawn again, so some images come twice or not at all" in printed
    train = [line for line in log(tmp_path / "run") if line["mode"] == "train"]
    assert [line["update"] for line in train] == [4] and train[0]["images"] == 64


def test_a_stream_that_breaks_off_ends_the_run_in_one_line_and_it_can_go_on(runs, hub, given, tmp_path):
    arguments = (*given, "--streaming", "true", "--output_dir", tmp_path / "run")
    # no fault yet: the footers are read, then the first epoch reads its four files, and so does PreciseBN
    hub.fault(r"GET .*/train-.*\.parquet", times=12)
    hub.fault(r"GET .*/train-.*\.parquet", times=float("inf"), status=404)
    status, printed = runs.run(*arguments)
    hub.faults.clear()
    assert status == 2 and "cannot continue reading dataset 'tester/photos': " in printed
    assert "continue later with --resume_from_checkpoint auto" in printed and "Traceback" not in printed
    finish(runs, *arguments, "--resume_from_checkpoint", "auto")
    finish(runs, *arguments[:-1], tmp_path / "whole")
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def opened(cases):
    """The record of each data set, with its first image, and how many it has to train on; or what is said instead."""
    import hashlib
    import os

    from mixup_recipes.data.origin import encoded
    from mixup_recipes.data.splits import count, load_splits
    from mixup_recipes.resolve import load_recipe
    from mixup_recipes.typed import UserError

    answers = []
    for token, dataset, changes in cases:
        os.environ["HF_TOKEN"] = token
        recipe = load_recipe("r18_100e_mixup", dataset=dataset, eval_split="test", num_classes=4, **changes)
        try:
            splits = load_splits(recipe)
            image = hashlib.sha256(encoded(next(iter(splits.train))["image"])).hexdigest()
            answers.append([splits.identity | {"image": image}, str(count(splits.train))])
        except UserError as e:
            answers.append([{}, str(e)])
    return answers


def test_the_record_holds_the_commit_that_was_read_also_without_a_network(hub):
    def records(*changes, **env):
        return [record for record, _ in hub.client(opened, [(hub.token, "tester/moving", c) for c in changes], **env)]

    first = hub.write("tester/moving", hub.files(SET, "dataset"), "dataset")
    for record in records({}, {"dataset_revision": "main"}, {"streaming": True}):
        assert record["commit"] == first
        assert {k: s["images"] for k, s in record["splits"].items()} == {"train": 72, "test": 30}
    hub.requests.clear()
    (record,) = records({}, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert record["commit"] == first and not hub.requests
    second = hub.write("tester/moving", {"notes.txt": b"the same photos"}, "dataset")
    now, before = records({}, {"dataset_revision": first})
    assert (now["commit"], now["revision"], before["commit"], before["revision"]) == (second, None, first, first)


def test_splits_of_different_commits_are_refused():
    def table(commit):
        info = datasets.DatasetInfo(download_checksums={f"hf://datasets/a/b@{commit}/x.parquet": None})
        return datasets.Dataset.from_dict({"label": [0]}, info=info)

    recipe = load_recipe("r18_100e_mixup", dataset="a/b")
    assert one_commit(recipe, table("a" * 40), table("a" * 40)) == "a" * 40
    assert one_commit(recipe, datasets.Dataset.from_dict({"label": [0]})) is None
    with pytest.raises(UserError, match="dataset 'a/b' changed on the Hub while it was opened"):
        one_commit(recipe, table("a" * 40), table("b" * 40))


def test_a_dataset_that_cannot_be_had_is_one_line_and_a_private_one_needs_the_token(hub):
    gone = "doesn't exist on the Hub or cannot be accessed"
    gated = "access is gated: accept the terms on its page on the Hub"
    both = [  # copied and streamed
        (hub.token, "tester/none", {}, f"Dataset 'tester/none' {gone}"),
        (hub.token, "stranger/private", {}, gone),
        (hub.token, "stranger/gated", {}, gated),
        (hub.token, SET, {"dataset_revision": "v1"}, "Revision 'v1' doesn't exist for dataset"),
        (hub.token, SET, {"train_split": "trian"}, "has no split 'trian'; did you mean 'train'?"),
        (hub.token, SET, {"image_column": "picture"}, "no column 'picture'; valid names: image, label"),
    ]
    cases = [
        *both,
        *((token, name, changes | {"streaming": True}, words) for token, name, changes, words in both),
        (hub.stranger_token, "tester/private", {}, "cannot open dataset 'tester/private', split 'train': "),
        (hub.token, "tester/private", {}, "72"),
        ("", "stranger/gated", {}, gated),
        (hub.token, "tester/bare", {"streaming": True}, "72"),
        (hub.token, "tester/damaged", {}, "cannot open dataset 'tester/damaged', split 'train': "),
        (hub.token, "tester/bare", {}, "72"),
        # what the client tries again, and what it does not
        (hub.token, "tester/again", {}, "503 Service Unavailable"),
        (hub.token, "tester/again", {}, "72"),
    ]
    hub.write("tester/again", hub.files(SET, "dataset"), "dataset")
    hub.fault("GET .*/again/.*/train-00001.*parquet", after_bytes=3000)
    hub.fault("GET .*/again/.*/train-00002.*parquet", status=503)
    said = hub.client(opened, [case[:3] for case in cases])
    for (*case, words), (_, message) in zip(cases, said, strict=True):
        assert words in message and "\n" not in message, (case, message)
