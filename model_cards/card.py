"""The model card: ``README.md`` of a run folder, made from what the run recorded.

Numbers come from the run's files, the method from its mixer's docstring, published numbers from ``published.csv``.
All of it stands between two HTML comments, and is replaced whenever the card is written again; text around them and
metadata of other names are somebody's own and stay. What a run or data set calls itself is shown as text: no markup
of it works.

Two places hold the accuracy in a form that the Hub reads: ``model-index`` in the card's metadata, and
``.eval_results/``, which feeds the leaderboards of benchmark data sets. Both speak of the exported weights, which
anybody can score again; the number by the setting's protocol is in the text.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import recipes
from recipes import Recipe, UserError
from recipes.typed import from_yaml

from . import cells, records
from .logs import COUNT, PERCENT, TEXT, check, read_table
from .methods import Method, bibtex, entry, methods
from .noise import verdict
from .report import last_sheet, load_data, load_run, summarise

CARD = "README.md"
EVAL_RESULTS = ".eval_results/mixup-recipes.yaml"
LICENSE = "unknown"
"""The Hub's word for weights whose owner has not said."""
TASK = "default"
BEGIN = (
    "<!-- mixup-recipes: begin. Generated: write above this line or below the last one; what is between is lost. -->"
)
END = "<!-- mixup-recipes: end -->"
MARK = re.compile(r"^<!-- mixup-recipes: (begin|end)\b.*?-->", re.M)
MARKUP = re.compile(r"[\\`*\[\]<>#|~&$]|:(?=//)|(?<!\w)_|_(?!\w)")
PLAIN = re.compile(r"[\w ,.:;/@+=()%^'\"{}\[\]-]+", re.ASCII)
ENVIRONMENT = {"device": TEXT, "processes": COUNT, "mixed_precision": TEXT, "python": TEXT}
OPENMIXUP = entry(
    "OpenMixup: Open Mixup Toolbox and Benchmark for Visual Representation Learning",
    "Li, Wang, Liu, Tian, Wu, Tan, Jin, Li",
    "",
    "2022",
    "https://arxiv.org/abs/2209.04851",
)
TIMM = entry(
    "PyTorch Image Models", "Wightman", "", "2019", "https://github.com/huggingface/pytorch-image-models"
)  # fmt: skip


class Run(NamedTuple):
    """What the files of a run folder say, checked."""

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]
    """The reported numbers (``report.summarise``)."""
    exported: dict[str, Any]
    """The evaluation of the exported weights: epoch, count, and the metrics of every classifier."""
    environment: dict[str, Any]
    classes: list[str]
    images: dict[str, int]
    """Split -> number of images."""
    commit: str | None
    """The commit of the data set on the Hub that was read."""

    @property
    def finished(self) -> bool:
        """Whether the last planned epoch was evaluated."""
        return self.summary["epochs"] == self.summary["epochs_planned"]

    def score(self, name: str, metric: str) -> float:
        """A metric of the exported weights, by the classifier's name in the log."""
        return self.exported[f"{name}_{metric}" if name else metric]


