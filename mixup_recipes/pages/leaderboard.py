"""The leaderboard: one static page of published numbers, our runs beside them, what was trained here, and what it cost.

``facts`` gathers everything that the page shows from the published cells, the run records and the counted costs, as
plain data; ``html`` puts them into one file with the style and the scripts of ``leaderboard_page/``. The page needs no
network and no other file. The same records give the same bytes.
"""

import json
import math
import shlex
import statistics
from pathlib import Path
from typing import Any

from mixers.registry import docstring
from mixup_recipes import __version__
from mixup_recipes.benchmark import cells
from mixup_recipes.benchmark.listing import known_lines
from mixup_recipes.benchmark.small_runs import label
from mixup_recipes.benchmark.tables import HEADINGS
from mixup_recipes.benchmark.verdicts import judged_by, status
from mixup_recipes.files import write_into
from mixup_recipes.pages.methods import METHODS, parse, year
from mixup_recipes.resolve import settings, split_name
from mixup_recipes.runs.curves import curves_of
from mixup_recipes.runs.records import all_records, finished_seeds, finished_top1, ours, published_recipe
from mixup_recipes.runs.run import Run
from mixup_recipes.training.protocols import NAMES, headline, plainly
from mixup_recipes.typed import UserError

ASSETS = Path(__file__).with_name("leaderboard_page")
SCRIPTS = ("common.js", "tables.js", "plots.js", "page.js")
"""In the order in which they stand on the page."""
MARK = '<meta name="generator" content="mixup-recipes leaderboard">'
"""By this line a page is known as one of ours, which may be written anew."""
SPACE = (ASSETS / "space.md").read_text(encoding="utf-8")
"""The ``README.md`` of a static Space."""
SPREAD = {"top1": "top-1", "nll": "NLL", "ece": "ECE"}


class Texts:
    """Texts that are said many times, each kept once."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        """The place of a text in ``all``."""
        return self.places.setdefault(text, len(self.places))

    @property
    def all(self) -> list[str]:
        """The texts by their place."""
        return list(self.places)


def finite(value: float | None) -> float | None:
    """A number as JSON can say it: None for one that is not finite."""
    return value if value is not None and math.isfinite(value) else None


def cost_of(model: str, mixer: str) -> dict[str, float]:
    """FLOPs of a training step and what it keeps for the backward pass, relative to one without mixing, if counted."""
    found = [r for r in cells.rows("costs.csv") if (r["model"], r["mixer"]) == (model, mixer)]
    return {key: float(found[0][key]) for key in ("flops", "kept") if found and found[0][key]}


def year_of(mixer: str) -> str:
    """The year of a method's paper; empty for none, and for a mixer that is not known here."""
    return year(parse(docstring(mixer))) if mixer in METHODS else ""


def cell_facts(cell: cells.Cell, content: dict[str, Any] | None, texts: Texts) -> dict[str, Any]:
    """One published cell with our runs of it, and all that ``cells show`` says."""
    state, words = status(cell, content)
    found: dict[str, Any] = {"name": cell.name, "benchmark": cell.benchmark, "setting": cell.setting}
    found |= {"mixer": cell.mixer, "method": cell.method, "alpha": cell.alpha, "top1": cell.top1, "status": state}
    found |= {"mark": cells.MARKS[cell.source] if cell.top1 is not None else ""}
    found |= {"words": texts(words), "trained_upstream": cell.trained_upstream}
    found |= cost_of(published_recipe(cell.setting).model, cell.mixer)
    found["facts"] = [[key, texts(text)] for key, text in known_lines(cell, content)]
    if content and (own := ours(content)):
        found |= {"mean": own[0], "std": own[1], "seeds": own[2], "values": finished_top1(content)}
        if cell.top1 is not None:
            judged = judged_by(cell, content, cell.top1, finished_top1(content))
            found |= {"difference": judged.difference, "band": judged.band}
    return {key: value for key, value in found.items() if value not in (None, "")}


def place_of(content: dict[str, Any]) -> str:
    """The setting of a record; for a recipe of somebody's own its name without the mixer."""
    try:
        return split_name(content["recipe"])[0]
    except UserError:
        return str(content["recipe"]).removesuffix(f"_{content['fields']['mixer']}")


