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
INDEX = "README.md"
INTRODUCTION = """# Methods

Every mixer has a page: picture, formula, paper, sampling law, cost, numbers, how far it is from its original code and
how to use it. The same in a terminal:

```bash
mixup-recipes methods list                                  # the table below; also as csv, latex or html
mixup-recipes methods list --kind label --works_with vit    # of one kind, for transformers
mixup-recipes methods show cutmix                           # the page of one method
```
"""
LEGEND = """* `kind` is what the method itself changes: {kinds}.
  A method that stands on another one has the kind of what it adds.
* `teacher`: it needs another network, which was trained before.
* `CNN`, `ViT`: whether it takes a small ResNet and a small ViT, tried on timm's `test_resnet` and `test_vit`.
* `needs` is what a loop hands over, [batch, model or step](../loops.md).
* `FLOPs` of a whole training step relative to one without mixing: [what mixing costs](../speed.md).
* `top-1` on ImageNet-1k as published, in percent: ResNet-50 for 100 epochs (`r50_100e`) and DeiT-S for 300 (`deit_s`).
  {marks} Rows have the hyperparameters that their table prints: [published numbers](../results.md).

Pictures and what is tried are made by `mixup-recipes methods draw`, this page and the others by `{render}`.
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


def listing(kind: str | None = None, works_with: str | None = None, fmt: Format = "md") -> str:
    """The table as ``md``, with its columns under each other, ``csv``, ``latex`` or ``html``."""
    rows = chosen(kind, works_with)
    if fmt == "md":
        return aligned(markdown_table(COLUMNS, [list(map(escaped, r)) for r in rows], right=RIGHT, left=LAST))
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
    words = ", ".join(f"`{kind}` {what}" for kind, what in KINDS.items())
    marks = " ".join(f"{mark} {cells.MEANING[source]}." for source, mark in cells.MARKS.items() if mark)
    table = markdown_table(COLUMNS, [list(map(escaped, r)) for r in rows], right=RIGHT, left=LAST)
    return "\n".join([INTRODUCTION, table, "", LEGEND.format(kinds=words, marks=marks, render=RENDER)])


def rendered() -> dict[str, str]:
    """Every page by its file name. Raises ``UserError`` where a method was not tried yet."""
    if missing := [name for name in own() if name not in facts()]:
        raise UserError(f"model_cards/methods.csv lacks some: run mixup-recipes methods draw {' '.join(missing)}")
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
