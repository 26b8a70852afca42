"""Each probe catches a callable that is wrong on purpose, and finds no fault with one that is right."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mixers import MIXERS, probes
from mixers.testing import CHECKS
from mixup_recipes import conformance
from mixup_recipes.cli import jobs
from mixup_recipes.typed import UserError

# The right ones, as their papers say it, drawing from numpy's global generator.


def blend(x, y, lam, index):
    return lam * x + (1 - lam) * x[index], lam * y + (1 - lam) * y[index]


def permutation(x):
    return torch.from_numpy(np.random.permutation(len(x)))


def mixup(x, y, alpha=1.0):
    return blend(x, y, np.random.beta(alpha, alpha), permutation(x))


def box(height, width, lam):
    """Rows and columns of CutMix's box, clipped at the border."""
    cut = math.sqrt(1 - lam)
    half_height, half_width = int(height * cut) // 2, int(width * cut) // 2
    row, column = np.random.randint(height), np.random.randint(width)
    rows = slice(max(row - half_height, 0), min(row + half_height, height))
    return rows, slice(max(column - half_width, 0), min(column + half_width, width))


def cutmix(x, y, alpha=1.0, box=box):
    index = permutation(x)
    rows, columns = box(*x.shape[-2:], np.random.beta(alpha, alpha))
    mixed = x.clone()
    mixed[..., rows, columns] = x[index][..., rows, columns]
    lam = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / math.prod(x.shape[-2:])
    return mixed, lam * y + (1 - lam) * y[index]


# The wrong ones.


def relabelled(label):
    """Mixup whose target is ``label(y, partner's y, lam)``."""

    def mix(x, y, alpha=1.0):
        lam, index = np.random.beta(alpha, alpha), permutation(x)
        return blend(x, y, lam, index)[0], label(y, y[index], lam)

    return mix


def after(change):
    """Mixup, then ``change(mixed, target, x, y)``."""
    return lambda x, y, alpha=1.0: change(*mixup(x, y, alpha), x, y)


other_label = relabelled(lambda own, other, lam: (1 - lam) * own + lam * other)
partner_s_label_whole = relabelled(lambda own, other, lam: lam * own + other)
squeezes = after(lambda mixed, target, *_: (mixed.squeeze(0), target))
in_place = after(lambda mixed, target, x, _: (x.copy_(mixed), target))
in_place_labels = after(lambda mixed, target, _, y: (mixed, y.copy_(target)))
no_numbers = after(lambda mixed, target, *_: (mixed * math.nan, target * math.nan))
always_float32 = after(lambda mixed, target, *_: (mixed.float(), target))


def label_by_the_unclipped_area(x, y, alpha=1.0):
    lam, index = np.random.beta(alpha, alpha), permutation(x)
    rows, columns = box(*x.shape[-2:], lam)
    mixed = x.clone()
    mixed[..., rows, columns] = x[index][..., rows, columns]
    return mixed, lam * y + (1 - lam) * y[index]


def always_uniform(x, y, alpha=1.0):
    return blend(x, y, np.random.rand(), permutation(x))


def folded(x, y, alpha=1.0):
    lam = np.random.beta(alpha, alpha)
    return blend(x, y, max(lam, 1 - lam), permutation(x))


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


def unseeded(x, y, alpha=1.0):
    rng = np.random.default_rng()
    return blend(x, y, rng.beta(alpha, alpha), torch.from_numpy(rng.permutation(len(x))))


def reads_the_device(x, y, alpha=1.0):
    return mixup(x, y + 0 * x.sum().item(), alpha)


# Thousands of calls: that ours take and give the right shapes is seen in test_contract.py.
pytestmark = pytest.mark.usefixtures("without_shape_checks")


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.bench, "DRAWS", 500)


def subject(mix: Callable, alphas: tuple[float, ...] = (), **options: object) -> probes.Subject:
    """A function (x, y, alpha) as a subject."""
    make = lambda alpha: lambda x, y: mix(x, y, **({} if alpha is None else {"alpha": alpha}))  # noqa: E731
    return probes.Subject(make, probes.seed_globals, alphas, **({"draws": 3000} | options))


def cut_with(box: Callable) -> Callable:
    """CutMix with another box."""
    return lambda x, y, alpha=1.0: cutmix(x, y, alpha, box)


