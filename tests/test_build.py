"""Making mixers by name: what works, and errors that say what was given, what was expected and what to do."""

import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny import environment
from torch import nn

import mixers
from mixers import (
    BLOCKS,
    MIXERS,
    CutMix,
    DecoupleMix,
    FMix,
    Mixer,
    MixPro,
    Mixup,
    Switch,
    TransMix,
    Vanilla,
    build,
    deit,
    ops,
    rsb,
    signature,
)
from mixers.testing import tiny_step

TEXT: dict[str, Any] = {"capture_output": True, "text": True, "check": False}

STEP = (
    "alpha=2.0, margin=0.08, switch_off=1.0, momentum=0.999, momentum_end=0.99999, momentum_delay=0.1, mask_loss=0.1, "
    "mask_loss_end=0.0, block_lr=None, block_min_lr=None, block_momentum=None"
)
REPRS = {
    "vanilla": "Vanilla()",
    "mixup": "Mixup(alpha=1.0)",
    "cutmix": "CutMix(alpha=1.0)",
    "deit": "Switch(probs=None (mixers): ModuleList((0): Mixup(alpha=0.8) (1): CutMix(alpha=1.0)))",
    "rsb": "Switch(probs=None (mixers): ModuleList((0): Mixup(alpha=0.1) (1): CutMix(alpha=1.0)))",
    "manifoldmix": "ManifoldMix(alpha=2.0)",
    "alignmix": "Switch(probs=None (mixers): ModuleList((0): Mixup(alpha=2.0) (1): AlignMix(alpha=2.0)))",
    "transmix": (
        "Switch(probs=[0.2, 0.8] (mixers): ModuleList((0): Mixup(alpha=0.8) (1): TransMix((base): CutMix(alpha=1.0))))"
    ),
    "mixpro": (
        "Switch(probs=[0.5, 0.25, 0.25] (mixers): ModuleList("
        "(0): MixPro(alpha=1.0, cell=32, detach=True, smoothed=False) (1): Mixup(alpha=0.8) (2): CutMix(alpha=1.0)))"
    ),
    "tlalign": "TLAlign(alpha=1.0)",
    "smoothmix": "SmoothMix(alpha=None, swapped_label=False)",
    "gridmix": (
        "GridMix(alpha=0.2, n_holes=(2, 6), hole_aspect_ratio=1.0, cut_area_ratio=(0.5, 1.0), "
        "cut_aspect_ratio=(0.5, 2.0), clip=False)"
    ),
    "fmix": "FMix(alpha=1.0, decay_power=3.0, max_soft=0.0, reformulate=False, isotropic=False)",
    "resizemix": "ResizeMix(alpha=1.0, scope=(0.1, 0.8), use_alpha=True, placement='clip')",
    "tokenmix": (
        "Switch(probs=None (mixers): ModuleList((0): Mixup(alpha=0.8) "
        "(1): TokenMix(alpha=1.0, use_alpha=True, teacher=None)))"
    ),
    "smmix": "Switch(probs=None (mixers): ModuleList((0): Mixup(alpha=0.8) (1): SMMix()))",
    "saliencymix": ("SaliencyMix(alpha=1.0, box_from='each', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"),
    "puzzlemix": (
        "PuzzleMix(alpha=1.0, blocks=(2, 4, 8), n_labels=3, beta=1.2, gamma=0.5, eta=0.2, neigh_size=4, "
        "transport=True, t_eps=0.8, t_size=None, adv_p=0.0, adv_eps=0.0392156862745098, clean_lam=0.0, "
        "mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"
    ),
    "comixup": (
        "CoMixup(alpha=2.0, part=20, block_num=4, beta=0.32, gamma=1.0, thres=0.83, thres_type='hard', eta=0.05, "
        "omega=0.001, stride=1, set_resolve=True, niter=4, clean_lam=1.0)"
    ),
    "automix": f"AutoMix({STEP} (block): MixBlock(lam_concat=True, upsample='nearest'))",
    "samix": f"AutoMix({STEP} (block): SAMixBlock(lam_mul_k=-1, dropout=0.1, upsample='bilinear'))",
    "adautomix": (
        "AdAutoMix(alpha=1.0, samples=2, beta=0.1, adv_interval=2, cos_sign=1, mixup_share=0.5, margin=0.03, "
        "lam_concat=True, norm=False, upsample='bilinear', momentum=0.999, momentum_end=0.99999, momentum_delay=0.1, "
        "block_lr=None, block_min_lr=None, block_momentum=None)"
    ),
    "decouplemix": "DecoupleMix(eta=0.1, power=0.0, two_hot=None, xi=1.0 (base): Mixup(alpha=1.0))",
    "recursivemix": "RecursiveMix(alpha=0.5, omega=0.5, swapped_roi=False)",
    "snapmix": "SnapMix(alpha=5.0, same_label_twice=False)",
    "attentivemix": "AttentiveMix(alpha=2.0, beta=None, teacher='resnet18.tv_in1k')",
    "supermix": "SuperMix(alpha=3.0, teacher=None, steps=5, grid=16, sigma=2.0, sparsity=25.0)",
    "grafting": ("Grafting(alpha=1.0, temperature=0.2, sigma=1.0, grid=None, label_norm=2, source='activation')"),
    "guidedmix": "Switch(probs=[0.5, 0.5] (mixers): ModuleList((0): Vanilla() (1): GuidedMix(source='spectral')))",
}


