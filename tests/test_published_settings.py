"""The 60 published settings, value by value, against a table taken down from OpenMixup's configs on its own."""

import contextlib
import csv
import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from mixers import MIXERS, Step, build
from mixup_recipes.benchmark import cells
from mixup_recipes.data.known import KNOWN_SIZES
from mixup_recipes.data.order import updates_per_epoch
from mixup_recipes.recipe import Recipe, differences, schema
from mixup_recipes.resolve import load_recipe, resolve, settings
from mixup_recipes.training.backbones import create_model
from mixup_recipes.typed import convert

ROWS = list(csv.DictReader((Path(__file__).parent / "published_settings.csv").read_text().splitlines()))
PUBLISHED = [row["setting"] for row in ROWS]
OURS = {"cifar10_small", "cifar10_vit", "quickstart", "small_data", "small_data_vit"}
OURS |= {"finetune", "finetune_groceries", "finetune_r50", "finetune_convnext_t", "finetune_vit_s"}
SHARED = {
    "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, "interpolation": "bicubic", "train_crop": "rrc",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "sched": "cosine", "remode": "pixel", "seed": 0,
    "eval_epochs": 1, "bce_target_thresh": None, "warmup_prefix": False, "channels_last": False,
    "torch_compile": False, "grad_checkpointing": False, "momentum": 0.9,
    "max_train_samples": None, "max_eval_samples": None,
    "dataset_config": None, "dataset_revision": None, "train_split": "train", "label_column": "label",
    "image_column": "image", "holdout": 0.2, "holdout_seed": 0, "exif_orientation": False, "data_config": "recipe",
    "freeze": None, "head_lr": None, "layer_decay": None, "mix_prob": 1.0, "multi_label": False,
    "class_weights": "none", "sampler": "shuffle", "pixels": "v2", "streaming": False, "pretrained": None,
}  # fmt: skip
CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010), "image_column": "img"}
FINE = {"scale": (0.5, 1.0), "interpolation": "bilinear"}
DATA = {
    "cifar10_": {"dataset": "uoft-cs/cifar10", "eval_split": "test"} | CIFAR,
    "cifar100_": {"dataset": "uoft-cs/cifar100", "eval_split": "test", "label_column": "fine_label"} | CIFAR,
    "cub_": {"dataset": "bentrevett/caltech-ucsd-birds-200-2011", "eval_split": "test"} | FINE,
    "aircraft_": {"dataset": "aircraft", "eval_split": "test"} | FINE,
    "inat17_": {"dataset": "inat2017", "eval_split": "validation"},
    "inat18_": {"dataset": "inat2018", "eval_split": "validation"},
    "places_": {"dataset": "places205", "eval_split": "validation"},
    "tiny_": {"dataset": "zh-plus/tiny-imagenet", "eval_split": "valid"},
}


def shared(recipe):
    """What no column of the table has."""
    own = next((data for start, data in DATA.items() if recipe.name.startswith(start)), None)
    found = SHARED | (own or {"dataset": "ILSVRC/imagenet-1k", "eval_split": "validation"})
    if own and "image_column" in own:
        crop = "pad_zeros" if recipe.name.startswith("cifar10_") else "pad"
        found |= {"train_crop": crop} if recipe.image_size == 32 else {"scale": (0.8, 1.0)}
    if own and "scale" in own:
        found |= {"pretrained": f"{recipe.model}.tv_in1k"}
    return found


loaded = functools.cache(load_recipe)


def changed(name, base):
    """The fields of ``name`` that differ from those of ``base``."""
    pairs = differences(loaded(base), load_recipe(name), ignore=("name", "mixer", "mixer_args"))
    return {k: after for k, (_, after) in pairs.items()}


