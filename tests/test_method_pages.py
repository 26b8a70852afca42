"""Promise: the pages of the methods say what the files and the records say, and what is said of a mixer was tried."""

import csv
import io
import re
import sys
import types
from collections import Counter

import numpy as np
import pytest
import teachers
import timm
import torch
from PIL import Image
from tiny import ROOT

from mixers import MIXERS, Mixup, signature
from mixers.registry import docstring
from mixup_recipes.benchmark import cells
from mixup_recipes.pages import method_facts, method_index, method_page, preview
from mixup_recipes.pages.method_index import COLUMNS, rendered
from mixup_recipes.pages.methods import KIND, METHODS, kinds, own, parse
from mixup_recipes.recipe import Recipe

FOLDER = ROOT / "docs/methods"
PAGES = {path.name: path.read_text() for path in FOLDER.glob("*.md")}
LINK = re.compile(r"(?<!\\)\]\((?!https?:)([^)#]+)(#[\w-]+)?\)")


def test_each_file_ends_with_what_its_method_changes_in_the_words_there_are():
    for name in own():
        last = docstring(name).split("\n\n")[-1]
        assert last.startswith("Kind: ") and KIND.fullmatch(last.removeprefix("Kind: ")), f"{name}: {last}"
        changes, teacher = kinds(parse(docstring(name)))
        assert len(set(changes)) == len(changes) and bool(changes) == (name != "vanilla"), name
        assert not teacher or "teacher" in signature(name).parameters, name
    for wrong in ("image.", "input", "input; feature.", "input,label.", "none, input.", "; teacher."):
        assert not KIND.fullmatch(wrong)


def test_the_pages_are_what_their_command_writes_and_every_picture_is_there_and_small():
    assert rendered() == PAGES
    pictures = {path.stem: path.stat().st_size for path in FOLDER.iterdir() if path.suffix != ".md"}
    drawn = {name for name, row in method_page.facts().items() if row["seed"]}
    assert set(pictures) == drawn == {name[:-3] for name, text in PAGES.items() if f"]({name[:-3]}.jpg)" in text}
    assert {name: size for name, size in pictures.items() if size > 60_000} == {} and sum(pictures.values()) < 2**21
    for name, text in PAGES.items():
        for link, anchor in LINK.findall(text):
            there = FOLDER / link
            assert there.exists(), f"{name}: {link}"
            if anchor and there.suffix == ".md":
                heads = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
                assert anchor[1:] in {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in heads}, (name, anchor)


def test_what_is_said_of_networks_and_loops_was_tried():
    found = {
        name: {key: row[key] for key in ("mixer", "needs", "cnn", "vit")} for name, row in method_page.facts().items()
    }
    assert found == {name: method_facts.tried(name, {}) for name in own()}
    assert Counter(row["vit"] for row in found.values())["yes"] > 20


def test_a_page_has_the_numbers_of_the_records_and_says_so_where_there_are_none():
    page = PAGES["cutmix.md"]
    for cell in cells.select(mixer="cutmix", numbered=True):
        assert re.search(rf"^\| `{cell.name}` \|.*\| {cell.top1:.2f} \|", page, re.M), cell.name
    (row,) = [row for row in cells.rows("costs.csv") if row["mixer"] == "cutmix" and row["model"] == "resnet50"]
    assert f"| resnet50 | {float(row['flops']):.2f}x |" in page and f"| {row['timed_on']} |" in page
    assert "not measured" in page and "[quickstart_cutmix](../../model_cards/results/quickstart_cutmix.json)" in page
    assert "figures agree" in page and "(../parity.md#cutmix)" in page and "@inproceedings{yun2019cutmix," in page
    assert "--recipe r50_100e_cutmix\n" in page and "--recipe deit_s_transmix\n" in PAGES["transmix.md"]
    assert "There is no picture" in PAGES["vanilla.md"] and "Its code is not public." in PAGES["grafting.md"]
    assert "† " in PAGES["fmix.md"] and "known" not in page


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", own())
def test_the_python_of_a_page_runs(name):
    row = method_page.facts()[name]
    network = {"num_classes": 4} | ({} if row["cnn"] == "yes" else {"dynamic_img_size": True})
    model = teachers.fill(timm.create_model("test_resnet" if row["cnn"] == "yes" else "test_vit", **network))
    (block,) = re.findall(r"```python\n(.*?)```", PAGES[f"{name}.md"], re.S)
    criterion = torch.nn.CrossEntropyLoss(reduction="none")
    names = {"model": model, "criterion": criterion, "progress": 0.5, "x": torch.randn(4, 3, 64, 64)}
    exec(block, names | {"y": torch.eye(4), "rng": np.random.default_rng((0, 1))})


