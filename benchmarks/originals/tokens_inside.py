"""Methods that mix tokens inside of a transformer beside the code of their authors: MixToken and TokenMixup.

Their networks run with the weights, images and boxes of ours for twenty updates, with their own losses.
"""

import copy
import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import scipy.optimize
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from mixers import MixToken, TokenMixup, Vanilla, ops, taps
from mixers.mixtoken import token_labels
from mixers.tokenmixup import matched
from originals import Checkout, Draws, Gap, Numpy, beside
from originals.transformers import (
    CLASSES,
    IMAGES,
    PARTS,
    REVERSE,
    UPDATES,
    Diary,
    apart,
    batches,
    cross_entropy,
    deit,
    here,
    learned,
    optimizer_of,
    pairing,
    relative,
    smoothed,
    train,
)

LABELING, VIT = "tlt/models/lvvit.py", "experiments/vit"


@beside(
    "mixtoken",
    "zihangJiang/TokenLabeling",
    LABELING,
    "tlt/models/layers.py",
    "tlt/loss/cross_entropy.py",
    "tlt/data/mixup.py",
    held="test_mixtoken.py::test_a_step_with_a_teacher_is_the_loss_of_the_class_and_of_every_token",
)
def mixtoken_network(original: Checkout) -> Iterator[Gap]:
    """The network that mixes tokens and moves its patch outputs back, with the loss of both."""
    draws = Draws(beta=[], randint=[])
    for seed in range(UPDATES):
        rng = np.random.default_rng(seed)
        draws.values["beta"].append(rng.beta(1.0, 1.0))
        draws.values["randint"] += [int(rng.integers(7)), int(rng.integers(7))]
    layers = original.names(
        "tlt/models/layers.py", "GroupLinear", "Mlp", "Attention", "Block", "PatchEmbedNaive", **PARTS
    )
    parts = dict(zip(("GroupLinear", "Mlp", "Attention", "Block", "PatchEmbedNaive"), layers, strict=True))
    names = ("LV_ViT", "rand_bbox", "get_dpr")
    kind, boxes, _ = original.names(LABELING, *names, np=Numpy(draws), **(PARTS | parts))
    yield from same_boxes(boxes)

    model = deit()
    teacher: Any = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    theirs = kind(
        img_size=112, embed_dim=192, depth=4, num_heads=3, num_classes=CLASSES, p_emb=1, qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), mix_token=True, return_dense=True,
    )  # fmt: skip
    lacking = theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.aux_head.load_state_dict(model.head.state_dict())
    if lacking.unexpected_keys or {*lacking.missing_keys} != {"aux_head.weight", "aux_head.bias"}:
        raise LookupError(f"their network has other weights: {lacking}")
    frozen = taps.Frozen(teacher)
    with pairing(REVERSE), mock.patch("mixers.taps.Frozen", lambda _: frozen):
        ours, order, _ = train(MixToken(teacher="one of these classes"), model)

    label, of_stored = original.names(
        "tlt/data/mixup.py", "get_label", "get_featuremaps", torch=torch, roi_align=torchvision.ops.roi_align
    )
    losses = ("TokenLabelCrossEntropy", "SoftTargetCrossEntropy")
    criterion, _ = original.names("tlt/loss/cross_entropy.py", *losses, torch=torch, nn=nn, F=functional)
    diary, optimizer = Diary(), optimizer_of(theirs.train())
    plain = whole = 0.0
    diary.watch(theirs)
    for x, labels in batches():
        with torch.no_grad(), here():
            head = teacher.fc.weight[:, :, None, None], teacher.fc.bias
            scores = functional.conv2d(teacher.forward_features(x), *head)
            corners = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(IMAGES, 1)
            found = label(scores, corners, label_size=7, device="cpu")
            stored = of_stored(torch.stack(scores.topk(5, dim=1), dim=1).float(), CLASSES, "cpu")
            raw = 0.91 * label(stored, corners, label_size=7, device="cpu") + 0.01
        of_tokens = token_labels(teacher, x, torch.Size((7, 7))).transpose(1, 2)
        plain, whole = max(plain, apart(of_tokens, found[..., 1:])), max(whole, apart(of_tokens, raw[..., 1:]))
        aims = torch.stack((functional.one_hot(labels, CLASSES).float(), smoothed(labels)), dim=2)
        given = theirs(x)
        loss = criterion()(given, torch.cat((aims, found[..., 1:]), dim=2))
        optimizer.zero_grad()
        diary.scale(loss, optimizer, theirs.parameters())
    yield Gap(f"labels of 7 x 7 tokens from a ResNet's last feature, {UPDATES} batches", plain)
    why = "its maps keep the five largest scores of a position and count the others 0, and its labels are smoothed"
    yield Gap("the same labels as it makes them of its stored maps, smoothing 0.1", whole, "absolute", why)
    done = diary.trained(theirs, [name.replace("token_head", "aux_head") for name in order])
    for gap in learned(ours, done._replace(images=ours.images)):
        if not gap.compared.startswith("mixed images"):  # theirs mixes tokens
            yield gap._replace(compared=f"{gap.compared}, its class label being that of the data")