@pytest.mark.parametrize("of", ["a cell in turn", pytest.param("each cell", marks=pytest.mark.slow)])
@pytest.mark.parametrize("row", ROWS, ids=PUBLISHED)
def test_a_setting_does_what_the_published_runs_did_and_its_cells_build_at_their_real_size(row, of):
    recipe = load_recipe(row["setting"])
    for key, text in row.items():
        if key in ("setting", "updates_per_epoch", "parameters") or (key == "protocol_epochs" and not text):
            continue
        expected, found = convert(text or None, schema(Recipe)[key], key), getattr(recipe, key)
        if key == "drop_path_rate":  # models without it do not take the argument
            found = found or 0.0
        assert found == expected or found == pytest.approx(expected), key
    assert updates_per_epoch(KNOWN_SIZES[recipe.dataset], recipe) == int(row["updates_per_epoch"])
    with torch.device("meta"):  # without memory or arithmetic
        model = create_model(dataclasses.replace(recipe, init="timm"))
    own = [c for c in cells.cells().values() if c.setting == row["setting"]]  # rx101_300e has no column
    for cell in own if of == "each cell" else own[PUBLISHED.index(row["setting"]) % max(1, len(own)) :][:1]:
        args = load_recipe(cell.name).mixer_args[cell.mixer]
        refused = pytest.raises(ValueError, match="deit_small") if cell.obstacle else contextlib.nullcontext()
        with torch.device("meta"), refused:
            Step(model, build(cell.mixer, **args), torch.nn.CrossEntropyLoss(reduction="none"))
    assert sum(p.numel() for p in model.parameters()) == int(row["parameters"])
    expected = shared(recipe)
    assert {k: getattr(recipe, k) for k in expected} == expected
    betas, precision = (None, "no") if recipe.opt == "momentum" else ((0.9, 0.999), "bf16")
    precision = "no" if recipe.name.startswith("cifar100_deit") else precision
    assert (recipe.opt_betas, recipe.mixed_precision) == (betas, precision)
    assert recipe.ema_warmup_epochs == (20 if recipe.ema_decay else 0)


IMAGENET = [n for n in PUBLISHED if load_recipe(n).dataset == "ILSVRC/imagenet-1k" and n != "pvt_s"]
BY_TIMM = {
    "mixup": 0.2, "cutmix": 0.2, "manifoldmix": 0.2, "attentivemix": 2, "saliencymix": 0.2, "puzzlemix": 1,
    "fmix": 0.2, "resizemix": 1, "automix": 2, "samix": 2,
}  # fmt: skip
PLAIN = BY_TIMM | dict.fromkeys(("cutmix", "saliencymix", "fmix"), 1)
PLAIN |= {"gridmix": 0.2, "alignmix": 2, "comixup": 1, "supermix": 2, "grafting": 1}
TINY = {m: a for m, a in PLAIN.items() if m != "supermix"} | {"mixup": 1, "smoothmix": 0.2, "comixup": 2}
AVERAGED = {"ema_decay": 0.99996, "ema_warmup_epochs": 20.0, "report_ema": True}
NOT_AVERAGED = {"ema_decay": None, "ema_warmup_epochs": 0.0, "report_ema": False}
DROPPED = {"drop_path_rate": 0.1}
PYRAMID = {"aug_repeats": 1, "clip_grad": 5.0, "drop_last": False}
SLOW = {"min_lr": 0.05}
SMALL = SLOW | {"per_device_train_batch_size": 50}
LEARNED = ("automix", "samix", "adautomix")
CUTTING = ("cutmix", "saliencymix", "attentivemix", "fmix", "resizemix")
LATE, FAST = {"min_lr": 1e-4}, {"lr": 2e-3, "warmup_lr": 2e-8}
SHORT = DROPPED | LATE | {"lr": 5e-4, "clip_grad": 10.0, "warmup_epochs": 5.0, "warmup_lr": 5e-9}
LONG = DROPPED | LATE | {"lr": 7.5e-4, "clip_grad": 20.0, "warmup_lr": 7.5e-9}
ACCUMULATED = NOT_AVERAGED | {"per_device_train_batch_size": 128, "warmup_lr": 4e-8}
PER_MIXER: dict[str, dict] = {
    "deit_t": {"automix": DROPPED, "samix": DROPPED, "transmix": {"weight_decay": 0.03}},
    "deit_s": {"automix": DROPPED, "samix": DROPPED, "transmix": {"min_lr": 1e-4} | AVERAGED,
               "mergemix": DROPPED},
    "pvt_t": {"automix": PYRAMID, "samix": PYRAMID},
    "deit_b": {"automix": NOT_AVERAGED, "samix": NOT_AVERAGED, "adautomix": NOT_AVERAGED},
    "convnext_t": {"automix": ACCUMULATED, "samix": ACCUMULATED, "adautomix": ACCUMULATED},
    "tiny_r18": {"automix": SLOW, "samix": SLOW},
    "tiny_rx50": {"automix": SMALL, "samix": SMALL, "adautomix": SMALL},
    "pvt_s": {"automix": PYRAMID, "samix": PYRAMID},
    "aircraft_r18": {"adautomix": {"min_lr": 5e-4}},
    "cifar100_wrn288_400e": {m: {"min_lr": 0.001} for m in LEARNED},
    "cifar100_convnext_t_200e": {"automix": LATE, "samix": LATE | {"clip_grad": 20.0}, "adautomix": LATE},
    "cifar100_convnext_t_600e": {"automix": LATE | FAST, "samix": LATE | FAST | {"clip_grad": 20.0}, "adautomix": LATE},
    "cifar100_swin_t_200e": dict.fromkeys(LEARNED, LATE | {"clip_grad": 10.0}) | {"samix": LATE | {"clip_grad": 20.0}},
    "cifar100_swin_t_600e": {
        "automix": {"min_lr": 2e-4, "clip_grad": 10.0}, "samix": {"min_lr": 2e-4, "clip_grad": 20.0},
        "adautomix": LATE | {"clip_grad": 10.0},
    },
}  # fmt: skip
for length in (200, 600):
    PER_MIXER[f"cifar100_deit_s_{length}e"] = {"automix": SHORT, "adautomix": SHORT, "samix": LONG}
