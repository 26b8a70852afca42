"""Checks of the mix: what becomes of images and targets."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Plan
from .contract import check
from .parts import CLASSES, Factory, batch, differences, expect, gap, rng_of, tiny_step, updates


@check
def inputs_untouched(factory: Factory) -> None:
    """The caller's images and targets keep their values and their gradient flags."""
    step, (x, y) = tiny_step(factory), batch()
    given = {"images": x, "targets": y}
    before = {name: value.clone() for name, value in given.items()}
    for out in updates(step, x, y, 3):
        step.mixer.mix(x, y, **out.plan)
        found = differences(before, given)
        expect(not found, "images and targets that were not written to", f"changes in {found}")
        marked = [name for name, value in given.items() if value.requires_grad or value.grad is not None]
        expect(not marked, "images and targets without gradient or gradient flag", f"one on {marked}")


@check
def replay_rebuilds_the_step(factory: Factory) -> None:
    """``mix(x, y, **out.plan)`` gives, each time, the images the model saw and the target of the step.

    The model may see other batches of that size too, one by one or behind each other in one batch.
    """
    step, (x, y) = tiny_step(factory), batch()
    seen: list[Tensor] = []
    step.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    for out in updates(step, x, y, 3):
        mixed, target = step.mixer.mix(x, y, **out.plan)
        found = differences((mixed, target), step.mixer.mix(x, y, **out.plan))
        expect(not found, "the same result each time mix is called", "another result the second time")
        off = gap(target, out.target)
        expect(off < 1e-6, "the target of the step from mix(x, y, **out.plan)", f"one that is off by {off:.3g}")
        parts = (part for images in seen for part in images.split(len(mixed)) if part.shape == mixed.shape)
        off = min((gap(mixed, part) for part in parts), default=float("inf"))
        expect(off < 1e-5, "the images the model saw from mix(x, y, **out.plan)", f"images that are off by {off:.3g}")
        seen.clear()


@check
def shapes_dtypes_layout_kept(factory: Factory) -> None:
    """Any batch size and image shape work; shape, dtype and memory format of the batch are those of the result."""
    step = tiny_step(factory)
    for size, height, width in ((1, 64, 64), (2, 64, 96), (3, 96, 64), (7, 32, 32)):
        x, y = batch(size, height, width)
        for layout in (torch.contiguous_format, torch.channels_last):
            images = x.contiguous(memory_format=layout)
            plan = step(images, y, rng_of(size)).plan
            for dtype in (torch.float32, torch.bfloat16):
                mixed, target = step.mixer.mix(images.to(dtype), y, **plan)
                case = f"for images {tuple(x.shape)} in {dtype} and {layout}"
                found = (tuple(mixed.shape), mixed.dtype)
                expect(found == (tuple(x.shape), dtype), f"shape and dtype kept {case}", found)
                expect(mixed.is_contiguous(memory_format=layout), f"memory format kept {case}", mixed.stride())
                found = (tuple(target.shape), target.dtype)
                expect(found == (tuple(y.shape), y.dtype), f"targets {tuple(y.shape)} in {y.dtype} {case}", found)


@check
def uint8_is_a_type_error(factory: Factory) -> None:
    """Integer images or labels raise ``TypeError`` in a step and in ``mix``: mixing them would truncate."""
    step, (x, y) = tiny_step(factory), batch()
    plan = step(x, y, rng_of(0)).plan
    calls: dict[str, Callable[..., Any]] = {
        "a step": lambda x, y: step(x, y, rng_of(0)),
        "mix": lambda x, y: step.mixer.mix(x, y, **plan),
    }
    wrong = {"uint8 images": (x.to(torch.uint8), y), "integer one-hot": (x, y.long()), "labels": (x, y.argmax(1))}
    for where, call in calls.items():
        for what, arguments in wrong.items():
            try:
                call(*arguments)
            except TypeError:
                continue
            except Exception as error:
                raise AssertionError(f"expected TypeError for {what} in {where}; found {error!r}") from error
            raise AssertionError(f"expected TypeError for {what} in {where}; found no error")


