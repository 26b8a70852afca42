"""Updates by OpenMixup's own step: its classifier for mixed images, its heads and its losses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from originals import Checkout
from originals.pairs import CLASSIFIERS, HEADS, LOSSES, Original
from originals.same_draws import CLASSES, Again, loader, on_cpu, sgd, space

STEP = (f"{CLASSIFIERS}/mixup_classification.py", f"{LOSSES}/cross_entropy_loss.py")
HARD, SOFT = f"{HEADS}/cls_head.py", f"{HEADS}/cls_mixup_head.py"


class Listed(nn.Module):
    """A network as OpenMixup's classifier has it: a list of features, here of the logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> list[Tensor]:
        """The logits, in a list."""
        return [self.inner(x)]


def head(original: Checkout, kind: str = "ClsHead", **options: Any) -> Any:
    """One of OpenMixup's heads, without a layer of its own: it is given logits. ``options`` as configurations say."""
    options = {"loss": {"type": "CrossEntropyLoss"}} | options
    made = Original(original).heads().given[kind](in_channels=1, num_classes=CLASSES, **options)
    made.fc = nn.Identity()
    return made


def classifier(original: Checkout, mode: str, alpha: float, backbone: nn.Module, head: nn.Module, **own: Any) -> Any:
    """What stands for OpenMixup's classifier in its own step: the fields that this step reads.

    ``mode``: the name of the method there, ``own``: its function under this name, and further arguments of it.
    """
    file = STEP[0]
    given = {"np": np, "torch": torch, "F": F, "random": space(choices=lambda found, k: found[:k])}
    static = {mode: own.pop("function", None)}
    theirs = space(mix_prob=None, idx_list=[0], mix_mode=[mode], alpha=[alpha], mix_args={mode: own}, mix_repeat=1)
    vars(theirs).update(static_mode=static, save=False, debug_mode=True, backbone=backbone, head=head)
    step = original.method(file, "MixUpClassification", "forward_mix", **given)
    theirs.step = lambda x, labels: step(theirs, x, labels)[0]["loss"]
    return theirs


def run(theirs: Any, again: Again, size: int = 64, **torch_functions: Callable[..., Any]) -> None:
    """20 updates; its partners are those of ours, however often it draws them again."""
    optimizer = sgd(nn.ModuleList([theirs.backbone, theirs.head]))
    for x, labels in loader(20, size):
        index = torch.as_tensor(again.permutation(len(x)))
        functions: dict[str, Any] = {"randperm": lambda *_, index=index, **__: index} | torch_functions
        with on_cpu(again, **functions):
            loss = theirs.step(x, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