def same_boxes(boxes: Any) -> Iterator[Gap]:
    """Boxes on a grid, from the same draws."""
    differing = 0
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        lam = rng.beta(1.0, 1.0)
        ends = ops.clipped_box(14, 14, lam, copy.deepcopy(rng))
        middle = Draws(randint=[int(rng.integers(14)), int(rng.integers(14))])
        with mock.patch.dict(boxes.__globals__, np=Numpy(middle)):
            top, left, bottom, right = boxes((1, 1, 14, 14), lam)
        differing += ends != (top, bottom, left, right)
    yield Gap("boxes on 14 x 14 tokens that differ, of 2,000", differing / 2000, "share")


@beside(
    "tokenmixup",
    "mlvlab/TokenMixup",
    f"{VIT}/models/modeling.py",
    f"{VIT}/utils/utils.py",
    "tokenmixup/horizontal.py",
    held="test_tokenmixup.py::test_easy_samples_get_the_partners_and_tokens_of_the_largest_gain",
)
def tokenmixup_network(original: Checkout) -> Iterator[Gap]:
    """The mixing of tokens by itself, then the published network, horizontal, vertical, and both."""
    solve = scipy.optimize.linear_sum_assignment
    mixing = original.names(f"{VIT}/utils/utils.py", "horizontalMixup", torch=torch, linear_sum_assignment=solve)
    layer = original.names(
        "tokenmixup/horizontal.py", "HorizontalTokenMixupLayer", torch=torch, nn=nn, F=functional, np=np,
        linear_sum_assignment=solve,
    )  # fmt: skip
    yield from same_tokens(mixing, layer)

    names = (
        "VisionTransformer", "Transformer", "Encoder", "Block", "Embeddings", "Mlp", "Attention_Vertical", "Attention",
        "ACT2FN", "swish",
    )  # fmt: skip
    kind = original.names(
        f"{VIT}/models/modeling.py", *names, torch=torch, nn=nn, np=np, F=functional, math=math, copy=copy,
        Linear=nn.Linear, Dropout=nn.Dropout, Softmax=nn.Softmax, Conv2d=nn.Conv2d, LayerNorm=nn.LayerNorm,
        _pair=nn.modules.utils._pair, horizontalMixup=mixing,
    )[0]  # fmt: skip
    horizontal = {"layer": 1, "rho": 0.002, "tau": 0.22}
    nothing = {"layer": 1, "rho": 0.0, "tau": 0.0, "score_weight": 0.0}
    vertical = {"kappa": 3, "vertical_layer": 2, "shifted": True}
    why = "with both parts it picks the vertical tokens of the mixing block by other samples' attention"
    as_there = horizontal | {"compared_with": "first"}
    early = "it takes the token before each that was chosen, since it counts without the class token"
    own = "it compares the partners of all easy samples with the first of them, the paper with the sample itself"
    for what, options, reason in (
        ("horizontal", as_there, ""),
        ("horizontal beside ours with each sample's own saliency", horizontal, own),
        ("horizontal, its gradient reaching the model", as_there | {"detach": False, "score_weight": 0.5}, ""),
        ("vertical, shifted=True", nothing | vertical, ""),
        ("vertical beside ours with the tokens that were chosen", nothing | vertical | {"shifted": False}, early),
        ("both", as_there | vertical, why),
    ):
        yield from beside_theirs(kind, what, options, reason)


