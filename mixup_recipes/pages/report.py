"""A report over run folders: one table, the curves, and the mixed batches, all generated from what the runs logged.

Top-1, top-5 and ECE are percentages, NLL is in nats, times are wall seconds. The reported numbers follow the
setting's protocol (``training/protocols.py``): each metric's median over the last epochs, or all metrics of the epoch
with the highest top-1.
"""

import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mixup_recipes import files
from mixup_recipes.data.decoding import BadImage, decode, read
from mixup_recipes.pages import plots
from mixup_recipes.pages.markdown import escaped, markdown_table
from mixup_recipes.runs.run import Run, labels
from mixup_recipes.typed import UserError


def runs_table(runs: list[Run]) -> str:
    """The runs as a Markdown table, with a line that says what was measured."""
    rows = [run.summary for run in runs]
    if not rows:
        raise UserError("no run folders given")
    protocols = sorted({row.protocol for row in rows})
    shared = len(protocols) == 1
    head = ["run", "mixer", "epochs", f"top-1 ({protocols[0]})" if shared else "top-1", "top-5", "NLL", "ECE"]
    head += ["seconds", "images/s"]
    lines = []
    for name, row in zip(labels(runs), rows, strict=True):
        done, planned, used, wanted = (row.epochs, row.epochs_planned, row.epochs_used, row.epochs_wanted)
        notes = [] if shared else [row.protocol]
        notes += [f"{used} of {wanted} epochs"] if used < wanted else []
        lines.append([
            escaped(name),
            row.mixer,
            f"{done}" if done == planned else f"{done} of {planned}",
            f"{row.top1:.2f}" + (f" ({', '.join(notes)})" if notes else ""),
            f"{row.top5:.2f}",
            f"{row.nll:.3f}",
            f"{row.ece:.2f}",
            f"{row.seconds:.0f}",
            f"{row.img_per_s:.0f}",
        ])  # fmt: skip
    evaluated = " / ".join(dict.fromkeys(f"{row.count:,} images of `{row.split}`" for row in rows))
    note = f"Evaluated on {evaluated}. Top-1, top-5 and ECE in percent, NLL in nats, seconds of wall time."
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


def report(runs: list[Run], out: Path) -> str:
    """Write ``table.md``, ``curves.png`` and, if runs have sample sheets, ``samples.png`` into the folder ``out``.

    Returns the table. Raises ``UserError`` for what cannot be read or drawn, before anything is written.
    """
    text = runs_table(runs)
    mixers = [run.recipe.mixer for run in runs]
    titles = [m if mixers.count(m) == 1 else f"{m} ({n})" for m, n in zip(mixers, labels(runs), strict=True)]
    sheets = [(title, sheet) for title, run in zip(titles, runs, strict=True) if (sheet := run.last_sheet)]
    with tempfile.TemporaryDirectory() as folder:  # all is made before any of it is written
        aside = Path(folder)
        plots.curves(runs, aside / "curves.png")
        if sheets:
            stack_sheets(sheets, aside / "samples.png")
        made = {path.name: path.read_bytes() for path in sorted(aside.iterdir())}
    for name, content in (made | {"table.md": text.encode()}).items():
        files.write_into(out / name, content)
    return text
