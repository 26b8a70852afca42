"""The contact sheet shows what the methods really do, the same each time, on images that are at hand."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from resuming import Reference
from tiny import CLASSES, make_photos, make_recipe

from mixers import MIXERS, Mixup, taps
from mixup_recipes.data import images, prepare
from mixup_recipes.pages import preview
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import load_recipe, resolve
from mixup_recipes.typed import UserError

SIDE = preview.SIDE


def cell(path: Path, row: int, column: int, count: int = 5, block: int = 0) -> np.ndarray:
    """The picture of one cell, (SIDE, SIDE, 3); row 0 holds the ``count`` images themselves."""
    left, top = preview.place(block, row, column, count)
    with Image.open(path) as sheet:
        return np.array(sheet.crop((left, top, left + SIDE, top + SIDE)))


def small(photos: preview.Photos) -> np.ndarray:
    """The images at the size of the sheet, (N, SIDE, SIDE, 3)."""
    shrink = images.EvalTransform(SIDE, SIDE, "bicubic")
    return torch.stack([shrink(image) for image in photos.images]).permute(0, 2, 3, 1).numpy()


def test_each_cell_shows_its_image_mixed_with_the_draw_of_its_update(tmp_path: Path) -> None:
    said = preview.preview([], ["vanilla", "mixup", "cutmix"], 5, "synthetic", tmp_path / "new/sheet.png")
    assert said == f"{tmp_path}/new/sheet.png: 3 methods by 5 images (drawn shapes)"
    x = small(preview.shapes(5))
    for i in range(5):
        assert np.array_equal(cell(tmp_path / "new/sheet.png", 0, i), x[i])
        assert np.array_equal(cell(tmp_path / "new/sheet.png", 1, i), x[i])
        rng = np.random.default_rng((0, i))
        lam = rng.beta(1, 1)
        mixed = lam * x[i] + (1 - lam) * x[rng.permutation(5)[i]].astype(float)
        assert np.abs(cell(tmp_path / "new/sheet.png", 2, i) - mixed).max() < 0.51
        rng = np.random.default_rng((0, i))
        half, row, column = int(SIDE * np.sqrt(1 - rng.beta(1, 1))) // 2, rng.integers(SIDE), rng.integers(SIDE)
        pasted, partner = x[i].copy(), x[rng.permutation(5)[i]]
        box = np.s_[max(row - half, 0) : row + half, max(column - half, 0) : column + half]
        pasted[box] = partner[box]
        assert np.array_equal(cell(tmp_path / "new/sheet.png", 3, i), pasted)


def test_many_methods_stand_in_blocks_side_by_side_and_no_text_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    original = preview.ImageDraw.ImageDraw.text

    def text(pen: preview.ImageDraw.ImageDraw, at: tuple[int, int], words: str, **how: object) -> None:
        written.append(words)
        original(pen, at, words, **how)

    monkeypatch.setattr(preview.ImageDraw.ImageDraw, "text", text)
    path = tmp_path / "sheet.png"
    preview.preview([], ["vanilla"] * 8 + ["gridmix", "automix", "vanilla"], 3, "synthetic", path)
    x = small(preview.shapes(3))
    for block, row in ((0, 0), (1, 0), (0, 6), (1, 5)):  # 6 methods in the first block, 5 in the second
        for i in range(3):
            assert np.array_equal(cell(path, row, i, 3, block), x[i])
    assert not [words for words in written if "…" in words] and "1 disc" in written
    assert [w for w in written if w.startswith("by untrained model, ") and w.endswith(" more")]


def test_the_rows_of_run_folders_are_their_recipes(reference: Reference, tmp_path: Path) -> None:
    run = reference("--mixer", "vanilla")
    recipe = load_recipe(str(run / "recipe.yaml"))
    assert preview.chosen([str(run), "deit_s_cutmix"], []) == [recipe, load_recipe("deit_s_cutmix")]
    (under,) = preview.chosen([str(run)], ["mixup"])
    assert (under.mixer, under.image_size, under.dataset) == ("mixup", recipe.image_size, recipe.dataset)
    with pytest.raises(UserError, match=r"is no run folder: recipe\.yaml is missing"):
        preview.chosen([str(tmp_path)], [])


def test_shares_are_those_of_the_label_by_source() -> None:
    recipe = preview.chosen([], ["cutmix"])[0]
    shares = preview.mixed(recipe, preview.shapes(4)).shares
    for i in range(4):
        rng = np.random.default_rng((0, i))
        half, row, column = int(SIDE * np.sqrt(1 - rng.beta(1, 1))) // 2, rng.integers(SIDE), rng.integers(SIDE)
        height, width = (min(c + half, SIDE) - max(c - half, 0) for c in (row, column))
        expected = np.zeros(4)
        expected[i] += 1 - height * width / SIDE**2
        expected[rng.permutation(4)[i]] += height * width / SIDE**2
        assert shares[i].numpy() == pytest.approx(expected, abs=1e-6)


def test_the_same_call_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        preview.preview([], ["cutmix", "deit"], 3, "synthetic", tmp_path / name)
        torch.rand(1)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_rows_are_all_mixers_or_recipes_or_mixers_under_one_setting() -> None:
    assert [(r.mixer, r.mixer_args[r.mixer]) for r in preview.chosen([], [])][1] == ("mixup", {"alpha": 1.0})
    assert [r.mixer for r in preview.chosen([], [])] == list(MIXERS)
    assert [r.name for r in preview.chosen(["r50_100e_mixup", "deit_s_cutmix"], [])] == [
        "r50_100e_mixup",
        "deit_s_cutmix",
    ]
    under = preview.chosen(["quickstart"], ["mixup", "cutmix"])
    assert [r.mixer_args[r.mixer] for r in under] == [
        load_recipe(f"quickstart_{m}").mixer_args[m] for m in ("mixup", "cutmix")
    ]


def test_images_are_the_recipe_s_own_else_the_prepared_set_else_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = load_recipe(str(make_recipe(tmp_path, make_photos(tmp_path / "photos"))))
    found = preview.find_photos(own, None, 6)
    assert found.names == [CLASSES[k] for k in (0, 1, 2, 3, 0, 1)]  # one of each class before a second
    elsewhere = Recipe(dataset="ILSVRC/imagenet-1k", model="test_resnet")
    monkeypatch.setattr(prepare, "prepared", lambda _: None)
    assert preview.find_photos(elsewhere, None, 3).source == "drawn shapes"
    monkeypatch.setattr(prepare, "prepared", lambda _: tmp_path)
    monkeypatch.setattr(preview, "table_photos", lambda recipe, count: (recipe.dataset, count))
    assert preview.find_photos(elsewhere, None, 3) == ("groceries", 3)


def test_photos_of_a_folder_are_named_by_class_folder_or_file(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/broken.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 30), "red").save(tmp_path / name)
    (tmp_path / "dog/broken.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image either")
    found = preview.find_photos(preview.chosen([], [])[0], str(tmp_path), 8)
    assert found.names == ["cat", "dog", "cat"]
    assert found.images[0].shape == (3, 30, 20)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 30), "red").save(tmp_path / "cat" / name)
    assert preview.folder_photos(tmp_path / "cat", 2).names == ["1", "2"]


def test_a_mixer_that_looks_at_the_model_is_shown_with_an_untrained_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looking(Mixup):
        needs = "model"

        def plan(self, x, y, rng, *look):
            lam = look[0](x).softmax(1).amax(1).detach()
            return super().plan(x, y, rng) | {"mask": lam.view(-1, 1, 1, 1)}

    monkeypatch.setitem(MIXERS.rows, "looking", Looking)
    rows = [preview.mixed(recipe, preview.shapes(4)) for recipe in preview.chosen([], ["looking", "cutmix"])]
    assert [row.notes for row in rows] == [["by untrained model"], []]


def test_a_teacher_that_cannot_be_had_is_left_out_of_a_sheet_of_everything_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def pretrained(name: str) -> None:
        raise taps.NoWeights(f"no weights for the teacher {name!r}")

    monkeypatch.setattr(taps, "pretrained", pretrained)
    monkeypatch.setattr(taps.teacher, "pretrained", pretrained)
    two = {name: MIXERS.rows[name] for name in ("mixup", "attentivemix")}
    with patch.dict(MIXERS.rows, two, clear=True):  # which puts the others back in their order
        said = preview.preview([], [], 2, "synthetic", tmp_path / "a.png")
        with pytest.raises(UserError, match="'attentivemix' with model 'test_resnet': no weights for the teacher"):
            preview.preview([], ["attentivemix"], 2, "synthetic", tmp_path / "b.png")
    assert said.endswith("1 methods by 2 images (drawn shapes); without the weights of their teachers: attentivemix")


def test_what_is_mixed_behind_the_images_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden(Mixup):
        needs = "step"

        def mix(self, x, y, **plan):
            return x, super().mix(x, y, **plan)[1]

    monkeypatch.setitem(MIXERS.rows, "hidden", Hidden)
    assert preview.mixed(preview.chosen([], ["hidden"])[0], preview.shapes(4)).notes == ["mixes features"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (([], ["cutmx"], 8, None), "unknown mixer 'cutmx'; did you mean 'cutmix'?"),
        (
            (["r50_100e_mixp"], [], 8, None),
            "recipe 'r50_100e_mixp' has a known setting, 'r50_100e', and an unknown mixer",
        ),
        ((["r50_100e", "deit_s"], ["cutmix"], 8, None), "with --mixers one recipe gives the setting, got 2"),
        (([], [], 1, "synthetic"), "images: expected 2 to 32, got 1"),
        (([], [], 8, "nowhere"), "photos: expected a folder of images or 'synthetic', got 'nowhere'"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(tmp_path: Path, args: tuple, says: str) -> None:
    with pytest.raises(UserError) as error:
        preview.preview(*args, tmp_path / "sheet.png")
    assert str(error.value).startswith(says)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_images_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected at least 2 images that can be read, found 0"):
        preview.find_photos(preview.chosen([], [])[0], str(tmp_path), 8)


@pytest.mark.parametrize("name", ["sheet.jpg", "sheet", "sheet.png.gz"])
def test_a_picture_is_called_what_it_is(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pictures are written as PNG; expected a name that ends in \.png"):
        preview.preview([], ["mixup"], 2, "synthetic", tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_teacher_keeps_the_classes_of_its_recipe(reference: Reference, tiny_recipe: Path) -> None:
    args = {"mixer": "supermix", "mixer_args": {"teacher": str(reference("--mixer", "vanilla")), "steps": 1}}
    recipe, _ = resolve(str(tiny_recipe), args)
    row = preview.mixed(recipe, preview.shapes(3))
    assert row.shares.shape == (3, 3)
    torch.testing.assert_close(row.shares.sum(1), torch.ones(3))
