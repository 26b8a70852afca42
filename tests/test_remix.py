"""Remix gives the label to the rarer class, and the job knows which one that is."""

import json
import shutil

import numpy as np
import pytest
import torch
from resuming import checkpoints, differences
from test_own_photos import TINY, put, recipe

from mixers import Mixup, Remix
from mixup_recipes.data.splits import load_splits
from mixup_recipes.pages import preview
from mixup_recipes.recipe import to_yaml
from mixup_recipes.resolve import load_recipe, resolve
from mixup_recipes.runs.replay import replay
from mixup_recipes.runs.run import Run
from mixup_recipes.training import backbones
from mixup_recipes.training.update import meet_data, new_step
from mixup_recipes.typed import UserError

CPU = torch.device("cpu")
COUNTS = [60, 20, 19, 3, 0]


def label_share(lam, own, other, kappa, tau):
    """The paper's three cases, in its order."""
    if own >= kappa * other and lam < tau:
        return 0.0
    if other >= kappa * own and 1 - lam < tau:
        return 1.0
    return lam


@pytest.mark.parametrize(("kappa", "tau"), [(3.0, 0.5), (1.0, 0.8), (2.5, 1.0), (3.0, 0.0)])
def test_the_label_goes_to_the_rarer_class_as_a_loop_over_the_pairs_says(kappa, tau):
    mixer, moved = Remix(1.0, kappa, tau, COUNTS), 0
    x, labels = torch.randn(9, 3, 4, 4), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0])
    y = 0.9 * torch.eye(5)[labels] + 0.02  # smoothed
    for seed in range(40):
        plan, plain = (m.plan(x, y, np.random.default_rng(seed)) for m in (mixer, Mixup()))
        assert torch.equal(plan["index"], plain["index"]) and torch.equal(plan["mask"], plain["mask"])
        lam = plain["mask"].flatten().tolist()
        counts = [COUNTS[k] for k in labels]
        pairs = zip(lam, counts, [counts[j] for j in plan["index"]], strict=True)
        expected = [label_share(share, own, other, kappa, tau) for share, own, other in pairs]
        moved += expected != lam
        assert plan["lam"].tolist() == expected
        mixed, target = mixer.mix(x, y, **plan)
        assert torch.equal(mixed, Mixup().mix(x, y, **plain)[0])
        share = plan["lam"][:, None]
        torch.testing.assert_close(target, share * y + (1 - share) * y[plan["index"]])
    assert moved if tau else not moved


def test_without_counts_it_is_mixup_and_counts_of_other_classes_are_refused():
    x, y = torch.randn(6, 3, 4, 4), torch.eye(6)
    plans = [m.plan(x, y, np.random.default_rng(1)) for m in (Remix(), Remix(class_counts=[7] * 6), Mixup())]
    (*_, target), (*_, even), (*_, plain) = (Mixup().mix(x, y, **plan) for plan in plans)
    assert torch.equal(target, plain) and torch.equal(even, plain)
    with pytest.raises(ValueError, match="class_counts must be 6 numbers, one per class, got 5"):
        Remix(class_counts=COUNTS).plan(x, y, np.random.default_rng(1))


def counts_in(own, splits):
    """What the mixers of a recipe's step that count were told of the data."""
    step = new_step(backbones.create_model(own), own)
    meet_data(step, own, splits, CPU, print)
    return [part.class_counts for part in step.mixer.modules() if isinstance(part, Remix)]


def test_the_job_counts_what_it_trains_on_for_a_mixer_at_any_depth_and_what_is_given_stays(tmp_path):
    put(put(tmp_path / "photos", 20), 40, classes=("bee",), start=20)
    small = {"model": "test_resnet", "pretrained": None}
    for changes in ({}, {"max_train_samples": 31}, {"holdout": 0.5}):
        own = recipe(tmp_path / "photos", "finetune_remix", num_classes=3, **small, **changes)
        splits = load_splits(own)
        counts = np.bincount(splits.train["label"], minlength=3).tolist()
        assert counts_in(own, splits) == [counts] and sum(counts) == changes.get("max_train_samples", sum(counts))
        assert own.mixer_args["remix"]["class_counts"] is None and own.mix_prob < 1  # inside a switch
    deep = {"mixer_args": {"base": {"switch": {"mixers": ["remix", {"remix": {"class_counts": [5, 3, 1]}}]}}}}
    own = recipe(tmp_path / "photos", "finetune_decouplemix", num_classes=3, **small, **deep)
    assert counts_in(own, splits) == [counts, [5, 3, 1]]
    own, origin = resolve("finetune_remix", {"num_classes": 3})
    assert origin["mixer_args.remix.class_counts"] == "counted in the training data"
    (tmp_path / "saved.yaml").write_text(to_yaml(own))
    assert load_recipe(str(tmp_path / "saved.yaml")) == own


