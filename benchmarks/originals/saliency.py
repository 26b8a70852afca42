"""Methods that look at where images are salient before they mix them."""

import contextlib
import copy
import importlib
import math
import random
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms

from mixers import Step, build, grids, taps
from mixers.guidedmix import LUMA, spectral_residual
from mixers.snapmix import semantic_map
from mixers.supermix import finds_both
from originals import Checkout, Gap, Numpy, beside

CLASSES = 10
UPDATES = 20
CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")
space = types.SimpleNamespace


class Drawn:
    """A generator that keeps what it gave, and with which arguments, so that the original can be given the same."""

    def __init__(self, seed: int, kept: dict[str, list[Any]]):
        self.rng, self.kept = np.random.default_rng(seed), kept

    def __getattr__(self, kind: str) -> Any:
        def draw(*args: Any, **options: Any) -> Any:
            value = getattr(self.rng, kind)(*args, **options)
            self.kept.setdefault(kind, []).append((tuple(np.asarray(a).tolist() for a in args), value))
            return value

        return draw


class Again:
    """The random functions of the originals: what ``kept`` holds, in turn; ``other`` counts draws of other laws."""

    def __init__(self, kept: dict[str, list[Any]], **given: Callable[..., Any]):
        self.kept, self.given = kept, given
        self.asked = self.other = 0

    def __getattr__(self, name: str) -> Any:
        def draw(*args: Any, **options: Any) -> Any:
            expected, found = self.kept["integers" if name == "randint" else name].pop(0)
            self.asked += 1
            self.other += int(expected != tuple(np.asarray(value).tolist() for value in args))
            return found

        return self.given.get(name, draw)

    def gap(self) -> Gap:
        """Whether the original asked for the laws that ours drew from."""
        return Gap(f"the laws that are drawn from, {self.asked:,} draws", self.other / self.asked, "share")


class Meter:
    """What the originals' loops count with."""

    val = avg = sum = 0.0

    def __init__(self, *args: Any, **options: Any):
        self.update = self.add = self.display = self.value = lambda *args: 0.0


class Sgd(torch.optim.SGD):
    """Plain steps, which keep the gradients of the first."""

    def __init__(self, model: nn.Module):
        super().__init__(model.parameters(), lr=0.01, momentum=0.9)
        self.weights = list(model.parameters())
        self.first: list[Tensor] = []
        self.losses: list[float] = []

    def step(self, closure: Any = None) -> Any:
        """One update."""
        self.first = self.first or [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.weights]
        return super().step(closure)


@contextlib.contextmanager
def on_cpu(draws: Any, **also: Callable[..., Any]) -> Iterator[None]:
    """Originals stay on the CPU, and pair a batch as ours did; ``also`` replaces other functions of torch."""
    permuted = {"randperm": lambda n, **options: torch.as_tensor(draws.permutation(n))} | also
    with contextlib.ExitStack() as stack:
        for kind in (Tensor, nn.Module):
            stack.enter_context(mock.patch.object(kind, "cuda", lambda self, *args, **options: self))
        for name, function in permuted.items():
            stack.enter_context(mock.patch.object(torch, name, function))
        yield


