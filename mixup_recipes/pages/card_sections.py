"""The sections of a card."""

import re
import shlex

import timm
from huggingface_hub import constants

from mixup_recipes.benchmark import cells
from mixup_recipes.pages.card_facts import (
    against_published,
    base_model,
    command,
    data_source,
    job_flags,
    local_start,
    local_weights,
    mixer_packages,
    origins,
    others,
    start_hash,
    tree,
)
from mixup_recipes.pages.markdown import code, fence, line, markdown_table, prose, shown
from mixup_recipes.pages.methods import Method, bibtex, entry
from mixup_recipes.resolve import read_yaml, settings, shipped_recipe, split_name
from mixup_recipes.runs.run import METRICS, UNITS, Run
from mixup_recipes.training import backbones  # noqa: F401  registers the models that timm lacks
from mixup_recipes.words import many

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


def model_section(run: Run) -> str:
    """What the model is."""
    recipe = run.recipe
    kind, name = data_source(recipe)
    few = len(run.data.classes) <= 20
    start = base_model(recipe) or local_start(recipe)
    mark = f", SHA-256 of the weights {code(digits)}" if (digits := start_hash(run)) else ""
    marks = [(name, found["fingerprint"]) for name, found in run.data.splits.items() if "fingerprint" in found]
    rows = [
        ["architecture", code(recipe.model)],
        *([["fine-tuned from", code(start) + mark]] if start else []),
        *([["distilled from", code(local_weights(recipe.distill_from) or recipe.distill_from)]]
          if recipe.distill_from else []),
        ["input", f"{recipe.eval_size} x {recipe.eval_size} px: shorter side to {recipe.eval_resize}, centre crop, "
         f"{recipe.interpolation}"],
        ["classes", f"{len(run.data.classes)}" + (": " + ", ".join(map(prose, run.data.classes)) if few else "")],
        ["data", code(name) + {"hub": " (Hub)", "prepared": "", "local": " (a local folder)"}[kind]
         + f": {many(run.data.images[recipe.train_split], 'image')} to train on, "
         f"{run.data.images[recipe.eval_split]:,} to evaluate on"],
        *([["fingerprint", ", ".join(f"{name} {code(mark[:16])}" for name, mark in marks)]] if marks else []),
        ["training", f"{many(recipe.epochs, 'epoch')} at {recipe.image_size} px, batch {recipe.batch_size}, mixer "
         f"`{recipe.mixer}`, seed {recipe.seed}"],
        *([["mixers of other packages", of_packages(run)]] if mixer_packages(run) else []),
        ["weights", f"{'moving average (EMA)' if recipe.report_ema else 'as trained'}, epoch {run.exported['epoch']}"],
    ]  # fmt: skip
    return "## Model\n\n" + markdown_table(["", ""], rows)


def of_packages(run: Run) -> str:
    """The mixers of other packages, with these and their versions."""
    return "; ".join(f"{code(name)} of {prose(package)}" for name, package in mixer_packages(run).items())


def recipe_section(run: Run, made: list[Method]) -> str:
    """Method, what is not the setting's, and every value with its origin."""
    rows = origins(run.recipe)
    cells = [[f"`{k}`", code(shown(v)), prose(o)] for k, v, o in rows]
    text = [f"## Recipe\n\n{code(run.recipe.name)}, resolved in [recipe.yaml](recipe.yaml)."]
    if found := shipped_recipe(run.recipe.name):
        setting = split_name(found[0].name)[0]
        files = {"default", f"{setting}.yaml", f"{read_yaml(settings()[setting]).get('base')}.yaml"}
        own = [cell for (_, _, o), cell in zip(rows, cells, strict=True) if o not in files]
        text.append(
            f"The setting is `{setting}`. These values do not come from it:\n\n"
            f"{markdown_table(['field', 'value', 'origin'], own)}"
        )
    every = markdown_table(["field", "value", "origin"], cells)
    text.append(f"<details><summary>All {len(cells)} values</summary>\n\n{every}\n\n</details>")
    for method in made:
        head = re.sub(r"(?<![(<])(https://[^\s,]+[^\s,.])", r"<\1>", method.head)
        parts = [f"**{k}.** {v}" for k, v in method.parts.items() if k in ("Formula", "Sampling law")]
        text.append("\n\n".join([f"### {method.title}", head, *parts]))
    return "\n\n".join(text)


