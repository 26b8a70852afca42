"""What all tests share: one torch thread, and a tiny model and batch that are the same on every machine."""

# ruff: noqa: E402
import random

import beartype._check.code.codemain

# beartype looks at one random item of each list, drawn from python's global generator, which the contract says no
# mixer moves: it gets a generator of its own, before the first annotated function is imported.
beartype._check.code.codemain.getrandbits = random.Random(0).getrandbits

import shutil
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import teachers
import timm
import tiny
import torch
from driver import Server
from forks import Forks
from hub_server import HubServer
from resuming import SHORT, Reference
from runs import Command
from strangers import Site
from stub import Stub
from teachers import fill
from torch import Tensor, nn

from mixers.testing import batch

teachers.stand_in()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors are slower on several threads, and sums differ with their number."""
    torch.set_num_threads(1)


@pytest.fixture
def model() -> nn.Module:
    """A small convolutional network with BatchNorm and 5 classes, weights the same everywhere."""
    return fill(timm.create_model("test_resnet", num_classes=5))


@pytest.fixture
def transformer() -> nn.Module:
    """A small vision transformer with 5 classes, weights the same everywhere."""
    return fill(timm.create_model("test_vit", num_classes=5, dynamic_img_size=True, patch_size=8))


@pytest.fixture
def images_and_targets() -> tuple[Tensor, Tensor]:
    """Four random images (4, 3, 32, 32) and one-hot targets (4, 5)."""
    return batch()


@pytest.fixture
def rng() -> np.random.Generator:
    """The generator of one update, as the loop makes it."""
    return np.random.default_rng((0, 0))


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    """As in a plain run: annotations are checked under pytest only."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The console command in this process: ``console("cells", "list")`` gives exit status, output and errors."""
    return Command(monkeypatch, capsys)


@pytest.fixture
def stub(tmp_path: Path) -> Stub:
    """A sweep whose runs are acted, not trained."""
    return Stub(tmp_path)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Where this process finds packages that a test installs."""
    site = Site(tmp_path / "site", monkeypatch)
    yield site
    monkeypatch.undo()  # the path first: nothing is found there any more
    site.again()


@pytest.fixture
def compiler(without_shape_checks: None) -> Iterator[None]:
    """One that has compiled nothing yet, with the limits of a run, which are put back afterwards."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Starts whole runs in processes that have everything imported already."""
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def only_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """The Hub of all tests, on a free port."""
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(only_hub: HubServer) -> HubServer:
    """The Hub, as empty as it was at first."""
    only_hub.clear()
    return only_hub


@pytest.fixture(scope="session")
def clients(only_hub: HubServer) -> Iterator[Forks]:
    """Processes that know this Hub and have our commands imported."""
    imports = "import evaluate_mixup, huggingface_hub, timm, mixup_recipes.cli, mixup_recipes.runs.replay\n"
    with Forks(only_hub.env, imports + "import mixup_recipes.hub.publisher, mixup_recipes.hub.verify") as forks:
        yield forks


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file over 72 training and 30 evaluation photos: 3 epochs of 4 updates."""
    folder = tmp_path_factory.mktemp("tiny")
    return tiny.make_recipe(folder, tiny.make_photos(folder / "photos"))


@pytest.fixture(scope="session")
def reference(server: Server, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Undisturbed runs by their arguments, without loader processes and with a checkpoint per epoch."""
    return Reference(server, tiny_recipe, tmp_path_factory.mktemp("reference"))


@pytest.fixture
def run(reference: Reference, tmp_path: Path) -> Path:
    """A finished run of 2 epochs that a test may change."""
    return shutil.copytree(reference(*SHORT), tmp_path / "run")