def batch(seed: int, size: int = 64, count: int = 8, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Images with a few bright or dark blobs on a smooth ground, labels, and the labels as targets."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 16, size // 16, generator=generator)
    blobs = F.interpolate(torch.randn(count, 1, size // 8, size // 8, generator=generator) ** 3 / 3, (size, size))
    x = 0.5 * F.interpolate(coarse, (size, size), mode="bicubic") + 0.4 * blobs
    x += 0.05 * torch.randn(count, 3, size, size, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return x.clamp(-2, 2), labels, F.one_hot(labels, classes).float()


def network(name: str, classes: int = CLASSES, **options: Any) -> Any:
    """A timm model of seed 0, whose BatchNorm has seen some images: else it would blow up in evaluation mode."""
    torch.manual_seed(0)
    options |= {"img_size": 64} if name.startswith("vit") else {"zero_init_last": False, **options}
    model = timm.create_model(name, num_classes=classes, **options).train()
    with torch.no_grad():
        for seed in range(20):
            model(batch(1000 + seed)[0])
    return model


def farthest(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference; infinite where one is not a number."""
    return float((ours.detach().double() - theirs.detach().double()).abs().nan_to_num(math.inf).max())


def relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of all tensors, relative to the largest value of the original's."""
    return max(map(farthest, ours, theirs)) / max(float(t.detach().abs().max()) for t in theirs)


def updated(mixer: Any, model: nn.Module, batches: list[Any], kept: dict[str, list[Any]], criterion: Any) -> Sgd:
    """The optimiser of a model that ours trained, a step for each of the batches."""
    step = Step(model.train(), mixer, criterion)
    optimizer = Sgd(model)
    for seed, (x, _, y) in enumerate(batches):
        optimizer.zero_grad()
        loss = step(x.clone(), y, Drawn(seed, kept)).loss
        loss.backward()
        optimizer.losses.append(float(loss.detach()))
        optimizer.step()
    return optimizer


def both_updated(ours: Sgd, theirs: Sgd, what: str, why: str = "") -> Iterator[Gap]:
    """The gradients of the first update, and the weights after the last."""
    yield Gap(f"gradients of all parameters, first update, {what}", relative(ours.first, theirs.first), "relative", why)
    gap = relative(ours.weights, theirs.weights)  # type: ignore[arg-type]
    yield Gap(f"weights after {UPDATES} updates, {what}", gap, "relative", why)


def peak(x: Any) -> Any:
    """A detector for the originals: a map that is 1 at the pixel that ours finds, of an image (H, W, 3)."""
    image = torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1)[None]
    row, column = build("saliencymix").salient_pixel(image)[0]
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
    mixer, boxes = build("saliencymix", box_from="first"), 0
    for seed in range(500):
        x, _, y = batch(seed, count=2)
        plan = mixer.plan(x, y, Drawn(seed, kept))
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
    yield from both_updated(ours, optimizer, "ResNet-18, 64 x 64 pixels, our detector in both")
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
    given = {"np": Numpy(again), "torch": torch, "StaticSaliencyFineGrained_create": lambda: DETECTOR}
    function = original.names("openmixup/models/augments/saliencymix.py", "saliencymix", **given)
    for first, why in ((True, ""), (False, "Every sample has its own box, around the peak of its own partner.")):
        images = weights = 0.0
        mixer = build("saliencymix", box_from="first" if first else "each")
        for seed in range(200):
            x, _, y = batch(seed)
            mixed, target = mixer.mix(x, y, **mixer.plan(x, y, Drawn(seed, kept)))
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
    teacher, mixer = network("resnet18").eval(), build("attentivemix")
    mixer.frozen = taps.Frozen(teacher)
    theirs = space(backbone_k=lambda images: [teacher.forward_features(images)])
    for size in (224, 160, 64):
        attention = cells = images = weights = 0.0
        for seed in range(3):
            x, _, y = batch(seed, size)
            plan = mixer.plan(x, y, Drawn(seed, kept))
            mixed, target = mixer.mix(x, y, **plan)
            with on_cpu(again), torch.no_grad():
                features = look(theirs, x, cur_mode="attentivemix")
                (found, mask), (y_a, y_b, lam) = augment(x, y, 2.0, features=features, top_k=None, return_mask=True)
            attention = max(attention, relative([mixer.attention(x)], [features.mean(1)]))
            cells = max(cells, float((plan["mask"] != mask).float().mean()))
            images = max(images, farthest(mixed, found))
            weights = max(weights, farthest(target, lam * y_a + (1 - lam) * y_b))
        what = f"{size} x {size} pixels, ResNet-18 as teacher, in evaluation mode in both"
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
    plan = mixer.plan(x, y, Drawn(0, kept))
    with on_cpu(again), torch.no_grad():
        features = look(theirs, x, cur_mode="attentivemix")
        (_, mask), _ = augment(x, y, 2.0, features=features, top_k=None, return_mask=True)
    why = "OpenMixup leaves its teacher in training mode, which takes the statistics of the batch."
    share = float((plan["mask"] != mask).float().mean())
    yield Gap("the cells that are kept, their teacher in training mode, 32 images", share, "share", why)
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


class Settings(dict):  # type: ignore[type-arg]
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
    given = {"np": Numpy(again), "torch": torch, "F": F, "utils": space(rand_bbox=box)}
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
    model, mixer = network("resnet18"), build("snapmix", same_label_twice=True)
    maps = images = weights = 0.0
    for seed in range(30):
        x, labels, y = batch(seed)
        plan = mixer.plan(x, y, Drawn(seed, kept), model)
        mixed, target = mixer.mix(x, y, **plan)
        with on_cpu(again):
            wrapped = TwoOutputs(model, evaluating=True)
            found = get_spm(x, labels, conf, wrapped)[0]
            theirs, _, labels_b, lam_a, lam_b = function(x.clone(), labels, conf, wrapped)
        maps, images = max(maps, relative([semantic_map(model, x, y)], [found])), max(images, farthest(mixed, theirs))
        both = lam_a[:, None] * y + lam_b[:, None] * F.one_hot(labels_b, CLASSES)
        weights = max(weights, farthest(plan["weight"][:, None] * target, both))
    yield Gap("semantic maps, ResNet-18 in evaluation mode in both, 64 x 64 pixels, 30 batches", maps, "relative")
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
        yield from both_updated(ours, optimizer, f"ResNet-18, looked at in {mode}", "" if evaluating else why)
    yield again.gap()


class Loader(list):  # type: ignore[type-arg]
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
    model, mixer = network("resnet18"), build("snapmix", same_label_twice=True)
    images = weights = 0.0
    for seed in range(30):
        x, labels, y = batch(seed)
        plan = mixer.plan(x, y, Drawn(seed, kept), model)
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
    process = original.names("supermix.py", "mask_process", torch=torch, F=F)

    def recorded(*args: Any, **options: Any) -> Tensor:
        seen.append(process(*args, **options))
        return seen[-1]

    given = {"np": Numpy(Again(kept)), "torch": torch, "nn": nn, "F": F, "math": math, "copy": copy}
    given |= {"Variable": torch.autograd.Variable, "mask_process": recorded}
    names = ("Smoothing", "smoother", "onehot", "kldiv2", "mix_batch")
    with on_cpu(None):
        *_, search = original.names("supermix.py", *names, opt=space(n_classes=CLASSES, lambda_s=25.0), **given)
    even = "Their smoothing kernel has 10 taps for a sigma of 2, and shifts by half a cell; ours has 11."
    once = "Where half and half already shows both classes ours keeps that; the published search takes one step first."
    for sigma, steps, why in ((1.0, 1, ""), (1.0, 3, ""), (2.0, 1, even)):
        mixer, apart, found = build("supermix", grid=8 * int(sigma), sigma=sigma, steps=steps), [0.0], [0.0]
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
        what = f"sigma {sigma:g}, ResNet-18 as teacher, 64 x 64 pixels"
        yield Gap(f"masks after {steps} steps, {len(apart) - 1} pairs of two classes, {what}", max(apart), why=why)
        if not why:
            yield Gap(f"masks after {steps} steps, {len(found) - 1} pairs found at once, {what}", max(found), why=once)


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
    file, given = "FGVC/Implementor/guidedmixup.py", {"np": np, "torch": torch, "copy": copy}
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
    mixer = build("guidedmix", source="spectral", share=1.0).mixers[1]
    for luma, reason in (((0.2989, 0.587, 0.114), ""), (LUMA, why)):
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
        ("sr", "resnet18", why),
        ("ap", "vit_tiny_patch16_224", ""),
        ("ap", "resnet18", mode),
    ):
        model, batches = network(name), [batch(seed) for seed in range(UPDATES)]
        theirs_model = copy.deepcopy(model)
        switch = build("guidedmix", source={"sr": "spectral", "ap": "gradient"}[source], share=1.0)
        ours = updated(switch, model, batches, {}, CROSS_ENTROPY)
        self = learner(source, theirs_model)
        with on_cpu(None):
            loop(self, [(x.clone(), labels) for x, labels, _ in batches], 1)
        yield from both_updated(ours, self.optimizer, f"{name}, {switch.mixers[1].source} saliency", reason)


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
    mixer = build("guidedmix", source="gradient", share=1.0).mixers[1]
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
        yield Gap(f"partners by its greedy search on its saliency, 20 batches of 8, {name}", partners, "share")
        yield Gap(f"mixed images with those partners, gradient saliency, 20 batches of 8, {name}", images)
        yield Gap(f"label weights with those partners, 20 batches of 8, {name}", weights)


class Head(nn.Module):
    """OpenMixup's head as its classifier calls it, of a network that gives logits itself."""

    def forward(self, x: Any) -> list[Tensor]:
        """The logits, in a list."""
        return x if isinstance(x, list) else [x]

    def loss(self, logits: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The mean cross entropy."""
        return {"loss": F.cross_entropy(logits[0], labels)}


class OnCpu:
    """torch for code that names a device: its new tensors are on the CPU. Of equal values ``topk`` takes the first."""

    @staticmethod
    def topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """torch leaves open which of equal values it takes."""
        found, order = values.sort(descending=True, stable=True)
        return found[:k], order[:k]

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("zeros", "ones", "tensor", "eye"):
            return found
        return lambda *args, device=None, **options: found(*args, **options)


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
            slope, prior, *edges = costs
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
        again.other += int(expected != (high - low,))
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
        mixer = build("puzzlemix", blocks=[2, 4, 8, 16], **options)
        solved = Solved(mixer)
        names = ("get_lambda", "cost_matrix", "cost_matrix_dict", "neigh_penalty", "mask_transport", "transport_image")
        given = {"np": Numpy(again), "torch": OnCpu(), "F": F, "graphcut_multi": solved, "device": "cpu"}
        process = original.names("mixup.py", "mixup_process", "mixup_graph", *names, **given)[0]
        args = {"adv_p": 0.0, "adv_eps": 10.0, "clean_lam": 0.0, "num_classes": CLASSES, **RGB, **theirs}
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
        drawn = mock.patch.object(Tensor, "uniform_", lambda self, *args: self.copy_(torch.as_tensor(noises.pop(0))))
        loader = [(x.clone(), labels) for x, labels, _ in batches]
        with on_cpu(again), drawn:
            train(loader, PuzzleNet(theirs_model, process), optimizer, 0, space(**args), None)
        what = ", ".join([name, *(f"{key}={value:g}" for key, value in options.items()), "our masks in both"])
        if not options:
            yield from solved.gaps(cut)
        yield from both_updated(ours, optimizer, what)
        yield again.gap()

    yield empty_places(original)


def empty_places(original: Checkout) -> Gap:
    """Places that the code leaves empty because their block has no gradient at all, as in a fresh timm ResNet."""
    names = ("mask_transport", "cost_matrix", "cost_matrix_dict")
    transport = original.names("mixup.py", *names, np=np, torch=torch, device="cpu")[0]
    model, mixer, empty, places = network("resnet18", zero_init_last=True), build("puzzlemix", blocks=[4]), 0, 0
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


class Listed(nn.Module):
    """A network as OpenMixup's classifier has it: a list of features, here of the logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> list[Tensor]:
        """The logits, in a list."""
        return [self.inner(x)]


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
        mixer = build("puzzlemix")
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
        what = f"{name}, loss of {'mixed' if soft else 'whole'} labels, our masks in both"
        yield Gap(f"loss of the first update, {what}", abs(ours.losses[0] - float(losses[0])), why="" if soft else why)
        yield from both_updated(ours, optimizer, what, "" if soft else why)
        yield again.gap()


class Sweeps:
    """In place of gco, for Co-Mixup: labels by the sweeps of ours, of one mosaic at a time."""

    def __init__(self, part: int):
        self.part, self.calls = part, 0

    def cut_grid_graph(self, unary: Any, pairwise: Any, down: Any, right: Any, algorithm: str) -> np.ndarray:
        """The labels (h w,), as ours finds them; from the second round on from two starts."""
        turn = self.calls // self.part
        self.calls += 1
        prices = (float(down[0, 0]) * pairwise)[None]
        found = grids.swept(np, np.zeros((1, 1, 1), int), unary[None].copy(), prices, (), 2, twice=turn > 0)
        return np.asarray(found).ravel()


@beside(
    "comixup",
    "snu-mllab/Co-Mixup",
    "comix-imagenet/main_fast_ddp.py",
    "comix-imagenet/lib/utils.py",
    "match.py",
    held="test_comixup.py::test_all_parts_at_once_give_what_the_loop_gives_part_by_part_also_unread",
)
def comixup_loop(original: Checkout) -> Iterator[Gap]:
    """The published loop for ImageNet with our solver in place of its graph cuts, then with the graph cuts."""
    file, part = "comix-imagenet/lib/utils.py", 16
    settings = {"alpha": 1.0, "part": part, "niter": 3, "stride": 8, "omega": 0.0}
    names = ("to_onehot", "random_initialize", "distance", "mix_input", "graphcut_multi", "mixup_match")
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
    configs = {"alpha": 1.0, "set_resolve": True, "thres": 0.83, "block_num": 4, "lam_dist": 0.0, "m_beta": 0.32}
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

        mixer, model = build("comixup", **settings), network(name)
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
                lambda epoch: 0.01,
            )
        yield from both_updated(ours, optimizer, f"{name}, parts of {part}, omega=0, our solver in both")
    yield from mosaics(matcher, sweeps, again, kept, laws)


def mosaics(matcher: Any, sweeps: Sweeps, again: Again, kept: dict[str, list[Any]], laws: Any) -> Iterator[Gap]:
    """Mosaics and labels of parts with the same saliency, first by our solver in both, then by graph cuts in theirs."""
    crowded = "The code sums the images over the threshold through A; ours, as the paper, takes p where p is over it."
    search = "Graph cuts are swaps, ours sweeps; where labels differ either may be of less energy."
    cuts = importlib.import_module("gco")
    for gco, omega, solved_by, reason in (
        (sweeps, 0.0, "our solver in both", ""),
        (sweeps, 0.001, "our solver in both", crowded),
        (cuts, 0.0, "graph cuts in theirs", search),
    ):
        how = f"omega={omega:g}, {solved_by}"
        functions, differing, images, weights = matcher(gco, again), 0.0, 0.0, 0.0
        mixer = build("comixup", alpha=1.0, part=16, niter=3, stride=8, omega=omega)
        for seed in range(8):
            x, _, y = batch(seed, count=16)
            y = torch.eye(16)
            saliency = x - x.mean((2, 3), keepdim=True)
            plan = mixer.plan(x, y, Drawn(seed, kept), lambda images, saliency=saliency: saliency)
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
