"""PuzzleMix, which solves a puzzle for each image."""

import copy
import importlib
import random
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import grids, taps
from originals import Checkout, Gap, Numpy, beside
from originals.looking import (
    CROSS_ENTROPY,
    LABEL,
    UPDATES,
    Head,
    Meter,
    OnCpu,
    Sgd,
    batch,
    both_updated,
    made,
    network,
    updated,
)
from originals.openmixup_step import Listed
from originals.same_draws import CLASSES, Again, law, on_cpu, relative, space


class PuzzleNet(nn.Module):
    """A network as PuzzleMix's code has it, which mixes what it is given where it is asked to."""

    def __init__(self, model: nn.Module, process: Callable[..., Any]):
        super().__init__()
        self.inner, self.process = model, process

    def forward(self, x: Tensor, target: Any = None, mixup: bool = False, **options: Any) -> Any:
        """The logits, and with them the target where there is one."""
        if target is None or not mixup:
            return self.inner(x)
        out, target = self.process(x, F.one_hot(target, CLASSES).float(), **options)
        return self.inner(out), target


class Solved:
    """In place of their graph cuts: the masks that ours found, in turn; keeps what they were to solve."""

    def __init__(self, mixer: Any):
        self.masks: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.asked: list[Any] = []
        self.costs: list[tuple[Tensor, ...]] = []
        solve, costs = mixer.solve, mixer.costs

        def solved(*args: Any) -> Any:
            found = solve(*args)
            self.masks += found[0]
            return found

        def priced(*args: Any) -> Any:
            found = costs(*args)
            self.costs += [(slope, found[1], *edges) for slope, *edges in zip(found[0], *found[2:], strict=True)]
            return found

        mixer.solve, mixer.costs = solved, priced

    def __call__(self, *problem: Any) -> np.ndarray:
        """The next mask."""
        self.asked.append(problem)
        return self.masks.pop(0).numpy()

    def gaps(self, cut: Callable[..., np.ndarray]) -> Iterator[Gap]:
        """Their costs beside ours, and the masks of their graph cuts beside ours, for what was asked since."""
        priced = 0.0
        found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for (partner, own, down, right, lam, beta, eta, levels), costs in zip(self.asked, self.costs, strict=True):
            slope, _, *edges = costs
            theirs = [(own - partner) / 2, (down + beta) / 4, (right + beta) / 4]
            priced = max(priced, relative([slope, *edges], [torch.from_numpy(t) for t in theirs]))
            mask = torch.from_numpy(cut(partner, own, down, right, lam, beta, eta, levels)).float()
            ours = self.kept.pop(0)
            by_cut, by_ours = (energy(2 * (1 - z), *costs) for z in (mask, ours))
            found[len(mask) > 8].append((float((mask != ours).float().mean()), float(by_ours > by_cut + 1e-6)))
        yield Gap("costs of the blocks and boundaries", priced, "relative")
        why = "Their graph cuts are swaps on integers that overflow; ours is the exact minimum up to 8 x 8 blocks."
        for large, name in ((False, "2, 4 or 8"), (True, "16")):
            if found[large]:
                share, worse = np.mean(found[large], 0)
                reason = "Both are searches that need not end in the minimum: swaps, and sweeps." if large else why
                what = f"{name} blocks a side, {len(found[large])} samples"
                yield Gap(f"blocks whose level differs from that of their graph cut, {what}", share, "share", reason)
                less = "" if not worse else reason
                yield Gap(f"masks of which the graph cut finds one of less energy, {what}", worse, "share", less)


def energy(labels: Tensor, slope: Tensor, prior: Tensor, down: Tensor, right: Tensor) -> float:
    """What the mask of one sample costs."""
    alone = (slope.double() * labels + prior.double()[labels.long()]).sum()
    edges = (down.double() * labels.diff(dim=0) ** 2).sum() + (right.double() * labels.diff(dim=1) ** 2).sum()
    return float(alone + edges)


def learn_binary(logits: Tensor, target: Tensor) -> Tensor:
    """The look is at a cross entropy; what is learned is the binary loss of a softmax, as in the code for CIFAR."""
    if logits.grad_fn is None:
        return CROSS_ENTROPY(logits, target)
    return F.binary_cross_entropy(logits.softmax(1), target, reduction="none").mean(1)


def block_draws(kept: dict[str, list[Any]], **given: Callable[..., Any]) -> Again:
    """The draws of ours for code that draws the number of blocks as a power of 2."""

    def randint(low: int, high: int) -> Any:
        expected, value = kept["integers"].pop(0)
        again.asked += 1
        again.other += int(expected != law("integers", (high - low,)))
        return low + value

    again = Again(kept, randint=randint, **given)
    return again


