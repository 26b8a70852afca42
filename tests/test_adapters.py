"""One mixer, every loop: timm's, torchvision's, a DataLoader's, the Trainer's and Lightning's, each the real one."""

import copy
import json
import random
import re
from pathlib import Path

import lightning
import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup as TimmMixup
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import AutoModelForImageClassification, ResNetConfig, TimmWrapperConfig, Trainer, TrainingArguments

from mixers import MIXERS, CutMix, Mixup, Out, Switch, adapters
from mixers.adapters import BatchMixer, LightningMixin, Logits, MixCollate, TrainerMixin, mix_batch
from mixers.taps import evaluating
from mixers.testing import differences, expect_global_rngs, global_rngs

# Lightning 2.6 asks torch's pytree in a way that torch 2.14 calls deprecated, and advises workers for any loader.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec:FutureWarning", "ignore:.*does not have many workers"
)

K, SEED, LR = 5, 3, 0.005
AT: dict = {"seed": SEED, "step": 1, "num_classes": K}
ANY_LOOP = [name for name, make in MIXERS.items() if make().needs == "batch"]
WITH_THE_MODEL = [name for name, make in MIXERS.items() if make().needs in ("batch", "model")]


class Recorder(CutMix):
    """CutMix that keeps the plans it was given."""

    def mix(self, x, y, **plan):
        self.plans = [*getattr(self, "plans", []), plan]
        return super().mix(x, y, **plan)


class Looker(Mixup):
    """Its lambda is the share of the model's largest probability: any number that only the model can give."""

    def plan(self, x, y, rng, model, criterion):
        with torch.no_grad(), evaluating(model):
            return super().plan(x, y, rng) | {"mask": model(x).softmax(1).amax(1).view(-1, 1, 1, 1)}


class Stepper(Mixup):
    """A step of its own, with a part of the loss, a parameter and a memory of ``after_step``."""

    def setup(self, model):
        self.scale, self.progress = nn.Parameter(torch.ones(())), []

    def forward(self, model, criterion, x, y, rng):
        out = super().forward(model, criterion, x, y, rng)
        return Out.of(out.logits, out.target, out.plan, mix=out.loss, clean=self.scale * criterion(model(x), y))

    def after_step(self, model, progress):
        self.progress.append(progress)


