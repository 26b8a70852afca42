"""Promise: every published cell is an object with its number, marks, protocol and recipe."""

import csv
import dataclasses
import hashlib
import re
from collections import Counter
from unittest.mock import Mock

import pytest
from runs import make_run
from tiny import ROOT

from mixers import MIXERS
from mixup_recipes.benchmark import cells
from mixup_recipes.benchmark.listing import describe, difference
from mixup_recipes.benchmark.published import published
from mixup_recipes.resolve import load_recipe, resolve, settings
from mixup_recipes.runs.run import Run
from mixup_recipes.typed import UserError

CELLS = list(cells.cells().values())


def test_numbers_rows_marks_dates_and_upstream_configs_are_those_of_the_published_tables():
    assert (len(CELLS), sum(c.top1 is not None for c in CELLS)) == (828, 771)
    all_, numbered = (Counter((c.page, c.benchmark) for c in CELLS if c.top1 is not None or not n) for n in (0, 1))
    assert {" ".join(key): (all_[key], numbered[key]) for key in all_} == {
        "imagenet pytorch_100e": (85, 58), "imagenet pytorch_300e": (48, 42), "imagenet rsb_a3": (33, 33),
        "imagenet rsb_a2": (33, 32), "imagenet deit": (98, 89), "imagenet tiny": (32, 30), "cifar cifar10": (108, 105),
        "cifar cifar100": (130, 127), "cifar cifar100_vit": (84, 81), "fine_grained cub200": (20, 20),
        "fine_grained aircraft": (20, 20), "fine_grained inat2017": (30, 29), "fine_grained inat2018": (20, 20),
        "fine_grained places205": (20, 20), "imagenet_2025 deit": (15, 13), "awesome deit": (21, 21),
        "awesome cifar10": (1, 1), "awesome cifar100": (3, 3),
        "awesome pytorch_300e": (1, 1), "awesome tiny": (1, 1),
        "adautomix pytorch_100e": (3, 3), "adautomix tiny": (2, 2), "adautomix cifar100": (2, 2),
        "adautomix cifar100_vit": (2, 2), "adautomix cub200": (1, 1), "adautomix aircraft": (2, 2),
        "sumix pytorch_100e": (1, 1), "sumix tiny": (2, 2), "sumix cifar100": (3, 3), "sumix cifar100_vit": (2, 2),
        "sumix cub200": (2, 2), "sumix aircraft": (2, 2), "mergemix deit": (1, 1),
    }  # fmt: skip
    # the hashes were taken from the published tables, apart from this package's file
    seed = [c for c in CELLS if c.page == "imagenet"]
    numbers = sorted(f"{c.setting} {c.mixer} {c.top1:.2f}" for c in seed if c.top1 is not None)
    digest = hashlib.sha256("\n".join(numbers).encode()).hexdigest()
    assert digest == "e8b8de9e933304e7632b255a459bd7c4be0e35f69a82287b7fe65429aa97bcbc"
    more = [c for c in CELLS if c.page in ("cifar", "fine_grained", "imagenet_2025")]
    network = re.compile(r"(?:cifar100?_|cub_|aircraft_|inat1[78]_|places_)?(.+?)(?:_\d+e)?")
    lines = [
        f"{c.benchmark} {load_recipe(c.setting).epochs} {c.method} {c.alpha.replace(' ', '')} "
        f"{'' if c.top1 is None else f'{c.top1:.2f}'} {c.source} {network.fullmatch(c.setting)[1]}"
        for c in more
    ]
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    assert digest == "f65b5dfd8215a414e23f1c0558e6f359e2dfa78103c4bcfd8c0aa25be9089a5b"
    assert [*cells.titles()] == [*dict.fromkeys(c.benchmark for c in CELLS)]
    assert {c.page for c in CELLS} == {row["page"] for row in cells.rows("pages.csv")}
    assert list(dict.fromkeys(c.method for c in seed if c.benchmark == "deit")) == [
        "Vanilla", "DeiT", "MixUp", "CutMix", "ManifoldMix", "AttentiveMix+", "SaliencyMix", "PuzzleMix", "FMix",
        "ResizeMix", "TransMix", "TokenMix", "AutoMix", "SAMix",
    ]  # fmt: skip
    assert {f"{c.name} {c.top1} {c.method} ({c.alpha}) {c.source}" for c in CELLS} >= {
        "r18_100e_vanilla 70.04 Vanilla () own", "rx101_100e_samix 80.98 SAMix (2) arxiv",
        "r50_100e_deit 77.27 DeiT (0.8, 1) own", "r101_100e_deit None DeiT (0.8, 1) own",
        "r50_100e_supermix 77.63 SuperMix (2) official", "r101_300e_puzzlemix 80.67 PuzzleMix (1) own",
        "r50_300e_alignmix 79.32 AlignMix (2) official", "mbv2_rsb_a3_attentivemix 67.32 AttentiveMix+ (2) own",
        "r50_rsb_a2_samix None SAMix (2) own", "effb0_rsb_a2_fmix 77.33 FMix (0.2) arxiv",
        "deit_s_samix 80.94 SAMix (2) arxiv", "moganet_t_deit 79.02 DeiT (0.8, 1) own",
        "deit_b_tokenmix 82.9 TokenMix (0.8, 1) official", "tiny_r18_smoothmix 66.65 SmoothMix (0.2) own",
        "tiny_rx50_grafting None Grafting (1) official",
    }  # fmt: skip
    foreign = {c.method for c in CELLS if not c.trained_upstream}
    assert foreign == {
        "Co-Mixup", "SuperMix", "Grafting", "AlignMix", "TokenMix", "AdAutoMix", "TL-Align", "SMMix", "MixPro",
        "CutMix+SUMix", "MergeMix", "LUMix", "Catch-up Mix",
    }  # fmt: skip
    assert {c.method for c in CELLS if c.source == "arxiv"} == {"FMix", "ResizeMix", "SAMix"}
    for c in CELLS:
        assert (c.source == "official") != c.trained_upstream and bool(c.first_seen) == (c.top1 is not None)
    # Published after OpenMixup changed its initialisation: all of DeiT-B's 13 and 8 others
    late = [c for c in seed if c.first_seen > cells.NEW_INIT]
    assert len(late) == 21 and sum(c.setting == "deit_b" for c in late) == 13
    assert cells.find("deit_s_samix").first_seen == "2022-03-31"
    names = {kind: {c.name for c in CELLS if c.upstream_config == kind} for kind in ("yes", "base", "no")}
    assert sum(map(len, names.values())) == 828
    assert {c.benchmark for c in seed if c.upstream_config == "base"} == {"rsb_a3", "rsb_a2"}
    assert {
        "r50_100e_gridmix", "r50_100e_deit", "deit_s_samix", "deit_b_automix", "deit_t_tokenmix",
        "r50_rsb_a3_automix", "pvt_t_transmix",
    } <= names["no"]  # fmt: skip
    assert {"deit_s_automix", "r50_rsb_a2_rsb", "tiny_r18_gridmix", "r50_300e_alignmix"} <= names["yes"]