def repeat(content: dict[str, Any], seeds: list[str]) -> str:
    """The command that trains a record's seeds anew, with what its runs changed in the recipe."""
    mixer, changed = content["fields"]["mixer"], dict(content["overrides"] or {})
    old, new = (row.get(mixer, {}) for row in changed.pop("mixer_args", ({}, {})))
    given = {key: here for key, (_, here) in changed.items()}
    given |= {f"mixer.{key}": new.get(key) for key in old | new if old.get(key) != new.get(key)}
    words = ["mixup-recipes", "sweep", "--recipes", content["recipe"], "--seeds", *seeds]
    words += ["--set", *(f"{key}={said(here)}" for key, here in given.items())] if given else []
    return shlex.join(words)


def said(value: Any) -> str:
    """A value as a flag takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def row_facts(
    stem: str, content: dict[str, Any], base: dict[str, dict[str, Any]] | None, texts: Texts
) -> dict[str, Any]:
    """One record with its finished seeds. ``base``: the finished seeds that are subtracted, None for those themselves.

    ``gaps``: seed -> top-1 minus that of the same seed of the base.
    """
    own = finished_seeds(content)
    mixer = content["fields"]["mixer"]
    found: dict[str, Any] = {"name": stem, "recipe": content["recipe"], "label": label(content), "mixer": mixer}
    keys = ("top1", "top5", "nll", "ece", "seconds", "img_per_s")
    found["seeds"] = {k: {key: finite(s.get(key)) for key in keys} for k, s in own.items()}
    for key in SPREAD:
        values = [s[key] for s in own.values()]
        found[key] = finite(statistics.fmean(values))
        found[f"{key}_std"] = finite(statistics.stdev(values)) if len(values) > 1 else None
    found["seconds"] = finite(statistics.median(s["seconds"] for s in own.values()))
    found["gaps"] = {k: s["top1"] - base[k]["top1"] for k, s in own.items() if k in base} if base else {}
    found |= cost_of(content["fields"]["model"], mixer)
    found["facts"] = [[key, texts(text)] for key, text in provenance(content, own)]
    return found


def provenance(content: dict[str, Any], own: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Who trained the runs of a record, on what and with what, and the command that repeats them."""
    data = content["dataset"]["splits"]
    fields = content["fields"]
    there = f"{data[fields['train_split']]['images']:,} images of {fields['train_split']} to train on, "
    there += f"{content['images']:,} of {fields['eval_split']} to evaluate on"
    seeds = [f"seed {k}: {environment(seed.get('env') or {})}" for k, seed in own.items()]
    ours = place_of(content) in settings()
    command = repeat(content, list(own)) if ours else "a recipe of somebody's own, which this package does not have"
    return [
        ("measured", "trained here; the numbers are those of the run record"),
        ("protocol", plainly(content["protocol"]) if content["protocol"] else ""),
        ("data", f"{content['dataset'].get('dataset') or 'not named'}: {there}"),
        ("run", command),
        *(("" if i else "runs", text) for i, text in enumerate(seeds)),
    ]


def environment(env: dict[str, Any]) -> str:
    """Device, commit and versions of a run in a line."""
    packages = env.get("packages") or {}
    words = [str(env["device"])] if env.get("device") else []
    words += [f"commit {str(env['commit'])[:12]}"] if env.get("commit") else []
    words += [f"{name} {packages[name]}" for name in ("torch", "timm") if name in packages]
    return ", ".join(words) or "nothing is known of the machine"


def trained(records: dict[str, dict[str, Any]], texts: Texts) -> dict[str, list[dict[str, Any]]]:
    """What was trained here: setting -> a row per record with finished seeds, best mean first."""
    places: dict[str, dict[str, dict[str, Any]]] = {}
    for stem, content in records.items():
        if finished_seeds(content):
            places.setdefault(place_of(content), {})[stem] = content
    order = [*settings(), *sorted(places.keys() - settings().keys())]
    found = {}
    for place in (name for name in order if name in places):
        base = places[place].get(f"{place}_vanilla")
        seeds = finished_seeds(base) if base else None
        rows = [row_facts(s, c, None if c is base else seeds, texts) for s, c in places[place].items()]
        found[place] = sorted(rows, key=lambda row: (-row["top1"], row["name"]))
    return found


def setting_facts(name: str, fields: dict[str, Any] | None) -> dict[str, Any]:
    """What is said of a setting: the first line of its file, model, epochs. ``fields``: of a record, for others."""
    if name in settings():
        recipe = published_recipe(f"{name}_vanilla")
        title = settings()[name].read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        return {"title": title, "model": recipe.model, "epochs": recipe.epochs}
    return {"title": "a recipe of somebody's own", **{k: (fields or {}).get(k) for k in ("model", "epochs")}}


