"""Methods inside the network or with a memory: RecursiveMix, Manifold Mixup, AlignMixup."""

import contextlib
import copy
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import timm.data.mixup
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from mixers import build
from mixers.alignmix import AlignMix, align, transport_plan
from originals import Checkout, Gap, Numpy, beside
from originals.openmixup_step import HARD, STEP, classifier, head, run
from originals.same_draws import (
    CLASSES,
    OPENMIXUP,
    Again,
    batch,
    earlier,
    farthest,
    gradients,
    inclusive,
    keeping,
    loader,
    on_cpu,
    relative,
    seen,
    sgd,
    space,
    trained,
    weights,
)


class Norm(nn.GroupNorm):
    """In place of BatchNorm, which blows up the rounding of sums on maps as small as these."""

    def __init__(self, channels: int, **options: Any):
        super().__init__(8, channels, **options)


def kinkless(model: nn.Module) -> nn.Module:
    """Without units that are switched on or off, by which rounding grows to a large gap in some updates."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())
            if isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(3, 2, 1))
    return model


SHAPE: dict[str, Any] = {"layers": [1, 1, 1, 1], "num_classes": CLASSES, "norm_layer": Norm}


def resnet() -> Any:
    """A ResNet-10 without kinks, always the same."""
    torch.manual_seed(0)
    basic: Any = timm.models.resnet.BasicBlock
    return kinkless(timm.models.resnet.ResNet(basic, **SHAPE, zero_init_last=False))


YANG = ("main.py", "utils.py", "models_imagenet/resnet.py", "loss/label_smooth_loss.py")


@beside("recursivemix", "implus/RecursiveMix-pytorch", *YANG, held="test_recursivemix.py::test_a_step_is_the_formula")
def recursivemix_yang(original: Checkout) -> Iterator[Gap]:
    """What the published loop gives a ResNet, its gradients and weights; the box as it was once; a new epoch."""
    what = "smooth ResNet-10 with GroupNorm, 96 pixels"
    with earlier(original, "6364e11", *YANG) as before:
        for n, swapped, code, when in ((20, False, original, ""), (3, True, before, ", swapped_roi, code of 2022")):
            ours, theirs = recursive(code, n, swapped)
            yield Gap(f"mixed images, {n} updates{when}", farthest(*(torch.stack(run[0]) for run in (ours, theirs))))
            gap = relative(ours[1], theirs[1])
            yield Gap(f"gradients of all parameters, last of {n} updates, {what}{when}", gap, "relative")
            yield Gap(f"weights after {n} updates, {what}{when}", relative(ours[2], theirs[2]), "relative")
        ours, theirs = recursive(original, 5, epochs=5)
    apart = (torch.stack(ours[0]) != torch.stack(theirs[0])).float().mean()
    why = "the published loop forgets the history at the start of an epoch, here it is kept"
    yield Gap("pixels of mixed images, 5 epochs of 1 update", float(apart), "share", why)


def recursive(
    original: Checkout, updates: int, swapped: bool = False, epochs: int = 1
) -> Iterator[tuple[list[Tensor], ...]]:
    """Our updates and the published loop's: the images, the gradients of the last one, the weights.

    ``swapped``: the code before April 2023, which draws the row first.
    """
    ours = resnet()
    mixer: Any = build("recursivemix", swapped_roi=swapped)
    mixer.setup(ours)
    given: dict[str, Any] = {"nn": nn, "torch": torch, "roi_align": roi_align}
    made, block, *_ = original.names(YANG[2], "ResNet", "BasicBlock", "conv1x1", "conv3x3", **given)
    theirs = kinkless(made(block, **SHAPE))
    second = {f"fc_roi.{name}": value for name, value in mixer.roi_classifier.state_dict().items()}
    theirs.load_state_dict(ours.state_dict() | second)
    images, again = (seen(ours), seen(theirs)), Again()
    yield images[0], trained(mixer, ours, again.kept, updates, 96), [*ours.parameters(), *mixer.parameters()]
    order = slice(None, None, 1 if swapped else -1)
    drawn = again.kept["integers"][2:]  # the first update draws nothing there
    centres = [drawn[first : first + 2][order] for first in range(0, len(drawn), 2)]
    again.kept = {"integers": [*itertools.chain(*centres)], "random": again.kept["random"][1:]}
    share = space(uniform=lambda low, high: low + (high - low) * again.random())
    given = {"np": Numpy(again), "torch": torch, "F": F, "random": share}
    mix, smooth, meter = original.names(YANG[1], "recursive_mix", "smooth_one_hot", "AverageMeter", **given)
    optimizer, loss = sgd(theirs), original.names(YANG[3], "LabelSmoothingLoss", nn=nn, torch=torch)(CLASSES)
    loop = original.names(
        YANG[0],
        "train",
        recursive_mix=mix,
        smooth_one_hot=smooth,
        AverageMeter=meter,
        autocast=contextlib.nullcontext,
        scaler=space(scale=lambda loss: loss, step=lambda optimizer: optimizer.step(), update=lambda: None),
        adjust_learning_rate=lambda *_: 0.0,
        accuracy=lambda *_, topk: torch.zeros(2),
        reduce_value=lambda value: value,
        sys=space(stdout=space(flush=lambda: None)),
    )
    said = space(num_classes=CLASSES, smoothing=0.0, aug="recursive_mix", aug_alpha=0.5, aug_omega=0.5)
    said.interpolate_mode, said.share_fc, said.print_freq, said.epoch = "nearest", False, 10**9, 0
    batches = loader(updates, 96)
    with on_cpu(again):
        for epoch in range(epochs):
            loop(0, theirs, optimizer, loss, batches[epoch::epochs], space(info=lambda *_: None), said)
    yield images[1], gradients(theirs), list(theirs.parameters())


VERMA = "supervised/models"


@beside(
    "manifoldmix",
    "vikasverma1077/manifold_mixup",
    f"{VERMA}/preresnet.py",
    f"{VERMA}/utils.py",
    "supervised/utils.py",
    held="test_hidden.py::test_hidden_mixing_is_running_the_stages_mixing_or_aligning_and_running_the_rest",
)
def manifoldmix_verma(original: Checkout) -> Iterator[Gap]:
    """Logits, targets, loss and gradients of the published ResNet, mixed by itself and by our hooks."""
    again, gaps = Again(), dict.fromkeys(("logits", "targets", "loss", "gradients of all parameters"), 0.0)
    given: dict[str, Any] = {"np": Numpy(again), "torch": torch, "nn": nn, "Variable": lambda value: value}
    given["F"] = space(relu=F.gelu, avg_pool2d=F.avg_pool2d)  # no kinks, see above
    one, process = original.names(f"{VERMA}/utils.py", "to_one_hot", "mixup_process", **given)
    given |= {"to_one_hot": one, "mixup_process": process, "random": inclusive(again)}
    given["get_lambda"] = original.names("supervised/utils.py", "get_lambda", **given)
    needed = ("PreActBlock", "PreActResNet", "preactresnet18")
    *_, made = original.names(f"{VERMA}/preresnet.py", *needed, **given)
    torch.manual_seed(0)
    net, mixer = made(CLASSES).train(), build("manifoldmix")
    net.feature_info = [{"module": f"layer{n}", "reduction": 2**n} for n in (1, 2, 3, 4)]
    mixer.setup(net)
    layers = []

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        """That of the published loop."""
        return nn.BCELoss()(nn.Softmax(dim=1)(logits), target)

    for seed in range(12):
        x, labels, y = batch(seed, 32)
        found = []
        for own in (True, False):
            net.zero_grad()
            if own:
                again.kept = {}
                out = mixer(net, loss, x, y, keeping(seed, again.kept))
                logits, target, value = out.logits, out.target, out.loss
                layers.append(out.plan["layer"])
            else:
                with on_cpu(again):
                    logits, target = net(x, labels, mixup_hidden=True, mixup_alpha=2.0)
                value = loss(logits, target)
            value.backward()
            found.append(([logits], [target], [value], gradients(net)))
        for name, ours, theirs in zip(gaps, *found, strict=True):
            gaps[name] = max(gaps[name], relative(ours, theirs))
    assert set(layers) == {0, 1, 2}
    for name, gap in gaps.items():
        yield Gap(f"{name}, 12 batches, smooth PreActResNet-18, 32 pixels", gap, "relative")
    yield again.gap()
    other, optimizer = copy.deepcopy(net), sgd(net)
    mixer.setup(other)
    again.kept = {}
    trained(mixer, other, again.kept, 20, 32, loss=loss)
    for x, labels in loader(20, 32):
        with on_cpu(again):
            logits, target = net(x, labels, mixup_hidden=True, mixup_alpha=2.0)
        optimizer.zero_grad()
        loss(logits, target).backward()
        optimizer.step()
    yield weights(other, net, "20 updates, smooth PreActResNet-18, 32 pixels")
    yield again.gap()


class Latent(nn.Module):
    """A timm ResNet as OpenMixup's that mixes what lies within it; its head pools and classifies."""

    deep_stem, out_indices, res_layers = False, (3,), ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, original: Checkout, net: Any):
        super().__init__()
        for name in ("conv1", "maxpool", *self.res_layers):
            setattr(self, name, getattr(net, name))
        self.norm1, self.relu = net.bn1, net.act1
        names = ("forward", "_feature_mixup")
        self.forward, self._feature_mixup = (
            types.MethodType(original.method(RESNET, "ResNet_Mix", name, torch=torch), self) for name in names
        )


