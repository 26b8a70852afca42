"""SuperMix before training: mixed images in which a teacher finds both classes, stored once, for students to train on.

The images are made by the search of ``mixers.supermix``, towards the classes that the teacher sees in the two sources,
and judged as they are stored, after rounding to PNG. All follows from recipe, teacher, seed and pair, file by file, so
that a command that was killed goes on behind its last whole file. The folder appears whole or not at all.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from mixers import SuperMix, ops, taps
from mixers.supermix import finds_both, masks, trained
from mixup_recipes import files
from mixup_recipes.data import images, keys
from mixup_recipes.data.decoding import BadImage
from mixup_recipes.data.loading import Samples
from mixup_recipes.data.order import Key
from mixup_recipes.data.origin import Origin, encoded, origin
from mixup_recipes.data.pictures import to_uint8
from mixup_recipes.data.splits import load_splits
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import resolve
from mixup_recipes.training import backbones
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

BATCHES = 16  # to a file: at most so much is lost when the command is killed
ROWS = 1000  # originals that are copied at a time
SETTINGS = "supermix.json"

CARD = """\
---
task_categories: [image-classification]
configs:
- config_name: default
  data_files:
  - {{split: {train}, path: data/{train}-*}}
  - {{split: {eval}, path: data/{eval}-*}}
---

# Images mixed by SuperMix

{count:,} images of {size} x {size} pixels in the split `{train}`, as PNG, each mixed from two images of `{dataset}`.
They were written by `mixup-recipes supermix` with the teacher `{teacher}`, at most {steps} steps and seed {seed}.
{kept}{originals}

| column | |
|---|---|
| `{label}` | the class that the teacher sees first in the image |
| `first`, `second` | the classes that it sees in the two sources; the search was for both of them in the image |
| `lam` | the share of `first` that was searched for; that of `second` is 1 - `lam` |
| `first_row`, `second_row` | the sources: rows of the original split |