@pytest.mark.parametrize("name", MIXERS)
def test_repr_shows_the_constructor_call(name: str) -> None:
    shown = " ".join(repr(build(name)).split()).replace("( ", "(").replace(" )", ")")
    assert shown == REPRS[name]


def test_repr_shows_arguments_that_were_given() -> None:
    assert repr(build("mixup", alpha=0.2)) == "Mixup(alpha=0.2)"
    assert repr(Switch([Vanilla()], [1.0])).startswith("Switch(\n  probs=[1.0]\n")


@pytest.mark.parametrize(
    ("spec", "args", "made"),
    [
        ("cutmix", {"alpha": 0.2}, CutMix(0.2)),
        ({"cutmix": {"alpha": 0.2}}, {}, CutMix(0.2)),
        ({"cutmix": {}}, {}, CutMix()),
        ({"cutmix": None}, {}, CutMix()),
        ({"mixup": None}, {"alpha": 0.5}, Mixup(0.5)),
        ("deit", {"mixup_alpha": 0.3}, Switch([Mixup(0.3), CutMix(1.0)])),
        ("attend", {"base": {"cutmix": {"alpha": 0.3}}}, TransMix(CutMix(0.3))),
        ("maskmix", {"cell": 16}, MixPro(cell=16)),
        ("rsb", {"cutmix_alpha": 0.3}, Switch([Mixup(0.1), CutMix(0.3)])),
    ],
)
def test_build_makes_what_the_constructor_makes(spec, args: dict, made: Mixer) -> None:
    assert repr(build(spec, **args)) == repr(made)


def test_build_makes_mixers_inside_mixers_to_any_depth() -> None:
    inner = {"switch": {"mixers": ["cutmix", "vanilla"], "probs": [0.9, 0.1]}}
    spec = {"switch": {"mixers": [{"mixup": {"alpha": 0.8}}, inner, CutMix(0.3)]}}
    expected = Switch([Mixup(0.8), Switch([CutMix(), Vanilla()], [0.9, 0.1]), CutMix(0.3)])
    assert repr(build(spec)) == repr(expected)


def test_an_argument_called_base_is_a_mixer_too() -> None:
    spec = {"decouple": {"base": {"switch": {"mixers": ["cutmix", {"decouplemix": {"base": "fmix"}}]}}, "eta": 0.5}}
    expected = DecoupleMix(Switch([CutMix(), DecoupleMix(FMix())]), 0.5)
    assert repr(build(spec)) == repr(expected)
    assert repr(build("decouplemix", base=None)) == repr(build("decouplemix")) == repr(DecoupleMix(Mixup(1.0)))
    assert isinstance(build("decouplemix", base=Vanilla()).base, Vanilla)