def test_what_cannot_be_counted_is_one_line_before_any_work(tmp_path):
    counts = {"mixer_args": {"class_counts": [5, 3]}}
    nested = {"mixer_args": {"base": "remix"}}
    for name, changes, says in (
        ("remix", {"streaming": True}, "needs the number of training images of each class, and a stream does not tell"),
        (
            "decouplemix",
            nested | {"streaming": True},
            "'decouplemix' needs the number of training images of each class",
        ),
        (
            "remix",
            counts | {"num_classes": 3},
            "class_counts: expected 3 numbers, one for each class, got 2; leave it out",
        ),
        ("remix", {"mixer_args": {"class_counts": [5, -1]}}, "must be the number of training images of each class"),
        ("remix", {"multi_label": True}, "assumes one class per image"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            recipe("owner/photos", f"finetune_{name}", **changes)
        assert "\n" not in str(caught.value)
    told = load_recipe("deit_s_remix", streaming=True, num_classes=2, **counts)
    assert told.mixer_args["remix"]["class_counts"] == [5, 3]
    put(tmp_path / "photos", 6)
    own = recipe(tmp_path / "photos", "finetune_remix", model="test_resnet", pretrained=None, **counts)
    with pytest.raises(UserError, match="class_counts: expected 3 numbers, one for each class, got 2"):
        counts_in(own, load_splits(own))


def test_a_run_counts_goes_on_to_the_same_end_and_is_replayed(server, tmp_path):
    root = put(put(tmp_path / "photos", 6), 24, classes=("bee",), start=6)
    run = ["--recipe", "finetune_remix", "--dataset", root, "--mix_prob", 1, *TINY, "--epochs", 2]
    run += ["--holdout", 0.5, "--checkpointing_steps", 2]
    for name in ("whole", "parts"):
        status, output = server.run(*run, "--output_dir", tmp_path / name)
        assert status == 0, output
    shutil.rmtree(checkpoints(tmp_path / "parts")[-1])
    assert server.run(*run, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "auto")[0] == 0
    assert differences(tmp_path / "whole", tmp_path / "parts") == []
    even = ["--mixer.class_counts", "[1, 1, 1]"]
    assert server.run(*run, *even, "--output_dir", tmp_path / "even")[0] == 0
    logs = {name: (tmp_path / name / "log.jsonl").read_text().splitlines()[0] for name in ("whole", "even")}
    losses = {name: json.loads(line)["loss"] for name, line in logs.items()}
    assert losses["whole"] != losses["even"]
    moved = False
    for update in range(2):
        found = replay(Run.open(tmp_path / "whole"), update)
        moved = moved or not torch.equal(found.plan["lam"], found.plan["mask"].flatten())
    assert moved and found.notes == []
    for args, says in (
        ([*run, "--dry_run"], "class_counts"),
        ([*run, "--mixer.class_counts", "[1, 2]"], "expected 3 numbers"),
    ):
        status, output = server.run(*args, "--output_dir", tmp_path / "other")
        assert status == (0 if "--dry_run" in args else 2) and says in output, output


def test_a_preview_whose_photos_are_of_a_class_each_shows_the_blend_whatever_the_counts():
    told = load_recipe("quickstart_remix", mixer_args={"alpha": 0.5, "class_counts": list(range(1, 15))})
    plain = load_recipe("quickstart_mixup", mixer_args={"alpha": 0.5})
    one, other = (preview.mixed(own, preview.shapes(3)) for own in (told, plain))
    assert torch.equal(one.shares, other.shares) and torch.equal(one.pixels, other.pixels)
