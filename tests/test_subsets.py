"""Promise: test sets of ImageNet's classes are labelled by what their folders and files are called, and so scored."""

import json
from importlib import resources

import datasets
import numpy as np
import pytest
import timm
import tiny
import torch
from safetensors.numpy import load_file
from teachers import fill
from timm.data import ImageNetInfo
from timm.models import save_for_hf

from mixup_recipes.data.decoding import decode
from mixup_recipes.data.images import EvalTransform, normalise
from mixup_recipes.recipe import changed
from mixup_recipes.robustness import subsets, suite
from mixup_recipes.robustness.passes import Bench
from mixup_recipes.runs.models import evaluation_recipe, open_model

SYNSETS = ImageNetInfo().label_names()
OUTPUTS = [SYNSETS[i] for i in np.random.default_rng(0).permutation(1000)]  # of a model with an order of its own


def carried(name):
    return (resources.files("timm.data") / "_info" / name).read_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder whose answers differ from photo to photo, of 1,000 classes by their synsets."""
    folder = tmp_path_factory.mktemp("subsets") / "model"
    overlay = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    net = fill(timm.create_model("test_resnet", pretrained_cfg_overlay=overlay))
    with torch.no_grad():
        net.get_classifier().weight.mul_(9)
    save_for_hf(net, str(folder), safe_serialization=True, model_config={"label_names": OUTPUTS})
    return folder


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    return [tiny.jpeg(i % 4, rng) for i in range(12)]


@pytest.fixture(scope="module")
def logits(model, photos):
    """What the model says of each photo alone, (12, 1000), in ImageNet's order."""
    net, _ = open_model(str(model))
    recipe = evaluation_recipe(net, "", None, {"dataset": "x"})
    transform = EvalTransform.of(recipe)
    batches = [normalise(transform(decode(photo))[None], recipe, torch.device("cpu")) for photo in photos]
    with torch.no_grad():
        said = torch.cat([net.eval()(x) for x in batches]).numpy()
    return said[:, [OUTPUTS.index(name) for name in SYNSETS]]


def test_mce_is_for_imagenets_thousand_classes_all_with_images_at_its_size(model):
    net, _ = open_model(str(model))
    recipe = evaluation_recipe(net, "", None, {"dataset": "x"})
    table = datasets.Dataset.from_dict({"image": [""] * 1000, "label": range(1000)})

    def decided(classes=OUTPUTS, images=1000, side=224):
        transform = EvalTransform.of(changed(recipe, eval_size=side, eval_resize=side))
        return suite.of_imagenet(Bench(net, table.select(range(images)), recipe, transform, None, 0), classes)

    assert decided() and decided(SYNSETS) and not decided(images=999) and not decided(side=64)
    assert not decided([f"c{i}" for i in range(1000)]) and not decided([*OUTPUTS[:-1], "n99999999"])


def put(root, photos, folders, files=None):
    """Photo i in a folder of the given name."""
    for i, (photo, folder) in enumerate(zip(photos, folders, strict=True)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / (files[i] if files else f"{i}.jpg")).write_bytes(photo)
    return root


def scored(console, model, root, subset, tmp_path, *more):
    out, said = tmp_path / "scores.json", tmp_path / "said.safetensors"
    argv = ("--dataset", root, "--subset", subset, "--output", out, "--predictions", said, "--batch_size", 5, *more)
    status, shown, errors = console("evaluate", model, *argv)
    assert status == 0, errors
    return json.loads(out.read_text()), load_file(said), shown


@pytest.mark.parametrize("subset", ["imagenet-a", "imagenet-r"])
def test_a_and_r_are_scored_among_all_classes_and_among_their_own(subset, model, photos, logits, console, tmp_path):
    letter = subset[-1]
    own = [int(i) for i in carried(f"imagenet_{letter}_indices.txt").split()]
    assert [SYNSETS[i] for i in own] == subsets.classes_of(subset) and len(own) == 200
    restricted = [own[i] for i in logits[:, own].argmax(1)]
    truth = [k if i % 3 else own[(own.index(k) + 7) % 200] for i, k in enumerate(restricted)]  # a third is wrong
    root = put(tmp_path / "set", photos, [SYNSETS[k] for k in truth])
    found, said, shown = scored(console, model, root, subset, tmp_path)
    assert found["restricted_top1"] == pytest.approx(100 * 8 / 12) and found["count"] == 12
    assert found["top1"] == pytest.approx(100 * np.mean(logits.argmax(1) == truth))
    z = logits[:, own] - logits[:, own].max(1, keepdims=True)
    nll = np.log(np.exp(z).sum(1)) - z[np.arange(12), [own.index(k) for k in truth]]
    assert found["restricted_nll"] == pytest.approx(nll.mean(), rel=1e-4) and found["nll"] > found["restricted_nll"]
    best = np.sort([SYNSETS[k] for k in logits.argmax(1)])
    assert [*best] == sorted(OUTPUTS[k] for k in said["top"][:, 0])
    assert f"{len({*truth})} of the 200 classes of {subset} have images" in shown