def test_every_name_makes_a_new_mixer_each_time() -> None:
    for name in MIXERS:
        assert isinstance(build(name), Mixer)
        assert build(name) is not build(name)
    assert not set(MIXERS) & set(BLOCKS)


@pytest.mark.parametrize(
    ("spec", "args", "says"),
    [
        ("cutmx", {}, "unknown mixer 'cutmx'; did you mean 'cutmix'?"),
        ("Mixup", {}, "unknown mixer 'Mixup'; did you mean 'mixup'?"),
        ("swich", {}, "unknown mixer 'swich'; did you mean 'switch'?"),
        ("zzz", {}, f"valid names: {', '.join(sorted(MIXERS | BLOCKS))}"),
        ("mixup", {"alhpa": 1.0}, "mixer 'mixup' has no argument 'alhpa'; did you mean 'alpha'?"),
        ("deit", {"mixup_alfa": 1.0}, "mixer 'deit' has no argument 'mixup_alfa'; did you mean 'mixup_alpha'?"),
        ("vanilla", {"alpha": 1.0}, "mixer 'vanilla' has no argument 'alpha'; valid names: none"),
        ("vanilla", {"args": 1.0}, "mixer 'vanilla' has no argument 'args'; valid names: none"),
        ("mixup", {"alpha": 0}, "alpha must be a number above 0, got 0"),
        ("mixup", {"alpha": True}, "alpha must be a number above 0, got True"),
        ("manifoldmix", {"alpha": 0}, "alpha must be a number above 0, got 0"),
        ("align", {"alpha": -1.0}, "alpha must be a number above 0, got -1.0"),
        ("tokenmix", {"cutmix_alpha": 0}, "alpha must be a number above 0, got 0"),
        ("tokenmix", {"use_alpha": "no"}, "use_alpha must be one of False, True, got 'no'"),
        ("token", {"teacher": 3}, "teacher must be the name of timm weights or a folder, or None, got 3"),
        ("smmix", {"alpha": 1.0}, "mixer 'smmix' has no argument 'alpha'; did you mean 'mixup_alpha'?"),
        ("cutmix", {"alpha": float("nan")}, "alpha must be a number above 0, got nan"),
        ("cutmix", {"alpha": float("inf")}, "alpha must be a number above 0, got inf"),
        ("rsb", {"cutmix_alpha": -1.0}, "alpha must be a number above 0, got -1.0"),
        ("smoothmix", {"alpha": 0}, "alpha must be a number above 0, got 0"),
        ("smoothmix", {"swapped_label": "no"}, "swapped_label must be one of False, True, got 'no'"),
        ("gridmix", {"n_holes": 4}, "n_holes must be two integers, the smaller first, got 4"),
        ("gridmix", {"n_holes": [2.5, 6]}, "n_holes must be two integers, the smaller first, got [2.5, 6]"),
        ("gridmix", {"n_holes": [0, 6]}, "n_holes must be a number of at least 1, got 0"),
        ("gridmix", {"n_holes": [6, 2]}, "n_holes must be two integers, the smaller first, got [6, 2]"),
        ("gridmix", {"cut_area_ratio": [0.5, 1.5]}, "cut_area_ratio must be a number of at least 0 and at most 1, got"),
        ("gridmix", {"clip": 3}, "clip must be one of False, True, got 3"),
        ("fmix", {"decay_power": -1.0}, "decay_power must be a number of at least 0, got -1.0"),
        ("fmix", {"max_soft": 0.6}, "max_soft must be a number of at least 0 and at most 0.5, got 0.6"),
        ("resizemix", {"scope": [0.8, 0.1]}, "scope must be two numbers, the smaller first, got [0.8, 0.1]"),
        ("resizemix", {"placement": "outside"}, "placement must be one of 'clip', 'inside', got 'outside'"),
        ("saliencymix", {"box_from": "all"}, "box_from must be one of 'each', 'first', 'noise', got 'all'"),
        ("saliencymix", {"mean": 0.5}, "mean must be three numbers, one per channel, got 0.5"),
        ("saliencymix", {"std": [0.2, 0.2, None]}, "std must be a number of at least 1e-06, got None"),
        ("transmix", {"share": 1.5}, "share must be a number of at least 0 and at most 1, got 1.5"),
        ("attend", {}, "mixer 'attend' needs the argument 'base'"),
        ("attend", {"base": "cutmux"}, "unknown mixer 'cutmux'; did you mean 'cutmix'?"),
        ("attend", {"base": "manifoldmix"}, "base must be a mixer that only mixes images, such as CutMix(), got Manif"),
        ("mixpro", {"cell": 0}, "cell must be a whole number of pixels, at least 1, got 0"),
        ("maskmix", {"detach": "no"}, "detach must be one of False, True, got 'no'"),
        ("tlalign", {"alpha": 0}, "alpha must be a number above 0, got 0"),
        ("recursivemix", {"alpha": 1.5}, "alpha must be a number of at least 0 and at most 1, got 1.5"),
        ("recursivemix", {"omega": -1.0}, "omega must be a number of at least 0, got -1.0"),
        ("recursivemix", {"swapped_roi": 1.5}, "swapped_roi must be one of False, True, got 1.5"),
        ("snapmix", {"alpha": 0}, "alpha must be a number above 0, got 0"),
        ("snapmix", {"same_label_twice": "no"}, "same_label_twice must be one of False, True, got 'no'"),
        ("attentivemix", {"alpha": 0}, "alpha must be a number above 0, got 0"),
        ("attentivemix", {"beta": -8.0}, "beta must be a number above 0, got -8.0"),
        ("attentivemix", {"teacher": None}, "teacher must be the name of timm weights or a folder, got None"),
        ("supermix", {"alpha": 0}, "alpha must be a number above 0, got 0"),
        ("supermix", {"teacher": 3}, "teacher must be the name of timm weights or a folder, or None, got 3"),
        ("supermix", {"teacher": ""}, "teacher must be the name of timm weights or a folder, or None, got ''"),
        ("puzzlemix", {"n_labels": 3.0}, "n_labels must be one of 2, 3, 4, got 3.0"),
        ("puzzlemix", {"transport": 1}, "transport must be one of False, True, got 1"),
        ("supermix", {"steps": 0}, "steps must be a whole number, at least 1, got 0"),
        ("supermix", {"grid": 8.0}, "grid must be a whole number, at least 1, got 8.0"),
        ("supermix", {"sigma": 0}, "sigma must be a number above 0, got 0"),
        ("supermix", {"sparsity": -1.0}, "sparsity must be a number of at least 0, got -1.0"),
        ("grafting", {"alpha": 0}, "alpha must be a number above 0, got 0"),
        ("grafting", {"temperature": 0}, "temperature must be a number above 0, got 0"),
        ("grafting", {"sigma": -1.0}, "sigma must be a number of at least 0, got -1.0"),
        ("grafting", {"grid": 0}, "grid must be a whole number of cells per side, at least 1, got 0"),
        ("grafting", {"label_norm": 3}, "label_norm must be one of 1, 2, got 3"),
        ("grafting", {"source": "attention"}, "source must be one of 'activation', 'gradient', got 'attention'"),
        ("guidedmix", {"source": "activation"}, "source must be one of 'spectral', 'gradient', got 'activation'"),
        ("guidedmix", {"share": 1.5}, "share must be a number of at least 0 and at most 1, got 1.5"),
        ("decouplemix", {"eta": -0.1}, "eta must be a number of at least 0, got -0.1"),
        ("decouplemix", {"power": None}, "power must be a number of at least 0, got None"),
        ("decouplemix", {"two_hot": 2.0}, "two_hot must be a number of at least 0.001 and at most 1, got 2.0"),
        ("decouplemix", {"xi": 0}, "xi must be a number above 0, got 0"),
        ("decouplemix", {"base": "cutmux"}, "unknown mixer 'cutmux'; did you mean 'cutmix'?"),
        ("decouplemix", {"base": 3}, "a mixer is written as name or {name: {argument: value}}, got 3"),
        ("decouple", {}, "mixer 'decouple' needs the argument 'base'"),
        ("decouple", {"base": None}, "base must be a mixer, got None"),
        ({"mixup": {}, "cutmix": {}}, {}, "a mixer is written as name or {name: {argument: value}}, got"),
        ({}, {}, "a mixer is written as name or {name: {argument: value}}, got {}"),
        ({"mixup": 0.5}, {}, "a mixer is written as name or {name: {argument: value}}, got {'mixup': 0.5}"),
        ({"mixup": {"alpha": 1.0}}, {"alpha": 0.5}, "mixer 'mixup' was given 'alpha' twice"),
        (3, {}, "a mixer is written as name or {name: {argument: value}}, got 3"),
        ("switch", {}, "mixer 'switch' needs the argument 'mixers'"),
        ("switch", {"mixers": []}, "Switch needs at least one mixer, got none"),
        ("switch", {"mixers": "mixup"}, "mixers must be a list of mixers, got 'mixup'"),
        ("switch", {"mixers": ["mixup", "cutmux"]}, "unknown mixer 'cutmux'; did you mean 'cutmix'?"),
        ("switch", {"mixers": [{"mixup": {"alph": 1}}]}, "has no argument 'alph'; did you mean 'alpha'?"),
        ("switch", {"mixers": ["mixup"], "probs": [0.5]}, "probs must be 1 probabilities that sum to 1, got [0.5]"),
        ("switch", {"mixers": ["mixup"], "probs": [0.5, 0.5]}, "probs must be 1 probabilities that sum to 1"),
        ("switch", {"mixers": ["mixup"] * 2, "probs": [-0.5, 1.5]}, "probs must be 2 probabilities that sum to 1"),
        ("switch", {"mixers": ["mixup"], "prob": [1]}, "has no argument 'prob'; did you mean 'probs'?"),
    ],
)
def test_what_cannot_be_built_is_a_value_error_that_names_the_nearest(spec, args, says, without_shape_checks) -> None:
    with pytest.raises(ValueError) as caught:
        build(spec, **args)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", MIXERS | BLOCKS)
