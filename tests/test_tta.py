"""Promise: with test-time augmentation a model says the mean of the views' probabilities, and it is written down."""

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from torchvision.transforms import functional as TF

from mixup_recipes.data import images
from mixup_recipes.data.decoding import decode
from mixup_recipes.resolve import load_recipe
from mixup_recipes.runs.models import open_model
from mixup_recipes.runs.run import Run
from mixup_recipes.runs.tta import FiveCrops, Views, of_average
from mixup_recipes.typed import UserError

PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))  # the corners, as shares of the margin


def slow_views(pixels, size, kind):
    """The views of a resized picture (3, H, W), by hand."""
    margin = [side - size for side in pixels.shape[1:]]
    corners = [(int(a * margin[0]), int(b * margin[1])) for a, b in PLACES]
    centre = (round(margin[0] / 2), round(margin[1] / 2))
    crops = [pixels[:, t : t + size, l : l + size] for t, l in ([*corners, centre] if "crop" in kind else [centre])]  # noqa: E741
    return [v for crop in crops for v in ([crop, crop.flip(2)] if kind in ("flip", "ten_crop") else [crop])]


@pytest.fixture
def margin(run):
    """A run whose images are resized to more than the crop."""
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("eval_resize: 32", "eval_resize: 37"))
    return run


@pytest.mark.parametrize("several", [False, True])
def test_the_softmax_or_sigmoid_of_what_comes_out_is_the_mean_over_the_views(several):
    logits = torch.linspace(-60, 60, 3 * 2 * 5).view(5, 2, 3).transpose(0, 2).contiguous()
    found = of_average(logits, several)
    assert found.isfinite().all()
    for b in range(2):
        each = [row.double().sigmoid() if several else row.double().softmax(0) for row in logits[:, b]]
        said = found[b].double().sigmoid() if several else found[b].double().softmax(0)
        torch.testing.assert_close(said, sum(each) / len(each), rtol=1e-4, atol=1e-30)


def test_a_model_of_several_labels_says_the_mean_of_the_sigmoids(model):
    x = torch.linspace(-2, 2, 2 * 3 * 160 * 32).sin().view(2, 3, 160, 32)
    views = Views("ten_crop", images.EvalTransform(40, 32, "bilinear"))
    each = [
        model.eval()(v).sigmoid() for i in range(5) for c in [x[:, :, 32 * i : 32 * i + 32]] for v in (c, c.flip(3))
    ]
    torch.testing.assert_close(views.averaged(model, True)(x).sigmoid(), sum(each) / 10, rtol=1e-4, atol=1e-6)


def test_the_crops_are_torchvisions_corners_and_centre_of_the_resized_picture():
    picture = torch.arange(3 * 50 * 61, dtype=torch.uint8).view(3, 50, 61)
    found = FiveCrops(images.EvalTransform(37, 32, "bilinear"))(picture)
    small = images.resize(picture, 37, "bilinear", "v1")
    assert torch.equal(found, torch.cat(TF.five_crop(small, [32, 32]), 1))
    assert torch.equal(found, torch.cat(slow_views(small, 32, "five_crop"), 1))


@pytest.mark.parametrize("kind", ["flip", "five_crop", "ten_crop"])
def test_evaluate_and_predict_say_what_a_loop_over_the_views_says(margin, tiny_recipe, console, tmp_path, kind):
    out, scores = tmp_path / "p.safetensors", tmp_path / "scores.json"
    given = ("--tta", kind, "--predictions", out, "--output", scores)
    status, shown, errors = console("evaluate", margin, *given, "--dataloader_num_workers", int(kind == "five_crop"))
    assert status == 0 and f"tta {kind}" in shown and json.loads(scores.read_text())["tta"] == kind, errors
    with safe_open(out, "numpy") as file:
        assert file.metadata() == {"tta": kind}

    (net, _), recipe = open_model(str(margin)), load_recipe(str(margin / "recipe.yaml"))
    rows = pq.read_table(tiny_recipe.parent / "photos/data/test-00000-of-00001.parquet").to_pylist()
    likely = []
    for row in rows:
        small = images.resize(decode(row["image"]["bytes"]), 37, recipe.interpolation, recipe.pixels)
        views = torch.stack(slow_views(small, 32, kind))
        with torch.no_grad():
            likely.append(net.eval()(images.normalise(views, recipe, torch.device("cpu"))).softmax(1).mean(0))
    expected, found = torch.stack(likely), load_file(out)
    assert found["confidence"] == pytest.approx(expected.max(1).values.numpy(), rel=1e-4)
    right = expected.gather(1, torch.from_numpy(found["label"]).long()[:, None])[:, 0]
    assert found["nll"] == pytest.approx(-right.log().numpy(), rel=1e-4)

    (tmp_path / "0.jpg").write_bytes(rows[0]["image"]["bytes"])
    assert console("predict", margin, tmp_path / "0.jpg", "--tta", kind, "--out", tmp_path / "p.csv")[0] == 0
    (said,) = csv.DictReader((tmp_path / "p.csv").read_text().splitlines())
    assert float(said["probability"]) == pytest.approx(found["confidence"][0], rel=1e-4)
    shutil.copy(out, margin / "predictions.safetensors")
    with pytest.raises(UserError, match=f"averages over the views of --tta {kind}"):
        _ = Run.open(margin).predictions


def test_crops_are_refused_where_the_resized_image_has_no_margin(run, console, tmp_path):
    shutil.copy(run / "README.md", tmp_path / "0.jpg")  # never opened
    for command in (("evaluate", run), ("predict", run, tmp_path / "0.jpg")):
        status, _, errors = console(*command, "--tta", "ten_crop")
        assert status == 2 and "resized to 32 x 32, the size of the crop" in errors and "--tta flip" in errors
    assert "did you mean 'five_crop'" in console("evaluate", run, "--tta", "five_crops")[2]
    views = Views("ten_crop", images.EvalTransform((40, 35), (36, 32), "bilinear"))
    assert views.transform.size == [180, 32]
    assert np.prod(views.transform(torch.zeros(3, 99, 50, dtype=torch.uint8), ()).shape) == 3 * 180 * 32
