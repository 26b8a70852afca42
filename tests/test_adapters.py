"""One mixer, every loop: timm's, torchvision's, a DataLoader's, the Trainer's and Lightning's, each the real one."""

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup as TimmMixup
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import AutoModelForImageClassification, ResNetConfig, TimmWrapperConfig, Trainer, TrainingArguments

from mixers import MIXERS, CutMix, Mixer, Mixup, Out, Plan, Switch
from mixers.adapters import (
    BatchMixer,
    LightningMixin,
    MixCollate,
    TrainerMixin,
    dense_targets,
    mix_batch,
    soft_cross_entropy,
)
from mixers.testing import differences, expect_global_rngs, global_rngs

K, SEED, LR = 5, 3, 0.005
ANY_LOOP = [name for name, make in MIXERS.items() if make().needs == "batch"]
WITH_THE_MODEL = [name for name, make in MIXERS.items() if make().needs in ("batch", "model")]


class Recorder(CutMix):
    """CutMix that keeps the plans it was given."""

    def __init__(self, alpha: float = 1.0):
        super().__init__(alpha)
        self.plans: list[Plan] = []

    def mix(self, x: Tensor, y: Tensor, **plan: Any) -> tuple[Tensor, Tensor]:
        self.plans.append(plan)
        return super().mix(x, y, **plan)


class Looker(Mixup):
    """Its lambda is the share of the model's largest probability: any number that only the model can give."""

    def plan(self, x: Tensor, y: Tensor, rng: Any, model: nn.Module, criterion: Any) -> Plan:
        was = model.training
        with torch.no_grad():
            lam = model.eval()(x).softmax(1).amax(1)
        model.train(was)
        return super().plan(x, y, rng) | {"mask": lam.view(-1, 1, 1, 1)}


class Stepper(Mixup):
    """A step of its own, with a part of the loss, a parameter and a memory of ``after_step``."""

    def setup(self, model: nn.Module) -> None:
        self.scale = nn.Parameter(torch.ones(()))
        self.progress: list[float] = []

    def forward(self, model: nn.Module, criterion: Any, x: Tensor, y: Tensor, rng: Any) -> Out:
        out = super().forward(model, criterion, x, y, rng)
        return Out.of(out.logits, out.target, out.plan, mix=out.loss, clean=self.scale * criterion(model(x), y))

    def after_step(self, model: nn.Module, progress: float) -> None:
        self.progress.append(progress)


