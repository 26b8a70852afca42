"""GuidedMixup, which pairs images by where they are salient."""

import contextlib
import copy
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms

from mixers.guidedmix import LUMA, spectral_residual
from originals import Checkout, Gap, beside
from originals.looking import (
    CROSS_ENTROPY,
    LABEL,
    UPDATES,
    Head,
    Meter,
    Sgd,
    batch,
    both_updated,
    made,
    network,
    updated,
)
from originals.same_draws import farthest, on_cpu, relative, space

TORCHVISION = (0.2989, 0.587, 0.114)


@beside(
    "guidedmix",
    "3neutronstar/GuidedMixup",
    "FGVC/Implementor/guidedmixup.py",
    "FGVC/Implementor/baseline.py",
    "FGVC/Utils/spectral_residual.py",
    "FGVC/Utils/distance.py",
    held="test_saliency_mixers.py::test_guidedmix_mixes_pixels_by_the_saliency_of_both",
)
def guidedmix_loop(original: Checkout) -> Iterator[Gap]:
    """Spectral saliency, partners and the published training loop, which looks in training mode."""
    with on_cpu(None):
        spectral = original.names(
            "FGVC/Utils/spectral_residual.py",
            "SpectralResidual",
            torch=torch,
            nn=nn,
            transforms=transforms,
            TF=transforms.functional,
        )(device="cpu")
    distance = original.names("FGVC/Utils/distance.py", "distance_function", torch=torch)
    file = "FGVC/Implementor/guidedmixup.py"
    given: dict[str, Any] = {"np": np, "torch": torch, "copy": copy}
    given |= {"distance_function": distance, "time": mock.MagicMock(), "AverageMeter": Meter, "ProgressMeter": Meter}
    loop, pairing, normalization = (
        original.method(file, "GuidedMixupLearner", name, **given)
        for name in ("_train", "pairing", "_saliency_normalization")
    )
    names = ("_forward_all", "_just_backward", "_update_model")
    autocast = {"autocast": lambda **options: contextlib.nullcontext(), "torch": torch}
    parts = {n: original.method("FGVC/Implementor/baseline.py", "Baseline", n, **autocast) for n in names}
    blur = transforms.GaussianBlur((7, 7), sigma=(3, 3))
    configs = {"condition": "greedy", "m_part": 100, "batch_size": 100, "distance_metric": "l2", "apex": False}
    configs |= {"mix_prob": 2.0, "mixup_epochs": -1, "clean_lam": 0, "saliency_normalization": "sumto1"}
    configs |= {"label_mixing": "saliency_label", "training_verbose": False, "use_fp16": False, "local_rank": 1}
    configs |= {"criterion": "crossentropy"}

    def learner(mode: str, model: nn.Module | None = None) -> Any:
        self = space(configs=configs | {"train_mode": f"guided-{mode}"}, device="cpu", use_amp=False, model=model)
        bound = parts | {"pairing": pairing, "_saliency_normalization": normalization}
        vars(self).update({name: types.MethodType(function, self) for name, function in bound.items()})
        self.blur, self.saliency, self.none_reduction_criterion = blur, spectral, CROSS_ENTROPY
        self.criterion, self.optimizer = nn.CrossEntropyLoss(), Sgd(model) if model else None
        self._show_training_log = self.step_lr_scheduler = lambda *args: None
        if model:  # their loop calls the network with an option of their own
            self.model = Plain(model)
        return self

    why = "torchvision's grey has 0.2989 parts of red, ours 0.299."
    mixer = made("guidedmix", source="spectral", share=1.0).mixers[1]
    for luma, reason in ((TORCHVISION, ""), (LUMA, why)):
        grey = f"red weighs {luma[0]} in ours"
        with mock.patch("mixers.guidedmix.LUMA", luma):
            for size in (64, 224):
                x, _, _ = batch(0, size)
                theirs = spectral.transform_spectral_residual(x)
                gap = relative([spectral_residual(x)], [theirs])
                yield Gap(f"spectral saliency, {size} x {size} pixels, {grey}", gap, "relative", reason)
            differing = masks = 0.0
            for seed in range(30):
                x, _, y = batch(seed, count=16)
                plan = mixer.plan(x, y, np.random.default_rng(0))
                saliency = normalization(None, blur(spectral.transform_spectral_residual(x)))
                index = pairing(learner("sr"), saliency.clone())
                differing += float((plan["index"] != torch.as_tensor(index)).float().mean()) / 30
                masks = max(masks, farthest(plan["mask"][:, 0], saliency / (saliency + saliency[plan["index"]])))
        yield Gap(f"partners by the greedy search, 30 batches of 16, spectral, {grey}", differing, "share", reason)
        yield Gap(f"masks for the same partners, 30 batches of 16, spectral, {grey}", masks, why=reason)
    mode = "The published code looks in training mode; ours in evaluation mode."
    for source, name, reason in (
        ("sr", "resnet18", ""),
        ("ap", "vit_tiny_patch16_224", ""),
        ("ap", "resnet18", mode),
    ):
        model, batches = network(name), [batch(seed) for seed in range(UPDATES)]
        theirs_model = copy.deepcopy(model)
        switch = made("guidedmix", source={"sr": "spectral", "ap": "gradient"}[source], share=1.0)
        with mock.patch("mixers.guidedmix.LUMA", TORCHVISION):
            ours = updated(switch, model, batches, {}, CROSS_ENTROPY)
        grey = f"red weighs {TORCHVISION[0]}, " if source == "sr" else ""
        self = learner(source, theirs_model)
        with on_cpu(None):
            loop(self, [(x.clone(), labels) for x, labels, _ in batches], 1)
        yield from both_updated(
            ours, self.optimizer, f"{LABEL[name]}, {grey}{switch.mixers[1].source} saliency", reason
        )


