"""Packages that register mixers, as an installation leaves them behind, written by hand."""

import importlib
import sys
from pathlib import Path

import pytest

from mixers import registry

MIXER = '''"""Mine: a blend of others. Nobody 2026.

Formula: ``x' = x``.

Sampling law: ``mine@nobody-2026``: none.
"""

from mixers import Mixer, ops


class Mine(Mixer):
    """Half of each image is the next one."""

    def __init__(self, share: float = 0.5, *, sides: tuple = (1, 2)):
        super().__init__()
        self.share, self.sides = share, sides

    def plan(self, x, y, rng, *look):
        lam = ops.per_sample(self.share * rng.random(), x)  # scalars first
        return {"index": ops.partners(x, rng), "mask": lam.view(-1, 1, 1, 1)}
'''


class Site:
    """A folder of installed packages on the path of this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        folder.mkdir()
        monkeypatch.syspath_prepend(folder)

    def module(self, name: str, text: str) -> None:
        """Write a module, ``package.module`` too."""
        path = self.folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent != self.folder:
            (path.parent / "__init__.py").touch()
        path.write_text(text)
        self.again()

    def package(self, name: str, version: str = "1.0", **mixers: str) -> Path:
        """Register mixers, ``mine="module:Class"``, for a package; returns its folder of metadata."""
        folder = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        entries = "".join(f"{mixer} = {address}\n" for mixer, address in mixers.items())
        (folder / "entry_points.txt").write_text(f"[mixup_recipes.mixers]\n{entries}")
        self.again()
        return folder

    def mine(self, version: str = "1.0") -> Path:
        """A package whose mixer works."""
        self.module("its.mine", MIXER)
        return self.package("its-mixers", version, mine="its.mine:Mine")

    def again(self) -> None:
        """Forget what was looked up and imported."""
        registry.installed.cache_clear()
        registry.tell.cache_clear()
        importlib.invalidate_caches()
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "")).startswith(str(self.folder)):
                del sys.modules[name]
