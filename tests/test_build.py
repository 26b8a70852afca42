"""Making mixers by name: what works, and errors that say what was given, what was expected and what to do."""

import inspect
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from tiny import environment

import mixers
from mixers import BLOCKS, MIXERS, REGRESSION, CutMix, Mixup, Switch, Vanilla, build, deit, signature
from mixers.testing import tiny_step

STEP = """alpha=2.0, margin=0.08, switch_off=1.0, momentum=0.999, momentum_end=0.99999, momentum_delay=0.1, \
mask_loss=0.1, mask_loss_end=0.0, mask_loss_law='cosine', block_lr=None, block_min_lr=None, \
block_momentum=None"""
SHOWN = f"""\
vanilla: Vanilla()
mixup: Mixup(alpha=1.0)
cutmix: CutMix(alpha=1.0)
deit: Switch(probs=None (mixers): ModuleList((0): Mixup(alpha=0.8) (1): CutMix(alpha=1.0)))
rsb: Switch(probs=None (mixers): ModuleList((0): Mixup(alpha=0.1) (1): CutMix(alpha=1.0)))
manifoldmix: ManifoldMix(alpha=2.0)
alignmix: Switch(probs=None (mixers): ModuleList((0): Mixup(alpha=2.0) (1): AlignMix(alpha=2.0)))
transmix: Switch(probs=[0.2, 0.8] (mixers): ModuleList((0): Mixup(alpha=0.8) (1): TransMix((base): \
CutMix(alpha=1.0))))
mixpro: Switch(probs=[0.5, 0.25, 0.25] (mixers): ModuleList((0): MixPro(alpha=1.0, cell=32, detach=True, \
smoothed=False) (1): Mixup(alpha=0.8) (2): CutMix(alpha=1.0)))
tlalign: TLAlign(alpha=1.0)
smoothmix: SmoothMix(alpha=None, swapped_label=False)
gridmix: GridMix(alpha=0.2, n_holes=(2, 6), hole_aspect_ratio=1.0, cut_area_ratio=(0.5, 1.0), cut_aspect_ratio=(0.5, \
2.0), clip=False)
fmix: FMix(alpha=1.0, decay_power=3.0, max_soft=0.0, reformulate=False, isotropic=False)
resizemix: ResizeMix(alpha=1.0, scope=(0.1, 0.8), use_alpha=True, placement='clip')
tokenmix: Switch(probs=None (mixers): ModuleList((0): Mixup(alpha=0.8) (1): TokenMix(alpha=1.0, use_alpha=True, \
teacher=None)))
smmix: Switch(probs=None (mixers): ModuleList((0): Mixup(alpha=0.8) (1): SMMix()))
saliencymix: SaliencyMix(alpha=1.0, box_from='each', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
puzzlemix: PuzzleMix(alpha=1.0, blocks=(2, 4, 8), n_labels=3, beta=1.2, gamma=0.5, eta=0.2, neigh_size=4, \
transport=True, t_eps=0.8, t_size=None, adv_p=0.0, adv_eps=0.0392156862745098, clean_lam=0.0, mean=(0.485, 0.456, \
0.406), std=(0.229, 0.224, 0.225))
comixup: CoMixup(alpha=2.0, part=20, block_num=4, beta=0.32, gamma=1.0, thres=0.83, thres_type='hard', eta=0.05, \
omega=0.001, stride=1, set_resolve=True, niter=4, clean_lam=1.0)
automix: AutoMix({STEP} (block): MixBlock(lam_concat=True, upsample='nearest'))
samix: AutoMix({STEP} (block): SAMixBlock(lam_mul_k=-1, dropout=0.1, upsample='bilinear'))
adautomix: AdAutoMix(alpha=1.0, samples=2, beta=0.1, adv_interval=2, cos_sign=1, mixup_share=0.5, margin=0.03, \
lam_concat=True, norm=False, upsample='bilinear', momentum=0.999, momentum_end=0.99999, momentum_delay=0.1, \
block_lr=None, block_min_lr=None, block_momentum=None)
decouplemix: DecoupleMix(eta=0.1, power=0.0, two_hot=None, xi=1.0 (base): Mixup(alpha=1.0))
recursivemix: RecursiveMix(alpha=0.5, omega=0.5, swapped_roi=False)
snapmix: SnapMix(alpha=5.0, same_label_twice=False)
attentivemix: AttentiveMix(alpha=2.0, beta=None, teacher='resnet18.tv_in1k', teacher_size=224)
supermix: SuperMix(alpha=3.0, teacher=None, steps=5, grid=16, sigma=2.0, sparsity=25.0)
grafting: Grafting(alpha=1.0, temperature=0.2, sigma=1.0, grid=None, label_norm=2, source='activation')
augmix: AugMix(severity=3.0, width=3, depth=None, alpha=1.0, jsd_weight=12.0, mean=(0.485, 0.456, 0.406), std=(0.229, \
0.224, 0.225))
nfm: NFM(alpha=1.0, add_noise_level=0.4, mult_noise_level=0.2)
noisymix: NoisyMix(alpha=1.0, add_noise_level=0.5, mult_noise_level=0.5, sparse_level=0.65, jsd_weight=12.0, \
severity=3.0, width=3, depth=None, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
mixtoken: MixToken(alpha=1.0, teacher=None, dense_weight=1.0)
tokenmixup: TokenMixup(layer=None, rho=0.01, tau=0.1, score_weight=1.0, detach=True, kappa=0, \
vertical_layer=None, compared_with='own', shifted=False (base): Vanilla())
guidedmix: Switch(probs=[0.5, 0.5] (mixers): ModuleList((0): Vanilla() (1): GuidedMix(source='spectral')))
remix: Remix(alpha=1.0, kappa=3.0, tau=0.5, class_counts=None)
cmixup: CMixup(alpha=2.0, bandwidth=1.0)
hmix: HMix(alpha=1.0, r=0.5)
gmix: GMix(alpha=1.0)
regmixup: RegMixup(alpha=20.0, eta=1.0, averaged=False)
lumix: LUMix(predicted=0.4, noise=0.1, alpha=1.0 (base): CutMix(alpha=1.0))
sumix: SUMix(gamma=0.5, scale=100.0, as_released=False (base): CutMix(alpha=0.2))
mergemix: MergeMix(alpha=1.0, merged=0.25, rescale=False, as_released=False (base): Vanilla())
patchup: Switch(probs=[0.7, 0.3] (mixers): ModuleList((0): PatchUp(alpha=None, gamma=0.5, block_size=7) (1): Vanilla()))
softpatchup: PatchUp(alpha=2.0, gamma=0.75, block_size=7)
catchupmix: CatchUpMix(alpha=1.0)
"""