def test_a_signature_is_read_as_it_is_written(name: str) -> None:
    read, written = (
        [(p.name, p.kind, repr(p.default)) for p in found.parameters.values()]
        for found in (signature(name), inspect.signature((MIXERS | BLOCKS)[name]))
    )
    assert read == written


def test_the_signature_of_an_unknown_name_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown mixer 'cutmux'; did you mean 'cutmix'\?"):
        signature("cutmux")


NAMES = """
import sys
import mixers

known = mixers.MIXERS | mixers.BLOCKS
assert "cutmix" in known and "cutmux" not in known and "CutMix" in dir(mixers)
assert all(mixers.signature(name) for name in known)
print(*known, "torch" in sys.modules, callable(known["cutmix"]), "torch" in sys.modules)
"""


def test_names_and_signatures_are_known_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", NAMES], env=environment(), **TEXT)
    assert done.stdout.split() == [*MIXERS, *BLOCKS, "False", "True", "True"], done.stderr


def test_the_package_shows_every_class_and_the_files_as_modules() -> None:
    assert set(mixers.__all__) <= set(dir(mixers)) and all(hasattr(mixers, name) for name in mixers.__all__)
    for make in (MIXERS | BLOCKS).values():
        if isinstance(make, type):
            assert getattr(mixers, make.__name__) is make
    assert mixers.taps.Frozen and mixers.automix.AutoMix is mixers.AutoMix
    assert mixers.deit is deit is sys.modules["mixers.deit"].deit is MIXERS["deit"]  # not its file
    with pytest.raises(AttributeError, match="module 'mixers' has no attribute 'CutMux'"):
        _ = mixers.CutMux
    with pytest.raises(TypeError):
        MIXERS["mine"] = Mixup  # type: ignore[index]


