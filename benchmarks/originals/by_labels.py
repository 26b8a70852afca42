"""Methods whose labels or partners go by the classes or values of a batch, and whose images are those of Mixup."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import build
from originals import Checkout, Gap, Numpy, beside
from originals.same_draws import (
    CLASSES,
    Again,
    Mixed,
    batch,
    beside_each_other,
    keeping,
    loader,
    on_cpu,
    sgd,
    small,
    space,
    twenty_updates,
    weights,
)

REMIX = "imbalanceddl/strategy/_remix_drw.py"
COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
"""Training images of each class, of CIFAR-10 with an imbalance of 100."""


@beside(
    "remix",
    "ntucllab/imbalanced-DL",
    REMIX,
    held="test_remix.py::test_the_label_goes_to_the_rarer_class_as_a_loop_over_the_pairs_says",
)
def remix_imbalanced(original: Checkout) -> Iterator[Gap]:
    """Mixed images, label weights, and, by the published loop, the weights of a network after 20 updates."""
    again = Again()
    cfg = space(k_majority=3, tau=0.5, cls_num_list=COUNTS, gpu=None, print_freq=10**9)
    names = "remix_data", "remix_criterion"
    mix, loss = original.names(REMIX, *names, np=Numpy(again), torch=torch)

    def theirs(x: Tensor, y: Tensor) -> Mixed:
        mixed, y_a, y_b, _, lam = mix(x, y.argmax(1), cfg)
        return mixed, (F.one_hot(y_a, CLASSES), F.one_hot(y_b, CLASSES), lam[:, None])

    yield from beside_each_other(build("remix", class_counts=COUNTS), theirs, again, 500, 64)
    silent = space(write=lambda *_: None, flush=lambda: None)
    given = {"AverageMeter": original.names("imbalanceddl/utils/utils.py", "AverageMeter")}
    given |= {"remix_data": mix, "remix_criterion": loss, "print": lambda *_: None}
    given["accuracy"] = lambda *_, topk: torch.zeros(2, 1)  # it is only logged
    epoch = original.method(REMIX, "RemixTrainer", "train_one_epoch", torch=torch, **given)

    def train(model: nn.Module) -> None:
        class Twice(nn.Module):  # the loop shows the network the images as they are, too, to log how well it does
            count = 0

            def forward(self, x: Tensor) -> tuple[Tensor, None]:
                self.count += 1
                return torch.zeros(len(x), CLASSES) if self.count % 2 else model(x), None

        loop = {"model": Twice(), "train_loader": loader(20), "optimizer": sgd(model), "cfg": cfg, "epoch": 0}
        loop |= {"criterion": nn.CrossEntropyLoss(reduction="none"), "log_training": silent}
        with on_cpu(again):
            epoch(space(**loop, compute_metrics_and_record=lambda *_, **__: None))

    yield from twenty_updates(build("remix", class_counts=COUNTS), train, again)
    yield again.gap()


@beside(
    "cmixup",
    "huaxiuyao/C-Mixup",
    "src/algorithm.py",
    held="test_cmixup.py::test_a_partner_is_the_one_that_a_loop_over_the_kernel_finds",
)
def cmixup_authors(original: Checkout) -> Iterator[Gap]:
    """Partners of the form for batches, and the published loop over a training set that is one batch."""
    from sklearn.neighbors import KernelDensity

    spots: list[float] = []

    def choice(among: np.ndarray, p: np.ndarray) -> int:  # numpy's, for a draw of ours
        ends = p.cumsum()
        return int(among[(ends / ends[-1]).searchsorted(spots.pop(0), side="right")])

    again = Again(choice=choice, permutation=lambda among: among)
    args = space(mixtype="kde", kde_type="gaussian", kde_bandwidth=0.2, show_process=0, batch_type=0, mix_alpha=2.0)
    vars(args).update(batch_size=16, num_epochs=20, use_manifold=False, dataset="", is_ood=1)
    args.optimiser_args = {"lr": 7e-5}  # of its set of images
    given: dict[str, Any] = {"np": Numpy(again), "torch": torch, "nn": nn, "KernelDensity": KernelDensity, "args": args}
    given |= {"copy": copy, "Adam": torch.optim.Adam, "time": space(time=lambda: 0.0), "print": lambda *_: None}
    given["test"] = lambda *_: {"mse": 0.0, "r": 0.0}  # it chooses which epoch is kept, and both train on
    names = "get_mixup_sample_rate", "get_batch_kde_mixup_idx", "train"
    rates, partners, train = original.names("src/algorithm.py", *names, **given)
    differing, rng, mixer = 0, np.random.default_rng(0), build("cmixup", bandwidth=0.2)
    for seed in range(200):
        x, values = torch.zeros(64, 3, 8, 8), torch.from_numpy(rng.uniform(-1, 1, (64, 1 + seed % 3))).float()
        kept: dict[str, list[Any]] = {}
        ours = mixer.plan(x, values, keeping(seed, kept))["index"][:32]
        spots[:] = fractions(kept)
        theirs = partners(args, x, values, "cpu")  # of the first half of a batch, out of the whole
        differing += int((np.array(theirs) != ours.numpy()).sum())
    yield Gap("partners, 200 batches of 64, 1 to 3 values, bandwidth 0.2", differing / (200 * 32), "share")
    x, values = batch(0, count=16)[0], torch.from_numpy(rng.uniform(-1, 1, (16, CLASSES)) / 4).float()
    net, model = small(), small()
    optimizer = torch.optim.Adam(net.parameters(), **args.optimiser_args)
    for update in range(20):
        optimizer.zero_grad()
        mixer(net, nn.MSELoss(reduction="none"), x, values, keeping(update, again.kept)).loss.backward()
        optimizer.step()
    spots[:] = fractions(again.kept)
    data = {"x_train": x.numpy(), "y_train": values.numpy(), "x_valid": None, "y_valid": None}
    train(args, model, data, True, rates(args, data, "cpu"), None, "cpu")
    yield weights(net, model, "20 updates, ViT of 4 blocks, 64 pixels, a training set of one batch")
    yield again.gap()


def fractions(kept: dict[str, list[Any]]) -> list[float]:
    """The whole numbers that partners were drawn by, as shares of their range."""
    return [whole / most for (_, most), drawn in kept["integers"] for whole in drawn.tolist()]