An original image, in `{train}` or in `{eval}`, has its own class in all three columns, `lam` 1, and its own row.
SuperMix: Supervising the Mixing Data Augmentation. Dabouei et al. CVPR 2021. https://arxiv.org/abs/2003.05034
"""


def premix(
    name: str,
    out: Path,
    teacher: str | None = None,
    count: int | None = None,
    steps: int = 50,
    seed: int = 0,
    all_pairs: bool = False,
    originals: bool = False,
    dataset: str | None = None,
) -> int:
    """Write ``count`` mixed images of a recipe's training split, by default as many as it has, into a new folder.

    ``name``: a recipe, whose data, evaluation crop, normalisation and arguments of ``supermix`` are taken. ``teacher``,
    ``steps``: of the search. ``all_pairs``: keep also images in which the teacher does not find both classes.
    ``originals``: the training split's own images beside them. ``dataset``: the recipe's data on this machine. The
    split that is evaluated on is copied. Returns the number of mixed images. Raises ``UserError``.
    """
    if count is not None and count < 1:
        raise UserError(f"images: expected at least 1, got {count}")
    given: dict[str, Any] = {"mixer": "supermix", "seed": seed}
    if dataset:  # the same data in another place: the classes are to be those of the recipe
        given |= {"dataset": dataset, "num_classes": resolve(name)[0].num_classes}
    own = {"steps": steps} | ({"teacher": teacher} if teacher else {})
    recipe, _ = resolve(name, given | {"mixer_args": own})
    if recipe.streaming:
        raise UserError("the sources are drawn from the whole table, so this cannot be combined with streaming")
    if recipe.train_split == recipe.eval_split:
        raise UserError(
            f"train_split and eval_split are both {recipe.eval_split!r}, so the model would be evaluated on mixed "
            "images"
        )
    if out.exists() and not (out / SETTINGS).is_file():
        raise UserError(f"{out} is there already; choose another --out")
    frozen = load_teacher(recipe)  # before any data is touched
    splits = load_splits(recipe)
    backbones.check_classes(frozen.model, splits.classes, frozen.source)
    crop = images.EvalTransform.of(recipe)
    maker = Maker(recipe, frozen, Samples(splits.train, recipe, crop), all_pairs)
    count = count or len(splits.train)
    settings = {
        "recipe": dataclasses.asdict(recipe),
        "images": count,
        "all_pairs": all_pairs,
        "with_originals": originals,
        "teacher_sha256": frozen.fingerprint(),
        "data": splits.identity,
    }
    # of the settings the folder keeps a hash: they hold paths of this machine, and the folder is made to be published
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    text = json.dumps({"settings_sha256": found}) + "\n"
    if out.exists():
        if (out / SETTINGS).read_bytes() != text.encode():
            raise UserError(f"{out} was made with other arguments or data; delete it, or choose another --out")
        if (there := sum(map(rows_in, (out / "data").glob(f"{recipe.train_split}-0*.parquet")))) != count:
            raise UserError(f"{out} is damaged: it holds {there:,} of {many(count, 'mixed image')}; delete it")
        print(f"{out} was made before by the same command", file=sys.stderr)
        return count
    work = out.with_name(f"{out.name}.unfinished")
    with working(work, text):
        schema = features(recipe, splits.classes).arrow_schema
        mixed(maker, count, work, schema)
        if originals:
            copy(splits.train, recipe, work / f"data/{recipe.train_split}-originals.parquet", schema)
        copy(splits.eval, recipe, work / f"data/{recipe.eval_split}-00000.parquet", schema)
        files.write(work / "README.md", card(recipe, count, all_pairs, originals))
        with files.writing(out):
            work.rename(out)
    return count


class Made(NamedTuple):
    """One row of the folder that is not there yet."""

    pixels: Tensor
    label: int
    first: int
    second: int
    lam: float
    first_row: int
    second_row: int


def load_teacher(recipe: Recipe) -> taps.Frozen:
    """The network that is asked. Raises ``UserError`` when there is none that fits."""
    name = recipe.mixer_args[recipe.mixer]["teacher"]
    if name is None:
        raise UserError("no teacher was given; pass --teacher with a run folder, hf-hub:owner/name or timm weights")
    try:
        teacher = trained(name, recipe.num_classes)
    except ValueError as e:
        raise UserError(str(e)) from None
    backbones.check_input(teacher.model, 2, recipe.eval_size, name, training=False)
    return teacher


class Maker:
    """Makes the mixed images of a recipe."""

    def __init__(self, recipe: Recipe, teacher: taps.Frozen, samples: Samples, all_pairs: bool):
        self.recipe, self.samples, self.all_pairs = recipe, samples, all_pairs
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = found or torch.device("cpu")
        self.teacher = teacher.to(self.device)
        self.mixer = SuperMix(**recipe.mixer_args[recipe.mixer])

    def batches(self) -> Iterator[list[Key]]:
        """Rows of the table in batches, in a new order each time that it has been gone through. Without an end."""
        size, step = len(self.samples), self.recipe.per_device_train_batch_size
        for turn in itertools.count():
            order = keys.rng(keys.ORDER, self.recipe.seed, turn).permutation(size)
            for first in range(0, size, step):
                yield [Key(0, int(i), 0) for i in order[first : first + step]]

    @torch.no_grad()
    def make(self, pixels: Tensor, rows: Tensor, number: int) -> list[Made]:
        """What is kept of the pairs of neighbours in batch ``number``: uint8 (B, 3, S, S), rows (B,) of the table."""
        x = images.normalise(pixels, self.recipe, self.device)
        own = self.teacher(x).argmax(1)
        index = torch.arange(len(x), device=x.device).roll(-1)
        pair = torch.stack([own, own[index]], 1)
        same = pair[:, 0] == pair[:, 1]
        alpha = self.mixer.alpha
        lam = ops.send(np.random.default_rng((self.recipe.seed, number)).beta(alpha, alpha, len(x)), x)
        y = torch.nn.functional.one_hot(own, self.recipe.num_classes).to(x.dtype)
        for found, done in self.mixer.searching(self.teacher.model, x, y, index, lam, same):
            logits = found
            if done.all():
                break
        stored = to_uint8(ops.blend(x, index, masks(logits, x)), self.recipe)
        seen = self.teacher(images.normalise(stored, self.recipe, self.device))
        kept = ~same & (finds_both(seen, pair) | self.all_pairs)
        columns = [seen.argmax(1), *pair.T, lam, rows, rows[index.cpu()]]
        made = zip(stored, *(column.tolist() for column in columns), strict=True)
        return [Made(*row) for row, keep in zip(made, kept.tolist(), strict=True) if keep]


def mixed(maker: Maker, count: int, work: Path, schema: pa.Schema) -> None:
    """Write the mixed images, a file after the other; files that are there stay."""
    workers = 0 if maker.device.type == "cpu" else min(8, os.cpu_count() or 1)
    left, total, tried = maker.batches(), 0, 0
    for number in itertools.count():
        part = list(itertools.islice(left, BATCHES))
        path = work / f"data/{maker.recipe.train_split}-{number:05d}.parquet"
        if not path.exists():
            made: list[Made] = []
            size = maker.recipe.per_device_train_batch_size
            loaded = maker.samples.batches(part, size, workers, maker.device)
            for i, (pixels, _, rows, _) in enumerate(loaded):
                made += maker.make(pixels, rows, number * BATCHES + i)
                if total + len(made) >= count:
                    break
            table = rows_of(made[: count - total], maker.recipe, f"mixed-{number:05d}")
            write_table(path, pa.table(table, schema=schema))
        total += rows_in(path)
        tried += sum(map(len, part))
        print(f"supermix: {total:,} of {many(count, 'image')}", file=sys.stderr, flush=True)
        if total == count:
            return
        if not total and tried >= len(maker.samples):
            shutil.rmtree(work)
            raise UserError(
                f"the teacher {maker.teacher.source!r} finds both classes in none of {tried:,} mixed images: take more "
                "--steps, a better teacher, or --all_pairs"
            )


def rows_in(path: Path) -> int:
    """The number of rows in a file. Raises ``UserError``."""
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowInvalid) as e:
        raise UserError(f"{path} is damaged ({' '.join(str(e).split())[:80]}); delete it") from None


def rows_of(made: list[Made], recipe: Recipe, name: str) -> dict[str, list[Any]]:
    """Columns of the table."""
    pictures = []
    for i, row in enumerate(made):
        buffer = io.BytesIO()
        Image.fromarray(row.pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG", compress_level=1)
        pictures.append({"bytes": buffer.getvalue(), "path": f"{name}-{i:05d}.png"})
    return {
        recipe.image_column: pictures,
        recipe.label_column: [row.label for row in made],
        **{key: [getattr(row, key) for row in made] for key in ("first", "second", "lam", "first_row", "second_row")},
    }


def features(recipe: Recipe, classes: list[str]) -> datasets.Features:
    """What the columns hold."""
    label, row = datasets.ClassLabel(names=classes), datasets.Value("int64")
    return datasets.Features(
        {
            recipe.image_column: datasets.Image(),
            recipe.label_column: label,
            "first": label,
            "second": label,
            "lam": datasets.Value("float32"),
            "first_row": row,
            "second_row": row,
        }
    )


def copy(table: Any, recipe: Recipe, path: Path, schema: pa.Schema) -> None:
    """Write a split's own images, unless they are there."""
    if path.exists():
        return
    aside, at = path.with_name(f".{path.name}.tmp"), origin(table)
    with files.writing(path), pq.ParquetWriter(aside, schema) as writer:
        for first in range(0, len(table), ROWS):
            rows = range(first, min(first + ROWS, len(table)))
            part = table[rows]
            pictures = [stored(image, at) for image in part[recipe.image_column]]
            labels, numbers = part[recipe.label_column], list(rows)
            columns = {recipe.image_column: pictures, recipe.label_column: labels, "first": labels, "second": labels}
            columns |= {"lam": [1.0] * len(rows), "first_row": numbers, "second_row": numbers}
            writer.write_table(pa.table(columns, schema=schema))
    with files.writing(path):
        aside.rename(path)


