"""What the playground shows is what the mixer does, and a Space says what ``predict`` says."""

import ast
import dataclasses
import importlib.metadata
import importlib.util
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from tiny import jpeg

from mixers import MIXERS, build
from mixup_recipes.data.pictures import to_uint8
from mixup_recipes.demo import cards, models, playground, space
from mixup_recipes.demo.arguments import fields, values
from mixup_recipes.demo.playground import Photo, mix
from mixup_recipes.mixer_args import complete
from mixup_recipes.pages import preview
from mixup_recipes.runs.predict import predictions
from mixup_recipes.typed import UserError

PLAIN = models.recipe_of(None)
SIDE = models.SIDE


@pytest.fixture
def photos(tmp_path):
    """Four drawn photos as files."""
    found, made = preview.shapes(4, SIDE), []
    for image, name in zip(found.images, found.names, strict=True):
        preview.picture(image, SIDE).save(tmp_path / f"{name}.png")
        made.append(Photo(tmp_path / f"{name}.png", name))
    return made


def defaults(mixer, **changed):
    """What the fields of a mixer hold, but for those that a person changed."""
    return [changed.get(field.name, field.value) for field in fields(mixer, PLAIN)]


def test_the_page_shows_the_photos_mask_and_labels_of_the_mixer_for_the_seed_and_update_that_it_names(photos):
    x = (torch.stack(preview.shapes(4, SIDE).images) / 255 - torch.tensor(PLAIN.mean).view(3, 1, 1)) / torch.tensor(
        PLAIN.std
    ).view(3, 1, 1)
    for mixer, changed in (("cutmix", {"alpha": 0.5}), ("fmix", {"max_soft": 0.3})):
        shown = mix(None, photos, mixer, defaults(mixer, **changed), seed=3)
        made = build(mixer, **changed)
        plan = made.plan(x, torch.eye(4), np.random.default_rng((3, shown.update)))
        mixed, target = made.mix(x, torch.eye(4), **plan)
        for i, photo in enumerate(shown.photos):
            assert (photo.pixels.int() - to_uint8(mixed, PLAIN)[i].int()).abs().max() <= 1
            torch.testing.assert_close(photo.mask, plan["mask"][i, 0], atol=1e-5, rtol=0)
            expected = {name.name: float(s) for name, s in zip(photos, target[i], strict=True) if s > 0.005}
            assert dict(photo.labels) == pytest.approx(expected, abs=1e-6) and len(expected) == 2


def test_a_fixed_lambda_changes_nothing_else_and_the_page_says_where_none_was_drawn(photos):
    drawn, fixed = (mix(None, photos, "mixup", [1.0], 0, lam) for lam in (None, 0.25))
    for a, b in zip(drawn.photos, fixed.photos, strict=True):
        assert [name for name, _ in a.labels] == [name for name, _ in b.labels]
        assert [share for _, share in b.labels] == pytest.approx([0.25, 0.75])
        assert b.mask is None  # the same share everywhere
    assert any(note.startswith("Lambda is fixed at 0.25.") for note in fixed.notes) and not drawn.notes
    (note,) = mix(None, photos, "guidedmix", defaults("guidedmix"), 0, 0.25).notes
    assert note.startswith("Lambda is not fixed")


@pytest.mark.parametrize("mixer", MIXERS)
def test_fields_that_nobody_touches_give_the_mixer_its_defaults(mixer, monkeypatch):
    monkeypatch.setattr("mixup_recipes.demo.arguments.whole", lambda *_: None)  # no weights for a teacher
    assert values(mixer, PLAIN, defaults(mixer)) == complete(PLAIN, mixer, {})


def test_fields_are_read_as_their_argument_is(photos):
    read = values("gridmix", PLAIN, defaults("gridmix", n_holes="3, 5", clip=True, alpha=1))
    assert (read["n_holes"], read["clip"], read["alpha"]) == ([3, 5], True, 1)
    assert values("lumix", PLAIN, defaults("lumix", base="mixup"))["base"] == {"mixup": {"alpha": 1.0}}
    assert values("smoothmix", PLAIN, defaults("smoothmix", alpha="0.2"))["alpha"] == 0.2


