"""From the name of a data set to the rows of one split, before anything of them is checked."""

import contextlib
import difflib
import os
import re
import struct
from pathlib import Path

import datasets
import pyarrow as pa

from mixup_recipes.data import folder as image_folder
from mixup_recipes.data import holdout, parquet, tars
from mixup_recipes.data import table as files_table
from mixup_recipes.data.origin import Opened, note_files
from mixup_recipes.data.prepare import PREPARED, find_prepared
from mixup_recipes.data.repository import SMALL, announce_copy, open_hub
from mixup_recipes.hub_errors import innermost, is_network
from mixup_recipes.hub_errors import reason as hub_reason
from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError

# What the libraries below raise for files of other forms than they expect.
WRONG = (
    ValueError, OSError, RecursionError, NotImplementedError, TypeError, LookupError, AttributeError, struct.error,
    pa.ArrowException,
)  # fmt: skip


def open_split(recipe: Recipe, split: str, streaming: bool = False) -> Opened:
    """One split of a prepared set, a local folder or a Hub dataset, or a stream of the latter."""
    name = recipe.dataset
    folder = Path(name).expanduser()
    if len(name) > 4096 or any(len(part) > 255 for part in folder.parts):  # which the system would not look for
        raise UserError(f"dataset {name[:40]!r}... is too long for the name of a folder")
    if streaming and (name in PREPARED or folder.exists()):
        raise UserError(f"streaming needs a dataset of the Hub, and {name!r} is on this machine; leave out streaming")
    if name in PREPARED:
        if (found := find_prepared(name)) is None:
            meant = f"; the folder of that name is ./{name}" * folder.exists()
            raise UserError(
                f"dataset {name!r} is not prepared on this machine; run: mixup-recipes prepare {name}{meant}"
            )
        folder = found
    elif is_path(name) and not folder.exists():
        beside = []
        with contextlib.suppress(OSError):  # a folder may be one that cannot be listed
            beside = os.listdir(folder.parent)
        places = [str(folder.parent / near) for near in difflib.get_close_matches(folder.name, beside, 1, 0.8)]
        near = [*places, *difflib.get_close_matches(name, PREPARED, 1, 0.8)]
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"dataset {name!r} is neither a folder, a Hub id (owner/name), nor one of {sorted(PREPARED)}{meant}"
        )
    try:
        return open_folder(recipe, folder, split) if folder.exists() else open_hub(recipe, split, streaming)
    except Exception as e:
        known = isinstance(e, (*WRONG, datasets.exceptions.DatasetsError))
        if isinstance(e, UserError) or not (known or is_network(innermost(e))):  # of the HTTP library's own kinds
            raise
        reason = " ".join(str(e).split()) if known else hub_reason(e)
        if "gated" in reason.lower():
            reason = (
                f"access is gated: accept the terms on its page on the Hub, then `hf auth login` or set HF_TOKEN "
                f"({reason[:160]})"
            )
        if "reach" in reason or "offline" in reason.lower():
            reason += "; check the network and `hf auth login` (ImageNet is gated), or pass --dataset FOLDER"
        if not folder.exists() and "Couldn't reach" in reason:
            reason = f"there is no folder {name} here; {reason}"
        raise UserError(f"cannot open dataset {name!r}, split {split!r}: {reason[:400]}") from None