@beside(
    "puzzlemix",
    "snu-mllab/PuzzleMix",
    "main.py",
    "mixup.py",
    held="test_puzzlemix.py::test_costs_are_those_of_the_definition",
)
def puzzlemix_loop(original: Checkout) -> Iterator[Gap]:
    """Costs, graph cuts, and the published loop on our masks: transport, noise, images, gradients, weights."""
    cut = original.names("mixup.py", "graphcut_multi", np=Numpy(), gco=importlib.import_module("gco"))
    for name, options, theirs in (
        ("resnet18", {}, {}),
        ("vit_tiny_patch16_224", {}, {}),
        ("resnet18", {"adv_p": 0.5}, {"adv_p": 0.5}),
        ("resnet18", {"clean_lam": 2 / CLASSES}, {"clean_lam": 1.0}),
    ):
        kept: dict[str, list[Any]] = {}
        again = block_draws(
            kept,
            binomial=lambda n, p, kept=kept: int(kept["random"].pop(0)[1] < p),
            uniform=lambda low, high, kept=kept: kept["random"].pop(0)[1],
        )
        mixer = made("puzzlemix", blocks=[2, 4, 8, 16], **options)
        solved = Solved(mixer)
        names = ("get_lambda", "cost_matrix", "cost_matrix_dict", "neigh_penalty", "mask_transport", "transport_image")
        given: dict[str, Any] = {
            "np": Numpy(again),
            "torch": OnCpu(),
            "F": F,
            "graphcut_multi": solved,
            "device": "cpu",
        }
        process = original.names("mixup.py", "mixup_process", "mixup_graph", *names, **given)[0]
        args: dict[str, Any] = {
            "adv_p": 0.0,
            "adv_eps": 10.0,
            "clean_lam": 0.0,
            "num_classes": CLASSES,
            **RGB,
            **theirs,
        }
        args |= {"train": "mixup", "graph": True, "mixup_alpha": 1.0, "in_batch": False, "box": False, "beta": 1.2}
        args |= {
            "gamma": 0.5,
            "eta": 0.2,
            "neigh_size": 4,
            "n_labels": 3,
            "transport": True,
            "t_eps": 0.8,
            "t_size": -1,
        }
        train = original.names(
            "main.py",
            "train",
            np=Numpy(again),
            torch=torch,
            time=mock.MagicMock(),
            AverageMeter=Meter,
            Variable=torch.autograd.Variable,
            bce_loss=nn.BCELoss(),
            softmax=nn.Softmax(dim=1),
            criterion_batch=CROSS_ENTROPY,
            accuracy=lambda *args, **options: (torch.zeros(1),) * 2,
            print_log=lambda *args: None,
        )
        model, batches = network(name), [batch(seed) for seed in range(UPDATES)]
        optimizer = Sgd(theirs_model := copy.deepcopy(model))
        ours = updated(mixer, model, batches, kept, learn_binary)
        solved.kept = list(solved.masks)
        noises = [value for _, value in kept.get("uniform", [])]
        given_noise = mock.Mock(side_effect=noises)
        drawn = mock.patch.object(
            Tensor, "uniform_", lambda self, *args, given=given_noise: self.copy_(torch.tensor(given()))
        )
        loader = [(x.clone(), labels) for x, labels, _ in batches]
        with on_cpu(again), drawn:
            train(loader, PuzzleNet(theirs_model, process), optimizer, 0, space(**args), None)
        what = ", ".join([LABEL[name], *(f"{key}={value:g}" for key, value in options.items()), "our masks in both"])
        if not options:
            yield from solved.gaps(cut)
        yield from both_updated(ours, optimizer, what)
        yield again.gap()

    yield empty_places(original)