RESNET = "openmixup/models/backbones/resnet_mmcls.py"


@beside(
    "manifoldmix",
    "Westlake-AI/openmixup",
    *STEP,
    HARD,
    RESNET,
    held="test_hidden.py::test_hidden_mixing_is_running_the_stages_mixing_or_aligning_and_running_the_rest",
)
def manifoldmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Gradients and weights of OpenMixup's whole step, with its mask and its ResNet's forward on timm's layers."""
    again, mixer = Again(), build("manifoldmix", alpha=0.2)
    ours = resnet()
    mixer.setup(ours)
    slopes = trained(mixer, ours, again.kept, 20, 96)
    layers = {value for _, value in again.kept["integers"]}
    assert layers == {0, 1, 2}
    theirs = resnet()
    judge = head(original, with_avg_pool=True)
    judge.fc = theirs.fc
    step = classifier(original, "manifoldmix", 0.2, Latent(original, theirs), judge, layer=(0, 3))
    given = {"np": Numpy(again), "torch": torch}
    step._manifoldmix = types.MethodType(original.method(STEP[0], "MixUpClassification", "_manifoldmix", **given), step)
    run(step, again, 96)
    what = "smooth ResNet-10 with GroupNorm, 96 pixels"
    yield Gap(f"gradients of all parameters, 20th update, {what}", relative(slopes, gradients(theirs)), "relative")
    yield weights(ours, theirs, f"20 updates, {what}")
    yield again.gap()


