"""TokenMixup: Efficient Attention-guided Token-level Data Augmentation for Transformers. Choi, Choi, Kim. NeurIPS 2022.

https://arxiv.org/abs/2210.07562, reference code https://github.com/mlvlab/TokenMixup

Formula: X_i are the tokens that go into block ``layer`` of a ViT. s_i says what its class token attends to there, by
patch, as the mean over heads. f is what a linear score net says of the class token. The samples with
``-sum y*log softmax(f) / 10 <= tau`` are easy. Each easy sample gets a partner of its own, another for each. The
partners are assigned so that the sum of ``sum over patches of max(s_partner - s_i - rho, 0)`` is largest. Where
``s_partner - s_i > rho`` the partner's token replaces that of the sample. The sample's class token stays.
``y' = lam*y + (1-lam)*y_partner``, ``lam = a/(a+b)``. Here a is the sum of s_i over the tokens that stay, and b is that
of s_partner over those that came. The loss is that of the prediction for y' plus ``score_weight`` times that of f for
y. This is the horizontal method. With ``kappa`` there is the vertical one too: the kappa most attended tokens that went
into each block before go to block ``vertical_layer``, as keys and values alone.

Published defaults: rho = 0.01, tau = 0.1, score_weight = 1, no gradient from the score net to the model, block 3 of 12
counted from 0, alone (ImageNet, fine-tuning of ViT-B/16). With the vertical part kappa = 3 at block 4, or at block 3
where nothing is horizontal (``tau=0, score_weight=0, vertical_layer=3``). On CIFAR, CCT-7 is trained over Mixup with
alpha 0.8 or over CutMix (``base``), with rho = 0.003 to 0.005, tau = 0.1 or 0.2, score_weight = 0.001, with that
gradient, and block 2 or 3 of 7.

Sampling law: ``tokenmixup@choi-2022``: Nothing is drawn but what ``base`` draws. The partner is that of the assignment.

Cost: A step takes one more norm and ``qkv`` of block ``layer``, whose values are made too and not used, and the
assignment. On devices other than CPUs the assignment is min(100, 4 B) rounds of some 15 operations on (B + 1, B + 1)
for a batch of B, whatever the values are. From 25 samples on these are 1,500 small operations, which take longer to
launch than to compute.

Label smoothing keeps y from being certain. With 0.1 and 1,000 classes no cross entropy is below 1.01, so at tau = 0.1
nothing is mixed. The published runs on ImageNet do not smooth.

Deviations: The reference code decides for all easy samples, by the saliency of the first of them, which tokens of the
partners come. It does so because it gathers from one row of its three-dimensional differences. The paper, and the
code's own choice of partners, compare with the sample itself. The training scripts of the reference code decide by the
first sample, and ``compared_with="first"`` does the same. The reference code counts patches without the class token and
takes tokens with it, so each vertical token is the one before that which was chosen. ``shifted=True`` does the same. It
puts the mixed samples first, and then chooses the vertical tokens of the block that mixed by the attention of other
samples. Here samples stay where they are, and the attention is that of the mixed tokens. On a CPU the assignment is
SciPy's, as there. On other devices, where nothing is read back, it is an auction (Bertsekas. Annals of Operations
Research 14, 1988) of at most 100 rounds with bids of 2 % of the largest gain. The auction reaches 98 % of the largest
sum on simulated attention, and leaves a sample that got no partner as it is. The loss of the score net is the recipe's.
By default ``layer`` is a quarter of the blocks, rounded up (3 of 12, 2 of 7), and the vertical part is one block later.
The plain model is exported. As in the reference code, both parts are of training alone. CCT, which has no class token,
is not here. This was written from the code and from the paper's abstract and figure 1.

Kind: feature, label.
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from . import ops, taps
from .base import Criterion, Mixer, Out, Plan
from .compose import check_base
from .registry import build

EASE = 10.0  # the reference code divides cross entropies by it
ROUNDS, STEP = 100, 0.02  # of the auction; the least rise of a bid, as a share of the largest gain
PART = 16  # tokens whose differences between all pairs of samples are in memory at one time


class TokenMixup(Mixer):
    """Replace tokens of easy samples by more salient ones of another sample, inside of the network.

    ``base`` is a mixer that only mixes images, and it goes before. ``layer``, at least 1, is the block, counted from 0,
    into which the mixed tokens go. If it is None, it is a quarter of all blocks, rounded up. ``rho``, at least 0, says
    by how much more salient a token must be. ``tau``, at least 0, is what a tenth of the score net's loss is at most,
    for a sample to be mixed. ``score_weight``, at least 0, is the weight of the score net's loss. ``detach`` says
    whether that loss is not learned by the model. ``kappa``, at least 0, is the number of tokens of each block before
    ``vertical_layer`` that are keys and values there; 0 is for none. If ``vertical_layer`` is None, it is the block
    behind ``layer``. ``compared_with`` says whether a partner's token must be more salient than the sample's "own", or
    than that of the "first" easy sample of the batch. ``shifted`` says whether vertical tokens are taken one place too
    early. The values "first" and True are as published; the deviations say more.
    """

    inside = True
    one_label = True  # the score net's loss is that of a softmax
    pairs = False  # a sample may have a partner in the base and one here

    def __init__(
        self,
        base: Mixer,
        layer: int | None = None,
        rho: float = 0.01,
        tau: float = 0.1,
        score_weight: float = 1.0,
        detach: bool = True,
        kappa: int = 0,
        vertical_layer: int | None = None,
        compared_with: str = "own",
        shifted: bool = False,
    ):
        super().__init__()
        check_base(base)
        for name, place in (("layer", layer), ("vertical_layer", vertical_layer)):
            if place is not None:
                ops.check_count(name, place)
        for name, value in (("rho", rho), ("tau", tau), ("score_weight", score_weight)):
            ops.check_between(name, value, 0.0)
        for name, flag in (("detach", detach), ("shifted", shifted)):
            ops.check_choice(name, flag, (False, True))
        if kappa != 0:
            ops.check_count("kappa", kappa)
        ops.check_choice("compared_with", compared_with, ("own", "first"))
        self.base = base
        self.layer = layer
        self.rho = rho
        self.tau = tau
        self.score_weight = score_weight
        self.detach = detach
        self.kappa = kappa
        self.vertical_layer = vertical_layer
        self.compared_with = compared_with
        self.shifted = shifted

    def setup(self, model: nn.Module) -> None:
        """Make the score net. Raises ``ValueError`` for a model that is no ViT with a class token, or too shallow."""
        blocks, plain = getattr(model, "blocks", ()), []
        with contextlib.suppress(ValueError):  # which names models whose tokens may be merged
            plain = taps.merging_blocks(model)
        every = [f"blocks.{i}" for i in range(len(blocks))]
        if not getattr(model, "has_class_token", False) or not plain or plain != every:
            raise ValueError(
                f"TokenMixup needs a ViT with a class token, {type(model).__name__} is another kind of model; use "
                "deit_small_patch16_224 or vit_base_patch16_224"
            )
        self.at = -(-len(blocks) // 4) if self.layer is None else self.layer
        self.vertical_at = self.at + 1 if self.vertical_layer is None else self.vertical_layer
        for name, place in (("layer", self.at), ("vertical_layer", self.vertical_at if self.kappa else 1)):
            if place >= len(blocks):
                raise ValueError(
                    f"{name} must be below {len(blocks)}, the blocks of {type(model).__name__}, got {place}; "
                    "deit_small_patch16_224 has 12"
                )
        head = taps.classifier(model)
        self.score = nn.Linear(head.in_features, head.out_features, device=head.weight.device, dtype=head.weight.dtype)

    def plan(self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B K"], rng: np.random.Generator, *look: Any) -> Plan:
        """``base``, its plan; in a step ``index`` (B,) and ``lam`` (B,) of the tokens."""
        ops.check_look(look)
        return {"base": self.base.plan(x, y, rng, *look)}

    def mix(  # type: ignore[override]
        self,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        *,
        base: Plan,
        index: Int[Tensor, " B"],
        lam: Float[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
        """The images of ``base``, since it is tokens that are mixed, and the targets of both."""
        mixed, target = self.base.mix(x, y, **base)
        return mixed, ops.blend_targets(target, index, lam)

    def forward(
        self,
        model: nn.Module,
        criterion: Criterion,
        x: Float[Tensor, "B C H W"],
        y: Float[Tensor, "B K"],
        rng: np.random.Generator,
    ) -> Out:
        """One forward, in whose middle the tokens are mixed."""
        ops.check_batch(x, y)
        plan = self.plan(x, y, rng, model, criterion)
        mixed, before = self.base.mix(x, y, **plan["base"])
        scores: list[Tensor] = []

        @torch.compiler.disable
        def change(tokens: Tensor) -> Tensor:
            scores.append(self.score(tokens[:, 0].detach() if self.detach else tokens[:, 0]))
            easy = difficulty(scores[0], before) <= self.tau
            block, prefix = model.get_submodule(f"blocks.{self.at}"), getattr(model, "num_prefix_tokens", 1)
            saliency = taps.ahead(block, tokens, prefix).weights(slice(0, 1))[..., prefix:].mean((1, 2))
            index, kept, lam = matched(saliency, easy, self.rho, self.compared_with)
            plan.update(index=index, lam=lam)
            own = torch.cat((kept.new_ones(len(kept), prefix), kept), dim=1)
            return ops.blend(tokens, index, own[:, :, None])

        parts = [taps.edit(model, f"blocks.{self.at - 1}", change)]
        if self.kappa:
            vertical = looked_back(model, self.vertical_at, self.kappa, self.shifted)
            parts.insert(0 if self.vertical_at < self.at else 1, vertical)  # the first of the network comes first
        with contextlib.ExitStack() as stack:
            for part in parts:
                stack.enter_context(part)
            logits = model(mixed)
        target = ops.blend_targets(before, plan["index"], plan["lam"])
        score = self.score_weight * criterion(scores[0], before)
        return Out.of(logits, target, plan, mix=criterion(logits, target), score=score)


def tokenmixup(
    base: Mixer | None = None,
    layer: int | None = None,
    rho: float = 0.01,
    tau: float = 0.1,
    score_weight: float = 1.0,
    detach: bool = True,
    kappa: int = 0,
    vertical_layer: int | None = None,
    compared_with: str = "own",
    shifted: bool = False,
) -> TokenMixup:
    """Make the method over ``base``, or alone, as on ImageNet."""
    base = build("vanilla") if base is None else base
    return TokenMixup(base, layer, rho, tau, score_weight, detach, kappa, vertical_layer, compared_with, shifted)


def difficulty(scores: Float[Tensor, "B K"], y: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """A tenth of the cross entropy."""
    with torch.no_grad(), ops.full_precision(scores.device):
        said = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(1)
        return -(y * said).sum(1) / EASE


def matched(
    saliency: Float[Tensor, "B P"], easy: Bool[Tensor, " B"], rho: float, compared_with: str = "own"
) -> tuple[Int[Tensor, " B"], Float[Tensor, "B P"], Float[Tensor, " B"]]:
    """Partners (B,), which tokens stay, as 1 and 0, and the share of the sample itself in the label."""
    gain = saliency.new_zeros(len(saliency), len(saliency))
    for part in saliency.split(PART, 1):
        gain += (part[None] - part[:, None] - rho).clamp(min=0).sum(2)
    index = assigned(gain.nan_to_num(0.0), easy)
    partner = ops.gather(saliency, index)
    before = saliency if compared_with == "own" else saliency.index_select(0, easy.int().argmax().view(1))
    kept = ((partner - before <= rho) | ~easy[:, None]).to(saliency.dtype)
    own, other = (kept * saliency).sum(1), ((1 - kept) * partner).sum(1)
    return index, kept, torch.where(other > 0, own / (own + other), 1.0)


def assigned(gain: Float[Tensor, "B B"], rows: Bool[Tensor, " B"]) -> Int[Tensor, " B"]:
    """A column for each of ``rows``, no column twice, so that the sum of the gains is largest; itself for the others.

    Exact on a CPU, where values may be read; elsewhere an auction, with itself for those that get nothing.
    """
    if gain.device.type != "cpu":
        return auctioned(gain, rows)
    index = np.arange(len(gain))
    chosen = rows.numpy()
    index[chosen] = linear_sum_assignment(gain[rows].double().numpy(), maximize=True)[1]
    return torch.from_numpy(index)


def auctioned(gain: Float[Tensor, "B B"], rows: Bool[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The same to within a small share of the sum, in a number of steps that no value decides on.

    In each round all rows without a column bid for what is worth most to them at its price, by so much more that it
    would be worth what the second best is, and a step; the highest bid of a column gets it, and whoever had it bids on.
    """
    size = len(gain)
    # A last column for those that buy nothing, worth more than a column of no gain, and a last row for nobody.
    value = nn.functional.pad(gain, (0, 1), value=torch.finfo(gain.dtype).tiny)
    value = nn.functional.pad(value, (0, 0, 0, 1))
    most = value + STEP * gain.amax()
    most[:, size] = -torch.inf  # so that nothing is ever paid for it
    asking = nn.functional.pad(rows, (0, 1))
    price, silence = value.new_zeros(size + 1), torch.full_like(value, -torch.inf)
    owner = torch.full((size + 1,), size, device=gain.device)  # of each column
    for _ in range(min(ROUNDS, 4 * size)):
        worth, spot = (value - price).topk(2, dim=1)
        spot = spot[:, :1]
        bid = most.gather(1, spot) - worth[:, 1:]
        bid = torch.where(asking.scatter(0, owner, False)[:, None], bid, -torch.inf)
        top, first = silence.scatter(1, spot, bid).max(0)
        owner = torch.where(top > price, first, owner)
        price = torch.maximum(price, top)
    itself = torch.arange(size + 1, device=gain.device)
    return itself.scatter(0, owner, itself)[:size]