def test_published_switches_store_what_they_were_given() -> None:
    assert [m.alpha for m in deit(0.3, 0.4).mixers] == [0.3, 0.4]
    assert [m.alpha for m in rsb(0.3, 0.4).mixers] == [0.3, 0.4]


IMAGES, TARGETS = torch.zeros(4, 3, 8, 8), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("x", "y", "error", "says"),
    [
        (
            IMAGES.to(torch.uint8),
            TARGETS,
            TypeError,
            "images must be float and normalised before mixing",
        ),
        (IMAGES[0], TARGETS, ValueError, "images must have shape (B, C, H, W), got (3, 8, 8)"),
        (IMAGES, TARGETS.long(), TypeError, "targets must be dense float (B, K), got torch.int64: use F.one_hot"),
        (IMAGES, torch.zeros(4).long(), TypeError, "use F.one_hot(labels, K).float()"),
        (IMAGES, TARGETS[:3], ValueError, "targets must have shape (B, K) with B = 4, got (3, 2)"),
        (IMAGES, TARGETS[:, 0], ValueError, "targets must have shape (B, K) with B = 4, got (4,)"),
        (IMAGES[:0], TARGETS[:0], ValueError, "the batch is empty: there is nothing to mix"),
    ],
)
@pytest.mark.parametrize("name", ["check_batch", *MIXERS])
def test_a_wrong_batch_is_refused_in_words(name: str, x, y, error, says: str, without_shape_checks, rng) -> None:
    with pytest.raises(error) as caught:
        if name == "check_batch":
            ops.check_batch(x, y)
        else:
            tiny_step(MIXERS[name])(x, y, rng)
    assert says in str(caught.value)


