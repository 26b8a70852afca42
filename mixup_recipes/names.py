"""The nearest valid name to one that is none: by what it means, then by its letters."""

import re
from collections.abc import Collection, Iterable, Mapping

from mixers import nearest as nearest_by_letters

# What people call things that have another name here, where letters do not help. A meaning counts only where it is one
# of the valid names. Lower and upper case, "-" and "_" are the same.
MEANINGS = {
    # fields of a recipe
    "learning_rate": "lr", "base_lr": "lr", "lr_max": "lr", "lr_min": "min_lr", "warmup_learning_rate": "warmup_lr",
    "batch": "batch_size", "bs": "batch_size", "global_batch_size": "batch_size", "train_batch_size": "batch_size",
    "micro_batch_size": "per_device_train_batch_size", "per_device_batch_size": "per_device_train_batch_size",
    "num_epochs": "epochs", "num_train_epochs": "epochs", "max_epochs": "epochs", "n_epochs": "epochs",
    "wd": "weight_decay", "l2": "weight_decay", "optimizer": "opt", "optimiser": "opt", "optim": "opt",
    "scheduler": "sched", "schedule": "sched", "lr_scheduler": "sched", "lr_scheduler_type": "sched",
    "betas": "opt_betas", "eps": "opt_eps", "epsilon": "opt_eps", "criterion": "loss", "loss_function": "loss",
    "label_smoothing": "smoothing", "clip": "clip_grad", "grad_clip": "clip_grad", "max_grad_norm": "clip_grad",
    "img_size": "image_size", "input_size": "image_size", "resolution": "image_size", "crop_size": "image_size",
    "test_size": "eval_size", "val_size": "eval_size", "eval_crop_size": "eval_size",
    "auto_augment": "aa", "rand_augment": "aa", "augment": "aa", "flip": "hflip",
    "random_erasing": "reprob", "erasing": "reprob", "repeated_aug": "aug_repeats",
    "drop": "drop_rate", "dropout": "drop_rate", "drop_path": "drop_path_rate", "stochastic_depth": "drop_path_rate",
    "ema": "ema_decay", "model_ema": "ema_decay",
    "amp": "mixed_precision", "precision": "mixed_precision", "dtype": "mixed_precision", "fp16": "mixed_precision",
    "bf16": "mixed_precision", "compile": "torch_compile",
    "gradient_checkpointing": "grad_checkpointing", "activation_checkpointing": "grad_checkpointing",
    "with_cp": "grad_checkpointing", "random_seed": "seed", "classes": "num_classes",
    "arch": "model", "architecture": "model", "backbone": "model", "network": "model", "model_name": "model",
    "data": "dataset", "data_dir": "dataset", "data_path": "dataset", "dataset_name": "dataset",
    "val_split": "eval_split", "method": "mixer", "mixing": "mixer", "augmentation": "mixer", "aug": "mixer",
    "checkpoint": "pretrained", "weights": "pretrained", "init_checkpoint": "pretrained",
    "focal_loss_gamma": "focal_gamma", "gradual_unfreezing": "unfreeze_epochs",
    "teacher": "distill_from", "teacher_model": "distill_from", "kd_model_name": "distill_from",
    "distillation_type": "distill", "distillation_alpha": "distill_alpha", "distillation_tau": "distill_tau",
    "temperature": "distill_tau", "kd_temperature": "distill_tau",
    # options of a run
    "config": "recipe", "setting": "recipe", "output": "output_dir", "out": "output_dir", "run_dir": "output_dir",
    "work_dir": "output_dir", "resume": "resume_from_checkpoint", "continue": "resume_from_checkpoint",
    "workers": "dataloader_num_workers", "num_workers": "dataloader_num_workers", "logger": "report_to",
    "tracker": "report_to", "log_interval": "logging_steps", "save_steps": "checkpointing_steps",
    "repo": "hub_model_id", "repo_id": "hub_model_id", "private": "hub_private_repo", "token": "hub_token",
    # mixers
    "none": "vanilla", "baseline": "vanilla", "plain": "vanilla", "no_mix": "vanilla", "no_mixup": "vanilla",
    "erm": "vanilla", "input_mixup": "mixup", "mixup_cutmix": "deit", "cutmix_mixup": "deit", "cut_paste": "cutmix",
    "mixup_and_cutmix": "deit", "co_mix": "comixup", "align_mixup": "alignmix",
    "hard_patchup": "patchup",
}  # fmt: skip

