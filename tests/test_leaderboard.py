"""Promise: the leaderboard shows what cells and records say, and nothing else, in one file that a browser can use."""

import json
import re
import statistics
from pathlib import Path

import pytest
from browser import ENTER, TAB, browsing
from runs import TOP1, cell_record, make_run, quick

from mixup_recipes.benchmark import cells
from mixup_recipes.benchmark.listing import describe
from mixup_recipes.benchmark.verdicts import of_cells, status
from mixup_recipes.pages.leaderboard import MARK, blob, curve_facts, facts, html, leaderboard, repeat
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs import records
from mixup_recipes.runs.run import Run

NAME = "tiny_r18_cutmix"


def write_records(folder: Path) -> Path:
    """A folder with this package's records, and one of a published cell with three finished seeds."""
    folder.mkdir()
    for content in (cell_record(NAME, (65.0, 65.6, 66.0)), *records.all_records().values()):
        (folder / records.file_name(content)).write_text(json.dumps(content))
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of records."""
    return write_records(tmp_path / "results")


@pytest.fixture(scope="module")
def shown() -> dict:
    """The facts of this package's records."""
    return facts()


def test_each_number_is_that_of_its_cell_or_record(shown):
    texts, by_name = shown["texts"], {row["name"]: row for row in shown["cells"]}
    assert list(by_name) == list(cells.cells())
    for name, cell in cells.cells().items():
        row = by_name[name]
        assert (row.get("top1"), row["setting"], row["mixer"]) == (cell.top1, cell.setting, cell.mixer)
    for name in ("deit_s_samix", NAME, "r50_100e_comixup"):
        said = [f"{key:10} {texts[place]}" for key, place in by_name[name]["facts"]]
        assert "\n".join(said) == describe(cells.find(name), of_cells().get(name))
    found, rows = records.all_records(), [row for rows in shown["trained"].values() for row in rows]
    assert {row["name"] for row in rows} == {n for n, content in found.items() if records.finished_seeds(content)}
    base = {s: c["seeds"] for c in found.values() if (s := c["recipe"].removesuffix("_vanilla")) != c["recipe"]}
    for row in rows:
        own = records.finished_seeds(found[row["name"]])
        for key in ("top1", "nll", "ece", "seconds", "img_per_s"):
            assert {k: s[key] for k, s in row["seeds"].items()} == {k: s[key] for k, s in own.items()}
        assert row["top1"] == statistics.fmean(s["top1"] for s in own.values())
        setting = next(s for s, rows in shown["trained"].items() if row in rows)
        seeds = {} if row["mixer"] == "vanilla" else base.get(setting, {})
        assert row["gaps"] == {k: s["top1"] - seeds[k]["top1"] for k, s in own.items() if k in seeds}
    costs = {(r["model"], r["mixer"]): float(r["flops"]) for r in cells.rows("costs.csv")}
    assert by_name["r50_100e_puzzlemix"]["flops"] == costs["resnet50", "puzzlemix"]


def test_our_runs_stand_beside_the_published_number_with_their_verdict(results):
    content = facts(results)
    row = next(row for row in content["cells"] if row["name"] == NAME)
    cell, record = cells.find(NAME), of_cells(results)[NAME]
    assert (row["mean"], row["std"], row["seeds"]) == records.ours(record) and row["values"] == [65.0, 65.6, 66.0]
    assert (row["status"], content["texts"][row["words"]]) == status(cell, record)
    assert f"{row['difference']:+.2f} from {row['top1']:.2f}, band ±{row['band']:.2f}" in status(cell, record)[1]
    assert content["command"] == "mixup-recipes leaderboard --results results"


