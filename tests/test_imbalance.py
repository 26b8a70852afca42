"""Promise: classes of few images count as asked for, and images that cannot be read are named."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from resuming import checkpoints, differences
from test_own_photos import TINY, put, recipe

from mixup_recipes.data import keys
from mixup_recipes.data.order import TrainOrder
from mixup_recipes.recipe import changed, to_yaml
from mixup_recipes.training import log
from mixup_recipes.training.data import check_rates
from mixup_recipes.training.folder import begin_folder, check_folder
from mixup_recipes.training.log import skipped
from mixup_recipes.training.update import class_weights, criterion
from mixup_recipes.typed import UserError

CPU = torch.device("cpu")
SIZES = [40, 9, 1]
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(3), SIZES))
SMALL = [*TINY, "--epochs", 2]


def test_a_balanced_order_has_as_many_of_each_class_and_is_a_function_of_seed_and_epoch():
    for repeats, drop_last in ((1, True), (1, False), (2, True), (3, False)):
        own = recipe("photos", sampler="balanced", aug_repeats=repeats, drop_last=drop_last, epochs=2, batch_size=8,
                     per_device_train_batch_size=4)  # fmt: skip
        whole = list(TrainOrder(50, own, 0, 1, 0, LABELS))
        epoch = [key for micro in whole for key in micro if key.epoch == 0]
        assert len(epoch) == len({*epoch}) == (48 if drop_last else 56)  # the same image is drawn anew each time
        dealt = [list(TrainOrder(50, own, rank, 2, 3, LABELS)) for rank in range(2)]
        assert [micro for turn in zip(*dealt, strict=True) for micro in turn] == whole[6:]
    one, other = (TrainOrder(50, recipe("photos", seed=s, sampler="balanced"), 0, 1, 0, LABELS) for s in (0, 1))
    assert one.epoch(1)[0].tolist() == one.epoch(1)[0].tolist()
    assert one.epoch(0)[0].tolist() not in (one.epoch(1)[0].tolist(), other.epoch(0)[0].tolist())
    whole = one.epoch(0)[0][:50].tolist()
    assert sorted(Counter(LABELS[whole]).values()) == [16, 17, 17]
    for k, images in enumerate(SIZES):  # of a class, all images come before one comes again
        times = Counter(i for i in whole if LABELS[i] == k)
        counts = [*times.values(), *[0] * (images - len(times))]
        assert max(counts) - min(counts) <= 1
    plain = TrainOrder(50, recipe("photos"), 0, 1).epoch(0)[0]
    assert plain[:50].tolist() == keys.rng(keys.ORDER, 0, 0).permutation(50).tolist()


@pytest.mark.parametrize(("repeats", "size"), [(2, 50), (3, 50), (3, 56)])
def test_each_image_of_a_balanced_epoch_comes_in_all_of_its_copies(repeats, size):
    own = recipe("photos", sampler="balanced", aug_repeats=repeats, batch_size=10 if size == 50 else 8,
                 per_device_train_batch_size=1, drop_last=False)  # fmt: skip
    index, copy = TrainOrder(50, own, 0, 1, 0, LABELS).epoch(0)
    assert len(index) == size
    drawn = Counter(zip(index[:50].tolist(), (copy[:50] // repeats).tolist(), strict=True))
    assert len(drawn) == -(-50 // repeats) and [*drawn.values()][:-1] == [repeats] * (len(drawn) - 1)
    of_class = Counter(int(LABELS[i]) for i, _ in drawn)
    assert max(of_class.values()) - min(of_class.values()) <= 1


def test_weights_of_classes_are_balanced_and_multiply_what_targets_say():
    own = recipe("photos", class_weights="balanced", num_classes=4)
    weights = class_weights(own, [40, 9, 1, 0], CPU)
    assert weights.tolist() == pytest.approx([50 / (3 * n) for n in SIZES] + [0])
    assert class_weights(recipe("photos"), [], CPU) is None
    logits, target = torch.randn(6, 4), torch.rand(6, 4).softmax(1)
    slow = [
        -sum(weights[k] * y[k] * (z[k] - z.exp().sum().log()) for k in range(4))
        for z, y in zip(logits, target, strict=True)
    ]
    torch.testing.assert_close(criterion(own, weights)(logits, target), torch.stack(slow))
    share = logits.sigmoid()
    slow = -(weights * target * share.log() + (1 - target) * (1 - share).log()).sum(1)
    found = criterion(recipe("photos", loss="bce_sum"), weights)(logits, target)
    torch.testing.assert_close(found, slow)
    for field in ("sampler", "class_weights"):
        with pytest.raises(UserError, match=f"{field} needs the whole table, so it cannot be combined with streaming"):
            recipe("owner/photos", streaming=True, **{field: "balanced"})


def test_each_changes_a_run_which_goes_on_to_the_same_end(server, tmp_path):
    root = put(tmp_path / "photos", 6)
    put(root, 20, classes=("bee",), start=6)
    run = ["--recipe", "finetune_mixup", "--dataset", root, *SMALL, "--checkpointing_steps", 2]
    balanced = [*run, "--sampler", "balanced"]
    weighted = [*run, "--class_weights", "balanced"]
    for name, args in (("plain", run), ("whole", balanced), ("parts", balanced), ("weighted", weighted)):
        status, output = server.run(*args, "--output_dir", tmp_path / name)
        assert status == 0, output
    shutil.rmtree(checkpoints(tmp_path / "parts")[-1])
    assert server.run(*balanced, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "auto")[0] == 0
    assert differences(tmp_path / "whole", tmp_path / "parts") == []
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines()[0] for name in ("plain", "whole", "weighted")]
    assert len({json.loads(line)["loss"] for line in logs}) == 3
    status, output = server.run(*weighted, "--eval_split", "train", "--output_dir", tmp_path / "same")
    assert status == 0, output
    data = json.loads((tmp_path / "same/data.json").read_text())
    assert [*data["splits"]] == ["train"] and data["splits"]["train"]["per_class"] == [6, 26, 6]
    status, output = server.run(*balanced, "--class_weights", "balanced", "--output_dir", tmp_path / "both")
    assert status == 2 and "both make all classes count the same; choose one" in output


def test_images_that_are_passed_over_are_listed_and_a_run_that_failed_on_its_first_does_not_block(server, tmp_path):
    root = put(tmp_path / "photos", 12)
    bad = sorted(root.rglob("*.jpg"))[::5]
    kept = {path: path.read_bytes() for path in bad}
    for number, path in enumerate(bad):
        path.write_bytes(b"no image" + bytes(number))
    run = tmp_path / "run"
    args = ["--recipe", "finetune_cutmix", "--dataset", root, "--output_dir", run, *SMALL]
    status, output = server.run(*args)
    assert status == 2, output
    assert "cannot be read: not an image of a known format; fix it, or pass --on_bad_image skip" in output
    # a second try, by another recipe, is not in the way of the first
    status, output = server.run(*args, "--on_bad_image", "skip", "--lr", 1e-4, "--dataloader_num_workers", 2)
    assert status == 0, output
    lines = (run / "skipped.txt").read_text().splitlines()
    assert len(lines) == len({*lines}) == len(bad) and all(
        sum(str(path) in line for line in lines) == 1 for path in bad
    )
    assert f"{len(bad)} images could not be read and were passed over: {run / 'skipped.txt'}" in output
    assert "--on_bad_image skip" in (run / "README.md").read_text()
    status, output = server.run(*args)
    assert status == 2 and "already holds a run" in output
    # nor is a first try on other data: what it noted of them is gone
    other = tmp_path / "other"
    first = [*args, "--output_dir", other, "--dataset", tmp_path / "first"]
    put(tmp_path / "first")
    for path in (tmp_path / "first").rglob("*.jpg"):
        path.write_bytes(b"no image" + str(path).encode())
    assert server.run(*without(first, "--output_dir", "--dataset"))[0] == 2
    held = (other / "holdout.txt").read_text()
    # and photos that were mended meanwhile are no changed data
    args = without([*args, "--output_dir", other], "--output_dir")
    assert server.run(*args)[0] == 2
    assert (other / "holdout.txt").read_text() != held
    for path, content in kept.items():
        path.write_bytes(content)
    status, output = server.run(*args, "--resume_from_checkpoint", "auto")
    assert status == 0 and not (other / "skipped.txt").exists(), output
    assert json.loads((other / ".dataset.json").read_text())["path"] == str(root)


def test_the_images_that_machines_passed_over_are_joined_without_a_disk_that_they_share(monkeypatch, tmp_path):
    for machine, names in enumerate(("ab", "bc")):
        for name in names:
            skipped(tmp_path / f"{machine}/run", "train")(f"{name}.jpg")
    ranks = [SimpleNamespace(is_local_main_process=True, is_main_process=rank == 0) for rank in range(2)]
    sent = []
    monkeypatch.setattr(log, "gather_object", lambda lines: sent + lines)
    sent += log.join_skipped(tmp_path / "1/run", ranks[1])
    monkeypatch.setattr(log, "gather_object", lambda lines: lines + sent)
    said = log.done(tmp_path / "0/run", ranks[0])
    lines = [f"train: {name}.jpg" for name in "abc"]
    assert (tmp_path / "0/run/skipped.txt").read_text().splitlines() == lines and "3 images could not" in said
    for rank, kept in ((0, True), (1, False)):  # the first machine's is removed where the run folder is begun
        log.forget_skipped(tmp_path / f"{rank}/run", ranks[rank], None)
        assert (tmp_path / f"{rank}/run/skipped.txt").exists() == kept


def test_a_run_that_is_done_meanwhile_and_what_is_no_run_are_not_overwritten(tmp_path):
    own = recipe("photos")
    check_folder(tmp_path / "run", own, resume=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text(to_yaml(own))
    (tmp_path / "run/model.safetensors").touch()  # of another process
    with pytest.raises(UserError, match="already holds a run"):
        begin_folder(tmp_path / "run", own, None, {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/recipe.yaml").write_text("# my notes\nbase: finetune\n")
    with pytest.raises(UserError, match="is not empty and is not a run folder"):
        check_folder(tmp_path / "mine", own, resume=False)


def without(args, *flags):
    """A command line without the first value of some flags, of which another one follows."""
    left = list(args)
    for flag in flags:
        place = left.index(flag)
        del left[place : place + 2]
    return left


def test_a_run_of_one_update_at_the_start_of_its_warm_up_would_learn_nothing_and_is_refused():
    one = recipe("photos", epochs=1, batch_size=32, per_device_train_batch_size=32)
    with pytest.raises(
        UserError,
        match=r"24 images make a single update, and the warm-up starts at a learning rate of 0.*--warmup_epochs 0",
    ):
        check_rates(one, 24)
    check_rates(one, 33)
    check_rates(changed(one, warmup_epochs=0), 24)