def same_tokens(mixing: Any, layer: Any) -> Iterator[Gap]:
    """Mixed tokens and targets of single batches, in the order of ours."""
    tokens = targets = wrapped = 0.0
    easy_ones = moved = differing = 0
    for seed in range(50):
        draw = torch.Generator().manual_seed(seed)
        x, y = torch.randn(16, 50, 12, generator=draw), functional.one_hot(torch.arange(16) % CLASSES, CLASSES).float()
        attention = (2 * torch.randn(16, 3, 50, 50, generator=draw)).softmax(3)
        fc = nn.Linear(12, CLASSES)
        with torch.no_grad():
            fc.weight.copy_(torch.randn(CLASSES, 12, generator=draw) / 3)
            easy = cross_entropy(fc(x[:, 0]), y) / 10 <= 0.25
        saliency = attention.mean(1)[:, 0, 1:]
        index, kept, lam = matched(saliency, easy, 0.02, "first")
        differing += int((kept != matched(saliency, easy, 0.02)[1]).sum())
        own = torch.cat((kept.new_ones(16, 1), kept), 1)
        ours = ops.blend(x, index, own[:, :, None]), ops.blend_targets(y, index, lam)
        order = torch.cat((easy.nonzero()[:, 0], (~easy).nonzero()[:, 0]))
        with here():
            mixed, target, _ = mixing(x, y, saliency, rho=0.02, mix_logit=easy)
        tokens, targets = max(tokens, apart(ours[0][order], mixed)), max(targets, apart(ours[1][order], target))
        x, attention = x[:, 1:], attention[:, :, 1:, 1:]
        said = fc(4 * x.mean(1))
        easy = cross_entropy(said, y).detach() / 10 <= 0.25
        index, part, lam = matched(attention.mean((1, 2)), easy, 0.02, "first")
        order = torch.cat((easy.nonzero()[:, 0], (~easy).nonzero()[:, 0]))
        wrap = layer(
            Given(attention), 0.25, 0.02, 12, CLASSES, scorenet_type="average_pooling", scorenet_lambda=1.0,
            has_cls=False, verbose=False,
        )  # fmt: skip
        wrap.scorenet_fc.load_state_dict({"weight": 4 * fc.weight, "bias": fc.bias})
        other, (aim, loss) = wrap.train()(x, y)
        pieces = (ops.blend(x, index, part[:, :, None])[order], other), (ops.blend_targets(y, index, lam)[order], aim)
        wrapped = max(wrapped, *(apart(a, b) for a, b in pieces), apart(cross_entropy(said, y), loss))
        easy_ones, moved = easy_ones + int(easy.sum()), moved + int((kept == 0).sum())
    if not 0 < easy_ones < 50 * 16 or not moved:
        raise ValueError(f"{easy_ones} easy samples and {moved} tokens: nothing was compared")
    what = f"50 batches of 16, {easy_ones} easy samples, {moved:,} tokens replaced"
    yield Gap(f'mixed tokens, compared_with="first", {what}', tokens)
    yield Gap("targets of these", targets)
    why = "it compares the partners of all easy samples with the first of them, the paper with the sample itself"
    yield Gap('the same beside compared_with="own": tokens that differ', differing / (50 * 16 * 49), "share", why)
    yield Gap("tokens, targets and score net's losses of its layer for networks without class token", wrapped)


class Given(nn.Module):
    """A block that looks where it is told, and hands on what it is given."""

    def __init__(self, attention: Tensor):
        super().__init__()
        self.attention = attention

    def get_attention_map(self, *_: Any) -> Tensor:
        """The attention."""
        return self.attention

    def forward(self, x: Tensor, y: Any) -> tuple[Tensor, Any]:
        return x, y


