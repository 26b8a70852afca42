"""Views of an image and noise in features: AugMix, NFM, NoisyMix."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from mixers import augmentations, build
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.update import criterion
from originals import Checkout, Gap, Numpy, beside
from originals.same_draws import (
    CLASSES,
    Again,
    batch,
    gradients,
    keeping,
    on_cpu,
    relative,
    sgd,
    space,
    weights,
)

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # what the batches here are taken for
HENDRYCKS = ("augmentations.py", "augment_and_mix.py", "cifar.py")


def normalised(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch that was bytes, its labels, its targets, and the bytes."""
    x, labels, y = batch(seed, size)
    pixels = (x * 60 + 128).round().clamp(0, 255).to(torch.uint8)
    return (pixels / 255 - 0.5) / 0.25, labels, y, pixels


class Chosen:
    """numpy's random functions as AugMix's code calls them, for one image and view of what ours drew."""

    def __init__(self, kept: dict[str, list[Any]], number: int, image: int):
        """``number``: of the view, 0 or 1."""
        values = {kind: [value for _, value in found] for kind, found in kept.items()}
        deep = 3  # draws of operations, levels and sides per view
        of_view = {kind: values[kind][number * deep : number * deep + deep] for kind in ("uniform", "random")}
        integers = values["integers"][number * (deep + 1) :][: deep + 1]
        self.weights = values["dirichlet"][number][image]
        self.own = values["beta"][number][image]
        self.depths = integers[0][:, image]
        self.which = [step[:, image] for step in integers[1:]]
        self.levels, self.sides = ([step[:, image] for step in of_view[kind]] for kind in ("uniform", "random"))
        self.chain, self.at = -1, -1

    def dirichlet(self, alpha: list[float]) -> np.ndarray:
        assert list(alpha) == [1, 1, 1]
        return self.weights

    def beta(self, a: float, b: float) -> float:
        """The share of the chains, where ours draws that of the image."""
        assert (a, b) == (1, 1)
        return 1 - self.own

    def randint(self, low: int, high: int) -> int:
        assert (low, high) == (1, 4)
        self.chain, self.at = self.chain + 1, -1
        return int(self.depths[self.chain])

    def choice(self, operations: list[Any]) -> Any:
        assert [o.__name__ for o in operations] == list(augmentations.OPERATIONS)
        self.at += 1
        return operations[self.which[self.at][self.chain]]

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A level, or, without a range, a side."""
        if (low, high) == (0.0, 1.0):
            return self.random()
        assert (low, high) == (0.1, 3)
        return float(self.levels[self.at][self.chain])

    def random(self) -> float:
        return float(self.sides[self.at][self.chain])


def distorted(original: Checkout, pixels: Tensor, kept: dict[str, list[Any]], number: int) -> Tensor:
    """The view of each image that the published loader makes of its bytes."""
    views = []
    for image, picture in enumerate(pixels):
        chosen = Chosen(kept, number, image)
        names = (
            "int_parameter",
            "float_parameter",
            "sample_level",
            *augmentations.OPERATIONS,
            "augmentations",
            "IMAGE_SIZE",
        )
        given: dict[str, Any] = {"np": Numpy(chosen), "Image": Image, "ImageOps": ImageOps}
        *_, nine, _ = original.names(HENDRYCKS[0], *names, **given)
        args = space(all_ops=False, mixture_width=3, mixture_depth=-1, aug_severity=3)
        own = space(augmentations=nine, augmentations_all=None)
        aug = original.names(HENDRYCKS[2], "aug", np=Numpy(chosen), torch=torch, args=args, augmentations=own)
        views.append(aug(Image.fromarray(picture.permute(1, 2, 0).numpy()), preprocess))
    return torch.stack(views)


def preprocess(image: Image.Image) -> Tensor:
    """To a tensor and normalised, as torchvision's two transforms do it."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - 0.5) / 0.25


def smooth_vit() -> nn.Module:
    """A transformer of two blocks, always the same."""
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=CLASSES)
    return made.train()


def learned(mixer: Any, net: nn.Module, updates: int) -> tuple[list[Any], list[dict[str, list[Any]]]]:
    """Updates of a network by our step on batches that were bytes: the plans and what was drawn for them."""
    optimizer, loss = sgd(net), criterion(Recipe(num_classes=CLASSES))
    plans: list[Any] = []
    draws: list[dict[str, list[Any]]] = []
    for seed in range(updates):
        x, _, y, _ = normalised(32, seed)
        draws.append({})
        out = mixer(net, loss, x, y, keeping(seed, draws[-1]))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        plans.append(out.plan)
    return plans, draws


