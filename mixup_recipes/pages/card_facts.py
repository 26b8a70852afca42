"""What a card says of a run beside its numbers: origin of data and weights, the command that trains it, comparison."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mixup_recipes import fetch
from mixup_recipes.benchmark import cells
from mixup_recipes.data.prepare import PREPARED
from mixup_recipes.pages.markdown import prose, shown
from mixup_recipes.recipe import Recipe, differences, schema
from mixup_recipes.resolve import resolve, shipped_recipe
from mixup_recipes.runs import recording, records
from mixup_recipes.runs.noise import verdict
from mixup_recipes.runs.run import Run
from mixup_recipes.training.known_weights import WEIGHTS
from mixup_recipes.training.protocols import rule_in_words
from mixup_recipes.typed import UserError


def tree(path: str, repo_id: str | None) -> str:
    """A link to a folder: the Hub resolves relative links to files only."""
    return f"[{path}]({constants.ENDPOINT}/{repo_id}/tree/main/{path})" if repo_id else f"[{path}]({path})"


def data_source(recipe: Recipe) -> tuple[str, str]:
    """The kind of data set (``hub``, ``prepared`` or ``local``), and its name without folders of this machine."""
    name = recipe.dataset
    if name in PREPARED:
        return "prepared", name
    try:
        validate_repo_id(name)
        if name.count("/") == 1 and not Path(name).exists():
            return "hub", name
    except HFValidationError:
        pass
    return "local", Path(name).name


def local_start(recipe: Recipe) -> str | None:
    """The run folder or weight file of this machine that a run started from, without its folders; None: no such."""
    return None if recipe.pretrained == "timm" else local_weights(recipe.pretrained)


def local_weights(name: str | None) -> str | None:
    """What of this machine a name of weights stands for, without its folders; None for names of the Hub and timm."""
    if name is None or fetch.is_hub(name):
        return None
    of_timm = "/" not in name and timm.is_model(name.split(".")[0]) and not Path(name).exists()
    return None if of_timm else Path(name).name


def start_hash(run: Run) -> str:
    """The first digits of the SHA-256 of the weights that a run started from; empty where it says none."""
    told = run.environment.get("pretrained")
    mark = told.get(run.recipe.pretrained) if isinstance(told, dict) else None
    return mark[:16] if isinstance(mark, str) and re.fullmatch("[0-9a-f]{64}", mark) else ""


def mixer_packages(run: Run) -> dict[str, str]:
    """The packages that the run's mixers came from, where they are not of this program: mixer -> packages, in words."""
    told = run.environment.get("mixers")
    rows = told.items() if isinstance(told, dict) else ()
    return {name: ", then ".join(map(str, found)) for name, found in rows if isinstance(found, list) and found}


def pushed(folder: Path) -> dict[str, Any]:
    """Where the run in a folder was pushed to; empty where that is not known."""
    try:
        return Run.open(folder).pushed
    except UserError:  # no run, or one of a newer version: this card does without
        return {}


def base_model(recipe: Recipe) -> str | None:
    """The repository that a fine-tuned run started from: of timm's weights, or of a run folder that was published.

    An ``hf-hub:`` name is given as it is, private or not. None for a run from scratch, for a run folder that was not
    pushed or is private on the Hub, and where no repository is known.
    """
    start = recipe.model if recipe.pretrained == "timm" else recipe.pretrained
    if start is None or start in WEIGHTS:  # timm has other weights of that name
        return None
    if Path(start).is_dir():
        before = pushed(Path(start))
        done = before.get("card_sha256") and not before.get("private")
        name = before.get("repo_id") if done else None
    elif fetch.is_hub(start):
        name = start.partition(":")[2].partition("@")[0]
    else:
        known = timm.get_pretrained_cfg(start) if timm.is_model_pretrained(start) else None
        name = known.hf_hub_id if known else None  # none: it may be a folder that is gone
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return name if name and name.count("/") == 1 else None


def flat(recipe: Recipe) -> dict[str, Any]:
    """Fields and arguments of the mixer, as ``--field`` and ``--mixer.argument`` name them."""
    fields = {k: getattr(recipe, k) for k in schema(Recipe) if k not in ("name", "mixer_args")}
    fields["dataset"] = data_source(recipe)[1]
    fields["pretrained"] = local_start(recipe) or recipe.pretrained
    fields["distill_from"] = local_weights(recipe.distill_from) or recipe.distill_from
    return fields | {f"mixer.{k}": v for k, v in recipe.mixer_args.get(recipe.mixer, {}).items()}