def images(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(rng.standard_normal((size, 3, 32, 48), dtype=np.float32))
    return pixels, torch.from_numpy(rng.integers(0, K, size))


def rng_of(step: int) -> np.random.Generator:
    return np.random.default_rng((SEED, step))


def bare(mixer: Mixer, x: Tensor, labels: Tensor, step: int, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The mixer by itself, as its contract says, after label smoothing."""
    y = (1 - smoothing) * torch.eye(K)[labels] + smoothing / K
    return mixer.mix(x, y, **mixer.plan(x, y, rng_of(step)))


def soft_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Soft-target cross-entropy, written out."""
    return -(target * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=K)


def reference_losses(
    net: nn.Module, updates: list[list[tuple[Tensor, Tensor]]], mixer: Mixer, lr: float = LR
) -> list[float]:
    """Plain SGD on the micro-batches of each update, all mixed with the generator of that update."""
    net, optimizer, losses = net.train(), torch.optim.SGD(net.parameters(), lr=lr), []
    for step, batches in enumerate(updates):
        optimizer.zero_grad()
        loss = 0.0
        for x, labels in batches:
            mixed, target = bare(mixer, x, labels, step)
            part = soft_loss(net(mixed), target) / len(batches)
            part.backward()
            loss += part.item()
        optimizer.step()
        losses.append(loss)
    return losses


# ------------------------------------------------------------------------------------------------ what a mixer needs


def test_what_a_mixer_needs_is_read_off_the_verbs_it_defines() -> None:
    class TakesItsLook(Mixup):
        needs = "model"

        def plan(self, x: Tensor, y: Tensor, rng: Any, *look: Any) -> Plan:
            _model, _criterion = look
            return super().plan(x, y, rng)

    class Anneals(Mixup):
        def after_step(self, model: nn.Module, progress: float) -> None:
            self.alpha = 1 - progress

    assert [MIXERS[name]().needs for name in ("vanilla", "mixup", "cutmix", "deit", "rsb")] == ["batch"] * 5
    made = [Recorder(), Looker(), TakesItsLook(), Anneals(), Stepper()]
    assert [mixer.needs for mixer in made] == ["batch", "model", "model", "step", "step"]
    # a switch needs what its neediest member needs
    assert Switch([Mixup(), Looker()]).needs == "model"
    assert Switch([Looker(), Switch([Stepper()])]).needs == "step"


def asked(mixer: Mixer, **given: Any) -> None:
    mix_batch(mixer, *images(4), seed=0, step=0, num_classes=K, **given)


@pytest.mark.parametrize(
    ("build", "mixer", "says", "works"),
    [
        (BatchMixer, Looker(), "Looker looks at the model, which BatchMixer cannot let it do", ANY_LOOP),
        (BatchMixer, Stepper(), "Stepper performs the training step itself", ANY_LOOP),
        (BatchMixer, Switch([Mixup(), Looker()]), "for Switch use mix_batch with model=, TrainerMixin", ANY_LOOP),
        *((BatchMixer, MIXERS[name](), "", ANY_LOOP) for name in MIXERS if name not in ANY_LOOP),
        (
            lambda m, _: type("T", (TrainerMixin, Trainer), {})(mixer=m),
            Stepper(),
            "For Stepper use LightningMixin",
            WITH_THE_MODEL,
        ),
        (lambda m, _: asked(m), Looker(), "mix_batch with model=", ANY_LOOP),
        (lambda m, _: asked(m, model=nn.Identity()), Stepper(), "or Step in a loop of your own", WITH_THE_MODEL),
    ],
)
def test_a_mixer_that_a_loop_cannot_run_is_refused_with_what_works(build, mixer, says: str, works: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        build(mixer, K)
    assert says.lower() in str(caught.value).lower()
    assert f"Here work: {', '.join(works)}. " in str(caught.value)


# ------------------------------------------------------------------------------------------------ the function


@pytest.mark.parametrize("name", ANY_LOOP)
def test_the_function_and_the_object_do_what_the_bare_mixer_does(name: str) -> None:
    batches, mixer = [images(size, seed) for seed, size in enumerate((1, 7, 8))], MIXERS[name]()
    before, rngs = copy.deepcopy(batches), global_rngs()
    mixup_fn = BatchMixer(MIXERS[name](), num_classes=K, seed=SEED)
    for step, (x, labels) in enumerate(batches * 2):
        expected = bare(mixer, x, labels, step)
        assert not differences(expected, mixup_fn(x, labels))
        mixed, target, plan = mix_batch(mixer, x, labels, seed=SEED, step=step, num_classes=K)
        assert not differences((mixed, target), expected)
        assert not differences((mixed, target), mixer.mix(x, torch.eye(K)[labels], **plan))
        dense = mix_batch(mixer, x, torch.eye(K)[labels], seed=SEED, step=step)
        assert not differences((dense.x, dense.y), (mixed, target))
    assert not differences(before, batches)
    expect_global_rngs(rngs, "mixing")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_labels_of_any_integer_type_become_smoothed_targets_once(dtype: torch.dtype) -> None:
    y = dense_targets(torch.tensor([2, 0]).to(dtype), num_classes=4, label_smoothing=0.2)
    # 1 - 0.2 + 0.2/4 for the class itself, 0.2/4 for the others
    assert torch.allclose(y, torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]))
    again = dense_targets(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), label_smoothing=0.2)
    assert torch.equal(again, y[:1])


def test_smoothing_comes_before_mixing() -> None:
    x, labels = images(8)
    _, target, plan = mix_batch(Mixup(), x, labels, seed=SEED, step=0, num_classes=K, label_smoothing=0.1)
    smooth, lam = 0.9 * torch.eye(K)[labels] + 0.1 / K, plan["mask"].view(-1, 1)
    assert torch.allclose(target, lam * smooth + (1 - lam) * smooth[plan["index"]])


