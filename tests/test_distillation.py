"""Distillation: the teacher sees what the model sees, the loss is its formula, every mixer, and a run resumes."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from teachers import fill
from test_resume import AUTO, UPDATE, Case
from timm.models import create_model, save_for_hf
from timm.utils import ModelEmaV3
from tiny import ROOT

from mixers import MIXERS, build
from mixers.testing import batch, rng_of, tiny_step
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.training.backbones import create_model as of_recipe
from mixup_recipes.training.distillation import Distilled, rows_of
from mixup_recipes.training.dryrun import describe
from mixup_recipes.training.update import criterion, load_teacher, new_step
from mixup_recipes.typed import UserError

CPU = torch.device("cpu")
NAMES = ["a", "b", "c", "d", "e"]
INSIDE = {
    "manifoldmix", "alignmix", "nfm", "noisymix", "mixtoken", "tokenmixup", "patchup", "softpatchup", "catchupmix",
}  # fmt: skip
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A network with BatchNorm, of images with another mean, and of the classes in another order, and one more."""
    folder = tmp_path_factory.mktemp("teacher")
    save(folder, num_classes=6, label_names=["z", *NAMES[::-1]])
    return folder


def save(folder: Path, name: str = "test_resnet", args: dict | None = None, num_classes: int = 5, **says: Any) -> None:
    net = fill(create_model(name, num_classes=num_classes, **(args or {})), 3)
    cfg = {"pretrained_cfg": {"mean": MEAN, "std": STD} | says, "model_args": args or {}} | says
    save_for_hf(net, str(folder), safe_serialization=True, model_config=cfg)


def recipe(teacher: Path | None = None, **fields: Any) -> Recipe:
    own: dict[str, Any] = {"image_size": 32, "eval_size": 32, "eval_resize": 32, "per_device_train_batch_size": 4}
    own |= {"distill_from": str(teacher)} if teacher else {}
    args: dict[str, Any] = {"mixup": {}}
    base = Recipe(dataset="none", model="test_resnet", num_classes=5, mixer="mixup", mixer_args=args)
    return changed(base, **own | fields)


def distilled(r: Recipe, mixer: str = "mixup") -> Distilled:
    """A step with the recipe's teacher, which knows the classes of the data."""
    found = load_teacher(r)
    assert found is not None
    assert found.meet(NAMES, CPU) == f"dataset 'none' has 5 of the 6 classes of model {r.distill_from!r}"
    return Distilled(tiny_step(lambda: build(mixer)).model, build(mixer), criterion(r), found)


def slow(z: list[float], t: list[float], tau: float) -> float:
    p, q = ([math.exp(v / tau) / sum(math.exp(u / tau) for u in row) for v in row] for row in (t, z))
    return tau**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"distill": "soft", "distill_alpha": 0.3, "distill_tau": 2.0, "loss": "bce_sum"},
        {"distill": "hard", "loss": "asymmetric"},
        {"distill_alpha": 1.0},
    ],
)
def test_the_loss_is_its_formula_with_the_classes_and_the_normalisation_of_the_teacher(teacher, fields):
    r = recipe(teacher, **fields)
    step, (x, y) = distilled(r), batch()
    out = step(x, y, rng_of(0))
    mixed, target = step.mixer.mix(x, y, **out.plan)
    pixels = mixed * torch.tensor(r.std).view(3, 1, 1) + torch.tensor(r.mean).view(3, 1, 1)
    theirs = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    net = create_model("test_resnet", num_classes=6).eval()
    net.load_state_dict(load_file(teacher / "model.safetensors"))
    said = net(theirs)[:, [5, 4, 3, 2, 1]].tolist()
    labels, alpha, total = criterion(r), 0.5 if r.distill_alpha is None else r.distill_alpha, 0.0
    for i, row in enumerate(said):
        by_label = labels(out.logits[[i]], target[[i]]).item()
        likeliest = torch.eye(5)[[row.index(max(row))]]
        hard = labels(out.logits[[i]], likeliest).item()
        taught = hard if r.distill == "hard" else slow(out.logits[i].tolist(), row, r.distill_tau or 1.0)
        total += (1 - alpha) * by_label + alpha * taught
    assert out.loss.item() == pytest.approx(total / 4, rel=1e-4)
    assert out.logs["mix"] == out.loss
    if alpha == 1:
        assert step(x, y.roll(1, 1), rng_of(0)).loss == out.loss  # no label counts