def results_section(run: Run, repo_id: str | None) -> str:
    """The numbers, and the published one beside them."""
    s, main = run.summary, "ema" if run.recipe.report_ema else ""
    used = f", {s.epochs_used} of {s.epochs_wanted} epochs there" if s.epochs_used < s.epochs_wanted else ""

    names = METRICS[s.metric]

    def row(label: str, *numbers: float) -> list[str]:
        shown = [f"{v:.{3 if name == 'nll' else 2}f}" for v, name in zip(numbers, names, strict=False)]
        return [label, *shown, *["-"] * (len(names) - len(shown))]

    rows = [row(f"reported: {s.protocol}{used}", *s.scores.values())]
    rows += [row(s.tool.label, s.tool.value)] if s.metric == "top1" else []
    labels = {main: f"these weights, epoch {run.exported['epoch']}"}
    labels |= {name: tree(folder, repo_id) for name, folder in others(run)}
    for name, label in labels.items():
        found = [run.exported.get(f"{name}_{k}" if name else k) for k in names]
        numbers = [v for v in found if isinstance(v, int | float)]
        if len(numbers) == len(names):
            rows.append(row(label, *numbers))
    note = f"{many(s.count, 'image')} of {code(run.recipe.eval_split)}. {UNITS[s.metric]}."
    text = [
        "## Results",
        markdown_table(["", *names.values()], rows, right=1),
        note,
        *against_published(run),
    ]
    if len(labels) > 1:
        text.append("The folders under `models/` hold the run's other classifiers, which load in the same way.")
    return "\n\n".join(text)


def cost_section(run: Run, made: list[Method]) -> str:
    """Hours and images per second, measured; what the method adds; what the cell was estimated at."""
    env, s = run.environment, run.summary
    processes = many(env["processes"], "process")
    text = [
        f"## Cost\n\nThe run took {s.seconds / 3600:.3g} hours on {processes}, device {prose(env['device'])}, with "
        f"{prose(env['mixed_precision'])} mixed precision, at {s.img_per_s:,.0f} images/s while training."
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
            markdown_table([*head, "time"], lines, right=1),
            "These are for 8 images of 224 pixels, by `python benchmarks/step.py --csv model_cards/costs.csv`. "
            "FLOPs and memory are counted" + (f", and time is measured ({'; '.join(on)})." if on else "."),
        ]
    return "\n\n".join(text)


def use_section(run: Run, repo_id: str | None) -> str:
    """Code that loads the weights, with timm and transformers, and the command that scores them."""
    recipe = run.recipe
    known = timm.is_model(recipe.model)
    ours = known and timm.model_entrypoint(recipe.model).__module__.startswith("mixup_recipes.")
    first = (
        "import mixup_recipes.training.backbones  # of Mixup Recipes: timm lacks this architecture\n" if ours else ""
    )
    upright = recipe.exif_orientation
    opened = f'{"ImageOps.exif_transpose(" * upright}Image.open("image.jpg"){")" * upright}'
    by_timm = f"""{first}import timm
import torch
from PIL import Image{", ImageOps" * upright}

model = timm.create_model("{f"hf-hub:{repo_id}" if repo_id else "local-dir:."}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
image = {opened}.convert("RGB")
with torch.no_grad():
    probabilities = model(transform(image)[None]).{"sigmoid()" if recipe.multi_label else "softmax(1)"}[0]
for p, k in zip(*probabilities.topk({min(5, len(run.data.classes))})):
    print(f"{{p:.3f}} {{model.pretrained_cfg['label_names'][k]}}")"""
    by_transformers = f"""{first}from transformers import pipeline

classify = pipeline("image-classification", model="{repo_id or "."}")
print(classify("image.jpg"{', function_to_apply="sigmoid"' * recipe.multi_label}))"""
    kind, name = data_source(recipe)
    flags = [f"hf-hub:{repo_id}" if repo_id else "."]
    flags += ["--dataset", "PATH" if kind == "local" else name, "--split", recipe.eval_split]
    for key, usual in (("image_column", "image"), ("label_column", "label")):
        flags += [f"--{key}", getattr(recipe, key)] if getattr(recipe, key) != usual else []
    where = "" if repo_id else "Run this code in this folder. "
    scored = "mAP and F1" if recipe.multi_label else "top-1 and top-5 through `evaluate`"
    left_out = "".join(f" {flag}" for flag in job_flags(run.environment["command"]))
    score = fence("bash", f"accelerate launch evaluate_mixup.py {shlex.join(map(line, flags))}{left_out}")
    return "\n\n".join([
        f"## How to use\n\n{where}With timm:", fence("python", by_timm), "With transformers:",
        fence("python", by_transformers), f"To score it from a copy of Mixup Recipes ({scored}):", score,
    ])  # fmt: skip


