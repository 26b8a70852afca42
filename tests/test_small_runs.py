"""Promise: what was trained here is shown from the records, seed by seed, and nothing that has not finished."""

import copy
import sys
from typing import Any

import pytest

import mixup_recipes
from model_cards import records
from model_cards.small_runs import small_runs
from recipes import UserError

REAL = records.load()["cifar10_vit_mixup"]


def record(mixer: str, tops: dict[str, float], **overrides: Any) -> dict[str, Any]:
    """The record of a recipe of cifar10_vit with these seeds."""
    content = copy.deepcopy(REAL)
    content["recipe"], content["fields"]["mixer"] = f"cifar10_vit_{mixer}", mixer
    seed = content["seeds"]["0"]
    content["seeds"] = {k: seed | {"top1": v, "nll": v / 10, "ece": v / 4} for k, v in tops.items()}
    content["overrides"] = overrides or None
    return content


FOUND = {
    "a": record("vanilla", {"0": 30.0, "1": 32.0}),
    "b": record("cutmix", {"0": 31.0, "1": 32.5, "10": 36.0, "2": 33.5}),
    "c": record("mixup", {"1": 31.0}),
    "d": record("supermix", {"0": 34.0}, mixer_args=[{"supermix": {"steps": 1}}, {"supermix": {"steps": 5}}]),
    "other": REAL | {"recipe": "quickstart_mixup"},
    "mine": REAL | {"recipe": "something"},
}


def cells(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


def test_every_mixer_of_the_setting_stands_beside_the_same_seeds_of_the_base() -> None:
    found = cells(small_runs("cifar10_vit", FOUND))
    assert list(found) == ["supermix (steps=5)", "cutmix", "vanilla", "mixup"]  # best mean first
    assert found["cutmix"] == ["0, 1, 2, 10", "33.25 ± 2.10", "+0.75 (+0.50 to +1.00)", "3.325 ± 0.210", "8.31 ± 0.53"]
    assert found["vanilla"][2] == "-" and found["mixup"] == ["1", "31.00", "-1.00", "3.100", "7.75"]


def test_another_base() -> None:
    found = cells(small_runs("cifar10_vit", FOUND, "mixup"))
    assert found["cutmix"][2] == "+1.50" and found["mixup"][2] == "-" and found["supermix (steps=5)"][2] == "-"


def test_a_seed_that_has_not_finished_is_not_shown() -> None:
    content = record("cutmix", {"0": 31.0, "1": 32.5})
    content["seeds"]["1"] = content["seeds"]["1"] | {"epochs": 3}
    assert cells(small_runs("cifar10_vit", FOUND | {"b": content}))["cutmix"][0] == "0"
    content["seeds"]["0"] = content["seeds"]["0"] | {"epochs": 3}
    assert "cutmix" not in cells(small_runs("cifar10_vit", FOUND | {"b": content}))


@pytest.mark.parametrize(
    ("setting", "against", "says"),
    [
        ("cifar10_vot", "vanilla", "unknown setting 'cifar10_vot'; did you mean 'cifar10_vit'?"),
        ("cifar10_vit", "mixupp", "no finished run of cifar10_vit_mixupp is recorded; did you mean 'mixup'?"),
        ("deit_s", "vanilla", "no finished run of deit_s_vanilla is recorded; there is none of this setting"),
    ],
)
def test_a_mistake_is_one_line(setting: str, against: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        small_runs(setting, FOUND, against)
    assert str(caught.value) == says


def test_the_command_prints_the_table_of_the_package(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["mixup-recipes", "table", "--setting", "cifar10_vit", "--against", "mixup"])
    with pytest.raises(SystemExit) as end:
        mixup_recipes.main()
    assert not end.value.code
    assert capsys.readouterr().out == small_runs("cifar10_vit", records.load(), "mixup")


def test_a_setting_is_no_benchmark(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["mixup-recipes", "table", "--setting", "cifar10_vit", "--format", "latex"])
    with pytest.raises(SystemExit) as end:
        mixup_recipes.main()
    assert end.value.code == 2
    assert "--setting takes neither --benchmark nor a --format other than md" in capsys.readouterr().err
