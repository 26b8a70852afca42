"""The published tables rebuilt, with our runs beside the numbers: Markdown, CSV, LaTeX and HTML.

Rows are methods with the printed alpha, columns are backbones. Everything comes from ``published.csv``, the recipes
and the run records; the same input gives the same bytes. The CSV is in long form, one row per cell.
"""

import csv
import html
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mixup_recipes.benchmark.cells import MARKS, MEANING, NOT_STATED, Cell, hours, protocol, select, source, titles
from mixup_recipes.benchmark.verdicts import status
from mixup_recipes.runs.records import in_short, ours, published_recipe
from mixup_recipes.training.protocols import rule_in_words
from mixup_recipes.typed import UserError, nearest
from mixup_recipes.words import many

HEADINGS = {
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "resnet101": "ResNet-101",
    "resnext101_32x4d": "ResNeXt-101",
    "efficientnet_b0": "EfficientNet-B0",
    "mobilenet_v2_1x": "MobileNet.V2 1x",
    "deit_tiny": "DeiT-T",
    "deit_small": "DeiT-S",
    "deit_base": "DeiT-B",
    "pvt_tiny": "PVT-T",
    "pvt_small": "PVT-S",
    "swin_tiny": "Swin-T",
    "convnext_tiny": "ConvNeXt-T",
    "moganet_tiny": "MogaNet-T",
    "resnext50_32x4d": "ResNeXt-50",
    "wrn28_8": "WRN-28-8",
}
"""What columns are called; another backbone has its own name."""
CSS = """body { font: 15px/1.45 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse; margin: 0 0 3em }
caption { caption-side: bottom; text-align: left; padding-top: .8em; color: #555; font-size: 13px; max-width: 70em }
th, td { padding: .3em .8em; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top }
th:first-child { text-align: left }
thead th { border-bottom: 2px solid #222 }
td span { display: block; font-size: 12px; white-space: nowrap }
.reproduced { color: #00694a } .off { color: #a8341f } .early { color: #7a5a00 } .run { color: #555 }"""
CLASSES = {"reproduced within the band": "reproduced", "off": "off", "too early to say": "early", "run": "run"}
LATEX = {
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "†": r"\textsuperscript{\textdagger}",
    "‡": r"\textsuperscript{\textdaggerdbl}",
    "±": r"$\pm$",
}


class Entry(NamedTuple):
    """What a table shows of one cell: published number, its mark, whether it is bold, our runs."""

    number: str
    mark: str
    best: bool
    ours: str
    status: str


EMPTY = Entry("-", "", False, "", "")
"""Where a table has no cell."""


class Table(NamedTuple):
    """A published table with our runs: column headings, rows of (method, alpha, entries), and what to say below."""

    title: str
    columns: list[str]
    rows: list[tuple[str, str, list[Entry]]]
    notes: list[str]
    command: str


def entry(cell: Cell, content: dict[str, Any] | None, best: float) -> Entry:
    """One cell beside our record of it. ``best``: the best number of the column that OpenMixup trained."""
    state, _ = status(cell, content)
    number = "-" if cell.top1 is None else f"{cell.top1:.2f}"
    mark = MARKS[cell.source] if cell.top1 is not None else ""
    shown = state in CLASSES
    text = in_short(content) if shown and content and ours(content) else ""
    return Entry(number, mark, cell.trained_upstream and cell.top1 == best, text, state if shown else "")


