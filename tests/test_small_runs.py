"""Promise: what was trained here is shown from the records, seed by seed, and nothing that has not finished."""

import copy
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import markdown_rows

import mixup_recipes.benchmark.small_runs as small_runs_module
from mixup_recipes.benchmark.agreement import rank_correlation
from mixup_recipes.benchmark.small_runs import Point, points, small_runs
from mixup_recipes.pages.record_plot import cost_of_records, figure_of
from mixup_recipes.runs import records
from mixup_recipes.typed import UserError

REAL = records.all_records()["cifar10_vit_mixup"]


def record(mixer: str, tops: dict[str, float], **overrides: Any) -> dict[str, Any]:
    """The record of a recipe of cifar10_vit with these seeds."""
    content = copy.deepcopy(REAL)
    content["recipe"], content["fields"]["mixer"] = f"cifar10_vit_{mixer}", mixer
    seed = content["seeds"]["0"]
    content["seeds"] = {k: seed | {"top1": v, "nll": v / 10, "ece": v / 4} for k, v in tops.items()}
    return content | {"overrides": overrides or None}


FOUND = {
    "a": record("vanilla", {"0": 30.0, "1": 32.0}),
    "b": record("cutmix", {"0": 31.0, "1": 32.5, "10": 36.0, "2": 33.5}),
    "c": record("mixup", {"1": 31.0}),
    "d": record("supermix", {"0": 34.0}, mixer_args=[{"supermix": {"steps": 1}}, {"supermix": {"steps": 5}}]),
    "other": REAL | {"recipe": "quickstart_mixup"},
    "mine": REAL | {"recipe": "something"},
}


def cells(*against, **changed):
    """The rows of the table by mixer."""
    return {row[0]: row[1:] for row in markdown_rows(small_runs("cifar10_vit", FOUND | changed, *against))[1:]}


def test_every_mixer_of_the_setting_stands_beside_the_same_seeds_of_the_base():
    found, other = cells(), cells("mixup")
    assert list(found) == ["supermix (steps=5)", "cutmix", "vanilla", "mixup"]  # best mean first
    assert found["cutmix"] == [
        *("0, 1, 2, 10", "33.25 ± 2.10", "+0.75 (+0.50 to +1.00)", "±5.42", "3.325 ± 0.210", "8.31 ± 0.53")
    ]
    assert found["vanilla"][2:4] == ["-", "-"] and found["mixup"] == ["1", "31.00", "-1.00", "±7.67", "3.100", "7.75"]
    assert [other[mixer][2] for mixer in ("cutmix", "mixup", "supermix (steps=5)")] == ["+1.50", "-", "-"]


def test_the_interval_is_students_of_the_spread_that_all_mixers_share_over_the_seeds_in_both():
    values = {"vanilla": [30.0, 32.0], "cutmix": [31.0, 32.5, 33.5, 36.0], "mixup": [31.0], "supermix": [34.0]}
    off = [v - statistics.fmean(group) for group in values.values() for v in group]
    deviation = math.sqrt(sum(v * v for v in off) / 4)  # eight runs of four mixers
    by_seeds = {2: "cutmix", 1: "mixup"}
    for seeds, mixer in by_seeds.items():
        t = 2.7764451  # Student's t of 4 degrees of freedom, 97.5 %
        assert cells()[mixer][3] == f"±{t * deviation * math.sqrt(1 / seeds + 1 / seeds):.2f}"
    lone = {"a": record("vanilla", {"0": 30.0}), "b": record("cutmix", {"0": 31.0})}
    assert markdown_rows(small_runs("cifar10_vit", lone))[1][4] == "-"  # no spread was seen


def test_time_is_what_was_measured_for_the_setting(monkeypatch):
    costs = [
        {"setting": s, "mixer": m, "time": t} for s, m, t in (("cifar10_vit", "cutmix", "1.746"), ("x", "mixup", 3))
    ]
    assert "time" not in markdown_rows(small_runs("cifar10_vit", FOUND))[0]
    monkeypatch.setattr(small_runs_module, "table", {"small_costs.csv": costs}.get)
    rows = {row[0]: row[-1] for row in markdown_rows(small_runs("cifar10_vit", FOUND))}
    assert [rows[mixer] for mixer in ("mixer", "cutmix", "mixup")] == ["time", "1.75x", "-"]


