"""What the Hub reads of a card: its metadata, and the results for leaderboards."""

from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, constants, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from mixup_recipes.pages.card_facts import base_model, data_source
from mixup_recipes.pages.markdown import line
from mixup_recipes.resolve import shipped_recipe, split_name
from mixup_recipes.runs.run import Run
from mixup_recipes.typed import UserError

LICENSE = "unknown"
"""The Hub's word for weights whose owner has not said."""
TASK = "default"


def eval_entries(run: Run) -> list[Any]:
    """Top-1 and top-5 of the exported weights, or mAP and F1, as huggingface_hub's ``EvalResult``."""
    kind, name = data_source(run.recipe)
    metrics = {"Top-1 accuracy (%)": "top1"} | ({"Top-5 accuracy (%)": "top5"} if len(run.data.classes) > 5 else {})
    if run.recipe.multi_label:
        metrics = {"mAP (%)": "map", "F1, micro, at probability 0.5 (%)": "f1"}
    types = {"map": "mean_average_precision", "f1": "f1"}
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=name if kind == "hub" else line(name) if kind == "prepared" else "imagefolder",
            dataset_name=line(name),
            dataset_config=run.recipe.dataset_config,
            dataset_split=line(run.recipe.eval_split),
            dataset_revision=run.data.commit or run.recipe.dataset_revision,
            metric_type=types.get(metric, "accuracy"),
            metric_name=label,
            metric_value=round(run.exported[run.prefix + metric], 4),
        )
        for label, metric in metrics.items()
    ]


def eval_results(run: Run, repo_id: str | None = None) -> str | None:
    """``.eval_results/*.yaml`` for leaderboards; None unless a finished run scored a whole split of a Hub data set.

    Also None where images may have several labels: leaderboards of benchmarks are of top-1.
    """
    kind, name = data_source(run.recipe)
    if run.recipe.multi_label or kind != "hub" or not run.finished or run.recipe.max_eval_samples is not None:
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
        notes=f"{top1.metric_name}, {run.summary.count} images of {top1.dataset_split}, centre crop of "
        f"{run.recipe.eval_size} px after resizing to {run.recipe.eval_resize}, epoch {run.exported['epoch']}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, width=1000)


def model_index(run: Run, name: str, old: Any, where: str) -> list[dict[str, Any]]:
    """The results of the exported weights, after a finished run, with those that somebody added for other data."""

    def key(result: Any) -> tuple[Any, ...]:
        return (*result.unique_identifier, result.metric_type, result.metric_name)

    ours = eval_entries(run) if run.finished else []
    try:
        _, theirs = model_index_to_eval_results(old) if old else ("", [])
    except (AttributeError, KeyError, TypeError) as e:
        raise UserError(f"{where}: model-index cannot be read ({e!r:.80}); fix it or take it out") from None
    ours += [result for result in theirs if key(result) not in {key(mine) for mine in eval_entries(run)}]
    return eval_results_to_model_index(name, ours) if ours else []


def metadata(run: Run, name: str, license: str | None, old: dict[str, Any], where: str) -> dict[str, Any]:
    """The card's metadata: ours, then what else was there. Lists gain ours; the licence is the user's."""
    setting = [split_name(run.recipe.name)[0]] if shipped_recipe(run.recipe.name) else []
    kind, dataset = data_source(run.recipe)
    lists = {
        "tags": ["image-classification", "timm", "transformers", "mixup-recipes", "mixup", run.recipe.mixer, *setting],
        "datasets": [dataset] if kind == "hub" else [],
        "metrics": ["mean_average_precision", "f1"] if run.recipe.multi_label else ["accuracy"],
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
