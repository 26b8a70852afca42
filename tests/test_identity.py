"""Promise: a run goes on, and is judged, on the very data that it was trained on, or the user is told what changed."""

import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from test_folders import JPEG, put, recipe, tree
from test_run_folder import AUTO, args, lines_of

import evaluate_mixup
from mixup_recipes.data import classes as names
from mixup_recipes.data.identity import comparable, difference
from mixup_recipes.data.splits import load_splits
from mixup_recipes.hub.verify import verify
from mixup_recipes.recipe import changed
from mixup_recipes.runs.replay import replay
from mixup_recipes.runs.run import Run
from mixup_recipes.training import launch, signals
from mixup_recipes.training.data import open_data
from mixup_recipes.typed import UserError
from mixup_recipes.words import many


def told(root, **changes):
    found = load_splits(recipe(root, **changes))
    return found.identity["splits"]["train"], found.classes


def test_every_change_of_the_images_is_told_in_words(tmp_path):
    root = tree(tmp_path)
    before, known = told(root)
    assert difference(*[told(root)[0]] * 2, known, known) is None

    def change(**changes):
        now, found = told(root, **changes)
        return difference(before, now, known, found)

    put(root, "train/ant/2.jpg")
    assert change() == "4 images then, 5 now; ant: 2 then, 3 now"
    (root / "train/ant/0.jpg").unlink()
    same = "as many images of each class, but other files: names, sizes or their order"
    assert change() == same
    (root / "train/ant/2.jpg").rename(root / "train/ant/0.jpg")
    assert change() is None
    (root / "train/ant/0.jpg").write_bytes(JPEG + b"!")
    assert change() == same
    for split in ("train", "val"):
        (root / split / "bee").rename(root / split / "cow")
    assert change() == "new classes cow; classes bee are gone"
    old = {k: v for k, v in before.items() if k in ("images", "labels_sha256")}  # version 0.1
    assert difference(old, told(root)[0], known, known) is None
    assert difference(old, old | {"labels_sha256": ""}, known, known) == (
        "as many images, but other labels, or the same in another order"
    )
    assert "in another order, ant, bee then and bee, ant now" in difference(old, old, known, known[::-1])
    both = comparable({"splits": {"train": old}}, {"splits": {"train": before}})
    assert both[0] == both[1] == {"commit": None, "splits": {"train": old}}


@pytest.fixture(scope="module")
def stopped(server, tmp_path_factory):
    """A run of two epochs that was stopped after the first, its data beside it."""
    home = tmp_path_factory.mktemp("home")
    tree(home / "photos", images=8)
    fields = {
        "dataset": str(home / "photos"),
        "eval_split": "val",
        "num_classes": 2,
        "model": "test_resnet",
        "epochs": 2,
    }
    fields |= {"batch_size": 8, "per_device_train_batch_size": 8, "lr": 0.01, "protocol_epochs": 1}
    (home / "tiny.yaml").write_text(json.dumps(fields | dict.fromkeys(("image_size", "eval_size", "eval_resize"), 32)))
    given = args(home / "tiny.yaml", home / "run")
    assert server.run(*given, faults=[["receive", "mixup_recipes.training.update:train_update", 3, 9]])[0] == -9
    return home


def test_a_run_does_not_go_on_over_other_data_unless_told_to_and_says_so_ever_after(server, stopped, tmp_path):
    home = shutil.copytree(stopped, tmp_path / "home")
    recorded = (home / "run/data.json").read_bytes()
    state = json.loads((home / "run/checkpoints/step-00000002/state.json").read_text())
    assert all(json.loads(recorded)[key] == found for key, found in state["data"].items())
    assert "fingerprint" in state["data"]["splits"]["train"]
    photos = stopped / "photos"
    put(photos, "train/ant/8.jpg")
    try:
        status, output = server.run(*args(home / "tiny.yaml", home / "run", *AUTO))
        says = "is not what {} was trained on: split 'train': 16 images then, 17 now; ant: 8 then, 9 now; put the old"
        assert status == 2 and says.format(home / "run") in output and (home / "run/data.json").read_bytes() == recorded
        status, output = server.run(*args(home / "tiny.yaml", home / "run", *AUTO, "--accept_changed_data"))
        assert status == 0, output
    finally:
        (photos / "train/ant/8.jpg").unlink()
    words = "split 'train': 16 images then, 17 now; ant: 8 then, 9 now"
    assert f"the run continues on other images: {words}" in output
    (row,), _ = lines_of(home / "run", "data")
    assert (row["update"], row["changed"]) == (2, words)
    run = Run.open(home / "run")
    assert run.data.changes == [{"update": 2, "changed": words}] and words in run.card.replace("\\", "")


