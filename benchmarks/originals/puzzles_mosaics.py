"""Co-Mixup, which makes mosaics of several images at once."""

import contextlib
import copy
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import grids
from originals import Checkout, Gap, Numpy, beside
from originals.looking import (
    CROSS_ENTROPY,
    LABEL,
    RATE,
    UPDATES,
    Meter,
    OnCpu,
    Sgd,
    batch,
    both_updated,
    made,
    network,
    updated,
)
from originals.same_draws import CLASSES, Again, farthest, keeping, on_cpu, space


class Sweeps:
    """In place of gco, for Co-Mixup: labels by the sweeps of ours, of one mosaic at a time."""

    def __init__(self, part: int):
        self.part, self.calls = part, 0
        self.cuts: Any = None
        self.beside: list[tuple[bool, bool, bool]] = []

    def cut_grid_graph(self, unary: Any, pairwise: Any, down: Any, right: Any, algorithm: str) -> np.ndarray:
        """The labels (h w,), as ours finds them; from the second round on from two starts."""
        turn = self.calls // self.part
        self.calls += 1
        prices = (float(down[0, 0]) * pairwise)[None]
        first = np.zeros((1, 1, 1), int)
        found = grids.swept(np, first, unary[None].copy(), prices, (), 2, twice=turn > 0)
        if self.cuts:
            theirs = self.cuts.cut_grid_graph(unary, pairwise, down, right, algorithm=algorithm).reshape(found.shape)
            costs = [grids.sums(first, unary[None], prices, labels)[0] for labels in (found, theirs)]
            self.beside.append((bool((found != theirs).any()), costs[0] > costs[1] + 1e-6, costs[1] > costs[0] + 1e-6))
        return np.asarray(found).ravel()


@beside(
    "comixup",
    "snu-mllab/Co-Mixup",
    "comix-imagenet/main_fast_ddp.py",
    "comix-imagenet/lib/utils.py",
    held="test_comixup.py::test_all_parts_at_once_give_what_the_loop_gives_part_by_part_also_unread",
)
def comixup_loop(original: Checkout) -> Iterator[Gap]:
    """The published loop for ImageNet with our solver in place of its graph cuts, then with the graph cuts."""
    file, part = "comix-imagenet/lib/utils.py", 16
    settings = {"alpha": 1.0, "part": part, "niter": 3, "stride": 8, "omega": 0.0}
    names: tuple[str, ...] = (
        "to_onehot",
        "random_initialize",
        "distance",
        "mix_input",
        "graphcut_multi",
        "mixup_match",
    )
    names += ("get_onehot_matrix", "graphcut_wrapper", "obj_fn", "resolve_label")
    kept: dict[str, list[Any]] = {}

    def matcher(gco: Any, again: Again) -> Any:
        mixing = {"np": Numpy(again), "torch": OnCpu(), "F": F, "gco": gco}
        mixing |= {"time": mock.MagicMock()}
        return dict(zip(names, original.names(file, *names, **mixing), strict=True))

    sweeps = Sweeps(part)

    def randint(low: int, high: int, shape: tuple[int, ...]) -> Any:
        sweeps.calls = 0  # the first labels of a part
        return kept["integers"].pop(0)[1][0]

    dirichlet = lambda alphas: space(sample=lambda: torch.as_tensor(kept["dirichlet"].pop(0)[1][0]).float())  # noqa: E731
    laws = mock.patch("torch.distributions.dirichlet.Dirichlet", dirichlet)
    again = Again(kept, randint=randint)
    configs: dict[str, Any] = {
        "alpha": 1.0,
        "set_resolve": True,
        "thres": 0.83,
        "block_num": 4,
        "lam_dist": 0.0,
        "m_beta": 0.32,
    }
    configs |= {"clean_lam": 1.0, "mean": [0.0] * 3, "std": [1.0] * 3, "print_freq": 1000}
    for name in ("resnet18", "vit_tiny_patch16_224"):
        functions = matcher(sweeps, again)
        train = original.names(
            "comix-imagenet/main_fast_ddp.py",
            "train",
            np=np,
            torch=torch,
            F=F,
            nn=nn,
            time=mock.MagicMock(),
            AverageMeter=Meter,
            Variable=torch.autograd.Variable,
            amp=space(scale_loss=lambda loss, optimizer: contextlib.nullcontext(loss)),
            to_onehot=lambda target, classes: F.one_hot(target, CLASSES).float(),
            distance=functions["distance"],
            accuracy=lambda *args, **options: (torch.zeros(1),) * 2,
            MixupProcessParallel=None,
            sys=mock.MagicMock(),
        )

        def matched(
            x: Tensor, y: Tensor, params: Any, saliency: Tensor, distances: Tensor, match: Any = functions
        ) -> Any:
            return match["mixup_match"](x, y, params, saliency, distances, "cpu")

        mixer, model = made("comixup", **settings), network(name)
        batches = [batch(seed, count=part) for seed in range(UPDATES)]
        optimizer = Sgd(theirs_model := copy.deepcopy(model))
        ours = updated(mixer, model, batches, kept, CROSS_ENTROPY)
        loader = [(x.clone(), labels) for x, labels, _ in batches]
        conf = space(TRAIN=space(**configs), DATA=space(crop_size=64, batch_size=part))
        with on_cpu(again), laws:
            train(
                0,
                matched,
                lambda *args: None,
                conf,
                nn.CrossEntropyLoss(),
                CROSS_ENTROPY,
                loader,
                theirs_model,
                optimizer,
                0,
                lambda epoch: RATE,
            )
        yield from both_updated(ours, optimizer, f"{LABEL[name]}, parts of {part}, omega=0, our solver in both")
    yield from mosaics(matcher, sweeps, again, kept, laws)


