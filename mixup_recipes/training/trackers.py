"""Trackers of experiments, through accelerate: TensorBoard, trackio, wandb, MLflow, Aim, ClearML and whatever it knows.

Each gets, as far as it knows such things, the project, the run's name, group and tags, the resolved recipe, the numbers
of ``log.jsonl``, the sheets of mixed images and at the end the card. What a tracker calls the run is kept in
``.trackers.json``, so that a run which goes on is the same one there. TensorBoard writes into the run folder. A tracker
that cannot start ends a new run before it trains; one that fails later is given up with a line, and the run goes on.
"""

import contextlib
import importlib
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker, get_available_trackers
from huggingface_hub import constants
from PIL import Image

from mixup_recipes.files import write_json
from mixup_recipes.recipe import Recipe, schema
from mixup_recipes.training.folder import noted
from mixup_recipes.training.format import TRACKERS
from mixup_recipes.typed import UserError, nearest


def chosen(report_to: str) -> list[str]:
    """The trackers that a flag names. Raises ``UserError`` for an unknown one and for one that is not installed."""
    names = [] if report_to == "none" else list(dict.fromkeys(report_to.split(",")))
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = [*LOGGER_TYPE_TO_CLASS, "none (alone)"]
            raise UserError(f"report_to: unknown tracker {name!r}; {nearest(name, known)}")
        if name not in map(str, get_available_trackers()):  # accelerate would leave it out without a word
            raise UserError(f"report_to: the tracker {name!r} is not installed; pip install {name}, or leave it out")
    return names


def start(accelerator: Any, recipe: Recipe, folder: Path, project: str, update: int) -> None:
    """Start the trackers on the main process. TensorBoard forgets what a killed run wrote after ``update``.

    Raises ``UserError`` for a tracker that cannot start, such as one that wants a login. One of a run that goes on
    is given up instead.
    """
    if not accelerator.is_main_process or not accelerator.log_with:
        return
    known = noted(folder, TRACKERS)
    for name in map(str, accelerator.log_with):
        try:
            tracker = made(name, recipe, folder, project, update, known)
            tracker.start()
            if tracker.name == "tensorboard":  # accelerate's way adds a run at each start
                metric = "val/map" if recipe.multi_label else "val/top1"
                summary = importlib.import_module("torch.utils.tensorboard.summary")
                for part in summary.hparams(configuration(recipe), {metric: 0.0}):
                    tracker.writer.file_writer.add_summary(part)
            else:
                tracker.store_init_configuration(configuration(recipe))
        except Exception as e:
            if update == 0:
                raise UserError(f"report_to: the tracker {name!r} cannot start: {words(e)}") from None
            hint = f" (it looked for the run that {folder / TRACKERS} names)" if name in known else ""
            print(f"the run continues without the tracker {name!r}, which cannot start{hint}: {words(e)}", flush=True)
            continue
        accelerator.trackers.append(tracker)
        if name in IDENTITY:
            known[name] = IDENTITY[name](tracker)
            write_json(folder / TRACKERS, known)


def made(name: str, recipe: Recipe, folder: Path, project: str, update: int, known: dict[str, Any]) -> Any:
    """A tracker that has not started. ``known``: what the trackers call this run, empty for one that begins."""
    run, said = f"{recipe.name}-seed{recipe.seed}", known.get(name)
    before = said.get("id") if isinstance(said, dict) else None
    setting = recipe.name.removesuffix(f"_{recipe.mixer}")
    fresh = before or secrets.token_hex(4)
    if name == "tensorboard":
        return TensorBoardTracker(recipe.name, folder / "runs", purge_step=update)
    if name == "aim":
        return LOGGER_TYPE_TO_CLASS[name](run, ".", experiment=project, run_hash=before)
    options: dict[str, dict[str, Any]] = {
        "wandb": {"name": run, "group": recipe.name, "tags": [setting, recipe.mixer], "id": fresh, "resume": "allow"},
        # a name is what it finds a run by, so two runs of one recipe need two
        "trackio": {"name": before or f"{run}-{fresh}", "group": recipe.name, "resume": "allow", "embed": False},
        "mlflow": {"run_name": run, "run_id": before}
        | {"tags": {"group": recipe.name, "setting": setting, "mixer": recipe.mixer}},
        "clearml": {"task_name": run, "tags": [setting, recipe.mixer], "continue_last_task": before or False}
        | {"auto_connect_arg_parser": False, "auto_connect_frameworks": False},
        "swanlab": {"experiment_name": run, "tags": [setting, recipe.mixer]},
    }
    return LOGGER_TYPE_TO_CLASS[name](project, **options.get(name, {}))