def test_repr_shows_the_constructor_call_of_a_new_mixer_each_time():
    made = {name: build(name) for name in [*MIXERS, *REGRESSION]}
    shown = {name: " ".join(repr(mixer).split()).replace("( ", "(").replace(" )", ")") for name, mixer in made.items()}
    assert shown == dict(line.split(": ", 1) for line in SHOWN.splitlines())
    assert repr(build("mixup", alpha=0.2)) == "Mixup(alpha=0.2)"
    assert all(build(name) is not mixer for name, mixer in made.items())
    assert len(MIXERS | REGRESSION | BLOCKS) == len(MIXERS) + len(REGRESSION) + len(BLOCKS)
    assert all(mixer.regression is (name in REGRESSION) for name, mixer in made.items())


UNEVEN = {"switch": {"mixers": ["cutmix", "vanilla"], "probs": [0.9, 0.1]}}
DEEP = {"switch": {"mixers": ["cutmix", {"decouplemix": {"base": "fmix"}}]}}
MADE = [
    ("cutmix", {"alpha": 0.2}, CutMix(0.2)),
    ({"cutmix": {"alpha": 0.2}}, {}, CutMix(0.2)),
    ({"cutmix": {}}, {}, CutMix()),
    ({"cutmix": None}, {}, CutMix()),
    ({"mixup": None}, {"alpha": 0.5}, Mixup(0.5)),
    ("deit", {"mixup_alpha": 0.3, "cutmix_alpha": 0.4}, Switch([Mixup(0.3), CutMix(0.4)])),
    ("rsb", {"cutmix_alpha": 0.3}, Switch([Mixup(0.1), CutMix(0.3)])),
    ("attend", {"base": {"cutmix": {"alpha": 0.3}}}, mixers.TransMix(CutMix(0.3))),
    ("maskmix", {"cell": 16}, mixers.MixPro(cell=16)),
    (
        {"switch": {"mixers": [{"mixup": {"alpha": 0.8}}, UNEVEN, CutMix(0.3)]}}, {},
        Switch([Mixup(0.8), Switch([CutMix(), Vanilla()], [0.9, 0.1]), CutMix(0.3)]),
    ),
    (
        {"decouple": {"base": DEEP, "eta": 0.5}}, {},
        mixers.DecoupleMix(Switch([CutMix(), mixers.DecoupleMix(mixers.FMix())]), 0.5),
    ),
    *(("decouplemix", args, mixers.DecoupleMix(Mixup(1.0))) for args in ({}, {"base": None})),
    ("decouplemix", {"base": Vanilla()}, mixers.DecoupleMix(Vanilla())),
    ("lumix", {"noise": 0.2}, mixers.LUMix(CutMix(), noise=0.2)),
    *((name, {"base": "gmix"}, mixers.LUMix(mixers.GMix())) for name in ("lumix", "perturb")),
    *(("sumix", args, mixers.SUMix(CutMix(0.2))) for args in ({}, {"base": None})),
    ("semantic", {"base": "fmix", "gamma": 1.0}, mixers.SUMix(mixers.FMix(), 1.0)),
    ("mergemix", {"base": {"mixup": {"alpha": 0.8}}}, mixers.MergeMix(base=Mixup(0.8))),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "args", "made"), MADE)