def beside_theirs(kind: Any, what: str, options: dict[str, Any], why: str) -> Iterator[Gap]:
    """Twenty updates of both networks."""
    model = deit()
    config = SimpleNamespace(
        hidden_size=192, classifier="token", patches={"size": (16, 16)},
        transformer={"num_heads": 3, "num_layers": 4, "mlp_dim": 768, "attention_dropout_rate": 0, "dropout_rate": 0},
    )  # fmt: skip
    theirs = kind(
        config, img_size=112, num_classes=CLASSES, rho=options["rho"], tau=options["tau"],
        scorenet_stopgrad=options.get("detach", True), scorenet_train=options["tau"] > 0,
        horizontal_mixup=options["tau"] > 0, horizontal_layer=options["layer"],
        vertical_mixup="kappa" in options, vertical_stopgrad=False, vertical_layer=options.get("vertical_layer", -1),
        kappa=options.get("kappa", 0),
    )  # fmt: skip
    mixer = TokenMixup(Vanilla(), **options)
    torch.manual_seed(3)
    setup = TokenMixup.setup

    def copied(self: TokenMixup, model: nn.Module) -> None:
        setup(self, model)
        theirs.transformer.encoder.layer[options["layer"]].scorenet.load_state_dict(self.score.state_dict())

    theirs.load_state_dict(renamed(model.state_dict()), strict=False)
    with mock.patch.object(TokenMixup, "setup", copied):
        ours, _, plans = train(mixer, model)
    mixed = [int((plan["lam"] < 1).sum()) for plan in plans]
    if options["tau"] > 0 and not 0 < sum(mixed) < UPDATES * IMAGES:
        raise ValueError(f"{sum(mixed)} samples were mixed of {UPDATES * IMAGES}")
    diary, optimizer = Diary(), optimizer_of(theirs.train())
    diary.watch(theirs)
    with here():
        for x, labels in batches():
            y = smoothed(labels)
            logits, target, scores, _ = theirs(x, y)
            loss = functional.cross_entropy(logits, target)
            if scores is not None:
                loss = loss + options.get("score_weight", 1.0) * functional.cross_entropy(scores, y)
            optimizer.zero_grad()
            diary.scale(loss, optimizer, theirs.parameters())
    names = [*names_of(model), *(["mixer.score.weight", "mixer.score.bias"] * (options["tau"] > 0))]
    slopes = {
        name: torch.zeros(1) if g is None else g for name, g in zip(names_of(theirs), diary.gradients, strict=True)
    }
    ends = {name: p.detach() for name, p in theirs.named_parameters()}
    on = f"{what}, {UPDATES} batches of {IMAGES}, DeiT of 4 blocks" + f", {sum(mixed)} samples mixed" * bool(sum(mixed))
    yield Gap(f"losses: {on}", relative([ours.losses], [torch.tensor(diary.losses)]), "relative", why)
    for part, mine, other in (
        ("gradients of the first update", ours.gradients, slopes),
        ("all weights at the end", ours.weights, ends),
    ):
        found = [joined(other, name, options["layer"]) for name in names]
        yield Gap(f"{part}: {what}", relative(mine[: len(names)], found), "relative", why)


def joined(tensors: dict[str, Tensor], name: str, layer: int) -> Tensor:
    """Of their tensors the one that ours has by that name."""
    if name.startswith("mixer.score"):
        return tensors[f"transformer.encoder.layer.{layer}.scorenet.{name.split('.')[-1]}"]
    return torch.cat([tensors[other] for other in renamed({name: torch.zeros(3)})])


def names_of(model: nn.Module) -> list[str]:
    """Of all parameters."""
    return [name for name, _ in model.named_parameters()]


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of timm's ViT as this ViT names and cuts them."""
    words = {
        "patch_embed.proj": "transformer.embeddings.patch_embeddings", "cls_token": "transformer.embeddings.cls_token",
        "pos_embed": "transformer.embeddings.position_embeddings", "blocks.": "transformer.encoder.layer.",
        "attn.proj": "attn.out", "mlp.": "ffn.", "norm1": "attention_norm", "norm2": "ffn_norm",
    }  # fmt: skip
    found = {}
    for name, value in state.items():
        other = name
        for word, their in words.items():
            other = other.replace(word, their)
        if other.startswith("norm."):
            other = other.replace("norm.", "transformer.encoder.encoder_norm.")
        if "attn.qkv" in other:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[other.replace("qkv", part)] = piece
        else:
            found[other] = value
    return found
