"""What a recipe is: its fields, which of them go together, and how it is written down.

Read ``Recipe`` for the fields, ``check`` for what no single field can tell. ``resolve`` makes one from a name.
"""

import dataclasses
import functools
import re
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import yaml

from mixup_recipes.typed import Between, UserError, convert

LARGEST = 4096  # pixels of an image that is evaluated


Count = Annotated[int, Between(1)]
Share = Annotated[float, Between(0, 1)]
Positive = Annotated[float, Between(0, open_low=True)]
NotNegative = Annotated[float, Between(0)]
Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class Recipe:
    """All that decides a result.

    What decides only where and how it runs (paths, workers) is a ``mixup_recipes.training.job.Job``.
    """

    name: str = ""
    """Name of the recipe, SETTING_MIXER. The resolver sets it."""
    # --- data
    dataset: str = ""
    """The data: a Hub id, a prepared set (`mixup-recipes prepare`), a folder of class folders or of parquet files, or a
    table of paths and labels (CSV, TSV, JSON lines, parquet)."""
    dataset_config: str | None = None
    """Configuration of a Hub dataset that has several configurations."""
    dataset_revision: str | None = None
    """Commit, tag or branch of a Hub dataset."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "validation"
    """Split to evaluate on."""
    image_column: str = "image"
    """Column that holds the encoded images."""
    label_column: str = "label"
    """Column that holds the class."""
    multi_label: bool = False
    """An image may have several labels or none. Targets are multi-hot, the loss is binary cross-entropy, the metric
    mAP."""
    num_classes: Annotated[int, Between(0)] = 1000
    """Number of classes, which must agree with the data. 0 takes the number that the data have; so does --dataset on
    its own."""
    holdout: Share = 0.2
    """Share of each class that is held out for evaluation. It is used only where the data have a single split."""
    holdout_seed: Annotated[int, Between(0)] = 0
    """Seed of the hold-out. This seed, the class and the name of the file decide which images are held out."""
    exif_orientation: bool = False
    """Turn photos upright as their camera noted it. Published recipes never do this."""
    streaming: bool = False
    """Read a Hub dataset during training, without a copy. Sets other than image files are shuffled within 1000
    images."""
    max_train_samples: Count | None = None
    """For tests: train on only the first n images of a fixed shuffle."""
    max_eval_samples: Count | None = None
    """For tests: evaluate on only the first n images of a fixed shuffle."""
    # --- model
    model: str = ""
    """Name of the model in timm's registry."""
    model_args: dict = field(default_factory=dict)
    """Keyword arguments for timm.create_model."""
    drop_rate: Share | None = None
    """Dropout. Most models apply it only before the classifier. 'none' keeps the model's default."""
    drop_path_rate: Share | None = None
    """Stochastic depth rate. 'none' keeps the model's default."""
    init: Literal["timm", "mmcls_cnn", "mmcls_vit"] = "timm"
    """Initial weights: timm's, or those of the published runs, which start the head (and class token) differently."""
    pretrained: str | None = None
    """Trained weights to start from: timm (its own of this model), a timm name, hf-hub:OWNER/NAME, run folder or
    file."""
    data_config: Literal["recipe", "pretrained"] = "recipe"
    """Source of the sizes, mean, std and interpolation that are not given: this recipe, or the trained weights."""
    freeze: str | None = None
    """Weights that do not train: body (all but the classifier), or all up to a stage such as layer2 or blocks.3."""
    unfreeze_epochs: Positive | None = None
    """With freeze: every n epochs one more stage trains, from the classifier towards the image. 'none': no stage is
    added."""
    # --- mixing
    mixer: str = "vanilla"
    """Name of the mixer, see --list. --mixer.ARGUMENT sets one of its arguments, such as --mixer.alpha 0.5."""
    mix_prob: Share = 1.0
    """Share of the updates that mix. The other updates train on unmixed images."""
    mixer_args: dict = field(default_factory=dict)
    """Table of mixer -> arguments: what this setting changes in the published defaults of a mixer."""
    # --- optimisation
    epochs: Count = 100
    """Number of passes over the training set."""
    batch_size: Count = 256
    """Images per update, summed over all processes and accumulation steps."""
    per_device_train_batch_size: Count = 64
    """Images per forward pass, which BatchNorm and mixing see together. This number must divide batch_size."""
    drop_last: bool = True
    """Leave out the incomplete last update of an epoch. 'false' completes it with the first images of the epoch."""
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    """shuffle: each image once per epoch. balanced: an epoch as long with equally many images of each class, so that
    images of small classes repeat."""
    opt: str = "momentum"
    """Optimiser of timm. 'momentum' is SGD with plain momentum ('sgd' would be Nesterov)."""
    lr: Positive = 0.1
    """Peak learning rate at this batch size. It is never rescaled."""
    head_lr: Positive | None = None
    """Peak learning rate of the classifier. 'none' takes lr."""
    layer_decay: Annotated[float, Between(0, 1, open_low=True)] | None = None
    """Learning rate of each layer, as a share of the rate of the layer above it. 'none': all layers have the same
    rate."""
    momentum: Share = 0.9
    """Momentum of SGD."""
    opt_betas: tuple[float, float] | None = None
    """Betas of Adam-like optimisers. 'none' keeps the optimiser's default."""
    opt_eps: Positive | None = None
    """Epsilon of Adam-like optimisers. 'none' keeps the optimiser's default."""
    weight_decay: NotNegative = 1e-4
    """Weight decay."""
    decay_bias_and_norm: bool = False
    """Apply weight decay to biases, norm weights, tokens and position embeddings too."""
    clip_grad: Positive | None = None
    """Largest norm of the gradient. A longer gradient is scaled down to it. 'none' clips nothing."""
    sched: Literal["cosine", "constant"] = "cosine"
    """Shape of the learning rate over the run."""
    sched_on_updates: bool = True
    """Change the cosine at every update. 'false' changes it once per epoch."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of the cosine."""
    warmup_epochs: NotNegative = 0.0
    """Epochs of linear warm-up, per update. The cosine runs from the start, and the warm-up multiplies it."""
    warmup_lr: NotNegative = 0.0
    """Learning rate at the first update of the warm-up."""
    warmup_prefix: bool = False
    """Start the cosine when the warm-up ends, instead of multiplying the two."""
    # --- loss
    loss: Literal["ce", "bce_sum", "bce_mean", "focal", "asymmetric"] = "ce"
    """Cross-entropy of soft targets (ce) or its focal form; binary cross-entropy, summed or averaged over classes, or
    the asymmetric form of the sum."""
    focal_gamma: NotNegative | None = None
    """Focal loss: exponent of (1-p)^gamma, which makes sure predictions count less. 'none' is 2."""
    asl_gamma_neg: NotNegative | None = None
    """Asymmetric loss: exponent of p^gamma, which makes absent classes count less. 'none' is 4."""
    asl_gamma_pos: NotNegative | None = None
    """Asymmetric loss: exponent of (1-p)^gamma, which makes present classes that are sure count less. 'none' is 1."""
    asl_clip: Share | None = None
    """Asymmetric loss: margin that is subtracted from the probability p of absent classes. 'none' is 0.05."""
    bce_target_thresh: Share | None = None
    """Binarise targets at this value before the binary cross-entropy."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: multiply the targets of each class by N / (K n), so that all classes count the same."""
    smoothing: Share = 0.0
    """Label smoothing. It is applied once, before mixing."""
    # --- distillation
    distill_from: str | None = None
    """Teacher of the model, on the same mixed images: a timm name, hf-hub:OWNER/NAME, run folder or prepared
    weights."""
    distill: Literal["soft", "hard"] | None = None
    """soft: learn the teacher's probabilities (KL divergence). hard: learn its likeliest class. 'none' is soft."""
    distill_alpha: Annotated[float, Between(0, 1, open_low=True)] | None = None
    """Share of the teacher in the loss. At 1 no label counts. 'none' is 0.5."""
    distill_tau: Positive | None = None
    """Temperature of soft distillation, whose loss is multiplied by its square. 'none' is 1."""
    # --- training images
    image_size: Count = 224
    """Training resolution in pixels."""
    train_crop: Literal["rrc", "pad", "pad_zeros", "resize"] = "rrc"
    """RandomResizedCrop; a random crop after padding by an eighth, with reflection or with zeros; or resize and centre
    crop."""
    scale: tuple[float, float] = (0.08, 1.0)
    """RandomResizedCrop: smallest and largest area, as a fraction of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """RandomResizedCrop: smallest and largest width / height."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Interpolation of training and evaluation images, antialiased."""
    pixels: Literal["v1", "v2"] = "v1"
    """What draws crops and scales images: torchvision's transforms (v1), or the same laws, drawn and scaled in a
    fraction of the time (v2).

    Scaled pixels of both differ by at most one of 255 levels (bilinear), or a few at edges (bicubic). With v2 a large
    JPEG, of at least four times the sides of what is made of it, is decoded at 1/2, 1/4 or 1/8: of photos about half
    a level away on average, of pages of text up to three times that."""
    hflip: Share = 0.5
    """Probability of a horizontal flip."""
    aa: str | None = None
    """RandAugment policy in timm's notation, such as rand-m9-mstd0.5-inc1. 'none' is no RandAugment."""
    reprob: Share = 0.0
    """Probability of random erasing, which comes after the normalisation."""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """Random erasing fills with zeros, one colour, or noise."""
    aug_repeats: Count = 1
    """Copies of each image in an epoch, for repeated augmentation. The epoch keeps its length and has fewer images."""
    mean: Rgb = (0.485, 0.456, 0.406)
    """Mean of the channels, for images in [0, 1]."""
    std: Rgb = (0.229, 0.224, 0.225)
    """Standard deviation of the channels, for images in [0, 1]."""
    # --- evaluation
    eval_size: Count = 224
    """Side of the centre crop of evaluation images, in pixels."""
    eval_resize: Count = 256
    """Shorter side of evaluation images before the centre crop, in pixels."""
    eval_epochs: Count = 1
    """Evaluate every n epochs, and after the last one."""
    protocol: Literal["median", "best", "best_of_last"] = "median"
    """The reported number: the median of the last epochs, the best epoch, or the best of the last epochs."""
    protocol_epochs: Count = 5
    """How many epochs the protocol means by the last epochs."""
    trials: Count = 1
    """Number of runs with different seeds that the published number averages."""
    ema_decay: Share | None = None
    """Decay of the exponential moving average of the weights. 'none' keeps no average."""
    ema_warmup_epochs: NotNegative = 0.0
    """Epochs in which the decay of the average grows linearly from 0.9 times its value to its value."""
    report_ema: bool = False
    """Report and export the average instead of the raw weights."""
    sync_bn: bool = False
    """Share BatchNorm statistics between the GPUs."""
    precise_bn_samples: Count | None = None
    """Before each evaluation, average BatchNorm statistics anew over this many mixed training images (PreciseBN)."""
    # --- numerics
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast precision."""
    channels_last: bool = False
    """Use the NHWC memory layout, which is faster for convolutions."""
    torch_compile: bool = False
    """Compile the model stage by stage."""
    grad_checkpointing: bool = False
    """Keep no activations inside of the model's blocks: compute them again in the backward pass, for less memory.

    The numbers are the same. Mixers that change or read what lies in there are refused."""
    seed: Annotated[int, Between(0)] = 0
    """Seed of the initial weights, the order, the augmentation and the mixing."""


BINARY = ("bce_mean", "bce_sum", "asymmetric")
"""Losses of one yes or no to each class."""
EITHER = "bce_mean, bce_sum or asymmetric"

OF_A_LOSS = {"focal_gamma": "focal"} | dict.fromkeys(("asl_gamma_neg", "asl_gamma_pos", "asl_clip"), "asymmetric")
"""Fields that one loss alone has: field -> loss."""

MULTI_LABEL: dict[str, Any] = {"loss": "bce_mean", "smoothing": 0.0}
"""What ``multi_label`` puts in the place of values of other files, which would mean one label per image."""

# get_type_hints is costly, and the schema never changes
schema = functools.cache(functools.partial(typing.get_type_hints, include_extras=True))


def check(recipe: Recipe) -> None:
    """What no single field can tell. Raises ``UserError``."""
    if not recipe.dataset or not recipe.model:
        raise UserError(f"recipe {recipe.name!r} must set dataset and model")
    if recipe.streaming:
        whole = {"max_train_samples": None, "max_eval_samples": None, "aug_repeats": 1}
        for name, usual in (whole | {"sampler": "shuffle", "class_weights": "none"}).items():
            if getattr(recipe, name) != usual:
                raise UserError(f"{name} needs the whole table, so it cannot be combined with streaming")
    if recipe.multi_label:
        check_multi_label(recipe)
    if recipe.sampler == recipe.class_weights == "balanced":
        raise UserError("sampler balanced and class_weights balanced both make all classes count the same; choose one")
    if recipe.multi_label and recipe.sampler == "balanced":
        raise UserError("sampler balanced needs images with one class each, so it cannot be combined with multi_label")
    if recipe.batch_size % recipe.per_device_train_batch_size:
        fits = max(n for n in range(1, recipe.per_device_train_batch_size + 1) if recipe.batch_size % n == 0)
        raise UserError(
            f"batch_size {recipe.batch_size} is not a multiple of per_device_train_batch_size "
            f"{recipe.per_device_train_batch_size}; pass --per_device_train_batch_size {fits}, or another batch_size"
        )
    if recipe.warmup_epochs > recipe.epochs:
        raise UserError(
            f"warmup_epochs {recipe.warmup_epochs:g} exceeds epochs {recipe.epochs}: the run would end within its "
            "warm-up; pass --warmup_epochs 0, or more epochs"
        )
    if recipe.min_lr > recipe.lr:
        raise UserError(f"min_lr {recipe.min_lr:g} exceeds lr {recipe.lr:g}")
    if (recipe.report_ema or recipe.ema_warmup_epochs) and recipe.ema_decay is None:
        raise UserError("report_ema and ema_warmup_epochs need ema_decay")
    if recipe.precise_bn_samples is not None and (recipe.report_ema or recipe.torch_compile):
        other = "report_ema" if recipe.report_ema else "torch_compile"
        raise UserError(f"precise_bn_samples needs the layers of the raw model, so it cannot be combined with {other}")
    if recipe.eval_resize > LARGEST:  # such as in a stranger's recipe
        raise UserError(f"eval_resize: expected at most {LARGEST} pixels, got {recipe.eval_resize}")
    if recipe.eval_resize < recipe.eval_size:
        raise UserError(f"eval_resize {recipe.eval_resize} is smaller than the crop eval_size {recipe.eval_size}")
    for name in ("scale", "ratio"):
        low, high = getattr(recipe, name)
        if not 0 < low <= high or (name == "scale" and high > 1):
            raise UserError(
                f"{name}: expected 0 < low <= high{' <= 1' if name == 'scale' else ''}, got {low:g} {high:g}"
            )
    if min(recipe.std) <= 0:
        raise UserError(f"std: expected 3 numbers above 0, got {recipe.std}")
    check_policy(recipe.aa)
    if recipe.opt in ("momentum", "sgd") and (recipe.opt_betas or recipe.opt_eps):
        raise UserError(f"opt {recipe.opt!r} has no opt_betas and opt_eps; leave them out, or choose adamw")
    if recipe.bce_target_thresh is not None and recipe.loss not in BINARY:
        raise UserError(f"bce_target_thresh needs loss {EITHER}, got {recipe.loss}")
    for name, loss in OF_A_LOSS.items():
        if getattr(recipe, name) is not None and recipe.loss != loss:
            raise UserError(f"{name} needs loss {loss}, got {recipe.loss}")
    if recipe.unfreeze_epochs is not None:
        check_unfreezing(recipe)
    for name in ("distill", "distill_alpha", "distill_tau"):
        if getattr(recipe, name) is not None and recipe.distill_from is None:
            raise UserError(f"{name} needs distill_from, the teacher")
    if recipe.distill == "hard" and recipe.distill_tau is not None:
        raise UserError("distill_tau needs distill soft, got hard; leave it out, or take soft")


def check_unfreezing(recipe: Recipe) -> None:
    """Raise ``UserError`` for what a model that thaws does not go with."""
    if recipe.freeze is None:
        raise UserError("unfreeze_epochs unfreezes what freeze froze; pass --freeze body too, or --freeze with a stage")
    if recipe.unfreeze_epochs is not None and recipe.unfreeze_epochs >= recipe.epochs:
        raise UserError(
            f"unfreeze_epochs {recipe.unfreeze_epochs:g} would unfreeze nothing in {recipe.epochs} epochs; pass "
            "fewer, or leave it out"
        )
    if recipe.precise_bn_samples is not None:
        raise UserError(
            "precise_bn_samples recomputes the BatchNorm statistics of frozen layers, and unfreeze_epochs keeps "
            "them; choose one of them"
        )


def check_multi_label(recipe: Recipe) -> None:
    """Raise ``UserError`` for what means one label per image."""
    if recipe.loss not in BINARY:
        raise UserError(f"multi_label needs loss {EITHER}, got {recipe.loss}; leave out --loss")
    if recipe.smoothing:
        raise UserError(f"multi_label cannot be combined with smoothing {recipe.smoothing:g}; pass --smoothing 0")
    if recipe.streaming:
        raise UserError("multi_label reads all labels first, so it cannot be combined with streaming; leave it out")
    if recipe.distill_from is not None:
        raise UserError("distill_from compares probabilities that sum to 1, so it cannot be combined with multi_label")


# magnitude, its noise, whether operations grow with it, operations per image, probability of each, and which
POLICY_PART = re.compile(r"m(\d|10)|mstd\d+(\.\d+)?|inc[01]|n[1-9]\d?|p(0(\.\d+)?|1(\.0+)?)|t(weights|3aw?)")


def check_policy(aa: str | None) -> None:
    """Raise ``UserError`` unless timm understands every part of a RandAugment policy: it passes over some mistakes."""
    if aa is None:
        return
    head, *parts = aa.split("-")
    keys = [re.match("t|[a-z]*", part)[0] for part in parts]  # type: ignore[index]  # it always matches
    if head != "rand" or len(set(keys)) < len(keys) or not all(map(POLICY_PART.fullmatch, parts)):
        raise UserError(
            "aa: expected a RandAugment policy such as rand-m9-mstd0.5-inc1 (m0 to m10, mstd, inc0 or inc1, n, p, "
            f"tweights t3a or t3aw, each at most once), got {aa!r}"
        )


def changed(recipe: Recipe, **fields: Any) -> Recipe:
    """A recipe with other values in some fields, checked. Raises ``UserError``."""
    known = schema(Recipe)
    new = dataclasses.replace(recipe, **{k: convert(v, known[k], k) for k, v in fields.items()})
    check(new)
    return new


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a file that ``resolve`` reads back to the same recipe."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(recipe).items()}
    return yaml.safe_dump(values, sort_keys=False)


def explain(recipe: Recipe, origin: dict[str, str]) -> str:
    """Every value with its origin, one line each."""
    rows = [(k, v, origin.get(k, "")) for k, v in dataclasses.asdict(recipe).items() if k != "mixer_args"]
    for key, value in recipe.mixer_args.get(recipe.mixer, {}).items():
        path = f"mixer_args.{recipe.mixer}.{key}"
        rows.append((path, value, origin.get(path, "")))
    return "\n".join(f"{key:32} {value!s:36} {source}" for key, value, source in rows)


def differences(a: Recipe, b: Recipe, ignore: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Fields in which two recipes differ; of ``mixer_args`` only the chosen mixer's row counts."""

    def flat(recipe: Recipe) -> dict[str, Any]:
        return dataclasses.asdict(recipe) | {"mixer_args": recipe.mixer_args.get(recipe.mixer, {})}

    left, right = flat(a), flat(b)
    return {k: (left[k], right[k]) for k in left if left[k] != right[k] and k not in ignore}
