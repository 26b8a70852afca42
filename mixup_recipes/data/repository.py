"""A data set's repository on the Hub: copied by ``datasets``, or read while training, at one commit.

A repository of image files, also in zips, says by the list of its files how many images it has, and of which classes.
So it is a table, whose images are addresses: order, resuming and records are those of the copy. How all other kinds are
read in order, see ``streams``.
"""

import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import HfFileSystem
from huggingface_hub.constants import HF_HUB_CACHE

from mixup_recipes.data import zips
from mixup_recipes.data.folder import alone
from mixup_recipes.data.holdout import wanted
from mixup_recipes.data.identity import some
from mixup_recipes.data.origin import Opened, commit, note_files, within
from mixup_recipes.data.samples import mended, of_samples
from mixup_recipes.data.streams import FOOTER, stream
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError, nearest

SMALL = 2**30  # bytes of parquet or tars that are read into memory instead of being copied to Arrow files
MEMBER = re.compile(r"zip://(?P<name>.*?)::(?P<zip>(hf:/)?/.*)", re.DOTALL)
"""What ``datasets`` calls a file in a zip."""


def open_hub(recipe: Recipe, split: str, streaming: bool) -> Opened:
    """A Hub dataset; its size is announced before anything large is written. A stream writes nothing."""
    builder = mended(
        datasets.load_dataset_builder(recipe.dataset, name=recipe.dataset_config, revision=recipe.dataset_revision)
    )
    files = {str(name): [str(file) for file in found] for name, found in (builder.config.data_files or {}).items()}
    known = builder.info.splits or files
    own = (recipe.train_split, recipe.eval_split)
    whole = wanted(recipe) and split in own and alone({str(name) for name in known}, own)
    if whole and streaming:
        raise UserError(
            f"dataset {recipe.dataset!r} has no split {recipe.eval_split!r}, and only a copy of the data can have a "
            f"part of {own[0]!r} held out; leave out --streaming"
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
        table, ours = image_files(builder, recipe, split, root), True
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
    archives = [MEMBER.fullmatch(path or "") for path in paths]
    places = [archive["zip"] if archive else path for archive, path in zip(archives, paths, strict=True)]
    if not isinstance(builder, ImageFolder) and not all(within(place, str(kept)) for place in places):
        return table, False
    paths = in_zips(paths, str(kept))
    return table.remove_columns(recipe.image_column).add_column(recipe.image_column, paths, feature=text), True


def image_files(builder: Any, recipe: Recipe, split: str, root: str) -> datasets.Dataset:
    """The table of a split of image files, by their addresses; no image is opened.

    Rows, labels and their order are what ``datasets`` makes of the list of files, or of metadata files among them.
    """
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
    moved = in_zips(addresses, root)
    if strange := [a for a, b in zip(addresses, moved, strict=True) if a and a == b and not within(a, root)]:
        raise UserError(f"dataset {recipe.dataset!r}: rows name files outside of the repository: {some(strange)}")
    features = datasets.Features({image: datasets.Value("large_string"), label: found.features[label]})
    return datasets.Dataset(pa.table({image: moved, label: labels}, schema=features.arrow_schema))


def in_zips(addresses: Sequence[str | None], root: str) -> list[str | None]:
    """The addresses, where files in zips below ``root`` are called as in ``zips``.

    Raises ``UserError`` for a damaged zip, and for an address in a zip that is none of such a file: its name may be
    made to look like the place of another one.
    """
    parts = [MEMBER.fullmatch(address or "") for address in addresses]
    known: dict[str, dict[str, str]] = {}
    for archive in dict.fromkeys(part["zip"] for part in parts if part and within(part["zip"], root)):
        try:
            hub = HfFileSystem().open(archive, "rb", block_size=FOOTER) if archive.startswith("hf://") else None
            with hub or open(archive, "rb") as file:
                known[archive] = zips.addresses(archive, file)
        except zipfile.BadZipFile as e:
            raise UserError(f"{archive} is not a whole zip: {e}") from None
    moved = [
        known.get(part["zip"], {}).get(part["name"], address) if part else address
        for address, part in zip(addresses, parts, strict=True)
    ]
    if strange := [a for a, b in zip(addresses, moved, strict=True) if a == b and a and a.startswith("zip:")]:
        raise UserError(f"rows name files that are in no zip of {root}: {some(strange)}")
    return moved


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