class Owner(Mixup):
    """A member with a parameter, optimiser settings and a classifier of its own."""

    def __init__(self, lr: float = 0.5):
        super().__init__()
        self.lr = lr
        self.weight = nn.Parameter(torch.zeros(2))

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": [self.weight], "lr": self.lr, "weight_decay": 0.0}]

    def models(self, model: nn.Module) -> dict[str, nn.Module]:
        return {"": model, "k": self}


def test_a_switch_hands_on_what_its_members_own() -> None:
    member, model = Owner(), nn.Linear(2, 2)
    switch = Switch([CutMix(), Switch([member])])
    (group,) = switch.param_groups(0.1, 0.05)
    assert group["params"] == [member.weight] and (group["lr"], group["weight_decay"]) == (0.5, 0.0)
    assert switch.models(model) == {"": model, "k": member}
    assert CutMix().param_groups(0.1, 0.05) == CutMix().compiled() == [] and CutMix().models(model) == {"": model}


COMPILED = """
import numpy as np, torch
from mixers import MIXERS, build

for name in MIXERS:
    mixer = build(name)
    for side in (64, 224) if mixer.needs == "batch" else ():
        graphs, branches = 0, set()

        def count(graph, _inputs):
            global graphs
            graphs += 1
            return graph.forward

        torch.compiler.reset()
        compiled = torch.compile(mixer.mix, backend=count)
        x, y = torch.randn(4, 3, side, side), torch.eye(4)
        for update in range(20):
            plan = mixer.plan(x, y, np.random.default_rng((0, update)))
            branches.add(repr({k: v.shape if isinstance(v, torch.Tensor) else v for k, v in plan.items()}))
            for found, expected in zip(compiled(x, y, **plan), mixer.mix(x, y, **plan)):
                torch.testing.assert_close(found, expected)
        print(name, side, graphs, len(branches))
"""


def test_a_compiled_mix_is_compiled_at_most_once_per_branch() -> None:
    """In a process of its own: the shape checks of these tests cannot be compiled."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], env=environment(), **TEXT)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, *_ in rows} == {name for name in MIXERS if MIXERS[name]().needs == "batch"}
    assert [row for row in rows if int(row[2]) > int(row[3])] == []