ALIGN = ("imagenet/models/resnet50_classifier.py", "imagenet/utils/OT.py")


@beside(
    "alignmix",
    "shashankvkt/AlignMixup_CVPR22",
    *ALIGN,
    held="test_hidden.py::test_alignment_and_its_gradient_are_those_of_the_formula",
)
def alignmix_venkataramanan(original: Checkout) -> Iterator[Gap]:
    """The transport plan, aligned features, and logits, loss, gradients and weights with the published classifier."""
    again = Again()
    sinkhorn = original.names(ALIGN[1], "SinkhornDistance", torch=torch, nn=nn)
    given: dict[str, Any] = {"np": Numpy(again), "torch": torch, "nn": nn, "F": F, "random": again.answering()}
    needed = ("mixup_aligned", "mixup_process", "Resnet_classifier")
    aligned, *_ = original.names(ALIGN[0], *needed, SinkhornDistance=sinkhorn, **given)
    apart = plans_and_features(sinkhorn(0.1, 100), again, lambda f, y, lam: aligned(f, y, lam)[0])
    yield from apart
    yield again.gap()
    classifier = original.names(ALIGN[0], *needed, SinkhornDistance=sinkhorn, ResNet=body, **given)[2]
    yield from classified(classifier, again)


def body() -> nn.Module:
    """A ResNet without kinks that makes 7 x 7 features of 56 pixels, always the same; its classifier is left out."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"norm_layer": Norm, "output_stride": 8, "zero_init_last": False}
    made = timm.create_model("resnet10t", num_classes=0, global_pool="", **options)
    return kinkless(made)


def classified(made: Any, again: Again) -> Iterator[Gap]:
    """The published method, half of it Mixup, with the published classifier."""
    theirs, ours, mixer = made(CLASSES, z_dim=512), body(), build("alignmix")
    ours.reset_classifier(CLASSES, "avg")  # type: ignore[operator]
    ours.fc.load_state_dict(theirs.classifier.state_dict())  # type: ignore[union-attr]
    mixer.setup(ours)
    again.kept = {}
    slopes = trained(mixer, ours, again.kept, 20, 56)
    again.answers = answers(again.kept)
    optimizer = sgd(theirs)
    for x, labels in loader(20, 56):
        with on_cpu(again):
            logits, y_a, y_b = theirs(x, labels, lam := again.beta(2.0, 2.0), "train")
        optimizer.zero_grad()
        (lam * F.cross_entropy(logits, y_a) + (1 - lam) * F.cross_entropy(logits, y_b)).backward()
        optimizer.step()
    what = "smooth ResNet-10, 56 pixels, half of the updates Mixup"
    yield Gap(f"gradients of all parameters, 20th update, {what}", relative(slopes, gradients(theirs)), "relative")
    gap = relative(list(ours.parameters()), list(theirs.parameters()))
    yield Gap(f"weights after 20 updates, {what}", gap, "relative")


def answers(kept: dict[str, list[Any]]) -> Iterator[int]:
    """What python's ``random`` is to say: which of both methods, if there are two, then 0 for the partner laid over."""
    directions = [1 - value for _, value in kept["integers"]]
    for chosen in [value for _, value in kept.get("choice", [])] or [None]:
        yield from [] if chosen is None else [int(chosen)]
        yield from [] if chosen == 0 else [directions.pop(0)]