def found(name: str, mix: Callable, alphas: tuple[float, ...] = (), **options: object) -> probes.Finding:
    """What one probe says."""
    return probes.PROBES[name](probes.Bench(subject(mix, alphas, **options)))


CAUGHT = [
    ("pixel share = label share", other_label, ()),
    ("pixel share = label share", label_by_the_unclipped_area, ()),
    ("targets are distributions", partner_s_label_whole, ()),
    ("law of lambda", always_uniform, (0.2,)),
    ("law of lambda", folded, (1.0,)),
    ("law of lambda", cut_with(no_clipping), (1.0,)),
    ("law of lambda", cut_with(swapped), (1.0,)),
    ("law of lambda", cut_with(a_pixel_more), (1.0,)),
    ("any batch size", even_batches, ()),
    ("any batch size", squeezes, ()),
    ("caller's tensors untouched", in_place, ()),
    ("caller's tensors untouched", in_place_labels, ()),
    ("float64 and bfloat16 kept", always_float32, ()),
    ("the same under a seed", unseeded, ()),
    ("pixel share = label share", no_numbers, ()),
    ("targets are distributions", no_numbers, ()),
]


@pytest.mark.parametrize(("name", "mix", "alphas"), CAUGHT)
def test_the_probe_catches_it(name: str, mix: Callable, alphas: tuple[float, ...]) -> None:
    assert found(name, mix, alphas).holds is False


@pytest.mark.parametrize("name", ["reads nothing from the device", "global generators"])
def test_what_only_ours_promise_is_a_fault_of_ours_and_a_fact_of_others(name: str) -> None:
    assert found(name, reads_the_device, is_mixer=True).holds is False
    fact = found(name, reads_the_device)
    assert fact.holds is None
    assert fact.found.startswith(("no: RuntimeError", "moves numpy"))


def test_a_box_that_declares_no_law_of_cutmix_is_not_judged_by_it() -> None:
    holds, text = found("law of lambda", cut_with(no_clipping), (1.0,), boxes_as_cutmix=False)
    assert holds is None
    assert "law:" not in text


def test_images_left_to_the_network_are_a_fact_of_a_mixer_and_a_fault_of_a_function() -> None:
    labels_only = after(lambda mixed, target, x, y: (x, target))
    assert found("pixel share = label share", labels_only).holds is False
    holds, text = found("pixel share = label share", labels_only, is_mixer=True)
    assert holds
    assert int(text.removeprefix("off by 0, ").split()[0]) > 180  # of 200; one permutation of 24 moves nothing


def test_every_probe_that_can_fail_is_seen_failing() -> None:
    failing = {name for name, *_ in CAUGHT} | {"reads nothing from the device", "global generators"}
    facts = {"labels it takes", "kind of mix", "one lambda per", "pairing"}
    assert failing | facts == set(probes.PROBES)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_no_fault_is_found_with_what_is_right(mix: Callable) -> None:
    findings = probes.probe(subject(mix, (0.2, 1.0)))
    assert [name for name, finding in findings.items() if finding.holds is False] == []
    assert findings["law of lambda"].holds
    assert findings["kind of mix"].found == ("blend" if mix is mixup else "box")
    assert findings["labels it takes"].found == "one-hot"
    assert findings["one lambda per"].found == "batch"


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_no_fault_is_found_with_ours(name: str) -> None:
    made, factory = conformance.subject(name, None)
    assert factory is not None
    findings = probes.probe(made)
    assert {finding.holds for finding in findings.values()} == {True, None}
    assert findings["global generators"] == (True, "left alone")


def per_sample(x, y):
    lam = torch.from_numpy(np.random.beta(1, 1, len(x))).float()
    index = permutation(x)
    return torch.lerp(x[index], x, lam[:, None, None, None]), torch.lerp(y[index], y, lam[:, None])


def paired(partner):
    """Mixup with lambda 0.3 and the partners ``partner(positions)``."""
    return lambda x, y: blend(x, y, 0.3, partner(torch.arange(len(x))))


def striped(x, y):
    mask = (torch.arange(x.shape[-1]) % 2 == 0).to(x.dtype)
    return mask * x + (1 - mask) * x.flip(0), 0.5 * y + 0.5 * y.flip(0)