# How models, data sets and epochs are written, and what a setting's name has for them.
SPELLINGS = (
    (r"resnext_?(\d+)(_?32x4d)?", r"rx\1"),
    (r"resnet_?(\d+)", r"r\1"),
    (r"(?:deit|vit)_?(t|s|b)(?:iny|mall|ase)", r"deit_\1"),
    (r"(swin|pvt|convnext|moganet)_?tiny", r"\1_t"),
    (r"pvt_?small", "pvt_s"),
    (r"(wide_?resnet|wrn)_?28_?8", "wrn288"),
    (r"inat(?:uralist)?_?(?:20)?(17|18)", r"inat\1"),
    (r"(caltech_?)?cub_?200(_?2011)?", "cub"),
    (r"(fgvc_?)?aircrafts?", "aircraft"),
    (r"places_?205", "places"),
    (r"efficient_?net(_?b0)?", "effb0"),
    (r"mobile_?net(_?v?2)?", "mbv2"),
    (r"tiny_?imagenet(_?200)?", "tiny"),
    (r"^(imagenet|ilsvrc|in)(_?1k)?$", "r50_100e"),
    (r"_?(imagenet|ilsvrc|in)(_?1k)?(?=_|$)", ""),
    (r"cifar_?10(0?)", r"cifar10\1"),
    (r"(\d+)_?(epochs?|ep)", r"\1e"),
    (r"groceries|demo", "quickstart"),
)


def letters(name: str) -> str:
    """A name without case, hyphens and the like."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


BY_MEANING = {letters(word): meant for word, meant in MEANINGS.items()}


def meant_by(name: str, known: Iterable[str]) -> str | None:
    """The valid name that a word means: a synonym, another spelling, or the only name that begins with it."""
    known, word = list(known), letters(name)
    if BY_MEANING.get(word) in known:
        return BY_MEANING[word]
    starts = [k for k in known if len(word) > 2 and letters(k).startswith(word)]
    return next((k for k in known if word and letters(k) == word), starts[0] if len(starts) == 1 else None)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the valid name that is meant or spelled most alike, or all of them."""
    known = list(known)
    if meant := meant_by(name, known):
        return f"did you mean {meant!r}?"
    text = nearest_by_letters(name, known)
    return text if len(known) < 100 or len(text) < 200 else f"none of the {len(known)} valid names is similar"


def setting_and_mixer(name: str, mixers: Collection[str]) -> tuple[str, str | None]:
    """A name that is no recipe's, cut before the longest end that is or means a mixer: ``resnet50``, ``cutmix``."""
    parts = re.split(r"[_\-. ]", name)
    for at in range(1, len(parts)):
        end = "_".join(parts[at:])
        if mixer := end if end in mixers else meant_by(end, mixers):
            return "_".join(parts[:at]), mixer
    return name, None


def meant_setting(name: str, settings: Mapping[str, Collection[str]]) -> str | None:
    """The setting that a name tells by model, data set or epochs. ``settings``: the words of each setting."""
    written = re.sub(r"[-. /]+", "_", name.lower())
    for pattern, replacement in SPELLINGS:
        written = re.sub(pattern, replacement, written)
    words = [word for word in written.split("_") if word]

    def fits(setting: str) -> tuple[float, int, bool]:
        own = settings[setting]
        found = sum(1.0 if w in own else 0.5 if len(w) > 2 and any(o.startswith(w) for o in own) else 0 for w in words)
        parts = setting.split("_")
        return found, -len({*parts} - {*words}), parts[0] in words

    in_order = sorted(settings, key=lambda name: re.sub(r"\d+", lambda n: n[0].zfill(4), name))  # 200 before 1200
    best = max(in_order, key=fits, default=None)
    return best if best is not None and fits(best)[0] else None
