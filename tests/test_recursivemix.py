"""RecursiveMix: the box and its average against loops and torchvision, and a history that nothing disturbs."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from resuming import differences, finish
from small_models import FAMILIES, backbone, photos
from test_replay import assert_same, spied
from torch import Tensor, nn
from torchvision.ops import roi_align

from mixers import CutMix, RecursiveMix, SnapMix, Step, Switch, Vanilla, ops, taps
from mixers.recursivemix import KEPT, roi_weights
from mixers.testing import batch, rng_of, tiny_step
from mixers.testing import differences as changed
from mixup_recipes.training.job import STOPPED


def step_with_history(updates: int = 2, **args) -> Step:
    """After some updates of one micro-batch."""
    step = tiny_step(lambda: RecursiveMix(**args))
    for index in range(updates):
        step(*batch(seed=index), rng_of(index))
        step.mixer.after_step(step.model, 0.5)
    return step


def history(step: Step) -> dict[str, Tensor]:
    return {k.removeprefix("mixer."): v.clone() for k, v in step.named_buffers() if k.startswith("mixer.")}


@pytest.mark.parametrize("size", [(7, 7, 224, 224), (5, 5, 160, 160), (4, 6, 13, 31), (1, 1, 32, 32), (8, 3, 64, 48)])
def test_the_average_over_the_box_is_roi_align_with_one_output(size):
    (h, w, height, width), rng = size, np.random.default_rng(0)
    feature = torch.from_numpy(rng.standard_normal((2, 3, h, w), dtype=np.float32))
    for _ in range(60):
        top, bottom = sorted(rng.integers(0, height + 1, 2).tolist())
        left, right = sorted(rng.integers(0, width + 1, 2).tolist())
        # torchvision has one scale for both axes: stretch the boxes instead
        corners = torch.tensor([left, top, right, bottom]) * torch.tensor([w / width, h / height] * 2)
        expected = roi_align(feature, [corners[None]] * 2, (1, 1), 1.0, -1, aligned=True)[:, :, 0, 0]
        rows, columns = (torch.from_numpy(roi_weights(*ends)).float()
                         for ends in ((top, bottom, h, height), (left, right, w, width)))  # fmt: skip
        torch.testing.assert_close(torch.einsum("bchw,h,w->bc", feature, rows, columns), expected, atol=1e-5, rtol=1e-5)
        empty = top == bottom or left == right
        assert (rows.sum() * columns.sum()).item() == pytest.approx(0 if empty else 1, abs=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_second_classifier_sees_the_box_as_the_first_sees_the_image(name):
    """The box that is the whole image: what the head averages itself, where it averages; for tokens, the patches."""
    (x, _), model, mixer = photos(), backbone(name).eval(), RecursiveMix()
    mixer.setup(model)
    with taps.last_feature(model) as features, torch.no_grad():
        logits = model(x)
        whole = mixer.logits_of_box(model, features[0], x, (0, 64, 0, 64))
        if features[0].ndim == 3:
            logits = model.get_classifier()(taps.to_map(model, features[0], x).mean((2, 3)))
    # RoIAlign reaches half a place beyond the image, to the border's centre: the plain mean, if the samples are centres
    torch.testing.assert_close(whole, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("alpha", "swapped"), [(0.5, False), (0.3, True)])
def test_a_step_is_the_formula(alpha, swapped):
    step = step_with_history(alpha=alpha, swapped_roi=swapped)
    images, targets, predictions = (getattr(step.mixer, f"{k}_0") for k in KEPT)
    head, model = step.mixer.roi_classifier, copy.deepcopy(step.model)
    head.weight.data.mul_(2)
    (x, y), rng = batch(seed=7), rng_of(7)
    top, bottom, left, right = ops.clipped_box(32, 32, 1 - alpha * rng.random(), rng)
    lam, mixed = 1 - (bottom - top) * (right - left) / 32**2, x.clone()
    for i, j in np.ndindex(bottom - top, right - left):
        mixed[:, :, top + i, left + j] = images[:, :, i * 32 // (bottom - top), j * 32 // (right - left)]
    target, feature = lam * y + (1 - lam) * targets, model.forward_features(mixed)
    corners = torch.tensor([[top, left, bottom, right] if swapped else [left, top, right, bottom]]).float()
    inside = roi_align(feature, [corners] * 4, (1, 1), feature.shape[-1] / 32, -1, aligned=True).flatten(1)
    ce = nn.CrossEntropyLoss()
    roi = 0.5 * (1 - lam) * ce(inside @ head.weight.T + head.bias, predictions)

    out = step(x, y, rng_of(7))
    torch.testing.assert_close(out.logs["mix"], ce(model.forward_head(feature), target), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.logs["roi"], roi, atol=1e-5, rtol=1e-5)
    assert torch.equal(step.mixer.mix(x, y, **out.plan)[0], mixed)
    torch.testing.assert_close(out.target, target)
    step.mixer.after_step(step.model, 0.5)
    assert torch.equal(step.mixer.images_0, mixed)
    assert torch.equal(step.mixer.targets_0, out.target)  # so a class fades by lambda with each update
    torch.testing.assert_close(step.mixer.predictions_0, out.logits.softmax(1))


@pytest.mark.parametrize("box", [(5, 5, 3, 9), (3, 9, 5, 5), (5, 5, 5, 5), None])
def test_a_box_without_area_is_plain_training_with_a_classifier_that_waits(box, monkeypatch):
    plain, step, (x, y) = tiny_step(Vanilla), step_with_history(alpha=0.5 if box else 0.0), batch(seed=9)
    if box:
        monkeypatch.setattr(ops, "clipped_box", lambda *_: box)
    out = step(x, y, rng_of(9))
    assert not changed(step.mixer.mix(x, y, **out.plan), (x, y)) and (out.plan["lam"] == 1).all()
    plain.load_state_dict({k: v for k, v in step.state_dict().items() if k.startswith("model.")})
    assert out.loss.item() == plain(x, y, rng_of(9)).loss.item() and out.logs["roi"] == 0
    out.loss.backward()
    assert all((p.grad == 0).all() for p in step.mixer.parameters())


@pytest.mark.parametrize(("size", "met"), [(2, 2), (4, 4), (7, 4)])
def test_rows_that_the_history_lacks_stay_as_they_are(size, met):
    step, (x, y) = step_with_history(), batch(size, seed=5)
    out = step(x, y, rng_of(5))
    mixed, target = step.mixer.mix(x, y, **out.plan)
    assert [not torch.equal(a, b) for a, b in zip(mixed, x, strict=True)] == [i < met for i in range(size)]
    assert torch.equal(target[met:], y[met:]) and (out.plan["lam"][met:] == 1).all()
    for index in range(2):
        step.mixer.after_step(step.model, 0.5)
        assert index or len(step.mixer.images_0) == size
        step(*batch(seed=index), rng_of(index))
    assert not changed(step.mixer.mix(x, y, **out.plan), (mixed, target))  # a plan stays what it was


def test_a_micro_batch_meets_the_same_place_of_the_update_before():
    step, seen = tiny_step(RecursiveMix), {}
    for update, micro in np.ndindex(3, 3):
        x, y = batch(seed=10 * update + micro)
        out = step(x, y, rng_of(update))
        seen[update, micro] = step.mixer.mix(x, y, **out.plan)[0]
        assert not update or torch.equal(out.plan["images"], seen[update - 1, micro])
        if micro == 2:
            step.mixer.after_step(step.model, 0.5)


def test_what_is_no_update_or_one_of_another_member_sees_the_history_and_leaves_none():
    step = step_with_history()
    before = history(step)
    with torch.no_grad():
        out = step(*batch(seed=5), rng_of(5))  # as PreciseBN does
    assert torch.equal(out.plan["images"], before["images_0"])
    step.eval()(*batch(seed=6), rng_of(6))
    step.train().mixer.after_step(step.model, 0.5)
    assert not changed(history(step), before)
    step(*batch(seed=7), rng_of(7))
    assert not changed(history(step), before), "before the update is over"
    step.mixer.after_step(step.model, 0.5)
    assert changed(history(step), before)
    step = tiny_step(lambda: Switch([RecursiveMix(), CutMix()]))
    for index in range(12):
        before, out = history(step), step(*batch(seed=index), rng_of(index))
        step.mixer.after_step(step.model, 0.5)
        assert bool(changed(history(step), before)) == (out.plan["choice"] == 0)


def test_a_history_of_any_shape_is_loaded_strictly_and_replaces_what_was_there():
    step = step_with_history(updates=1)
    for micro in range(2):
        step(*batch(3 + micro, 48, 64, seed=micro), rng_of(1))
    step.mixer.after_step(step.model, 0.5)
    saved = copy.deepcopy(step.state_dict())
    assert saved["mixer.images_0"].shape == (3, 3, 48, 64) and saved["mixer.images_1"].shape == (4, 3, 48, 64)
    for other in (tiny_step(RecursiveMix, seed=1), step_with_history(5)):
        other.load_state_dict(saved)
        assert not changed(history(other), history(step))
    step.load_state_dict(tiny_step(RecursiveMix).state_dict())
    assert history(step) == {}


def test_a_model_without_a_linear_classifier_is_refused_with_models_that_have_one():
    for model in (nn.Linear(2, 2), timm.create_model("test_resnet", num_classes=0)):
        for mixer in (RecursiveMix(), SnapMix()):
            with pytest.raises(ValueError, match=r"no linear classifier .*; models that have: resnet50, deit_small"):
                Step(model, mixer, F.cross_entropy)


def test_a_stopped_run_goes_on_with_each_process_s_own_history(server, reference, tiny_recipe, tmp_path):
    """With PreciseBN between the epochs; stopped after updates 6, within an epoch, and 8, at the end of one."""
    args = ("--mixer", "recursivemix")
    run = ["--recipe", tiny_recipe, "--output_dir", tmp_path / "run", "--dataloader_num_workers", 0,
           "--logging_steps", 3, *args, "--resume_from_checkpoint", "auto"]  # fmt: skip
    for call in (6, 2):
        fault = ["receive", "mixup_recipes.training.optimisation:set_learning_rates", call, 15]
        started = server.start(*run, processes=2, faults=[fault])
        assert started.wait() == [STOPPED] * 2, started.output()
    finish(server, *run, processes=2)
    assert differences(reference(*args, processes=2), tmp_path / "run") == []


@pytest.mark.parametrize("processes", [1, 2])
def test_any_micro_batch_after_a_checkpoint_is_rebuilt_with_its_history(server, tmp_path, processes):
    out = spied(server, tmp_path, "recursivemix", processes=processes)
    assert_same(out, (0, 1), (4, 0), (4, 1), (8, 1), processes=processes)