class Plain(nn.Module):
    """A network that takes, and leaves alone, the option of GuidedMixup's networks."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor, extract_feature: bool = False) -> Tensor:
        """The logits."""
        logits: Tensor = self.inner(x)
        return logits


@beside(
    "guidedmix",
    "Westlake-AI/openmixup",
    "openmixup/models/augments/guidedmix.py",
    "openmixup/models/classifiers/mixup_classification.py",
    held="test_saliency_mixers.py::test_guidedmix_mixes_pixels_by_the_saliency_of_both",
)
def guidedmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """OpenMixup's saliency in evaluation mode, its search, and its images with the partners that ours found."""
    file = "openmixup/models/augments/guidedmix.py"
    cover = original.names(file, "onecycle_cover", np=np, deepcopy=copy.deepcopy, INF=np.inf)
    function = original.names(
        file, "guidedmix", np=np, torch=torch, F=transforms.functional, onecycle_cover=lambda distance: None
    )
    look = original.method(
        "openmixup/models/classifiers/mixup_classification.py",
        "MixUpClassification",
        "_features",
        F=F,
        torch=torch,
        Variable=torch.autograd.Variable,
    )
    mixer = made("guidedmix", source="gradient", share=1.0).mixers[1]
    for name in ("resnet18", "vit_tiny_patch16_224"):
        model, partners, images, weights = network(name).train(), 0.0, 0.0, 0.0
        theirs = space(backbone=model, head=Head())
        for seed in range(20):
            x, labels, y = batch(seed)
            plan = mixer.plan(x, y, np.random.default_rng(0), model, CROSS_ENTROPY)
            mixed, target = mixer.mix(x, y, **plan)
            features = look(theirs, x, labels, "guidedmix", guided_type="ap")
            flat = transforms.functional.gaussian_blur(features, (7, 7), (3, 3)).flatten(1)
            flat = flat / flat.sum(1, keepdim=True)
            index = torch.as_tensor(cover((flat[:, None] - flat).norm(dim=2).numpy()))
            partners += float((plan["index"] != index).float().mean()) / 20
            with on_cpu(space(permutation=lambda n, plan=plan: plan["index"])):
                found, (y_a, y_b, own, other) = function(x, y, features=features)
            images = max(images, farthest(mixed, found))
            weights = max(weights, farthest(target, own * y_a + other * y_b))
        yield Gap(f"partners by its greedy search on its saliency, 20 batches of 8, {LABEL[name]}", partners, "share")
        yield Gap(f"mixed images with those partners, gradient saliency, 20 batches of 8, {LABEL[name]}", images)
        yield Gap(f"label weights with those partners, 20 batches of 8, {LABEL[name]}", weights)
