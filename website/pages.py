"""Which pages the site has, in which order, and how the repository's files become its sources.

``NAVIGATION`` gives each page its place. A page of ``docs/`` that is not named there fails the build, because Sphinx
warns of a page that no list names.
"""

import re
import shutil
from pathlib import Path

from mixers import MIXERS, REGRESSION
from website import reference

ROOT = Path(__file__).parents[1]
NAVIGATION = {
    "Guides": ("docs/train_a_cell", "docs/photos", "docs/which_mixer", "docs/mixers", "docs/develop"),
    "Methods": ("docs/methods/index", "docs/learned", "docs/demo"),
    "Topics": (
        "docs/data", "docs/launching", "docs/sweeps", "docs/hub", "docs/deploy", "docs/robustness", "docs/loops",
        "docs/dense", "docs/speed",
    ),
    "Results": (
        "docs/results", "docs/leaderboard", "docs/parity", "docs/acid_measured", "docs/conformance",
        "docs/speed_measured", "docs/photos_measured", "model_cards/index",
    ),
    "Reference": ("docs/reference/index",),
    "Project": ("CONTRIBUTING", "CHANGELOG"),
}  # fmt: skip
"""Title of a part of the navigation -> its pages, in the order of a reader's needs. ``README.md`` is the first page."""
SCRIPTS = ("loops", "dense")
"""Folders of ``docs/`` whose scripts have a page each."""
FILES = ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "CITATION.cff")
LINK = re.compile(r"(\]\()(?!https?:|#)([^)\s]+)(\))")


def stage(folder: Path) -> None:
    """Write the sources of the site into a folder, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "model_cards", folder / "model_cards", ignore=shutil.ignore_patterns(".*"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    (folder / "index.md").write_text((ROOT / "README.md").read_text(encoding="utf-8") + navigation(), encoding="utf-8")
    (folder / "docs/methods/README.md").rename(folder / "docs/methods/index.md")
    append(folder / "docs/methods/index.md", toctree(sorted([*MIXERS.rows, *REGRESSION.rows])))
    for name in SCRIPTS:
        scripts = sorted((folder / "docs" / name).glob("*.py"))
        for path in scripts:
            code = path.read_text(encoding="utf-8")
            path.with_suffix(".md").write_text(f"# {path.name}\n\n```python\n{code}```\n", encoding="utf-8")
        append(folder / f"docs/{name}.md", toctree([f"{name}/{path.stem}" for path in scripts]))
    (folder / "model_cards/results/README.md").unlink()  # for those who look into the folder
    cards = sorted(path.stem for path in (folder / "model_cards").glob("*.md"))
    for name in cards:
        path = folder / f"model_cards/{name}.md"
        path.write_text(f"# {name}\n\n{path.read_text(encoding='utf-8')}", encoding="utf-8")
    text = "# Tables of our runs\n\nEach table is made of the records of the runs, by the command that it names.\n\n"
    text += "\n".join(f"- [](./{name}.md)" for name in cards) + "\n"
    (folder / "model_cards/index.md").write_text(text + toctree(cards), encoding="utf-8")
    for path in folder.rglob("*.md"):
        path.write_text(linked(path.read_text(encoding="utf-8"), path, folder), encoding="utf-8")
    (folder / "docs/reference").mkdir()
    for name, text in reference.pages().items():
        (folder / f"docs/reference/{name}.md").write_text(text, encoding="utf-8")


def navigation() -> str:
    """The lists of pages that Sphinx makes the navigation of."""
    return "".join(toctree(pages, title) for title, pages in NAVIGATION.items())


def toctree(pages: list[str] | tuple[str, ...], caption: str = "") -> str:
    """A list of pages that only the navigation shows."""
    head = f":caption: {caption}\n" if caption else ""
    return f"\n```{{toctree}}\n{head}:hidden:\n\n" + "\n".join(pages) + "\n```\n"


def append(path: Path, text: str) -> None:
    """Write more text at the end of a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def linked(text: str, path: Path, folder: Path) -> str:
    """A page whose links lead to pages of the site: scripts and folders of them have pages, a README is an index."""

    def moved(link: re.Match[str]) -> str:
        target, hash_, anchor = link[2].partition("#")
        there = (path.parent / target).resolve().relative_to(folder.resolve()) if target else Path()
        if there.name == "README.md":
            target = target.removesuffix("README.md") + "index.md"
        elif there.parts[:1] == ("docs",) and len(there.parts) == 3 and there.parts[1] in SCRIPTS:
            target = target.removesuffix(".py") + ".md" if target.endswith(".py") else target
        elif there.as_posix() in {f"docs/{name}" for name in SCRIPTS}:
            target = target.rstrip("/") + ".md"
        return f"{link[1]}{target}{hash_}{anchor}{link[3]}"

    return LINK.sub(moved, text)
