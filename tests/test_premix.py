"""SuperMix before training: what is stored, that it follows from its arguments, that a kill harms nothing."""

import dataclasses
import itertools
import signal
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from forks import Forks
from resuming import Reference
from timm.models import create_model, save_for_hf

from mixers.taps import Frozen
from mixup_recipes.data import images
from mixup_recipes.data.decoding import decode
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.order import Key
from mixup_recipes.data.splits import load_splits
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training import premix
from mixup_recipes.typed import UserError


@pytest.fixture(scope="module")
def teacher(reference: Reference) -> Path:
    """A run folder."""
    return reference("--mixer", "vanilla")


@pytest.fixture(scope="module")
def made(tiny_recipe: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 mixed images beside the 72 originals."""
    out = tmp_path_factory.mktemp("premix") / "made"
    assert premix.premix(str(tiny_recipe), out, str(teacher), 50, steps=10, originals=True) == 50
    return out


def rows(folder: Path, name: str) -> dict[str, list]:
    """The columns of some files."""
    return pa.concat_tables(pq.read_table(p) for p in sorted(folder.glob(f"data/{name}.parquet"))).to_pydict()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_in_each_stored_image_the_teacher_finds_both_classes_of_its_sources_first(made, teacher, tiny_recipe):
    recipe, frozen, found = load_recipe(str(tiny_recipe)), Frozen(str(teacher)), rows(made, "train-0*")
    sources = load_splits(recipe).train
    crop = images.EvalTransform.of(recipe)

    def seen(stack: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return frozen(images.normalise(stack, recipe, torch.device("cpu")))

    stored = torch.stack([decode(image["bytes"]) for image in found["image"]])
    assert len(found["label"]) == 50 and stored.shape == (50, 3, 32, 32)
    logits = seen(stored)
    assert logits.argmax(1).tolist() == found["label"]
    pairs = zip(found["first"], found["second"], strict=True)
    assert [set(two) for two in logits.topk(2).indices.tolist()] == [set(two) for two in pairs]
    assert 0 < min(found["lam"]) < max(found["lam"]) < 1 and len(set(found["lam"])) == 50
    both = []
    for which in ("first", "second"):
        encoded = [sources[row]["image"] for row in found[f"{which}_row"]]
        both.append(torch.stack([crop(decode(image["bytes"])) for image in encoded]).int())
        assert seen(both[-1].byte()).argmax(1).tolist() == found[which]
    low, high = torch.minimum(*both), torch.maximum(*both)
    assert ((stored >= low - 1) & (stored <= high + 1)).all()  # a pixel lies between those of its sources
    assert (stored.int() - both[0]).abs().float().mean((1, 2, 3)).min() > 1


def test_the_folder_is_data_of_the_hub_and_of_a_recipe_with_originals_byte_for_byte(made, tiny_recipe, tmp_path):
    splits = load_splits(load_recipe(str(tiny_recipe)))
    for name, table in (("train-originals", splits.train), ("test-00000", splits.eval)):
        found = rows(made, name)
        assert [i["bytes"] for i in found["image"]] == [i["bytes"] for i in table["image"]]
        assert found["label"] == found["first"] == found["second"] == table["label"][:]
        assert found["first_row"] == found["second_row"] == list(range(len(table))) and set(found["lam"]) == {1.0}
    recipe = dataclasses.replace(load_recipe(str(tiny_recipe)), dataset=str(made))
    splits = load_splits(recipe)
    crop = images.EvalTransform.of(recipe)
    samples = Samples(splits.train, recipe, crop)
    assert len(samples) == 122 and len(splits.eval) == 30
    assert {samples[Key(0, row, 0)][0].shape for row in range(122)} == {(3, 32, 32)}
    found = datasets.load_dataset(str(made), cache_dir=str(tmp_path))
    assert {split: len(table) for split, table in found.items()} == {"train": 122, "test": 30}
    assert found["train"].features["second"].names == tiny.CLASSES
    assert "50 images of 32 x 32" in (made / "README.md").read_text()
    for path in made.glob("*.*"):
        assert str(made.parent.parent) not in path.read_text()  # nothing of this machine
    assert sorted(p.name for p in made.iterdir()) == ["README.md", "data", "supermix.json"]


def test_images_in_class_folders_are_stored_with_the_names_of_their_files(teacher, tmp_path):
    rng, photos = np.random.default_rng(0), tmp_path / "photos"
    names = {f"{name}-{i}.jpg": kind for kind, name in enumerate(tiny.CLASSES) for i in range(4)}
    for split, (name, kind) in itertools.product(("train", "test"), names.items()):
        folder = photos / split / tiny.CLASSES[kind]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(tiny.jpeg(kind, rng))
    recipe = tiny.make_recipe(tmp_path, photos)
    premix.premix(str(recipe), tmp_path / "made", str(teacher), 5, steps=2, all_pairs=True, originals=True)
    found = {image["path"]: image["bytes"] for image in rows(tmp_path / "made", "train-originals")["image"]}
    assert found == {name: (photos / "train" / tiny.CLASSES[kind] / name).read_bytes() for name, kind in names.items()}
    assert premix.stored(None)["bytes"] == premix.stored({"bytes": None, "path": "/dev/zero"})["bytes"] == b""
    with pytest.raises(UserError, match=r"image .*gone.jpg cannot be read: No such file"):
        premix.stored(str(tmp_path / "gone.jpg"))


def test_seed_steps_alpha_number_and_all_pairs_are_as_asked_for(made, tiny_recipe, teacher, tmp_path):
    """Lambda follows the recipe's alpha: Beta(50, 50) deviates by 0.05, the default Beta(3, 3) by 0.19."""
    name, args = str(tiny_recipe), "{supermix: {alpha: 50.0, grid: 4, sigma: 1.0}}"
    alpha = str(tiny.make_recipe(tmp_path, Path(load_recipe(name).dataset), mixer_args=args))
    assert premix.premix(name, tmp_path / "some", str(teacher), steps=2) == 72
    premix.premix(name, tmp_path / "seed", str(teacher), 5, steps=10, seed=1)
    premix.premix(name, tmp_path / "all", str(teacher), 40, steps=1, all_pairs=True)
    premix.premix(alpha, tmp_path / "alpha", str(teacher), 100, steps=1, all_pairs=True)
    some, seed, every, even = (rows(tmp_path / name, "train-*") for name in ("some", "seed", "all", "alpha"))
    first, evaluated = rows(made, "train-0*"), "data/test-00000.parquet"
    assert some["image"][:50] != first["image"] and seed["first_row"] != first["first_row"][:5]
    assert files(tmp_path / "some")[evaluated] == files(tmp_path / "seed")[evaluated] == files(made)[evaluated]
    assert len(some["label"]) == 72
    # The second time through the data has another order.
    assert len(set(zip(some["first_row"], some["second_row"], strict=True))) > 65
    assert not any(i == j for i, j in zip(every["first"], every["second"], strict=True))
    missed = [k not in (i, j) for i, j, k in zip(every["first"], every["second"], every["label"], strict=True)]
    assert any(missed) and every["first_row"] != some["first_row"][:40]
    assert "All pairs" in (tmp_path / "all/README.md").read_text()
    assert abs(np.mean(even["lam"]) - 0.5) < 0.02 and 0.03 < np.std(even["lam"]) < 0.07


COMMAND = """
import driver, signal
from mixup_recipes import cli
from mixup_recipes.training import premix

premix.BATCHES = 2
if kill := sys.argv[1]:
    target, call, number = kill.split(",")
    driver.receive(target, int(call), getattr(signal, number))
sys.argv[1:] = sys.argv[2:]
cli.main()
"""
KILLS = {
    "in the second file": "mixup_recipes.files:os.replace,3,SIGKILL",  # behind the settings and the first file
    "while originals are copied": "mixup_recipes.training.premix:pq.ParquetWriter.close,1,SIGKILL",
    "before the card": "mixup_recipes.training.premix:card,1,SIGKILL",
    "before the folder gets its name": "mixup_recipes.training.premix:Path.rename,1,SIGKILL",
}


@pytest.mark.slow
def test_a_killed_command_leaves_no_folder_and_goes_on_to_it(tiny_recipe, teacher, tmp_path, monkeypatch, capsys):
    def made_here(out, count=40):
        return premix.premix(str(tiny_recipe), out, str(teacher), count, steps=3, originals=True)

    monkeypatch.setattr(premix, "BATCHES", 2)
    made_here(tmp_path / "whole")
    expected, out = files(tmp_path / "whole"), tmp_path / "made"
    args = ("supermix", tiny_recipe, "--teacher", teacher, "--images", 40, "--steps", 3, "--with_originals")
    with Forks({"HF_HUB_OFFLINE": "1"}, "import mixup_recipes.cli, mixup_recipes.training.premix") as forks:
        for moment, kill in KILLS.items():
            done = forks.run(COMMAND, kill, *args, "--out", out)
            assert done.returncode == -signal.SIGKILL, f"{moment}: {done.output}"
            assert not out.exists() and (tmp_path / "made.unfinished").exists(), moment
        done = forks.run(COMMAND, "mixup_recipes.training.premix:card,1,SIGTERM", *args, "--out", out)
        stopped = "stopped: images that were made are kept; the same command goes on\n"
        assert done.returncode == 130 and done.output.endswith(stopped)
        with pytest.raises(UserError, match=r"made.unfinished was started with other arguments or data; delete it, or"):
            made_here(out, 41)
        done = forks.run(COMMAND, "", *args, "--out", out)
        assert done.returncode == 0 and done.output.endswith(f"{out}: 40 mixed images\n"), done.output
    assert files(out) == expected
    capsys.readouterr()
    assert made_here(out) == 40 and capsys.readouterr().err == "was made before by the same command\n"
    damaged = next(out.glob("data/train-00001*"))
    content = damaged.read_bytes()
    for left, words in ((b"", r"train-00001.parquet is damaged \("), (None, "made is damaged: it holds ")):
        damaged.unlink() if left is None else damaged.write_bytes(left)
        with pytest.raises(UserError, match=words):
            made_here(out)
    damaged.write_bytes(content)
    with pytest.raises(UserError, match="made was made with other arguments or data; delete it"):
        made_here(out, 41)
    assert files(out) == expected
    assert [p.name for p in tmp_path.iterdir() if "unfinished" in p.name] == []


def test_bad_input_is_one_line_that_says_what_to_do(tiny_recipe, teacher, tmp_path, monkeypatch):
    name, out, teacher = str(tiny_recipe), tmp_path / "made", str(teacher)
    save_for_hf(create_model("test_resnet", num_classes=7), str(tmp_path / "seven"), safe_serialization=True)
    deit = create_model("deit_tiny_patch16_224", num_classes=4, depth=1)
    save_for_hf(deit, str(tmp_path / "vit"), safe_serialization=True, model_config={"model_args": {"depth": 1}})
    unknown = "no weights for the teacher 'no_such_model' (Unknown model (no_such_model)); "
    seven = "knows 7 classes, expected 4: take one that was trained on the same dataset"
    nothing, none_found = str(tmp_path / "nothing"), "take more --steps, a better teacher, or --all_pairs"
    for says, given, options in (
        ("unknown recipe 'no_such_setting'", ("no_such_setting", out), {}),
        ("no teacher was given; pass --teacher with a run folder, hf-hub:owner/name or timm weights", (name, out), {}),
        ("images: expected at least 1, got 0", (name, out, teacher, 0), {}),
        ("steps must be a whole number, at least 1, got 0", (name, out, teacher), {"steps": 0}),
        (unknown, (name, out, "no_such_model"), {"dataset": nothing}),  # before any data is touched
        (seven, (name, out, str(tmp_path / "seven")), {}),
        ("does not take 2 images of 32 x 32", (name, out, str(tmp_path / "vit")), {}),
        (f"{tmp_path} is there already; choose another --out", (name, tmp_path, teacher), {}),
        ("is neither a folder", (name, out, teacher), {"dataset": nothing}),
        (none_found, (name, out, teacher), {"steps": 1}),
    ):
        if says == none_found:
            monkeypatch.setattr(premix, "finds_both", lambda logits, pair: torch.zeros(len(pair), dtype=torch.bool))
        with pytest.raises(UserError) as caught:
            premix.premix(*given, **options)
        assert says in str(caught.value) and "\n" not in str(caught.value) and not out.exists()
    assert not (tmp_path / "made.unfinished").exists()  # other arguments may follow
