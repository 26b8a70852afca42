"""A data set's repository on the Hub: copied by ``datasets``, or read while training, at one commit.

What is not copied must say beforehand how many images it has, and of which classes. Parquet files say it in their
footers, which are read in small pieces where the card says nothing. A repository of image files says it by the list of
its files, and so is a table, whose images are addresses: order, resuming and records are those of the copy. All other
kinds need ``dataset_info`` in the card.
"""

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfFileSystem
from huggingface_hub.constants import HF_HUB_CACHE

from mixup_recipes.data.folder import alone_in_tables
from mixup_recipes.data.holdout import wanted
from mixup_recipes.data.identity import some
from mixup_recipes.data.origin import Opened, commit, note_files, within
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError, nearest

SMALL = 2**30  # bytes of parquet or tars that are read into memory instead of being copied to Arrow files
PICTURES = ("jpg", "jpeg", "png", "webp")
"""What a sample of a tar calls its image, see ``tars``."""
FOOTER = 2**16  # bytes that are asked for at once of a parquet file's end
AT_ONCE = 16  # files whose ends are asked for


def open_hub(recipe: Recipe, split: str, streaming: bool) -> Opened:
    """A Hub dataset; its size is announced before anything large is written. A stream writes nothing."""
    builder = datasets.load_dataset_builder(
        recipe.dataset, name=recipe.dataset_config, revision=recipe.dataset_revision
    )
    files = {str(name): [str(file) for file in found] for name, found in (builder.config.data_files or {}).items()}
    known = builder.info.splits or files
    own = (recipe.train_split, recipe.eval_split)
    whole = wanted(recipe) and split in own and alone_in_tables({str(name) for name in known}, own)
    if whole and streaming:
        raise UserError(
            f"dataset {recipe.dataset!r} has no split {recipe.eval_split!r}, and a part of {own[0]!r} can be held "
            "out of a copy only; leave out --streaming"
        )
    split = recipe.train_split if whole else split
    if known and split not in known:
        raise UserError(f"dataset {recipe.dataset!r} has no split {split!r}; {nearest(split, known)}")
    root = f"hf://datasets/{recipe.dataset}@{builder.hash}"
    ours = False
    if not streaming:
        table, ours = copied(builder, recipe, split)
        note_files(table, [] if ours else files.get(split, []), root)
    elif isinstance(builder, ImageFolder):
        table, ours = image_files(builder, recipe, split, files.get(split, []), root), True
        note_files(table, [], root)
    else:
        table = stream(builder, recipe, split, files.get(split, []))
        note_files(table, files.get(split, []))
    at = commit(table)
    fingerprint = at and hashlib.sha256(f"{at} {recipe.dataset_config} {split}".encode()).hexdigest()
    return Opened(table, fingerprint, [], ours, whole)


def copied(builder: Any, recipe: Recipe, split: str) -> tuple[datasets.Dataset, bool]:
    """The table of a split that ``datasets`` copies to the disk, and whether its images are paths of its own files."""
    info = builder.info
    announce_copy((info.download_size or 0) + (info.dataset_size or 0), recipe.dataset.replace("/", "___"))
    builder.download_and_prepare()
    table = of_samples(builder.as_dataset(split=split), recipe)
    if not isinstance(table.features.get(recipe.image_column), datasets.Image):
        return table, False
    images = table.data.column(recipe.image_column)
    if pc.struct_field(images, "bytes").null_count < len(images):
        return table, False
    # rows of a set of image files, which datasets made: they name files that it downloaded itself. Without a network
    # it does not say that it made them, and where the files are must do.
    paths, text = pc.struct_field(images, "path").to_pylist(), datasets.Value("large_string")
    kept = Path(HF_HUB_CACHE, f"datasets--{recipe.dataset.replace('/', '--')}", "snapshots", builder.hash)
    if not isinstance(builder, ImageFolder) and not all(within(path, str(kept)) for path in paths):
        return table, False
    return table.remove_columns(recipe.image_column).add_column(recipe.image_column, paths, feature=text), True


def of_samples(table: datasets.Dataset, recipe: Recipe) -> datasets.Dataset:
    """A table that ``datasets`` made of tars, with the recipe's columns in place of ``jpg``, ``cls`` or a key of
    ``json``, by the rules of ``tars``; any other as it is."""
    image, label = recipe.image_column, recipe.label_column
    if not {"__key__", "__url__"} <= {*table.column_names}:
        return table
    found = [name for name in PICTURES if name in table.column_names]
    if image not in table.column_names and image == Recipe.image_column and found:
        if len(found) > 1:
            raise UserError(f"dataset {recipe.dataset!r} has images in {some(found)}; choose one by --image_column")
        table = table.rename_column(found[0], image)
    if label not in table.column_names and label == Recipe.label_column and "cls" in table.column_names:
        table = table.rename_column("cls", label)
    feature = table.features.get("json")
    if label not in table.column_names and isinstance(feature, dict) and label in feature:
        values = pc.struct_field(table.data.column("json"), label).to_pylist()
        table = table.add_column(label, values, feature=feature[label])
    if "string" in str(getattr(table.features.get(label), "dtype", "")):
        words = [word and word.strip() for word in table.data.column(label).to_pylist()]
        table = table.remove_columns(label).add_column(label, words, feature=datasets.Value("string"))
    return table