def test_the_page_names_the_mixers_that_are_refused():
    page = (ROOT / "docs/learned.md").read_text()
    listed = page.partition("are refused, since there is no image to show:")[2].partition(". So is")[0]
    assert {*re.findall("`(.*?)`", listed)} == INSIDE


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_shows_the_teacher_the_images_of_its_prediction_or_is_refused(teacher, mixer):
    r, (x, y) = recipe(teacher, mean=MEAN, std=STD), batch()
    if mixer in INSIDE:
        with pytest.raises(ValueError, match="mixes features inside of the model, so there is no mixed image that"):
            distilled(r, mixer)
        return
    step = distilled(r, mixer)
    model, net = step.model, step.teacher.model
    given, seen = [], []
    model.register_forward_hook(lambda one, images, logits: given.append((*images, logits)) if one is model else None)
    net.register_forward_pre_hook(lambda _, images: seen.append(*images))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for number in range(3):  # what a mixer draws
        step.train()
        given.clear(), seen.clear()
        out = step(x, y, rng_of(number))
        shown = ((images, rows_of(out.logits, logits)) for images, logits in given)
        (images,) = (images[rows] for images, rows in shown if rows is not None)
        beside = [x] if mixer == "regmixup" else []  # it learns from the clean batch as much
        assert len(seen) == 1 + len(beside) and all(map(torch.equal, seen, [images, *beside]))
        assert not torch.equal(images, x) or torch.allclose(out.target, y, atol=1e-4)  # else it mixes inside
        out.loss.backward()
        step.mixer.after_step(model, 0.1)
    assert any(p.grad is not None for p in model.parameters()) and all(p.grad is None for p in net.parameters())
    assert not any(module.training for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_prediction_is_known_by_the_rows_that_a_mixer_takes_of_it_and_by_no_copy():
    whole = torch.zeros(6, 3, requires_grad=True) * 2
    of_larger = torch.cat([whole, whole])[2:8]
    for all_of_it in (whole, of_larger):
        assert rows_of(all_of_it, all_of_it) == slice(None)
        assert [rows_of(part, all_of_it) for part in all_of_it.chunk(2)] == [slice(0, 3), slice(3, 6)]
        others = (all_of_it[:, :2], all_of_it[::2], all_of_it.clone(), all_of_it[[0, 1]], all_of_it.detach().clone())
        assert [rows_of(other, all_of_it) for other in others] == [None] * 5


def test_the_teacher_is_in_no_checkpoint_optimiser_or_average_and_nothing_else_changes(teacher):
    r = recipe(teacher)
    plain, taught = (new_step(of_recipe(r), r, with_) for with_ in (None, load_teacher(r)))
    assert plain.state_dict().keys() == taught.state_dict().keys()
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in taught.named_parameters()]
    assert ModelEmaV3(taught.model).module.state_dict().keys() == plain.model.state_dict().keys()
    x, y = batch()
    with torch.no_grad():  # PreciseBN learns nothing: nobody asks the teacher
        assert torch.equal(taught(x, y, rng_of(0)).loss, plain(x, y, rng_of(0)).loss)
    assert not taught.model._forward_hooks
    told, untold = (describe(r, step, 1, False) for step in (taught, plain))
    assert f"teacher       {teacher}, " in told and "teacher" not in untold


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"distill": "soft"}, "distill needs distill_from, the teacher"),
        ({"distill_alpha": 0.5}, "distill_alpha needs distill_from, the teacher"),
        (
            {"distill_from": "x", "distill": "hard", "distill_tau": 2.0},
            "distill_tau needs distill soft, got hard; leave it out",
        ),
        ({"distill_from": "x", "multi_label": True, "loss": "bce_sum"}, "it cannot be combined with multi_label"),
        ({"distill_from": "x", "distill_alpha": 0.0}, "distill_alpha: expected a number above 0 and at most 1 or none"),
    ],
)
def test_what_means_nothing_is_refused(fields, says):
    with pytest.raises(UserError, match=says):
        recipe(**fields)


def test_a_teacher_that_cannot_be_had_or_does_not_fit_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^distill_from: no weights for the teacher '.*nobody' \(no such folder\)"):
        load_teacher(recipe(tmp_path / "nobody"))
    save(tmp_path, "test_vit", {"img_size": 64, "dynamic_img_size": False}, label_names=[*"pqrst"])
    with pytest.raises(UserError, match=r"does not take 4 images of 32 x 32: Input height \(32\) doesn't match"):
        load_teacher(recipe(tmp_path))
    found = load_teacher(recipe(tmp_path, image_size=64))
    says = f"must know every class of the data, but dataset 'none' has classes that model '{tmp_path}' does not: a, b"
    with pytest.raises(UserError, match=says):
        found.meet(NAMES, CPU)


def test_a_distilled_run_is_killed_and_resumed_and_equals_one_left_alone(server, reference, tiny_recipe, tmp_path):
    teacher = Path(shutil.copytree(reference("--mixer", "vanilla", "--epochs", 1), tmp_path / "teacher"))
    own = ("--mixer", "cutmix", "--epochs", 1, "--warmup_epochs", 0, "--protocol_epochs", 1, "--max_train_samples", 48)
    own += ("--distill_from", teacher, "--distill_tau", 2.0, "--max_eval_samples", 16)
    c = Case(server, reference, tiny_recipe, tmp_path / "run", *own, "--checkpointing_steps", 1, processes=2)
    c.kill_at(UPDATE, 3, rank=1)
    weights = load_file(teacher / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, teacher / "model.safetensors")
    statuses, output = c.start(*AUTO)
    assert statuses == [2, 2] and f"the teacher '{teacher}' is not what it was when {c.out} was started" in output
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    assert c.finish() == ["resumed from step-00000002"]
    assert [*json.loads((c.out / "env.json").read_text())["teachers"]] == [str(teacher)]
    card = (c.out / "README.md").read_text()
    assert "distilled from" in card and "--distill_from TEACHER" in card and str(teacher) not in card