def test_facts_are_told_as_they_are() -> None:
    flip = paired(lambda i: i.flip(0))
    drawn = paired(lambda i: torch.from_numpy(np.random.randint(len(i), size=len(i))))
    assert found("one lambda per", per_sample).found == "sample"
    assert found("pairing", flip).found == "flip, 0.00 of 8 with themselves"
    assert found("pairing", paired(lambda i: i.roll(1))).found == "roll by 1, 0.00 of 8 with themselves"
    assert found("pairing", drawn).found.startswith("random, some images used twice, ")
    text, fixed = found("pairing", mixup).found.rsplit(", ", 1)
    assert text == "random permutation"
    assert float(fixed.split()[0]) == pytest.approx(1, abs=0.25)  # a permutation has one fixed point on average
    assert found("kind of mix", striped).found == "mask"
    assert found("labels it takes", lambda x, y: mixup(x, F.one_hot(y, 100).float())).found == "classes"
    assert found("law of lambda", flip) == (None, "mean 0.300, 0.0 % outside [.01, .99], folded")


def test_box_law_is_that_worked_out_by_hand() -> None:
    # alpha 1, 4 x 4: the half side is 0 for sqrt(1-lam) < 1/2, a quarter of the time, else 1; then a centre at the
    # border leaves 1 row of 4, another one 2 rows: areas 1, 2, 4 in 1, 6, 9 of 16 cases
    own, chance = probes.box_law(4, 4, 1.0)
    law = {round(16 * o): c for o, c in zip(own.tolist(), chance.tolist(), strict=True) if c}
    assert law == pytest.approx({12: 0.75 * 9 / 16, 14: 0.75 * 6 / 16, 15: 0.75 / 16, 16: 0.25})


@pytest.mark.parametrize(("height", "width", "alpha"), [(5, 8, 1.0), (16, 32, 0.2)])
def test_box_law_is_that_of_many_boxes(height: int, width: int, alpha: float) -> None:
    np.random.seed(0)
    boxes = [box(height, width, np.random.beta(alpha, alpha)) for _ in range(20_000)]
    areas = [(r.stop - r.start) * (c.stop - c.start) for r, c in boxes]
    own, chance = probes.box_law(height, width, alpha)
    assert chance.sum() == pytest.approx(1)
    seen = np.bincount(areas, minlength=height * width + 1)[::-1] / len(areas)
    assert np.abs(seen.cumsum() - chance.cumsum()).max() < 0.014  # Kolmogorov's 99.9 % bound is 1.95 / sqrt(20,000)
    assert own @ chance == pytest.approx(1 - np.mean(areas) / (height * width), abs=0.01)


def test_lambdas_that_float32_rounds_to_the_ends_are_no_fault() -> None:
    lam = np.random.default_rng(0).beta(0.05, 0.05, 8000).astype(np.float32).astype(float)
    assert (lam == 1).mean() > 0.1
    assert probes.judge(lam, 0.05, box=False)[1] > 0.01


# --------------------------------------------------------------------------------------------- targets


