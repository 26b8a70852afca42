"""Every method held against its original code, from the record that ``benchmarks/parity.py`` writes."""

import json
from typing import Any

from mixers import MIXERS, REGRESSION
from mixers.registry import docstring
from mixup_recipes.files import shipped
from mixup_recipes.pages.markdown import escaped, markdown_table
from mixup_recipes.pages.methods import parse

RECORD = shipped("model_cards") / "parity.json"
ALONE = {
    "vanilla": "there is nothing to compare",
    "grafting": "its code is not public",
    "lumix": "its code was not published",
    "catchupmix": "its code could not be had",
}
"""Methods without a row, and why."""
UNITS = {"absolute": "", "relative": " of the largest value", "share": " of all"}
INTRODUCTION = """# Held against the original code

Every method whose code is public runs here beside the code of its authors, or of OpenMixup, where the published numbers
come from: on the same images, the same weights and the same draws. A gap is the largest difference between both, of all
values that were compared; 1e-7 is the rounding of a sum in 32 bits, which grows over updates. The first table has the
largest gap of the figures that agree, and how many differ for a reason. The section of a method has every figure, the
reasons, and all differences that its file states.

The published loop or step of a method also runs for 20 updates or more, and then the weights of both are compared.
SuperMix's code has none: it makes its images before training.

The lines that compute a method are the authors', read from a checkout; nothing of them is kept here. What is around
them is replaced where it is not installed or not the matter: mmcv's base classes by stand-ins, networks by timm's or by
small ones, random functions by those that give our draws, in some rows a solver or a detector by ours. Rows that say
float64 run both sides in 64 bits. OpenMixup's tables are of its commit 1fb74ee (August 2023), older than the checkout.
Since then the partners of CutMix and FMix, defaults of PuzzleMix and the hook of averaged weights have changed,
AutoMix, momentum, heads and losses have got options, and AdAutoMix, TokenMix, SMMix, MixPro, TL-Align, SnapMix and
GuidedMixup have come. The hook that compounds AutoMix's mask loss is the same for runs that count updates, as those for
ImageNet do.

```bash
python benchmarks/parity.py --list                           # the repositories to check out, and their commits
python benchmarks/parity.py --originals FOLDER               # all figures of this page
python benchmarks/parity.py --originals FOLDER --only cutmix # those of one method
mixup-recipes methods show cutmix                            # what this page says of one method
```

Each formula also has a slow reference of its own in `tests`, which `make test` runs without any checkout.
"""


def recorded() -> list[dict[str, Any]]:
    """The rows of the record: subject, repository, commit, files, held, gaps, date, machine, versions."""
    rows: list[dict[str, Any]] = json.loads(RECORD.read_text())["rows"]
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    """The whole page, ``docs/parity.md``; ``rows`` as the record has them."""
    ours = [*MIXERS.rows, *REGRESSION]  # those of other packages are not on our page
    others = list(dict.fromkeys(row["subject"] for row in rows if row["subject"] not in ours))
    parts = [INTRODUCTION, overview(ours, rows), "", measured(rows)]
    parts += ["\n## What else a published run is made of\n", overview(others, rows)]
    return "\n".join([*parts, *(section(subject, rows) for subject in (*ours, *others))]) + "\n"


def overview(subjects: list[str], rows: list[dict[str, Any]]) -> str:
    """One line per subject."""
    lines = []
    for subject in subjects:
        own = [row for row in rows if row["subject"] == subject]
        gaps = [gap for row in own for gap in row["gaps"]]
        plain = [gap for gap in gaps if not gap["why"]]
        worst = number(max(plain, key=lambda gap: gap["gap"])) if plain else ALONE.get(subject, "-")
        link = f"[{subject}](#{subject.lower().replace(' ', '-')})"
        others = len(gaps) - len(plain)
        lines.append(
            [
                link,
                ", ".join(dict.fromkeys(map(original, own))) or "-",
                str(len(plain)),
                worst,
                str(others) if others else "",
            ]
        )
    return markdown_table(
        ["what", "original", "figures that agree", "largest gap", "differ for a reason"], lines, right=2
    )


def original(row: dict[str, Any]) -> str:
    """A repository and its commit, as a link."""
    address = f"https://github.com/{row['repository']}"
    return f"[{row['repository']}]({address}/tree/{row['commit']}) {row['commit'][:7]}"


def section(subject: str, rows: list[dict[str, Any]]) -> str:
    """Every figure of a subject, and what the file of a method states."""
    parts = [f"\n## {subject}\n"]
    for row in (row for row in rows if row["subject"] == subject):
        files = ", ".join(f"`{file}`" for file in row["files"])
        parts.append(f"{original(row)}, {files}. The same formula without the checkout: `tests/{row['held']}`.\n")
        lines = [[escaped(gap["compared"]), number(gap), escaped(gap["why"])] for gap in row["gaps"]]
        parts.append(markdown_table(["compared", "gap", "why"], lines) + "\n")
    if subject not in ALONE:
        name = subject if subject.isidentifier() else f"'{subject}'"
        parts.append(f"Made by `python benchmarks/parity.py --originals FOLDER --only {name}`.\n")
    if subject in MIXERS | REGRESSION:
        parts.append(f"What its file states as deviations: {parse(docstring(subject)).parts['Deviations']}")
    return "\n".join(parts).rstrip()


def number(gap: dict[str, Any]) -> str:
    """A gap as it is shown: 0, 2e-07, 3.1 % of all."""
    if not gap["gap"]:
        return "0"
    if gap["unit"] == "share":
        return f"{100 * gap['gap']:.3g} %{UNITS['share']}"
    return f"{gap['gap']:.1e}{UNITS[gap['unit']]}"


def measured(rows: list[dict[str, Any]]) -> str:
    """On what and when the rows were measured."""
    kinds = dict.fromkeys((row["machine"], *row["versions"].items(), row["date"]) for row in rows)
    lines = []
    for machine, *versions, date in kinds:
        lines.append(f"Measured on {date}, {machine}, " + ", ".join(f"{name} {v}" for name, v in versions) + ".")
    return "\n".join(lines)
