"""The format of a run folder, of its checkpoints and of a run record: every file, and who may read it.

This page is the one place where the format is written down. ``FORMAT`` is its version; ``env.json`` and every record
say which one they are of, and what says nothing is of format 1, the one of version 0.1. A reader refuses a newer format
than it knows, and reads every older one.

A run folder, at its root a model repository of timm's format (``export``, ``folder`` and ``runs/run.py``):

- ``recipe.yaml``: the resolved recipe, itself a valid ``--recipe``.
- ``data.json``: ``dataset``, ``config``, ``revision``, ``commit`` (of the Hub), ``splits`` (name -> identity, see
  ``data/identity.py``; a run of version 0.1 has no fingerprint), ``classes``; ``changed`` where a run went on over
  other data: ``update`` and the words; ``holdout`` where the data have one split: which, ``share``, ``seed``.
- ``holdout.txt``: the names of the files that were held out. ``skipped.txt``: the images that could not be read and
  were passed over, and why, on this machine while the run goes on and on all machines when it is done.
  ``.dataset.json``: where local data lie. None of them is ever published.
- ``env.json``: ``format``, command, versions, device, processes, commit of this program; ``laws``: the sampling laws of
  its mixers; ``teachers``: source -> SHA-256 of the weights; ``pretrained``: what the run started from -> SHA-256 of
  the file, where there is one; ``mixers``: mixer of another package -> package and version, all of them in order where
  the run went on with another version.
- ``log.jsonl``: one object a line. Rows of ``mode`` "train": ``epoch`` (from 1), ``update``, ``lr``, ``loss`` and its
  parts, ``images``, ``bad_images``. Rows of ``mode`` "val": ``epoch``, ``update``, and per classifier ``top1``,
  ``top5``, ``ece`` (percent), ``nll`` (nats), ``count``, those but for the main one with the classifier's name in
  front; of a recipe that says ``multi_label`` they are ``map``, ``f1``, ``f1_macro`` (percent), ``nll`` (binary cross
  entropy per image and class), ``count``. Rows of ``mode`` "data": ``update``, ``changed``, what changed of the images.
  Everything but ``perf`` is reproducible to the bit.
- ``summary.csv``: one row per evaluated epoch with timm's columns.
- ``eval_results.json``: ``exported`` (the row of the exported weights), ``reported`` (by the setting's protocol),
  ``openmixup_tool``, ``weights_sha256``. The two numbers are ``top1``, or ``map`` with ``multi_label``.
- ``config.json``, ``model.safetensors``: the exported weights; ``config.json`` says ``multi_label`` where they are
  such; ``models/NAME/`` further classifiers in the same form.
- ``predictions.safetensors``: one row per evaluated image, see ``PREDICTIONS`` and ``OF_SEVERAL``.
- ``robustness.json``, ``robustness.png``: what ``evaluate --suite robustness`` found of the exported weights; written
  when somebody asks for it (``runs/robustness_file.py``).
- ``README.md``, ``.eval_results/``: the model card, and what leaderboards read.
- ``samples/epoch_NNN.png``: mixed batches; ``runs/``: TensorBoard.
- ``checkpoints/step-NNNNNNNN/``: ``model.safetensors`` (model and mixer), ``ema.safetensors``, ``process.safetensors``,
  ``optimizer.pt``, ``state.json``, ``manifest.json`` (SHA-256 of each). Never published unless asked for.
- ``.lock``: held by whoever writes; ``.hub.json``: where the run was pushed to; ``.trackers.json``: tracker -> ``id``
  and ``url`` of the run there; ``.job.json``: the job of a queue that has the run (``runs/queued.py``). None of them is
  published.

The folder of a soup (``runs/soup.py``) has ``config.json``, ``model.safetensors`` and ``recipe.yaml`` of the first run,
``data.json`` and ``.dataset.json`` where all runs had the same data, no log, and ``soup.json``: ``method`` ("uniform"
or "greedy"), ``ingredients`` (``name``, ``sha256`` of the file, ``score`` that its run noted, ``used``), ``metric``,
``split``, ``scores`` of the soup there (empty where the data were not at hand), ``bn_samples``, ``weights_sha256``.

A run record, ``model_cards/results/RECIPE.json`` (``runs/records.py``): ``format``, ``recipe`` (name), ``fields`` (the
resolved recipe without name and seed), ``overrides`` (field -> [published, here], null without a published recipe),
``protocol`` (in words), ``images`` (evaluated), ``dataset`` (``data.json`` without the classes), ``seeds`` (seed ->
numbers and environment of that run, and ``robustness`` where the suite was run on its weights).
"""

from typing import Any

from mixup_recipes.typed import UserError

FORMAT = 1
PLACE = ".dataset.json"
SKIPPED = "skipped.txt"
TRACKERS = ".trackers.json"

PREDICTIONS = {
    "index": ("int32", 1), "label": ("int32", 1), "top": ("int32", 2), "confidence": ("float32", 1),
    "nll": ("float32", 1),
}  # fmt: skip
"""Columns of ``predictions.safetensors``: type and dimensions. ``top``: up to 5 classes, best first."""
OF_SEVERAL = {"index": ("int32", 1), "label": ("uint8", 2), "score": ("float32", 2)}
"""The same with ``multi_label``. ``label`` (N, K) of 0 and 1; ``score`` (N, K) probabilities."""


def check_format(content: dict[str, Any], where: str) -> None:
    """Raise ``UserError`` for what a newer version of this program wrote."""
    found = content.get("format", 1)
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise UserError(f"{where}: format {found!r:.60}, but this version of Mixup Recipes reads formats 1 to {FORMAT}")