def test_build_makes_what_the_constructor_makes_to_any_depth(spec, args, made):
    assert repr(build(spec, **args)) == repr(made)


# What an argument must be: mixers with an argument, and values that are something else.
MUST_BE: dict[str, list[tuple[str, Any]]] = {
    "a number above 0": [
        ("hmix alpha", 0), ("gmix alpha", -1.0), ("regmixup alpha", 0), ("lumix alpha", 0),
        ("mixup alpha", 0), ("mixup alpha", True), ("manifoldmix alpha", 0), ("align alpha", -1.0),
        ("smoothmix alpha", 0), ("tlalign alpha", 0), ("snapmix alpha", 0), ("attentivemix alpha", 0),
        ("attentivemix beta", -8.0), ("supermix alpha", 0), ("supermix sigma", 0), ("grafting alpha", 0),
        ("grafting temperature", 0), ("decouplemix xi", 0), ("softpatchup alpha", 0), ("catchupmix alpha", -1.0),
        ("augmix alpha", 0), ("nfm alpha", 0),
        ("noisymix alpha", 0), ("mixtoken alpha", 0), ("remix alpha", 0), ("cmixup alpha", 0), ("cmixup bandwidth", 0),
        ("sumix scale", 0), ("mergemix alpha", 0),
    ],
    "one of False, True": [
        ("regmixup averaged", "no"),
        ("tokenmix use_alpha", "no"), ("smoothmix swapped_label", "no"), ("gridmix clip", 3), ("maskmix detach", "no"),
        ("recursivemix swapped_roi", 1.5), ("snapmix same_label_twice", "no"), ("puzzlemix transport", 1),
        ("sumix as_released", 1), ("mergemix as_released", "no"), ("mergemix rescale", 0),
        ("tokenmixup detach", 1), ("tokenmixup shifted", 0),
    ],
    "the name of timm weights or a folder, or None": [
        ("token teacher", 3), ("mixtoken teacher", 3), ("supermix teacher", 3), ("supermix teacher", ""),
    ],
    "two integers, the smaller first": [
        ("gridmix n_holes", 4), ("gridmix n_holes", [2.5, 6]), ("gridmix n_holes", [6, 2]),
    ],
    "a number of at least 0": [
        ("regmixup eta", -1.0),
        ("fmix decay_power", -1.0), ("recursivemix omega", -1.0), ("supermix sparsity", -1.0), ("grafting sigma", -1.0),
        ("decouplemix eta", -0.1), ("decouplemix power", None), ("samix lam_mul_k", -2),
        ("sumix gamma", -1.0),
        ("augmix jsd_weight", -1.0), ("nfm add_noise_level", -1.0), ("nfm mult_noise_level", None),
        ("mixtoken dense_weight", -1.0), ("tokenmixup rho", -0.1), ("tokenmixup tau", None),
    ],
    "a number of at least 0 and at most 0.5": [("fmix max_soft", 0.6), ("automix margin", 0.7)],
    "two numbers, the smaller first": [("resizemix scope", [0.8, 0.1])],
    "one of 'clip', 'inside'": [("resizemix placement", "outside")],
    "one of 'each', 'first', 'noise'": [("saliencymix box_from", "all")],
    "three numbers, one per channel": [("saliencymix mean", 0.5)],
    "a number of at least 0 and at most 1": [
        ("hmix r", 1.5), ("lumix predicted", -0.1), ("lumix noise", 1.5),
        ("transmix share", 1.5), ("recursivemix alpha", 1.5), ("guidedmix share", 1.5), ("automix momentum_end", 1.5),
        ("patch gamma", 1.5),
        ("noisymix sparse_level", 1.5),
        ("remix tau", 1.5),
    ],
    "a number of at least 0.1 and at most 10": [("augmix severity", 0), ("noisymix severity", 11)],
    "a whole number of pixels, at least 1": [("mixpro cell", 0), ("attentivemix teacher_size", 32.0)],
    "a whole number of positions, at least 1": [("patchup block_size", 0)],
    "odd, so that a block has a centre": [("patchup block_size", 4)],
    "the name of timm weights or a folder": [("attentivemix teacher", None)],
    "one of 2, 3, 4": [("puzzlemix n_labels", 3.0)],
    "a whole number, at least 1": [
        ("supermix steps", 0), ("supermix grid", 8.0), ("adautomix adv_interval", 0), ("augmix depth", 0),
        ("augmix width", 2.0), ("tokenmixup layer", 0), ("tokenmixup kappa", -1), ("tokenmixup vertical_layer", 1.5),
    ],
    "a whole number of cells per side, at least 1": [("grafting grid", 0)],
    "one of 1, 2": [("grafting label_norm", 3)],
    "one of 'own', 'first'": [("tokenmixup compared_with", "last")],
    "one of 'activation', 'gradient'": [("grafting source", "attention")],
    "one of 'spectral', 'gradient'": [("guidedmix source", "activation")],
    "a number of at least 0.001 and at most 1": [("decouplemix two_hot", 2.0)],
    "a number of at least 1": [("remix kappa", 0.3)],
    "the number of training images of each class, such as [500, 120, 30]": [
        ("remix class_counts", 3), ("remix class_counts", [5, -1]), ("remix class_counts", [5, 2.5]),
        ("remix class_counts", [0, 0]), ("remix class_counts", []),
    ],
    "a mixer": [("decouple base", None)],
    "a list of mixers": [("switch mixers", "mixup")],
    "one of 'nearest', 'bilinear'": [("automix upsample", "bicubic")],
    "a number of at least 0 and at most 0.99": [("samix dropout", 1.0), ("mergemix merged", 1.0)],
    "one of 2, 3": [("adautomix samples", 4)],
    "one of 1, -1": [("adautomix cos_sign", 0)],
}  # fmt: skip
WRITTEN = "a mixer is written as name or {name: {argument: value}}, got "
REFUSED_ARGUMENTS: list[tuple[Any, dict[str, Any], str]] = [
    *(
        (where.split()[0], {where.split()[1]: value}, f"{where.split()[1]} must be {words}, got {value!r}")
        for words, cases in MUST_BE.items()
        for where, value in cases
    ),
    ("cutmx", {}, "unknown mixer 'cutmx'; did you mean 'cutmix'?"),
    ("Mixup", {}, "unknown mixer 'Mixup'; did you mean 'mixup'?"),
    ("swich", {}, "unknown mixer 'swich'; did you mean 'switch'?"),
    ("zzz", {}, f"valid names: {', '.join(sorted(MIXERS | REGRESSION | BLOCKS))}"),
    ("mixup", {"alhpa": 1.0}, "mixer 'mixup' has no argument 'alhpa'; did you mean 'alpha'?"),
    ("deit", {"mixup_alfa": 1.0}, "mixer 'deit' has no argument 'mixup_alfa'; did you mean 'mixup_alpha'?"),
    ("vanilla", {"args": 1.0}, "mixer 'vanilla' has no argument 'args'; valid names: none"),
    ("automix", {"lam_mul_k": 1}, "mixer 'automix' has no argument 'lam_mul_k'; valid names: alpha, block_lr"),
    ("cutmix", {"alpha": float("nan")}, "alpha must be a number above 0, got nan"),
    ("cutmix", {"alpha": float("inf")}, "alpha must be a number above 0, got inf"),
    ("tokenmix", {"cutmix_alpha": 0}, "alpha must be a number above 0, got 0"),
    ("gridmix", {"n_holes": [0, 6]}, "n_holes must be a number of at least 1, got 0"),
    ("gridmix", {"cut_area_ratio": [0.5, 1.5]}, "cut_area_ratio must be a number of at least 0 and at most 1, got"),
    ("saliencymix", {"std": [0.2, 0.2, None]}, "std must be a number of at least 1e-06, got None"),
    ("attend", {}, "mixer 'attend' needs the argument 'base'"),
    ("attend", {"base": "cutmux"}, "unknown mixer 'cutmux'; did you mean 'cutmix'?"),
    ("attend", {"base": "manifoldmix"}, "base must be a mixer that only mixes images, such as CutMix(), got Manif"),
    ("decouplemix", {"base": 3}, f"{WRITTEN}3"),
    ("lumix", {"base": "regmixup"}, "base must be a mixer that only mixes images, such as CutMix(), got RegM"),
    ("lumix", {"predicted": 0.6, "noise": 0.5}, "predicted + noise must be at most 1, got 0.6 + 0.5"),
    ("tokenmixup", {"base": "manifoldmix"}, "base must be a mixer that only mixes images, such as CutMix(), got Mani"),
    ({"mixup": {}, "cutmix": {}}, {}, WRITTEN),
    ({}, {}, f"{WRITTEN}{{}}"),
    ({"mixup": 0.5}, {}, f"{WRITTEN}{{'mixup': 0.5}}"),
    (3, {}, f"{WRITTEN}3"),
    ({"mixup": {"alpha": 1.0}}, {"alpha": 0.5}, "mixer 'mixup' was given 'alpha' twice"),
    ("switch", {}, "mixer 'switch' needs the argument 'mixers'"),
    ("switch", {"mixers": []}, "Switch needs at least one mixer, got none"),
    ("switch", {"mixers": ["mixup", "cutmux"]}, "unknown mixer 'cutmux'; did you mean 'cutmix'?"),
    ("switch", {"mixers": [{"mixup": {"alph": 1}}]}, "has no argument 'alph'; did you mean 'alpha'?"),
    ("switch", {"mixers": ["mixup"], "probs": [0.5]}, "probs must be 1 probabilities that sum to 1, got [0.5]"),
    ("switch", {"mixers": ["mixup"], "probs": [0.5, 0.5]}, "probs must be 1 probabilities that sum to 1"),
    ("switch", {"mixers": ["mixup"] * 2, "probs": [-0.5, 1.5]}, "probs must be 2 probabilities that sum to 1"),
]


