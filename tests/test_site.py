"""The documentation site: every page has its place, the reference is whole, and what is broken fails the build."""

import dataclasses
import re

import pytest
from tiny import ROOT

import evaluate_mixup
from mixers import MIXERS
from mixup_recipes.cli import app
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.job import Job
from website import links, pages, reference


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """The sources of the site."""
    folder = tmp_path_factory.mktemp("sources") / "site"
    pages.stage(folder)
    return folder


def test_each_page_of_docs_is_in_the_navigation_once():
    named = [page for part in pages.NAVIGATION.values() for page in part]
    own = {f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")}
    assert own <= {*named}, f"add to NAVIGATION in website/pages.py: {own - {*named}}"
    assert len(named) == len({*named})


def test_what_the_navigation_names_is_there(staged):
    for part in pages.NAVIGATION.values():
        assert all((staged / f"{page}.md").is_file() for page in part)
    assert (staged / "docs/loops/own_loop.md").read_text().startswith("# own_loop.py\n\n```python\n")
    assert "](loops/own_loop.md)" in (staged / "docs/loops.md").read_text()
    assert "](docs/methods/index.md)" in (staged / "index.md").read_text()


def test_the_reference_has_every_field_command_and_method(staged):
    text = {path.stem: path.read_text() for path in (staged / "docs/reference").glob("*.md")}
    for cls, page in ((Recipe, "recipe"), (Job, "job"), (evaluate_mixup.Evaluation, "job")):
        blocks = dict(re.findall(rf"py:attribute}} {cls.__name__}\.(\w+)\n(.*?)\n:::", text[page], re.S))
        assert [*blocks] == [field.name for field in dataclasses.fields(cls)]
        assert all(re.match(r":module: .+\n:type: .+\n(:value: .+\n)?\n\S", block) for block in blocks.values())
    assert ":type: \"'rrc' | 'pad' | 'pad_zeros' | 'resize'\"\n:value: \"'rrc'\"" in text["recipe"]
    assert "Values: above 0." in text["recipe"]
    commands = {name for name in app if not name.startswith("-")}
    assert commands <= {*re.findall(r"^## (\S+)$", text["commands"], re.M)}
    assert "--output_dir TEXT" in text["commands"] and "--head_lr" not in text["commands"]
    assert {*MIXERS.rows} <= {*re.findall(r"^## (\w+)$", text["methods"], re.M)}
    assert 'py:class} CutMix(alpha: float=1.0)\n:module: "mixers.cutmix"' in text["methods"]
    opened = "py:method} Run.open(name: str | Path) -> 'Run'\n:module: \"mixup_recipes.runs.run\"\n:classmethod:"
    assert opened in text["runs"]


def test_a_name_that_the_code_has_no_more_is_an_error():
    with pytest.raises(ValueError, match=r"mixers\.base has no class or function 'Mixr'"):
        reference.documented("mixers.base:Mixr")


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/index.html").write_text('<h1 id="here">a</h1><a href="../a.html#no">b</a><img src="x.png">')
    (tmp_path / "a.html").write_text(
        '<a href="sub/">a</a><a href="sub/index.html#here">b</a><a href="https://example.org/a">c</a>'
        '<a href="b.html">d</a>'
    )
    dead, others = links.check(tmp_path)
    assert dead == ["a.html: b.html", "sub/index.html: ../a.html#no", "sub/index.html: x.png"]
    assert others == ["https://example.org/a"]


@pytest.fixture
def build():
    """What `make docs` runs."""
    for package in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        pytest.importorskip(package)
    from website.__main__ import build

    return build


@pytest.mark.slow  # Sphinx reads and writes a hundred pages
@pytest.mark.filterwarnings("default")  # what Sphinx and its extensions warn of is theirs
def test_the_site_is_built_without_a_warning(build, tmp_path, capfd):
    assert build(tmp_path / "site") == 0, capfd.readouterr().err
    home = (tmp_path / "site/index.html").read_text()
    assert 'href="docs/train_a_cell.html"' in home and 'href="docs/reference/index.html"' in home
    assert (tmp_path / "site/searchindex.js").stat().st_size > 100_000
    assert (tmp_path / "site-links.txt").read_text().startswith("https://")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_page_without_a_place_and_a_link_without_an_end_fail_the_build(build, tmp_path, monkeypatch, capfd):
    whole = pages.stage

    def stage(folder):
        whole(folder)
        (folder / "docs/new.md").write_text("# New\n\n[a](nowhere.md), [b](photos.md#no-such-heading)\n")

    monkeypatch.setattr(pages, "stage", stage)
    assert build(tmp_path / "site") != 0
    said = capfd.readouterr().err
    assert "toctree" in said and "nowhere.md" in said and "no-such-heading" in said