def test_every_cell_is_of_a_setting_and_a_mixer_and_can_be_described():
    of_settings = {c.setting for c in CELLS}
    assert len(of_settings) == 59 and of_settings <= set(settings())  # the 60th, rx101_300e, has no column
    assert {c.mixer for c in CELLS} <= set(MIXERS)
    words = {c.name: describe(c) for c in CELLS}
    commands = {name for name, text in words.items() if f"--recipe {name}" in text}
    assert {*words} - commands == {
        "swin_t_tlalign", "pvt_t_tlalign", "pvt_s_tlalign", "convnext_t_transmix", "convnext_t_tokenmix",
        "moganet_t_transmix", "moganet_t_tokenmix",
    }  # fmt: skip
    assert all("\nrun        cannot run here: " in words[name] for name in {*words} - commands)


def test_cells_are_selected_and_found_by_name_or_the_nearest_and_hours_are_the_setting_times_the_mixer():
    chosen = [c.name for c in cells.select(setting="tiny_r18", source="official", page="imagenet")]
    assert chosen == ["tiny_r18_comixup", "tiny_r18_grafting", "tiny_r18_alignmix"]
    assert len(cells.select(numbered=False)) == 57
    assert len(cells.select(True, benchmark="deit", page="imagenet", mixer=None)) == 89
    with pytest.raises(UserError, match="no published cell has benchmark 'diet'; did you mean 'deit'"):
        cells.select(benchmark="diet")
    with pytest.raises(UserError, match="unknown cell 'r50_100e_cutmx'; did you mean 'r50_100e_cutmix'"):
        cells.find("r50_100e_cutmx")
    rows = {r["name"]: r for r in csv.DictReader((ROOT / "model_cards/hours.csv").read_text().splitlines())}
    assert len([r for r in rows.values() if r["kind"] == "setting"]) == 60
    assert all("estimate" in r["basis"] for r in rows.values() if r["name"] != "vanilla")
    assert cells.hours(cells.find("r50_100e_vanilla")) == (5.31, 7.3, 9.74)
    assert cells.hours(cells.find("r50_100e_automix")) == pytest.approx((17.523, 24.09, 32.142))
    assert cells.hours(cells.find("r50_100e_cutmix")) == pytest.approx((5.31, 7.665, 10.714))