FILE = """
import numpy as np
import torch
import torch.nn.functional as F
from mixers import Mixup


class Mine(Mixup):
    pass


class Writes(Mixup):
    def mix(self, x, y, **plan):
        mixed, target = super().mix(x, y, **plan)
        return x.copy_(mixed), target


def factory():
    return Mixup(0.3)


class Transform:
    def __init__(self, alpha=1.0):
        self.alpha = alpha

    def __call__(self, x, labels):
        return function(x, F.one_hot(labels, 12).float(), self.alpha)


def function(x, y, alpha=1.0):
    lam, index = np.random.beta(alpha, alpha), torch.from_numpy(np.random.permutation(len(x)))
    return lam * x + (1 - lam) * x[index], lam * y + (1 - lam) * y[index]


def half(x, y):
    return 0.5 * x + 0.5 * x.flip(0), 0.5 * y + 0.5 * y.flip(0)


def needs_three(x, y, z):
    return x, y


def only_images(x, y):
    return x


def number():
    return 3


CONSTANT = 3
mine = Mixup(0.5)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


@pytest.mark.parametrize(
    ("name", "alphas", "is_mixer"),
    [
        ("Mine", (0.2, 1.0), True),
        ("factory", (), True),
        ("mine", (), True),
        ("Transform", (0.2, 1.0), False),
        ("function", (0.2, 1.0), False),
        ("half", (), False),
    ],
)
def test_a_callable_of_a_file_is_understood(file: Path, name: str, alphas: tuple, is_mixer: bool) -> None:
    made, factory = conformance.subject(f"{file}:{name}", None)
    assert (made.alphas, factory is not None) == (alphas, is_mixer)
    mixed, target = made.make(None)(torch.rand(2, 3, 8, 8), torch.arange(2) if name == "Transform" else torch.eye(2))
    assert mixed.shape == (2, 3, 8, 8)
    assert target.sum(1).tolist() == pytest.approx([1, 1])
    assert conformance.subject(f"{file}:{name}", 0.7)[0].alphas == (() if name in ("factory", "mine") else (0.7,))


def test_a_declared_alpha_reaches_the_callable(file: Path) -> None:
    for name in ("Mine", "Transform", "function"):
        made, _ = conformance.subject(f"{file}:{name}", 5.0)
        bench = probes.Bench(dataclasses.replace(made, draws=2000))
        lam = probes.lambdas(bench, 5.0)
        assert lam.std() == pytest.approx(1 / math.sqrt(44), rel=0.1)  # of Beta(5, 5): 1 / sqrt(4 (2a + 1))


def test_a_mixer_meets_the_contract_s_checks_too(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (report,) = conformance.check([f"{file}:Writes"], None)
    assert not report.passed
    assert [line.split(":")[0] for line in report.failures if line.startswith("inputs")] == ["inputs_untouched"]
    passed = len(CHECKS) - len(report.failures)
    assert report.findings["checks of the contract"] == (False, f"{passed} of {len(CHECKS)}")
    assert f"{file}:Writes: inputs_untouched: expected" in conformance.table([report])
    (mine,) = conformance.check([f"{file}:mine"], None)
    assert mine.passed


def test_a_table_has_a_row_per_probe_and_a_column_per_target_and_the_status_tells_a_fault(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = jobs.check(f"{file}:half", "timm:mixup", alpha=1.0, format="md")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[:-3]]
    assert status == 1
    assert rows[0] == ["", f"{file}:half", "timm:mixup"]
    cells = {row[0]: row[1:] for row in rows[2:]}
    assert set(cells) == set(probes.PROBES)
    assert cells["pairing"] == ["flip, 0.00 of 8 with themselves"] * 2
    assert cells["caller's tensors untouched"] == ["ok: yes", "FAILS: writes into images"]
    assert cells["any batch size"] == [
        "ok: 1, 2, 3, 7",
        "FAILS: 1: AssertionError; 3: AssertionError; 7: AssertionError",
    ]
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
    "{mine}": "{mine}: which callable? {mine}:NAME; it has Mine, Writes, factory, Transform, function, half, ",
    "{mine}:needs_three": "{mine}:needs_three needs x, y, z; expected a Mixer, a factory without required ",
    "{mine}:number": "{mine}:number makes a int; expected a Mixer, or something called with (x, y)",
    "{mine}:only_images": "{mine}:only_images: expected mix(x, y) -> (images, float targets (B, K)); with classes: ",
    "{divides}:f": "cannot import {divides}: ZeroDivisionError: division by zero",
    "{leaves}:a": "cannot import {leaves}: SystemExit",
    "{exits}:a": "{exits}:a: expected mix(x, y) -> (images, float targets (B, K)); with classes: SystemExit",
    "{raises}:a": "{raises}:a cannot be made: ValueError: nope",
}


@pytest.mark.parametrize("target", MISTAKES)
def test_a_mistake_is_one_line(file: Path, target: str) -> None:
    files = {"mine": file} | {name: file.with_name(f"{name}.py") for name in BROKEN}
    for name, text in BROKEN.items():
        files[name].write_text(text)
    with pytest.raises(UserError) as error:
        conformance.check([target.format(**files)])
    assert str(error.value).startswith(MISTAKES[target].format(**files))
    assert "\n" not in str(error.value)


def test_no_target_and_a_wrong_alpha_are_one_line() -> None:
    with pytest.raises(UserError, match=r"check what\? a mixer .*cutmix.*, timm:mixup"):
        conformance.check([])
    with pytest.raises(UserError, match="alpha: expected a number above 0, got 0"):
        conformance.check(["mixup"], 0)


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_can_be_probed(name: str) -> None:
    made, _ = conformance.subject(name, None)
    bench = probes.Bench(made)
    for probe in ("targets are distributions", "the same under a seed", "any batch size", "caller's tensors untouched"):
        assert probes.PROBES[probe](bench).holds is True, probe