def open_folder(recipe: Recipe, folder: Path, split: str) -> Opened:
    """A folder of parquet files in the Hub's layout, of tars or images by classes, or a table of paths and labels."""
    if recipe.dataset_revision is not None:
        raise UserError(
            f"dataset_revision is a commit of the Hub, and {folder} is on this machine; leave out dataset_revision"
        )
    own = (recipe.train_split, recipe.eval_split)
    held_out = holdout.wanted(recipe)
    if not folder.is_dir():
        if folder.suffix.lower() not in files_table.SUFFIXES:
            words = ", ".join(files_table.SUFFIXES)
            raise UserError(f"dataset {str(folder)!r} is a file; expected a folder, or a table of paths ({words})")
        (table, fingerprint, notes), whole = files_table.listing(folder, split, recipe)
        return Opened(table, fingerprint, notes, ours=True, whole=whole and held_out)
    try:
        directory = image_folder.split_folder(folder, split, own)
    except UserError as e:
        directory, why = None, e
    files = None
    if directory is None or not image_folder.has_images(directory):
        files = parquet.parquet_files(folder, split, recipe.dataset_config, own, held_out)
        if (opened := tars.open_tars(recipe, folder, split, files is not None)) is not None:
            return opened
    if files is None:
        all_of_it = image_folder.undivided(folder, own) if recipe.holdout else None
        directory = all_of_it or directory
        if directory is None:
            tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in files_table.SUFFIXES)
            raise (UserError(f"{why}; pass a table of paths by its own name: --dataset {tables[0]}") if tables else why)
        if recipe.dataset_config is not None:
            raise UserError(f"{folder} is a folder of images, which has no configurations; leave out dataset_config")
        table, fingerprint, notes = image_folder.listing(directory)
        if all_of_it is None:
            notes += image_folder.beside(folder, own) + [f"read from {directory}"] * (directory.name != split)
        return Opened(table, fingerprint, notes, ours=True, whole=all_of_it is not None and held_out)
    parquet.check_schemas(files.paths)
    size = sum(path.stat().st_size for path in files.paths)
    if size <= SMALL:  # reading it is quicker than the Arrow copy that load_dataset would write
        table = datasets.concatenate_datasets([datasets.Dataset(parquet.read_table(path)) for path in files.paths])
    else:
        announce_copy(size, "parquet")
        # load_dataset takes a path for a pattern
        names = [re.sub(r"([\[\]*?])", r"[\1]", str(path.absolute())) for path in files.paths]
        table = datasets.load_dataset("parquet", data_files={split: names}, split=split)
    note_files(table, [str(path.absolute()) for path in files.paths], str(folder.absolute()))
    return Opened(table, parquet.fingerprint(files.paths), files.notes, whole=files.whole)


def is_path(dataset: str) -> bool:
    """Whether the name of a dataset can be none of the Hub."""
    return dataset.startswith((".", "/", "~")) or dataset.endswith("/") or dataset.count("/") != 1


def same_place(one: str, other: str) -> bool:
    """Whether two names of a data set lead to the same folder or file, or are the same name."""
    here, there = (os.path.realpath(os.path.expanduser(name)) for name in (one, other))
    return here == there


def is_local(recipe: Recipe) -> bool:
    """Whether opening the recipe's dataset asks no Hub: it is a path, there or not, or a prepared set that is there."""
    name = recipe.dataset
    if name in PREPARED:
        return find_prepared(name) is not None
    return is_path(name) or os.path.exists(os.path.expanduser(name))


def is_large(recipe: Recipe) -> bool:
    """Whether a local dataset has shards of which opening it may make a copy, which takes its time."""
    prepared = find_prepared(recipe.dataset) if recipe.dataset in PREPARED else None
    folder = prepared or Path(recipe.dataset).expanduser()
    if not is_local(recipe) or not folder.is_dir():
        return False
    shards = (p for depth in ("*", "*/*", "*/*/*") for end in ("parquet", "tar") for p in folder.glob(f"{depth}.{end}"))
    return sum(path.stat().st_size for path in shards if path.is_file()) > SMALL  # a link may lead nowhere


def is_here(recipe: Recipe) -> bool:
    """Whether opening the recipe's dataset downloads nothing: it is a folder, is prepared, or was copied before."""
    name = recipe.dataset
    try:
        if name in PREPARED or is_path(name) or Path(name).expanduser().exists():
            return True  # if it is not there, ``open_split`` says so
        builder = datasets.load_dataset_builder(name, name=recipe.dataset_config, revision=recipe.dataset_revision)
    except (*WRONG, datasets.exceptions.DatasetsError):
        return False
    return os.path.isdir(builder.cache_dir)
