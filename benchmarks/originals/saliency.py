"""Methods that look at where images are salient before they mix them."""

import contextlib
import copy
import math
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import taps
from mixers.snapmix import semantic_map
from mixers.supermix import finds_both
from originals import Checkout, Gap, Numpy, beside
from originals.looking import (
    CROSS_ENTROPY,
    LABEL,
    UPDATES,
    Meter,
    Sgd,
    batch,
    both_updated,
    made,
    network,
    updated,
)
from originals.openmixup_step import HARD, STEP, Listed, classifier, head, run
from originals.same_draws import CLASSES, Again, farthest, keeping, on_cpu, relative, space, twenty_updates


def peak(x: Any) -> Any:
    """A detector for the originals: a map that is 1 at the pixel that ours finds, of an image (H, W, 3)."""
    image = torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None]
    row, column = made("saliencymix").salient_pixel(image)[0]
    found = np.zeros(x.shape[:2], dtype=np.float32)
    found[row, column] = 1
    return True, found


DETECTOR = space(computeSaliency=peak)


@beside(
    "saliencymix",
    "SaliencyMix/SaliencyMix",
    "SaliencyMix-ImageNet/train.py",
    held="test_parity.py::test_saliencymix_pastes_a_box_around_the_salient_pixel_of_the_partner",
)
def saliencymix_loop(original: Checkout) -> Iterator[Gap]:
    """The published loop for ImageNet, with our detector in place of OpenCV's, on the box of the first partner."""
    kept: dict[str, list[Any]] = {}
    again = Again(kept, rand=np.zeros)
    bbox, train = original.names(
        "SaliencyMix-ImageNet/train.py",
        "saliency_bbox",
        "train",
        np=Numpy(again),
        torch=torch,
        time=mock.MagicMock(),
        AverageMeter=Meter,
        accuracy=lambda *args, **options: (torch.zeros(1),) * 2,
        get_learning_rate=lambda optimizer: [0],
        print=lambda *args: None,
        cv2=space(saliency=space(StaticSaliencyFineGrained_create=lambda: DETECTOR)),
        args=space(beta=1.0, salmix_prob=1.0, print_freq=1, verbose=False, epochs=1),
    )
    mixer, boxes = made("saliencymix", box_from="first"), 0
    for seed in range(500):
        x, _, y = batch(seed, count=2)
        plan = mixer.plan(x, y, keeping(seed, kept))
        theirs = torch.ones(64, 64)
        lam = again.beta(1.0, 1.0)
        top, left, bottom, right = bbox(x[again.permutation(2)[0]], lam)
        theirs[top:bottom, left:right] = 0
        boxes += int(not torch.equal(plan["mask"][0, 0], theirs))
    yield Gap("the box around the pixel that our detector finds, 500 draws, 64 x 64 pixels", boxes / 500, "share")
    batches, model = [batch(seed) for seed in range(UPDATES)], network("resnet18")
    theirs_model = copy.deepcopy(model).train()
    optimizer = Sgd(theirs_model)
    ours = updated(mixer, model, batches, kept, CROSS_ENTROPY)
    with on_cpu(again):
        train([(x.clone(), labels) for x, labels, _ in batches], theirs_model, nn.CrossEntropyLoss(), optimizer, 0)
    yield from both_updated(ours, optimizer, f"{LABEL['resnet18']}, 64 x 64 pixels, our detector in both")
    yield again.gap()