def test_mistakes_are_one_sentence(photos, tmp_path, without_shape_checks):
    words = Photo(tmp_path / "words.txt", "words")
    words.path.write_text("no photo")
    for given, mixer, held, seed, says in (
        (photos[:1], "cutmix", [1.0], 0, "^Mixing needs 2 to 4 photos, and there is 1.$"),
        ([], "cutmix", [1.0], 0, "^Mixing needs 2 to 4 photos, and there are none.$"),
        ([*photos, photos[0]], "cutmix", [1.0], 0, "^Mixing needs 2 to 4 photos, and there are 5.$"),
        ([words], "cutmix", [1.0], 0, "^words cannot be read as a photo: not an image of a known format.$"),
        (photos, "cutmix", [-1], 0, "^cutmix: alpha must be a number above 0, got -1.0$"),
        (photos, "cutmix", [None], 0, "^alpha: enter a number$"),
        (photos, "cutmix", [1.0], 0.5, "^The seed must be a whole number of at least 0.$"),
        (photos, "gridmix", defaults("gridmix", n_holes="two"), 0, "^gridmix: n_holes must be two integers"),
        (photos, "lumix", defaults("lumix", base="cutmx"), 0, "^lumix: unknown mixer 'cutmx'; did you mean 'cutmix'?"),
        (photos, "cmixup", [], 0, "is for regression"),
    ):
        with pytest.raises(UserError, match=says):
            mix(None, given, mixer, held, seed)


def test_the_page_asks_the_run_and_says_which_network_the_mixer_worked_with(run, tmp_path, photos):
    model = models.open_named(str(run))
    assert (model.name, model.classes) == ("run", ["blue", "green", "red", "white"])
    shown = mix(model, photos, "vanilla", [])
    assert shown.notes == ["It leaves photos as they are."]
    paths = [photo.path for photo in photos]
    for photo, found in zip(
        shown.photos, predictions(str(run), *models.open_model(str(run)), paths, 4, 4), strict=True
    ):
        assert [name for name, _ in photo.says] == found.labels
        assert [p for _, p in photo.says] == pytest.approx(found.probabilities, abs=1e-4)
    weights = {name: value.clone() for name, value in model.net.state_dict().items()}
    for mixer, note in (
        ("grafting", "run is the network that the mixer worked with."),
        ("transmix", "transmix cannot work with run, so the mixer worked with a small network that is not trained."),
        ("manifoldmix", "In this update it mixes features inside of the network, so the photos stay as they are."),
    ):
        held = [field.value for field in fields(mixer, model.recipe)]
        several = [mix(model, photos[:2], mixer, held, seed) for seed in range(5)]  # manifoldmix may mix the images too
        assert any(note in two.notes for two in several) and len(several[0].photos[0].says) == 4
    assert all(torch.equal(value, weights[name]) for name, value in model.net.state_dict().items())


def test_without_a_run_the_page_asks_the_prepared_weights_or_nobody(monkeypatch, photos):
    def missing(_):
        raise UserError("not prepared")

    monkeypatch.setattr(models, "find_weights", missing)
    assert models.open_named(None) is None
    shown = mix(None, photos, "grafting", defaults("grafting"))
    assert "No trained network is here, so the mixer worked with a small network that is not trained." in shown.notes
    assert shown.photos[0].says == []
    monkeypatch.setattr(models, "find_prepared", lambda _: None)
    assert models.examples(None, None).source == "drawn shapes"


def test_names_of_photos_and_classes_are_text_on_the_page_whatever_they_hold(photos, tmp_path):
    odd = "<img src=x onerror=alert(1)>"
    shown = mix(None, [photos[0]._replace(name=odd), photos[1]], "cutmix", [1.0])
    shown.photos[0].says.append((odd, 0.5))
    html = cards.cards(shown, [odd, photos[1].name], 0, odd) + cards.problem(odd)
    html += cards.thumbnails([photos[0]._replace(name=odd), Photo(tmp_path / "none.png", odd)])
    assert "<img src=x" not in html and html.count("<section") == 2 and html.count('role="alert"') == 1


# ----------------------------------------------------------------------------------------------- the Space


def page_of(folder: Path) -> SimpleNamespace:
    """The ``app.py`` of a Space, imported from there."""
    names = runpy.run_path(str(folder / "app.py"), run_name="app")
    return SimpleNamespace(**names)