def plans_and_features(sinkhorn: Any, again: Again, align_theirs: Callable[..., Tensor]) -> Iterator[Gap]:
    """The plan, the aligned features and their gradients, for small and for large features."""
    rounded = "costs in the tens of thousands are rounded before they are divided by 0.1"
    for scale, wide, why in ((0.1, False, ""), (1.0, False, rounded), (10.0, False, rounded), (10.0, True, "")):
        plan = features = slopes = 0.0
        for seed in range(10):
            x, _, y = batch(seed)
            generator = torch.Generator().manual_seed(seed)
            f = scale * F.relu(torch.randn(8, 64, 7, 7, generator=generator))
            f = f.double() if wide else f
            towards = torch.randn(8, 49, 64, generator=generator)
            again.kept = {}
            made = AlignMix().plan(x, y, keeping(seed, again.kept))
            again.answers = answers(again.kept)
            map_, tokens = f.clone().requires_grad_(), f.flatten(2).transpose(1, 2).clone().requires_grad_()
            with on_cpu(again):
                other = sinkhorn(tokens.detach(), tokens.detach()[made["index"]])
                theirs = align_theirs(map_, y, again.beta(2.0, 2.0)).flatten(2).transpose(1, 2)
            ours = align(tokens, **made)
            mine = torch.autograd.grad((ours * towards).sum(), tokens)
            slope = torch.autograd.grad((theirs * towards).sum(), map_)[0].flatten(2).transpose(1, 2)
            plan = max(plan, relative([transport_plan(tokens, tokens[made["index"]])], [other]))
            features, slopes = max(features, relative([ours], [theirs])), max(slopes, relative([*mine], [slope]))
        what = f"10 batches of 49 positions, features of size {scale:g}{', 64 bits' if wide else ''}"
        yield Gap(f"Sinkhorn plan, {what}", plan, "relative", why)
        yield Gap(f"aligned features, {what}", features, "relative", why)
        yield Gap(f"their gradients, {what}", slopes, "relative", why)


@beside(
    "alignmix",
    "Westlake-AI/openmixup",
    f"{OPENMIXUP}/alignmix.py",
    held="test_hidden.py::test_alignment_and_its_gradient_are_those_of_the_formula",
)
def alignmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """The transport plan and aligned features."""
    again = Again()
    given: dict[str, Any] = {"torch": torch, "nn": nn, "random": again.answering()}
    file = f"{OPENMIXUP}/alignmix.py"
    sinkhorn, mix, _ = original.names(file, "SinkhornDistance", "alignmix", "mixup_aligned", np=Numpy(again), **given)
    yield from plans_and_features(sinkhorn(0.1, 100), again, lambda f, y, lam: mix(f, y, lam=lam)[0])
    yield again.gap()
