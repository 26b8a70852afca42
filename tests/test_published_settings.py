"""The 25 published settings, value by value, against a table taken down from OpenMixup's configs on its own."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from mixers import MIXERS
from mixup_recipes.data.known import KNOWN_SIZES
from mixup_recipes.data.order import updates_per_epoch
from mixup_recipes.recipe import Recipe, differences, schema
from mixup_recipes.resolve import load_recipe, resolve, settings
from mixup_recipes.training.backbones import create_model
from mixup_recipes.typed import convert

ROWS = list(csv.DictReader((Path(__file__).parent / "published_settings.csv").read_text().splitlines()))
PUBLISHED = [row["setting"] for row in ROWS]
OURS = {"cifar10_r18_200e", "cifar10_small", "cifar10_vit", "quickstart"}
OURS |= {"finetune", "finetune_r50", "finetune_convnext_t", "finetune_vit_s"}
SHARED = {
    "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5, "interpolation": "bicubic", "train_crop": "rrc",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "sched": "cosine", "remode": "pixel", "seed": 0,
    "eval_epochs": 1, "bce_target_thresh": None, "warmup_prefix": False, "channels_last": False,
    "torch_compile": False, "grad_checkpointing": False, "momentum": 0.9,
    "max_train_samples": None, "max_eval_samples": None,
    "dataset_config": None, "dataset_revision": None, "train_split": "train", "label_column": "label",
    "image_column": "image", "holdout": 0.2, "holdout_seed": 0, "exif_orientation": False, "data_config": "recipe",
    "freeze": None, "head_lr": None, "layer_decay": None, "mix_prob": 1.0, "multi_label": False,
    "class_weights": "none", "sampler": "shuffle",
}  # fmt: skip


def changed(name, base):
    """The fields of ``name`` that differ from those of ``base``."""
    pairs = differences(load_recipe(base), load_recipe(name), ignore=("name", "mixer", "mixer_args"))
    return {k: after for k, (_, after) in pairs.items()}


@pytest.mark.parametrize("row", ROWS, ids=PUBLISHED)
def test_a_setting_does_what_the_published_runs_did(row):
    recipe = load_recipe(row["setting"])
    for key, text in row.items():
        if key in ("setting", "updates_per_epoch", "parameters") or (key == "protocol_epochs" and not text):
            continue
        expected, found = convert(text or None, schema(Recipe)[key], key), getattr(recipe, key)
        if key == "drop_path_rate":  # models without it do not take the argument
            found = found or 0.0
        assert found == expected or found == pytest.approx(expected), key
    assert updates_per_epoch(KNOWN_SIZES[recipe.dataset], recipe) == int(row["updates_per_epoch"])
    with torch.device("meta"):
        model = create_model(dataclasses.replace(recipe, init="timm"))
    assert sum(p.numel() for p in model.parameters()) == int(row["parameters"])
    assert {k: getattr(recipe, k) for k in SHARED} == SHARED
    betas, precision = (None, "no") if recipe.opt == "momentum" else ((0.9, 0.999), "bf16")
    assert (recipe.opt_betas, recipe.mixed_precision) == (betas, precision)
    assert recipe.ema_warmup_epochs == (20 if recipe.ema_decay else 0)


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
ACCUMULATED = NOT_AVERAGED | {"per_device_train_batch_size": 128, "warmup_lr": 4e-8}
PER_MIXER = {
    "deit_t": {"automix": DROPPED, "samix": DROPPED, "transmix": {"weight_decay": 0.03}},
    "deit_s": {"automix": DROPPED, "samix": DROPPED, "transmix": {"min_lr": 1e-4} | AVERAGED},
    "pvt_t": {"automix": PYRAMID, "samix": PYRAMID},
    "deit_b": {"automix": NOT_AVERAGED, "samix": NOT_AVERAGED, "adautomix": NOT_AVERAGED},
    "convnext_t": {"automix": ACCUMULATED, "samix": ACCUMULATED, "adautomix": ACCUMULATED},
    "tiny_r18": {"automix": SLOW, "samix": SLOW},
    "tiny_rx50": {"automix": SMALL, "samix": SMALL, "adautomix": SMALL},
}
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
CIFAR10 = SHARED | {
    "name": "cifar10_r18_200e_mixup", "dataset": "uoft-cs/cifar10", "eval_split": "test", "image_column": "img",
    "num_classes": 10, "streaming": False, "model": "resnet18_cifar", "model_args": {}, "drop_path_rate": None,
    "init": "mmcls_cnn", "pretrained": None, "mixer": "mixup",
    "mixer_args": {"mixup": {"alpha": 1.0}, "cutmix": {"alpha": 0.2}},
    "epochs": 200, "batch_size": 100, "per_device_train_batch_size": 100, "drop_last": True, "opt": "momentum",
    "lr": 0.1, "opt_betas": None, "opt_eps": None, "weight_decay": 1e-4, "decay_bias_and_norm": True,
    "clip_grad": None, "sched_on_updates": False, "min_lr": 0.0, "warmup_epochs": 0.0, "warmup_lr": 0.0, "loss": "ce",
    "smoothing": 0.0, "image_size": 32, "train_crop": "pad", "pixels": "v2", "aa": None,
    "reprob": 0.0, "aug_repeats": 1, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010),
    "eval_size": 32, "eval_resize": 32, "protocol": "median", "protocol_epochs": 10, "trials": 1, "ema_decay": None,
    "ema_warmup_epochs": 0.0, "report_ema": False, "sync_bn": False, "precise_bn_samples": None,
    "mixed_precision": "no",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_row_has_the_alpha_that_was_used_and_differs_for_a_mixer_exactly_where_its_config_did(name):
    rows, rsb = load_recipe(name).mixer_args, "_rsb_" in name
    expected = TINY if name.startswith("tiny") else PLAIN if name.endswith("00e") else BY_TIMM
    if name.startswith("r18_"):  # the note below the table, not its alpha column
        expected = expected | dict.fromkeys(("cutmix", "saliencymix", "fmix", "resizemix"), 0.2)
    assert {m: rows[m]["alpha"] for m in expected} == expected
    law = None if expected is TINY else "compounded"  # on Tiny-ImageNet the weight of the mask's loss stays
    assert all(rows[m].get("mask_loss_law") == law for m in ("automix", "samix"))
    pair = {"mixup_alpha": 0.1 if name == "moganet_t" or rsb else 0.8, "cutmix_alpha": 1.0}
    assert expected is TINY or rows["rsb" if rsb else "deit"] == pair
    if expected is BY_TIMM and not rsb:
        assert rows["tokenmix"] == {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
        assert rows["transmix"] == {"mixup_alpha": 0.1 if name == "deit_t" else 0.8, "cutmix_alpha": 1.0}
    found = {m: fields for m in MIXERS if (fields := changed(f"{name}_{m}", f"{name}_vanilla"))}
    assert found == PER_MIXER.get(name, {})


def test_there_are_25_published_settings_variants_that_change_only_what_they_say_and_ours():
    assert len(PUBLISHED) == len(set(PUBLISHED)) == 25
    assert {*PUBLISHED, *VARIANTS} | OURS == set(settings())
    assert {name: changed(name, name.rpartition("_")[0]) for name in VARIANTS} == VARIANTS
    assert changed("deit_s_2022_deit", "deit_s_deit") == {"warmup_epochs": 20.0} | AVERAGED
    for mixer in ("automix", "samix", "transmix"):
        assert changed(f"deit_s_2022_{mixer}", f"deit_s_{mixer}") == {"warmup_epochs": 20.0}
    assert changed("deit_s_official_transmix", "deit_s_official") == {}
    assert dataclasses.asdict(load_recipe("cifar10_r18_200e_mixup")) == CIFAR10


def test_the_mix_block_learns_as_its_configs_say_and_teachers_and_co_mixup_are_as_published():
    rows = {name: load_recipe(name).mixer_args for name in PUBLISHED}
    for mixer in ("automix", "samix"):
        args = {name: rows[name][mixer] for name in PUBLISHED}
        for name in PUBLISHED:
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
    for name, size, expected in (("r50_100e", 64, (1.0, 16, 3, 8)), ("tiny_r18", 100, (2.0, 20, 4, 1))):
        recipe = load_recipe(f"{name}_comixup")
        args = recipe.mixer_args["comixup"]
        assert tuple(args[key] for key in ("alpha", "part", "niter", "stride")) == expected
        assert recipe.per_device_train_batch_size == size and size % args["part"] == 0  # no shorter part
