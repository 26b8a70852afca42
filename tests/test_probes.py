"""Each probe catches a callable that is wrong on purpose, and finds no fault with one that is right."""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from marks import slow_unless

from mixers import MIXERS, probes
from mixers.testing import CHECKS
from mixup_recipes import conformance
from mixup_recipes.cli import jobs
from mixup_recipes.typed import UserError

# Thousands of calls: that ours take and give the right shapes is seen in test_contract.py.
pytestmark = pytest.mark.usefixtures("without_shape_checks")

# The right ones, as their papers say it, drawing from numpy's global generator; their parts are there to be replaced.


def beta(alpha):
    return np.random.beta(alpha, alpha)


def shares(own, other, lam):
    return lam * own + (1 - lam) * other


def permutation(n):
    return torch.from_numpy(np.random.permutation(n))


def blended(draw=beta, label=shares, partners=permutation):
    def mix(x, y, alpha=1.0):
        lam, index = draw(alpha), partners(len(x))
        return shares(x, x[index], lam), label(y, y[index], lam)

    return mix


mixup = blended()


def box(height, width, lam):
    """Rows and columns of CutMix's box, clipped at the border."""
    cut = math.sqrt(1 - lam)
    half_height, half_width = int(height * cut) // 2, int(width * cut) // 2
    row, column = np.random.randint(height), np.random.randint(width)
    rows = slice(max(row - half_height, 0), min(row + half_height, height))
    return rows, slice(max(column - half_width, 0), min(column + half_width, width))


def cutmix(x, y, alpha=1.0, box=box, count_pixels=True):
    lam, index = beta(alpha), permutation(len(x))
    rows, columns = box(*x.shape[-2:], lam)
    mixed = x.clone()
    mixed[..., rows, columns] = x[index][..., rows, columns]
    if count_pixels:
        lam = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / math.prod(x.shape[-2:])
    return mixed, shares(y, y[index], lam)


# The wrong ones.


def after(change):
    """Mixup, then ``change(mixed, target, x, y)``."""
    return lambda x, y, alpha=1.0: change(*mixup(x, y, alpha), x, y)


def cut_with(box):
    """CutMix with another box."""
    return functools.partial(cutmix, box=box)


no_numbers = after(lambda mixed, target, *_: (mixed * math.nan, target * math.nan))


def no_clipping(height, width, lam):
    rows, columns = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
    top, left = np.random.randint(height - rows + 1), np.random.randint(width - columns + 1)
    return slice(top, top + rows), slice(left, left + columns)


def swapped(height, width, lam):
    rows, columns = box(width, height, lam)
    return slice(min(rows.start, height), min(rows.stop, height)), columns


def a_pixel_more(height, width, lam):
    rows, columns = box(height, width, lam)
    return slice(rows.start, min(rows.stop + 1, height)), columns


def even_batches(x, y, alpha=1.0):
    assert len(x) % 2 == 0
    return mixup(x, y, alpha)


CAUGHT = {
    "other label": ("pixel share = label share", blended(label=lambda own, other, lam: shares(other, own, lam)), ()),
    "unclipped": ("pixel share = label share", functools.partial(cutmix, count_pixels=False), ()),
    "no shares": ("pixel share = label share", no_numbers, ()),
    "whole": ("targets are distributions", blended(label=lambda own, other, lam: lam * own + other), ()),
    "no numbers": ("targets are distributions", no_numbers, ()),
    "always uniform": ("law of lambda", blended(lambda alpha: np.random.rand()), (0.2,)),
    "folded": ("law of lambda", blended(lambda alpha: 0.5 + abs(beta(alpha) - 0.5)), (1.0,)),
    "no clipping": ("law of lambda", cut_with(no_clipping), (1.0,)),
    "swapped": ("law of lambda", cut_with(swapped), (1.0,)),
    "a pixel more": ("law of lambda", cut_with(a_pixel_more), (1.0,)),
    "even batches": ("any batch size", even_batches, ()),
    "squeezes": ("any batch size", after(lambda mixed, target, *_: (mixed.squeeze(0), target)), ()),
    "in place": ("caller's tensors untouched", after(lambda mixed, target, x, _: (x.copy_(mixed), target)), ()),
    "labels in place": ("caller's tensors untouched", after(lambda mixed, target, _, y: (mixed, y.copy_(target))), ()),
    "always float32": ("float64 and bfloat16 kept", after(lambda mixed, target, *_: (mixed.float(), target)), ()),
    "unseeded": ("the same under a seed", blended(lambda alpha: np.random.default_rng().beta(alpha, alpha)), ()),
}
ONLY_OURS = ["reads nothing from the device", "global generators"]


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(probes.bench, "DRAWS", 500)


