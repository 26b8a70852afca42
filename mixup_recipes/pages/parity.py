"""Every method held against its original code, from the record that ``benchmarks/parity.py`` writes."""

import json
from typing import Any

from mixers import MIXERS
from mixers.registry import docstring, signature
from mixup_recipes.files import shipped
from mixup_recipes.pages.markdown import escaped, markdown_table, shown
from mixup_recipes.pages.methods import parse

RECORD = shipped("model_cards") / "parity.json"
ROUNDING = 1e-3  # what sums in another order come to at most, after 20 updates
UNITS = {"absolute": "", "relative": " of the largest value", "share": " of all"}
INTRODUCTION = """# Held against the original code

Every method runs here beside the code of its authors, or of OpenMixup where the published numbers come from it: on the
same images, the same weights and the same draws. A gap is the largest difference between both, of all values that were
compared; 1e-7 is the rounding of a sum in 32 bits, which grows over updates. The first table has the largest gap of
those below 1e-3, and how many figures differ by more, for a reason; the section of a method has every figure, the
reasons, and all that its file states. The authors' lines run as they stand, from a checkout; nothing of them is kept
here.

```bash
python benchmarks/parity.py --list                           # the repositories to check out
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
    others = list(dict.fromkeys(row["subject"] for row in rows if row["subject"] not in MIXERS))
    parts = [INTRODUCTION, overview(list(MIXERS), rows), "", measured(rows)]
    parts += ["\n## What else a published run is made of\n", overview(others, rows)]
    return "\n".join([*parts, *(section(subject, rows) for subject in (*MIXERS, *others))]) + "\n"


def overview(subjects: list[str], rows: list[dict[str, Any]]) -> str:
    """One line per subject."""
    lines = []
    for subject in subjects:
        own = [row for row in rows if row["subject"] == subject]
        gaps = [gap for row in own for gap in row["gaps"]]
        plain = [gap for gap in gaps if not differs(gap)]
        worst = number(max(plain, key=lambda gap: gap["gap"])) if plain else "-"
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


def differs(gap: dict[str, Any]) -> bool:
    """Whether a gap is more than rounding."""
    return bool(gap["gap"] >= ROUNDING or (gap["unit"] == "share" and gap["gap"] > 0))


def original(row: dict[str, Any]) -> str:
    """A repository and its commit, as a link."""
    address = f"https://github.com/{row['repository']}"
    return f"[{row['repository']}]({address}/tree/{row['commit']}) {row['commit'][:7]}"


def section(subject: str, rows: list[dict[str, Any]]) -> str:
    """Every figure of a subject, and what the file of a method states."""
    parts = [f"\n## {subject}\n"]
    for row in (row for row in rows if row["subject"] == subject):
        files = ", ".join(f"`{file}`" for file in row["files"])
        parts.append(f"Beside {original(row)}, {files}; without it: `tests/{row['held']}`.\n")
        lines = [[escaped(gap["compared"]), number(gap), escaped(gap["why"])] for gap in row["gaps"]]
        parts.append(markdown_table(["compared", "gap", "why"], lines) + "\n")
    if subject in MIXERS:
        parts.append(f"Stated: {parse(docstring(subject)).parts['Deviations']}")
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


def methods_list() -> str:
    """Every mixer with the title of its paper, a line each."""
    return "".join(f"{name:14} {' '.join(docstring(name).split(chr(10) * 2)[0].split())}\n" for name in MIXERS)


def method_text(name: str) -> str:
    """What is known of a mixer, for a terminal: its file's docstring, its arguments, and its rows of the page."""
    given = signature(name).parameters.values()
    arguments = ", ".join(p.name if p.default is p.empty else f"{p.name}={shown(p.default)}" for p in given)
    lines = [f"{name}: {docstring(name)}", "", f"Arguments: {arguments or 'none'}", "", "Beside the original code:"]
    rows = [row for row in recorded() if row["subject"] == name]
    for row in rows:
        lines.append(f"  {row['repository']} {row['commit'][:7]}, {', '.join(row['files'])}, {row['date']}")
        for gap in row["gaps"]:
            lines.append(f"    {gap['compared']}: {number(gap)}" + (f" ({gap['why']})" if gap["why"] else ""))
        lines.append(f"    The test of the same formula without that code: tests/{row['held']}")
    lines += [] if rows else ["  not compared: there is no original, or its code is not public"]
    return "\n".join(lines).replace("``", "`") + "\n"