def test_the_same_data_are_found_where_they_were_or_where_they_are_now(server, stopped, tmp_path):
    home = shutil.copytree(stopped, tmp_path / "home")
    moved = shutil.copytree(stopped / "photos", tmp_path / "elsewhere")
    status, output = server.run(*args(home / "tiny.yaml", home / "run", *AUTO, "--dataset", moved))
    assert status == 0 and "done" in output, output
    assert Run.open(home / "run").recipe_here.dataset == str(moved)
    run, path = Run.open(home / "run"), home / "run/data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": "photos"}))  # a relative path, from elsewhere
    given = (run.folder, changed(run.recipe, dataset="photos"), run.checkpoints[0], False, print)
    assert open_data(*given).place == moved
    shutil.rmtree(moved)
    with pytest.raises(UserError, match="dataset 'photos' is neither a folder"):
        open_data(*given)


def test_an_evaluation_goes_by_the_names_of_classes_and_says_when_its_images_are_others(stopped, tmp_path, capsys):
    run, more = str(stopped / "run"), ("--batch_size", "8", "--dataset")

    def says(folder):
        assert evaluate_mixup.main([run, *more, str(folder)]) is None
        return capsys.readouterr().out

    assert "other images" not in says(stopped / "photos")
    one = put(tmp_path / "one", "train/bee/0.jpg", "val/bee/0.jpg")
    shown = says(one)
    assert "has 1 of the 2 classes of the model" in shown
    assert "16 images then, 1 now; ant: 8 then, 0 now; bee: 8" in shown
    with pytest.raises(UserError, match=r"has classes that model .* does not: elk; valid names: ant, bee"):
        says(put(tmp_path / "two", *(f"{split}/{name}/0.jpg" for split in ("train", "val") for name in ("bee", "elk"))))


@pytest.fixture(scope="module")
def finished(server, stopped, tmp_path_factory):
    """The run, gone on to its end, in a place of its own."""
    home = shutil.copytree(stopped, tmp_path_factory.mktemp("finished") / "home")
    assert server.run(*args(home / "tiny.yaml", home / "run", *AUTO))[0] == 0
    return home / "run"