def image_files(builder: Any, recipe: Recipe, split: str, files: list[str], root: str) -> datasets.Dataset:
    """The table of a split of image files, by their addresses; no image is opened.

    Rows, labels and their order are what ``datasets`` makes of the list of files, or of metadata files among them.
    """
    if any(file.lower().endswith(".zip") for file in files):
        raise UserError(
            f"dataset {recipe.dataset!r} has its images in archives, which are not streamed; leave out --streaming"
        )
    builder.config.decode_num_threads = 0  # else datasets opens the images ahead, in threads
    found = builder.as_streaming_dataset(split=split)
    image, label = recipe.image_column, recipe.label_column
    if not {image, label} <= {*found.column_names}:
        return datasets.Dataset.from_dict({name: [] for name in found.column_names})
    if not isinstance(found.features[image], datasets.Image):
        raise UserError(f"dataset {recipe.dataset!r}: column {image!r} does not hold images (set image_column)")
    addresses: list[str | None] = []
    labels: list[Any] = []
    for rows in found.select_columns([image, label]).cast_column(image, datasets.Image(decode=False)).iter(1000):
        addresses += [(row or {}).get("path") for row in rows[image]]
        labels += rows[label]
    if strange := [a for a in addresses if a and not within(a, root)]:
        raise UserError(f"dataset {recipe.dataset!r}: rows name files outside of the repository: {some(strange)}")
    features = datasets.Features({image: datasets.Value("large_string"), label: found.features[label]})
    return datasets.Dataset(pa.table({image: addresses, label: labels}, schema=features.arrow_schema))


def stream(builder: Any, recipe: Recipe, split: str, files: list[str]) -> datasets.IterableDataset:
    """A split that is read in order, with the number of its images."""
    told = (builder.info.splits or {}).get(split)
    images = told.num_examples if told else 0
    if not images and not isinstance(builder, Parquet):
        raise UserError(
            f"dataset {recipe.dataset!r} does not say how many images it has (its card has no dataset_info), and only "
            "parquet and image files tell without being read; leave out --streaming"
        )
    images = images or count_rows(recipe, files, named=builder.info.features is not None)
    table = builder.as_streaming_dataset(split=split)
    if table.features is None:
        raise UserError(f"dataset {recipe.dataset!r} does not say what columns it has; leave out --streaming")
    table.info.splits = datasets.SplitDict({split: datasets.SplitInfo(split, num_examples=images)})
    return table


def count_rows(recipe: Recipe, files: list[str], named: bool) -> int:
    """Rows of parquet files, by their footers. ``named``: the card names the classes, else all files must agree.

    Raises ``UserError`` for files of other classes.
    """
    system = HfFileSystem()

    def footer(file: str) -> pq.FileMetaData:
        with system.open(file, "rb", block_size=FOOTER) as opened:
            return pq.read_metadata(opened)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        footers = list(pool.map(footer, files))
    if not named:
        names = [class_names(found.schema.to_arrow_schema(), recipe.label_column) for found in footers]
        if others := [file for file, found in zip(files, names, strict=True) if found != names[0]]:
            raise UserError(f"{others[0]} has other class names than {Path(files[0]).name}")
    return sum(found.num_rows for found in footers)


def class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """The names of the classes, where a parquet file's schema has them."""
    return getattr(datasets.Features.from_arrow_schema(schema).get(column), "names", None)


def announce_copy(size: int, kept: str) -> None:
    """Say how much disk ``datasets`` is about to fill; refuse when it is not there. ``size`` in bytes.

    ``kept``: the name under which the cache keeps the copy, if it was made before.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if size > SMALL and int(os.environ.get("RANK", "0")) == 0:
        print(f"datasets keeps up to {size / 1e9:.0f} GB in {cache} (once); {free / 1e9:.0f} GB are free there")
    if size > free and not (cache / kept).exists():
        raise UserError(f"{cache}: {size / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free; set HF_HOME to a larger disk")


def one_commit(recipe: Recipe, *tables: Any) -> str | None:
    """The commit of the Hub's repository that all tables were read from; None for data of this machine.

    Raises ``UserError`` when they are of different ones: the repository changed in between.
    """
    found = {commit(table) for table in tables}
    if len(found) > 1:
        raise UserError(
            f"dataset {recipe.dataset!r} changed on the Hub while it was opened ({', '.join(map(str, found))}); start "
            "again, or fix a commit with --dataset_revision"
        )
    return found.pop()