def origins(recipe: Recipe) -> list[tuple[str, Any, str]]:
    """Every field and argument of a run with its value and where that comes from."""
    found = shipped_recipe(recipe.name)
    if found is None:
        return [(k, v, "the run's recipe file") for k, v in flat(recipe).items()]
    theirs, origin = found
    before, rows = flat(theirs), []
    for key, value in flat(recipe).items():
        path = key.replace("mixer.", f"mixer_args.{recipe.mixer}.", 1) if key.startswith("mixer.") else key
        source = origin.get(path, "")
        if records.as_json(before.get(key)) != records.as_json(value):
            source = "this run" + (f", instead of {shown(before[key])}" if key in before else "")
        rows.append((key, value, source))
    return rows


def argument(value: Any) -> str:
    """A value of a free table as a command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def command(recipe: Recipe) -> str:
    """The flags of ``train_mixup.py`` that train this recipe: its name with what was changed, else the recipe file."""
    kind, _ = data_source(recipe)
    places = {"dataset": "PATH"} if kind == "local" else {}
    places |= {"pretrained": "WEIGHTS"} if local_start(recipe) else {}
    places |= {"distill_from": "TEACHER"} if local_weights(recipe.distill_from) else {}
    data = [part for key, place in places.items() for part in (f"--{key}", place)]
    if found := shipped_recipe(recipe.name):
        before = flat(found[0])
        args: list[str] = []
        given: dict[str, Any] = {key: getattr(recipe, key) for key in places}
        for key, value in flat(recipe).items():
            if records.as_json(before.get(key)) == records.as_json(value) or key in places:
                continue
            if isinstance(value, dict) and value:
                given[key] = {k: argument(v) for k, v in value.items()}
                args += [part for k, v in given[key].items() for part in (f"--{key}.{k}", v)]
            elif key.startswith("mixer."):
                given.setdefault("mixer_args", {})[key[6:]] = argument(value)
                args += [f"--{key}", argument(value)]
            else:
                words = [shown(v) for v in value] if isinstance(value, tuple) else [shown(value)]
                args += [f"--{key}", *words]
                given[key] = words if isinstance(value, tuple) else words[0]
        try:
            again = resolve(recipe.name, given)[0] if given else found[0]
        except UserError:
            again = None
        flags = shlex.join(["--recipe", recipe.name, *data, *args])
        if again and not differences(again, recipe) and flags.isprintable():
            return flags
    return shlex.join(["--recipe", "recipe.yaml", *data])


def job_flags(words: Sequence[str]) -> list[str]:
    """Of a run's own command, the flags that decide which images are left out, as one word each."""
    found: list[str] = []
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if (name := name.replace("-", "_").replace("__", "--", 1)) in ("--on_bad_image", "--max_image_pixels"):
            found += [shlex.join([name, value or after])]
    return found


def against_published(run: Run) -> list[str]:
    """What the run says about the published number of its recipe, in sentences."""
    if run.recipe.multi_label:
        return ["The images may have several labels, so no published number belongs to this run."]
    cell = cells.cells().get(run.recipe.name)
    if cell is None:
        return ["No published number belongs to this recipe."]
    text = f"{cell.method} on {cell.backbone}, benchmark {cell.benchmark}"
    if cell.top1 is None:
        return [f"The published table has no number for this cell ({text})."]
    theirs = cells.protocol(cell, rule_in_words(records.published_recipe(cell.name)))
    published = (
        f"Published: **{cells.number(cell)}** top-1 for {text}: {theirs}; {cells.MEANING[cell.source]}. "
        f"Source: {cells.source(cell)}."
    )
    content = recording.of_run(run)
    if why := records.excluded(content):
        return [published, f"This run cannot be compared with that number: {prose(why)}."]
    if not (values := records.finished_top1(content)):
        return [published, "This run is not finished, so there is nothing to compare yet."]
    found = verdict(values, cell.top1, cells.trials(cell, run.recipe.trials), content["images"])
    return [
        published,
        f"This run has {found.mean:.2f}, {found.difference:+.2f} from the published number. A difference of one run "
        f"up to ±{found.band:.2f} is noise. Verdict: **{found.status}**.",
    ]


def others(run: Run) -> list[tuple[str, str]]:
    """The other classifiers of the run: name in the log, and folder."""
    main = run.prefix.removesuffix("_")
    return [
        (name, path.parent.relative_to(run.folder).as_posix()) for name, path in run.weights.items() if name != main
    ]
