"""AdAutoMix: Adversarial AutoMixup. Qin et al. ICLR 2024.

https://arxiv.org/abs/2312.11954, reference code https://github.com/JinXins/Adversarial-AutoMixup

Formula: This is the pipeline of AutoMix (q, its momentum encoder k, two classifiers each, masks from k's hidden map z)
with an adversarial generator for n = 2 or 3 samples. ``z_i`` are the maps of a sample and its partners, with lambda_i
as one more channel: ``u_i = softmax(sum_{j != i} relu(Q(z_i))^T relu(K(z_j)) / sqrt(d)) V(z_i)`` and ``masks = softmax
over i of upsample(u_i)``. The classifier's losses are those of AutoMix. With three samples the classifier for mixed
images also sees the plain three-way Mixup of the batch: ``(1-rho)*L_one_hot + rho*L_mixup``. The generator has a batch
of its own and is judged through the frozen k. In every second step it is judged by ``CE(k(x_k), y_k)``. In the others,
the first step among them, it is judged by ``-beta*CE(k(x_k), y_k) + (1-beta)*cos``. Here cos is the mean over samples
of ``sum_i lam_i cos(k(x_k), k(x_i))``.

Published defaults: alpha = 1, margin 0.03. For ImageNet: n = 2, beta = 0.1, a lambda channel, and BatchNorm behind Q
and K for ResNet-50. For Tiny-ImageNet: n = 3, beta = 0.4, and neither of the two. m goes from 0.999 to 0.99999
(ImageNet).

Sampling law: ``adautomix@qin-2024``: As in AutoMix, lambda ~ Beta(alpha, alpha) is drawn twice. For n = 3 there are
three draws of Beta(alpha, alpha), divided by their sum, once for both batches. Near the ends the classifier's batch is
plain Mixup of n samples. It is near the ends if lambda (for n = 3 the first share) or one minus it is at most the
margin. Each partner has a uniformly random permutation. With n = 3 this is ``adautomix@qin-2024.2``. The first version
drew a second triple, looked at one minus the first share alone, and passed the plain mixture through the classifier for
mixed images.

Cost: A step takes 3.1 times the FLOPs of a vanilla step, and about 4 times with three samples.

What is reported: The reported model is the momentum encoder for mixed images, as with AutoMix. The other three
classifiers are reported beside it.

Deviations: One forward of k on the clean batch serves masks and logits. Both reference codes run k three times for
these, and four times with three samples. So half of the batches in the BatchNorm statistics of k are mixed; in theirs a
quarter or a fifth are. The stated purpose of cos is to keep the mixed image near its sources. But both reference codes
minimise it with this sign, which drives the mixed image and its sources apart. ``cos_sign = -1`` is the stated purpose.
OpenMixup's condition on the margin for three samples is turned round (margin < 1 - lambda for margin > 1 - lambda), so
it hardly ever mixes by masks. Here the condition is that of the reference code.

Kind: input, learned.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import blocks, ops, taps
from .base import Criterion, Mixer, Out, Plan


class AdaptiveMask(nn.Module):
    """Make the logits of the masks of n samples from their hidden maps.

    ``lam_concat`` gives lambda as one more channel. ``norm`` puts BatchNorm behind query and key.
    """

    def __init__(self, channels: int, lam_concat: bool, norm: bool):
        super().__init__()
        self.lam_concat = lam_concat
        wide, inner = channels + lam_concat, max(1, channels // 2)

        def layer() -> nn.Sequential:
            norms = [nn.BatchNorm2d(inner)] if norm else []
            return nn.Sequential(blocks.pointwise(wide, inner, bias=not norm), *norms, nn.ReLU())

        self.query, self.key, self.value = layer(), layer(), blocks.pointwise(wide, 1)

    def forward(self, maps: Sequence[Float[Tensor, "B c h w"]], lam: Float[Tensor, "B n"]) -> Float[Tensor, "B n h w"]:
        """One logit for each sample and position. ``maps``: of the sample itself, then of its partners."""
        if self.lam_concat:
            columns = [blocks.as_column(lam[:, i], z).expand(-1, 1, *z.shape[2:]) for i, z in enumerate(maps)]
            maps = [torch.cat(pair, 1) for pair in zip(maps, columns, strict=True)]
        keys = [self.key(z) for z in maps]
        others = [sum(key for j, key in enumerate(keys) if j != i) for i in range(len(keys))]
        return torch.cat(
            [blocks.attend(self.query(z), key, self.value(z)) for z, key in zip(maps, others, strict=True)], 1
        )


class AdAutoMix(Mixer):
    """Learn masks against the classifier.

    ``samples`` is the number of samples in a mixed image, 2 or 3. ``alpha`` is the Beta parameter and must be above 0.
    ``beta``, in [0, 1], is the weight of the adversarial loss. ``adv_interval`` is the number of steps of which one is
    adversarial. ``cos_sign`` is 1 as in the reference code, or -1 as stated. ``mixup_share`` is rho, with three
    samples. ``margin`` says how close to 0 or 1 a lambda mixes by constants. For ``lam_concat`` and ``norm`` see
    ``AdaptiveMask``. ``upsample`` is "bilinear" or "nearest". For the arguments that begin with ``momentum`` or
    ``block_`` see ``AutoMix``.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        samples: int = 2,
        beta: float = 0.1,
        adv_interval: int = 2,
        cos_sign: int = 1,
        mixup_share: float = 0.5,
        margin: float = 0.03,
        lam_concat: bool = True,
        norm: bool = False,
        upsample: str = "bilinear",
        momentum: float = 0.999,
        momentum_end: float = 0.99999,
        momentum_delay: float = 0.1,
        block_lr: float | None = None,
        block_min_lr: float | None = None,
        block_momentum: float | None = None,
    ):
        super().__init__()
        ops.check_positive("alpha", alpha)
        ops.check_choice("samples", samples, (2, 3))
        ops.check_choice("cos_sign", cos_sign, (1, -1))
        ops.check_choice("upsample", upsample, ("bilinear", "nearest"))
        ops.check_between("margin", margin, 0.0, 0.5)
        for name, share in (("beta", beta), ("mixup_share", mixup_share)):
            ops.check_between(name, share, 0.0, 1.0)
        blocks.check_rates(momentum, momentum_end, momentum_delay, block_lr, block_min_lr, block_momentum)
        for name, flag in (("lam_concat", lam_concat), ("norm", norm)):
            ops.check_choice(name, flag, (False, True))
        ops.check_count("adv_interval", adv_interval)
        self.alpha = alpha
        self.samples = samples
        self.pairs = samples == 2
        self.beta = beta
        self.adv_interval = adv_interval
        self.cos_sign = cos_sign
        self.mixup_share = mixup_share
        self.margin = margin
        self.lam_concat = lam_concat
        self.norm = norm
        self.upsample = upsample
        self.momentum = momentum
        self.momentum_end = momentum_end
        self.momentum_delay = momentum_delay
        self.block_lr = block_lr
        self.block_min_lr = block_min_lr
        self.block_momentum = block_momentum

    @property
    def law(self) -> str:
        """The second version of its own with three samples."""
        return f"{super().law}.2" if self.samples == 3 else super().law

    def setup(self, model: nn.Module) -> None:
        """Classifier for clean images, momentum encoder, generator. ``ValueError`` for a model without stages."""
        stage = blocks.mixed_stage(model)
        self.one_hot = copy.deepcopy(taps.classifier(model))
        self.encoder = blocks.MomentumEncoder(model, self.one_hot, *stage)
        self.block = AdaptiveMask(self.encoder.channels, self.lam_concat, self.norm)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def plan(self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: Any) -> Plan:
        """``index`` (n-1, B), ``mask`` (B, n, H, W), ``lam`` (B, n) of the classifier's batch; ``generator``.

        With two samples as everywhere: ``index`` (B,), ``mask`` (B, 1, H, W) and ``lam`` (B,) of the sample itself.
        ``look``: the hidden map of the momentum encoder.
        """
        ops.check_look(look)
        z = look[0]
        shares = self.draw(rng)
        shares_k = self.draw(rng) if self.pairs else shares
        index, index_k = (torch.stack([ops.partners(x, rng) for _ in range(self.samples - 1)]) for _ in range(2))
        lam, lam_k = (ops.send(np.tile(s, (len(x), 1)), x) for s in (shares, shares_k))
        if min(shares[0], 1 - shares[0]) <= self.margin:
            mask = lam[:, :, None, None]
        else:
            with torch.no_grad():
                mask = self.masks(z, x, index, lam)
        generator = {"index": index_k, "lam": lam_k}
        if self.samples == 2:
            return {"index": index[0], "mask": mask[:, :1], "lam": lam[:, 0], "generator": generator}
        return {"index": index, "mask": mask, "lam": lam, "generator": generator}

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The shares (n,) of one batch."""
        if self.samples == 2:
            lam = ops.beta(self.alpha, self.alpha, rng)
            return np.array([lam, 1 - lam])
        drawn = np.array([ops.beta(self.alpha, self.alpha, rng) for _ in range(self.samples)])
        return drawn / drawn.sum()

    def masks(
        self, z: Float[Tensor, "B c h w"], x: Tensor, index: Int[Tensor, "m B"], lam: Float[Tensor, "B n"]
    ) -> Float[Tensor, "B n H W"]:
        """The share of each sample at each pixel; they sum to 1."""
        with ops.full_precision(z.device):
            logits = self.block([z, *(z[partner] for partner in index)], lam)
            return blocks.resized(logits, tuple(x.shape[2:]), self.upsample).softmax(1)  # type: ignore[arg-type]

    def masks_for(
        self, x: Float[Tensor, "B C H W"], index: Int[Tensor, " B"], lam: Float[Tensor, " B"]
    ) -> Float[Tensor, "B 1 H W"]:
        """The masks of given pairs, of two samples each: to look at."""
        shares = torch.stack((lam, 1 - lam), 1)
        return self.masks(blocks.up_cast(self.encoder.look(x), self.block), x, index[None], shares)[:, :1]

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        index: Int[Tensor, "*m B"],
        mask: Float[Tensor, "B n h w"],
        lam: Float[Tensor, "B *n"],
        generator: dict[str, Any] | None = None,
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """The classifier's batch; that of the generator does not enter it."""
        if index.ndim == 1:
            return super().mix(x, y, index=index, mask=mask, lam=lam)
        return mix_many(x, y, index, mask, lam)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """Classifier and generator, each on a batch of its own, in one backward pass."""
        ops.check_batch(x, y)
        z, clean = self.encoder.look_and_classify(x)
        z = blocks.up_cast(z, self.block)
        plan = self.plan(x, y, rng, z)
        index, lam = plan["generator"]["index"], plan["generator"]["lam"]

        generated, target = mix_many(x, y, index, self.masks(z, x, index, lam), lam)
        seen = self.encoder.model(generated)
        loss, sources = criterion(seen, target), (clean, *(clean[partner] for partner in index))
        near = [lam[:, i] * F.cosine_similarity(seen.float(), p.float()) for i, p in enumerate(sources)]
        against = -self.beta * loss.mean() + (1 - self.beta) * self.cos_sign * torch.stack(near).sum(0).mean()
        parts = {"generator": torch.where(self.count() % self.adv_interval == 0, against, loss.mean())}

        one_hot = blocks.with_classifier(model, self.one_hot)
        parts["one_hot"] = criterion(one_hot(x), y)
        if self.samples == 3:
            plain, target = mix_many(x, y, plan["index"], plan["lam"][:, :, None, None], plan["lam"])
            parts["one_hot"] = (1 - self.mixup_share) * parts["one_hot"]
            parts["mixup"] = self.mixup_share * criterion(model(plain), target)
        mixed, target = self.mix(x, y, **plan)
        logits = model(mixed)
        return Out.of(logits, target, plan, mix=criterion(logits, target), **parts)

    def after_step(self, model: nn.Module, progress: float) -> None:
        """The encoder follows the model; the next step is counted."""
        momentum = blocks.momentum_at(progress, self.momentum, self.momentum_end, self.momentum_delay)
        self.encoder.follow(model, self.one_hot, momentum)
        self.count().add_(1)

    def count(self) -> Tensor:
        """Updates so far, where no host has to read them."""
        return self.get_buffer("steps")

    def models(self, model: nn.Module) -> dict[str, nn.Module]:
        """``""``, ``k_one``, ``q``, ``q_one``: see ``MomentumEncoder.classifiers``."""
        return self.encoder.classifiers(model, self.one_hot)

    def compiled(self) -> list[nn.Module]:
        """What makes the masks."""
        return [self.block]

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The second classifier like the model's own; what makes the masks with its own rates."""
        start = lr if self.block_lr is None else self.block_lr
        return blocks.learning_groups(self.one_hot, self.block, start, self.block_min_lr, self.block_momentum)


def mix_many(
    x: Float[Tensor, "B C H W"],
    y: Float[Tensor, "B K"],
    index: Int[Tensor, "m B"],
    mask: Float[Tensor, "B n h w"],
    lam: Float[Tensor, "B n"],
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
    """Images and targets as sums over a sample and its partners."""
    ops.check_batch(x, y)
    mask, lam = mask.to(x.dtype), lam.to(y.dtype)
    images, targets = mask[:, :1] * x, lam[:, :1] * y
    for i, partner in enumerate(index, 1):
        images = images + mask[:, i : i + 1] * x[partner]
        targets = targets + lam[:, i : i + 1] * y[partner]
    return images, targets
