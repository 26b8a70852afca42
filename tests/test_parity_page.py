"""Promise: what is said of a mixer and its original code is what was measured, and a test holds the same formula."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ROOT

from mixers import MIXERS, build
from mixers.registry import docstring, sampling_law
from mixup_recipes.pages.method_page import text
from mixup_recipes.pages.parity import ALONE, number, page, recorded

sys.path.insert(0, str(ROOT / "benchmarks"))
import originals
from originals import same_draws


def test_the_page_is_that_of_its_record_and_every_mixer_has_a_row_or_a_reason():
    rows = recorded()
    assert (ROOT / "docs/parity.md").read_text() == page(rows)
    subjects = {row["subject"] for row in rows}
    assert {*MIXERS} - subjects == {*ALONE} and len(subjects - {*MIXERS}) >= 3
    for row in rows:
        file, _, name = row["held"].partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), row["held"]
        assert row["gaps"] and all(gap["gap"] >= 0 for gap in row["gaps"])
        assert re.fullmatch("[0-9a-f]{10}", row["commit"])
        for gap in row["gaps"]:  # what is more than rounding says why
            assert gap["why"] or gap["gap"] < 1e-4, (row["subject"], gap)


def test_a_method_is_shown_with_its_arguments_its_law_and_its_gaps_and_a_misspelled_one_with_the_nearest(console):
    status, shown, _ = console("methods", "show", "cutmix")
    assert status == 0 and shown == text("cutmix")
    for part in ('build("cutmix", alpha=1.0)', "`cutmix@clova-2019`", "## Deviations", "clovaai/CutMix-PyTorch"):
        assert part in shown
    assert "Its code is not public" in text("grafting")
    assert "* permutations of 64" in shown and "figures agree. The largest gap is" in shown
    assert console("methods", "show", "cutmx") == (2, "", "error: unknown mixer 'cutmx'; did you mean 'cutmix'?\n")
    assert console("methods", "show", "token")[2].startswith("error: unknown mixer 'token'; did you mean 'tokenmix'?")
    assert sampling_law("samix") in docstring("samix") and not sampling_law("none of ours")


def test_gaps_are_shown_with_their_unit():
    gaps = [("absolute", 2.34e-7, "2.3e-07"), ("share", 0.0313, "3.13 % of all"), ("relative", 0.0, "0")]
    assert [number({"gap": gap, "unit": unit}) for unit, gap, _ in gaps] == [words for *_, words in gaps]


BOX = """
import never_installed
def rand_bbox(size, lam):
    width, height = size[2], size[3]
    half_width, half_height = (np.int(side * np.sqrt(1.0 - lam)) // 2 for side in (width, height))
    x, y = np.random.randint(width), np.random.randint(height)
    clip = lambda value, most: min(max(value, 0), most)
    return (clip(x - half_width, width), clip(y - half_height, height),
            clip(x + half_width + MORE, width), clip(y + half_height, height))
"""


def checkout(folder: Path, more: int) -> originals.Checkout:
    """A repository with a box of our own writing, whose far edge is ``more`` pixels off."""
    (folder / "train.py").write_text(BOX.replace("MORE", str(more)))
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "train.py"], ["commit", "-qm", "box"]):
        subprocess.run([*git, *words], check=True)
    return originals.Checkout(folder)


@pytest.mark.usefixtures("without_shape_checks")  # what keeps the draws is no generator by its type
@pytest.mark.parametrize("more", [0, 1])
def test_a_comparison_runs_the_lines_of_the_checkout_on_our_draws_and_finds_a_mistake_in_them(tmp_path, more):
    found, differing = checkout(tmp_path, more), 0
    assert len(found.commit) == 10
    again = same_draws.Again()
    rand_bbox = found.names("train.py", "rand_bbox", np=originals.Numpy(again))
    with pytest.raises(LookupError, match=r"defines no rand_box: is it another commit\?"):
        found.names("train.py", "rand_box")
    for seed in range(100):
        again.kept = {}
        plan = build("cutmix").plan(torch.zeros(2, 3, 40, 30), torch.eye(2), same_draws.keeping(seed, again.kept))
        top, left, bottom, right = rand_bbox((2, 3, 40, 30), again.beta(1.0, 1.0))
        theirs = torch.ones(40, 30)
        theirs[top:bottom, left:right] = 0
        differing += int(not torch.equal(plan["mask"][0, 0], theirs))
    assert (differing > 20 if more else differing == 0) and again.gap().gap == 0
    again.kept = {"beta": [((1.0, 1.0), 0.5)]}
    assert again.beta(0.2, 0.2) == 0.5 and again.gap().gap == 1  # another law than ours


def test_draws_are_handed_out_in_turn_and_the_rest_is_asked_for_elsewhere():
    draws = originals.Draws(rest=originals.Numpy(), beta=[0.25, 0.5])
    assert [draws.beta(1, 1), draws.beta(1, 1)] == [0.25, 0.5] and draws.sqrt(4.0) == 2.0
    with pytest.raises(IndexError):
        draws.beta(1, 1)
