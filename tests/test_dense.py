"""What lies on the pixels follows them: maps and boxes against loops over pixels, and what is refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import MIXERS, CutMix, FMix, Mixup, Switch, Vanilla
from mixers.adapters import mix_batch
from mixers.dense import mix_boxes, mix_like

B, H, W = 5, 12, 18
IMAGES = torch.from_numpy(np.random.default_rng(0).standard_normal((B, 3, H, W), dtype=np.float32))
Y = torch.eye(B)


def planned(mixer, step=0, images=IMAGES):
    return mixer.plan(images, Y, np.random.default_rng((3, step)))


def test_float_maps_of_the_images_size_are_mixed_as_the_images_are_by_each_plan_in_place_and_others_are_refused():
    took = set()
    for name in (name for name, make in MIXERS.items() if make().needs == "batch"):
        mixer = MIXERS[name]()
        plan = planned(mixer)
        if "box" in plan:
            with pytest.raises(ValueError, match=r"expected a plan of index and mask, .* got box, index"):
                mix_like(plan, IMAGES)
            continue
        took.add(name)
        assert torch.equal(mix_like(plan, IMAGES), mixer.mix(IMAGES, Y, **plan)[0])
    assert took >= {"vanilla", "mixup", "cutmix", "deit", "rsb", "smoothmix", "gridmix", "fmix", "saliencymix"}
    nested = Switch([Switch([CutMix(), CutMix()]), Switch([Vanilla()])], [0.5, 0.5])
    for step in range(6):
        plan = planned(nested, step)
        assert torch.equal(mix_like(plan, IMAGES), nested.mix(IMAGES, Y, **plan)[0])


@pytest.mark.parametrize(("mixer", "stride"), [(CutMix(), 1), (FMix(), 3)])
def test_each_pixel_of_a_label_map_is_of_the_image_that_its_pixel_came_from(mixer, stride):
    maps = torch.arange(B * (H // stride) * (W // stride)).view(B, H // stride, W // stride)
    for step in range(4):
        plan = planned(mixer, step)
        found = mix_like(plan, maps)
        for b, i, j in np.ndindex(*maps.shape):
            source = b if plan["mask"][b, 0, i * stride, j * stride] else plan["index"][b]
            assert found[b, i, j] == maps[source, i, j]
        one_hot = F.one_hot(maps % 7, 7).movedim(-1, 1).float()
        assert torch.equal(mix_like(plan, one_hot).argmax(1), found % 7)
        assert torch.equal(mix_like(plan, maps.bool()), found.bool())


def test_mixup_gives_each_pixel_a_share_of_two_classes_and_frames_of_a_clip_have_one_mask():
    plan = planned(Mixup())
    one_hot, lam = F.one_hot(torch.arange(B * H * W).view(B, H, W) % 7, 7).movedim(-1, 1).float(), plan["mask"]
    assert torch.allclose(mix_like(plan, one_hot), lam * one_hot + (1 - lam) * one_hot[plan["index"]])
    clips = torch.stack([IMAGES, IMAGES + 1], 1)  # (B, T, C, H, W)
    plan = planned(CutMix())
    mixed, _ = CutMix().mix(clips.flatten(1, 2), Y, **plan)
    assert torch.equal(mixed.unflatten(1, (2, 3)), mix_like(plan, clips))
    assert torch.equal(mix_like(plan, clips)[:, 1], CutMix().mix(clips[:, 1], Y, **plan)[0])


@pytest.mark.parametrize(
    ("mixer", "maps", "says"),
    [
        (Mixup(), torch.zeros(B, H, W, dtype=torch.int64), "torch.int64 maps cannot be blended: make them one-hot"),
        (CutMix(), torch.zeros(B, 7, 18), "12 x 18 pixels need their proportions, got 7 x 18"),
        (Mixup(), torch.zeros(B, 17, 2), r"\(5, 17, 2\), which look like coordinates.*heatmaps"),
        (CutMix(), torch.zeros(B, 2, 3), "look like coordinates"),
        (CutMix(), torch.zeros(B - 1, H, W), r"shape \(B, ..., h, w\) with B = 5, got \(4, 12, 18\)"),
        (CutMix(), torch.zeros(B, 3), r"shape \(B, ..., h, w\) with B = 5, got \(5, 3\)"),
    ],
)
def test_what_cannot_be_mixed_is_refused_in_words(mixer, maps, says):
    with pytest.raises(ValueError, match=says):
        mix_like(planned(mixer), maps)


def test_images_that_are_signals_or_video_are_told_how_they_go_in():
    for shape, says in (((B, 2, 40), r"signals .* x\[:, :, None\]"), ((B, 4, 3, 8, 8), r"x\.flatten\(1, 2\)")):
        with pytest.raises(ValueError, match=says):
            mix_batch(CutMix(), torch.zeros(shape), Y, seed=0, step=0)


def test_on_signals_of_one_row_some_mixers_mix_and_a_box_of_cutmix_has_no_height():
    signals = torch.randn(B, 2, 1, 40, generator=torch.Generator().manual_seed(0))
    for name, mixes in (("mixup", True), ("fmix", True), ("resizemix", True), ("cutmix", False)):
        found = [mix_batch(MIXERS[name](), signals, Y, seed=0, step=step) for step in range(3)]
        assert all(torch.equal(mixed, signals) and torch.equal(y, Y) for mixed, y, _ in found) is not mixes, name


def shown(box, weight: Tensor):
    """The smallest box around the pixels of a box that show, and the share of the box that does, pixel by pixel."""
    left, top, right, bottom = map(int, box)
    pixels = [(i, j) for i in range(top, bottom) for j in range(left, right) if weight[i, j] > 0]
    if not pixels:
        return None, 0.0
    rows, columns = zip(*pixels, strict=True)
    share = sum(weight[i, j].item() for i, j in pixels) / ((right - left) * (bottom - top))
    return [min(columns), min(rows), max(columns) + 1, max(rows) + 1], share


@pytest.mark.parametrize("mixer", [CutMix(), FMix(), MIXERS["smoothmix"]()])
def test_a_box_is_cut_down_to_what_shows_of_it_and_weighs_as_much(mixer):
    rng, dropped = np.random.default_rng(1), 0
    low, size = rng.integers((0, 0), (W - 6, H - 6), (B, 3, 2)), rng.integers(1, 7, (B, 3, 2))
    boxes = list(torch.from_numpy(np.concatenate([low, low + size], 2)))
    labels = list(torch.arange(B * 3).view(B, 3))
    for step in range(4):
        plan = planned(mixer, step)
        for b, found in enumerate(mix_boxes(plan, boxes, labels, least=0.25)):
            partner, mask = int(plan["index"][b]), plan["mask"][b, 0]
            sides = [(b, torch.ones(H, W))] if partner == b else [(b, mask), (partner, 1 - mask)]
            expected = [
                (*shown(box, weight), n) for i, weight in sides for box, n in zip(boxes[i], labels[i], strict=True)
            ]
            kept = [(box, share, n) for box, share, n in expected if share >= 0.25]
            dropped += len(expected) - len(kept)
            assert found.boxes.tolist() == [box for box, _, _ in kept]
            assert found.shares.tolist() == pytest.approx([share for _, share, _ in kept])
            assert found.labels.tolist() == [n for _, _, n in kept]
    assert dropped


def test_under_mixup_all_boxes_of_both_images_stay_whole_with_the_shares_of_the_images_and_images_may_have_none():
    boxes, labels = (
        [torch.tensor([[1.5, 2.0, 7.25, 9.0]]), torch.zeros(0, 4)],
        [torch.tensor([4]), torch.zeros(0).long()],
    )
    plan = {"index": torch.tensor([1, 0]), "mask": torch.full((2, 1, 1, 1), 0.75)}
    for found, share in zip(mix_boxes(plan, boxes, labels, least=0.8), (0.75, 0.25), strict=True):
        assert torch.equal(found.boxes, boxes[0]) and found.labels.tolist() == [4] and found.shares.tolist() == [share]
    for plan in ({}, {"index": torch.tensor([0, 1]), "mask": torch.zeros(2, 1, H, W)}):  # nothing is mixed
        assert [found.shares.tolist() for found in mix_boxes(plan, boxes, labels)] == [[1.0], []]
    half = torch.ones(2, 1, H, W)
    half[..., 4:] = 0  # of the box, columns 1.5 to 4 show of 1.5 to 7.25
    found, partner = mix_boxes({"index": torch.tensor([1, 0]), "mask": half}, boxes, labels)
    assert found.boxes.tolist() == [[1.5, 2.0, 4.0, 9.0]] and partner.boxes.tolist() == [[4.0, 2.0, 7.25, 9.0]]
    assert (found.shares + partner.shares).item() == pytest.approx(1) and found.shares.item() == pytest.approx(
        2.5 / 5.75
    )
    with pytest.raises(ValueError, match="boxes and labels of 2 images, got 2 and 1"):
        mix_boxes(plan, boxes, labels[:1])
