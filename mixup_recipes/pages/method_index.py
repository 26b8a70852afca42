"""All methods side by side: ``docs/methods/README.md``, and the table that ``mixup-recipes methods list`` prints."""

import csv
import html
import io
from pathlib import Path
from typing import Literal

from mixers.registry import docstring
from mixup_recipes import files
from mixup_recipes.benchmark import cells
from mixup_recipes.benchmark.tables import tex
from mixup_recipes.pages.markdown import escaped, markdown_table
from mixup_recipes.pages.method_page import NETWORKS, RENDER, SETTINGS, aligned, facts, page
from mixup_recipes.pages.methods import KINDS, METHODS, kinds, own, parse, year
from mixup_recipes.typed import UserError

Format = Literal["md", "csv", "latex", "html"]
MODELS = {"R-50": "resnet50", "DeiT-S": "deit_small_patch16_224"}
TOP1 = dict(zip(MODELS, SETTINGS, strict=True))
COLUMNS = ["method", "year", "kind", "teacher", *NETWORKS.values(), "needs"]
COLUMNS += [f"FLOPs, {model}" for model in MODELS] + [f"top-1, {model}" for model in MODELS] + ["title"]
RIGHT, LAST = COLUMNS.index("FLOPs, R-50"), len(COLUMNS) - 1
SHORT = ["method", "kind", "CNN", "ViT", "needs", "FLOPs", "top-1, R-50", "top-1, DeiT-S"]
"""The columns for a terminal, of at most 100 characters in a line. FLOPs are of the first model that has any."""
INDEX = "README.md"
INTRODUCTION = """# Methods

Every mixer has a page. The page has a picture, the formula, the paper, the sampling law, the cost and the numbers. It
also says how far the mixer is from its original code, and how to use it. These commands show the same in a terminal:

```bash
mixup-recipes methods list                                  # the table below with fewer columns
mixup-recipes methods list --format csv                     # the whole table; also as latex or html
mixup-recipes methods list --kind label --works_with vit    # of one kind, for transformers
mixup-recipes methods show cutmix                           # the page of one method
```
"""
LEGEND = """* `kind` is what the method itself changes: {kinds}.
  A method that stands on another one has the kind of what it adds.
* `teacher` says whether the method needs another network, which was trained before.
* `CNN` and `ViT` say whether the method takes a small ResNet and a small ViT. This was tried on timm's `test_resnet`
  and `test_vit`.
* `needs` is what a loop hands over: [batch, model or step](../loops.md).
* `FLOPs` are those of a whole training step, relative to a step without mixing: [what mixing costs](../speed.md).
* `top-1` is the published number on ImageNet-1k, in percent: ResNet-50 for 100 epochs (`r50_100e`) and DeiT-S for 300
  (`deit_s`). {marks} Rows have the hyperparameters that their table prints: [published numbers](../results.md).

`mixup-recipes methods draw` makes the pictures and tries the networks. `{render}` makes this page and the pages of the
methods.
"""


def row(name: str) -> list[str]:
    """What the table says of a mixer; a dash where nothing is known, as of a stranger's."""
    method, tried = parse(docstring(name)), facts().get(name, {})
    named, teacher = kinds(method)
    kind = ", ".join(named) or ("none" if method.parts.get("Kind") == "none." else "-")
    counted = {r["model"]: f"{float(r['flops']):.2f}x" for r in cells.rows("costs.csv") if r["mixer"] == name}
    found = [cells.cells().get(f"{setting}_{name}") for setting in TOP1.values()]
    return [
        name,
        year(method) or "-",
        kind,
        "yes" if teacher else "no" if "Kind" in method.parts else "-",
        *(tried.get(key, "-") for key in NETWORKS),
        tried.get("needs", "-"),
        *(counted.get(model, "-") for model in MODELS.values()),
        *(cells.number(cell) if cell else "-" for cell in found),
        method.title or "-",
    ]


def chosen(kind: str | None = None, works_with: str | None = None) -> list[list[str]]:
    """The rows of all mixers of a kind that take a network, or of all."""
    rows = [row(name) for name in METHODS]
    if kind:
        rows = [r for r in rows if kind in r[COLUMNS.index("kind")].split(", ")]
    if works_with:
        rows = [r for r in rows if r[COLUMNS.index(NETWORKS[works_with])] == "yes"]
    return rows


def short(line: list[str]) -> list[str]:
    """What a terminal shows of a row of ``COLUMNS``; a method with a teacher says so with its kind."""
    cell = dict(zip(COLUMNS, line, strict=True))
    cell["kind"] += "; teacher" if cell["teacher"] == "yes" else ""
    counted = [cell[f"FLOPs, {model}"] for model in MODELS]
    cell["FLOPs"] = next((number for number in counted if number != "-"), "-")
    return [cell[column] for column in SHORT]


def listing(kind: str | None = None, works_with: str | None = None, fmt: Format = "md") -> str:
    """The table as ``csv``, ``latex`` or ``html``; as ``md``, for a terminal, it has fewer columns."""
    rows = chosen(kind, works_with)
    if fmt == "md":
        shown = [list(map(escaped, short(r))) for r in rows]
        return aligned(markdown_table(SHORT, shown, right=SHORT.index("FLOPs")))
    if fmt == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([COLUMNS, *rows])
        return out.getvalue()
    if fmt == "latex":
        lines = [" & ".join(map(tex, r)) + r" \\" for r in (COLUMNS, *rows)]
        body = [rf"\begin{{tabular}}{{{'l' * RIGHT + 'r' * (len(COLUMNS) - RIGHT - 1)}l}}", r"\toprule", lines[0]]
        return "\n".join(["% needs \\usepackage{booktabs}", *body, r"\midrule", *lines[1:], r"\bottomrule"]) + (
            "\n\\end{tabular}\n"
        )
    head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in COLUMNS)
    body = ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>" for r in rows]
    return "\n".join(["<table>", f"<thead><tr>{head}</tr></thead>", "<tbody>", *body, "</tbody>", "</table>"]) + "\n"


def index() -> str:
    """The page of all methods of this package."""
    rows = [row(name) for name in own()]
    for line in rows:
        line[0] = f"[{line[0]}]({line[0]}.md)"
    words = "; ".join(f"`{kind}`: {what}" for kind, what in KINDS.items())
    marks = " ".join(f"{mark} means: {cells.MEANING[source]}." for source, mark in cells.MARKS.items() if mark)
    table = markdown_table(COLUMNS, [list(map(escaped, r)) for r in rows], right=RIGHT, left=LAST)
    return "\n".join([INTRODUCTION, table, "", LEGEND.format(kinds=words, marks=marks, render=RENDER)])


def rendered() -> dict[str, str]:
    """Every page by its file name. Raises ``UserError`` if a method was not tried yet."""
    if missing := [name for name in own() if name not in facts()]:
        raise UserError(
            f"model_cards/methods.csv has no row for some methods: run mixup-recipes methods draw {' '.join(missing)}"
        )
    return {INDEX: index()} | {f"{name}.md": page(name) for name in own()}


def render(folder: Path) -> list[Path]:
    """Write the pages that are new or differ into a folder; returns them."""
    changed = []
    for name, text in rendered().items():
        path = folder / name
        if not path.is_file() or path.read_text() != text:
            files.write_into(path, text)
            changed.append(path)
    return changed
