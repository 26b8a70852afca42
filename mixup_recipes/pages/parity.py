"""Every method held against its original code, from the record that ``benchmarks/parity.py`` writes."""

import json
from typing import Any

from mixers import MIXERS, REGRESSION
from mixers.registry import docstring
from mixup_recipes.files import shipped
from mixup_recipes.pages.markdown import escaped, markdown_table
from mixup_recipes.pages.methods import parse, sentence

RECORD = shipped("model_cards") / "parity.json"
ALONE = {
    "vanilla": "there is nothing to compare",
    "grafting": "its code is not public",
    "lumix": "its code was not published",
    "catchupmix": "its code could not be obtained",
}
"""Methods without a row, and why."""
UNITS = {"absolute": "", "relative": " of the largest value", "share": " of all"}
INTRODUCTION = """# Agreement with the original code

Every method whose code is public is run here beside its original code. The original is the code of the authors, or that
of OpenMixup, where the published numbers come from. Both get the same images, the same weights and the same draws.

A gap is the largest difference between the two, over all values that were compared. A gap of 1e-7 is the rounding of a
sum in 32 bits, and it grows over updates. The first table has the largest gap of the figures that agree. It also says
how many figures differ for a reason. The section of a method has every figure, the reasons, and all differences that
the file of the method states.

The published loop or step of a method also runs for 20 updates or more. Then the weights of both are compared.
SuperMix's code has no such loop, because it makes its images before training.

The lines that compute a method are the authors' lines, read from a checkout. This repository keeps no copy of them. The
code around them is replaced where it is not installed or does not matter. Stand-ins replace mmcv's base classes. timm's
networks or small ones replace the networks. Functions that give our draws replace the random functions. In some rows
our solver or detector replaces the original one. Rows that say float64 run both sides in 64 bits.

OpenMixup's tables are of its commit 1fb74ee (August 2023), which is older than the checkout. These parts have changed
since then: the partners of CutMix and FMix, defaults of PuzzleMix, and the hook of averaged weights. AutoMix, momentum,
heads and losses have got options. AdAutoMix, TokenMix, SMMix, MixPro, TL-Align, SnapMix and GuidedMixup have been
added. The hook that compounds AutoMix's mask loss is the same for runs that count updates, and the ImageNet runs do.

```bash
python benchmarks/parity.py --list                           # the repositories to check out, and their commits
python benchmarks/parity.py --originals FOLDER               # all figures of this page
python benchmarks/parity.py --originals FOLDER --only cutmix # those of one method
mixup-recipes methods show cutmix                            # what this page says of one method
```

Each formula also has a slow reference of its own in `tests`. `make test` runs it without any checkout.
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
    parts += ["\n## Other parts of a published run\n", overview(others, rows)]
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
        held = f"`tests/{row['held']}` tests the same formula without the checkout."
        parts.append(f"Compared with {original(row)}: {files}. {held}\n")
        lines = [[escaped(gap["compared"]), number(gap), escaped(gap["why"])] for gap in row["gaps"]]
        parts.append(markdown_table(["compared", "gap", "why"], lines) + "\n")
    if subject not in ALONE:
        name = subject if subject.isidentifier() else f"'{subject}'"
        parts.append(f"`python benchmarks/parity.py --originals FOLDER --only {name}` makes these figures.\n")
    if subject in MIXERS | REGRESSION:
        parts.append(f"**Deviations that its file states.** {sentence(parse(docstring(subject)).parts['Deviations'])}")
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