def subject(mix: Callable, alphas: tuple[float, ...] = (), **options) -> probes.Subject:
    """A function (x, y, alpha) as a subject."""

    def make(alpha):
        return mix if alpha is None else functools.partial(mix, alpha=alpha)

    return probes.Subject(make, probes.seed_globals, alphas, **({"draws": 3000} | options))


def found(name: str, mix: Callable, alphas: tuple[float, ...] = (), **options) -> probes.Finding:
    """What one probe says."""
    return probes.PROBES[name](probes.Bench(subject(mix, alphas, **options)))


@pytest.mark.parametrize("mistake", CAUGHT)
def test_the_probe_catches_it(mistake):
    assert found(*CAUGHT[mistake]).holds is False


def test_what_is_a_fault_of_a_mixer_or_of_a_function_is_a_fact_of_others():
    def reads_the_device(x, y, alpha=1.0):
        return mixup(x, y + 0 * x.sum().item(), alpha)

    for name, text in zip(ONLY_OURS, ("no: RuntimeError", "moves numpy"), strict=True):
        assert found(name, reads_the_device, is_mixer=True).holds is False
        fact = found(name, reads_the_device)
        assert fact.holds is None and fact.found.startswith(text)

    holds, text = found("law of lambda", cut_with(no_clipping), (1.0,), boxes_as_cutmix=False)
    assert holds is None and "law:" not in text  # it declares no law of CutMix

    images_left_to_the_network = after(lambda mixed, target, x, y: (x, target))
    assert found("pixel share = label share", images_left_to_the_network).holds is False
    holds, text = found("pixel share = label share", images_left_to_the_network, is_mixer=True)
    assert holds
    assert int(text.removeprefix("off by 0, ").split()[0]) > 180  # of 200; one permutation of 24 moves nothing


def test_every_probe_that_can_fail_is_seen_failing():
    facts = {"labels it takes", "kind of mix", "one lambda per", "pairing"}
    assert {name for name, *_ in CAUGHT.values()} | {*ONLY_OURS} | facts == set(probes.PROBES)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize(("mix", "kind"), [(mixup, "blend"), (cutmix, "box")], ids=["mixup", "cutmix"])
def test_no_fault_is_found_with_what_is_right(mix, kind, ours):
    made = conformance.subject("mixup" if mix is mixup else "cutmix", None)[0] if ours else subject(mix, (0.2, 1.0))
    findings = probes.probe(made)
    assert {finding.holds for finding in findings.values()} == {True, None}
    assert findings["law of lambda"].holds and (findings["global generators"] == (True, "left alone")) is ours
    facts = [findings[name].found for name in ("kind of mix", "labels it takes", "one lambda per")]
    assert facts == [kind, "one-hot", "batch"]


def per_sample(x, y):
    lam = torch.from_numpy(np.random.beta(1, 1, len(x))).float()
    index = permutation(len(x))
    return torch.lerp(x[index], x, lam[:, None, None, None]), torch.lerp(y[index], y, lam[:, None])


def striped(x, y):
    mask = (torch.arange(x.shape[-1]) % 2 == 0).to(x.dtype)
    return shares(x, x.flip(0), mask), shares(y, y.flip(0), 0.5)