@beside(
    "saliencymix",
    "Westlake-AI/openmixup",
    "openmixup/models/augments/saliencymix.py",
    held="test_parity.py::test_saliencymix_pastes_a_box_around_the_salient_pixel_of_the_partner",
)
def saliencymix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Mixed images and label weights of OpenMixup's function, with our detector in place of OpenCV's."""
    kept: dict[str, list[Any]] = {}
    again = Again(kept)
    given: dict[str, Any] = {"np": Numpy(again), "torch": torch, "StaticSaliencyFineGrained_create": lambda: DETECTOR}
    function = original.names("openmixup/models/augments/saliencymix.py", "saliencymix", **given)
    for first, why in ((True, ""), (False, "Every sample has its own box, around the peak of its own partner.")):
        images = weights = 0.0
        mixer = made("saliencymix", box_from="first" if first else "each")
        for seed in range(200):
            x, _, y = batch(seed)
            mixed, target = mixer.mix(x, y, **mixer.plan(x, y, keeping(seed, kept)))
            with on_cpu(again):
                theirs, (y_a, y_b, lam) = function(x.clone(), y)
            images = max(images, farthest(mixed, theirs))
            weights = max(weights, farthest(target, y_a * lam + y_b * (1 - lam)))
        how = f'box_from="{mixer.box_from}", 200 batches of 8, our detector in both'
        yield Gap(f"mixed images, 64 x 64 pixels, {how}", images, why=why)
        yield Gap(f"label weights, {how}", weights, why=why)
    yield again.gap()


@beside(
    "attentivemix",
    "Westlake-AI/openmixup",
    "openmixup/models/augments/attentivemix.py",
    "openmixup/models/classifiers/mixup_classification.py",
    held="test_attentivemix.py::test_a_sample_keeps_the_cells_that_the_teacher_attends_to_most",
)
def attentivemix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Attention, cells, images and label weights of OpenMixup, by a teacher with the same weights."""
    kept: dict[str, list[Any]] = {}
    again = Again(kept)
    augment = original.names(
        "openmixup/models/augments/attentivemix.py", "attentivemix", np=Numpy(again), torch=torch, F=F
    )
    look = original.method(
        "openmixup/models/classifiers/mixup_classification.py", "MixUpClassification", "_features", F=F, torch=torch
    )
    teacher, mixer = network("resnet18").eval(), made("attentivemix")
    mixer.frozen = taps.Frozen(teacher)
    theirs = space(backbone_k=lambda images: [teacher.forward_features(images)])
    for size in (224, 160, 64):
        attention = cells = images = weights = 0.0
        for seed in range(3):
            x, _, y = batch(seed, size)
            plan = mixer.plan(x, y, keeping(seed, kept))
            mixed, target = mixer.mix(x, y, **plan)
            with on_cpu(again), torch.no_grad():
                features = look(theirs, x, cur_mode="attentivemix")
                (found, mask), (y_a, y_b, lam) = augment(x, y, 2.0, features=features, top_k=None, return_mask=True)
            attention = max(attention, relative([mixer.attention(x)], [features.mean(1)]))
            cells = max(cells, float((plan["mask"] != mask).float().mean()))
            images = max(images, farthest(mixed, found))
            weights = max(weights, farthest(target, lam * y_a + (1 - lam) * y_b))
        what = f"{size} x {size} pixels, {LABEL['resnet18']} as teacher, in evaluation mode in both"
        yield Gap(f"attention of the teacher, {what}", attention, "relative")
        yield Gap(f"the cells that are kept, {what}", cells, "share")
        yield Gap(f"mixed images, {what}", images)
        why = (
            ""
            if size % 7 == 0
            else "OpenMixup gives every sample the first one's share; ours counts the pixels of each."
        )
        yield Gap(f"label weights, {what}", weights, why=why)
    teacher = copy.deepcopy(teacher).train()
    x, _, y = batch(0, 64, count=32)
    plan = mixer.plan(x, y, keeping(0, kept))
    with on_cpu(again), torch.no_grad():
        features = look(theirs, x, cur_mode="attentivemix")
        (_, mask), _ = augment(x, y, 2.0, features=features, top_k=None, return_mask=True)
    why = "OpenMixup leaves its teacher in training mode, which takes the statistics of the batch."
    share = float((plan["mask"] != mask).float().mean())
    yield Gap("the cells that are kept, their teacher in training mode, 32 images", share, "share", why)
    yield again.gap()


@beside(
    "attentivemix",
    "Westlake-AI/openmixup",
    "openmixup/models/augments/attentivemix.py",
    *STEP,
    HARD,
    held="test_attentivemix.py::test_a_sample_keeps_the_cells_that_the_teacher_attends_to_most",
)
def attentivemix_updates(original: Checkout) -> Iterator[Gap]:
    """OpenMixup's whole step beside ours, by a teacher with the same weights, in evaluation mode in both."""
    again, mixer, teacher = Again(), made("attentivemix"), network("resnet18").eval()
    mixer.frozen = taps.Frozen(teacher)
    file = "openmixup/models/augments/attentivemix.py"
    augment = original.names(file, "attentivemix", np=Numpy(again), torch=torch, F=F)
    look = original.method(STEP[0], "MixUpClassification", "_features", F=F, torch=torch)

    def theirs(model: nn.Module) -> None:
        step = classifier(original, "attentivemix", 2.0, Listed(model), head(original), top_k=None)
        step.dynamic_mode, step._features = {"attentivemix": augment}, types.MethodType(look, step)
        step.backbone_k = lambda images: [teacher.forward_features(images).detach()]
        run(step, again, 112)

    yield from twenty_updates(mixer, theirs, again, ", ResNet-18 of SiLU and mean pooling as teacher", size=112)
    yield again.gap()


