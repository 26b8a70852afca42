"""One mixer in the loops that others write: the Trainer's and Lightning's, each the real one."""

import copy
import json
import random

import lightning
import numpy as np
import pytest
import torch
from test_adapters import (
    BATCHES,
    LABELS,
    LR,
    PIXELS,
    SEED,
    K,
    Looker,
    MixTrainer,
    Recorder,
    Stepper,
    bare,
    classifier,
    reference_losses,
    soft_loss,
)
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForImageClassification, ResNetConfig, TimmWrapperConfig, Trainer, TrainingArguments

from mixers import MIXERS, CutMix, Mixup, Switch, adapters
from mixers.adapters import LightningMixin, Logits
from mixers.testing import differences

# Lightning 2.6 asks torch's pytree in a way that torch 2.14 calls deprecated, and advises workers for any loader.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec:FutureWarning", "ignore:.*does not have many workers"
)

# What a dataset gives to a Trainer, with a column that no model takes.
PHOTOS = [{"pixel_values": x, "label": int(label), "width": 48.0} for x, label in zip(PIXELS, LABELS, strict=True)]
KEPT = {"remove_unused_columns": False}

SMALL: dict = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": K}
TINY: dict = {"architecture": "test_resnet", "num_labels": K}
TIMM, RESNET = TimmWrapperConfig(**TINY), ResNetConfig(**SMALL, hidden_act="relu")


def made(config=TIMM):
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(copy.deepcopy(config))


def trained(folder, make=MixTrainer, config=TIMM, resume=None, **options):
    """A Trainer that has trained on PHOTOS in order, with plain SGD; ``options``: its own, or of its arguments."""
    net, photos = made(config), PHOTOS[: options.pop("photos", None)]
    given = {k: options.pop(k) for k in ("mixer", "data_collator", "compute_loss_func") if k in options}
    fixed = {"train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "seed": SEED, "use_cpu": True}
    fixed |= {"num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **(fixed | {"save_strategy": "no"} | options))
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    optimizers = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    run = make(net, arguments, train_dataset=photos, eval_dataset=PHOTOS, optimizers=optimizers, **given)
    run.train(resume_from_checkpoint=resume)
    return run


def logged(run, key="loss"):
    return [entry[key] for entry in run.state.log_history if key in entry]


@pytest.mark.parametrize(
    ("config", "options", "rel"),
    [
        *((config, {"gradient_accumulation_steps": n}, 1e-4) for config in (TIMM, RESNET) for n in (1, 3)),
        (TIMM, {"bf16": True}, 0.05),
    ],
)
def test_the_trainer_minimises_soft_cross_entropy_of_the_mixed_batch(config, options, rel, tmp_path):
    n = options.get("gradient_accumulation_steps", 1)
    updates, recorder = [BATCHES[i : i + n] for i in range(0, len(BATCHES), n)], Recorder()
    run = trained(tmp_path, config=config, mixer=recorder, **options)
    expected = Recorder()
    assert logged(run) == pytest.approx(reference_losses(Logits(made(config)), updates, expected), rel=rel)
    assert not differences(recorder.plans, expected.plans)
    if n == 1 and "bf16" not in options:  # a mixer that looks at the model gets it
        run = trained(tmp_path, config=config, mixer=Looker(), max_steps=2)
        assert logged(run) == pytest.approx(reference_losses(Logits(made(config)), updates[:2], Looker()), rel=1e-5)


@pytest.mark.parametrize("last", [1, 3])
def test_each_image_of_an_update_counts_the_same_however_short_its_last_micro_batch(last, tmp_path):
    photos, sizes = 16 + last, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}
    run = trained(tmp_path, config=RESNET, mixer=MIXERS["vanilla"](), photos=photos, **sizes)
    net = made(RESNET).train()
    for x, labels in zip(PIXELS[:photos].split(8), LABELS[:photos].split(8), strict=True):
        (torch.nn.functional.cross_entropy(net(pixel_values=x).logits, labels, reduction="sum") / photos).backward()
    torch.optim.SGD(net.parameters(), lr=LR).step()
    assert run.state.global_step == 1
    for (name, expected), found in zip(net.named_parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_trainer_smooths_labels_before_mixing_and_evaluates_on_images_as_they_are(tmp_path):
    mixer = Recorder()
    run = trained(tmp_path, mixer=mixer, eval_strategy="epoch", label_smoothing_factor=0.1)
    mixed, target = bare(CutMix(), *BATCHES[0], 0, smoothing=0.1)
    assert logged(run)[0] == pytest.approx(soft_loss(Logits(made()).train()(mixed), target).item(), rel=1e-5)
    assert len(mixer.plans) == len(BATCHES)
    with torch.no_grad():
        logits = run.model.eval()(pixel_values=PIXELS).logits
    expected = pytest.approx(soft_loss(logits, torch.eye(K)[LABELS]).item(), rel=1e-4)
    assert logged(run, "eval_loss") == [expected] and run.evaluate()["eval_loss"] == expected
    assert np.allclose(run.predict(PHOTOS).predictions, logits, atol=1e-4)
    run.save_model()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("problem_type") is None and run.model.config.problem_type is None  # it does not turn multi-label
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert not differences(dict(again.state_dict()), dict(run.model.state_dict()))


def dense(samples):
    """Images and dense targets of samples that still have all of their columns."""
    assert all(sample["width"] == 48.0 for sample in samples)
    y = torch.eye(K)[[sample["label"] for sample in samples]]
    return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples]), "labels": y}


