"""What trackers are told of a run, that a run which goes on is the same one there, and that none of them ends a run."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixup_recipes.pages.card_sections import files_section
from mixup_recipes.recipe import changed
from mixup_recipes.resolve import resolve
from mixup_recipes.runs.run import Run
from mixup_recipes.training import trackers
from mixup_recipes.typed import UserError


class Fake:
    """wandb and MLflow as far as the product speaks to them; ``seen`` has every call."""

    def __init__(self, project, **options):
        self.seen = [("init", project, options)]
        self.run = SimpleNamespace(id=options.get("id"), url="https://track.example/u/p/runs/1", save=self.note("save"))
        self.active_run = SimpleNamespace(info=SimpleNamespace(run_id=options.get("run_id") or "abc"))
        for verb in ("start", "store_init_configuration", "log", "log_images", "log_artifact", "finish"):
            setattr(self, verb, self.note(verb))

    def note(self, verb):
        return lambda *args, **kwargs: self.seen.append((verb, args, kwargs))


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Starts trackers on a run folder, at update 7: ``begin("wandb,mlflow")`` is accelerate's view."""
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, type(name, (Fake,), {"name": name}))
    recipe = changed(resolve("quickstart_cutmix")[0], seed=3)

    def begin(names, update=7):
        view = SimpleNamespace(is_main_process=True, log_with=names.split(","), trackers=[])
        trackers.start(view, recipe, tmp_path, "mine", update)
        return view

    return begin


@pytest.fixture
def sheet(tmp_path):
    """A picture of 4 x 6 pixels, and a card beside it."""
    (tmp_path / "README.md").write_text("# the card")
    Image.new("RGB", (6, 4), "red").save(tmp_path / "sheet.png")
    return tmp_path / "sheet.png"


def test_a_tracker_gets_project_name_group_tags_recipe_numbers_pictures_and_card(begin, sheet):
    view = begin("wandb,mlflow")
    trackers.log(view, {"train/loss": 1.5}, 8)
    trackers.picture(view, sheet, 9)
    wandb, mlflow = view.trackers
    trackers.finish(view, sheet.parent, leaving=False)
    assert view.trackers == []
    (_, project, options), _, (_, (config,), _), log, (verb, (images,), at), save, end = wandb.seen
    assert project == "mine" and options["name"] == "quickstart_cutmix-seed3" and options["resume"] == "allow"
    assert (options["group"], options["tags"]) == ("quickstart_cutmix", ["quickstart", "cutmix"])
    assert (config["seed"], config["lr"], config["mixer.alpha"], config["scale"]) == (3, 0.2, 1.0, "[0.35, 1.0]")
    assert config["clip_grad"] == "null" and "mixer_args" not in config
    assert log == ("log", ({"train/loss": 1.5},), {"step": 8})
    assert (verb, images["mixed"][0].size, at) == ("log_images", (6, 4), {"step": 9})
    assert save[1] == (str(sheet.parent / "README.md"),) and end[0] == "finish"
    assert [args for verb, args, _ in mlflow.seen if verb == "log_artifact"] == [
        (str(sheet), "samples"), (str(sheet.parent / "README.md"),)
    ]  # fmt: skip


def test_a_run_that_goes_on_is_the_same_one_and_the_card_links_to_it(begin, tmp_path):
    first, second = (begin("wandb,mlflow").trackers for _ in range(2))
    options = [tracker.seen[0][2] for tracker in (*first, *second)]
    assert options[0]["id"] == options[2]["id"] and (options[1]["run_id"], options[3]["run_id"]) == (None, "abc")
    known = json.loads((tmp_path / ".trackers.json").read_text())
    assert known["mlflow"] == {"id": "abc", "url": None}
    assert "* [wandb](https://track.example/u/p/runs/1): the run as" in files_section(Run(tmp_path, "run"), None)
    known["wandb"]["url"] = "javascript:alert(1)"
    (tmp_path / ".trackers.json").write_text(json.dumps(known))
    assert "wandb" not in files_section(Run(tmp_path, "run"), None)


def test_a_tracker_that_fails_is_given_up_and_one_that_cannot_start_is_refused(begin, sheet, capsys, monkeypatch):
    view = begin("mlflow,wandb")
    view.trackers[0].log = lambda *_, **__: 1 / 0
    for update in (1, 2):
        trackers.log(view, {"loss": 1.0}, update)
    assert [t.name for t in view.trackers] == ["wandb"] and view.trackers[0].seen[-1][2] == {"step": 2}
    said = "the run continues without the tracker 'mlflow': ZeroDivisionError: division by zero; log.jsonl has every "
    assert capsys.readouterr().out == f"{said}number\n"
    monkeypatch.setattr(Fake, "note", lambda *_: lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="the tracker 'wandb' cannot start: ZeroDivisionError"):
        begin("wandb", update=0)
    assert begin("wandb").trackers == [] and ".trackers.json names): ZeroDivisionError" in capsys.readouterr().out


def test_options_are_those_that_accelerate_s_trackers_take(tmp_path):
    """wandb, trackio, ClearML and SwanLab hand on what they get; Aim and MLflow name it."""
    recipe = resolve("quickstart_cutmix")[0]
    for known in ({}, {name: {"id": "12ab"} for name in trackers.IDENTITY}):
        for name in ("wandb", "trackio", "mlflow", "aim", "clearml", "swanlab", "tensorboard"):
            made = trackers.made(name, recipe, tmp_path, "mine", 0, known)
            assert type(made) is LOGGER_TYPE_TO_CLASS[name]
    assert trackers.made("mlflow", recipe, tmp_path, "mine", 0, known).run_id == "12ab"
    assert trackers.made("aim", recipe, tmp_path, "mine", 0, known).init_kwargs == {
        "experiment": "mine", "run_hash": "12ab"
    }  # fmt: skip
    assert trackers.space_address("me/space") == "https://huggingface.co/spaces/me/space"


def test_tensorboard_has_one_run_with_recipe_curves_pictures_and_card(begin, sheet):
    for update in (6, 8):  # the second goes on from 7
        view = begin("tensorboard")
        trackers.picture(view, sheet, update)
        trackers.log(view, {"val/top1": 50.0}, update)
        trackers.finish(view, sheet.parent, leaving=False)
    (folder,) = (sheet.parent / "runs").iterdir()
    assert folder.name == "quickstart_cutmix" and all(path.is_file() for path in folder.iterdir())
    events = EventAccumulator(str(folder), {"images": 0})
    events.Reload()
    assert [e.step for e in events.Scalars("val/top1")] == [6, 8]
    picture = np.asarray(Image.open(io.BytesIO(events.Images("mixed")[0].encoded_image_string)))
    assert picture.shape == (4, 6, 3) and (picture == (255, 0, 0)).all()
    assert b"# the card" in events.Tensors("card/text_summary")[0].tensor_proto.string_val[0]
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"mixer.alpha" in content and b"val/top1" in events.PluginTagToContent("hparams")["_hparams_/experiment"]