class TwoOutputs(nn.Module):
    """A timm ResNet as SnapMix's code has its networks: logits, last feature, and nothing."""

    def __init__(self, model: Any, evaluating: bool = False):
        super().__init__()
        self.inner, self.evaluating, self.module = model, evaluating, space(classifier=model.fc)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        """One pass, in evaluation mode where it is asked for."""
        with taps.evaluating(self.inner) if self.evaluating else contextlib.nullcontext():
            feature = self.inner.forward_features(x)
            return self.inner.forward_head(feature), feature.detach(), None


class Settings(dict[str, Any]):
    """Settings as SnapMix's code reads them: entries that are attributes too."""

    __getattr__ = dict.__getitem__


@beside(
    "snapmix",
    "Shaoli-Huang/SnapMix",
    "utils/mixmethod.py",
    "utils/custom_ops.py",
    "trainer/comm_train.py",
    held="test_saliency_mixers.py::test_a_step_of_snapmix_is_the_formula",
)
def snapmix_loop(original: Checkout) -> Iterator[Gap]:
    """Maps, images, weights of the labels and the published loop, whose look at the clean batch trains BatchNorm."""
    kept: dict[str, list[Any]] = {}
    again = Again(kept, rand=np.zeros)
    box = original.names("utils/custom_ops.py", "rand_bbox", np=Numpy(again))
    given: dict[str, Any] = {"np": Numpy(again), "torch": torch, "F": F, "utils": space(rand_bbox=box)}
    get_spm, function = original.names("utils/mixmethod.py", "get_spm", "snapmix", **given)
    train = original.names(
        "trainer/comm_train.py",
        "train",
        torch=torch,
        time=mock.MagicMock(),
        AverageMeter=Meter,
        AverageAccMeter=Meter,
        tqdm=lambda loader, **options: Loader(loader),
        snapmix=function,
    )
    conf = Settings(cropsize=64, netname="resnet18", prob=1.0, beta=5.0, mixmethod="snapmix")
    model, mixer = network("resnet18"), made("snapmix", same_label_twice=True)
    model.layer4[-1].act2 = nn.ReLU()  # their maps are of what a ReLU leaves
    maps = images = weights = 0.0
    for seed in range(30):
        x, labels, y = batch(seed)
        plan = mixer.plan(x, y, keeping(seed, kept), model)
        mixed, target = mixer.mix(x, y, **plan)
        with on_cpu(again):
            wrapped = TwoOutputs(model, evaluating=True)
            found = get_spm(x, labels, conf, wrapped)[0]
            theirs, _, labels_b, lam_a, lam_b = function(x.clone(), labels, conf, wrapped)
        maps, images = max(maps, relative([semantic_map(model, x, y)], [found])), max(images, farthest(mixed, theirs))
        both = lam_a[:, None] * y + lam_b[:, None] * F.one_hot(labels_b, CLASSES)
        weights = max(weights, farthest(plan["weight"][:, None] * target, both))
    yield Gap(
        f"semantic maps, {LABEL['resnet18']} in evaluation mode in both, 64 x 64 pixels, 30 batches", maps, "relative"
    )
    yield Gap("mixed images, 30 batches of 8", images)
    yield Gap("weights of the classes, 30 batches of 8, same_label_twice=True", weights)
    why = "The published code looks in training mode, and so moves the running statistics twice."
    for evaluating in (True, False):
        batches, ours_model = [batch(seed) for seed in range(UPDATES)], copy.deepcopy(model)
        theirs_model = copy.deepcopy(model)
        optimizer = Sgd(theirs_model)
        ours = updated(mixer, ours_model, batches, kept, CROSS_ENTROPY)
        loader = [(x.clone(), labels) for x, labels, _ in batches]
        looked = TwoOutputs(theirs_model, evaluating)
        with on_cpu(again):
            train(loader, TwoOutputs(theirs_model), CROSS_ENTROPY, optimizer, conf, looked)
        mode = "evaluation mode in both" if evaluating else "training mode in theirs"
        yield from both_updated(ours, optimizer, f"{LABEL['resnet18']}, looked at in {mode}", "" if evaluating else why)
    yield again.gap()


class Loader(list[Any]):
    """Batches with the progress bar of tqdm, which shows nothing."""

    def set_postfix(self, **shown: Any) -> None:
        """Nothing."""