@pytest.mark.parametrize(
    ("labels", "given", "says"),
    [
        (torch.tensor([1, 2]), {}, "integer labels need num_classes"),
        (torch.tensor([0.5, 1.0]), {"num_classes": 4}, "got torch.float32 (2,)"),
        (torch.tensor([[0, 1]]), {"num_classes": 2}, "got torch.int64 (1, 2)"),
        (torch.tensor([[0.0, 1.0]]), {"num_classes": 3}, "num_classes = 3 columns, got (1, 2)"),
        (torch.tensor([1]), {"num_classes": 2, "label_smoothing": 1.0}, "label_smoothing must be in [0, 1), got 1.0"),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_words(labels: Tensor, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        dense_targets(labels, **given)
    assert says in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_in_half_precision_keep_it_and_targets_do_not_take_it(dtype: torch.dtype) -> None:
    x, labels = images(7)
    mixed, target, _ = mix_batch(Mixup(), x.to(dtype), labels, seed=SEED, step=1, num_classes=K)
    expected, share = bare(Mixup(), x, labels, 1)
    assert (mixed.dtype, target.dtype) == (dtype, torch.float32)
    assert torch.equal(target, share)
    assert torch.allclose(mixed.float(), expected, atol=0.05)


def test_a_mixer_that_looks_at_the_model_gets_it_from_the_function() -> None:
    (x, labels), net = images(7), classifier()
    mixed, _, plan = mix_batch(Looker(), x, labels, seed=SEED, step=0, num_classes=K, model=net)
    lam = net.eval()(x).softmax(1).amax(1).view(-1, 1, 1, 1)
    index = Mixup().plan(x, torch.eye(K)[labels], rng_of(0))["index"]
    assert torch.equal(plan["index"], index)
    assert torch.allclose(mixed, lam * x + (1 - lam) * x[index], atol=1e-6)


# ------------------------------------------------------------------------------------------------ timm's loop


def train_one_epoch(
    epoch: int, net: nn.Module, loader: Any, optimizer: Any, loss_fn: nn.Module, mixup_fn: Any, mixup_off_epoch: int = 0
) -> list[float]:
    """timm's loop without what needs a GPU: what it does with ``mixup_fn`` is all here."""
    if mixup_off_epoch and epoch >= mixup_off_epoch:
        mixup_fn.mixup_enabled = False
    losses = []
    net.train()
    for inputs, target in loader:
        inputs, target = mixup_fn(inputs, target)
        loss = loss_fn(net(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


LOADER = [images(size, seed) for seed, size in enumerate((8, 8, 7))]  # the last batch is odd


def test_timms_loop_trains_on_what_the_bare_mixer_gives() -> None:
    net, mixer = classifier(), MIXERS["deit"]()
    optimizer, loss_fn = torch.optim.SGD(net.parameters(), lr=LR), SoftTargetCrossEntropy()
    mixup_fn = BatchMixer(mixer, num_classes=K, seed=SEED)
    found = [loss for e in range(2) for loss in train_one_epoch(e, net, LOADER, optimizer, loss_fn, mixup_fn)]
    assert found == pytest.approx(reference_losses(classifier(), [[b] for b in LOADER * 2], mixer), rel=1e-5)


def test_timms_binary_cross_entropy_takes_the_targets() -> None:
    net, (x, labels) = classifier().eval(), LOADER[2]
    mixed, target = BatchMixer(CutMix(), num_classes=K, label_smoothing=0.1, seed=SEED)(x, labels)
    logits, hard = net(mixed), (target > 0.2).float()
    by_hand = -(hard * torch.sigmoid(logits).log() + (1 - hard) * torch.sigmoid(-logits).log()).mean()
    assert BinaryCrossEntropy(target_threshold=0.2)(logits, target).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_switched_off_it_gives_the_images_and_timms_own_targets() -> None:
    x, labels = LOADER[0]
    ours = BatchMixer(CutMix(), num_classes=K, label_smoothing=0.1, seed=SEED)
    theirs = TimmMixup(label_smoothing=0.1, num_classes=K)
    net, optimizer = nn.Flatten(), torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    for mixup_fn in (ours, theirs):
        empty: list[Any] = []
        train_one_epoch(4, net, empty, optimizer, SoftTargetCrossEntropy(), mixup_fn, mixup_off_epoch=4)
    (pixels, target), (_, expected) = ours(x, labels), theirs(x.clone(), labels)
    assert torch.equal(pixels, x)
    assert torch.allclose(target, expected)


@pytest.mark.parametrize("how", ["step", "state_dict"])
def test_a_resumed_loop_goes_on_with_the_plans_it_would_have_had(how: str) -> None:
    whole, part, resumed = (BatchMixer(Recorder(), num_classes=K, seed=SEED) for _ in range(3))
    [whole(*batch) for batch in LOADER * 2]
    [part(*batch) for batch in LOADER]
    if how == "step":
        resumed.step = len(LOADER)
    else:
        resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
    [resumed(*batch) for batch in LOADER]
    assert not differences(whole.mixer.plans, part.mixer.plans + resumed.mixer.plans)


def test_the_object_says_what_it_is_made_of() -> None:
    made = BatchMixer(Mixup(0.2), num_classes=10, label_smoothing=0.1, seed=4)
    assert repr(made) == "BatchMixer(mixer=Mixup(alpha=0.2), num_classes=10, label_smoothing=0.1, seed=4)"


# ------------------------------------------------------------------------------------------------ torchvision


@pytest.mark.parametrize("as_pair", [False, True])
def test_it_stands_in_a_composition_of_torchvision(as_pair: bool) -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    pixels = torch.randint(256, (7, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    _, labels = images(7)
    compose = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), BatchMixer(CutMix(), K, seed=SEED)]
    )
    given = (tv_tensors.Image(pixels), labels)
    mixed, target = compose(given) if as_pair else compose(*given)
    x = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected, share = bare(CutMix(), x, labels, 0)
    assert isinstance(mixed, tv_tensors.Image)
    assert torch.allclose(mixed.as_subclass(Tensor), expected, atol=1e-5)
    assert torch.equal(target, share)


def test_images_that_are_not_normalised_yet_are_refused() -> None:
    x, labels = images(4)
    with pytest.raises(TypeError, match="images must be float and normalised before mixing"):
        BatchMixer(CutMix(), K)(x.to(torch.uint8), labels)


@pytest.mark.parametrize("batch", [({"image": 0},), ((1, 2),), ([torch.zeros(1)] * 3,), (torch.zeros(2, 3),)])
def test_what_is_no_pair_of_tensors_is_refused(batch: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="expected a batch of two tensors, images and labels"):
        BatchMixer(CutMix(), K)(*batch)


# ------------------------------------------------------------------------------------------------ workers of a loader

PIXELS, LABELS = images(19)
BATCHES = [(PIXELS[i : i + 4], LABELS[i : i + 4]) for i in range(0, 19, 4)]  # 5 batches, the last one of 3


def epochs_of(loader: DataLoader, collate: MixCollate, first: int, last: int) -> list[Any]:
    found = []
    for epoch in range(first, last):
        collate.start(epoch * len(loader))
        found += [tuple(batch) for batch in loader]
    return found


def mixing_loader(mixer: Mixer, workers: int = 0, persistent: bool = False) -> tuple[DataLoader, MixCollate]:
    collate = MixCollate(BatchMixer(mixer, K, seed=SEED))
    options = {"num_workers": workers, "persistent_workers": persistent}
    return DataLoader(TensorDataset(PIXELS, LABELS), batch_size=4, collate_fn=collate, **options), collate


EXPECTED = [bare(CutMix(), *batch, step) for step, batch in enumerate(BATCHES * 2)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, False), (3, False), (2, True)])
def test_a_batch_has_the_same_plan_in_any_number_of_workers(workers: int, persistent: bool) -> None:
    loader, collate = mixing_loader(CutMix(), workers, persistent)
    assert not differences(epochs_of(loader, collate, 0, 2), EXPECTED)
    assert not differences(epochs_of(loader, collate, 1, 2), EXPECTED[5:])  # resumed, or once more


def test_an_epoch_without_a_start_is_an_error_and_not_a_repetition() -> None:
    loader, _ = mixing_loader(CutMix(), 2)
    assert not differences(list(map(tuple, loader)), EXPECTED[:5])
    with pytest.raises(RuntimeError, match=r"call start\(epoch \* len\(loader\)\) before each epoch"):
        list(loader)


def test_without_workers_the_steps_go_on_by_themselves_and_the_callers_tensors_stay() -> None:
    before = copy.deepcopy((PIXELS, LABELS))
    loader, _ = mixing_loader(CutMix())
    assert not differences([tuple(batch) for _ in range(2) for batch in loader], EXPECTED)
    assert not differences(before, (PIXELS, LABELS))


@pytest.mark.parametrize("persistent", [False, True])
def test_mixing_is_switched_off_in_workers_too(persistent: bool) -> None:
    loader, collate = mixing_loader(CutMix(), 2, persistent)
    epochs_of(loader, collate, 0, 1)
    collate.mixer.mixup_enabled = False
    assert not differences([x for x, _ in epochs_of(loader, collate, 1, 2)], [x for x, _ in BATCHES])


def test_what_collates_first_is_the_callers() -> None:
    normalise = v2.Normalize([0.5] * 3, [0.2] * 3)
    collate = MixCollate(BatchMixer(Mixup(), K, seed=SEED), lambda samples: normalise(*default_collate(samples)))
    mixed, _ = collate([(PIXELS[i], LABELS[i]) for i in range(4)])
    assert torch.allclose(mixed, bare(Mixup(), (PIXELS[:4] - 0.5) / 0.2, LABELS[:4], 0)[0], atol=1e-5)


# ------------------------------------------------------------------------------------------------ transformers' Trainer


class Photos(Dataset):
    """What a dataset gives to a Trainer, with a column that no model takes."""

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": PIXELS[index], "label": int(LABELS[index]), "width": 48.0}


class MixTrainer(TrainerMixin, Trainer):
    """As in docs/loops.md."""


def timm_wrapper() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(TimmWrapperConfig(architecture="test_resnet", num_labels=K))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=K, hidden_act="relu"
    )
    return AutoModelForImageClassification.from_config(config)


def trainer(folder: Path, make: type = MixTrainer, net: nn.Module | None = None, **options: Any) -> Any:
    """A Trainer on Photos in order, with plain SGD; ``options`` are those of the Trainer or of its arguments."""
    net = timm_wrapper() if net is None else net
    own = ("mixer", "data_collator", "compute_loss_func")
    arguments = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "seed": SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    } | {name: value for name, value in options.items() if name not in own}
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    return make(
        model=net,
        args=TrainingArguments(**arguments),
        train_dataset=Photos(),
        eval_dataset=Photos(),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        **{name: value for name, value in options.items() if name in own},
    )