def stored(image: str | dict[str, Any] | None, at: Origin | None = None) -> dict[str, Any]:
    """An image of a table with its bytes, also of one that only says where they are; none where the table has a gap."""
    path = image if isinstance(image, str) else (image or {}).get("path")
    try:
        return {"bytes": encoded(image, at), "path": path and Path(path).name}
    except BadImage as e:
        if isinstance(image, str):
            raise UserError(f"image {path} cannot be read: {e}") from None
        return {"bytes": b"", "path": path and Path(path).name}


def write_table(path: Path, table: pa.Table) -> None:
    """A parquet file, whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=ROWS)
    files.write(path, buffer.getvalue())


@contextlib.contextmanager
def working(work: Path, settings: str) -> Iterator[None]:
    """Hold the folder that is worked in, new or as a command with the same settings left it."""
    saved = work / SETTINGS
    beside = work.with_name(f".{work.name}.lock")
    with files.writing(work):
        (work / "data").mkdir(parents=True, exist_ok=True)
        lock = beside.open("a")
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another command is writing to {work}; wait, or choose another --out") from None
        try:
            if saved.exists() and saved.read_bytes() != settings.encode():
                raise UserError(f"{work} was started with other arguments or data; delete it, or choose another --out")
            for leftover in work.glob("data/.*.tmp"):
                leftover.unlink()
            files.write(saved, settings)
            yield
        finally:
            beside.unlink(missing_ok=True)


def card(recipe: Recipe, count: int, all_pairs: bool, originals: bool) -> str:
    """The README of the folder: its own names for what is on this machine only."""
    teacher = recipe.mixer_args[recipe.mixer]["teacher"]
    return CARD.format(
        train=recipe.train_split,
        eval=recipe.eval_split,
        dataset=Path(recipe.dataset).name if Path(recipe.dataset).exists() else recipe.dataset,
        label=recipe.label_column,
        size=recipe.eval_size,
        teacher=Path(teacher).name if Path(teacher).exists() else teacher,
        steps=recipe.mixer_args[recipe.mixer]["steps"],
        seed=recipe.seed,
        count=count,
        kept="All pairs of two classes are kept." if all_pairs else "In each the teacher finds both classes first.",
        originals=f" The images of `{recipe.train_split}` itself are there too." if originals else "",
    )