@beside(
    "snapmix",
    "Westlake-AI/openmixup",
    "openmixup/models/augments/snapmix.py",
    held="test_saliency_mixers.py::test_a_step_of_snapmix_is_the_formula",
)
def snapmix_openmixup(original: Checkout) -> Iterator[Gap]:
    """OpenMixup's function on our maps: its own classifier hands it a tuple that it cannot use."""
    kept: dict[str, list[Any]] = {}
    again = Again(kept)
    function = original.names("openmixup/models/augments/snapmix.py", "snapmix", np=Numpy(again), torch=torch, F=F)
    model, mixer = network("resnet18"), made("snapmix", same_label_twice=True)
    model.layer4[-1].act2 = nn.ReLU()  # their maps are of what a ReLU leaves
    images = weights = 0.0
    for seed in range(30):
        x, labels, y = batch(seed)
        plan = mixer.plan(x, y, keeping(seed, kept), model)
        mixed, target = mixer.mix(x, y, **plan)
        with on_cpu(again):
            theirs, (_, labels_b, lam_a, lam_b) = function(x.clone(), labels, 5.0, features=semantic_map(model, x, y))
        both = lam_a[:, None] * y + lam_b[:, None] * F.one_hot(labels_b, CLASSES)
        weights = max(weights, farthest(plan["weight"][:, None] * target, both))
        images = max(images, farthest(mixed, theirs))
    yield Gap("mixed images, 30 batches of 8, 64 x 64 pixels, our maps in both", images)
    yield Gap("weights of the classes, 30 batches of 8, our maps in both, same_label_twice=True", weights)
    yield again.gap()


@beside(
    "supermix",
    "alldbi/SuperMix",
    "supermix.py",
    held="test_supermix.py::test_the_masks_are_those_of_the_search_of_each_sample_alone",
)
def supermix_search(original: Checkout) -> Iterator[Gap]:
    """The masks of the published search, step by step, towards the classes that the teacher sees."""
    kept: dict[str, list[Any]] = {}
    teacher, seen = network("resnet18").eval(), []
    with torch.no_grad():  # so that it sees several classes
        teacher.fc.weight *= 10
        teacher.fc.bias -= teacher(batch(0, count=64)[0]).mean(0)
    process = original.names("supermix.py", "mask_process", torch=torch, F=F)

    def recorded(*args: Any, **options: Any) -> Tensor:
        seen.append(process(*args, **options))
        return seen[-1]

    given: dict[str, Any] = {"np": Numpy(Again(kept)), "torch": torch, "nn": nn, "F": F, "math": math, "copy": copy}
    given |= {"Variable": torch.autograd.Variable, "mask_process": recorded}
    names = ("Smoothing", "smoother", "onehot", "kldiv2", "mix_batch")
    with on_cpu(None):
        *_, search = original.names("supermix.py", *names, opt=space(n_classes=CLASSES, lambda_s=25.0), **given)
    even = "Their smoothing kernel has 10 taps for a sigma of 2, and shifts by half a cell; ours has 11."
    once = "Where half and half already shows both classes ours keeps that; the published search takes one step first."
    for sigma, steps, why in ((1.0, 1, ""), (1.0, 3, ""), (2.0, 1, even)):
        mixer, apart, found = made("supermix", grid=8 * int(sigma), sigma=sigma, steps=steps), [0.0], [0.0]
        for seed in range(6):
            x, _, _ = batch(seed)
            label = teacher(x).argmax(1)
            index, lam = torch.arange(8).roll(-1), np.random.default_rng(seed).beta(3.0, 3.0, 8)
            kept["dirichlet"] = [(([3.0, 3.0], 1), np.array([[share, 1 - share]])) for share in lam]
            with on_cpu(None):
                search(teacher, x, 2, 3.0, mixer.grid, sigma, steps, toler=-1)
            rng: Any = space(beta=lambda *args, lam=lam: lam)
            plan = mixer.plan(x, F.one_hot(label, CLASSES).float(), rng, teacher)
            gap = (plan["mask"] - seen[-1][:, 0]).abs().amax((1, 2, 3))
            both = finds_both(teacher((x + x[index]) / 2), torch.stack([label, label[index]], 1))
            apart += gap[(label != label[index]) & ~both].tolist()
            found += gap[(label != label[index]) & both].tolist()
        what = f"sigma {sigma:g}, {LABEL['resnet18']} as teacher, 64 x 64 pixels"
        yield Gap(f"masks after {steps} steps, {len(apart) - 1} pairs of two classes, {what}", max(apart), why=why)
        if not why:
            yield Gap(f"masks after {steps} steps, {len(found) - 1} pairs found at once, {what}", max(found), why=once)