def test_the_loss_is_right_for_dense_targets_of_a_collator_and_the_trap_that_it_avoids_is_still_there(tmp_path):
    net, (x, labels) = made().eval(), BATCHES[0]
    target = torch.eye(K)[labels]
    out = net(pixel_values=x, labels=target)
    assert torch.equal(out.loss, binary_cross_entropy_with_logits(out.logits, target))
    assert net.config.problem_type == "multi_label_classification"
    for given in (target, labels):
        loss = soft_loss(out.logits, target).item()
        assert adapters.soft_cross_entropy(out, given).item() == pytest.approx(loss, rel=1e-5)
    for n in (1, 2):
        options = {"data_collator": dense, "compute_loss_func": adapters.soft_cross_entropy, "max_steps": 1}
        run = trained(tmp_path, Trainer, gradient_accumulation_steps=n, **options, **KEPT)
        net = Logits(made()).train()
        losses = [soft_loss(net(x), torch.eye(K)[labels]).item() for x, labels in BATCHES[:n]]
        assert logged(run)[0] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_loss_function_of_the_user_gets_dense_targets_in_training_and_a_collator_the_columns_that_are_kept(tmp_path):
    seen = []

    def binary(outputs, labels, num_items_in_batch=None):
        seen.append(labels)
        return binary_cross_entropy_with_logits(outputs.logits, labels if labels.ndim == 2 else torch.eye(K)[labels])

    options = {"mixer": CutMix(), "compute_loss_func": binary, "max_steps": 1}
    trained(tmp_path, **options).evaluate()
    assert torch.equal(seen[0], bare(CutMix(), *BATCHES[0], 0)[1]) and torch.equal(seen[1], LABELS[:8])
    default, kept = (trained(tmp_path, **options, **more) for more in ({}, {"data_collator": dense} | KEPT))
    assert logged(default) == logged(kept)
    with pytest.raises(KeyError, match="width"):
        trained(tmp_path, data_collator=dense, **options)


def test_a_trainer_run_twice_or_resumed_gives_equal_losses(tmp_path):
    def run(**options):
        return logged(trained(tmp_path, mixer=Switch([Mixup(), CutMix()]), **options))

    first = run(save_strategy="steps", save_steps=2)
    torch.rand(3), np.random.rand(3), random.random()
    assert run() == first and len(set(first)) == 5
    assert run(resume=str(tmp_path / "checkpoint-2"))[2:] == first[2:]


