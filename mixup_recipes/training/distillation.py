"""Distillation: the model learns from a trained one too, from what that says of the very images that it sees itself.

Training Data-efficient Image Transformers & Distillation through Attention. Touvron et al. ICML 2021,
https://arxiv.org/abs/2012.12877. Knowledge Distillation: A Good Teacher Is Patient and Consistent. Beyer et al. CVPR
2022, https://arxiv.org/abs/2106.05237: the teacher sees the same crop, mixed in the same way, and ``alpha`` 1 trains on
it alone.

Formula: z being the model's logits of an image, t the teacher's, L the recipe's loss and y the mixed target, of each
sample ``(1 - alpha) * L(z, y) + alpha * D``. Soft: ``D = tau^2 * KL(softmax(t / tau) || softmax(z / tau))``, whatever L
is. Hard: ``D = L(z, onehot(argmax t))``, for which tau means nothing.

What is distilled is each prediction of the model itself that a mixer has a loss of: that of the mixed batch, of
AugMix that of the clean one, of RegMixup both. What else a mixer's loss has is as without a teacher: second
classifiers, momentum encoders, masks, regularisers, the clean prediction of SUMix, the second batch of MergeMix, and
the clean batch of PuzzleMix and Co-Mixup, whose gradient says where a class is. A mixer that weighs samples weighs the
whole.

Deviations: DeiT has a second classifier and token for the teacher, here there is one head; its code divides the
divergence by the number of classes, here it is summed over them, as in both papers.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mixers import Mixer, Out, Step, taps
from mixers.base import Criterion
from mixup_recipes.data.classes import places
from mixup_recipes.data.images import per_channel
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.backbones import cfg_of, check_input
from mixup_recipes.typed import UserError


class Teacher(taps.Frozen):
    """The trained model that a recipe learns from: never trained, saved or averaged; see ``Frozen``."""

    def __init__(self, recipe: Recipe):
        """Raises ``UserError`` when it cannot be had, or does not take the recipe's training images."""
        try:
            super().__init__(recipe.distill_from or "")
        except taps.NoWeights as e:
            raise UserError(f"distill_from: {e}") from None
        self.recipe = recipe
        check_input(self.model, recipe.per_device_train_batch_size, recipe.image_size, self.source, training=False)
        cfg = cfg_of(self.model)
        self.mean, self.std = (tuple(cfg.get(name) or getattr(recipe, name)) for name in ("mean", "std"))
        self.columns: Tensor | None = None

    def meet(self, classes: list[str], device: torch.device) -> str:
        """Find the classes of the data among the teacher's, as for scoring; what to know of it, or nothing.

        Raises ``UserError`` where it does not know them all.
        """
        known, count = cfg_of(self.model).get("label_names"), self.model.num_classes
        try:
            found, note = places(known, count, classes, f"dataset {self.recipe.dataset!r}", self.source)  # type: ignore[arg-type]
        except UserError as e:
            raise UserError(f"distill_from: the teacher must know every class of the data, but {e}") from None
        self.columns = torch.tensor(found, device=device)
        return note

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the data's classes, from images that are normalised as the recipe says."""
        given, own = (self.recipe.mean, self.recipe.std), (self.mean, self.std)
        if given != own:
            (mean, std), (own_mean, own_std) = ([per_channel(v, x.device) for v in pair] for pair in (given, own))
            x = (x * std + mean - own_mean) / own_std
        logits = self.model(x).float()
        return logits if self.columns is None else logits[:, self.columns]


class Distilled(Step):
    """A step whose criterion knows a teacher: every mixer composes with it, but those that mix inside of the model."""

    def __init__(self, model: nn.Module, mixer: Mixer, criterion: Criterion, teacher: Teacher):
        """Raises ``ValueError`` for a mixer whose mixed images nobody could show to a teacher."""
        if any(isinstance(part, Mixer) and part.inside for part in mixer.modules()):
            raise ValueError(
                "it mixes features inside of the model, so there is no mixed image that a teacher could see; leave out "
                "distill_from, or take mixup, cutmix or another mixer of images"
            )
        super().__init__(model, mixer, criterion)
        self.teacher = teacher
        recipe = teacher.recipe
        self.hard = recipe.distill == "hard"
        self.alpha = 0.5 if recipe.distill_alpha is None else recipe.distill_alpha
        self.tau = 1.0 if recipe.distill_tau is None else recipe.distill_tau

    def forward(self, x: Tensor, y: Tensor, rng: np.random.Generator) -> Out:
        """One training step; raises ``ValueError`` when the mixer's loss is of no prediction of the model itself.

        Where nothing is learned, as when PreciseBN counts, it is a step without a teacher.
        """
        if not torch.is_grad_enabled():
            return super().forward(x, y, rng)
        last: list[Tensor] = []  # the images that the model saw last, and what it said of them
        learned: list[Tensor] = []

        def watch(module: nn.Module, images: tuple[Tensor], logits: Tensor) -> None:
            if module is self.model:  # and no twin of it with another classifier
                last[:] = images[0].detach(), logits

        def criterion(logits: Tensor, target: Tensor) -> Tensor:
            loss = self.criterion(logits, target)
            rows = rows_of(logits, last[1]) if last else None
            if rows is None:
                return loss
            learned.append(logits)
            return torch.lerp(loss, self.taught(logits, self.teacher(last[0][rows])), self.alpha)

        with self.model.register_forward_hook(watch):
            out = self.mixer(self.model, criterion, x, y, rng)
        if not any(logits is out.logits for logits in learned):
            raise ValueError(
                f"{type(self.mixer).__name__} computes no loss from what the model says of its mixed images"
            )
        return out

    def taught(self, logits: Float[Tensor, "B K"], said: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
        """How far each prediction is from what the teacher said."""
        if self.hard:
            return self.criterion(logits, F.one_hot(said.argmax(1), said.shape[1]).float())
        ours, theirs = ((z.float() / self.tau).log_softmax(1) for z in (logits, said))
        return self.tau**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)


def rows_of(part: Tensor, whole: Tensor) -> slice | None:
    """Which rows of a prediction a mixer has its loss of: all, or some that lie together; None for another tensor."""
    if part is whole:
        return slice(None)
    base = whole if whole._base is None else whole._base
    if part._base is not base or part.shape[1:] != whole.shape[1:] or part.stride() != whole.stride():
        return None
    first = (part.storage_offset() - whole.storage_offset()) // whole.stride(0)
    return slice(first, first + len(part))
