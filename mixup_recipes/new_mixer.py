"""A package for a mixer of one's own: the contract filled in, a test, a page, and the entry point that registers it."""

import contextlib
import importlib.util
import keyword
import os
import shutil
from datetime import date
from pathlib import Path
from string import Template

import yaml

from mixers import BLOCKS, MIXERS, REGRESSION
from mixers.packages import GROUP, NAME
from mixers.registry import package_of
from mixup_recipes import __version__
from mixup_recipes.files import writing
from mixup_recipes.names import BY_MEANING, letters
from mixup_recipes.resolve import settings
from mixup_recipes.typed import UserError

LONGEST = 40  # letters of a name, which becomes a part of names of files

PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "mixup-$name"
version = "0.1.0" # a run notes it: raise it when the mixer changes
description = "The mixer $name for Mixup Recipes"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["mixup-recipes>=$version"]

[project.optional-dependencies]
test = ["pytest"]

[project.entry-points."$group"]
$name = "mixup_$name.$name:$Name"

[tool.hatch.build]
dev-mode-dirs = ["."]

[tool.hatch.build.targets.wheel]
packages = ["mixup_$name"]

[tool.pytest.ini_options]
testpaths = ["tests"]
"""

README = """\
# $Name

A mixer for Mixup Recipes, which knows it as `$name`. `mixup_$name/$name.py` says what it does.

```bash
pip install -e '.[test]'                          # registers it
pytest                                            # formula and contract
mixup-recipes check $name                         # what it looks like from outside
mixup-recipes preview --mixers $name --out $name.png
mixup-recipes train --recipe quickstart_$name     # any <setting>_$name is a recipe now
mixup-recipes sweep --recipes quickstart_vanilla quickstart_$name --seeds 0 1 2
```

In a loop of your own:

```python
from mixers import build

mixer = build("$name", alpha=0.5)
plan = mixer.plan(x, y, rng)  # all randomness is here
mixed, target = mixer.mix(x, y, **plan)
```

A run notes the version of this package in its `env.json`, and its card names it. Raise `version` in `pyproject.toml`
when the mixer does something else. Raise the number behind the sampling law (`$name@unpublished-$year.2`) when it draws
in another way: a run that was started with the old law cannot be continued with the new one.
"""

MIXER = '''\
"""$Name: a blend of two images by one lambda. Unpublished $year.

Formula: ``lam ~ Beta(alpha, alpha)``, ``x' = lam*x + (1-lam)*x[index]``, ``y' = lam*y + (1-lam)*y[index]``.

Published defaults: none; alpha = 1 here, a uniform lambda.

Sampling law: ``$name@unpublished-$year``: one lambda for the whole batch; the partner is a uniformly random permutation
of the batch, fixed points allowed.

Cost: one pass over the images of a batch; no forward or backward pass more than without mixing.

Deviations: none: there is no paper and no other code yet.

