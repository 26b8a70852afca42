"""Labels by predictions beside the authors' code, and masks from merged tokens beside OpenMixup's."""

import contextlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Union
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mixers import CutMix, MergeMix, Mixup, Step, SUMix
from mixers.mergemix import rescaled
from mixers.taps.merging import schedule
from originals import Checkout, Draws, Gap, Numpy, beside
from originals.transformers import (
    CLASSES,
    CYCLE,
    IMAGES,
    UPDATES,
    Diary,
    Trained,
    apart,
    batches,
    cross_entropy,
    deit,
    here,
    learned,
    optimizer_of,
    pairing,
    relative,
)

MODELS = "openmixup/models"
CLASSIFIER, HEAD = f"{MODELS}/classifiers/mixup_classification.py", f"{MODELS}/heads/cls_mixup_head.py"
LOSS, REDUCE = f"{MODELS}/losses/cross_entropy_loss.py", f"{MODELS}/losses/utils.py"
MERGEMIX, MERGE = f"{MODELS}/classifiers/mergemix.py", f"{MODELS}/utils/merge.py"
VIT, ATTENTION = f"{MODELS}/backbones/vision_transformer.py", f"{MODELS}/utils/layers/attention.py"
VIT_HEAD, MIXUP = f"{MODELS}/heads/vision_transformer_head.py", f"{MODELS}/augments/mixup.py"
GAMMA = 0.5
TYPES = {"Callable": Callable, "List": list, "Tuple": tuple, "Union": Union}  # of annotations


def one_hot(labels: Tensor) -> Tensor:
    """Targets without smoothing, as the original's criterion takes them."""
    return functional.one_hot(labels, CLASSES).float()


def criterion(original: Checkout) -> Any:
    """OpenMixup's cross-entropy of labels, averaged over the batch."""
    weigh = original.names(REDUCE, "weight_reduce_loss", torch=torch, F=functional)
    return original.names(LOSS, "cross_entropy", torch=torch, F=functional, weight_reduce_loss=weigh)


@contextlib.contextmanager
def ones_here() -> Iterator[None]:
    """``torch.ones`` on the CPU too."""
    made = torch.ones

    def ones(*args: Any, **options: Any) -> Tensor:
        return made(*args, **{k: v for k, v in options.items() if k != "device"})

    with here(), mock.patch("torch.ones", ones):
        yield


def by_labels(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of a mixed target, of ours."""
    return cross_entropy(logits, target)


class Pooled(nn.Module):
    """A timm model as the original's backbone and head: what the classifier is given, in a list."""

    def __init__(self, model: Any):
        super().__init__()
        self.model: Any = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.model.forward_head(self.model.forward_features(x), pre_logits=True)]


def head_of(original: Checkout, classifier: nn.Module, layer: nn.Module) -> Any:
    """Their head, with our weights."""
    quiet = {"accuracy": lambda *_: 0, "accuracy_mixup": lambda *_: 0, "info": None}
    register = SimpleNamespace(register_module=lambda cls: cls)
    kind = original.names(
        HEAD, "ClsUncertainMixupHead", torch=torch, nn=nn, F=functional, HEADS=register, BaseModule=Base,
        build_loss=lambda _: criterion(original), normal_init=None, kaiming_init=None, trunc_normal_init=None, **quiet,
    )  # fmt: skip
    head = kind(in_channels=1, num_classes=CLASSES, gama=GAMMA)
    head.fc, head.uncertain = classifier, layer
    return head


class Base(nn.Module):
    """What stands for mmcv's base of modules."""

    def __init__(self, *_: Any, **__: Any):
        super().__init__()


def network() -> Any:
    """A small DeiT whose predictions differ."""
    model = deit()
    nn.init.normal_(model.get_classifier().weight, std=0.1)
    return model.train()


def sumix(**options: Any) -> tuple[SUMix, Any]:
    """Ours over CutMix, with the batch size as its scale, and its network; the weights are always the same."""
    torch.manual_seed(0)
    model, mixer = network(), SUMix(CutMix(0.2), GAMMA, float(IMAGES), **options)
    step = Step(model, mixer, by_labels)
    nn.init.normal_(mixer.uncertainty.weight, std=0.5)
    return mixer, step