@contextmanager
def looked_back(model: nn.Module, layer: int, count: int, shifted: bool = False) -> Iterator[None]:
    """During the block, ``layer`` of a ViT has the ``count`` most attended tokens of each earlier block for keys too.

    They go along with its input, and what the block makes of them is left out of its output: so all other tokens attend
    to them, and nothing else changes.
    """
    prefix, tokens = getattr(model, "num_prefix_tokens", 1), 0
    inputs = ["norm_pre", *(f"blocks.{i}" for i in range(layer - 1))]

    @torch.compiler.disable
    def joined(own: Tensor) -> Tensor:
        nonlocal tokens
        tokens, found = own.shape[1], [own]
        for name, look in zip(inputs, looks, strict=True):
            where = look.weights(slice(0, 1))[..., prefix:].mean((1, 2))
            best = where.topk(min(count, where.shape[1]), dim=1).indices + (prefix - shifted)
            found.append(given[name].gather(1, best[:, :, None].expand(-1, -1, own.shape[2])))
        return torch.cat(found, dim=1)

    @torch.compiler.disable
    def parted(both: Tensor) -> Tensor:
        return both[:, :tokens]

    with contextlib.ExitStack() as stack:
        looks = [stack.enter_context(taps.attention(model, i)) for i in range(layer)]
        given = stack.enter_context(taps.record(model, *inputs))
        stack.enter_context(taps.edit(model, f"blocks.{layer - 1}", joined))
        stack.enter_context(taps.edit(model, f"blocks.{layer}", parted))
        yield
