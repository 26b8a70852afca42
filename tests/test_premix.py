"""SuperMix before training: what is stored, that it follows from its arguments, that a kill harms nothing."""

import dataclasses
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


def pixels(encoded: list[dict]) -> torch.Tensor:
    return torch.stack([images.decode(image["bytes"]) for image in encoded])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_in_each_stored_image_the_teacher_finds_both_classes_of_its_sources_first(
    made: Path, teacher: Path, tiny_recipe: Path
) -> None:
    recipe, frozen = load_recipe(str(tiny_recipe)), Frozen(str(teacher))
    found = rows(made, "train-0*")
    assert len(found["label"]) == 50
    sources = load_splits(recipe).train
    crop = images.EvalTransform(recipe.eval_resize, recipe.eval_size, recipe.interpolation)

    def seen(stack: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return frozen(images.normalise(stack, recipe, torch.device("cpu")))

    stored = pixels(found["image"])
    assert stored.shape == (50, 3, 32, 32)
    logits = seen(stored)
    assert logits.argmax(1).tolist() == found["label"]
    assert [set(two) for two in logits.topk(2).indices.tolist()] == [
        set(two) for two in zip(found["first"], found["second"], strict=True)
    ]
    assert 0 < min(found["lam"]) < max(found["lam"]) < 1 and len(set(found["lam"])) == 50
    both = []
    for which in ("first", "second"):
        encoded = [sources[row]["image"] for row in found[f"{which}_row"]]
        both.append(torch.stack([crop(images.decode(image["bytes"])) for image in encoded]))
        assert seen(both[-1]).argmax(1).tolist() == found[which]
    low, high = (torch.stack(both).int().amin(0), torch.stack(both).int().amax(0))
    assert ((stored >= low - 1) & (stored <= high + 1)).all()  # a pixel lies between those of its sources
    assert (stored.int() - both[0].int()).abs().float().mean((1, 2, 3)).min() > 1


def test_originals_and_evaluation_images_are_those_of_the_data_byte_for_byte(made: Path, tiny_recipe: Path) -> None:
    splits = load_splits(load_recipe(str(tiny_recipe)))
    for name, table in (("train-originals", splits.train), ("test-00000", splits.eval)):
        found = rows(made, name)
        assert [i["bytes"] for i in found["image"]] == [i["bytes"] for i in table["image"]]
        for column in ("label", "first", "second"):
            assert found[column] == table["label"][:]
        assert found["first_row"] == found["second_row"] == list(range(len(table)))
        assert set(found["lam"]) == {1.0}


def test_images_in_class_folders_are_stored_with_the_names_of_their_files(teacher: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind, name in enumerate(tiny.CLASSES):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(4):
                (tmp_path / "photos" / split / name / f"{name}-{i}.jpg").write_bytes(tiny.jpeg(kind, rng))
    recipe = tiny.make_recipe(tmp_path, tmp_path / "photos")
    premix.premix(str(recipe), tmp_path / "made", str(teacher), 5, steps=2, all_pairs=True, originals=True)
    found = rows(tmp_path / "made", "train-originals")["image"]
    assert sorted(image["path"] for image in found) == sorted(f"{c}-{i}.jpg" for c in tiny.CLASSES for i in range(4))
    for image in found:
        name = image["path"]
        assert (tmp_path / "photos/train" / name.split("-")[0] / name).read_bytes() == image["bytes"]
    assert premix.encoded(None)["bytes"] == b""
    with pytest.raises(UserError, match=r"image .*gone.jpg cannot be read: No such file"):
        premix.encoded({"bytes": None, "path": str(tmp_path / "gone.jpg")})


def test_the_folder_is_in_the_layout_of_the_hub_and_data_of_a_recipe(made: Path, tiny_recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(load_recipe(str(tiny_recipe)), dataset=str(made))
    splits = load_splits(recipe)
    crop = images.EvalTransform(recipe.eval_resize, recipe.eval_size, recipe.interpolation)
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


def test_seeds_and_steps_decide_and_nothing_else(made: Path, tiny_recipe: Path, teacher: Path, tmp_path: Path) -> None:
    for name, seed, steps in (("again", 0, 10), ("seed", 1, 10), ("steps", 0, 3)):
        premix.premix(str(tiny_recipe), tmp_path / name, str(teacher), 50, steps, seed, originals=True)
    expected = files(made)
    assert files(tmp_path / "again") == expected
    for name in ("seed", "steps"):
        assert files(tmp_path / name)["data/train-00000.parquet"] != expected["data/train-00000.parquet"]
        assert files(tmp_path / name)["data/test-00000.parquet"] == expected["data/test-00000.parquet"]


def test_all_pairs_can_be_kept_and_there_are_as_many_as_the_training_split_has(
    tiny_recipe: Path, teacher: Path, tmp_path: Path
) -> None:
    """And lambda follows the recipe's alpha: Beta(50, 50) deviates by 0.05, the default Beta(3, 3) by 0.19."""
    photos, args = Path(load_recipe(str(tiny_recipe)).dataset), "{supermix: {alpha: 50.0, grid: 4, sigma: 1.0}}"
    alpha = str(tiny.make_recipe(tmp_path, photos, mixer_args=args))
    assert premix.premix(str(tiny_recipe), tmp_path / "some", str(teacher), steps=2) == 72
    premix.premix(str(tiny_recipe), tmp_path / "all", str(teacher), 40, steps=1, all_pairs=True)
    premix.premix(alpha, tmp_path / "alpha", str(teacher), 100, steps=1, all_pairs=True)
    some, every, even = (rows(tmp_path / name, "train-*") for name in ("some", "all", "alpha"))
    assert len(some["label"]) == 72
    pairs = set(zip(some["first_row"], some["second_row"], strict=True))
    assert len(pairs) > 65  # the second time through the data has another order
    assert not any(i == j for i, j in zip(every["first"], every["second"], strict=True))
    missed = [k not in (i, j) for i, j, k in zip(every["first"], every["second"], every["label"], strict=True)]
    assert any(missed) and every["first_row"] != some["first_row"][:40]
    assert "All pairs" in (tmp_path / "all/README.md").read_text()
    assert abs(np.mean(even["lam"]) - 0.5) < 0.02 and 0.03 < np.std(even["lam"]) < 0.07


# ------------------------------------------------------------------------------------------------ killed

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


def test_a_command_that_is_killed_leaves_no_folder_and_goes_on_to_the_same_one(
    tiny_recipe: Path, teacher: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(premix, "BATCHES", 2)
    premix.premix(str(tiny_recipe), tmp_path / "whole", str(teacher), 40, steps=3, originals=True)
    expected, out = files(tmp_path / "whole"), tmp_path / "made"
    assert len([name for name in expected if "train-0" in name]) > 2
    args = ["supermix", tiny_recipe, "--teacher", teacher, "--images", 40, "--steps", 3, "--with_originals"]
    with Forks({"HF_HUB_OFFLINE": "1"}, "import mixup_recipes.cli, mixup_recipes.training.premix") as forks:
        for moment, kill in KILLS.items():
            done = forks.run(COMMAND, kill, *args, "--out", out)
            assert done.returncode == -signal.SIGKILL, f"{moment}: {done.output}"
            assert not out.exists() and (tmp_path / "made.unfinished").exists(), moment
        done = forks.run(COMMAND, "mixup_recipes.training.premix:card,1,SIGTERM", *args, "--out", out)
        assert done.returncode == 130 and done.output.endswith(
            "stopped: images that were made are kept; the same command goes on\n"
        )
        done = forks.run(COMMAND, "", *args[:5], 41, *args[6:], "--out", out)
        assert done.returncode == 2
        assert done.output.endswith(
            "made.unfinished was begun with other arguments or data; delete it, or choose another --out\n"
        )
        done = forks.run(COMMAND, "", *args, "--out", out)
        assert done.returncode == 0 and done.output.endswith(f"{out}: 40 mixed images\n"), done.output
        assert files(out) == expected
        done = forks.run(COMMAND, "", *args, "--out", out)  # made already
        assert done.returncode == 0
        assert done.output == f"made before, by the same command\n{out}: 40 mixed images\n"
        damaged = next(out.glob("data/train-00001*"))
        content = damaged.read_bytes()
        for left, words in ((b"", "train-00001.parquet is damaged ("), (None, "made is damaged: it holds ")):
            damaged.unlink() if left is None else damaged.write_bytes(left)
            done = forks.run(COMMAND, "", *args, "--out", out)
            assert done.returncode == 2 and words in done.output and "Traceback" not in done.output
        damaged.write_bytes(content)
        unknown = ["supermix", tiny_recipe, "--dataset", tmp_path / "nothing", "--out", tmp_path / "none"]
        done = forks.run(COMMAND, "", *unknown, "--teacher", "no_such_model")  # before any data is touched
        assert done.returncode == 2 and done.output.count("\n") == 1
        assert not list(tmp_path.glob("*none*"))
        words = "error: no weights for the teacher 'no_such_model' (Unknown model (no_such_model)); "
        assert done.output.startswith(words)
        done = forks.run(COMMAND, "", *args[:5], 41, *args[6:], "--out", out)
        assert done.returncode == 2 and "made was made with other arguments or data; delete it" in done.output
    assert files(out) == expected
    assert [p.name for p in tmp_path.iterdir() if "unfinished" in p.name] == []


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_one_line_that_says_what_to_do(tiny_recipe: Path, teacher: Path, tmp_path: Path, monkeypatch):
    name, out = str(tiny_recipe), tmp_path / "made"
    save_for_hf(create_model("test_resnet", num_classes=7), str(tmp_path / "seven"), safe_serialization=True)
    deit = create_model("deit_tiny_patch16_224", num_classes=4, depth=1)
    save_for_hf(deit, str(tmp_path / "vit"), safe_serialization=True, model_config={"model_args": {"depth": 1}})

    def refused(*args: object, **options: object) -> str:
        with pytest.raises(UserError) as caught:
            premix.premix(*args, **options)
        assert "\n" not in str(caught.value) and not out.exists()
        return str(caught.value)

    assert refused("no_such_setting", out).startswith("unknown recipe 'no_such_setting'")
    assert refused(name, out) == "which teacher? pass --teacher with a run folder, hf-hub:owner/name or timm weights"
    assert refused(name, out, str(teacher), 0) == "images: expected at least 1, got 0"
    assert refused(name, out, str(teacher), steps=0) == "steps must be a whole number, at least 1, got 0"
    assert "knows 7 classes, expected 4: take one that was trained on the same dataset" in refused(
        name, out, str(tmp_path / "seven")
    )
    assert "does not take 2 images of 32 x 32" in refused(name, out, str(tmp_path / "vit"))
    assert refused(name, tmp_path, str(teacher)) == f"{tmp_path} is there already; choose another --out"
    missing = refused(name, out, str(teacher), dataset=str(tmp_path / "nothing"))
    assert "is neither a folder" in missing
    monkeypatch.setattr(premix, "finds_both", lambda logits, pair: torch.zeros(len(pair), dtype=torch.bool))
    assert refused(name, out, str(teacher), steps=1).endswith("take more --steps, a better teacher, or --all_pairs")
    assert not (tmp_path / "made.unfinished").exists()  # other arguments may follow