def test_facts_are_told_as_they_are():
    flip, roll, drawn = (
        blended(lambda _: 0.3, partners=partners)
        for partners in (
            lambda n: torch.arange(n).flip(0),
            lambda n: torch.arange(n).roll(1),
            lambda n: torch.from_numpy(np.random.randint(n, size=n)),
        )
    )
    for name, mix, text in (
        ("one lambda per", per_sample, "sample"),
        ("pairing", flip, "flip, 0.00 of 8 with themselves"),
        ("pairing", roll, "roll by 1, 0.00 of 8 with themselves"),
        ("kind of mix", striped, "mask"),
        ("labels it takes", lambda x, y: mixup(x, F.one_hot(y, 100).float()), "classes"),
        ("law of lambda", flip, "mean 0.300, 0.0 % outside [.01, .99], folded"),
    ):
        assert found(name, mix) == (None, text)
    assert found("pairing", drawn).found.startswith("random, some images used twice, ")
    text, fixed = found("pairing", mixup).found.rsplit(", ", 1)
    assert text == "random permutation"
    assert float(fixed.split()[0]) == pytest.approx(1, abs=0.25)  # a permutation has one fixed point on average


def test_box_law_is_that_worked_out_by_hand():
    # alpha 1, 4 x 4: the half side is 0 for sqrt(1-lam) < 1/2, a quarter of the time, else 1; then a centre at the
    # border leaves 1 row of 4, another one 2 rows: areas 1, 2, 4 in 1, 6, 9 of 16 cases
    own, chance = probes.box_law(4, 4, 1.0)
    law = {round(16 * o): c for o, c in zip(own.tolist(), chance.tolist(), strict=True) if c}
    assert law == pytest.approx({12: 0.75 * 9 / 16, 14: 0.75 * 6 / 16, 15: 0.75 / 16, 16: 0.25})


def test_lambdas_that_float32_rounds_to_the_ends_are_no_fault():
    lam = np.random.default_rng(0).beta(0.05, 0.05, 8000).astype(np.float32).astype(float)
    assert (lam == 1).mean() > 0.1
    assert probes.judge(lam, 0.05, box=False)[1] > 0.01


