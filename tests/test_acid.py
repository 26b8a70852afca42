"""Promise: benchmarks/acid.py trains both sides on the same data from the same weights, and its page is its record."""

import json
import re
import subprocess
import sys

import pytest
from tiny import ROOT, make_photos

sys.path.insert(0, str(ROOT / "benchmarks"))
import acid
from acid_originals import Acid, scripts

PLAIN = """
raise SystemExit("a script that trains when it is read")


def mixup_data():
    pass


def mixup_criterion():
    pass


def train(epoch):
    net.train()
    print("Epoch", epoch)
    for inputs, targets in trainloader:
        loss = criterion(net(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""


@pytest.fixture
def stub(tmp_path):
    """A checkout of an original that does not mix, and the comparison with our job, which does not mix either."""
    folder = tmp_path / "originals/stub"
    folder.mkdir(parents=True)
    (folder / "train.py").write_text(PLAIN)
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for words in (("init", "-q"), ("add", "train.py"), (*who, "commit", "-qm", "a")):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    values = {
        "dataset": str(make_photos(tmp_path / "photos")), "num_classes": 4, "max_train_samples": None,
        "model": "test_resnet", "model_args": {}, "epochs": 2, "eval_epochs": 2, "batch_size": 16,
        "per_device_train_batch_size": 16, "mixer": "mixup", "mix_prob": 0.0, "opt": "momentum", "image_size": 32,
        "eval_size": 32, "eval_resize": 32,
    }  # fmt: skip
    return Acid("plain by stub", "owner/stub", ("train.py",), values, scripts.mixup_cifar10, "It runs.", "Nothing.")


def test_an_original_that_does_as_ours_does_comes_out_as_ours(stub, tmp_path, monkeypatch):
    record, originals = tmp_path / "acid.json", tmp_path / "originals"
    acid.compare(stub, originals, [1], record)
    (row,) = acid.recorded(record)
    theirs, ours = row["scores"]["original"]["1"], row["scores"]["ours"]["1"]
    assert theirs == pytest.approx(ours, rel=1e-4) and theirs["nll"] != pytest.approx(1.3863, abs=1e-3)
    assert re.fullmatch("[0-9a-f]{10}", row["commit"]) and row["values"]["epochs"] == 2

    # what is there is not trained again; another seed or recipe is
    trained = []
    for name in ("trained_by_us", "trained_by_them"):
        monkeypatch.setattr(acid, name, lambda *args: trained.append(args[-1]) or theirs)
    acid.compare(stub, originals, [1, 2], record)
    assert trained == [2, 2]
    stub.values["lr"] = 0.2
    acid.compare(stub, originals, [1], record)
    assert trained == [2, 2, 1, 1] and [*acid.recorded(record)[0]["scores"]["ours"]] == ["1"]

    (originals / "stub/train.py").write_text("changed")
    with pytest.raises(LookupError, match="was changed"):
        acid.compare(stub, originals, [3], record)


def test_the_table_has_means_difference_and_band(stub, tmp_path):
    runs = {
        side: {str(seed): {"top1": top1 + seed, "nll": 1.5, "count": 10000} for seed in range(3)}
        for side, top1 in (("original", 40.0), ("ours", 41.0))
    }
    row = acid.described(stub, acid.Checkout(tmp_path / "originals/stub")) | {"scores": runs}
    text = acid.page([row], [stub])
    shown = next(line for line in text.splitlines() if line.startswith("| [plain by stub](#plain-by-stub)"))
    assert "| 40.00, 41.00, 42.00 | 41.00, 42.00, 43.00 | 41.00 | 42.00 | +1.00 |" in shown
    assert shown.endswith("| within the band |")
    for side in ("original", "ours"):  # a side without runs is not shown
        empty = row | {"scores": runs | {side: {}}}
        text = acid.page([empty], [stub])
        assert "nobody has run them yet: plain by stub." in text
        assert "[plain by stub]" not in text and "## plain by stub" not in text


def test_the_page_is_that_of_its_record():
    rows = acid.recorded(acid.RECORD)
    assert rows and (ROOT / "docs/acid_measured.md").read_text() == acid.page(rows)
    known = {a.name: a for a in acid.ACIDS}
    for row in rows:
        theirs, ours = (row["scores"][side] for side in acid.SIDES)
        assert {*theirs} >= {*ours} or {*ours} >= {*theirs}, row["name"]
        assert row["values"] == json.loads(json.dumps(acid.SETTING | known[row["name"]].values)), row["name"]