@pytest.mark.parametrize(("spec", "args", "says"), REFUSED_ARGUMENTS)
def test_what_cannot_be_built_is_a_value_error_that_names_the_nearest(spec, args, says, without_shape_checks):
    with pytest.raises(ValueError) as caught:
        build(spec, **args)
    assert says in str(caught.value)


def test_signatures_are_read_as_they_are_written():
    for name, make in (MIXERS | REGRESSION | BLOCKS).items():
        read, written = (
            [(p.name, p.kind, repr(p.default)) for p in found.parameters.values()]
            for found in (signature(name), inspect.signature(make))
        )
        assert read == written, name
    with pytest.raises(ValueError, match=r"unknown mixer 'cutmux'; did you mean 'cutmix'\?"):
        signature("cutmux")


def test_the_package_shows_every_class_and_the_files_as_modules():
    assert set(mixers.__all__) <= set(dir(mixers)) and all(hasattr(mixers, name) for name in mixers.__all__)
    for make in (MIXERS | REGRESSION | BLOCKS).values():
        assert not isinstance(make, type) or getattr(mixers, make.__name__) is make
    assert hasattr(mixers.taps, "Frozen") and mixers.automix.AutoMix is mixers.AutoMix
    assert mixers.deit is deit is sys.modules["mixers.deit"].deit is MIXERS["deit"]  # not its file
    with pytest.raises(AttributeError, match="module 'mixers' has no attribute 'CutMux'"):
        _ = mixers.CutMux
    with pytest.raises(TypeError):
        MIXERS["mine"] = Mixup