def test_the_command_of_a_record_trains_its_recipe_again():
    changed = [content for content in records.all_records().values() if content["overrides"]]
    assert changed
    for content in changed:
        words = repeat(content, ["0", "1"]).split()
        assert words[:7] == ["mixup-recipes", "sweep", "--recipes", content["recipe"], "--seeds", "0", "1"]
        args = dict(word.removeprefix("mixer.").split("=", 1) for word in words[words.index("--set") + 1 :])
        again = records.fields_of(load_recipe(content["recipe"], mixer_args=args))
        assert records.complete(again)["mixer_args"] == records.complete(content["fields"])["mixer_args"]


def test_text_of_others_cannot_leave_its_place(tmp_path):
    evil = "</script><script>alert(1)</script><!-- & ' \" \u2028"
    assert json.loads(blob({"text": evil})) == {"text": evil} and not {*"<>&\u2028"} & {*blob(evil)}
    run = Run.open(make_run(tmp_path / "<img src=x>", quick()))
    own = next(iter(records.all_records().values())) | {"recipe": "<img src=y>", "overrides": None}
    (tmp_path / records.file_name(own)).write_text(json.dumps(own))
    content = facts(tmp_path, [run])
    assert [row["recipe"] for rows in content["trained"].values() for row in rows] == ["<img src=y>"]
    page = html(content)
    assert "<img" not in page and page.count("</script>") == 2 and page.count("<script") == 2
    assert not re.search(r'(src|href)="(?!data:|#)|@import|url\(|fetch\(|innerHTML', page)


def test_the_same_records_give_the_same_bytes_and_a_readme_of_somebody_stays(tmp_path, results, console):
    for name in ("a", "b"):
        done = console("leaderboard", "--out", tmp_path / name, "--results", results)
        assert done == (0, f"{tmp_path / name}/index.html\n{tmp_path / name}/README.md\n", "")
    first, second = ((tmp_path / name / "index.html").read_bytes() for name in ("a", "b"))
    assert first == second and MARK.encode() in first and str(tmp_path).encode() not in first
    readme = tmp_path / "a" / "README.md"
    assert readme.read_text().startswith("---\ntitle: ") and "\nsdk: static\n" in readme.read_text()
    readme.write_text("mine")
    assert leaderboard(tmp_path / "a", results) == [tmp_path / "a" / "index.html"] and readme.read_text() == "mine"


def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, console):
    (tmp_path / "file").write_text("")
    (tmp_path / "page").mkdir()
    (tmp_path / "page/index.html").write_text("<p>mine")
    run = make_run(tmp_path / "run", quick())
    for argv, says in (
        (("--results", tmp_path / "none"), f"no folder of run records {tmp_path / 'none'}"),
        ((tmp_path / "none",), f"no run folder {tmp_path / 'none'}"),
        (("--out", tmp_path / "file"), "is a file; --out takes a folder, such as site/"),
        (("--out", tmp_path / "page"), "is not a leaderboard and would be lost; name another folder with --out"),
        (("--out", run), "is a run folder; name another folder with --out"),
    ):
        status, out, err = console("leaderboard", *(() if "--out" in argv else ("--out", tmp_path / "new")), *argv)
        assert (status, out) == (2, "") and says in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists() and (tmp_path / "page/index.html").read_text() == "<p>mine"


def test_runs_add_their_curves(tmp_path):
    runs = [Run.open(make_run(tmp_path / name, quick(name))) for name in ("cutmix", "vanilla")]
    curves = curve_facts(runs[::-1])
    assert [(c["run"], c["setting"], c["mixer"], c["metric"]) for c in curves] == [
        (name, "quickstart", name, "top-1") for name in ("cutmix", "vanilla")
    ]
    assert curves[0]["heads"] == {"": [[epoch, value] for epoch, value in enumerate(TOP1, 1)]}


# ------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser and the address of a page with runs of a published cell, small settings and curves."""
    folder = tmp_path_factory.mktemp("leaderboard")
    leaderboard(folder / "site", write_records(folder / "results"), [make_run(folder / "<b>run", quick())])
    with browsing() as browser:
        yield browser, f"{(folder / 'site').as_uri()}/index.html"