def empty_places(original: Checkout) -> Gap:
    """Places that the code leaves empty because their block has no gradient at all, as in a fresh timm ResNet."""
    names = ("mask_transport", "cost_matrix", "cost_matrix_dict")
    transport = original.names("mixup.py", *names, np=np, torch=torch, device="cpu")[0]
    model, mixer, empty, places = (
        network("resnet18", zero_init_last=True, act_layer=nn.ReLU),
        made("puzzlemix", blocks=[4]),
        0,
        0,
    )
    for seed in range(5):
        x, _, y = batch(seed)
        plan = mixer.plan(x, y, np.random.default_rng(seed), model, CROSS_ENTROPY)
        found = grids.saliency_map(taps.saliency(model, CROSS_ENTROPY, x, y))
        mask = plan["mask"][:, :, ::16, ::16]
        shown = mask.flatten(1) > 0
        nobody = transport(mask, grids.block_saliency(found, 4), 0.8).sum(1) == 0
        empty, places = empty + int((nobody & shown).sum()), places + int(shown.sum())
    why = "A block without any gradient costs 0, which their search for the cheapest claim cannot tell from no claim."
    what = f"{places} shown places that are left empty in theirs, fresh ResNet-18, 64 x 64 pixels, 4 blocks a side"
    return Gap(what, empty / places, "share", why)


RGB = {
    "mean": torch.tensor([0.485, 0.456, 0.406])[:, None, None],
    "std": torch.tensor([0.229, 0.224, 0.225])[:, None, None],
}


@beside(
    "puzzlemix",
    "Westlake-AI/openmixup",
    "openmixup/models/augments/puzzlemix.py",
    "openmixup/models/classifiers/mixup_classification.py",
    "openmixup/models/heads/cls_head.py",
    held="test_puzzlemix.py::test_costs_are_those_of_the_definition",
)
def puzzlemix_openmixup(original: Checkout) -> Iterator[Gap]:
    """OpenMixup's whole step on our masks: saliency, transport, images, loss, gradients, weights."""
    file = "openmixup/models/classifiers/mixup_classification.py"
    given = {"F": F, "torch": torch, "np": np, "random": random, "Variable": torch.autograd.Variable}
    look, forward = (original.method(file, "MixUpClassification", n, **given) for n in ("_features", "forward_mix"))
    loss = original.method(
        "openmixup/models/heads/cls_head.py",
        "BaseClsHead",
        "loss",
        torch=torch,
        F=F,
        accuracy=lambda *args: None,
        accuracy_mixup=lambda *args: None,
    )
    why = "OpenMixup's loss of whole labels takes the batch's mean of the label's shares; ours those of each sample."
    for name, soft in (("resnet18", True), ("vit_tiny_patch16_224", True), ("resnet18", False)):
        kept: dict[str, list[Any]] = {}
        again = block_draws(kept)
        mixer = made("puzzlemix")
        solved = Solved(mixer)
        names = ("cost_matrix", "neigh_penalty", "mask_transport", "transport_image")
        augment = original.names(
            "openmixup/models/augments/puzzlemix.py",
            "puzzlemix",
            *names,
            np=Numpy(again),
            torch=torch,
            F=F,
            gco=True,
            graphcut_multi=solved,
        )[0]
        head = Head()
        head.processor, head.multi_label, head.num_classes = None, soft, CLASSES  # type: ignore[assignment]
        head.criterion = lambda logits, target, **options: F.cross_entropy(  # type: ignore[assignment]
            logits, target.float() if target.ndim == 2 else target
        )
        head.loss = types.MethodType(loss, head)  # type: ignore[method-assign]
        model, batches = network(name), [batch(seed) for seed in range(UPDATES)]
        theirs_model = copy.deepcopy(model).train()
        optimizer, losses = Sgd(theirs_model), []
        settings = {"transport": True, "t_batch_size": 32, "block_num": 4, "beta": 1.2, "gamma": 0.5, "eta": 0.2}
        settings |= {"neigh_size": 4, "n_labels": 3, "t_eps": 0.8, "t_size": -1}
        theirs = space(mix_prob=None, idx_list=[0], mix_mode=["puzzlemix"], alpha=[1.0], mix_repeat=1, save=False)
        vars(theirs).update(mix_args={"puzzlemix": settings}, dynamic_mode={"puzzlemix": augment}, debug_mode=False)
        vars(theirs).update(backbone=Listed(theirs_model), head=head, _features=types.MethodType(look, theirs))
        ours = updated(mixer, model, batches, kept, CROSS_ENTROPY)
        with on_cpu(again):
            for x, labels, _ in batches:
                optimizer.zero_grad()
                losses.append(forward(theirs, x.clone(), labels)[0]["loss"].mean())
                losses[-1].backward()
                optimizer.step()
        what = f"{LABEL[name]}, loss of {'mixed' if soft else 'whole'} labels, our masks in both"
        yield Gap(f"loss of the first update, {what}", abs(ours.losses[0] - float(losses[0])), why="" if soft else why)
        yield from both_updated(ours, optimizer, what, "" if soft else why)
        yield again.gap()