@beside(
    "sumix", "JinXins/SUMix", HEAD, CLASSIFIER, f"{MODELS}/augments/cutmix.py", LOSS, REDUCE,
    held="test_sumix.py::test_a_step_is_two_forwards_and_the_formula_with_its_gradients",
)  # fmt: skip
def sumix_authors(original: Checkout) -> Iterator[Gap]:
    """Updates by their classifier and head as they stand, ours as released; and ours by itself."""
    _mixer, step = sumix(as_released=True)
    diary, optimizer = Diary(), optimizer_of(step)
    watched(diary, step.model)
    for seed, (x, labels) in enumerate(batches()):
        with pairing(CYCLE):
            out = step(x, one_hot(labels), np.random.default_rng(seed))
        optimizer.zero_grad()
        diary.scale(out.loss, optimizer, step.parameters())
    names = [name for name, _ in step.named_parameters()]
    ours = diary.trained(step, names)

    other, same = sumix(as_released=True)
    head, draws = head_of(original, same.model.get_classifier(), other.uncertainty), Draws(beta=[], randint=[])
    cut = original.names(
        f"{MODELS}/augments/cutmix.py", "cutmix", "_no_repeat_shuffle_idx", np=Numpy(draws), torch=torch
    )  # fmt: skip
    forward = original.method(
        CLASSIFIER, "MixUpClassification", "forward_mix", np=np, torch=torch, F=functional,
        random=SimpleNamespace(choices=lambda found, k: found[:k]),
    )  # fmt: skip
    theirs = SimpleNamespace(
        mix_prob=None, idx_list=[0], mix_mode=["cutmix"], alpha=[0.2], mix_args={"cutmix": {}}, mix_repeat=1,
        is_IN=True, static_mode={"cutmix": cut[0]}, save=False, debug_mode=True, backbone=Pooled(same.model), head=head,
    )  # fmt: skip
    diary, optimizer = Diary(), optimizer_of(same)
    watched(diary, same.model)
    for seed, (x, labels) in enumerate(batches()):
        rng = np.random.default_rng(seed)
        draws.values["beta"].append(rng.beta(0.2, 0.2))
        draws.values["randint"] += [int(rng.integers(x.shape[2])), int(rng.integers(x.shape[3]))]
        with pairing(CYCLE), ones_here():
            loss = forward(theirs, x.clone(), labels)[0]["loss"]
        optimizer.zero_grad()
        diary.scale(loss, optimizer, same.parameters())
    yield from learned(ours, diary.trained(same, names))

    shares = []
    for seed, (x, labels) in enumerate(batches()):
        found = []
        for released in (False, True):
            with pairing(CYCLE):
                _, made = sumix(as_released=released)
                found.append(made(x, one_hot(labels), np.random.default_rng(seed)).plan["lam"])
        shares.append(apart(found[0], found[1]))
    why = (
        "its distance is the larger the nearer a mixed image is to its sample, and its loss replaces every share by "
        "the mean of the batch"
    )
    yield Gap("the share of each sample, ours not as released", max(shares), "absolute", why)


def watched(diary: Diary, model: Any) -> None:
    """Write down the images of every forward, by what the first layer is given."""
    model.patch_embed.register_forward_pre_hook(lambda _, args: diary.inputs.append(args[0].clone()))