def images(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(rng.standard_normal((size, 3, 32, 48), dtype=np.float32))
    return pixels, torch.from_numpy(rng.integers(0, K, size))


def bare(mixer, x, labels, step, *look, smoothing=0.0):
    """The mixer by itself, as its contract says, after label smoothing."""
    y = (1 - smoothing) * torch.eye(K)[labels] + smoothing / K
    return mixer.mix(x, y, **mixer.plan(x, y, np.random.default_rng((SEED, step)), *look))


def soft_loss(logits, target):
    """Soft-target cross-entropy, written out."""
    return -(target * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()


def classifier():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=K)


def reference_losses(net, updates, mixer):
    """Plain SGD on the micro-batches of each update, all mixed with the generator of that update."""
    net, optimizer, losses = net.train(), torch.optim.SGD(net.parameters(), lr=LR), []
    for step, batches in enumerate(updates):
        optimizer.zero_grad()
        losses.append(0.0)
        for x, labels in batches:
            mixed, target = bare(mixer, x, labels, step, *((net, None) if mixer.needs == "model" else ()))
            part = soft_loss(net(mixed), target) * len(x) / sum(len(y) for _, y in batches)  # a mean over images
            part.backward()
            losses[-1] += part.item()
        optimizer.step()
    return losses


def test_what_a_mixer_needs_is_read_off_the_verbs_it_defines():
    anneals = type("Anneals", (Mixup,), {"after_step": lambda self, model, progress: None})
    takes_its_look = type("TakesItsLook", (Mixup,), {"needs": "model", "plan": lambda self, x, y, rng, *look: {}})
    assert [MIXERS[name]().needs for name in ("vanilla", "mixup", "cutmix", "deit", "rsb")] == ["batch"] * 5
    made = [Recorder(), Looker(), takes_its_look(), anneals(), Stepper()]
    assert [mixer.needs for mixer in made] == ["batch", "model", "model", "step", "step"]
    switches = [Switch([Mixup(), Looker()]), Switch([Looker(), Switch([Stepper()])])]
    assert [switch.needs for switch in switches] == ["model", "step"]  # what its neediest member needs


@pytest.mark.parametrize(
    ("build", "says", "works"),
    [
        (lambda: BatchMixer(Looker()), "Looker looks at the model, which BatchMixer cannot let it do", ANY_LOOP),
        (lambda: BatchMixer(Stepper()), "Stepper performs the training step itself", ANY_LOOP),
        (lambda: BatchMixer(Switch([Looker()])), "for Switch use mix_batch with model=, TrainerMixin", ANY_LOOP),
        *((lambda name=name: BatchMixer(MIXERS[name]()), "", ANY_LOOP) for name in MIXERS if name not in ANY_LOOP),
        (lambda: MixTrainer(mixer=Stepper()), "For Stepper use LightningMixin", WITH_THE_MODEL),
        (lambda: mix_batch(Looker(), *images(4), **AT), "mix_batch with model=", ANY_LOOP),
        (lambda: mix_batch(Stepper(), *images(4), **AT, model=nn.Identity()), "a loop of your own", WITH_THE_MODEL),
    ],
)
def test_a_mixer_that_a_loop_cannot_run_is_refused_with_what_works(build, says, works):
    with pytest.raises(ValueError) as caught:
        build()
    assert says.lower() in str(caught.value).lower()
    assert f"Here work: {', '.join(works)}. " in str(caught.value)


@pytest.mark.parametrize("name", ANY_LOOP)
def test_the_function_and_the_object_do_what_the_bare_mixer_does(name):
    batches, mixer = [images(size, seed) for seed, size in enumerate((1, 7, 8))], MIXERS[name]()
    before, rngs = copy.deepcopy(batches), global_rngs()
    mixup_fn = BatchMixer(MIXERS[name](), num_classes=K, seed=SEED)
    for step, (x, labels) in enumerate(batches * 2):
        expected = bare(mixer, x, labels, step)
        *found, plan = mix_batch(mixer, x, labels, seed=SEED, step=step, num_classes=K)
        *dense, _ = mix_batch(mixer, x, torch.eye(K)[labels], seed=SEED, step=step)
        for same in (mixup_fn(x, labels), found, dense, mixer.mix(x, torch.eye(K)[labels], **plan)):
            assert not differences(same, expected)
    assert not differences(before, batches)
    expect_global_rngs(rngs, "mixing")


def test_labels_of_any_integer_type_become_smoothed_targets_once_before_mixing_or_are_refused_in_words():
    # 1 - 0.2 + 0.2/4 for the class itself, 0.2/4 for the others
    expected = torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])
    for dtype in (torch.int32, torch.int64, torch.uint8):
        y = adapters.dense_targets(torch.tensor([2, 0]).to(dtype), num_classes=4, label_smoothing=0.2)
        assert torch.allclose(y, expected)
    assert torch.equal(adapters.dense_targets(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), label_smoothing=0.2), y[:1])
    x, labels = images(8)
    _, target, plan = mix_batch(Mixup(), x, labels, seed=SEED, step=0, num_classes=K, label_smoothing=0.1)
    smooth, lam = 0.9 * torch.eye(K)[labels] + 0.1 / K, plan["mask"].view(-1, 1)
    assert torch.allclose(target, lam * smooth + (1 - lam) * smooth[plan["index"]])
    for labels, given, says in (
        (torch.tensor([1, 2]), {}, "integer labels need num_classes"),
        (torch.tensor([0.5, 1.0]), {"num_classes": 4}, "got torch.float32 (2,)"),
        (torch.tensor([[0, 1]]), {"num_classes": 2}, "got torch.int64 (1, 2)"),
        (torch.tensor([[0.0, 1.0]]), {"num_classes": 3}, "num_classes = 3 columns, got (1, 2)"),
        (torch.tensor([1]), {"num_classes": 2, "label_smoothing": 1.0}, "label_smoothing must be in [0, 1), got 1.0"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            adapters.dense_targets(labels, **given)


def test_the_function_keeps_half_precision_of_images_alone_and_hands_on_the_model():
    (x, labels), net = images(7), classifier()
    expected, share = bare(Mixup(), x, labels, 1)
    for dtype in (torch.float16, torch.bfloat16):
        mixed, target, _ = mix_batch(Mixup(), x.to(dtype), labels, **AT)
        assert (mixed.dtype, target.dtype) == (dtype, torch.float32) and torch.equal(target, share)
        assert torch.allclose(mixed.float(), expected, atol=0.05)
    *found, plan = mix_batch(Looker(), x, labels, **AT, model=net)
    assert not differences(found, [*bare(Looker(), x, labels, 1, net, None)])
    assert torch.equal(plan["mask"].flatten(), net.eval()(x).softmax(1).amax(1))


LOADER = [images(size, seed) for seed, size in enumerate((8, 8, 7))]  # the last batch is odd


def test_timms_loss_takes_the_targets_and_switched_off_they_and_the_images_are_timms_own():
    net, (x, labels) = classifier().eval(), LOADER[2]
    ours = BatchMixer(CutMix(), num_classes=K, label_smoothing=0.1, seed=SEED)
    theirs = TimmMixup(label_smoothing=0.1, num_classes=K)
    mixed, target = ours(x, labels)
    logits, hard = net(mixed), (target > 0.2).float()
    by_hand = -(hard * torch.sigmoid(logits).log() + (1 - hard) * torch.sigmoid(-logits).log()).mean()
    assert BinaryCrossEntropy(target_threshold=0.2)(logits, target).item() == pytest.approx(by_hand.item(), rel=1e-5)
    (x, labels), ours.mixup_enabled, theirs.mixup_enabled = LOADER[0], False, False  # which is what timm's loop sets
    (pixels, target), (_, expected) = ours(x, labels), theirs(x.clone(), labels)
    assert torch.equal(pixels, x) and torch.allclose(target, expected)


def test_a_resumed_loop_goes_on_with_the_plans_it_would_have_had_and_the_object_says_what_it_is_made_of():
    whole, part, by_step, by_state = (BatchMixer(Recorder(), num_classes=K, seed=SEED) for _ in range(4))
    [whole(*batch) for batch in LOADER * 2]
    [part(*batch) for batch in LOADER]
    by_step.step = len(LOADER)
    by_state.load_state_dict(json.loads(json.dumps(part.state_dict())))
    for resumed in (by_step, by_state):
        [resumed(*batch) for batch in LOADER]
        assert not differences(whole.mixer.plans, part.mixer.plans + resumed.mixer.plans)
    made = BatchMixer(Mixup(0.2), num_classes=10, label_smoothing=0.1, seed=4)
    assert repr(made) == "BatchMixer(mixer=Mixup(alpha=0.2), num_classes=10, label_smoothing=0.1, seed=4)"


def test_it_stands_in_a_composition_of_torchvision_and_refuses_what_is_not_normalised_or_no_pair_of_tensors():
    mean, std, (_, labels) = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], images(7)
    pixels = torch.randint(256, (7, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected, share = bare(CutMix(), x, labels, 0)
    given = (tv_tensors.Image(pixels), labels)
    for arguments in (given, (given,)):  # as two arguments, and as one pair
        normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        mixed, target = v2.Compose([*normalise, BatchMixer(CutMix(), K, seed=SEED)])(*arguments)
        assert isinstance(mixed, tv_tensors.Image) and torch.equal(target, share)
        assert torch.allclose(mixed.as_subclass(Tensor), expected, atol=1e-5)
    with pytest.raises(TypeError, match="images must be float and normalised before mixing"):
        BatchMixer(CutMix(), K)(pixels, labels)
    for batch in (({"image": 0},), ((1, 2),), ([torch.zeros(1)] * 3,), (torch.zeros(2, 3),)):
        with pytest.raises(TypeError, match="expected a batch of two tensors, images and labels"):
            BatchMixer(CutMix(), K)(*batch)


PIXELS, LABELS = images(19)
BATCHES = [(PIXELS[i : i + 4], LABELS[i : i + 4]) for i in range(0, 19, 4)]  # 5 batches, the last one of 3
EXPECTED = [bare(CutMix(), *batch, step) for step, batch in enumerate(BATCHES * 2)]


def mixing_loader(**options):
    collate = MixCollate(BatchMixer(CutMix(), K, seed=SEED))
    return DataLoader(TensorDataset(PIXELS, LABELS), batch_size=4, collate_fn=collate, **options), collate


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, False), (3, False), (2, True)])
def test_a_batch_has_the_same_plan_in_any_number_of_workers_and_mixing_is_switched_off_in_them(workers, persistent):
    loader, collate = mixing_loader(num_workers=workers, persistent_workers=persistent)

    def epoch(number):
        collate.start(number * len(loader))
        return [tuple(batch) for batch in loader]

    assert not differences(epoch(0) + epoch(1), EXPECTED)
    assert not differences(epoch(1), EXPECTED[5:])  # resumed, or once more
    collate.mixer.mixup_enabled = False
    assert not differences([x for x, _ in epoch(1)], [x for x, _ in BATCHES])