def build(benchmark: str, records: dict[str, dict[str, Any]], command: str) -> Table:
    """The table of one benchmark. ``records``: our run records by cell name; ``command``: what makes this table."""
    chosen = select(benchmark=benchmark)
    settings = dict.fromkeys(c.setting for c in chosen)
    trained = [(c.setting, c.top1) for c in chosen if c.trained_upstream and c.top1 is not None]
    best = {s: max((top1 for of, top1 in trained if of == s), default=math.nan) for s in settings}
    rows: dict[tuple[str, str], dict[str, Entry]] = {}
    for c in chosen:
        row = rows.setdefault((c.method, c.alpha or "-"), {})
        row[c.setting] = entry(c, records.get(c.name), best[c.setting])
    headings = {c.setting: HEADINGS.get(c.backbone, c.backbone) for c in chosen}
    if len(set(headings.values())) < len(headings):
        headings = {s: f"{heading}, {published_recipe(s).epochs} epochs" for s, heading in headings.items()}
    protocols: dict[str, list[str]] = {}
    for setting in settings:
        protocols.setdefault(rule_in_words(published_recipe(setting)), []).append(headings[setting])
    several = len(protocols) > 1
    reported = [p + (f" ({', '.join(h)})" if several else "") for p, h in protocols.items()]
    others: dict[str, list[str]] = {}
    for c in chosen:
        if c.top1 is not None and not c.stated:
            others.setdefault(c.method, []).append(headings[c.setting])
    in_part = {c.method for c in chosen if c.top1 is not None and c.stated}
    reported += [m + (f" ({', '.join(h)})" if m in in_part else "") + f": {NOT_STATED}" for m, h in others.items()]
    sources = dict.fromkeys(c.source for c in chosen if c.top1 is not None)
    marks = "".join(f" {MARKS[s]} {MEANING[s]}." for s in sources if MARKS[s])
    runs = sum(bool(e.status) for row in rows.values() for e in row.values())
    below = (
        f"Our runs stand beside it as mean ± standard deviation over seeds, where there are any ({many(runs, 'cell')})."
    )
    notes = [
        f"Top-1 accuracy in percent. Published numbers: {'; '.join(dict.fromkeys(map(source, chosen)))}.",
        f"Reported number: {'; '.join(reported)}.",
        f"The best number of each column that OpenMixup trained is bold.{marks}",
        below if runs else "No runs of ours are recorded for this table.",
        f"The recipe of a cell is SETTING_MIXER. The settings are {', '.join(settings)}.",
    ]
    methods = list(dict.fromkeys(method for method, _ in rows))  # one may have several alphas
    ordered = sorted(rows.items(), key=lambda item: methods.index(item[0][0]))
    body = [(method, alpha, [row.get(s, EMPTY) for s in settings]) for (method, alpha), row in ordered]
    return Table(titles()[benchmark], list(headings.values()), body, notes, command)


def markdown(table: Table) -> str:
    """A GitHub table with its notes below."""

    def show(e: Entry) -> str:
        text = (f"**{e.number}**" if e.best else e.number) + e.mark
        return "<br>".join([text, *filter(None, (e.ours, e.status))])

    lines = [["method", "alpha", *table.columns], ["---", "---:", *["---:"] * len(table.columns)]]
    lines += [[method, alpha, *map(show, entries)] for method, alpha, entries in table.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join([*table.notes, f"Generated by `{table.command}`."])
    return f"### {table.title}\n\n{body}\n\n{notes}\n"


def tex(text: str) -> str:
    """Text escaped for LaTeX."""
    return "".join(LATEX.get(c, c) for c in text).replace("--", "-{}-")  # the hyphens of a flag, not a dash


def latex(table: Table) -> str:
    """A table environment with booktabs rules."""

    def show(e: Entry) -> str:
        text = (rf"\textbf{{{tex(e.number)}}}" if e.best else tex(e.number)) + tex(e.mark)
        return " / ".join([text, *filter(None, (tex(e.ours), tex(e.status)))])

    head = ["Method", r"$\alpha$", *map(tex, table.columns)]
    body = [[tex(method), tex(alpha), *map(show, entries)] for method, alpha, entries in table.rows]
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{tex(table.title)}, top-1 in percent}}",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in body),
        r"\bottomrule",
        r"\end{tabular}",
        rf"\par\smallskip\footnotesize {tex(' '.join(table.notes))} Generated by \texttt{{{tex(table.command)}}}.",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def webpage(tables: list[Table]) -> str:
    """A self-contained page."""

    def show(e: Entry) -> str:
        text = html.escape(e.number)
        text = f"<strong>{text}</strong>" if e.best else text
        text += f"<sup>{e.mark}</sup>" if e.mark else ""
        kind = f' class="{CLASSES[e.status]}"' if e.status else ""
        return (
            "<td>" + text + "".join(f"<span{kind}>{html.escape(t)}</span>" for t in (e.ours, e.status) if t) + "</td>"
        )

    lines = ["<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">']
    lines += ["<title>Mixup Recipes: published tables</title>", f"<style>\n{CSS}\n</style>", "</head>", "<body>"]
    for table in tables:
        notes = "<br>".join(html.escape(note) for note in table.notes)
        notes += f"<br>Generated by <code>{html.escape(table.command)}</code>."
        head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in ("method", "alpha", *table.columns))
        lines += [f"<h2>{html.escape(table.title)}</h2>", "<table>", f"<caption>{notes}</caption>"]
        lines += [f"<thead><tr>{head}</tr></thead>", "<tbody>"]
        for method, alpha, entries in table.rows:
            cells = f'<th scope="row">{html.escape(method)}</th><td>{html.escape(alpha)}</td>'
            lines.append(f"<tr>{cells}{''.join(map(show, entries))}</tr>")
        lines += ["</tbody>", "</table>"]
    return "\n".join([*lines, "</body>", "</html>"]) + "\n"