class Encoder(nn.Module):
    """A timm DeiT under the names that their network's forwards use."""

    def __init__(self, original: Checkout, model: Any):
        super().__init__()
        merge = original.names(
            MERGE, "bipartite_soft_matching", "merge_source_matrix", "merge_source_map", "merge_wavg",
            math=math, torch=torch, **TYPES,
        )  # fmt: skip
        names = ("bipartite_soft_matching", "merge_source_matrix", "merge_source_map", "merge_wavg")
        layer = original.method(
            VIT, "ToMeTransformerEncoderLayer", "forward", torch=torch, **dict(zip(names, merge, strict=True))
        )
        attend = original.method(ATTENTION, "ToMeAttention", "forward", torch=torch)
        self.run = original.method(
            VIT, "ToMeVisionTransformer", "forward", torch=torch, resize_pos_embed=lambda embed, *_, **__: embed
        )
        self.model, self.cls_token, self.pos_embed = model, model.cls_token, model.pos_embed
        last = len(model.blocks) - 1
        self.layers = nn.ModuleList(Layer(b, layer, attend, i == last) for i, b in enumerate(model.blocks))
        self.norm1, self.drop_after_pos, self.patch_resolution = model.norm, nn.Identity(), None
        self.interpolate_mode, self.num_extra_tokens, self.with_cls_token = "", 1, True
        self.out_indices, self.return_attn = (len(self.layers) - 1,), True
        self.final_norm = self.output_cls_token = True

    def patch_embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patches, and how many there are down and across."""
        return self.model.patch_embed(x), self.model.patch_embed.grid_size

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Layer(nn.Module):
    """A timm block under the names of their layer."""

    def __init__(self, block: Any, forward: Any, attend: Any, last: bool):
        super().__init__()
        self.run = forward
        self._tome_info: dict[str, Any] = {}
        inner, nothing = block.attn, nn.Identity()
        own = SimpleNamespace(
            qkv=inner.qkv, num_heads=inner.num_heads, head_dims=inner.head_dim, scale=inner.scale, attn_scale=False,
            return_attn=True, attn_drop=nothing, embed_dims=inner.num_heads * inner.head_dim, proj=inner.proj,
            out_drop=nothing, gamma1=nothing, proj_drop=nothing, v_shortcut=False,
        )  # fmt: skip
        self.attn = lambda x: attend(own, x)
        self.norm1, self.norm2, self.ffn = block.norm1, block.norm2, block.mlp
        self.drop_path = self.freq_scale = nothing
        self.last, self.return_attn = last, True

    def forward(self, x: Tensor) -> Any:
        found = self.run(self, x)
        return found if self.last else found[0]


def original_of(original: Checkout, model: Any, draws: Draws, merged: int, **options: Any) -> Any:
    """Their classifier, whose backbone and head have the weights of a timm model."""
    unchanged = lambda **_: lambda method: method  # noqa: E731
    merge = original.names(
        MERGE, "parse_r", "modify_r_list", "check_parse_r", "token_unmerge_from_map", "token_unmerge",
        math=math, torch=torch, **TYPES,
    )  # fmt: skip
    names = ("parse_r", "modify_r_list", "check_parse_r", "token_unmerge_from_map", "token_unmerge")
    encoder = Encoder(original, model)
    lam_loss, loss = (
        original.method(
            VIT_HEAD, "VisionTransformerClsHead", name, torch=torch, F=functional, accuracy=lambda *_: 0,
            accuracy_mixup=lambda *_: 0,
        )
        for name in ("lam_loss", "loss")
    )  # fmt: skip
    own = SimpleNamespace(multi_label=False, criterion=criterion(original))
    head = SimpleNamespace(
        lam_loss=lambda *args, **kw: lam_loss(own, *args, **kw), loss=lambda *args, **kw: loss(own, *args, **kw)
    )

    class Head(Base):
        """Their head's losses on the classifier of the timm model; a feature is (patches, class token, attention)."""

        lam_loss, loss = staticmethod(head.lam_loss), staticmethod(head.loss)

        def init_weights(self) -> None:
            """Nothing to do."""

        def forward(self, x: Any) -> list[Tensor]:
            return [model.get_classifier()(x[0][1])]

    mixup = original.names(MIXUP, "mixup", np=Numpy(draws), torch=torch)
    kind = original.names(
        MERGEMIX, "MergeMix", torch=torch, F=functional, np=Numpy(draws), math=math, BaseModel=Base,
        MODELS=SimpleNamespace(register_module=lambda cls: cls), PlotTensor=lambda **_: None,
        builder=SimpleNamespace(build_backbone=lambda _: encoder, build_head=lambda _: Head()),
        contextmanager=contextlib.contextmanager, nullcontext=contextlib.nullcontext, auto_fp16=unchanged,
        force_fp32=unchanged, mixup=mixup, print_log=lambda *_, **__: None, ToMeTransformerEncoderLayer=Layer,
        **dict(zip(names, merge, strict=True)),
    )  # fmt: skip
    return kind(backbone={}, head={}, merge_num=merged, save=False, **options)