def test_an_epoch_without_a_start_is_an_error_and_not_a_repetition_but_goes_on_by_itself_without_workers():
    before = copy.deepcopy((PIXELS, LABELS))
    loader, _ = mixing_loader(num_workers=2)
    assert not differences(list(map(tuple, loader)), EXPECTED[:5])
    with pytest.raises(RuntimeError, match=r"call start\(epoch \* len\(loader\)\) before each epoch"):
        list(loader)
    loader, _ = mixing_loader()
    assert not differences([tuple(batch) for _ in range(2) for batch in loader], EXPECTED)
    assert not differences(before, (PIXELS, LABELS))
    # what collates first is the caller's
    normalise = v2.Normalize([0.5] * 3, [0.2] * 3)
    collate = MixCollate(BatchMixer(Mixup(), K, seed=SEED), lambda samples: normalise(*default_collate(samples)))
    mixed, _ = collate([(PIXELS[i], LABELS[i]) for i in range(4)])
    assert torch.allclose(mixed, bare(Mixup(), (PIXELS[:4] - 0.5) / 0.2, LABELS[:4], 0)[0], atol=1e-5)


# What a dataset gives to a Trainer, with a column that no model takes.
PHOTOS = [{"pixel_values": x, "label": int(label), "width": 48.0} for x, label in zip(PIXELS, LABELS, strict=True)]
KEPT = {"remove_unused_columns": False}

MixTrainer: type = type("MixTrainer", (TrainerMixin, Trainer), {})  # as in docs/loops.md
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
    """As in docs/loops.md; keeps what it logs."""

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
    assert fit(CutMix(), precision="bf16-mixed")[0].losses == pytest.approx(expected[:5], rel=0.05)
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


def test_the_adapters_import_neither_transformers_nor_lightning_nor_torchvision():
    imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", Path(adapters.__file__).read_text(), re.M)
    assert {name.split(".")[0] for name in imported} == {"contextlib", "collections", "typing", "numpy", "torch", ""}