Kind: input.
"""

# These paragraphs are what cards and `mixup-recipes methods show $name` say. The first line of a published method is
# "Title. Author, Author. Venue year.", and below it stand the addresses of the paper and of its code. Kind is one or
# more of input, feature, learned, label, as in "feature, label", and "; teacher" behind it for a method with a teacher.

import numpy as np
from jaxtyping import Float
from mixers import Mixer, Plan, ops
from torch import Tensor


class $Name(Mixer):
    """Blend each image with a partner by one lambda per batch. ``alpha`` > 0 is the Beta parameter."""

    def __init__(self, alpha: float = 1.0):  # defaults are literals: they are read without running this file
        super().__init__()
        ops.check_positive("alpha", alpha)
        self.alpha = alpha  # each argument under its own name, and nothing else: setup(model) makes the rest

    def plan(
        self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: object
    ) -> Plan:
        """All that is decided: ``index`` (B,) and a constant ``mask`` (B, 1, 1, 1), the arguments of ``mix``.

        The inherited ``mix`` blends images by the mask, and labels by its mean or by ``lam`` (B,) where you return one.
        A method that mixes in another way has a ``mix`` of its own; one that sees more than images and labels overrides
        ``forward``, ``setup`` or ``after_step`` too.
        """
        lam = ops.beta(self.alpha, self.alpha, rng)
        return {"index": ops.partners(x, rng), "mask": ops.per_sample(lam, x).view(-1, 1, 1, 1)}
'''

TEST = '''\
"""$Name is the formula of its file, keeps the contract of all mixers, and is known by its name."""

import numpy as np
import pytest
import torch
from mixers import MIXERS, build
from mixers.testing import check_mixer

from mixup_$name.$name import $Name


def reference(x: np.ndarray, y: np.ndarray, alpha: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The formula in loops, slow and obvious. Images (B, C, H, W), targets (B, K)."""
    lam = rng.beta(alpha, alpha)
    index = rng.permutation(len(x))
    images, targets = np.zeros_like(x), np.zeros_like(y)
    for i, j in enumerate(index):
        for place in np.ndindex(*x.shape[1:]):
            images[i][place] = lam * x[i][place] + (1 - lam) * x[j][place]
        for k in range(y.shape[1]):
            targets[i, k] = lam * y[i, k] + (1 - lam) * y[j, k]
    return images, targets


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_it_is_its_formula(alpha: float) -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(5, 3, 4, 6)).astype(np.float32), np.eye(5, dtype=np.float32)
    mixer = build("$name", alpha=alpha)
    for step in range(5):
        plan = mixer.plan(torch.from_numpy(x), torch.from_numpy(y), np.random.default_rng((0, step)))
        found = mixer.mix(torch.from_numpy(x), torch.from_numpy(y), **plan)
        expected = reference(x, y, alpha, np.random.default_rng((0, step)))
        for mixed, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(mixed.numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_it_keeps_the_contract(alpha: float) -> None:
    check_mixer(lambda: $Name(alpha))


def test_it_is_registered_and_refuses_what_is_no_alpha() -> None:
    assert MIXERS["$name"] is $Name and build("$name").law == "$name@unpublished-$year"
    with pytest.raises(ValueError, match="alpha must be a number above 0"):
        build("$name", alpha=0.0)
'''

INIT = '"""$Name, a mixer for Mixup Recipes, which finds it by the entry point in ``pyproject.toml``."""\n'

FILES = {
    "pyproject.toml": PYPROJECT,
    "README.md": README,
    "mixup_$name/__init__.py": INIT,
    "mixup_$name/$name.py": MIXER,
    "tests/test_$name.py": TEST,
}


def new_mixer(name: str, out: Path | None = None) -> list[Path]:
    """Write the package of a mixer into ``out``, by default a new folder of its name; returns the files.

    The folder may be there, as long as nothing in it would be replaced. Raises ``UserError`` for a name that no mixer
    can have, and for a folder that has such files; then nothing is written.
    """
    check_name(name)
    folder = Path(name) if out is None else out
    words = {"name": name, "Name": name.capitalize(), "group": GROUP, "version": __version__}
    words |= {"year": str(date.today().year)}
    texts = {Template(path).substitute(words): Template(text).substitute(words) for path, text in FILES.items()}
    parts = sorted({Path(path).parts[0] for path in texts})
    for taken in (folder / part for part in parts) if folder.is_dir() else [folder]:
        if os.path.lexists(taken):
            raise UserError(f"{taken} is there already, and nothing was written; name another folder with --out")
    new = not folder.exists()
    aside = folder.absolute() / f".new-{name}.{os.getpid()}.tmp"
    moved: list[Path] = []
    with writing(folder):
        try:
            for path, text in texts.items():
                (aside / path).parent.mkdir(parents=True, exist_ok=True)
                (aside / path).write_text(text, encoding="utf-8")
            for part in parts:
                os.rename(aside / part, folder / part)
                moved.append(folder / part)
            aside.rmdir()
        except BaseException:  # a Ctrl-C too
            for done in moved:
                shutil.rmtree(done) if done.is_dir() else done.unlink()
            shutil.rmtree(aside, ignore_errors=True)
            if new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
    return [folder / path for path in texts]


def check_name(name: str) -> None:
    """Raise ``UserError`` for what cannot be the name of a new mixer."""
    if not NAME.fullmatch(name) or len(name) > LONGEST or keyword.iskeyword(name) or keyword.iskeyword(name.title()):
        meant = letters(name)[:LONGEST].lstrip("0123456789")
        advice = f"; did you mean {meant!r}?" if meant and meant != name and not keyword.iskeyword(meant) else ""
        raise UserError(
            f"a mixer's name: expected at most {LONGEST} lower-case letters and digits that begin with a letter and "
            f"are not a word of Python, got {name!r}{advice}"
        )
    if not isinstance(yaml.safe_load(name), str):
        raise UserError(f"YAML does not read {name!r} as text, and recipes name their mixer in YAML; take another name")
    if name in BY_MEANING:
        raise UserError(f"{name!r} means {BY_MEANING[name]!r} in a recipe's name; take another name")
    if any(name in table.rows for table in (MIXERS, REGRESSION, BLOCKS)):
        raise UserError(f"Mixup Recipes has a mixer {name!r}; give yours another name")
    if package := package_of(name):
        raise UserError(f"the package {package} has a mixer {name!r}; give yours another name, or uninstall it")
    if setting := next(
        (s for s in settings() if s.endswith(f"_{name}") and s.removesuffix(f"_{name}") in settings()), ""
    ):
        raise UserError(f"{setting!r} is a setting, so {name!r} cannot be a mixer; take another name")
    if importlib.util.find_spec(f"mixup_{name}"):
        raise UserError(f"there is a Python package 'mixup_{name}' already; give your mixer another name")