def ours_of(mixer: Any, x: Tensor, plan: Any) -> list[Tensor]:
    """Our two views of a batch."""
    return [augmentations.view(x, plan[name], mixer.mean, mixer.std) for name in ("view", "other")]


@beside(
    "augmix",
    "google-research/augmix",
    *HENDRYCKS,
    held="test_augmix.py::test_a_view_is_chain_after_chain_of_pillow_and_the_two_blends",
)
def augmix_hendrycks(original: Checkout) -> Iterator[Gap]:
    """Views beside those of the published loader, and gradients and weights of the published loop."""
    mixer: Any = build("augmix", mean=MEAN, std=STD)
    ours = smooth_vit()
    plans, draws = learned(mixer, ours, 20)
    far, pairs = 0.0, []
    off: list[Tensor] = []
    for seed, (plan, kept) in enumerate(zip(plans, draws, strict=True)):
        x, labels, _, pixels = normalised(32, seed)
        mine, theirs = ours_of(mixer, x, plan), [distorted(original, pixels, kept, number) for number in (0, 1)]
        steps = [(a - b).abs() * 255 * STD[0] for a, b in zip(mine, theirs, strict=True)]  # in bytes
        far, off = max(far, float(max(s.max() for s in steps))), [*off, *((s > 0.01).float().mean() for s in steps)]
        pairs.append((x, labels, mine, theirs))
    why = (
        "rotations and shears are rounded down from 32 bits, Pillow's from 64: 1 of 255, which later operations stretch"
    )
    yield Gap(
        "pixels of views that differ by more than 0.01 of 255, 20 batches of 8",
        float(torch.stack(off).mean()),
        "share",
        why,
    )
    yield Gap("their largest difference, of 255", far / 255, "relative", why)
    args = space(no_jsd=False, print_freq=10**9)
    for who, of_whom in (("our views", 2), ("the published loader's views", 3)):
        net = smooth_vit()
        loop = original.names(HENDRYCKS[2], "train", torch=torch, F=F, args=args)
        batches = [((pair[0], *pair[of_whom]), pair[1]) for pair in pairs]
        with on_cpu(None):
            loop(net, batches, sgd(net), space(step=lambda: None))
        what = "20 updates of the published loop, ViT of 2 blocks, 32 pixels"
        yield Gap(
            f"gradients of all parameters, the last of {what}, {who}",
            relative(gradients(ours), gradients(net)),
            "relative",
            why if of_whom == 3 else "",
        )
        yield weights(ours, net, f"{what}, {who}", why if of_whom == 3 else "")


class Seeded:
    """torch for code that draws its noise on a GPU: it gets the noise of the seeds that ours drew, in turn."""

    def __init__(self, seeds: list[int]):
        self.seeds, self.generator = seeds, torch.Generator()
        self.cuda = space(device=self.device, FloatTensor=self.blank)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @contextmanager
    def device(self, _: int) -> Iterator[None]:
        """Entered once for each part that gets noise."""
        self.generator.manual_seed(self.seeds.pop(0))
        yield

    def blank(self, shape: Any) -> Any:
        """A tensor to be filled."""
        return space(
            normal_=lambda: torch.randn(shape, generator=self.generator),
            uniform_=lambda: torch.rand(shape, generator=self.generator),
        )


def noisy_resnet(original: Checkout, again: Any, seeds: list[int], layers: list[int]) -> nn.Module:
    """The published PreActResNet-18 that mixes within itself, without kinks, always the same."""
    again.given["choice"] = lambda options, number: [layers.pop(0)]
    given: dict[str, Any] = {"np": Numpy(again), "torch": Seeded(seeds)}
    *_, mix = original.names("src/noisy_mixup.py", "_noise", "do_noisy_mixup", **given)
    file = "src/cifar_models/preresnet.py"
    own = space(relu=F.gelu, avg_pool2d=F.avg_pool2d)
    needed = ("PreActBlock", "PreActResNet", "PreActResNet18")
    *_, made = original.names(file, *needed, np=Numpy(again), torch=torch, nn=nn, F=own, do_noisy_mixup=mix)
    torch.manual_seed(0)
    net: Any = made(num_classes=CLASSES).train()
    net.feature_info = [{"module": f"layer{n}", "reduction": 2**n} for n in (1, 2, 3, 4)]
    return net