def long_form(benchmarks: list[str], records: dict[str, dict[str, Any]]) -> str:
    """CSV, one row per cell: everything published, the protocol, estimated hours, and our runs."""
    words = {}
    out = io.StringIO()
    more = ["mark", "protocol", "hours_low", "hours_mid", "hours_high"]
    more += ["our_mean", "our_std", "our_seeds", "status", "status_text"]
    writer = csv.DictWriter(out, [*Cell._fields, *more], lineterminator="\n")
    writer.writeheader()
    for cell in (c for b in benchmarks for c in select(benchmark=b)):
        if cell.setting not in words:
            words[cell.setting] = rule_in_words(published_recipe(cell.setting))
        content = records.get(cell.name)
        mean, std, seeds = ours(content) or (None, None, 0)
        row = cell._asdict() | dict(zip(more[:1], [MARKS[cell.source]], strict=True))
        row |= {"top1": "" if cell.top1 is None else f"{cell.top1:.2f}"}
        row |= {"protocol": protocol(cell, words[cell.setting])}
        row |= {"trained_upstream": "yes" if cell.trained_upstream else "no"}
        row |= {f"hours_{k}": f"{h:.2f}" for k, h in zip(("low", "mid", "high"), hours(cell), strict=True)}
        row |= {"our_mean": "" if mean is None else f"{mean:.3f}", "our_std": "" if std is None else f"{std:.3f}"}
        row |= {"our_seeds": seeds} | dict(zip(("status", "status_text"), status(cell, content), strict=True))
        writer.writerow(row)
    return out.getvalue()


FORMATS: dict[str, Callable[[list[Table]], str]] = {
    "md": lambda tables: "\n".join(map(markdown, tables)),
    "latex": lambda tables: "\n".join(map(latex, tables)),
    "html": webpage,
}


def published_table(
    benchmark: str | None, records: dict[str, dict[str, Any]], fmt: str = "md", results: Path | None = None
) -> str:
    """A published table, or all of them for None, as ``md``, ``csv``, ``latex`` or ``html``.

    ``records``: our run records by cell name (``verdicts.of_cells``); ``results``: their folder, if not the default
    one, to be named in the command below the table. Raises ``UserError`` for an unknown benchmark or format.
    """
    if benchmark is not None and benchmark not in titles():
        raise UserError(f"unknown benchmark {benchmark!r}; {nearest(benchmark, titles())}")
    if fmt != "csv" and fmt not in FORMATS:
        raise UserError(f"unknown format {fmt!r}; {nearest(fmt, ['csv', *FORMATS])}")
    benchmarks = [benchmark] if benchmark else list(titles())
    if fmt == "csv":
        return long_form(benchmarks, records)
    command = f"mixup-recipes table{f' --benchmark {benchmark}' if benchmark else ''} --format {fmt}"
    command += f" --results {' '.join(str(results).splitlines())}" if results else ""
    return FORMATS[fmt]([build(b, records, command) for b in benchmarks])