for length in (200, 400, 800, 1200):
    for start in ("cifar10_r18", "cifar10_rx50", "cifar100_r18", "cifar100_rx50"):
        PER_MIXER[f"{start}_{length}e"] = dict.fromkeys(LEARNED, SLOW)
    PER_MIXER[f"cifar100_rx50_{length}e"] |= {m: {"weight_decay": 5e-4} for m in CUTTING}
BLOCKS = {  # rate, last rate and momentum of automix's mix block, then of samix's; none: the recipe's
    "cifar10_rx50_1200e": [(0.1, 0.05, None)] * 2, "cifar100_wrn288_400e": [(0.03, 0.001, 0.0)] * 2,
    "cifar100_deit_s_600e": [(1e-3, 1e-4, None), (7.5e-4, 1e-4, None)],
    "cifar100_swin_t_200e": [(1e-3, 1e-4, None), (5e-4, 1e-4, None)],
    "cifar100_swin_t_600e": [(7.5e-4, 1e-4, None)] * 2,
    "cifar100_convnext_t_200e": [(1e-3, 1e-4, None), (7.5e-4, 1e-4, None)],
    "cifar100_convnext_t_600e": [(1e-3, 1e-4, None)] * 2, "aircraft_rx50": [(0.01, 5e-4, None)] * 2,
    "inat17_r18": [(None, 0.001, 0.9)] * 2, "inat18_rx101": [(None, 1e-4, 0.9)] * 2,
    "places_r50": [(None, 0.001, 0.9), (None, 1e-4, 0.9)], "pvt_s": [(1e-3, 1e-4, None)] * 2,
}  # fmt: skip
OFFICIAL = {"warmup_lr": 1e-6, "sched_on_updates": False, "clip_grad": None}
ORIGINAL = {"loss": "bce_mean", "bce_target_thresh": 0.2, "warmup_lr": 1e-4, "eval_resize": 235, "sync_bn": False}
VARIANTS = {
    "deit_b_official": OFFICIAL | {"report_ema": False, "ema_warmup_epochs": 0.0},
    "deit_s_official": OFFICIAL | {"drop_path_rate": 0.1, "aug_repeats": 3, "drop_last": True},
    "deit_t_official": OFFICIAL | {"drop_path_rate": 0.1, "aug_repeats": 3, "drop_last": True},
    "deit_s_2022": {"warmup_epochs": 20.0},
    "deit_t_2022": {"warmup_epochs": 20.0},
    "r50_rsb_a2_original": ORIGINAL,
    "r50_rsb_a3_original": ORIGINAL,
    "swin_t_official": {"warmup_lr": 1e-6, "warmup_prefix": True},
}