class Lit(LightningMixin, lightning.LightningModule):
    """As in docs/loops/; keeps what it logs."""

    def configure_optimizers(self):
        self.losses = []
        return torch.optim.SGD(self.parameters(), lr=LR)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", soft_loss(self(batch[0]), torch.eye(K)[batch[1]]))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


def fit(mixer, resume=None, smoothing=0.0, net=None, **options):
    """The module after a fit on the batches, and the trainer."""
    lit = Lit(net or classifier(), mixer, num_classes=K, label_smoothing=smoothing, seed=SEED)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run = lightning.Trainer(**({"max_epochs": 1, "accelerator": "cpu"} | quiet | options))
    loader = DataLoader(TensorDataset(PIXELS, LABELS), batch_size=4)
    run.fit(lit, loader, loader, ckpt_path=resume)
    return lit, run


def test_lightning_trains_on_what_the_bare_mixer_gives_and_evaluates_on_images_as_they_are():
    ours, theirs = Recorder(), Recorder()
    lit, run = fit(ours, max_epochs=2)
    expected = reference_losses(classifier(), [[batch] for batch in BATCHES * 2], theirs)
    assert lit.losses == pytest.approx(expected, rel=1e-5)
    assert not differences(ours.plans, theirs.plans)
    assert run.callback_metrics["train_loss"].item() == pytest.approx(lit.losses[-1])
    with torch.no_grad():
        losses = [soft_loss(lit.step.model.eval()(x), torch.eye(K)[y]).item() * len(x) for x, y in BATCHES]
    assert run.callback_metrics["val_loss"].item() == pytest.approx(sum(losses) / len(PIXELS), rel=1e-4)
    for precision, rel in (("bf16-mixed", 0.05), ("64-true", 1e-5)):
        lit, _ = fit(CutMix(), precision=precision)
        assert lit.losses == pytest.approx(expected[:5], rel=rel)
        assert lit.step.model.fc.weight.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    lit, _ = fit(CutMix(), accumulate_grad_batches=2)  # micro-batches of one update share the generator
    expected = reference_losses(classifier(), [BATCHES[0:2], BATCHES[2:4]], CutMix())
    assert [np.mean(lit.losses[0:2]), np.mean(lit.losses[2:4])] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["automix", "samix", "adautomix", "comixup", "smmix"])
def test_a_mixer_works_where_all_of_a_model_is_bfloat16(name, transformer):
    net = transformer if name == "smmix" else None
    whole, half = (fit(MIXERS[name](), net=copy.deepcopy(net), precision=p)[0] for p in ("32-true", "bf16-true"))
    assert next(half.step.model.parameters()).dtype == torch.bfloat16
    assert half.losses[0] == pytest.approx(whole.losses[0], rel=0.1)


def test_lightning_runs_a_mixer_that_is_a_step_of_its_own():
    lit, run = fit(Stepper(), smoothing=0.1, max_epochs=2, accumulate_grad_batches=2)
    found = run.callback_metrics
    assert found["train_loss"] == pytest.approx(found["train_mix"] + found["train_clean"])
    # 5 batches make 3 updates an epoch, the last one from a single batch
    assert lit.step.mixer.progress == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert lit.step.mixer.scale.item() != 1 and "step.mixer.scale" in lit.state_dict()
    net, (x, labels) = classifier().train(), BATCHES[0]
    mixed, target = bare(Mixup(), x, labels, 0, smoothing=0.1)
    expected = soft_loss(net(mixed), target) + soft_loss(net(x), 0.9 * torch.eye(K)[labels] + 0.1 / K)
    assert lit.losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_lightning_run_twice_or_resumed_gives_equal_losses(tmp_path):
    (first, _), (second, run) = (fit(Switch([Mixup(), CutMix()]), max_epochs=n) for n in (2, 1))
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert second.losses == first.losses[:5] and len(set(first.losses)) == 10
    resumed, _ = fit(Switch([Mixup(), CutMix()]), resume=tmp_path / "last.ckpt", max_epochs=2)
    assert resumed.losses == first.losses[5:]