IDENTITY: dict[str, Callable[[Any], dict[str, Any]]] = {
    "wandb": lambda t: {"id": t.run.id, "url": t.run.url},
    "trackio": lambda t: {"id": t.run.name, "url": space_address(t.run.url)},
    "mlflow": lambda t: {"id": t.active_run.info.run_id, "url": None},
    "aim": lambda t: {"id": t.writer.hash, "url": None},
    "clearml": lambda t: {"id": t.task.id, "url": t.task.get_output_log_web_page()},
}
"""What a tracker that has started calls the run, and where the run can be seen, if anywhere."""


def space_address(place: str | None) -> str | None:
    """Where trackio keeps a run, as an address: it says OWNER/NAME of a Space."""
    return place if place is None or "://" in place else f"{constants.ENDPOINT}/spaces/{place}"


def configuration(recipe: Recipe) -> dict[str, str | bool | int | float]:
    """The resolved recipe as trackers take it: every field and argument of the mixer, lists and tables as JSON.

    Without the name and the place of the data, which may change when a run goes on: MLflow takes no other value then.
    """
    fields = {k: getattr(recipe, k) for k in schema(Recipe) if k not in ("name", "dataset", "mixer_args")}
    fields |= {f"mixer.{k}": v for k, v in recipe.mixer_args.get(recipe.mixer, {}).items()}
    return {k: v if isinstance(v, str | bool | int | float) else json.dumps(v) for k, v in fields.items()}


def log(accelerator: Any, values: dict[str, float], update: int) -> None:
    """Numbers of an update, to every tracker."""
    for tracker in list(accelerator.trackers):
        with alive(accelerator, tracker):
            tracker.log(values, step=update)


def picture(accelerator: Any, path: Path, update: int) -> None:
    """A sheet of mixed images, to every tracker that takes pictures."""
    for tracker in list(accelerator.trackers):
        with alive(accelerator, tracker), Image.open(path) as image:
            image.load()
            if tracker.name == "tensorboard":
                tracker.writer.add_image("mixed", np.asarray(image), update, dataformats="HWC")
            elif tracker.name == "wandb":
                tracker.log_images({"mixed": [image]}, step=update)
            elif tracker.name == "trackio":
                tracker.run.log({"mixed": importlib.import_module("trackio").Image(image)}, step=update)
            elif tracker.name == "mlflow":
                tracker.log_artifact(str(path), "samples")
            elif tracker.name == "aim":
                tracker.log_images({"mixed": image}, step=update)
            elif tracker.name == "clearml":
                tracker.log_images({"mixed": np.asarray(image)}, step=update)


def finish(accelerator: Any, folder: Path, leaving: bool) -> None:
    """Hand the card over, if there is one, then end all trackers. ``leaving``: the run goes on."""
    card = folder / "README.md"
    for tracker in list(accelerator.trackers):
        with alive(accelerator, tracker):
            if card.is_file():
                hand_over(tracker, card)
    for tracker in list(accelerator.trackers):
        with alive(accelerator, tracker):
            if leaving and tracker.name == "mlflow":  # which would call it finished
                importlib.import_module("mlflow").end_run("KILLED")
            tracker.finish()
    accelerator.trackers.clear()


def hand_over(tracker: Any, card: Path) -> None:
    """Give the card to a tracker, in the form in which it keeps texts or files."""
    if tracker.name == "tensorboard":
        tracker.writer.add_text("card", card.read_text(encoding="utf-8"))
    elif tracker.name == "wandb":
        tracker.run.save(str(card), base_path=str(card.parent), policy="now")
    elif tracker.name == "trackio":
        tracker.run.log_artifact(str(card), name=f"card-{tracker.run.name}", type="card", overwrite=True)
    elif tracker.name == "mlflow":
        tracker.log_artifact(str(card))
    elif tracker.name == "aim":
        tracker.writer.track(importlib.import_module("aim").Text(card.read_text(encoding="utf-8")), name="card")
    elif tracker.name == "clearml":
        tracker.task.upload_artifact("card", artifact_object=str(card))


@contextlib.contextmanager
def alive(accelerator: Any, tracker: Any) -> Iterator[None]:
    """Give a tracker up when it fails."""
    try:
        yield
    except Exception as e:
        accelerator.trackers.remove(tracker)
        with contextlib.suppress(Exception):
            tracker.finish()  # it may still write down what it has
        print(
            f"the run continues without the tracker {tracker.name!r}: {words(e)}; log.jsonl has every number",
            flush=True,
        )


def words(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
