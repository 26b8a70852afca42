"""Which data a table holds: what tells whether two runs saw the same."""

import hashlib
import re
from typing import Any

import datasets
import numpy as np

from mixup_recipes.recipe import Recipe
from mixup_recipes.typed import UserError


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


def commit(table: datasets.Dataset | datasets.IterableDataset) -> str | None:
    """The commit in the addresses of the files that a table was made from (``open_hub``)."""
    files = "\n".join(table.info.download_checksums or ())
    found = re.match(r"hf://datasets/[^@\n]+@([0-9a-f]{40})/", files)
    return found[1] if found else None


def labels_hash(table: datasets.Dataset | datasets.IterableDataset, column: str) -> str:
    """SHA-256 of the labels in order: tells whether two runs saw the same table.

    Nobody has read a stream's labels: it is that of its files' addresses, which name the commit.
    """
    if isinstance(table, datasets.IterableDataset):
        return hashlib.sha256("\n".join(table.info.download_checksums or ()).encode()).hexdigest()
    labels = np.asarray(table.with_format("numpy")[column], dtype=np.int64)
    return hashlib.sha256(labels.tobytes()).hexdigest()
