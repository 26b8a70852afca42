"""A report over run folders: one table, the curves, and the mixed batches, all generated from what the runs logged.

Top-1, top-5 and ECE are percentages, NLL is in nats, times are wall seconds. The reported numbers follow the
setting's protocol (``training/protocols.py``): each metric's median over the last epochs, or all metrics of the epoch
with the highest top-1; or, of runs whose images may have several labels, mAP.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from PIL import Image, ImageDraw, ImageFont

from mixup_recipes import files
from mixup_recipes.data.decoding import BadImage, decode, read
from mixup_recipes.pages import by_class, by_label, diagrams, plots
from mixup_recipes.pages.markdown import escaped, line, markdown_table, prose
from mixup_recipes.runs.run import METRICS, UNITS, Run, Summary, labels
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

Scored = by_class.Scored | by_label.Scored
"""Of a run whose images have one label, or may have several."""


def runs_table(runs: list[Run]) -> str:
    """The runs as a Markdown table for each headline, with a line that says what was measured."""
    if not runs:
        raise UserError("no run folders given")
    named = list(zip(labels(runs), [run.summary for run in runs], strict=True))
    metrics = dict.fromkeys(row.metric for _, row in named)
    return "\n".join(table_of([(name, row) for name, row in named if row.metric == metric]) for metric in metrics)


def table_of(named: list[tuple[str, Summary]]) -> str:
    """The table of runs with one headline, by their names."""
    rows = [row for _, row in named]
    protocols = sorted({row.protocol for row in rows})
    shared = len(protocols) == 1
    first, *others = METRICS[rows[0].metric].values()
    head = ["run", "mixer", "epochs", f"{first} ({protocols[0]})" if shared else first, *others, "seconds", "images/s"]
    lines = []
    for name, row in named:
        number, *numbers = [f"{value:.{3 if metric == 'nll' else 2}f}" for metric, value in row.scores.items()]
        done, planned, used, wanted = (row.epochs, row.epochs_planned, row.epochs_used, row.epochs_wanted)
        notes = [] if shared else [row.protocol]
        notes += [f"{used} of {wanted} epochs"] if used < wanted else []
        lines.append([
            escaped(name),
            row.mixer,
            f"{done}" if done == planned else f"{done} of {planned}",
            number + (f" ({', '.join(notes)})" if notes else ""),
            *numbers,
            f"{row.seconds:.0f}",
            f"{row.img_per_s:.0f}",
        ])  # fmt: skip
    evaluated = " / ".join(dict.fromkeys(f"{many(row.count, 'image')} of `{row.split}`" for row in rows))
    note = f"Evaluated on {evaluated}. {UNITS[rows[0].metric]}, seconds of wall time."
    return f"{markdown_table(head, lines, right=2)}\n\n{note}\n"


def stack_sheets(sheets: list[tuple[str, Path]], out: Path) -> None:
    """Stack pictures into the PNG ``out``, each below its title, at the width of the widest."""
    pictures = []
    for _, path in sheets:
        try:
            pictures.append(Image.fromarray(decode(read(path)).permute(1, 2, 0).numpy()))
        except BadImage as e:
            raise UserError(f"cannot read the sample sheet {path}: {' '.join(str(e).split())}") from None
    width = max(picture.width for picture in pictures)
    font_size = max(14, min(28, width // 24))
    pad, font = font_size // 2, ImageFont.load_default(font_size)
    height = pad + sum(picture.height + font_size + 3 * pad for picture in pictures)
    page = Image.new("RGB", (width + 2 * pad, height), "white")
    draw, top = ImageDraw.Draw(page), pad
    for (title, _), picture in zip(sheets, pictures, strict=True):
        draw.text((pad, top), title, fill="#222222", font=font)
        top += font_size + pad
        page.paste(picture, (pad, top))
        top += picture.height + 2 * pad
    page.save(out)


@contextlib.contextmanager
def all_at_once(out: Path) -> Iterator[Path]:
    """A folder to make files in, which are written into ``out`` when all of them are made."""
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder)
        yield aside
        made = {path.relative_to(aside): path.read_bytes() for path in sorted(aside.rglob("*")) if path.is_file()}
    for name, content in made.items():
        files.write_into(out / name, content)


def draw_overview(runs: list[Run], folder: Path) -> str:
    """Make ``table.md``, ``curves.png`` and, if runs have sample sheets, ``samples.png``; returns the table."""
    text = runs_table(runs)
    mixers = [run.recipe.mixer for run in runs]
    titles = [m if mixers.count(m) == 1 else f"{m} ({n})" for m, n in zip(mixers, labels(runs), strict=True)]
    sheets = [(title, sheet) for title, run in zip(titles, runs, strict=True) if (sheet := run.last_sheet)]
    plots.curves(runs, folder / "curves.png")
    if sheets:
        stack_sheets(sheets, folder / "samples.png")
    files.write(folder / "table.md", text)
    return text


def overview(runs: list[Run], out: Path) -> str:
    """Write what ``draw_overview`` makes into the folder ``out``. Raises ``UserError``: see ``report``."""
    with all_at_once(out) as folder:
        return draw_overview(runs, folder)


def report(runs: list[Run], out: Path) -> str:
    """Write the overview of the runs and a page for each into the folder ``out``: ``report.md`` leads to all of it.

    The page of a single run is ``report.md`` itself, those of several are in folders of their names. Returns the
    tables, and in words what was taken for what. Raises ``UserError`` for what cannot be read or drawn, before
    anything is written.
    """
    with all_at_once(out) as folder:
        text = draw_overview(runs, folder)
        runs = list({run.folder.resolve(): run for run in runs}.values())  # a page each
        names = dict(zip(labels(runs), runs, strict=True))
        found = [scored(run, name) for name, run in names.items() if not by_class.lacks(run)]
        of_one = [run for run in found if isinstance(run, by_class.Scored)]
        of_several = [run for run in found if isinstance(run, by_label.Scored)]
        parts = [text.strip()]
        parts += [by_class.scores_table(of_one).strip()] if of_one else []
        parts += [by_label.scores_table(of_several).strip()] if of_several else []
        parts += [f"{prose(name)} has no {lack}, and so no scores by class." for name, run in names.items()
                  if (lack := by_class.lacks(run))]  # fmt: skip
        said = "\n\n".join([*parts, *map(worst_line, found)]) + "\n"
        parts.append("![Learning curves](curves.png)")
        if len(runs) == 1:
            parts += [write_page(run, folder) for run in found]
        else:
            parts += pages(found, folder)
        if (folder / "samples.png").exists():
            parts.append("## Mixed images\n\n![Mixed images](samples.png)")
        files.write(folder / "report.md", "\n\n".join(["# Report", *parts]) + "\n")
    return said


def scored(run: Run, title: str) -> Scored:
    """The scores of a run that lacks nothing."""
    return by_label.scored(run, title) if run.recipe.multi_label else by_class.scored(run, title)


def write_page(found: Scored, folder: Path) -> str:
    """Write the tables and pictures of a run into a folder; returns what its page says."""
    if isinstance(found, by_label.Scored):
        return by_label.write_page(found, folder)
    return by_class.write_page(found, folder)


def worst(found: Scored) -> list[str]:
    """What a run gets wrong most, in words."""
    return by_label.worst(found, 3) if isinstance(found, by_label.Scored) else by_class.worst_pairs(found, 3)


def worst_line(found: Scored) -> str:
    """The classes that a run takes for others most often, in one line."""
    return line(f"{found.title}: {'; '.join(worst(found)) or 'every image is right'}", 500)


def pages(found: list[Scored], folder: Path) -> list[str]:
    """Make a page for each of several runs; returns what leads to them."""
    if not found:
        return []
    lines = []
    for run in found:
        place = Path(*[part for part in run.title.split("/") if part])
        text = write_page(run, folder / place)
        files.write(folder / place / "report.md", f"# {prose(run.title)}\n\n{text}\n")
        pairs = "; ".join(map(prose, worst(run))) or "every image is right"
        lines.append(f"* [{prose(run.title)}]({quote(str(place))}/report.md): {pairs}")
    parts = ["## Each run\n\n" + "\n".join(lines)]
    if of_one := [run.sure for run in found if isinstance(run, by_class.Scored)]:
        diagrams.reliability(of_one, folder / "reliability.png")
        parts.append("## Calibration\n\n![Reliability diagrams](reliability.png)")
    return parts