CHANGES = {  # what was done to an image of a split -> what is said
    "added": (lambda ants: put(ants, "8.jpg"), "16 images then, 17 now; ant: 8 then, 9 now"),
    "removed": (lambda ants: (ants / "3.jpg").unlink(), "16 images then, 15 now; ant: 8 then, 7 now"),
    "renamed": (lambda ants: (ants / "3.jpg").rename(ants / "9.jpg"), "as many images of each class, but other files"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("what", CHANGES)
def test_verify_and_replay_say_what_differs_in_the_images_of_this_machine(finished, stopped, tmp_path, what, split):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    photos, (change, says) = shutil.copytree(stopped / "photos", tmp_path / "photos"), CHANGES[what]
    (run / ".dataset.json").write_text(json.dumps({"path": str(photos)}))
    if what == "added":
        text, good = verify(Run.open(run), batch_size=8)
        assert good and "agrees   data: 16 images of val, as noted\nagrees   data: 16 images of train, as noted" in text
        replay(Run.open(run), 0)
    change(photos / split / "ant")
    text, good = verify(Run.open(run), batch_size=8)
    (row,) = (line for line in text.splitlines() if line.startswith("differs  data: "))
    assert not good and f"images of {split}, " in row and says in row
    if split == "train":
        with pytest.raises(UserError, match=f"'train', is not what .* was trained on: {says}"):
            replay(Run.open(run), 0)
    else:
        replay(Run.open(run), 0)  # it is of the training images
        shutil.rmtree(photos / "train")
        assert "unknown  data: train was not compared: " in verify(Run.open(run), batch_size=8)[0]


def test_the_outputs_of_a_model_are_told_by_name_synset_number_or_natural_order():
    known = ["ant", "bee", "cow"]
    assert names.places(known, 3, ["cow", "ant"], "d", "m") == ([2, 0], "d has 2 of the 3 classes of model 'm'")
    assert names.places(known, 3, known, "d", "m") == ([0, 1, 2], "")
    for found in (["ant", "elk"], ["ant", "bee", "elk"]):
        with pytest.raises(UserError, match="d has classes that model 'm' does not: elk"):
            names.places(known, 3, found, "d", "m")
    numbers = [str(i) for i in range(12)]
    places, note = names.places(None, 12, numbers, "d", "m")
    assert places == list(range(12)) and "does not name its classes" in note
    with pytest.raises(UserError, match="so they cannot be matched"):
        names.places(None, 12, sorted(numbers), "d", "m")
    with pytest.raises(UserError, match="has 3 classes without names, but d has 2"):
        names.places(None, 3, known[:2], "d", "m")
    synsets = ["n01440764", "n01443537", "n03710721"]
    assert names.places(None, 1000, synsets, "d", "m")[0] == [0, 1, 639]
    described = names.ImageNetInfo("imagenet-1k")
    words = [described.index_to_description(i) for i in range(1000)]
    assert names.places(words, 1000, synsets, "d", "m")[0] == [0, 1, 639]
    assert names.places(None, 1000, words, "d", "m")[0] == list(range(1000))


def test_what_would_fail_later_or_without_a_word_is_told_before_work_starts(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="the tracker 'wandb' is not installed; pip install wandb"):
        launch.accelerator(recipe(tmp_path), tmp_path, "tensorboard,wandb")
    accelerator = launch.accelerator(recipe(tmp_path), tmp_path)
    assert [launch.workers(n, accelerator, recipe(tmp_path)) for n in (2, None)] == [2, 0]
    monkeypatch.setattr(launch.shutil, "disk_usage", lambda _: launch.shutil._ntuple_diskusage(64, 0, 64 * 2**20))
    for loaders, training, needed in ((16, False, 462), (16, True, 925), (2, True, 116)):
        with pytest.raises(
            UserError, match=f"/dev/shm has 67 MB free, batches of {loaders} loader processes need {needed}"
        ):
            launch.workers(loaders, accelerator, recipe(tmp_path), training)
    assert launch.workers(1, accelerator, recipe(tmp_path), training=True) == 1
    gpu = Mock(device=torch.device("cuda"), num_processes=1)  # where the default is not 0
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: range(8))
    assert [launch.workers(None, gpu, recipe(tmp_path), training) for training in (False, True)] == [2, 1]
    assert launch.workers(None, gpu, recipe(tmp_path, precise_bn_samples=1, image_size=448), training=True) == 0
    assert [call[0][0].split("; ")[0] for call in gpu.print.call_args_list] == [
        f"/dev/shm is small: {many(count, 'loader process')} instead of 8" for count in (2, 1, 0)
    ]


def test_a_signal_ends_a_run_whose_images_do_not_come_with_the_last_checkpoint_kept(monkeypatch, capsys):
    left = []
    monkeypatch.setattr(signals, "PATIENCE", 0.0)
    monkeypatch.setattr(signals.os, "_exit", lambda status: left.append(status) or exit())
    monkeypatch.setattr(signals.signal, "signal", lambda *_: None)
    monkeypatch.setattr(signals.signal, "set_wakeup_fd", lambda *_, **__: None)
    stop = signals.Stop()
    batches = stop.watched(iter([1, 2]))
    assert next(batches) == 1 and stop.waiting is None
    stop.requested, stop.waiting = "SIGTERM", 0.0
    with pytest.raises(SystemExit):
        stop.watch()
    assert (
        left == [signals.STOPPED]
        and "no images came for 0 s, so the run stopped without a new checkpoint" in capsys.readouterr().err
    )