FILE = """
import numpy as np
import torch
import torch.nn.functional as F
from mixers import Mixup

class Mine(Mixup): ...

class Writes(Mixup):
    def mix(self, x, y, **plan):
        mixed, target = super().mix(x, y, **plan)
        return x.copy_(mixed), target

class Transform:
    def __init__(self, alpha=1.0):
        self.alpha = alpha

    def __call__(self, x, labels):
        return function(x, F.one_hot(labels, 12).float(), self.alpha)

def function(x, y, alpha=1.0):
    lam, index = np.random.beta(alpha, alpha), torch.from_numpy(np.random.permutation(len(x)))
    return lam * x + (1 - lam) * x[index], lam * y + (1 - lam) * y[index]

CONSTANT = 3
mine = Mixup(0.5)
factory = lambda: Mixup(0.3)
half = lambda x, y: (0.5 * x + 0.5 * x.flip(0), 0.5 * y + 0.5 * y.flip(0))
needs_three = lambda x, y, z: (x, y)
only_images = lambda x, y: x
number = lambda: 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


@pytest.mark.parametrize(
    ("name", "alphas", "is_mixer"),
    [
        ("Mine", (0.2, 1.0), True), ("factory", (), True), ("mine", (), True), ("Transform", (0.2, 1.0), False),
        ("function", (0.2, 1.0), False), ("half", (), False),
    ],
)  # fmt: skip
def test_a_callable_of_a_file_is_understood_and_a_declared_alpha_reaches_it(file, name, alphas, is_mixer):
    made, factory = conformance.subject(f"{file}:{name}", None)
    assert (made.alphas, factory is not None) == (alphas, is_mixer)
    mixed, target = made.make(None)(torch.rand(2, 3, 8, 8), torch.arange(2) if name == "Transform" else torch.eye(2))
    assert mixed.shape == (2, 3, 8, 8)
    assert target.sum(1).tolist() == pytest.approx([1, 1])
    declared, _ = conformance.subject(f"{file}:{name}", 5.0)
    assert declared.alphas == (() if name in ("factory", "mine") else (5.0,))
    if alphas:
        lam = probes.lambdas(probes.Bench(dataclasses.replace(declared, draws=2000)), 5.0)
        assert lam.std() == pytest.approx(1 / math.sqrt(44), rel=0.1)  # of Beta(5, 5): 1 / sqrt(4 (2a + 1))


def test_a_mixer_meets_the_contract_s_checks_too(file):
    (report,) = conformance.check([f"{file}:Writes"], None)
    assert not report.passed
    assert [line.split(":")[0] for line in report.failures if line.startswith("inputs")] == ["inputs_untouched"]
    passed = len(CHECKS) - len(report.failures)
    assert report.findings["checks of the contract"] == (False, f"{passed} of {len(CHECKS)}")
    assert f"{file}:Writes: inputs_untouched: expected" in conformance.table([report])
    (mine,) = conformance.check([f"{file}:mine"], None)
    assert mine.passed


def test_a_table_has_a_row_per_probe_and_a_column_per_target_and_the_status_tells_a_fault(file, capsys):
    assert jobs.check(f"{file}:half", "timm:mixup", alpha=1.0, format="md") == 1
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[:-3]]
    assert rows[0] == ["", f"{file}:half", "timm:mixup"]
    cells = {row[0]: row[1:] for row in rows[2:]}
    assert set(cells) == set(probes.PROBES)
    assert cells["pairing"] == ["flip, 0.00 of 8 with themselves"] * 2
    assert cells["caller's tensors untouched"] == ["ok: yes", "FAILS: writes into images"]
    odd = "FAILS: 1: AssertionError; 3: AssertionError; 7: AssertionError"
    assert cells["any batch size"] == ["ok: 1, 2, 3, 7", odd]
    assert jobs.check(f"{file}:half") == 0


BROKEN = {
    "divides": "1 / 0",
    "leaves": "import sys; sys.exit(0)",
    "exits": "import sys\ndef a(x, y): sys.exit(0)",
    "raises": "def a(): raise ValueError('nope')",
}
MISTAKES = {
    "cutmx": "unknown target 'cutmx'; did you mean 'cutmix'?",
    "timm:mxup": "unknown target 'timm:mxup'; did you mean 'timm:mixup'?",
    "nowhere.py:f": "no file nowhere.py; expected the path of a Python file",
    "{mine}:functon": "{mine} has no callable 'functon'; did you mean 'function'?",
    "{mine}:CONSTANT": "{mine} has no callable 'CONSTANT'; ",
    "{mine}": "{mine}: expected {mine}:NAME with a callable of the file; it has Mine, Writes, Transform, function, ",
    "{mine}:needs_three": "{mine}:needs_three needs x, y, z; expected a Mixer, a factory without required ",
    "{mine}:number": "{mine}:number makes a int; expected a Mixer, or something called with (x, y)",
    "{mine}:only_images": "{mine}:only_images: expected mix(x, y) -> (images, float targets (B, K)); with classes: ",
    "{divides}:f": "cannot import {divides}: ZeroDivisionError: division by zero",
    "{leaves}:a": "cannot import {leaves}: SystemExit",
    "{exits}:a": "{exits}:a: expected mix(x, y) -> (images, float targets (B, K)); with classes: SystemExit",
    "{raises}:a": "{raises}:a cannot be made: ValueError: nope",
}


@pytest.mark.parametrize("target", MISTAKES)
def test_a_mistake_is_one_line(file, target):
    files = {"mine": file} | {name: file.with_name(f"{name}.py") for name in BROKEN}
    for name, text in BROKEN.items():
        files[name].write_text(text)
    with pytest.raises(UserError) as error:
        conformance.check([target.format(**files)])
    assert str(error.value).startswith(MISTAKES[target].format(**files)) and "\n" not in str(error.value)


def test_no_target_and_a_wrong_alpha_are_one_line():
    with pytest.raises(UserError, match=r"no target was given; pass a mixer .*cutmix.*, timm:mixup"):
        conformance.check([])
    with pytest.raises(UserError, match="alpha: expected a number above 0, got 0"):
        conformance.check(["mixup"], 0)


@pytest.mark.parametrize("name", slow_unless(lambda name: name in [*MIXERS][::4], MIXERS))
def test_every_mixer_can_be_probed(name):
    bench = probes.Bench(conformance.subject(name, None)[0])
    assert probes.PROBES["the same under a seed"](bench).holds and probes.PROBES["any batch size"](bench).holds
