"""Every method held against its original code, from the record that ``benchmarks/parity.py`` writes."""

import json
from typing import Any

from mixers import MIXERS
from mixers.registry import docstring, signature
from mixup_recipes.files import shipped
from mixup_recipes.pages.markdown import escaped, markdown_table, shown
from mixup_recipes.pages.methods import parse

RECORD = shipped("model_cards") / "parity.json"
HEAD = ["what", "original", "compared", "largest gap"]
UNITS = {"absolute": "", "relative": " of the largest value", "share": " of all"}
INTRODUCTION = """# Held against the original code

Every method runs here beside the code of its authors, or of OpenMixup where the published numbers come from it: on the
same images, the same weights and the same draws. A gap is the largest difference between both, of all values that were
compared; 1e-7 is the rounding of a sum in 32 bits. Where a gap is large, its row says why, and the section of the
method below says all that differs. The authors' lines run as they stand, from a checkout; nothing of them is kept here.

```bash
python benchmarks/parity.py --list                           # the repositories to check out
python benchmarks/parity.py --originals FOLDER               # all rows of this page
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
    mixers = [r for r in rows if r["subject"] in MIXERS]
    others = [r for r in rows if r["subject"] not in MIXERS]
    parts = [INTRODUCTION, "## Methods\n", parity_table(mixers)]
    parts += ["\n## What else a published run is made of\n", parity_table(others)] if others else []
    parts += ["\n" + measured(rows), "\n## What differs, method by method\n", *map(differences, MIXERS)]
    return "\n".join(parts) + "\n"


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


def parity_table(rows: list[dict[str, Any]]) -> str:
    """One line per comparison."""
    lines = []
    for row in rows:
        files = ", ".join(file.rsplit("/", 1)[-1] for file in row["files"])
        original = f"[{row['repository']}](https://github.com/{row['repository']}) {row['commit'][:7]}, {files}"
        for gap in row["gaps"]:
            found = number(gap) + (f": {gap['why']}" if gap["why"] else "")
            lines.append([row["subject"], original, escaped(gap["compared"]), escaped(found)])
    return markdown_table(HEAD, lines)


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


def differences(name: str) -> str:
    """The section of one method: what its file states."""
    return f"### {name}\n\n{parse(docstring(name)).parts['Deviations']}\n"