def test_the_table_has_a_row_per_method_and_takes_filters_and_formats(console):
    def names(*words):
        status, shown, _ = console("methods", "list", *words, "--format", "csv")
        head, *rows = csv.reader(io.StringIO(shown))
        assert status == 0 and head == COLUMNS
        return {row[0]: dict(zip(head, row, strict=True)) for row in rows}

    rows = names()
    assert list(rows) == list(METHODS)
    assert rows["cutmix"]["year"] == "2019" and rows["cutmix"]["top-1, R-50"] == "77.17"
    assert rows["attentivemix"]["teacher"] == "yes" and rows["transmix"]["CNN"] == "no"
    assert rows["samix"] | {"kind": "input, learned", "FLOPs, R-50": "3.10x", "needs": "step"} == rows["samix"]
    feature = names("--kind", "feature")
    assert feature == {name: row for name, row in rows.items() if "feature" in row["kind"]} and "manifoldmix" in feature
    both = names("--kind", "label", "--works_with", "cnn")
    assert "snapmix" in both and not {"transmix", "cutmix"} & set(both)
    shown = console("methods", "list")[1]
    (width,) = {len(line) for line in shown.splitlines()}  # columns stand under each other
    assert width <= 100 and re.search(r"\| attentivemix +\| input; teacher +\|", shown)
    assert re.search(r"\| transmix .* 1\.\d\dx \|", shown), "FLOPs of the model that was counted"
    index = PAGES["README.md"]
    for name, row in rows.items():
        assert f"| [{name}]({name}.md) | {row['year']} |" in index
    assert r"\begin{tabular}" in console("methods", "list", "--format", "latex")[1]
    assert "<td>cutmix</td>" in console("methods", "list", "--format", "html")[1]
    status, _, error = console("methods", "list", "--kind", "lable")
    assert status == 2 and "label" in error and error.count("\n") == 1


def test_a_page_is_shown_without_markup():
    shown = method_page.text("smmix")
    assert not re.search(r"\\[*_\[|]|!\[|\]\(|```|``", shown)
    assert "https://github.com/ChenMnZ/SMMix" in shown and "what mixing costs (docs/speed.md)" in shown
    assert "softmax(lam*z + (1-lam)*z[index])" in shown and "    from mixers import Step, build\n" in shown
    nested = {"a": [("b",), 1.0, None]}
    assert method_page.literal(nested) == '{"a": [("b",), 1.0, None]}'
    assert method_page.in_terminal("a ``x*y`` \\[b\\](c)\n\n| k | v |\n| --- | ---: |\n| long | 1 |\n") == (
        "a `x*y` [b](c)\n\n| k    |   v |\n| ---- | --: |\n| long |   1 |\n"
    )


class Strange(Mixup):
    """A mixer of another package."""


@pytest.mark.parametrize("doc", ["Strange: mixing of strangers. Doe. 2026.\n\nFormula: H*W.\n\nKind: feature.", None])
def test_a_stranger_s_mixer_is_listed_and_shown_and_left_out_of_the_pages(doc, monkeypatch, console):
    module = types.ModuleType("strange_package", doc)
    monkeypatch.setitem(sys.modules, "strange_package", module)
    monkeypatch.setattr(Strange, "__module__", "strange_package")
    for table in (MIXERS, METHODS):
        monkeypatch.setitem(table.rows, "strange", Strange)
    (row,) = [row for row in method_index.chosen() if row[0] == "strange"]
    assert row[1:7] == (["2026", "feature", "no", "-", "-", "-"] if doc else ["-"] * 6)
    status, shown, _ = console("methods", "show", "strange")
    assert status == 0 and 'build("strange", alpha=1.0)' in shown and ("H*W." in shown) == bool(doc)
    assert "strange" not in own() and rendered() == PAGES
    status, _, error = console("methods", "draw", "strange")
    assert (status, error) == (
        2,
        "error: strange is not a method of this package, and only these have pages; see: methods show\n",
    )