@check
def it_mixes(factory: Factory) -> None:
    """Over five steps some pixel and some label change."""
    step, (x, y) = tiny_step(factory), batch()
    pixel = label = False
    for out in updates(step, x, y, 5):
        mixed, target = step.mixer.mix(x, y, **out.plan)
        pixel, label = pixel or not torch.equal(mixed, x), label or not torch.equal(target, y)
        x.copy_(x.roll(1, 0)), y.copy_(y.roll(1, 0))  # an update meets another one's images in other places
    expect(pixel, "a changed pixel in five steps", "none")
    expect(label, "a changed label in five steps", "none")


@check
def targets_stay_distributions(factory: Factory) -> None:
    """Targets stay in [0, 1], rows that sum to 1 still do, and ``mix`` is linear in ``y``."""
    step, (x, hard) = tiny_step(factory), batch()
    kinds = {
        "one-hot": hard,
        "smoothed": 0.9 * hard + 0.1 / CLASSES,
        "multi-hot": torch.clamp(hard + hard.roll(1, dims=1), max=1),
    }
    for index in range(3):
        for kind, y in kinds.items():
            out = step(x, y, rng_of(index))
            inside = bool(((out.target > -1e-6) & (out.target < 1 + 1e-6)).all())
            expect(inside, f"{kind} targets in [0, 1]", (out.target.min().item(), out.target.max().item()))
            sums = out.target.sum(1)
            if kind != "multi-hot":
                expect(gap(sums, torch.ones(len(y))) < 1e-5, f"rows of {kind} targets that sum to 1", sums.tolist())

        def relabel(y: Tensor, plan: Plan = out.plan) -> Tensor:
            return step.mixer.mix(x, y, **plan)[1]

        one, other = kinds["smoothed"], kinds["multi-hot"]
        off = gap(relabel(0.3 * one + 0.7 * other), 0.3 * relabel(one) + 0.7 * relabel(other))
        expect(off < 1e-5, "a mix that is linear in y for a given plan", f"a difference of {off:.3g}")


@check
def several_labels_mix_as_one(factory: Factory) -> None:
    """Unless the mixer says ``one_label``, the targets of a step are ``W y``, where ``mix`` makes W of one-hot targets.

    The rows of W are at least 0 and sum to 1, and a binary cross-entropy is finite. An image may have no label, or all.
    """
    step, (x, _) = tiny_step(factory), batch()
    if any(getattr(module, "one_label", False) for module in step.modules()):
        return
    step.criterion = nn.BCEWithLogitsLoss()
    y = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], dtype=torch.float32)
    for out in updates(step, x, y, 8):
        shares = step.mixer.mix(x, torch.eye(len(x), CLASSES), **out.plan)[1][:, : len(x)]
        off = max(gap(shares.sum(1), torch.ones(len(x))), -shares.min().item())
        expect(off < 1e-5, "shares of at least 0 that sum to 1 for each image", shares.tolist())
        off = gap(out.target, shares @ y)
        expect(off < 1e-5, "each target the shares of its sources' labels", f"one that is off by {off:.3g}")
        expect(bool(out.loss.isfinite()), "a finite binary cross-entropy", out.loss)


@check
def label_share_is_pixel_share(factory: Factory) -> None:
    """Each image has a channel and a class of its own, so both shares of every source can be read off."""
    step = tiny_step(factory)
    y = torch.eye(3, CLASSES)
    x = torch.eye(3)[:, :, None, None].expand(3, 3, 32, 64).contiguous()
    for out in updates(step, x, y, 8):
        mixed, target = step.mixer.mix(x, y, **out.plan)
        pixels, labels = mixed.mean((2, 3)), target[:, :3]
        off = gap(pixels, labels)
        found = f"pixels {pixels.tolist()} and labels {labels.tolist()}"
        expect(off < 1e-4, "each source's share of the label equal to its share of the pixels", found)


@check
def identical_images_stay(factory: Factory) -> None:
    """A batch of one image repeated, with one label repeated, comes back as it was."""
    step, (x, y) = tiny_step(factory), batch()
    x, y = x[:1].repeat(4, 1, 1, 1), y[:1].repeat(4, 1)
    for out in updates(step, x, y, 3):
        mixed, target = step.mixer.mix(x, y, **out.plan)
        off = gap(mixed, x), gap(target, y)
        expect(max(off) < 1e-5, "identical images and labels unchanged", f"differences of {off}")