def reproduce_section(run: Run, repo_id: str | None) -> str:
    """One command, and what it was run with."""
    env = run.environment
    flags = " ".join([command(run.recipe), *job_flags(env["command"])])
    launch = f"accelerate launch --num_processes {env['processes']}" if env["processes"] > 1 else "accelerate launch"
    get = f"hf download {repo_id} recipe.yaml --local-dir . && " if repo_id and "recipe.yaml" in flags else ""
    packages = env.get("packages")
    versions = [f"{k} {v}" for k, v in packages.items()] if isinstance(packages, dict) else []
    with_ = [f"Python {env['python']}", *versions]
    at = f"commit {env['commit']}" if env.get("commit") else "an installed copy whose commit is not known"
    text = [f"## How to reproduce\n\n{fence('bash', f'{get}{launch} train_mixup.py {flags}')}"]
    kind, name = data_source(run.recipe)
    if kind == "prepared":
        text.append(f"To get the data: `mixup-recipes prepare {name}`.")
    if kind == "local":
        text.append(f"`PATH` stands for {code(name)}, the data folder of the run.")
    if mixer_packages(run):
        text.append(f"The run needs mixers that Mixup Recipes does not have: {of_packages(run)}.")
    if start := local_start(run.recipe):
        text.append(f"`WEIGHTS` stands for {code(start)}, the weights that the run started from.")
    if teacher := local_weights(run.recipe.distill_from):
        text.append(
            f"`TEACHER` stands for {code(teacher)}, the teacher that the run learned from in addition to the labels."
        )
    return "\n\n".join([*text, f"The run was made with Mixup Recipes ({prose(at)}), {prose(', '.join(with_))}."])


def deviations_section(run: Run, made: list[Method]) -> str:
    """Where method and cell differ from what was published."""
    text = [f"{m.title}: {m.parts['Deviations']}" for m in made if "Deviations" in m.parts]
    if (cell := cells.cells().get(run.recipe.name)) and cell.note:
        text.append(f"The published cell: {prose(cell.note)}.")
    if found := shipped_recipe(run.recipe.name):
        setting = split_name(found[0].name)[0]
        text.append(
            f"The head of `recipes/{setting}.yaml` in Mixup Recipes says where the sources of the setting differ."
        )
    return "\n\n".join(["## Deviations", *text])


def citation_section(made: list[Method]) -> str:
    """BibTeX of the method, the benchmark and the models."""
    papers = [paper for m in made if (paper := bibtex(m.head))]
    return "## Citation\n\n" + fence("bibtex", "\n\n".join([*papers, OPENMIXUP, TIMM]))


def files_section(run: Run, repo_id: str | None) -> str:
    """Links to what the run logged."""
    names = {
        "log.jsonl": "a row for each log of training and evaluation",
        "summary.csv": "one row per evaluated epoch",
        "eval_results.json": "the numbers above",
        "predictions.safetensors": "the predictions of these weights for each evaluation image",
        "robustness.json": "what attacks, corruptions, occlusion and mixing do to these weights",
        "env.json": "versions, device, commit",
        "data.json": "the images",
    }
    rows = [f"* [{name}]({name}): {text}" for name, text in names.items() if (run.folder / name).is_file()]
    if (run.folder / "runs").is_dir():
        tab = f", [TensorBoard]({constants.ENDPOINT}/{repo_id}/tensorboard)" if repo_id else ""
        rows.append(f"* {tree('runs', repo_id)}: curves for TensorBoard{tab}")
    for name, url in run.tracked.items():
        if re.fullmatch(r"https?://[\w.:/?=&%~-]+", str(url)):
            rows.append(f"* [{prose(name)}]({url}): the run as this tracker shows it")
    sheet = run.last_sheet
    if sheet and re.fullmatch(r"[\w-]+\.png", sheet.name):
        rows.append(
            f"* {tree('samples', repo_id)}: mixed training images\n\n![mixed training images](samples/{sheet.name})"
        )
    return "\n".join(["## Logs\n", *rows])
