"""The contact sheet shows what the methods really do, the same each time, on images that are at hand."""

from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CLASSES, make_photos, make_recipe

from mixers import MIXERS, Mixup, taps
from mixup_recipes.data import images, prepare
from mixup_recipes.pages import preview
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.resolve import load_recipe, resolve
from mixup_recipes.typed import UserError

SIDE = preview.SIDE


def cell(path, row, column, count=5, block=0):
    """The picture of one cell, (SIDE, SIDE, 3); row 0 holds the ``count`` images themselves."""
    left, top = preview.corner(block, row, column, count)
    with Image.open(path) as sheet:
        return np.array(sheet.crop((left, top, left + SIDE, top + SIDE)))


def small(photos):
    """The images at the size of the sheet, (N, SIDE, SIDE, 3)."""
    shrink = images.EvalTransform(SIDE, SIDE, "bicubic")
    return torch.stack([shrink(image) for image in photos.images]).permute(0, 2, 3, 1).numpy()


def test_each_cell_shows_its_image_mixed_with_the_draw_of_its_update_in_the_same_bytes_each_time(tmp_path):
    path, again, methods = tmp_path / "new/sheet.png", tmp_path / "again.png", ["vanilla", "mixup", "cutmix", "deit"]
    assert preview.preview([], methods, 5, "synthetic", path) == f"{path}: 4 methods by 5 images (drawn shapes)"
    torch.rand(1)
    preview.preview([], methods, 5, "synthetic", again)
    assert path.read_bytes() == again.read_bytes()
    x = small(preview.shapes(5))
    shares = preview.mixed(preview.chosen([], ["cutmix"])[0], preview.shapes(5)).shares
    for i in range(5):
        assert np.array_equal(cell(path, 0, i), x[i]) and np.array_equal(cell(path, 1, i), x[i])
        rng = np.random.default_rng((0, i))
        lam = rng.beta(1, 1)
        mixed = lam * x[i] + (1 - lam) * x[rng.permutation(5)[i]].astype(float)
        assert np.abs(cell(path, 2, i) - mixed).max() < 0.51
        rng = np.random.default_rng((0, i))
        half, row, column = int(SIDE * np.sqrt(1 - rng.beta(1, 1))) // 2, rng.integers(SIDE), rng.integers(SIDE)
        partner, pasted, label = rng.permutation(5)[i], x[i].copy(), np.eye(5)[i]
        box = np.s_[max(row - half, 0) : row + half, max(column - half, 0) : column + half]
        pasted[box] = x[partner][box]
        assert np.array_equal(cell(path, 3, i), pasted)
        share = pasted[box][..., 0].size / SIDE**2
        label = (1 - share) * label + share * np.eye(5)[partner]
        assert shares[i].numpy() == pytest.approx(label, abs=1e-6)


def test_many_methods_stand_in_blocks_side_by_side_and_no_text_is_cut(tmp_path):
    pen, path = preview.ImageDraw.ImageDraw, tmp_path / "sheet.png"
    with patch.object(pen, "text", autospec=True, side_effect=pen.text) as text:
        preview.preview([], ["vanilla"] * 8 + ["gridmix", "automix", "vanilla"], 3, "synthetic", path)
    written = [call.args[2] for call in text.call_args_list]
    x = small(preview.shapes(3))
    for block, row in ((0, 0), (1, 0), (0, 6), (1, 5)):  # 6 methods in the first block, 5 in the second
        assert all(np.array_equal(cell(path, row, i, 3, block), x[i]) for i in range(3))
    assert not [words for words in written if "…" in words] and "1 disc" in written
    assert [w for w in written if w.startswith("by untrained model, ") and w.endswith(" more")]


def test_rows_are_all_mixers_or_recipes_or_runs_or_mixers_under_one_setting(reference, tiny_recipe, tmp_path):
    everything = preview.chosen([], [])
    assert [r.mixer for r in everything] == list(MIXERS)
    assert (everything[1].mixer, everything[1].mixer_args["mixup"]) == ("mixup", {"alpha": 1.0})
    under = preview.chosen(["quickstart"], ["mixup", "cutmix"])
    rows = {m: load_recipe(f"quickstart_{m}").mixer_args[m] for m in ("mixup", "cutmix")}
    assert {r.mixer: r.mixer_args[r.mixer] for r in under} == rows
    run = reference("--mixer", "vanilla")
    recipe, cutmix = load_recipe(str(run / "recipe.yaml")), load_recipe("deit_s_cutmix")
    assert preview.chosen([str(run), "deit_s_cutmix"], []) == [recipe, cutmix]
    (one,) = preview.chosen([str(run)], ["mixup"])
    assert (one.mixer, one.image_size, one.dataset) == ("mixup", recipe.image_size, recipe.dataset)
    with pytest.raises(UserError, match=r"is not a run folder: recipe\.yaml is missing"):
        preview.chosen([str(tmp_path)], [])
    # a teacher keeps the classes of its recipe
    recipe, _ = resolve(str(tiny_recipe), {"mixer": "supermix", "mixer_args": {"teacher": str(run), "steps": 1}})
    shares = preview.mixed(recipe, preview.shapes(3)).shares
    assert shares.shape == (3, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(3))


