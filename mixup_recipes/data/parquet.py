"""Parquet files in a folder, as the Hub lays them out: which of them are a split, and what tells them apart.

- A file ``<split>.parquet`` or ``<split>-00000-of-00001.parquet`` or ``<split>/0000.parquet`` is of that very split:
  ``train-extra`` is none of ``train``.
- A configuration is a folder, or what ``configs`` in the head of ``README.md`` says. Where none is named, the files of
  the folder itself or of ``data/`` are read, or those of the only folder that has some.
- All shards that a file's name promises must be there.
"""

import glob
import hashlib
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mixup_recipes.data.identity import some
from mixup_recipes.typed import UserError, nearest

SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?")
CARD = re.compile(r"---\r?\n(.*?)\r?\n---", re.DOTALL)


class Files(NamedTuple):
    """The files of a split, in order."""

    paths: list[Path]
    notes: list[str]
    """What else is in the folder and was left out."""


def parquet_files(folder: Path, split: str, config: str | None) -> Files | None:
    """The files of a split; None for a folder without parquet files.

    Raises ``UserError`` for a split or configuration that is not there, for a choice that only the user can make, and
    for missing shards.
    """
    found = sorted(
        p for p in folder.rglob("*.parquet") if not any(part.startswith(".") for part in p.parts[len(folder.parts) :])
    )
    if not found:
        return None
    if (told := configurations(folder)) is not None:
        name = only_one(folder, config, list(told), default=next((k for k, v in told.items() if v[1]), None))
        splits = told[name][0]
    else:
        by_place: dict[str, dict[str, list[Path]]] = {}
        for path in found:
            parts = path.relative_to(folder).parts
            stem = SHARD.fullmatch(path.stem)
            place, own = (parts[:-1], stem["split"] if stem else path.stem)
            if not stem and path.stem.isdigit() and place:  # <configuration>/<split>/0000.parquet
                place, own = place[:-1], place[-1]
            by_place.setdefault("/".join(place), {}).setdefault(own, []).append(path)
        plain = next((place for place in ("", "data") if place in by_place), None)
        name = only_one(folder, config, sorted(by_place), default=plain)
        splits = by_place[name]
    if split not in splits:
        raise UserError(f"{folder} has no split {split!r}; {nearest(split, splits)}")
    paths = splits[split]
    check_shards(paths)
    others = sorted(
        p.relative_to(folder).as_posix() for p in {*found} - {p for files in splits.values() for p in files}
    )
    return Files(paths, [f"{len(others):,} left out, parquet files of other places: {some(others)}"] if others else [])


def only_one(folder: Path, config: str | None, names: list[str], default: str | None) -> str:
    """The configuration that is meant. Raises ``UserError`` with the choices."""
    shown = [name for name in names if name]
    if config is not None and config not in names:
        if f"data/{config}" in names:
            return f"data/{config}"
        raise UserError(f"{folder} has no configuration {config!r}; {nearest(config, shown)}")
    chosen = config or default or ("default" if "default" in names else None)
    if chosen is None and len(names) > 1:
        raise UserError(f"{folder} has {len(names)} configurations: {some(shown)}; choose one with --dataset_config")
    return names[0] if chosen is None else chosen


def configurations(folder: Path) -> dict[str, tuple[dict[str, list[Path]], bool]] | None:
    """What the head of ``README.md`` says: configuration -> files by split, and whether it is the default one."""
    try:
        head = CARD.match((folder / "README.md").read_text(encoding="utf-8", errors="replace"))
        told = yaml.safe_load(head[1]) if head else None
    except (OSError, yaml.YAMLError):
        return None
    configs = told.get("configs") if isinstance(told, dict) else None
    if not isinstance(configs, list):
        return None
    found = {}
    for config in configs:
        files = config.get("data_files") if isinstance(config, dict) else None
        if isinstance(files, str):
            files = {"train": files}
        if isinstance(files, list):
            files = {
                row["split"]: row["path"] for row in files if isinstance(row, dict) and {"split", "path"} <= {*row}
            }
        if isinstance(files, dict):
            splits = {str(split): matching(folder, patterns) for split, patterns in files.items()}
            found[str(config.get("config_name", "default"))] = splits, bool(config.get("default"))
    return found or None


def matching(folder: Path, patterns: Any) -> list[Path]:
    """The parquet files of a folder that patterns such as ``data/train-*`` name, each once."""
    patterns = patterns if isinstance(patterns, list) else [patterns]
    inside = (
        Path(p)
        for pattern in patterns
        for p in sorted(glob.glob(f"{glob.escape(str(folder))}/{pattern}", recursive=True))
    )
    return list(
        dict.fromkeys(p for p in inside if p.suffix == ".parquet" and p.resolve().is_relative_to(folder.resolve()))
    )


def check_shards(paths: Iterable[Path]) -> None:
    """Raise ``UserError`` unless all shards are there that the files' names promise, each once."""
    numbers: dict[tuple[Path, str], list[int]] = {}
    for path in paths:
        if stem := SHARD.fullmatch(path.stem):
            numbers.setdefault((path.parent, f"{stem['split']} of {stem['count']}"), []).append(int(stem["number"]))
    if len(numbers) > 1:
        raise UserError(
            f"{next(iter(numbers))[0]}: shards of {len(numbers)} sets: {some([name for _, name in numbers])}"
        )
    for (parent, name), there in numbers.items():
        count = int(name.rpartition(" ")[2])
        if missing := sorted({*range(count)} - {*there}):
            raise UserError(f"{parent}: shards {some([str(n) for n in missing])} of {count} are missing")
        if len(there) > count:
            raise UserError(f"{parent}: {len(there)} files for {count} shards of {name.partition(' ')[0]}")


def fingerprint(paths: list[Path]) -> str:
    """SHA-256 of names, sizes and footers of parquet files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            (length,) = struct.unpack("<I4x", file.read(8))
            file.seek(max(0, size - 8 - length))
            digest.update(f"{path.name}\0{size}\0".encode() + file.read())
    return digest.hexdigest()
