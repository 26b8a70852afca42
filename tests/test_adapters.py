"""One mixer in a loop of one's own: timm's, torchvision's, a DataLoader's, each the real one."""

import contextlib
import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup as TimmMixup
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import Trainer, TrainingArguments

from mixers import MIXERS, REGRESSION, CutMix, Mixup, Out, Switch, adapters
from mixers.adapters import BatchMixer, MixCollate, TrainerMixin, mix_batch
from mixers.taps import evaluating
from mixers.testing import differences, expect_global_rngs, global_rngs

K, SEED, LR = 5, 3, 0.005
AT: dict = {"seed": SEED, "step": 1, "num_classes": K}
ANY_LOOP = [name for name, make in MIXERS.items() if make().needs == "batch"]
WITH_THE_MODEL = [name for name, make in MIXERS.items() if make().needs in ("batch", "model")]
MixTrainer: type = type("MixTrainer", (TrainerMixin, Trainer), {})  # as in docs/loops/


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


def test_the_tables_of_the_loops_page_say_what_each_adapter_runs_and_what_each_mixer_needs(tmp_path):
    page = (Path(__file__).parents[1] / "docs/loops.md").read_text()
    rows = [re.split(r" *\| *", line.strip("| ")) for line in page.splitlines() if line.startswith("| ")]
    made = {"batch": Mixup(), "model": Looker(), "step": Stepper()}
    adapter = {
        "mix_batch": lambda mixer: mix_batch(mixer, *images(4), **AT),
        "mix_batch(model=...)": lambda mixer: mix_batch(mixer, *images(4), **AT, model=classifier()),
        "BatchMixer": BatchMixer,
        "MixCollate": lambda mixer: MixCollate(BatchMixer(mixer)),
        "TrainerMixin": lambda mixer: MixTrainer(
            classifier(), TrainingArguments(str(tmp_path), use_cpu=True), mixer=mixer
        ),
        "LightningMixin": lambda mixer: adapters.LightningMixin(classifier(), mixer),
    }
    said = {row[0].strip("`"): row[-1].split(", ") for row in rows if row[0].strip("`") in adapter}
    assert said.keys() == adapter.keys()
    for name, make in adapter.items():
        for needs, mixer in made.items():
            with contextlib.nullcontext() if needs in said[name] else pytest.raises(ValueError, match="Here work"):
                make(mixer)
    listed = {row[0]: row[-1].split(", ") for row in rows if row[0] in made}
    known = (MIXERS | REGRESSION).items()
    assert listed == {needs: [name for name, make in known if make().needs == needs] for needs in made}


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


def test_the_adapters_import_neither_transformers_nor_lightning_nor_torchvision():
    imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", Path(adapters.__file__).read_text(), re.M)
    assert {name.split(".")[0] for name in imported} == {"contextlib", "collections", "typing", "numpy", "torch", ""}