def test_images_are_the_recipe_s_own_else_the_prepared_set_else_drawn_or_of_a_folder(tmp_path, monkeypatch):
    own = load_recipe(str(make_recipe(tmp_path, make_photos(tmp_path / "photos"))))
    found = preview.find_photos(own, None, 6)
    assert found.names == [CLASSES[k] for k in (0, 1, 2, 3, 0, 1)]  # one of each class before a second
    elsewhere = Recipe(dataset="ILSVRC/imagenet-1k", model="test_resnet")
    monkeypatch.setattr(prepare, "find_prepared", lambda _: None)
    assert preview.find_photos(elsewhere, None, 3).source == "drawn shapes"
    monkeypatch.setattr(prepare, "find_prepared", lambda _: tmp_path)
    monkeypatch.setattr(preview, "table_photos", lambda recipe, count: (recipe.dataset, count))
    assert preview.find_photos(elsewhere, None, 3) == ("groceries", 3)
    for name in ("cat/1.png", "cat/2.png", "cat/3.png", "dog/1.png", "dog/broken.png"):
        (tmp_path / "own" / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (20, 30), "red").save(tmp_path / "own" / name)
    (tmp_path / "own/dog/broken.png").write_bytes(b"no image")
    (tmp_path / "own/notes.txt").write_text("no image either")
    found = preview.find_photos(elsewhere, str(tmp_path / "own"), 8)
    assert found.names == ["cat", "dog", "cat", "cat"] and found.images[0].shape == (3, 30, 20)
    assert preview.folder_photos(tmp_path / "own/cat", 2, False).names == ["1", "2"]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: without a recipe photos are seen as by a viewer
    for i in range(2):
        Image.new("RGB", (20, 30), "blue").save(tmp_path / f"own/dog/{i}.png", exif=exif)
    (plain,) = preview.chosen([], ["mixup"])
    for recipe, shape in ((elsewhere, (3, 30, 20)), (changed(elsewhere, exif_orientation=True), (3, 20, 30)),
                          (plain, (3, 20, 30))):  # fmt: skip
        found = preview.find_photos(recipe, str(tmp_path / "own/dog"), 2)
        assert [image.shape for image in found.images] == [shape] * 2


def test_an_untrained_model_and_what_is_mixed_behind_the_images_are_said(monkeypatch):
    class Looking(Mixup):
        needs = "model"

        def plan(self, x, y, rng, *look):
            lam = look[0](x).softmax(1).amax(1).detach()
            return super().plan(x, y, rng) | {"mask": lam.view(-1, 1, 1, 1)}

    class Hidden(Mixup):
        needs = "step"

        def mix(self, x, y, **plan):
            return x, super().mix(x, y, **plan)[1]

    monkeypatch.setitem(MIXERS.rows, "looking", Looking)
    monkeypatch.setitem(MIXERS.rows, "hidden", Hidden)
    rows = preview.chosen([], ["looking", "cutmix", "hidden"])
    notes = [preview.mixed(recipe, preview.shapes(4)).notes for recipe in rows]
    assert notes == [["by untrained model"], [], ["mixes features"]]


def test_a_method_with_a_history_is_shown_as_if_behind_an_update_with_the_next_image_in_each_place():
    made = preview.mixed(preview.chosen([], ["recursivemix"])[0], preview.shapes(3))
    assert (
        made.notes == [] and (made.pixels.permute(0, 2, 3, 1).numpy() != small(preview.shapes(3))).any((1, 2, 3)).all()
    )
    for i, shares in enumerate(made.shares):
        assert 0.5 < shares[i] < 1 and shares[i] + shares[i - 1] == pytest.approx(1)


def test_a_teacher_that_cannot_be_had_is_left_out_of_a_sheet_of_everything_only(monkeypatch, tmp_path):
    pretrained = Mock(side_effect=taps.NoWeights("no weights for the teacher"))
    monkeypatch.setattr(taps, "pretrained", pretrained)
    monkeypatch.setattr(taps.teacher, "pretrained", pretrained)
    two = {name: MIXERS.rows[name] for name in ("mixup", "attentivemix")}
    with patch.dict(MIXERS.rows, two, clear=True):  # which puts the others back in their order
        said = preview.preview([], [], 2, "synthetic", tmp_path / "a.png")
        with pytest.raises(UserError, match="'attentivemix' with model 'test_resnet': no weights for the teacher"):
            preview.preview([], ["attentivemix"], 2, "synthetic", tmp_path / "b.png")
    assert said.endswith("1 method by 2 images (drawn shapes); without the weights of their teachers: attentivemix")


def test_mistakes_are_one_line_and_nothing_is_written(tmp_path):
    mixp = "recipe 'r50_100e_mixp' has a known setting, 'r50_100e', and an unknown mixer"
    png = r"pictures are written as PNG; expected a name that ends in \.png"
    for recipes, mixers, count, photos, name, says in (
        ([], ["cutmx"], 8, None, "a.png", "^unknown mixer 'cutmx'; did you mean 'cutmix'?"),
        (["r50_100e_mixp"], [], 8, None, "a.png", f"^{mixp}"),
        (["r50_100e", "deit_s"], ["cutmix"], 8, None, "a.png", "^--mixers takes its setting from one recipe, got 2"),
        ([], [], 1, "synthetic", "a.png", "^images: expected 2 to 32, got 1"),
        ([], [], 8, "nowhere", "a.png", "^photos: expected a folder of images or 'synthetic', got 'nowhere'"),
        ([], [], 8, str(tmp_path), "a.png", "expected at least 2 images that can be read, found 0"),
        *(([], ["mixup"], 2, "synthetic", name, png) for name in ("sheet.jpg", "sheet", "sheet.png.gz")),
    ):
        with pytest.raises(UserError, match=says) as error:
            preview.preview(recipes, mixers, count, photos, tmp_path / name)
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