def read(folder: Path) -> Run:
    """The run in a folder. Raises ``UserError`` naming what is missing or cannot be."""
    recipe, _, _ = load_run(folder)
    summary = summarise(folder)
    main = "ema_" if recipe.report_ema else ""
    exported = read_table(folder / "eval_results.json").get("exported")
    wanted = {"epoch": COUNT, f"{main}count": COUNT, f"{main}top1": PERCENT, f"{main}top5": PERCENT}
    check(exported, wanted, str(folder / "eval_results.json"), "exported")
    environment = read_table(folder / "env.json")
    check(environment, ENVIRONMENT, str(folder / "env.json"))
    splits = load_data(folder, recipe)["splits"]
    images = {split: splits[split]["images"] for split in (recipe.train_split, recipe.eval_split)}
    data = read_table(folder / "data.json")
    classes, commit = data.get("classes"), data.get("commit")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{folder / 'data.json'}: classes: expected a list of names, got {classes!r:.60}")
    if commit is not None and not (isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{40}", commit)):
        raise UserError(f"{folder / 'data.json'}: commit: expected 40 hexadecimal digits, got {commit!r:.60}")
    return Run(folder, recipe, summary, exported, environment, classes, images, commit)


# ------------------------------------------------------------------------------------------- text


def line(text: object, most: int = 200) -> str:
    """Text in one line of printable characters, shortened where it is very long."""
    shown = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return shown if len(shown) <= most else f"{shown[:most]}..."


def prose(text: object) -> str:
    """Text that a file holds, as text: what could be markup or a link becomes HTML entities."""
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", line(text))


def code(text: object) -> str:
    """Text that a file holds, as code where a code span can hold it, also in a table."""
    return f"`{line(text)}`" if PLAIN.fullmatch(line(text)) else prose(text)


def table(head: list[str], rows: list[list[str]], right: int = 99) -> str:
    """A Markdown table; columns from ``right`` on are numbers."""
    rule = ["---:" if i >= right else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def fence(language: str, text: str) -> str:
    """A block of code."""
    return f"```{language}\n{text}\n```"


def shown(value: Any) -> str:
    """A recipe value as it is shown: as a command line would take it."""
    if isinstance(value, tuple | list):
        return " ".join(map(shown, value))
    return json.dumps(value) if isinstance(value, dict | bool) else "none" if value is None else str(value)


def tree(path: str, repo_id: str | None) -> str:
    """A link to a folder: the Hub resolves relative links to files only."""
    from huggingface_hub import constants

    return f"[{path}]({constants.ENDPOINT}/{repo_id}/tree/main/{path})" if repo_id else f"[{path}]({path})"


# ------------------------------------------------------------------------------------------- facts


def published(recipe: Recipe) -> tuple[Recipe, dict[str, str]] | None:
    """This package's recipe of the same name and the origin of its values; None if it has none."""
    if not re.fullmatch(r"\w+", recipe.name, re.ASCII):
        return None  # a path: resolving it would read a file
    try:
        return recipes.resolve(recipe.name)
    except UserError:
        return None


def place(recipe: Recipe) -> tuple[str, str]:
    """The kind of data set (``hub``, ``prepared`` or ``local``), and its name without folders of this machine."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from training.prepare import PREPARED

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


def base_model(recipe: Recipe) -> str | None:
    """The repository that a fine-tuned run started from: of timm's weights, or of a run folder that was published.

    An ``hf-hub:`` name is given as it is, private or not. None for a run from scratch, for a run folder that was not
    pushed or is private on the Hub, and where no repository is known.
    """
    import timm
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from training import pull

    from . import hub

    start = recipe.model if recipe.pretrained == "timm" else recipe.pretrained
    if start is None:
        return None
    if Path(start).is_dir():
        before = hub.remembered(Path(start))
        done = before.get("card_sha256") and not before.get("private")
        name = before.get("repo_id") if done else None
    elif pull.is_hub(start):
        name = start.partition(":")[2].partition("@")[0]
    else:
        known = timm.is_model_pretrained(start)  # else it may be a folder that is gone
        name = timm.get_pretrained_cfg(start).hf_hub_id if known else None
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return name if name.count("/") == 1 else None


def flat(recipe: Recipe) -> dict[str, Any]:
    """Fields and arguments of the mixer, as ``--field`` and ``--mixer.argument`` name them."""
    fields = {k: getattr(recipe, k) for k in recipes.schema(Recipe) if k not in ("name", "mixer_args")}
    fields["dataset"] = place(recipe)[1]
    return fields | {f"mixer.{k}": v for k, v in recipe.mixer_args.get(recipe.mixer, {}).items()}


def origins(recipe: Recipe) -> list[tuple[str, Any, str]]:
    """Every field and argument of a run with its value and where that comes from."""
    found = published(recipe)
    if found is None:
        return [(k, v, "the run's recipe file") for k, v in flat(recipe).items()]
    theirs, origin = found
    before, rows = flat(theirs), []
    for key, value in flat(recipe).items():
        path = key.replace("mixer.", f"mixer_args.{recipe.mixer}.", 1) if key.startswith("mixer.") else key
        source = origin.get(path, "")
        if records.plain(before.get(key)) != records.plain(value):
            source = "this run" + (f", instead of {shown(before[key])}" if key in before else "")
        rows.append((key, value, source))
    return rows


def argument(value: Any) -> str:
    """A value of a free table as a command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def command(recipe: Recipe) -> str:
    """The flags of ``train_mixup.py`` that train this recipe: its name with what was changed, else the recipe file."""
    kind, _ = place(recipe)
    data = ["--dataset", "PATH"] if kind == "local" else []
    if found := published(recipe):
        before, args, raw = flat(found[0]), [], {"mixer_args": {}}
        for key, value in flat(recipe).items():
            if records.plain(before.get(key)) == records.plain(value) or (key == "dataset" and data):
                continue
            if isinstance(value, dict) and value:
                raw[key] = {k: argument(v) for k, v in value.items()}
                args += [part for k, v in raw[key].items() for part in (f"--{key}.{k}", v)]
            elif key.startswith("mixer."):
                raw["mixer_args"][key[6:]] = argument(value)
                args += [f"--{key}", argument(value)]
            else:
                words = [shown(v) for v in value] if isinstance(value, tuple) else [shown(value)]
                args += [f"--{key}", *words]
                raw[key] = words if isinstance(value, tuple) else words[0]
        try:
            again = recipes.resolve(recipe.name, raw | ({"dataset": recipe.dataset} if data else {}))[0]
        except UserError:
            again = None
        flags = shlex.join(["--recipe", recipe.name, *data, *args])
        if again and not recipes.differences(again, recipe) and flags.isprintable():
            return flags
    return shlex.join(["--recipe", "recipe.yaml", *data])


def against_published(run: Run) -> list[str]:
    """What the run says about the published number of its recipe, in sentences."""
    cell = cells.cells().get(run.recipe.name)
    if cell is None:
        return ["No published number belongs to this recipe."]
    text = f"{cell.method} on {cell.backbone}, benchmark {cell.benchmark}"
    if cell.top1 is None:
        return [f"The published table has no number for this cell ({text})."]
    theirs = cells.protocol(cells.resolve(cell.name)[0])
    lines = [
        f"Published: **{cells.number(cell)}** top-1 for {text}: {theirs}; {cells.MEANING[cell.source]}. "
        f"Source: {cells.SOURCE}."
    ]
    content = records.read_run(run.folder)
    if why := records.excluded(content):
        return [*lines, f"This run does not speak for that number: {prose(why)}."]
    if not (values := records.finished(content)):
        return [*lines, "This run is not finished: nothing to compare yet."]
    found = verdict(values, cell.top1, run.recipe.trials, content["images"])
    lines.append(
        f"This run: {found.mean:.2f}, {found.difference:+.2f} from the published number; a difference of one run up to "
        f"±{found.band:.2f} is noise: **{found.status}**."
    )
    return lines


def classifiers(run: Run) -> list[tuple[str, str]]:
    """The other classifiers of the run: name in the log, and folder."""
    main = "ema" if run.recipe.report_ema else ""
    names = [k.removesuffix("top1").removesuffix("_") for k in run.exported if k == "top1" or k.endswith("_top1")]
    pairs = [(name, f"models/{name or 'raw'}") for name in names if name != main]
    return [(n, f) for n, f in pairs if re.fullmatch(r"\w*", n) and (run.folder / f / "model.safetensors").is_file()]


# ------------------------------------------------------------------------------------------- metadata


def eval_entries(run: Run) -> list[Any]:
    """Top-1 and top-5 of the exported weights, as huggingface_hub's ``EvalResult``."""
    from huggingface_hub import EvalResult

    kind, name = place(run.recipe)
    main = "ema" if run.recipe.report_ema else ""
    metrics = {"Top-1 accuracy (%)": "top1"} | ({"Top-5 accuracy (%)": "top5"} if len(run.classes) > 5 else {})
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=name if kind == "hub" else line(name) if kind == "prepared" else "imagefolder",
            dataset_name=line(name),
            dataset_config=run.recipe.dataset_config,
            dataset_split=line(run.recipe.eval_split),
            dataset_revision=run.commit or run.recipe.dataset_revision,
            metric_type="accuracy",
            metric_name=label,
            metric_value=round(run.score(main, metric), 4),
        )
        for label, metric in metrics.items()
    ]