def stable_topk(values: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """The largest, of equal ones the first."""
    order = values.argsort(dim=dim, descending=True, stable=True)[:, :k]
    return values.gather(dim, order), order


@beside(
    "mergemix", "Westlake-AI/openmixup", MERGEMIX, MERGE, VIT, ATTENTION, VIT_HEAD, MIXUP, LOSS, REDUCE,
    held="test_mergemix.py::test_a_look_merges_as_the_loops_do_and_leaves_the_model_as_it_was",
)  # fmt: skip
def mergemix_openmixup(original: Checkout) -> Iterator[Gap]:
    """Schedules, the look, the patches that stay, labels, and updates by their classifier as it stands."""
    parse, best = original.names(MERGE, "parse_r", "check_parse_r", **TYPES,
                                 math=math, torch=torch)  # fmt: skip
    totals = range(1, 148)
    differ = sum(schedule(12, n) != parse(12, (best(12, n, 196, -0.5), -0.5), n) for n in totals)
    yield Gap("merges of each of 12 layers, 1 to 147 in all", differ / len(totals), "share")

    merged, mixer, model = 16, MergeMix(merged=16 / 49, base=Mixup(0.8), as_released=True), deit()
    draws = Draws(beta=[], randint=[], random=[], normal=[])
    theirs = original_of(original, model, draws, merged)
    looks, kept, cells, ties = [], [], [], []
    for seed, (x, _) in enumerate(batches()):
        with here(), pairing(CYCLE), torch.no_grad():
            feature = theirs.backbone(x)[0][-1]
            source = theirs.backbone._tome_info["source_map"][:, 1:]
            seen = feature.sum(1)[:, :, 0].gather(1, source)
            look = mixer.attention(model, x)
            looks.append(relative([look.flatten(1)], [seen / feature.shape[1]]))
            lam = np.random.default_rng(seed).beta(1.0, 1.0)
            plan = mixer.plan(x, one_hot(torch.zeros(IMAGES, dtype=torch.long)), np.random.default_rng(seed), look)
            ours = mixer.mix(x, x.new_zeros(IMAGES, CLASSES), **plan)[0]
            mixed, _ = theirs.ranking_mixup(x, lam, feature)
            with mock.patch("torch.topk", lambda v, k, dim: stable_topk(v, k, dim)):
                same, share = theirs.ranking_mixup(x, lam, feature)
        stays = plan["mask"][:, 0, ::16, ::16].flatten(1)
        shown = (mixed["img_mix"] == x).all(1)[:, ::16, ::16].flatten(1).float()
        kept.append(relative([(seen * stays).sum(1)], [(seen * shown).sum(1)]))
        ties.append((stays != shown).float().mean().item())
        cells.append(max(apart(ours, same["img_mix"]), apart(plan["lam"], torch.from_numpy(np.asarray(share)))))
    yield Gap(f"attention of each patch, as released, {UPDATES} batches of {IMAGES}", max(looks), "relative")
    yield Gap("attention of the patches that stay", max(kept), "relative")
    why = "of patches with equal attention, as those of one token have, it takes any, ours the first"
    yield Gap("patches that stay in one and not in the other", max(ties), "share", why)
    yield Gap("mixed images and shares, the first of equal patches in both", max(cells))
    by_class = [1 - agree(MergeMix(merged=16 / 49), mixer, model, x) for x, _ in batches()]
    why = "it takes what patches give the class token, and tokens of another number than the attention saw"
    yield Gap("the half with the most attention, ours not as released", max(by_class), "share", why)

    draws.values["normal"].append(np.random.default_rng(0).normal(0.25, 0.4, 64))
    labels = theirs.lambda_scale(0.25, np.full(64, 0.4))
    yield Gap("labels of Eq. 8", float(np.abs(labels - rescaled(0.4, 0.25, 64, np.random.default_rng(0))).max()))
    yield from learned(*updates(original, merged))


def agree(one: MergeMix, other: MergeMix, model: Any, x: Tensor) -> float:
    """The share of the better half of all patches that two looks have in common."""
    a, b = (
        look.attention(model, x).flatten(1).argsort(dim=1, descending=True, stable=True)[:, :24]
        for look in (one, other)
    )
    return (a[:, :, None] == b[:, None, :]).any(2).float().mean().item()


def updates(original: Checkout, merged: int) -> tuple[Trained, Trained]:
    """Twenty updates of ours as released, and of theirs."""
    found = []
    for own in (True, False):
        model, draws = deit(), Draws(beta=[], random=[], normal=[])
        mixer = MergeMix(merged=merged / 49, base=Mixup(0.8), as_released=True)
        step = Step(model, mixer, by_labels)
        theirs = None if own else original_of(original, model, draws, merged)
        diary, optimizer = Diary(), optimizer_of(model)
        watched(diary, model)
        for seed, (x, labels) in enumerate(batches()):
            with pairing(CYCLE), here(), mock.patch("torch.topk", stable_topk):
                if theirs is None:
                    loss = step(x, one_hot(labels), np.random.default_rng(seed)).loss
                else:
                    rng = np.random.default_rng(seed)
                    draws.values["beta"] += [rng.beta(1.0, 1.0), rng.beta(0.8, 0.8)]
                    draws.values["random"].append(0.0)
                    loss = theirs.forward_train(x, labels)["loss"]
            optimizer.zero_grad()
            diary.scale(loss, optimizer, model.parameters())
        found.append(diary.trained(model, [name for name, _ in model.named_parameters()]))
    return found[0], found[1]
