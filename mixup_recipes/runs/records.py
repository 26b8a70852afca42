"""Run records: what run folders say about one recipe, seed by seed, as JSON that tables and cards are made from.

A record belongs to one recipe; its file is ``<recipe>.json``, or ``<recipe>+<hash>.json`` when the runs overrode
fields of the published recipe. Such a record is kept and shown, but never counts as a reproduction.

``mixup_recipes/training/format.py`` says what a record holds.
"""

import dataclasses
import hashlib
import json
import re
import statistics
from pathlib import Path
from typing import Any

from mixers.registry import MIXERS, sampling_law, signature
from mixup_recipes.data.identity import comparable
from mixup_recipes.data.known import EVALUATED, KNOWN_SIZES
from mixup_recipes.files import shipped
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import shipped_recipe
from mixup_recipes.runs import robustness_file
from mixup_recipes.runs.shapes import COUNT, NUMBER, OBJECT, PERCENT, SPLIT, TEXT, check, read_object
from mixup_recipes.training.format import check_format
from mixup_recipes.typed import UserError
from mixup_recipes.words import many, with_spread

FOLDER = shipped("model_cards") / "results"
FIELDS = {"epochs": COUNT, "trials": COUNT, "train_split": TEXT, "eval_split": TEXT, "mixer": TEXT}
FIELDS |= {"protocol_epochs": COUNT}
KEYS = {"recipe": TEXT, "fields": FIELDS, "protocol": TEXT, "images": COUNT, "dataset": OBJECT, "seeds": OBJECT}
READING = {"name": TEXT, "value": PERCENT, "used": COUNT, "wanted": COUNT, "epoch": COUNT, "missing": TEXT}
SEED = {"top1": PERCENT, "reading": READING, "tool": READING, "top5": PERCENT, "nll": NUMBER, "ece": PERCENT}
SEED |= {"epochs": COUNT, "epochs_planned": COUNT, "seconds": NUMBER, "img_per_s": NUMBER, "env": OBJECT}
APART = "record them separately, in another --out folder or under another name in recipe.yaml"
PLACE = ("dataset", "dataset_config", "dataset_revision", "image_column", "label_column", "train_split", "eval_split")
"""Fields that say where the images come from: no override, as long as their numbers are those of the benchmark."""


def as_json(content: Any) -> Any:
    """Content as JSON gives it back."""
    return json.loads(json.dumps(content))


def fields_of(recipe: Recipe) -> dict[str, Any]:
    """What two seeds of one recipe share; of ``mixer_args`` only the row of the chosen mixer."""
    fields = dataclasses.asdict(recipe) | {"mixer_args": {recipe.mixer: recipe.mixer_args.get(recipe.mixer, {})}}
    return as_json({k: v for k, v in fields.items() if k not in ("name", "seed")})