def test_a_space_says_what_predict_says_and_needs_only_what_it_names(run, tmp_path, console):
    out = tmp_path / "space"
    status, said, _ = console("demo", run, "--share_to_space", out)
    assert status == 0 and f"hf upload OWNER/NAME {out} . --repo-type space" in said
    assert {p.name for p in out.iterdir()} == {
        "README.md", "app.py", "config.json", "model.safetensors", "requirements.txt"
    }  # fmt: skip
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert (front["sdk"], front["app_file"], front["title"]) == ("gradio", "app.py", "run")
    named = re.findall(r"^([\w-]+)>=", (out / "requirements.txt").read_text(), re.M)
    owners = importlib.metadata.packages_distributions() | {"gradio": ["gradio"]}
    for node in ast.walk(ast.parse((out / "app.py").read_text())):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in {m.split(".")[0] for m in modules} - {"functools", "json", "pathlib", "typing"}:
            assert {name.lower() for name in owners[module]} & set(named), module

    app, rng = page_of(out), np.random.default_rng(5)
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i % 4, rng))
    paths = [tmp_path / f"{i}.jpg" for i in range(12)]
    for path, found in zip(paths, predictions(str(run), *models.open_model(str(run)), paths, 1, 4), strict=True):
        likely = app.classify(str(path))
        assert max(likely, key=likely.get) == found.labels[0]
        assert max(likely.values()) == pytest.approx(found.probabilities[0], abs=0.02)
    (tmp_path / "words.png").write_text("no photo")
    with pytest.raises(OSError):
        app.classify(str(tmp_path / "words.png"))


def test_a_space_of_timm_weights_is_complete_too(tmp_path, monkeypatch, photos):
    net = timm.create_model("test_resnet", num_classes=3).eval()
    monkeypatch.setattr(space, "open_model", lambda _: (net, None))
    space.write_space("test_resnet.some_weights", tmp_path / "space")
    likely = page_of(tmp_path / "space").classify(str(photos[0].path))
    assert list(likely) == ["0", "1", "2"] and sum(likely.values()) == pytest.approx(1, abs=1e-5)
    assert "The weights are `test_resnet.some_weights`." in (tmp_path / "space/README.md").read_text()


def test_a_space_turns_photos_and_gives_several_labels_where_the_run_does(run, tmp_path):
    space.write_space(str(run), out := tmp_path / "space")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    image.save(tmp_path / "stored.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "noted.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png")
    stored, noted, turned = (str(tmp_path / f"{name}.png") for name in ("stored", "noted", "turned"))
    app = page_of(out)
    assert app.classify(noted) == app.classify(stored) != app.classify(turned)
    config = out / "config.json"
    config.write_text(config.read_text().replace("{", '{"exif_orientation": true, "multi_label": true,', 1))
    app = page_of(out)
    assert app.classify(noted) == app.classify(turned)
    assert sum(app.classify(turned).values()) != pytest.approx(1, abs=0.01)


def test_a_space_replaces_nothing_and_is_refused_where_timm_cannot_load_it(run, tmp_path, console, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    status, _, said = console("demo", run, "--share_to_space", tmp_path / "mine")
    assert status == 2 and "mine: it is there already; name a new folder" in said
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    status, _, said = console("demo", "--share_to_space", tmp_path / "new")
    assert status == 2 and "--share_to_space writes the page of a model; name a run folder" in said
    ours = SimpleNamespace(pretrained_cfg={"architecture": "wide_resnet28_8_cifar"})
    monkeypatch.setattr(space, "open_model", lambda _: (ours, None))
    with pytest.raises(UserError, match=r"^wide_resnet28_8_cifar is an architecture of this package"):
        space.write_space(str(run), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_without_gradio_the_command_says_what_to_install(console, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else find(name, *a))
    status, _, said = console("demo")
    assert (status, said) == (2, "error: the page needs: pip install 'mixup-recipes[demo]'\n")


def test_the_arguments_start_from_the_recipe_of_a_run():
    recipe = dataclasses.replace(PLAIN, mixer_args={"cutmix": {"alpha": 0.2}})
    assert [field.value for field in fields("cutmix", recipe)] == [0.2]
    assert playground.built("cutmix", values("cutmix", recipe, [0.2])).alpha == 0.2