def test_describe_says_what_is_known_and_diff_shows_fields_mixer_arguments_and_numbers():
    for name, parts in {
        "deit_s_samix": (
            "80.94† top-1, alpha 2 as printed", "arXiv pre-print, trained by OpenMixup", "first seen 2022-03-31",
            "best epoch, mean of 3 trials", "upstream: none", "once with each --seed 0, 1, 2\n",
            "accelerate launch train_mixup.py --recipe deit_s_samix\n", "derived from AutoMix's",
            "55.9 on one H200 (41.9 to 83.8), an estimate, not measured", "published: not run here",
            "drop_path_rate is 0.1, and 0.0 in the rest of deit_s",
        ),
        "r18_100e_cutmix": ("ResNet-18",),  # alpha is not what is printed
        "moganet_t_deit": ("0.1 and CutMix 1",),
        "deit_b_cutmix": ("after OpenMixup changed its initialisation",),
        "r50_100e_comixup": ("not trained by OpenMixup",),
        "deit_s_manifoldmix": ("not run: no published number",),
        "cifar100_deit_s_600e_automix": ("known      OpenMixup's tool takes the best of four", "18.2 GB, 59 hours as"),
        "cifar100_rx50_200e_fmix": ("weight_decay is 0.0005, and", "its config 1e-4", "upstream: public", "37e1372"),
        "inat17_r18_puzzlemix": ("not run: no published number", "only a base config is public"),
        "deit_s_mixpro": (
            "measured   result of the method's official code", "Awesome-Mixup", "patches of 14", "not stated by its",
        ),
        "cub_r18_mixup": ("measured   trained by OpenMixup", "0.18 on one H200"),
    }.items():  # fmt: skip
        assert not [part for part in parts if part not in describe(cells.find(name))]
    lines = {line[:32].strip(): line[32:].split() for line in difference("deit_s_samix", "deit_s_deit").splitlines()}
    assert lines.items() >= {
        "mixer": ["samix", "deit"], "mixer.mixup_alpha": ["-", "0.8"], "drop_path_rate": ["0.1", "0.0"],
        "published top-1": ["80.94†", "79.80"], "difference": ["-1.14"],
    }.items()  # fmt: skip
    assert not {"seed", "name", "mixer_args"} & lines.keys()
    assert "no published cell" in difference("deit_s_deit", "quickstart_cutmix")