def mosaics(matcher: Any, sweeps: Sweeps, again: Again, kept: dict[str, list[Any]], laws: Any) -> Iterator[Gap]:
    """Mosaics and labels of parts with the same saliency, first by our solver in both, then by graph cuts in theirs."""
    crowded = (
        "The code sums the images over the threshold through A; ours takes p where p is over it, as the authors' "
        "objective does."
    )
    search = "Graph cuts are swaps, ours sweeps: neither need find the least energy."
    behind = "Where the label of one cell differs all mosaics behind it are crowded in another way."
    sweeps.cuts = cuts = importlib.import_module("gco")
    for gco, omega, solved_by, reason in (
        (sweeps, 0.0, "our solver in both", ""),
        (sweeps, 0.001, "our solver in both", crowded),
        (cuts, 0.0, "graph cuts in theirs", behind),
    ):
        how = f"omega={omega:g}, {solved_by}"
        functions, differing, images, weights = matcher(gco, again), 0.0, 0.0, 0.0
        mixer = made("comixup", alpha=1.0, part=16, niter=3, stride=8, omega=omega)
        for seed in range(8):
            x, _, y = batch(seed, count=16)
            y = torch.eye(16)
            saliency = x - x.mean((2, 3), keepdim=True)
            plan = mixer.plan(x, y, keeping(seed, kept), lambda images, saliency=saliency: saliency)
            mixed, target = mixer.mix(x, y, **plan)
            found = saliency.square().mean(1).sqrt()
            z = F.avg_pool2d(found, 8)
            place = z.flatten(1).argmax(1)
            place = torch.stack([place // z.shape[2], place % z.shape[2]], 1).float()
            params = {"mixup_alpha": 1.0, "set_resolve": True, "thres": 0.83, "m_block_num": 4, "lam_dist": omega}
            params |= {"m_beta": 0.32}
            with on_cpu(again), laws:
                theirs, shares = functions["mixup_match"](
                    x, y, params, found, functions["distance"](place, "l1"), "cpu"
                )
            cells = F.avg_pool2d((mixed - theirs).abs().amax(1, keepdim=True), 16)
            differing += float((cells > 1e-3).float().mean()) / 8
            images, weights = max(images, farthest(mixed, theirs)), max(weights, farthest(target, shares))
        yield Gap(f"cells that show another image, 8 parts of 16, {how}", differing, "share", reason)
        yield Gap(f"mosaics, 64 x 64 pixels, 8 parts of 16, {how}", images, why=reason)
        yield Gap(f"labels of the mosaics, 8 parts of 16, {how}", weights, why=reason)
        if gco is sweeps and not omega:
            other, worse, better = np.mean(sweeps.beside, 0)
            what = f"{len(sweeps.beside)} mosaics of the same costs"
            yield Gap(f"labels that are not those of the graph cut, {what}", other, "share", search)
            yield Gap(f"labels of less energy by the graph cut, {what}", worse, "share", search)
            yield Gap(f"labels of less energy by ours, {what}", better, "share", search)
            sweeps.cuts = None