def trained(*args: Any, **options: Any) -> Any:
    run = trainer(*args, **options)
    run.train()
    return run


def logged(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def logits_of(net: nn.Module) -> nn.Module:
    """A model of transformers that returns logits, for the reference."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(pixel_values=x).logits

    return Net()


@pytest.mark.parametrize("make", [timm_wrapper, resnet])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_minimises_soft_cross_entropy_of_the_mixed_batch(
    make: Any, accumulation: int, tmp_path: Path
) -> None:
    mixer = Recorder()
    run = trained(tmp_path, net=make(), mixer=mixer, gradient_accumulation_steps=accumulation)
    updates = [BATCHES[i : i + accumulation] for i in range(0, len(BATCHES), accumulation)]
    assert logged(run) == pytest.approx(reference_losses(logits_of(make()), updates, CutMix()), rel=1e-4)
    expected = [
        CutMix().plan(x, torch.eye(K)[labels], rng_of(step))
        for step, batches in enumerate(updates)
        for x, labels in batches
    ]
    assert not differences(mixer.plans, expected)


def test_the_trainer_smooths_labels_before_mixing_and_evaluates_on_images_as_they_are(tmp_path: Path) -> None:
    mixer = Recorder()
    run = trained(tmp_path, mixer=mixer, eval_strategy="epoch", label_smoothing_factor=0.1)
    mixed, target = bare(CutMix(), *BATCHES[0], 0, smoothing=0.1)
    net = logits_of(timm_wrapper()).train()
    assert logged(run)[0] == pytest.approx(soft_loss(net(mixed), target).item(), rel=1e-5)

    assert len(mixer.plans) == len(BATCHES)
    net = run.model.eval()
    with torch.no_grad():
        logits = net(pixel_values=PIXELS).logits
    expected = soft_loss(logits, torch.eye(K)[LABELS]).item()
    (found,) = (entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)
    assert found == pytest.approx(expected, rel=1e-4)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert np.allclose(run.predict(Photos()).predictions, logits, atol=1e-4)

    run.save_model()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("problem_type") is None and run.model.config.problem_type is None  # it does not turn multi-label
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert not differences(dict(again.state_dict()), dict(run.model.state_dict()))


def test_the_trap_that_the_loss_avoids_is_still_there() -> None:
    net, (x, labels) = timm_wrapper().eval(), BATCHES[0]
    target = torch.eye(K)[labels]
    out = net(pixel_values=x, labels=target)
    binary = nn.functional.binary_cross_entropy_with_logits(out.logits, target)
    assert torch.equal(out.loss, binary) and net.config.problem_type == "multi_label_classification"
    assert soft_cross_entropy(out, target).item() == pytest.approx(soft_loss(out.logits, target).item(), rel=1e-5)
    assert soft_cross_entropy(out, labels).item() == pytest.approx(soft_loss(out.logits, target).item(), rel=1e-5)


def stacked(samples: list[dict[str, Any]]) -> tuple[Tensor, list[int]]:
    return torch.stack([sample["pixel_values"] for sample in samples]), [sample["label"] for sample in samples]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_is_right_for_a_collator_that_gives_dense_targets(accumulation: int, tmp_path: Path) -> None:
    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        x, labels = stacked(samples)
        return {"pixel_values": x, "labels": torch.eye(K)[labels]}

    options = {"data_collator": collate, "compute_loss_func": soft_cross_entropy, "max_steps": 1}
    run = trained(tmp_path, Trainer, gradient_accumulation_steps=accumulation, **options)
    net = logits_of(timm_wrapper()).train()
    losses = [soft_loss(net(x), torch.eye(K)[labels]).item() for x, labels in BATCHES[:accumulation]]
    assert logged(run)[0] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_loss_function_of_the_user_gets_dense_targets_in_training(tmp_path: Path) -> None:
    seen = []

    def binary(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        seen.append(labels)
        y = labels if labels.ndim == 2 else torch.eye(K)[labels]
        return nn.functional.binary_cross_entropy_with_logits(outputs.logits, y)

    run = trained(tmp_path, mixer=CutMix(), compute_loss_func=binary, max_steps=1)
    assert torch.equal(seen[0], bare(CutMix(), *BATCHES[0], 0)[1])
    run.evaluate()
    assert torch.equal(seen[1], LABELS[:8])


def test_columns_are_removed_or_kept_as_the_trainers_argument_says(tmp_path: Path) -> None:
    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert all(sample["width"] == 48.0 for sample in samples)
        x, labels = stacked(samples)
        return {"pixel_values": x, "labels": torch.tensor(labels)}

    options = {"mixer": CutMix(), "data_collator": collate, "max_steps": 2}
    default = trained(tmp_path, mixer=CutMix(), max_steps=2)
    assert logged(default) == logged(trained(tmp_path, remove_unused_columns=False, **options))
    with pytest.raises(KeyError, match="width"):
        trained(tmp_path, **options)


def test_a_trainer_run_twice_or_resumed_gives_equal_losses(tmp_path: Path) -> None:
    first = trained(tmp_path / "a", mixer=Switch([Mixup(), CutMix()]), save_strategy="steps", save_steps=2)
    torch.rand(3), np.random.rand(3), random.random()
    second = trained(tmp_path / "b", mixer=Switch([Mixup(), CutMix()]))
    assert logged(first) == logged(second) and len(set(logged(first))) == 5
    resumed = trainer(tmp_path / "b", mixer=Switch([Mixup(), CutMix()]))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert logged(resumed)[2:] == logged(first)[2:]


def test_the_trainer_mixes_in_bf16(tmp_path: Path) -> None:
    mixer = Recorder()
    run = trained(tmp_path, mixer=mixer, bf16=True)
    expected = reference_losses(logits_of(timm_wrapper()), [[batch] for batch in BATCHES], CutMix())
    assert logged(run) == pytest.approx(expected, rel=0.05)
    assert not differences(mixer.plans[4], CutMix().plan(BATCHES[4][0], torch.eye(K)[BATCHES[4][1]], rng_of(4)))


@pytest.mark.parametrize("make", [timm_wrapper, resnet])
def test_a_mixer_that_looks_at_the_model_gets_it_from_the_trainer(make: Any, tmp_path: Path) -> None:
    run = trained(tmp_path, net=make(), mixer=Looker(), max_steps=1)
    net, (x, labels) = logits_of(make()), BATCHES[0]
    mixed, target, _ = mix_batch(Looker(), x, labels, seed=SEED, step=0, num_classes=K, model=net)
    assert logged(run)[0] == pytest.approx(soft_loss(net.train()(mixed), target).item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------ Lightning


class Lit(LightningMixin, lightning.LightningModule):
    """As in docs/loops.md; keeps what it logs."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.losses: list[float] = []
        return torch.optim.SGD(self.parameters(), lr=LR)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, labels = batch
        self.log("val_loss", soft_loss(self(x), torch.eye(K)[labels]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


def fit(lit: Lit, resume: Path | None = None, **options: Any) -> lightning.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run = lightning.Trainer(**({"max_epochs": 1, "accelerator": "cpu"} | quiet | options))
    loader = DataLoader(TensorDataset(PIXELS, LABELS), batch_size=4)
    run.fit(lit, loader, loader, ckpt_path=resume)
    return run


# Lightning 2.6 asks torch's pytree in a way that torch 2.14 calls deprecated, and advises workers for any loader.
lightnings_own = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec:FutureWarning", "ignore:.*does not have many workers"
)


@lightnings_own
def test_lightning_trains_on_what_the_bare_mixer_gives_and_evaluates_on_images_as_they_are() -> None:
    mixer = Recorder()
    lit = Lit(classifier(), mixer, num_classes=K, seed=SEED)
    run = fit(lit, max_epochs=2)
    updates = [[batch] for batch in BATCHES * 2]
    assert lit.losses == pytest.approx(reference_losses(classifier(), updates, CutMix()), rel=1e-5)
    expected = [CutMix().plan(x, torch.eye(K)[y], rng_of(step)) for step, (x, y) in enumerate(BATCHES * 2)]
    assert not differences(mixer.plans, expected)
    assert run.callback_metrics["train_loss"].item() == pytest.approx(lit.losses[-1])
    with torch.no_grad():
        losses = [(soft_loss(lit.step.model.eval()(x), torch.eye(K)[y]).item(), len(x)) for x, y in BATCHES]
    expected = sum(loss * size for loss, size in losses) / len(PIXELS)
    assert run.callback_metrics["val_loss"].item() == pytest.approx(expected, rel=1e-4)


@lightnings_own
def test_micro_batches_of_one_update_share_the_generator_in_lightning() -> None:
    lit = Lit(classifier(), CutMix(), num_classes=K, seed=SEED)
    fit(lit, accumulate_grad_batches=2)
    updates = [BATCHES[0:2], BATCHES[2:4], BATCHES[4:5]]
    found = [np.mean(lit.losses[0:2]), np.mean(lit.losses[2:4])]
    assert found == pytest.approx(reference_losses(classifier(), updates, CutMix())[:2], rel=1e-5)


@lightnings_own
def test_lightning_runs_a_mixer_that_is_a_step_of_its_own() -> None:
    lit = Lit(classifier(), Stepper(), num_classes=K, label_smoothing=0.1, seed=SEED)
    found = fit(lit, max_epochs=2, accumulate_grad_batches=2).callback_metrics
    assert found["train_loss"] == pytest.approx(found["train_mix"] + found["train_clean"])
    # 5 batches make 3 updates an epoch, the last one from a single batch
    assert lit.step.mixer.progress == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert lit.step.mixer.scale.item() != 1 and "step.mixer.scale" in lit.state_dict()
    net, (x, labels) = classifier().train(), BATCHES[0]
    mixed, target = bare(Mixup(), x, labels, 0, smoothing=0.1)
    expected = soft_loss(net(mixed), target) + soft_loss(net(x), 0.9 * torch.eye(K)[labels] + 0.1 / K)
    assert lit.losses[0] == pytest.approx(expected.item(), rel=1e-5)


@lightnings_own
def test_a_lightning_run_twice_or_resumed_gives_equal_losses(tmp_path: Path) -> None:
    def new() -> Lit:
        return Lit(classifier(), Switch([Mixup(), CutMix()]), num_classes=K, seed=SEED)

    first, second, resumed = new(), new(), new()
    fit(first, max_epochs=2)
    fit(second, max_epochs=1).save_checkpoint(tmp_path / "last.ckpt")
    assert second.losses == first.losses[:5] and len(set(first.losses)) == 10
    fit(resumed, resume=tmp_path / "last.ckpt", max_epochs=2)
    assert resumed.losses == first.losses[5:]


@lightnings_own
def test_lightning_mixes_in_bf16() -> None:
    lit = Lit(classifier(), CutMix(), num_classes=K, seed=SEED)
    fit(lit, precision="bf16-mixed")
    expected = reference_losses(classifier(), [[batch] for batch in BATCHES], CutMix())
    assert lit.losses == pytest.approx(expected, rel=0.05)


def test_the_adapters_import_neither_transformers_nor_lightning_nor_torchvision() -> None:
    code = (
        "import sys, mixers.base; before = set(sys.modules); import mixers.adapters; print(set(sys.modules) - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "{'mixers.adapters'}"