def handed_over(kept: dict[str, list[Any]], again: Again, seeds: list[int], layers: list[int]) -> None:
    """What ours drew for a batch, to the original; integers are the layer, then seeds, then those of views."""
    parts = sum(law == (2.0, 5.0) for law, _ in kept["beta"]) // 2
    again.kept = {"beta": kept["beta"][: 1 + 2 * parts], "permutation": kept["permutation"]}
    drawn = [value for _, value in kept["integers"]]
    layers[:], seeds[:] = [drawn[0]], [int(seed) for seed in drawn[1 : 1 + parts]]


NOISY = ("src/noisy_mixup.py", "src/cifar_models/preresnet.py")


@beside(
    "nfm",
    "erichson/NFM",
    *NOISY,
    held="test_noisy_mixers.py::test_a_step_of_nfm_is_running_the_stages_mixing_adding_noise_and_running_the_rest",
)
def nfm_lim(original: Checkout) -> Iterator[Gap]:
    """Logits, loss, gradients and weights of the published network, mixed by itself and by our hooks."""
    again = Again()
    seeds: list[int] = []
    layers: list[int] = []
    net = noisy_resnet(original, again, seeds, layers)
    other, mixer, loss = copy.deepcopy(net), build("nfm"), criterion(Recipe(num_classes=CLASSES))
    other.blocks = [getattr(other, f"layer{n}") for n in (1, 2, 3, 4)]  # type: ignore[assignment]
    mixer.setup(other)
    weigh = original.names(NOISY[0], "mixup_criterion")
    gaps, met, optimizers = (
        dict.fromkeys(("logits", "loss", "gradients of all parameters"), 0.0),
        set(),
        [sgd(net), sgd(other)],
    )
    for seed in range(20):
        x, labels, y = batch(seed, 32)
        kept: dict[str, list[Any]] = {}
        out = mixer(other, loss, x, y, keeping(seed, kept))
        handed_over(kept, again, seeds, layers)
        with on_cpu(again):
            logits, *targets, lam = net(
                x, targets=labels, mixup_alpha=1.0, manifold_mixup=1, add_noise_level=0.4, mult_noise_level=0.2
            )
        value = weigh(nn.CrossEntropyLoss(), logits, *targets, lam)
        met.add(out.plan["layer"])
        for optimizer, total in zip(optimizers, (value, out.loss), strict=True):
            optimizer.zero_grad()
            total.backward()
        found = ([out.logits], [logits]), ([out.loss], [value]), (gradients(other), gradients(net))
        for name, both in zip(gaps, found, strict=True):
            gaps[name] = max(gaps[name], relative(*both))
        for optimizer in optimizers:
            optimizer.step()
    assert met == {0, 1, 2, 3}
    what = "20 updates, smooth PreActResNet-18, 32 pixels"
    for name, gap in gaps.items():
        yield Gap(f"{name}, {what}", gap, "relative")
    yield weights(other, net, what)
    yield again.gap()


@beside(
    "noisymix",
    "erichson/NoisyMix",
    "cifar.py",
    *NOISY,
    held="test_noisy_mixers.py::test_a_step_of_noisymix_mixes_the_batch_and_both_views_alike_with_noise_of_their_own",
)
def noisymix_erichson(original: Checkout) -> Iterator[Gap]:
    """Gradients and weights of the published loop and network, on the views that ours made."""
    again = Again()
    seeds: list[int] = []
    layers: list[int] = []
    net = noisy_resnet(original, again, seeds, layers)
    other, mixer = copy.deepcopy(net), build("noisymix", mean=MEAN, std=STD)
    other.blocks = [getattr(other, f"layer{n}") for n in (1, 2, 3, 4)]  # type: ignore[assignment]
    mixer.setup(other)
    plans, draws = learned(mixer, other, 20)
    assert {plan["layer"] for plan in plans} == {0, 1, 2, 3}
    args = space(jsd=1, alpha=1.0, manifold_mixup=1, add_noise_level=0.5, mult_noise_level=0.5, sparse_level=0.65)
    weigh = original.names(NOISY[0], "mixup_criterion")
    loop = original.names("cifar.py", "train", torch=torch, F=F, args=args, mixup_criterion=weigh)
    optimizer = sgd(net)
    for seed, (plan, kept) in enumerate(zip(plans, draws, strict=True)):
        x, labels, _, _ = normalised(32, seed)
        handed_over(kept, again, seeds, layers)
        with on_cpu(again):
            loop(net, [((x, *ours_of(mixer, x, plan)), labels)], optimizer, space(step=lambda: None))
    what = "20 updates of the published loop, smooth PreActResNet-18, 32 pixels"
    yield Gap(
        f"gradients of all parameters, the last of {what}", relative(gradients(other), gradients(net)), "relative"
    )
    yield weights(other, net, what)
    yield again.gap()
