"""Validation curves from the logs people have: our run folders, OpenMixup's JSON logs, timm's summary.csv.

What a file is shows in its content, not in its name:

- ours, ``log.jsonl``: JSON lines with mode, epoch and update.
- OpenMixup (mmcv's TextLoggerHook): JSON lines, the first with env_info; validation lines with ``head0_top1``, or
  ``acc_{one,mix}_{q,k}_top1`` of AutoMix's and SAMix's four classifiers. Epochs from 1. Each start of a run begins a
  file of its own: of a folder the last one in lexical order counts, as for OpenMixup's tools.
- timm, ``summary.csv``: one row per evaluated epoch, epochs from 0, ``eval_top1`` and ``eval_loss``. With an average of
  the weights ``eval_top1`` is that of the average, and of it alone. A resumed run repeats the header.
- ours, ``summary.csv``: the same columns, but epochs from 1, and ``eval_nll`` where timm has ``eval_loss``.
"""

import csv
import re
from pathlib import Path
from typing import Any, NamedTuple

from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs.log import json_lines, our_lines
from mixup_recipes.runs.run import RECIPE, Run
from mixup_recipes.runs.shapes import check_validation, naming, read_text
from mixup_recipes.training import protocols
from mixup_recipes.typed import UserError
from mixup_recipes.words import many


class Curves(NamedTuple):
    """Top-1 of a run over its epochs, or mAP where an image may have several labels."""

    source: str
    """Path and format."""
    ours: bool
    """Our formats tell the average of the weights apart; OpenMixup and timm log it as if it were the model."""
    heads: dict[str, dict[int, float]]
    """Classifier ("" where there is one, "ema" for the average of the weights) -> epoch, from 1 -> percent."""


# ------------------------------------------------------------------------------------------- files


def curves_of(source: Run | Path) -> Curves:
    """The validation curves of a run, of a log, or of the newest log in a folder.

    Of a repeated epoch the last line counts. Raises ``UserError`` for no such file, an unknown format, damage, or a log
    without validation.
    """
    if isinstance(source, Run):
        heads = protocols.by_head([row.line for row in source.log.val], protocols.headline(source.recipe))
        if not heads:
            raise UserError(f"{source.folder / 'log.jsonl'}: our log has no validation lines")
        return Curves(f"{source.folder / 'log.jsonl'}: our log", True, heads)
    file = newest_log(source) if source.is_dir() else source
    text = read_text(file)
    first = next((row for row in text.split("\n") if row.strip()), "")
    if first.startswith("{") and re.search('"(mode|env_info)"', text):
        kind, lines = json_log(file, text)
    elif re.match(r"epoch,.*\beval_top1\b", first):
        kind, lines = csv_summary(file, text)
    else:
        raise unknown(file)
    heads = protocols.by_head(lines) or protocols.by_head(lines, "map")
    if not heads:
        raise UserError(f"{file}: {kind} has no validation lines")
    return Curves(f"{file}: {kind}", kind.startswith("our"), heads)


def newest_log(folder: Path) -> Path:
    """``log.jsonl``, else OpenMixup's last JSON log in lexical order, else ``summary.csv``."""
    found = sorted(file for file in folder.iterdir() if file.suffix == ".json")  # glob hides unreadable folders
    for file in (folder / "log.jsonl", *found[-1:], folder / "summary.csv"):
        if file.is_file():
            return file
    raise UserError(f"no log in {folder}: expected log.jsonl, an OpenMixup *.log.json or a summary.csv")


def unknown(path: Path) -> UserError:
    """The error for a file that is none of the known formats."""
    return UserError(
        f"{path}: unknown format; expected our log.jsonl or summary.csv, OpenMixup's JSON log, or timm's summary.csv"
    )


def json_log(path: Path, text: str) -> tuple[str, list[dict[str, Any]]]:
    """Format and validation lines of a log in JSON lines, with OpenMixup's names turned into ours."""
    lines = json_lines(path, text)
    if any("update" in line for _, line in lines):
        return "our log", [line for _, line in our_lines(path, text) if line["mode"] == "val"]
    val = []
    for where, line in lines:
        if line.get("mode") == "val":
            check_validation(line, where)
            for old, new in (("head0_top1", "top1"), ("acc_one_", "one_"), ("acc_mix_", "mix_")):
                line = {re.sub(f"^{old}", new, key): value for key, value in line.items()}
            val.append(line)
    return "OpenMixup's log", val