def different(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    """Keys whose values differ, with both values."""
    return {k: [a.get(k), b.get(k)] for k in {**a, **b} if a.get(k) != b.get(k)}


def pairs_in_words(pairs: dict[str, list[Any]]) -> str:
    """Differences as the end of an error message."""
    return "; ".join(f"{k}: {a} and {b}" for k, (a, b) in pairs.items())


def overrides(recipe: Recipe) -> dict[str, list[Any]] | None:
    """Fields in which a recipe differs from the published one of its name; None: this package has none."""
    return changes(recipe.name, fields_of(recipe)) if shipped_recipe(recipe.name) else None


def complete(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record, which may be older than a field of a recipe or an argument of its mixer."""
    fields = fields_of(Recipe()) | fields
    mixer = fields["mixer"]
    if mixer not in MIXERS:
        return fields
    known = signature(mixer).parameters.items()
    defaults = as_json({k: p.default for k, p in known if p.default is not p.empty})
    return fields | {"mixer_args": {mixer: defaults | fields["mixer_args"].get(mixer, {})}}


def published_recipe(name: str) -> Recipe:
    """This package's recipe of a name. Raises ``UserError`` if it has none."""
    found = shipped_recipe(name)
    if found is None:
        raise UserError(f"{name!r} is not a recipe of this package")
    return found[0]


def changes(name: str, fields: dict[str, Any]) -> dict[str, list[Any]]:
    """Fields of a record that differ from the published recipe of this name, with both values."""
    pairs = different(complete(fields_of(published_recipe(name))), complete(fields))
    return {k: v for k, v in pairs.items() if k not in PLACE}


def other_images(content: dict[str, Any]) -> str:
    """How the images differ in number from those of the published recipe of this name, in words; empty if they don't.

    Images that could not be read and were passed over in the evaluation are missing too.
    """
    name = published_recipe(content["recipe"]).dataset
    there = tuple(content["dataset"]["splits"][content["fields"][k]]["images"] for k in ("train_split", "eval_split"))
    found = (there[0], content["images"])
    wanted = (KNOWN_SIZES[name], EVALUATED[name]) if name in EVALUATED else there
    return "" if found == wanted else f"{found[0]:,} + {found[1]:,} images instead of {wanted[0]:,} + {wanted[1]:,}"


def later_laws(content: dict[str, Any]) -> list[str]:
    """The sampling laws of a record's runs that have replaced a first one: ``["guidedmix@kang-2023.2"]``."""
    laws = {law for seed in content["seeds"].values() for law in seed["env"].get("laws") or ()}
    return sorted(law for law in laws if "." in law)


def earlier_law(content: dict[str, Any]) -> str:
    """The law today of a mixer of a record, or of one inside it, where its runs followed an earlier one; else empty."""
    mixer = content["fields"]["mixer"]
    names = {mixer, *named_in(content["fields"].get("mixer_args", {}).get(mixer))}
    laws = sorted(law for name in names if "." in (law := sampling_law(name)))
    return next((law for law in laws if law not in later_laws(content)), "")


def named_in(args: Any) -> set[str]:
    """Every word in a mixer's arguments, among them the mixers that are its parts."""
    if isinstance(args, dict):
        return set(args).union(*map(named_in, args.values()))
    if isinstance(args, list):
        return set().union(*map(named_in, args))
    return {args} if isinstance(args, str) else set()


def excluded(content: dict[str, Any]) -> str:
    """Why the runs of a published recipe's record do not count, whatever they found, in words; empty if they count."""
    # compared with the recipe of today, which may have changed since the record was made
    if pairs := changes(content["recipe"], content["fields"]) or content["overrides"]:
        changed = ", ".join(f"{k} {b} instead of {a}" for k, (a, b) in pairs.items())
        return f"runs with {changed} do not count"
    if law := earlier_law(content):
        return f"runs of an earlier law than {law} do not count"
    images = other_images(content)
    return f"runs on {images} do not count" if images else ""


def validate(content: Any, where: str) -> None:
    """Raise ``UserError`` unless content is a whole record that does not contradict itself. ``where``: its file."""
    check(content, OBJECT, where)
    check_format(content, where)
    check(content, KEYS, where)
    fields, overrides = content["fields"], content.get("overrides")
    pairs = overrides.values() if isinstance(overrides, dict) else [] if overrides is None else [None]
    if "overrides" not in content or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError(f"{where}: overrides: expected null, or a table of pairs, got {overrides!r:.60}")
    evaluated = fields["eval_split"]
    check(content["dataset"], {"splits": {fields["train_split"]: SPLIT, evaluated: SPLIT}}, where, "dataset")
    if content["images"] > (there := content["dataset"]["splits"][evaluated]["images"]):
        raise UserError(f"{where}: images: {content['images']} were evaluated, but {evaluated} has {there}")
    if not content["seeds"] or not all(re.fullmatch(r"\d+", seed) for seed in content["seeds"]):
        raise UserError(f"{where}: seeds: expected a table of seeds, got {list(content['seeds'])}")
    for seed, found in content["seeds"].items():
        check(found, SEED, where, f"seeds.{seed}")
        if "robustness" in found:
            robustness_file.validate(found["robustness"], where, f"seeds.{seed}.robustness")
        done, planned, epochs = found["epochs"], found["epochs_planned"], fields["epochs"]
        if planned != epochs or done > planned:
            raise UserError(f"{where}: seeds.{seed}: {done} of {many(planned, 'epoch')}, but the recipe has {epochs}")


def merge(record: dict[str, Any], other: dict[str, Any], where: str) -> dict[str, Any]:
    """A record that gained the seeds of another. A seed already there may come again, or go on if it was unfinished.

    Raises ``UserError`` unless both are of one recipe, on the same images, and agree on shared seeds.
    """
    if record["recipe"] != other["recipe"]:
        raise UserError(
            f"{where}: the runs belong to two recipes, {record['recipe']} and {other['recipe']}; record each recipe "
            "by itself"
        )
    pairs = different(complete(record["fields"]), complete(other["fields"]))
    datasets = comparable(record["dataset"], other["dataset"])
    pairs |= different(*({"images": r["images"], "dataset": d} for r, d in zip((record, other), datasets, strict=True)))
    pairs |= different({"laws of the mixer": later_laws(record)}, {"laws of the mixer": later_laws(other)})
    if pairs:
        raise UserError(
            f"{where}: the recipes of these runs differ in more than the seed: {pairs_in_words(pairs)}; {APART}"
        )
    seeds = dict(record["seeds"])
    for seed, new in other["seeds"].items():
        old = seeds.get(seed, new)
        goes_on = old["epochs"] < old["epochs_planned"] and new["epochs"] > old["epochs"]
        if not goes_on and "robustness" in old:
            new = {"robustness": old["robustness"]} | new  # it stays until it is measured again
        if not goes_on and without(old, "robustness") != without(new, "robustness"):
            raise UserError(
                f"{where}: seed {seed} has top-1 {old['top1']:.2f} after {many(old['epochs'], 'epoch')} already, and "
                f"another run has {new['top1']:.2f} after {new['epochs']}; leave one of them out"
            )
        seeds[seed] = new
    return other | {"seeds": dict(sorted(seeds.items(), key=lambda item: int(item[0])))}


def without(table: dict[str, Any], key: str) -> dict[str, Any]:
    """A table but for one key."""
    return {k: v for k, v in table.items() if k != key}


def file_name(content: dict[str, Any]) -> str:
    """``<recipe>.json``; with overrides ``<recipe>+<hash of the overrides>.json``."""
    if not content["overrides"]:
        return f"{content['recipe']}.json"
    text = json.dumps(content["overrides"], sort_keys=True)
    return f"{content['recipe']}+{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"


def read_record(path: Path) -> dict[str, Any]:
    """One record. Raises ``UserError`` for a file that is none, or not the one that its name says."""
    content = read_object(path)
    validate(content, str(path))
    if path.name != file_name(content):
        raise UserError(f"{path}: this record belongs in a file named {file_name(content)}")
    return content


def all_records(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """All records of a folder by file name without its ending. Raises ``UserError`` for a damaged one."""
    folder = folder or FOLDER
    if not folder.is_dir():
        raise UserError(f"no folder of run records {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".json")  # glob hides unreadable folders
    return {path.stem: read_record(path) for path in paths}


def finished_seeds(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The seeds that ran to the end and cover the protocol's epochs, in order."""
    by_number = sorted(content["seeds"].items(), key=lambda item: int(item[0]))
    return {k: s for k, s in by_number if s["epochs"] == s["epochs_planned"] and not s["reading"]["missing"]}


def finished_top1(content: dict[str, Any]) -> list[float]:
    """Top-1 of the seeds that ran to the end and cover the protocol's epochs."""
    return [s["top1"] for s in finished_seeds(content).values()]


def ours(content: dict[str, Any] | None) -> tuple[float, float | None, int] | None:
    """Mean, standard deviation (None for one seed) and number of the finished seeds of a record that counts, or None.

    ``content``: the record of a published recipe.
    """
    values = finished_top1(content) if content and not excluded(content) else []
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def in_short(content: dict[str, Any]) -> str:
    """Our number as it is shown: ``80.91 ± 0.07 (3 seeds)``."""
    mean, std, seeds = ours(content) or (0.0, None, 0)
    return f"{with_spread(mean, std)} ({many(seeds, 'seed')})"