def test_the_published_numbers_beside_runs_are_those_of_their_setting(tmp_path):
    def run(name, called=None, **changes):
        recipe = dataclasses.replace(load_recipe(name, **changes), name=called or name)
        return [Run.open(make_run(tmp_path / "-".join((called or name, *changes)), recipe))]

    found = published(run("r18_300e_mixup"))
    assert found["mixup"] == 71.72 and found["vanilla"] == 71.83 and "deit" not in found
    assert len(found) == len(cells.select(setting="r18_300e", numbered=True))
    for runs, says in (
        (run("r18_300e_mixup", epochs=5), "is not a run of a published recipe: epochs 5 instead of 300"),
        (run("deit_s_mixup", "deit_s_mine"), "is not a run of a published recipe: 'deit_s_mine' is not published"),
        (run("quickstart_mixup"), "no published cell has setting 'quickstart'"),
        ([], "no run folders given"),
    ):
        with pytest.raises(UserError, match=says):
            published(runs)


def test_list_is_one_line_per_cell_explain_names_origins_and_show_knows_recipes_that_are_no_cells(console):
    status, out, _ = console("cells", "list", "--setting", "deit_s", "--numbered")
    *lines, last = out.splitlines()
    assert status == 0 and len(lines) == 18
    assert lines[12].split(maxsplit=2) == ["deit_s_samix", "80.94†", "published: not run here"]
    assert last.startswith("18 cells, 18 with a published number.")
    assert len(console("cells", "list")[1].splitlines()) == 829
    status, out, _ = console("cells", "explain", "r18_100e_saliencymix")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert status == 0 and rows["mixer"].endswith("recipe name")
    assert ".yaml" in rows["mixer_args.saliencymix.alpha"] and " 0.2 " in rows["mixer_args.saliencymix.alpha"]
    status, out, _ = console("cells", "show", "quickstart_cutmix")
    assert status == 0 and out.startswith("quickstart_cutmix is a recipe, but no published cell.\n")
    assert "\nmixer: cutmix\n" in out
    alone = console("cells", "show", "deit_s")
    assert "75.66 top-1" in alone[1] and alone == console("cells", "show", "deit_s_vanilla")


def test_export_gives_the_recipe_back(console, tmp_path):
    path = tmp_path / "recipe.yaml"
    assert console("cells", "export", "deit_s_samix", "--out", str(path))[0] == 0
    assert resolve(str(path))[0] == resolve("deit_s_samix")[0]
    assert console("cells", "export", "deit_s_samix")[1] == path.read_text()
    assert console("recipes", "show", str(path))[:2] == (0, path.read_text())
    assert console("recipes", "explain", str(path))[0] == 0
    assert console("recipes", "diff", str(path), "deit_s_mixup")[1].startswith("name ")
    for out, why in (("no/such.yaml", "No such file or directory"), ("", "Is a directory"), ("recipe.yaml/x", "Not a")):
        status, _, err = console("cells", "export", "deit_s_samix", "--out", str(tmp_path / out))
        assert status == 2 and err.startswith(f"error: cannot write {tmp_path / out}: {why}") and "resume" not in err
    assert list(tmp_path.iterdir()) == [path] and not list(tmp_path.parent.glob(".*.tmp"))


def test_what_is_withheld_or_unknown_is_one_line_and_leaves_with_2(console, tmp_path, monkeypatch):
    withheld = Mock(side_effect=PermissionError(13, "Permission denied", str(tmp_path)))
    monkeypatch.setattr(type(tmp_path), "iterdir", withheld)  # root may read everything
    for command in (("cells", "list", "--results"), ("protocol",)):
        assert console(*command, str(tmp_path)) == (2, "", f"error: {tmp_path}: Permission denied\n")
    says = "recipe 'deit_s_samx' has a known setting, 'deit_s', and an unknown mixer 'samx'; did you mean 'samix'?"
    for argv in ("show deit_s_samx", "explain deit_s_samx", "export deit_s_samx", "diff deit_s_deit deit_s_samx"):
        assert console("cells", *argv.split()) == (2, "", f"error: {says}\n")
    expected = "error: no published cell has mixer 'samx'; did you mean 'samix'?\n"
    assert console("cells", "list", "--mixer", "samx") == (2, "", expected)