def test_the_picture_names_the_best_mixers_and_those_that_take_long(monkeypatch, tmp_path):
    costs = [{"setting": "cifar10_vit", "mixer": f"m{i}", "time": 1.0 + i / 12} for i in range(7)]
    monkeypatch.setattr(small_runs_module, "table", {"small_costs.csv": costs}.get)
    with pytest.raises(UserError, match="no time of a mixer of which a run of cifar10_vit is recorded"):
        points("cifar10_vit", FOUND)
    made = [Point("vanilla", 1.0, [20.0])]
    made += [Point(row["mixer"], row["time"], [30.0 - i, 31.0 - i]) for i, row in enumerate(costs)]
    (panel,) = figure_of("cifar10_vit", made).axes
    assert {text.get_text() for text in panel.texts} == {"vanilla", "m0", "m1", "m2", "m3", "m4", "m6"}  # m6: 1.5 times
    costs[0]["mixer"] = "cutmix"
    assert [(point.mixer, point.time) for point in points("cifar10_vit", FOUND)] == [("cutmix", 1.0)]
    with pytest.raises(UserError, match=r"ends in \.png or \.svg"):
        cost_of_records("cifar10_vit", made, tmp_path / "a.pdf")
    cost_of_records("cifar10_vit", made, tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.svg"]


def test_what_the_suite_of_robustness_found_has_columns_if_all_was_measured_alike():
    found = copy.deepcopy(FOUND)
    suite = {"data": {"images": 100}, "budgets": {"occlusion": 1}, "clean": {}, "occlusion": {"auc": 40.0}}
    shown = [content for content in found.values() if content["fields"]["mixer"] in ("vanilla", "cutmix")]
    for content in shown:
        for seed, top in zip(content["seeds"].values(), (40.0, 43.0), strict=False):  # of the first two seeds
            seed["robustness"] = suite | {"occlusion": {"auc": top}, "corruptions": {"mean": 100 - top}}
    text = small_runs("cifar10_vit", found)
    rows = {row[0]: row[-2:] for row in markdown_rows(text)}
    assert rows["mixer"] == ["corrupted", "occluded"] and rows["mixup"] == ["-", "-"]
    assert rows["cutmix"] == ["41.50 ± 2.12"] * 2
    assert 'top-1 of at most 2 of the seeds of each mixer, on 100 images ("corrupted": on corrupted images' in text
    last = next(iter(shown[0]["seeds"].values()))["robustness"]
    last["budgets"] = {"occlusion": 2}
    text = small_runs("cifar10_vit", found)
    assert (
        markdown_rows(text)[0][-1] == "corrupted"
        and "Not measured alike for all runs, and so left out: occluded." in text
    )


def test_the_order_of_the_mixers_is_compared_with_published_tables(monkeypatch):
    tables = {
        "one": dict(zip("abcdef", (1, 2, 3, 4, 5, 9), strict=True)),
        "two": dict(zip("edcba", range(1, 6), strict=True)),
    }
    monkeypatch.setattr(small_runs_module, "published_tops", lambda s: {k: [v] for k, v in tables[s].items()})
    ours = {"a": [10.0, 12.0], "b": [12.0, 12.4], "c": [13.0], "d": [15.0], "e": [14.0], "z": [99.0]}
    rows = markdown_rows(small_runs_module.order(ours, ("one", "two")))
    found = {row[0]: row[1:] for row in rows}
    # by hand, without ties: 1 - 6 sum(d^2) / (n (n^2 - 1)), the places of d and e are exchanged
    assert found["ours and `one`"][0] == "5" and found["ours and `one`"][1].startswith(f"{1 - 6 * 2 / (5 * 24):.2f} (")
    assert found["ours and `two`"][1].startswith(f"-{1 - 6 * 2 / (5 * 24):.2f} (")
    assert found["`one` and `two`"] == ["5", "-1.00 (-1.00 to -1.00)"]
    assert found["d"] == ["1 of 5", "3.0", "4 of 8"]  # 2nd and 4th there; ahead of a, b, c as in one, of e as in two
    assert "z" not in found and "f" not in found


def test_the_interval_of_a_rank_correlation_knows_noise_and_how_few_mixers_there_are():
    rng = np.random.default_rng(0)
    low = {}
    for mixers, noise in ((6, 0.0), (30, 0.0), (30, 30.0)):
        theirs = {str(i): [float(i)] for i in range(mixers)}
        ours = {name: [value + noise * float(rng.normal()) for _ in range(3)] for name, (value,) in theirs.items()}
        found = rank_correlation(ours, theirs)
        assert (
            found.low <= found.rho + 1e-9 and found.rho <= found.high + 1e-9 and found == rank_correlation(ours, theirs)
        )
        low[mixers, noise] = found.low
    assert min(low[6, 0.0], low[30, 0.0]) > 1 - 1e-9 and low[30, 30.0] < 0.5
    with pytest.raises(UserError, match=r"needs 5 common mixers or more, got 0, 1, 2, 3$"):
        rank_correlation({str(i): [1.0] for i in range(4)}, theirs)


def test_an_argument_that_a_run_left_out_is_shown_too_and_the_folder_is_named():
    content = record("cutmix", {"0": 31.0}, lr=[0.1, 0.2], mixer_args=[{"cutmix": {"alpha": 1.0}}, {"cutmix": {}}])
    assert "cutmix (lr=0.2, alpha=None)" in cells(b=content)
    made = "Generated by `mixup-recipes table --setting cifar10_vit --results my`.\n"
    assert small_runs("cifar10_vit", FOUND, results=Path("my")).endswith("Reported: last epoch. " + made)


def test_a_row_says_that_its_runs_followed_an_earlier_law_of_the_mixer():
    content = record("guidedmix", {"0": 31.0})
    assert "guidedmix (by an earlier law)" in cells(g=content)
    content["seeds"]["0"]["env"] = content["seeds"]["0"]["env"] | {"laws": ["guidedmix@kang-2023.2"]}
    assert "guidedmix" in cells(g=content)


def test_a_seed_that_has_not_finished_is_not_shown():
    content = record("cutmix", {"0": 31.0, "1": 32.5})
    content["seeds"]["1"]["epochs"] = 3
    assert cells(b=content)["cutmix"][0] == "0"
    content["seeds"]["0"]["epochs"] = 3
    assert "cutmix" not in cells(b=content)


def test_a_mistake_is_one_line():
    takes = "--against takes one of: vanilla, cutmix, mixup, 'supermix (steps=5)'"
    for setting, against, says in (
        ("cifar10_vot", "vanilla", "unknown setting 'cifar10_vot'; did you mean 'cifar10_vit'?"),
        ("cifar10_vit", "mixupp", f"no finished run of cifar10_vit_mixupp is recorded; {takes}"),
        ("deit_s", "vanilla", "no finished run of deit_s_vanilla is recorded; the setting has no records"),
    ):
        with pytest.raises(UserError) as caught:
            small_runs(setting, FOUND, against)
        assert str(caught.value) == says


def test_the_command_prints_the_table_of_the_package_and_no_setting_is_a_benchmark(console):
    setting, shown = ("--setting", "cifar10_vit"), small_runs("cifar10_vit", records.all_records(), "mixup")
    assert console("table", *setting, "--against", "mixup") == (0, shown, "")
    for more, says in {
        (*setting, "--format", "latex"): "Markdown and without --benchmark, got latex",
        (*setting, "--out", "table.csv"): "Markdown and without --benchmark, got csv",
        (*setting, "--benchmark", "deit"): "Markdown and without --benchmark, got deit",
        ("--against", "mixup"): "--against mixup needs --setting",
        ("--beside", "cifar10_r18_200e"): "--beside cifar10_r18_200e needs --setting",
        ("--plot", "a.png"): "--plot needs --setting",
        ("--setting", "small_data", "--plot", "a.gif"): "a.gif: expected a file name that ends in .png or .svg",
        (
            *setting,
            "--beside",
            "cifar10_r18_20e",
        ): "unknown setting 'cifar10_r18_20e'; did you mean 'cifar10_r18_200e'?",
        ("--setting", "cifar10_small", "--beside", "quickstart"): "no published cell has setting 'quickstart'",
    }.items():
        status, _, err = console("table", *more)
        assert status == 2 and says in err