def eval_results(run: Run, repo_id: str | None = None) -> str | None:
    """``.eval_results/*.yaml`` for leaderboards; None unless a finished run scored a whole split of a Hub data set."""
    from huggingface_hub import EvalResultEntry, constants, eval_result_entries_to_yaml

    kind, name = place(run.recipe)
    if kind != "hub" or not run.finished or run.recipe.max_eval_samples is not None:
        return None
    top1 = eval_entries(run)[0]
    log = f"{constants.ENDPOINT}/{repo_id}/blob/main/log.jsonl" if repo_id else None
    entry = EvalResultEntry(
        dataset_id=name,
        task_id=TASK,
        value=top1.metric_value,
        dataset_revision=top1.dataset_revision,
        source_url=log,
        source_name="Training log" if log else None,
        notes=f"{top1.metric_name}, {run.summary['count']} images of {top1.dataset_split}, centre crop of "
        f"{run.recipe.eval_size} px after resizing to {run.recipe.eval_resize}, epoch {run.exported['epoch']}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, width=1000)


def model_index(run: Run, name: str, old: Any, where: str) -> list[dict[str, Any]]:
    """The results of the exported weights, after a finished run, with those that somebody added for other data."""
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    def key(result: Any) -> tuple[Any, ...]:
        return (*result.unique_identifier, result.metric_type, result.metric_name)

    ours = eval_entries(run) if run.finished else []
    try:
        _, theirs = model_index_to_eval_results(old) if old else ("", [])
    except (AttributeError, KeyError, TypeError) as e:
        raise UserError(f"{where}: model-index cannot be read ({e!r:.80}); mend it or take it out") from None
    ours += [result for result in theirs if key(result) not in {key(mine) for mine in eval_entries(run)}]
    return eval_results_to_model_index(name, ours) if ours else []


def metadata(run: Run, name: str, license: str | None, old: dict[str, Any], where: str) -> dict[str, Any]:
    """The card's metadata: ours, then what else was there. Lists gain ours; the licence is the user's."""
    setting = [recipes.split_name(run.recipe.name)[0]] if published(run.recipe) else []
    kind, dataset = place(run.recipe)
    lists = {
        "tags": ["image-classification", "timm", "transformers", "mixup-recipes", "mixup", run.recipe.mixer, *setting],
        "datasets": [dataset] if kind == "hub" else [],
        "metrics": ["accuracy"],
    }
    for key, ours in lists.items():
        theirs = old.get(key) or []
        lists[key] = list(dict.fromkeys([*ours, *map(str, theirs if isinstance(theirs, list) else [theirs])]))
    found = {
        "license": license or old.get("license") or LICENSE,
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        **lists,
        "model-index": model_index(run, name, old.get("model-index"), where),
    }
    if start := base_model(run.recipe):
        found |= {"base_model": start, "base_model_relation": "finetune"}
    return {k: v for k, v in found.items() if v} | {k: v for k, v in old.items() if k not in found}


# ------------------------------------------------------------------------------------------- sections


def model_section(run: Run) -> str:
    """What the model is."""
    recipe = run.recipe
    kind, name = place(recipe)
    few = len(run.classes) <= 20
    start = base_model(recipe)
    rows = [
        ["architecture", code(recipe.model)],
        *([["fine-tuned from", code(start)]] if start else []),
        ["input", f"{recipe.eval_size} x {recipe.eval_size} px: shorter side to {recipe.eval_resize}, centre crop, "
         f"{recipe.interpolation}"],
        ["classes", f"{len(run.classes)}" + (": " + ", ".join(map(prose, run.classes)) if few else "")],
        ["data", code(name) + {"hub": " (Hub)", "prepared": "", "local": " (a local folder)"}[kind]
         + f": {run.images[recipe.train_split]:,} images to train on, "
         f"{run.images[recipe.eval_split]:,} to evaluate on"],
        ["training", f"{recipe.epochs} epochs at {recipe.image_size} px, batch {recipe.batch_size}, mixer "
         f"`{recipe.mixer}`, seed {recipe.seed}"],
        ["weights", f"{'moving average (EMA)' if recipe.report_ema else 'as trained'}, epoch {run.exported['epoch']}"],
    ]  # fmt: skip
    return "## Model\n\n" + table(["", ""], rows)


def recipe_section(run: Run, made: list[Method]) -> str:
    """Method, what is not the setting's, and every value with its origin."""
    rows = origins(run.recipe)
    cells = [[f"`{k}`", code(shown(v)), prose(o)] for k, v, o in rows]
    text = [f"## Recipe\n\n{code(run.recipe.name)}, resolved in [recipe.yaml](recipe.yaml)."]
    if found := published(run.recipe):
        setting = recipes.split_name(found[0].name)[0]
        files = {"default", f"{setting}.yaml", f"{recipes.read_yaml(recipes.settings()[setting]).get('base')}.yaml"}
        own = [cell for (_, _, o), cell in zip(rows, cells, strict=True) if o not in files]
        text.append(f"Setting `{setting}`; what is not the setting's:\n\n{table(['field', 'value', 'origin'], own)}")
    every = table(["field", "value", "origin"], cells)
    text.append(f"<details><summary>All {len(cells)} values</summary>\n\n{every}\n\n</details>")
    for method in made:
        head = re.sub(r"(?<![(<])(https://[^\s,]+[^\s,.])", r"<\1>", method.head)
        parts = [f"**{k}.** {v}" for k, v in method.parts.items() if k in ("Formula", "Sampling law")]
        text.append("\n\n".join([f"### {method.title}", head, *parts]))
    return "\n\n".join(text)


def results_section(run: Run, repo_id: str | None) -> str:
    """The numbers, and the published one beside them."""
    s, main = run.summary, "ema" if run.recipe.report_ema else ""
    used = f", {s['epochs_used']} of {s['epochs_wanted']} epochs there" if s["epochs_used"] < s["epochs_wanted"] else ""

    def row(label: str, top1: float, top5: float | None, nll: float | None, ece: float | None) -> list[str]:
        shown = [None if v is None else f"{v:.{d}f}" for v, d in ((top1, 2), (top5, 2), (nll, 3), (ece, 2))]
        return [label, *(v or "-" for v in shown)]

    rows = [row(f"reported: {s['protocol']}{used}", *(s[k] for k in ("top1", "top5", "nll", "ece")))]
    rows.append(row(s["tool_protocol"], s["tool_top1"], None, None, None))
    labels = {main: f"these weights, epoch {run.exported['epoch']}"}
    labels |= {name: tree(folder, repo_id) for name, folder in classifiers(run)}
    for name, label in labels.items():
        numbers = [run.exported.get(f"{name}_{k}" if name else k) for k in ("top1", "top5", "nll", "ece")]
        if all(isinstance(v, int | float) for v in numbers):
            rows.append(row(label, *numbers))
    note = f"{s['count']:,} images of {code(run.recipe.eval_split)}. Top-1, top-5 and ECE in percent, NLL in nats."
    text = ["## Results", table(["", "top-1", "top-5", "NLL", "ECE"], rows, right=1), note, *against_published(run)]
    if len(labels) > 1:
        text.append("The folders under `models/` hold the run's other classifiers, loadable like this one.")
    return "\n\n".join(text)


def cost_section(run: Run, made: list[Method]) -> str:
    """Hours and images per second, measured; what the method adds; what the cell was estimated at."""
    env, s = run.environment, run.summary
    processes = f"{env['processes']} process{'es' * (env['processes'] > 1)}"
    text = [
        f"## Cost\n\n{s['seconds'] / 3600:.3g} hours on {processes}, device {prose(env['device'])}, "
        f"{prose(env['mixed_precision'])} mixed precision: {s['img_per_s']:,.0f} images/s while training."
    ]
    if cell := cells.cells().get(run.recipe.name):
        low, middle, high = cells.hours(cell)
        text.append(f"Estimated for the whole recipe: {middle:.1f} hours on one H200 ({low:.1f} to {high:.1f}).")
    text += [f"{m.title}: {m.parts['Cost']}" for m in made if "Cost" in m.parts]
    counted = [row for row in cells.rows("costs.csv") if row["mixer"] == run.recipe.mixer]
    if counted:
        head = ["step with the mixer's defaults, relative to one without mixing", "FLOPs", "memory kept for backward"]
        lines = [
            [row["model"], *(f"{float(row[key]):.2f}x" if row[key] else "-" for key in ("flops", "kept", "time"))]
            for row in counted
        ]
        on = sorted({row["timed_on"] for row in counted if row["timed_on"]})
        text += [
            table([*head, "time"], lines, right=1),
            "8 images of 224 pixels, by `python benchmarks/step.py --csv model_cards/costs.csv`: FLOPs and memory "
            + (f"counted, time measured ({'; '.join(on)})." if on else "counted."),
        ]
    return "\n\n".join(text)


def use_section(run: Run, repo_id: str | None) -> str:
    """Code that loads the weights, with timm and transformers, and the command that scores them."""
    import timm

    from training import backbones  # noqa: F401  registers the models that timm lacks

    recipe = run.recipe
    known = timm.is_model(recipe.model)
    ours = known and timm.model_entrypoint(recipe.model).__module__.startswith("training.")
    first = "import training.backbones  # of Mixup Recipes: timm lacks this architecture\n" if ours else ""
    by_timm = f"""{first}import timm
import torch
from PIL import Image

model = timm.create_model("{f"hf-hub:{repo_id}" if repo_id else "local-dir:."}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
image = Image.open("image.jpg").convert("RGB")
with torch.no_grad():
    probabilities = model(transform(image)[None]).softmax(1)[0]
for p, k in zip(*probabilities.topk({min(5, len(run.classes))})):
    print(f"{{p:.3f}} {{model.pretrained_cfg['label_names'][k]}}")"""
    by_transformers = f"""{first}from transformers import pipeline

classify = pipeline("image-classification", model="{repo_id or "."}")
print(classify("image.jpg"))"""
    kind, name = place(recipe)
    flags = ["--model", f"hf-hub:{repo_id}" if repo_id else "."]
    flags += ["--dataset", "PATH" if kind == "local" else name, "--split", recipe.eval_split]
    for key, usual in (("image_column", "image"), ("label_column", "label")):
        flags += [f"--{key}", getattr(recipe, key)] if getattr(recipe, key) != usual else []
    where = "" if repo_id else "In this folder. "
    score = fence("bash", f"accelerate launch evaluate_mixup.py {shlex.join(map(line, flags))}")
    return "\n\n".join([
        f"## How to use\n\n{where}With timm:", fence("python", by_timm), "With transformers:",
        fence("python", by_transformers), "Top-1 and top-5 through `evaluate`, from a copy of Mixup Recipes:", score,
    ])  # fmt: skip


def reproduce_section(run: Run, repo_id: str | None) -> str:
    """One command, and what it was run with."""
    env = run.environment
    flags = command(run.recipe)
    launch = f"accelerate launch --num_processes {env['processes']}" if env["processes"] > 1 else "accelerate launch"
    get = f"hf download {repo_id} recipe.yaml --local-dir . && " if repo_id and "recipe.yaml" in flags else ""
    packages = env.get("packages")
    versions = [f"{k} {v}" for k, v in packages.items()] if isinstance(packages, dict) else []
    with_ = [f"Python {env['python']}", *versions]
    at = f"commit {env['commit']}" if env.get("commit") else "an installed copy, commit not known"
    text = [f"## How to reproduce\n\n{fence('bash', f'{get}{launch} train_mixup.py {flags}')}"]
    kind, name = place(run.recipe)
    if kind == "prepared":
        text.append(f"The data: `mixup-recipes prepare {name}`.")
    if kind == "local":
        text.append(f"`PATH` is the folder {code(name)} of the run.")
    return "\n\n".join([*text, f"Run with Mixup Recipes, {prose(at)}; {prose(', '.join(with_))}."])


def deviations_section(run: Run, made: list[Method]) -> str:
    """Where method and cell differ from what was published."""
    text = [f"{m.title}: {m.parts['Deviations']}" for m in made if "Deviations" in m.parts]
    if (cell := cells.cells().get(run.recipe.name)) and cell.note:
        text.append(f"The published cell: {prose(cell.note)}.")
    if found := published(run.recipe):
        setting = recipes.split_name(found[0].name)[0]
        text.append(f"Where the sources of the setting differ: head of `recipes/{setting}.yaml` in Mixup Recipes.")
    return "\n\n".join(["## Deviations", *text])


def citation_section(made: list[Method]) -> str:
    """BibTeX of the method, the benchmark and the models."""
    papers = [paper for m in made if (paper := bibtex(m.head))]
    return "## Citation\n\n" + fence("bibtex", "\n\n".join([*papers, OPENMIXUP, TIMM]))


def files_section(run: Run, repo_id: str | None) -> str:
    """Links to what the run logged."""
    from huggingface_hub import constants

    names = {
        "log.jsonl": "every training and evaluation record",
        "summary.csv": "one row per evaluated epoch",
        "eval_results.json": "the numbers above",
        "predictions.safetensors": "what these weights say of each evaluation image",
        "env.json": "versions, device, commit",
        "data.json": "the images",
    }
    rows = [f"* [{name}]({name}): {text}" for name, text in names.items() if (run.folder / name).is_file()]
    if (run.folder / "runs").is_dir():
        tab = f", [TensorBoard]({constants.ENDPOINT}/{repo_id}/tensorboard)" if repo_id else ""
        rows.append(f"* {tree('runs', repo_id)}: curves for TensorBoard{tab}")
    sheet = last_sheet(run.folder)
    if sheet and re.fullmatch(r"[\w-]+\.png", sheet.name):
        rows.append(
            f"* {tree('samples', repo_id)}: mixed training images\n\n![mixed training images](samples/{sheet.name})"
        )
    return "\n".join(["## Logs\n", *rows])


def body(run: Run, name: str, repo_id: str | None) -> str:
    """Everything between the two comments."""
    recipe, s = run.recipe, run.summary
    args = recipe.mixer_args[recipe.mixer]
    made = methods(recipe.mixer, args)
    text = [f"# {prose(name)}"]
    if not run.finished:
        text.append(f"> **Not finished:** epoch {s['epochs']} of {s['epochs_planned']}. The numbers are those so far.")
    used, wanted = s["epochs_used"], s["epochs_wanted"]
    protocol = s["protocol"] + (f": {used} of {wanted} epochs" if used < wanted else "")
    text.append(
        f"{code(recipe.model)} trained with {made[0].title} (`{recipe.mixer}`) by Mixup Recipes: "
        f"**{s['top1']:.2f} %** top-1 ({protocol}, seed {recipe.seed})."
    )
    sections = [model_section(run), recipe_section(run, made), results_section(run, repo_id), cost_section(run, made)]
    sections += [use_section(run, repo_id), reproduce_section(run, repo_id), deviations_section(run, made)]
    return "\n\n".join([*text, *sections, citation_section(made), files_section(run, repo_id)])


# ------------------------------------------------------------------------------------------- the card


def split(text: str, where: str) -> tuple[dict[str, Any], str, str]:
    """An existing card as metadata, text above the generated part, text below it. Raises ``UserError``."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(text)
    try:
        old = (from_yaml(block[2]) or {}) if block else {}
    except UserError as e:
        raise UserError(f"{where}: the metadata is {e}") from None
    if not isinstance(old, dict):
        raise UserError(f"{where}: the metadata must be a table of names and values, got {type(old).__name__}")
    text = text[block.end() :] if block else text
    marks = list(MARK.finditer(text))
    if not marks:
        return old, "\n", f"\n\n{text}" if text.strip() else "\n"
    if [mark[1] for mark in marks] != ["begin", "end"]:
        raise UserError(
            f"{where}: expected the line {END[:-4]}... once and before it {BEGIN[:28]}... once, found "
            f"{', '.join(mark[1] for mark in marks)}; put the lines back, or take all of them out"
        )
    return old, text[: marks[0].start()], text[marks[1].end() :]


def card(run: Path, repo_id: str | None = None, license: str | None = None, existing: str | None = None) -> str:
    """The model card of a run folder, with all that ``existing`` (default: its ``README.md``) has beside it.

    ``repo_id``: owner/name of the Hub repository that the folder is for; without, the card speaks of the folder.
    ``license``: identifier of the Hub, for the weights; default that of the existing card, else ``unknown``. Raises
    ``UserError`` for a run without an evaluation, damaged files, or a card whose generated part cannot be told.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise UserError(f"license: expected an identifier of the Hub such as apache-2.0, got {license!r}")
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as e:
            raise UserError(f"repo_id: expected owner/name: {' '.join(str(e).split())}") from None
    found = read(run)
    recipe = found.recipe
    where = run / CARD
    if existing is None and where.exists():
        existing = read_card(where)
    old, above, below = split(existing or "", str(where))
    name = repo_id.split("/")[-1] if repo_id else line(f"{recipe.model}.{recipe.mixer}_e{recipe.epochs}")
    data = metadata(found, name, license, old, str(where))
    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n{above}{BEGIN}\n{body(found, name, repo_id)}\n\n{END}{below}"


def read_card(path: Path) -> str:
    """A card as it is. Raises ``UserError``."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: {e}") from None


def write(run: Path, repo_id: str | None = None, license: str | None = None, out: Path | None = None) -> list[Path]:
    """Write the card, and what leaderboards read of it, into the run folder, or the card alone to ``out``.

    Returns the files. Raises ``UserError``: see ``card``; then nothing is written.
    """
    from training.run import write

    path = out or run / CARD
    files = {path: card(run, repo_id, license, read_card(path) if path.exists() else "")}
    if out is None and (text := eval_results(read(run), repo_id)):
        files[run / EVAL_RESULTS] = text
    for file, text in files.items():
        file.parent.mkdir(exist_ok=True)
        write(file, text)
    return list(files)