def curve_facts(runs: list[Run]) -> list[dict[str, Any]]:
    """The accuracy of runs over their epochs, of every classifier that was evaluated."""
    found = []
    for run in runs:
        recipe = run.recipe
        try:
            place = split_name(recipe.name)[0]
        except UserError:
            place = recipe.name.removesuffix(f"_{recipe.mixer}")
        heads = {head: [[e, finite(v)] for e, v in values.items()] for head, values in curves_of(run).heads.items()}
        row: dict[str, Any] = {
            "run": run.folder.resolve().name,
            "recipe": recipe.name,
            "setting": place,
            "mixer": recipe.mixer,
        }
        row |= {"seed": recipe.seed, "metric": NAMES[headline(recipe)], "heads": heads}
        row |= {"model": recipe.model, "epochs": recipe.epochs}
        found.append(row)
    return sorted(found, key=lambda r: (r["setting"], r["mixer"], r["seed"], r["run"]))


def facts(results: Path | None = None, runs: list[Run] | None = None) -> dict[str, Any]:
    """Everything that the page shows. ``results``: the folder of the records, if not this package's.

    ``runs`` add their curves. Top-1, ECE and differences are in percent, NLL in nats, times in seconds, costs relative
    to training without mixing. Texts stand once, in ``texts``; elsewhere is their place. Raises ``UserError`` for a
    folder that does not exist, and for a damaged record or run.
    """
    records, texts = all_records(results), Texts()
    published = [cell_facts(cell, records.get(cell.name), texts) for cell in cells.cells().values()]
    own, curves = trained(records, texts), curve_facts(runs or [])
    fields = {place_of(content): content["fields"] for content in records.values()} | {c["setting"]: c for c in curves}
    backbones = {cell.setting: cell.backbone for cell in cells.cells().values()}
    order = dict.fromkeys([*backbones, *own, *fields])
    about = {name: setting_facts(name, fields.get(name)) for name in order if name in backbones or name in fields}
    for name, said_of in about.items():
        backbone = backbones.get(name) or said_of["model"]
        said_of["backbone"] = HEADINGS.get(backbone, backbone)
    used = {row["mixer"] for rows in own.values() for row in rows} | {c["mixer"] for c in published + curves}
    names = {cell.mixer: cell.method for cell in reversed(cells.cells().values())}
    mixers = {m: {"method": names.get(m, m), "year": year_of(m)} for m in sorted(used)}
    command = "mixup-recipes leaderboard" + (f" --results {shlex.quote(results.name)}" if results else "")
    return {
        "version": __version__,
        "command": command,
        "benchmarks": cells.titles(),
        "marks": {cells.MARKS[s]: cells.MEANING[s] for s in cells.MARKS if cells.MARKS[s]},
        "settings": about,
        "mixers": mixers,
        "cells": published,
        "trained": own,
        "curves": curves,
        "texts": texts.all,
    }


def blob(content: Any) -> str:
    """JSON that may stand in a ``<script>`` element: nothing in it can end the element or begin a comment."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def html(content: dict[str, Any]) -> str:
    """The whole page of some ``facts``, in one file."""
    page = (ASSETS / "page.html").read_text(encoding="utf-8")
    scripts = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    style = (ASSETS / "page.css").read_text(encoding="utf-8")
    for place, text in (("GENERATOR", MARK), ("STYLE", style), ("SCRIPT", scripts), ("DATA", blob(content))):
        before, there, after = page.partition(f"<!-- {place} -->")
        assert there, place
        page = before + text + after
    return page


def leaderboard(out: Path, results: Path | None = None, runs: list[Path] | None = None) -> list[Path]:
    """Write the page into a folder: ``index.html``, and a ``README.md`` that makes the folder a static Space.

    A ``README.md`` that is already there stays as it is. Returns the files that were written. Raises ``UserError`` for
    an ``index.html`` that is no leaderboard, a folder of results or a run that does not exist, and damage in either.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out takes a folder, such as site/")
    page, readme = out / "index.html", out / "README.md"
    if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{page} is not a leaderboard and would be lost; name another folder with --out")
    if (out / "recipe.yaml").exists():
        raise UserError(f"{out} is a run folder; name another folder with --out")
    content = facts(results, [Run.open(run) for run in runs or []])
    written = {page: html(content)} | ({} if readme.exists() else {readme: SPACE})
    for path, text in written.items():
        write_into(path, text)
    return list(written)