def test_the_folders_of_v2_are_numbers_and_not_words(model, photos, logits, console, tmp_path):
    truth = [int(k) if i % 2 else (2, 10, 999)[i % 3] for i, k in enumerate(logits.argmax(1))]
    found, _, _ = scored(console, model, put(tmp_path / "set", photos, map(str, truth)), "imagenet-v2", tmp_path)
    assert found["top1"] == pytest.approx(100 * np.mean(logits.argmax(1) == truth)) and 50 <= found["top1"] < 100
    assert "restricted_top1" not in found
    numbers = [str(k) for k in range(1000)]
    assert subsets.synsets_of(sorted(numbers), "imagenet-v2", "") == [SYNSETS[int(name)] for name in sorted(numbers)]


def test_sketch_is_scored_by_the_names_of_its_folders(model, photos, logits, console, tmp_path):
    truth = [int(k) if i % 4 else (int(k) + 1) % 1000 for i, k in enumerate(logits.argmax(1))]
    root = put(tmp_path / "set", photos, [SYNSETS[k] for k in truth])
    found, _, _ = scored(console, model, root, "imagenet-sketch", tmp_path, "--max_eval_samples", 12)
    assert found["top1"] == pytest.approx(75)


@pytest.mark.parametrize("ending", [".JPEG", "_n01440764.JPEG"])
def test_real_labels_go_by_the_names_of_files_and_images_without_one_do_not_count(
    ending, model, photos, logits, console, tmp_path
):
    real = json.loads(carried("imagenet_real_labels.json"))
    best, first = np.argsort(-logits, 1), {}
    for number, right in enumerate(real):
        for k in right:
            first.setdefault(k, number)
    several = next(number for number, right in enumerate(real) if len(right) > 2)
    numbers = [first.get(int(row[0 if i % 2 else 3]), several) for i, row in enumerate(best)]
    numbers[0] = real.index([])
    files = [f"ILSVRC2012_val_{number + 1:08}{ending}" for number in numbers]
    root = put(tmp_path / "set", photos, [SYNSETS[i] for i in range(12)], files)
    found, _, _ = scored(console, model, root, "real", tmp_path)
    rows = [(row, real[number]) for row, number in zip(best, numbers, strict=True) if real[number]]
    assert found["real_count"] == len(rows) < found["count"] == 12
    assert found["real_top1"] == pytest.approx(100 * np.mean([row[0] in right for row, right in rows]))
    assert found["real_top5"] == pytest.approx(100 * np.mean([bool({*row[:5]} & {*right}) for row, right in rows]))
    assert found["top1"] == pytest.approx(100 * np.mean(logits.argmax(1) == np.arange(12)))
    assert found["real_top1"] >= 100 * 5 / 12


@pytest.mark.parametrize(
    ("subset", "folders", "says"),
    [
        (
            "imagenet-a",
            ("n01440764", "n01498041"),
            "are WordNet ids such as n01498041, of its 200 classes; got n01440764",
        ),
        ("imagenet-a", ("0", "1"), "got 0, 1; they are called like those of imagenet-v2"),
        (
            "imagenet-v2",
            ("n01440764", "n01443537"),
            "are numbers of classes, 0 to 999; got n01440764, n01443537; they are",
        ),
        ("imagenet-v2", ("0", "1000"), "got 1000"),
        ("imagenet-sketch", ("cat", "dog"), "got cat, dog"),
        ("real", ("n01440764", "n01443537"), "2 images are called otherwise: 0.jpg, 1.jpg"),
    ],
)
def test_folders_and_files_of_other_names_are_refused(subset, folders, says, model, photos, console, tmp_path):
    root = put(tmp_path / "set", photos[:2], folders)
    status, _, errors = console("evaluate", model, "--dataset", root, "--subset", subset)
    assert status == 2 and says in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("classes", "names", "says"),
    [
        (10, None, "test_model has 10 classes"),
        (1000, [f"c{i}" for i in range(1000)], "has 1,000 classes of another kind"),
    ],
)
def test_a_model_of_other_classes_is_refused_before_data_are_looked_for(classes, names, says, console, tmp_path):
    net, folder = fill(timm.create_model("test_resnet", num_classes=classes)), tmp_path / "test_model"
    save_for_hf(net, str(folder), safe_serialization=True, model_config={"label_names": names} if names else {})
    status, _, errors = console("evaluate", folder, "--dataset", "no/such/folder", "--subset", "imagenet-r")
    assert status == 2 and says in errors
    status, _, errors = console("evaluate", folder, "--subset", "imagenet-r")
    assert status == 2 and "no images of imagenet-r were given; pass --dataset FOLDER" in errors