def csv_summary(path: Path, text: str) -> tuple[str, list[dict[str, Any]]]:
    """Format and rows of a summary.csv, epochs from 1. A last row without a line's end may be cut and is left out."""
    reader = csv.reader(text.splitlines())
    try:
        rows = [(reader.line_num, row) for row in reader][: None if text.endswith("\n") else -1]
    except csv.Error as e:
        raise UserError(f"{path}, line {reader.line_num}: {e}") from None
    lines, header = [], rows[0][1] if rows else []
    kinds = {"eval_loss": ("timm's summary.csv", 1), "eval_nll": ("our summary.csv", 0)}
    found = [kind for column, kind in kinds.items() if column in header]
    if len(found) != 1:
        raise UserError(
            f"{path}: unknown format; expected a column eval_loss (timm) or eval_nll (ours) beside eval_top1"
        )
    if again := [column for column in header if header.count(column) > 1]:
        raise UserError(f"{path}, line 1: column {again[0]} comes {header.count(again[0])} times")
    kind, offset = found[0]
    for number, row in rows:
        if row == header:
            continue
        try:
            values = {k: float(v) for k, v in zip(header, row, strict=True)}
        except ValueError:
            raise UserError(f"{path}, line {number}: expected {many(len(header), 'number')}, one per column") from None
        values = {k: int(v) if v.is_integer() else v for k, v in values.items()}
        line = {"epoch": values["epoch"] + offset}
        line |= {k.removeprefix("eval_"): v for k, v in values.items() if k.startswith("eval_")}
        check_validation(line, f"{path}, line {number}")
        lines.append(line)
    return kind, lines


def opened(path: Path) -> Run | Path:
    """A run folder as a run; a log, or a folder of logs, as it is."""
    return Run.open(path) if (path / RECIPE).is_file() and (path / "log.jsonl").is_file() else path


def own_recipe(source: Run | Path, ours: bool) -> Recipe | None:
    """The recipe of a run, or of the run whose log one of our files is."""
    if isinstance(source, Run):
        return source.recipe
    folder = source if source.is_dir() else source.parent
    return Run.open(folder).recipe if ours and (folder / RECIPE).is_file() else None


def describe(
    sources: list[Run | Path], recipe: str | None, protocol: str | None, last: int | None, epochs: int | None
) -> str:
    """Both readings of each log with their names; of several logs, oldest first, also mean and deviation over trials.

    The rule comes from the recipe, the run's own if none is named, or is given: ``protocol`` that of
    ``Recipe``, so many ``last`` epochs, planned ``epochs``.
    """
    if not sources:
        raise UserError("no log was given; pass a run folder, a log or a summary.csv")
    for flag, value in (("--last", last), ("--epochs", epochs)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: expected at least 1")
    found = [readings_of(source, recipe, protocol, last, epochs) for source in sources]
    rows = [text for text, _, _ in found]
    if len(sources) > 1:
        for readings in ([strict for _, strict, _ in found], [tool for _, _, tool in found]):
            name, *others = {protocols.plainly(reading.name) for reading in readings}
            if not others and not any(reading.missing for reading in readings):
                mean, std = protocols.over_trials([reading.value for reading in readings])
                rows.append(f"{mean:7.3f}  ± {std:.3f}, mean of the newest {min(3, len(sources))} runs: {name}")
    return "\n".join(rows)


def readings_of(
    source: Run | Path, recipe: str | None, protocol: str | None, last: int | None, epochs: int | None
) -> tuple[str, protocols.Reading, protocols.Reading]:
    """The readings of one log as text, the strict one (of the last classifier) and that of OpenMixup's tool."""
    curves = curves_of(source)
    known = load_recipe(recipe) if recipe else own_recipe(source, curves.ours)
    if known:
        protocol, last, epochs = protocol or known.protocol, last or known.protocol_epochs, epochs or known.epochs
    if protocol not in ("median", "best", "best_of_last"):
        given = "" if protocol is None else f", not {protocol!r}"
        raise UserError(
            f"the protocol is not known; pass --recipe NAME, or --protocol median, best or best_of_last{given}"
        )
    if epochs is None or (protocol != "best" and last is None):
        example = "--epochs 300" if protocol == "best" else "--last 5 --epochs 100"
        raise UserError(f"the number of epochs is not known; pass --recipe NAME, or {example}")
    ema = known.report_ema if known and curves.ours else False
    heads = protocols.reported_heads(curves.heads, ema)
    if not heads:
        raise UserError(f"{curves.source} has {'only' if not ema else 'no'} values of averaged weights")
    rule = (protocol, last or 1, epochs)
    done = max(max(values) for values in heads.values())
    rows = [f"{curves.source}, {done} of {many(epochs, 'epoch')}"]
    with naming(source.folder if isinstance(source, Run) else source):
        for head, values in heads.items():
            strict = protocols.strict(values, *rule)
            rows.append(f"{strict.value:7.3f}  {protocols.plainly(strict.label)}" + (f", {head}" if head else ""))
        tool = protocols.tool(heads, *rule)
    return "\n".join([*rows, f"{tool.value:7.3f}  {tool.label}"]), strict, tool
