"""Two processes train the same with copies of a model and with pieces of it: the cases, and what each process does."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from mixers import MIXERS
from mixup_recipes.recipe import Recipe
from mixup_recipes.training import launch, optimisation, sharding
from mixup_recipes.training.backbones import create_model
from mixup_recipes.training.update import Batch, new_learner, new_step, one_hot, train_update

ATTENTION = {
    "transmix",
    "tokenmix",
    "smmix",
    "mixpro",
    "tlalign",
    "mixtoken",
    "tokenmixup",
}  # of which a ResNet has none
RESNET, VIT = "test_resnet", "test_vit"
Fields = dict[str, Any]
OPTIONS: dict[str, tuple[str, str, Fields]] = {
    "frozen": (RESNET, "cutmix", {"freeze": "layer3"}),
    "frozen body": (VIT, "cutmix", {"freeze": "body"}),
    "layer decay": (VIT, "mixup", {"layer_decay": 0.7}),
    "checkpointed": (RESNET, "puzzlemix", {"grad_checkpointing": True}),
    "checkpointed transformer": (VIT, "transmix", {"grad_checkpointing": True}),
    "sometimes": (RESNET, "samix", {"mix_prob": 0.5}),
    "grafting by gradient": (RESNET, "grafting", {"mixer_args": {"grafting": {"source": "gradient"}}}),
    "guidedmix by gradient": (VIT, "guidedmix", {"mixer_args": {"guidedmix": {"source": "gradient"}}}),
    "puzzlemix clean": (VIT, "puzzlemix", {"mixer_args": {"puzzlemix": {"clean_lam": 0.5}}}),
    "comixup mixed alone": (RESNET, "comixup", {"mixer_args": {"comixup": {"clean_lam": 0.0}}}),
    "tokens of all samples": (VIT, "tokenmixup", {"mixer_args": {"tokenmixup": {"tau": 1.0, "rho": 0.0, "kappa": 2}}}),
    "compiled": (RESNET, "puzzlemix", {"torch_compile": True}),
    "decoupled look": (RESNET, "decouplemix", {"mixer_args": {"decouplemix": {"base": "puzzlemix"}}}),
}
OPTIONS |= {opt: (VIT, "mixup", {"opt": opt}) for opt in sharding.OPTIMIZERS}
ALL = OPTIONS | {f"{VIT} {mixer}": (VIT, mixer, Fields()) for mixer in MIXERS}
ALL |= {f"{RESNET} {mixer}": (RESNET, mixer, Fields()) for mixer in MIXERS if mixer not in ATTENTION}
QUICK = (f"{RESNET} comixup", f"{RESNET} snapmix", f"{VIT} automix")
GROUPS = {"quick": QUICK, "options": tuple(OPTIONS)}
GROUPS |= {model: tuple(name for name in ALL if name.startswith(model)) for model in (RESNET, VIT)}


def recipe(model: str, mixer: str, **fields: Any) -> Recipe:
    own: dict[str, Any] = {"dataset": "none", "model": model, "mixer": mixer, "mixer_args": {mixer: {}}}
    own |= {"model_args": {"img_size": 64, "patch_size": 8} if model == VIT else {}, "num_classes": 10}
    own |= {"image_size": 64, "eval_size": 64, "eval_resize": 64, "smoothing": 0.1, "opt": "momentum", "lr": 0.05}
    return Recipe(**own | {"weight_decay": 0.02, "clip_grad": 1.0, "ema_decay": 0.9} | fields)


def trained(r: Recipe, accelerator: Any, shard: bool) -> dict[str, np.ndarray]:
    """Loss, weights, averages, statistics and the optimiser's state after two updates of two micro-batches each.

    In float64, so that what is no rounding shows.
    """
    step = launch.on_device(new_step(create_model(r), r).double(), r, accelerator)
    if r.torch_compile and shard:
        launch.compile_step(step)
    learner = new_learner(step, r, accelerator, shard)
    order: Any = SimpleNamespace(recipe=r, accumulation=2, updates=4, updates_per_epoch=2)
    sums: dict[str, torch.Tensor] = {}
    for update in range(2):
        batches = []
        for micro in range(2):
            torch.manual_seed(8 * update + 2 * micro + accelerator.process_index)
            x, y = torch.randn(4, 3, 64, 64).double(), one_hot(torch.randint(10, (4,)), r).double()
            batches.append(Batch(x, y, np.random.default_rng((0, update)), torch.zeros(4)))
        optimisation.set_learning_rates(learner.optimizer, r, update, 2)
        train_update(learner, iter(batches), order, update, sums, accelerator)
    states = {name: sharding.whole(module.state_dict()) for name, module in learner.modules.items()}
    for number, values in sharding.whole(learner.optimizer.state_dict())["state"].items():
        states[f"optimizer {number}"] = values
    tensors = {f"{part} {k}": v for part, values in states.items() for k, v in values.items() if torch.is_tensor(v)}
    return {k: v.numpy() for k, v in (tensors | {f"sums {k}": v for k, v in sums.items()}).items()}


def compare(group: str, out: str) -> None:
    """As one of two processes: write in what that which copies train differs from what pieces train."""
    accelerator = launch.accelerator(recipe(RESNET, "mixup"), Path("."))
    wrong: dict[str, list[str]] = {}
    for case in GROUPS[group]:
        model, mixer, fields = ALL[case]
        copies, pieces = (trained(recipe(model, mixer, **fields), accelerator, shard) for shard in (False, True))
        found = sorted(copies.keys() ^ pieces.keys())
        for name in copies.keys() & pieces.keys():
            size = np.abs(copies[name]).max(initial=1e-3)
            if not np.allclose(copies[name], pieces[name], rtol=0, atol=1e-6 * size):
                found.append(name)
        wrong |= {case: found[:5]} if found or len(copies) < 50 else {}
    Path(f"{out}-{accelerator.process_index}").write_text(json.dumps(wrong))