IMAGES, TARGETS = torch.zeros(4, 3, 8, 8), torch.ones(4, 2)
REFUSED = [
    (IMAGES.to(torch.uint8), TARGETS, TypeError, "images must be float and normalised before mixing"),
    (IMAGES[0], TARGETS, ValueError, "images must have shape (B, C, H, W), got (3, 8, 8)"),
    (IMAGES, TARGETS.long(), TypeError, "targets must be dense float (B, K), got torch.int64: use F.one_hot"),
    (IMAGES, torch.zeros(4).long(), TypeError, "use F.one_hot(labels, K).float()"),
    (IMAGES, TARGETS[:3], ValueError, "targets must have shape (B, K) with B = 4, got (3, 2)"),
    (IMAGES, TARGETS[:, 0], ValueError, "targets must have shape (B, K) with B = 4, got (4,)"),
    (IMAGES[:0], TARGETS[:0], ValueError, "the batch is empty: there is nothing to mix"),
]


@pytest.mark.parametrize("name", ["check_batch", *MIXERS])
def test_a_wrong_batch_is_refused_in_words(name, without_shape_checks, rng):
    step = mixers.ops.check_batch if name == "check_batch" else partial(tiny_step(MIXERS[name]), rng=rng)
    for x, y, error, says in REFUSED:
        with pytest.raises(error) as caught:
            step(x, y)
        assert says in str(caught.value)