def alpha_of(args):
    """A mixer's own, or its base's."""
    return args["alpha"] if "alpha" in args else next(iter(args["base"].values()))["alpha"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_row_has_the_alpha_that_was_used_and_differs_for_a_mixer_exactly_where_its_config_did(name):
    rows, rsb = load_recipe(name).mixer_args, "_rsb_" in name
    if name in IMAGENET or name.startswith("tiny"):
        expected = TINY if name.startswith("tiny") else PLAIN if name.endswith("00e") else BY_TIMM
        if name.startswith("r18_"):  # the note below the table, not its alpha column
            expected = expected | dict.fromkeys(("cutmix", "saliencymix", "fmix", "resizemix"), 0.2)
        law = None if expected is TINY else "compounded"  # on Tiny-ImageNet the weight of the mask's loss stays
        pair = {"mixup_alpha": 0.1 if name == "moganet_t" or rsb else 0.8, "cutmix_alpha": 1.0}
        assert expected is TINY or rows["rsb" if rsb else "deit"] == pair
        if expected is BY_TIMM and not rsb:
            assert rows["tokenmix"] == {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
            assert rows["transmix"] == {"mixup_alpha": 0.1 if name == "deit_t" else 0.8, "cutmix_alpha": 1.0}
    else:  # what the table prints
        printed = {c.mixer: c.alpha for c in cells.select(setting=name) if c.alpha}
        expected = {mixer: float(alpha) for mixer, alpha in printed.items() if "," not in alpha}
        pairs = {mixer: alpha for mixer, alpha in printed.items() if "," in alpha}
        # SMMix has the alpha of its Mixup only; the printed 1 is CutMix's, and its square has a size without an alpha
        given = {m: load_recipe(f"{name}_{m}").mixer_args[m] for m in pairs if m != "smmix"}
        assert {m: f"{x['mixup_alpha']:g}, {x['cutmix_alpha']:g}" for m, x in given.items()} == {
            m: pairs[m] for m in given
        }
        law = None if name.startswith(("cifar10_", "cifar100_r", "cifar100_w")) else "compounded"
    assert {m: alpha_of(rows[m]) for m in expected} == expected
    assert all(rows[m].get("mask_loss_law") == law for m in ("automix", "samix"))
    found = {m: fields for m in MIXERS if (fields := changed(f"{name}_{m}", f"{name}_vanilla"))}
    assert found == PER_MIXER.get(name, {})


def test_there_are_60_published_settings_variants_that_change_only_what_they_say_and_ours():
    assert len(PUBLISHED) == len(set(PUBLISHED)) == 60 and len(IMAGENET) == 23
    assert {*PUBLISHED, *VARIANTS} | OURS == set(settings())
    assert {name: changed(name, name.rpartition("_")[0]) for name in VARIANTS} == VARIANTS
    assert changed("deit_s_2022_deit", "deit_s_deit") == {"warmup_epochs": 20.0} | AVERAGED
    for mixer in ("automix", "samix", "transmix"):
        assert changed(f"deit_s_2022_{mixer}", f"deit_s_{mixer}") == {"warmup_epochs": 20.0}
    assert changed("deit_s_official_transmix", "deit_s_official") == {}


def test_the_mix_block_learns_as_its_configs_say_and_teachers_and_co_mixup_are_as_published():
    rows = {name: load_recipe(name).mixer_args for name in PUBLISHED}
    for mixer in ("automix", "samix"):
        args = {name: rows[name][mixer] for name in PUBLISHED}
        for name in IMAGENET:
            if name.endswith(("100e", "300e")):
                assert args[name]["block_momentum"] == (0.0 if name.endswith("100e") else 0.9)
        for name in ("deit_t", "deit_s", "deit_b", "pvt_t", "swin_t", "convnext_t", "moganet_t"):
            own = args[name]
            assert (own["block_lr"], own["block_min_lr"]) == (4e-3 if name == "convnext_t" else 1e-3, 1e-4)
            assert (own["momentum_delay"], own["switch_off"]) == (0.25, 0.8)
            assert own.get("momentum_end") == (0.99996 if name == "convnext_t" else None)
            assert own.get("upsample") == ("nearest" if mixer == "samix" else None)
        assert args["tiny_r18"]["momentum_end"] == args["tiny_rx50"]["momentum_end"] == 0.999999
        assert (args["tiny_r18"]["block_lr"], args["tiny_r18"]["block_min_lr"]) == (0.1, 0.001)
    assert (rows["tiny_r18"]["samix"]["lam_mul_k"], rows["tiny_rx50"]["samix"]["lam_mul_k"]) == (-1, 0.25)
    assert rows["deit_s"]["attentivemix"] == {"alpha": 2.0, "teacher": "resnet50.tv_in1k"}
    assert resolve("deit_s_samix")[1]["drop_path_rate"] == "deit_s.yaml: per_mixer.samix"
    assert rows["cub_r18"]["samix"]["lam_mul_k"] == 1 and rows["cifar100_r18_800e"]["samix"]["lam_mul_k"] == 0.25
    for name, expected in BLOCKS.items():
        found = [rows[name][mixer] for mixer in ("automix", "samix")]
        assert [(x.get("block_lr"), x["block_min_lr"], x.get("block_momentum")) for x in found] == expected, name
    for name, size, expected in (("r50_100e", 64, (1.0, 16, 3, 8)), ("tiny_r18", 100, (2.0, 20, 4, 1))):
        recipe = load_recipe(f"{name}_comixup")
        args = recipe.mixer_args["comixup"]
        assert tuple(args[key] for key in ("alpha", "part", "niter", "stride")) == expected
        assert recipe.per_device_train_batch_size == size and size % args["part"] == 0  # no shorter part
