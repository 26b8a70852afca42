"""fastai: a callback hands each training batch through a ``BatchMixer``. Needs ``pip install fastai``."""

import timm
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from torch.utils.data import TensorDataset

from mixers import build
from mixers.adapters import BatchMixer


class Mix(Callback):
    """Behind what normalises, and in training only."""

    order, run_valid = 90, False

    def __init__(self, mixup_fn: BatchMixer):
        self.mixup_fn = mixup_fn

    def before_batch(self):
        x, labels = (torch.Tensor.as_subclass(part, torch.Tensor) for part in (self.x, self.y))
        mixed, target = self.mixup_fn(x, labels)
        self.learn.xb, self.learn.yb = (mixed,), (target,)


dataset = TensorDataset(torch.randn(24, 3, 64, 64), torch.randint(10, (24,)))
learn = Learner(
    DataLoaders.from_dsets(dataset, dataset, bs=8, num_workers=0, device="cpu"),
    timm.create_model("test_resnet", num_classes=10),
    loss_func=torch.nn.CrossEntropyLoss(label_smoothing=0.1),  # CrossEntropyLossFlat flattens dense targets
    metrics=accuracy,
    cbs=Mix(BatchMixer(build("cutmix"), num_classes=10, seed=0)),
)
with learn.no_logging():
    learn.fit(2, lr=0.01)
loss = learn.recorder.losses[-1]