def test_a_switch_hands_on_what_its_members_own():
    step = tiny_step(lambda: Switch([CutMix(), Switch([build("automix")])]))
    switch, member, model = step.mixer, step.mixer.mixers[1].mixers[0], step.model
    assert switch.param_groups(0.1, 0.05) == member.param_groups(0.1, 0.05) != []
    nets, own = switch.models(model), member.models(model)
    assert nets.keys() == own.keys() > {""} and nets["q"] is own["q"]
    assert CutMix().param_groups(0.1, 0.05) == CutMix().compiled() == [] and CutMix().models(model) == {"": model}


APART = """
import sys
import mixers
from mixers import MIXERS, build

known = MIXERS | mixers.BLOCKS
assert "cutmix" in known and "cutmux" not in known and "CutMix" in dir(mixers)
assert all(mixers.signature(name) for name in known)
print(*known, "torch" in sys.modules, callable(known["cutmix"]), "torch" in sys.modules)

import numpy as np, torch

for name in MIXERS:
    mixer = build(name)
    for side in (64, 112) if mixer.needs == "batch" else ():
        graphs, branches = 0, set()

        def count(graph, _inputs):
            global graphs
            graphs += 1
            return graph.forward

        torch.compiler.reset()
        compiled = torch.compile(mixer.mix, backend=count)
        x, y = torch.randn(4, 3, side, side), torch.eye(4)
        for update in range(10):
            plan = mixer.plan(x, y, np.random.default_rng((0, update)))
            branches.add(repr({k: v.shape if isinstance(v, torch.Tensor) else v for k, v in plan.items()}))
            for found, expected in zip(compiled(x, y, **plan), mixer.mix(x, y, **plan)):
                torch.testing.assert_close(found, expected)
        print(name, side, graphs, len(branches))
"""


def test_names_and_signatures_are_known_without_torch_and_a_compiled_mix_is_compiled_at_most_once_per_branch():
    """In a process of its own: the shape checks of these tests cannot be compiled."""
    command = [sys.executable, "-W", "ignore", "-c", APART]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    names, *rows = (line.split() for line in done.stdout.splitlines())
    assert names == [*MIXERS, *BLOCKS, "False", "True", "True"]
    assert {name for name, *_ in rows} == {name for name in MIXERS if MIXERS[name]().needs == "batch"}
    assert [row for row in rows if int(row[2]) > int(row[3])] == []