def test_drawing_writes_a_picture_and_a_row_and_keeps_the_others(tmp_path, monkeypatch):
    network = timm.create_model("test_resnet", num_classes=3)
    monkeypatch.setattr(method_facts, "trained", lambda: network)
    table, before = tmp_path / "methods.csv", cells.rows("methods.csv")
    (tmp_path / "vanilla.jpg").write_bytes(b"of before")
    said = method_facts.draw(["mixup", "vanilla", "tlalign"], "synthetic", tmp_path, table)
    assert said == f"{table}: 3 methods; {tmp_path}: 2 pictures (drawn shapes)"
    rows = {row["mixer"]: row for row in csv.DictReader(io.StringIO(table.read_text()))}
    assert list(rows) == [row["mixer"] for row in before]
    assert all(rows[row["mixer"]] == row for row in before if row["mixer"] not in ("mixup", "vanilla", "tlalign"))
    assert rows["vanilla"]["seed"] == rows["mixup"]["looked"] == "" and rows["mixup"]["seed"].isdigit()
    assert rows["tlalign"]["looked"] == "untrained" and not (tmp_path / "vanilla.jpg").exists()
    with Image.open(tmp_path / "mixup.jpg") as sheet:
        assert sheet.format == "JPEG" and sheet.width < 600


def test_an_overview_has_a_tile_for_each_method_with_its_most_mixed_photo(tmp_path, monkeypatch, console):
    network = timm.create_model("test_resnet", num_classes=3)
    drawn = preview.find_photos(Recipe(dataset=preview.SYNTHETIC), "synthetic", 3)
    photos = preview.Photos(drawn.images, list(method_facts.FRUIT), drawn.source)
    monkeypatch.setattr(method_facts, "trained", lambda: network)
    monkeypatch.setattr(method_facts, "fruit", lambda: photos)
    sheet = method_facts.overview(["mixup", "cutmix", "hmix"], columns=2)
    wide = preview.SIDE + preview.GAP
    for place, name in enumerate(("mixup", "cutmix", "hmix")):
        _, made = method_facts.shown(name, {}, photos, network)
        x, y = place % 2 * wide, place // 2 * (preview.SIDE + method_facts.SIDE_TEXT + 2 * preview.GAP)
        tile = np.array(sheet.crop((x, y, x + preview.SIDE, y + preview.SIDE))).transpose(2, 0, 1)
        (best,) = [i for i, image in enumerate(made.pixels) if (image.numpy() == tile).all()]
        even = (made.shares.diagonal() - 0.5).abs()[method_facts.changed(made, photos)]
        assert abs(made.shares[best, best] - 0.5) == even.min()
    status, said, _ = console("methods", "draw", "mixup", "--sheet", tmp_path / "a.jpg")
    assert status == 0 and said == f"{tmp_path / 'a.jpg'}\n" and (tmp_path / "a.jpg").read_bytes()[:2] == b"\xff\xd8"
    for words, says in {
        ("mixup", "--sheet", tmp_path / "a.png"): "expected a file that ends in .jpg",
        ("vanilla", "--sheet", tmp_path / "b.jpg"): "vanilla changes no photo",
        ("--sheet", tmp_path / "b.jpg"): "--sheet is of mixers that are named",
    }.items():
        status, _, error = console("methods", "draw", *words)
        assert status == 2 and says in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


def test_pages_wait_until_a_new_method_was_tried(console, monkeypatch, tmp_path):
    monkeypatch.setattr(method_index, "facts", lambda: {})
    status, _, error = console("methods", "render", "--out", tmp_path)
    assert status == 2 and "run mixup-recipes methods draw vanilla mixup" in error and not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(method_index, "own", lambda: ["mixup"])
    assert method_index.render(tmp_path) == [tmp_path / "README.md", tmp_path / "mixup.md"]
    assert method_index.render(tmp_path) == []