def focused(browser):
    """What has the focus: name or id of the element."""
    return browser.js("const e = document.activeElement; return e.name || e.id || e.dataset.view || e.tagName")


@pytest.mark.browser
def test_the_page_is_drawn_filtered_sorted_and_shared_by_its_address(page):
    browser, address = page
    browser.size(1280, 900)
    browser.open(address)
    assert len(browser.texts("tr.row")) == len(cells.cells())
    browser.js("const s = document.getElementById('f-setting'); s.value = 'tiny_r18';"
               "s.dispatchEvent(new Event('input', { bubbles: true }))")  # fmt: skip
    own = cells.select(setting="tiny_r18")
    assert len(browser.texts("tr.row")) == len(own) and browser.texts("section.card h2") == ["tiny_r18"]
    (row,) = [text for text in browser.texts("tr.row") if "65.53 ± 0.50" in text]
    assert "CutMix" in row and f"{cells.find(NAME).top1:.2f}" in row and row.endswith("reproduced")
    browser.click("#f-text")
    browser.press("cutmix")
    assert len(browser.texts("tr.row")) == 2 and browser.js("return location.hash") == "#text=cutmix&setting=tiny_r18"
    browser.click("tr.row:nth-of-type(3) .name")
    assert f"accelerate launch train_mixup.py --recipe {NAME}" in browser.texts("dd code")
    browser.open("about:blank")
    browser.open(f"{address}#view=trained&setting=quickstart&sort=nll-up")
    values = [float(text.split()[0]) for text in browser.js(
        "return [...document.querySelectorAll('td[data-label=NLL]')].map(e => e.innerText)")]  # fmt: skip
    assert values == sorted(values) and len(values) > 15
    browser.click("[data-sort=top1]")
    assert browser.js("return location.hash").endswith("sort=top1-down") and browser.texts("th[aria-sort]") == ["Top-1"]
    for view, wanted in (("cost", "circle.dot"), ("curves", "path.line")):
        browser.click(f"[data-view={view}]")
        browser.click("#reset")
        assert browser.js("return document.querySelectorAll(arguments[0]).length", wanted)
    assert "cutmix (<b>run)" in browser.texts(".legend li")[0]
    assert browser.console() == []


@pytest.mark.browser
def test_the_keyboard_reaches_the_filters_and_opens_a_row(page):
    browser, address = page
    browser.size(1280, 900)
    browser.open("about:blank")
    browser.open(address)
    seen = []
    while len(seen) < 12 and (not seen or seen[-1] != "reset"):
        browser.press(TAB)
        seen.append(focused(browser))
    assert seen == ["skip", "published", "trained", "cost", "curves", "text", "setting", "backbone", "method", "year",
                    "status", "reset"]  # fmt: skip
    assert browser.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    labels = browser.js("return [...document.querySelectorAll('input, select')].filter(e => !e.labels.length).length")
    assert labels == 0
    browser.js("document.getElementById('f-method').focus()")
    browser.press("SAMix")  # a select goes to what is typed
    assert browser.js("return location.hash") == "#method=samix"
    assert {text.split("\n")[0].split("\t")[1] for text in browser.texts("tr.row")} == {"SAMix"}
    browser.js("document.querySelector('.name').focus()")
    browser.press(ENTER)
    assert browser.js("return document.activeElement.getAttribute('aria-expanded')") == "true"
    assert browser.texts("dl") and browser.console() == []


@pytest.mark.browser
@pytest.mark.parametrize("view", ["published", "trained", "cost", "curves"])
def test_a_phone_does_not_scroll_sideways(page, view):
    browser, address = page
    browser.size(360, 800)
    browser.open("about:blank")
    browser.open(f"{address}#view={view}")
    if view in ("published", "trained"):
        browser.click("tr.row .name")
    assert browser.js("return document.documentElement.scrollWidth") == 360
    assert browser.texts("section.card h2") and browser.console() == []
