"""Composer: an algorithm mixes each microbatch before the forward. Needs ``pip install mosaicml``."""

import timm
import torch
from composer import Trainer
from composer.core import Algorithm, Event
from composer.models import ComposerClassifier
from torch.utils.data import DataLoader, TensorDataset

from mixers import Mixer, build
from mixers.adapters import mix_batch


class Mix(Algorithm):
    """The microbatches of one update share its draws."""

    def __init__(self, mixer: Mixer, num_classes: int, label_smoothing: float = 0.0, seed: int = 0):
        self.mixer, self.seed = mixer, seed
        self.labels = {"num_classes": num_classes, "label_smoothing": label_smoothing}

    def match(self, event, state):
        return event == Event.BEFORE_FORWARD  # in training only

    def apply(self, event, state, logger):
        step = int(state.timestamp.batch)  # updates until now
        *state.batch, _ = mix_batch(self.mixer, *state.batch, **self.labels, seed=self.seed, step=step)


model = ComposerClassifier(timm.create_model("test_resnet", num_classes=10), num_classes=10)
loader = DataLoader(TensorDataset(torch.randn(24, 3, 64, 64), torch.randint(10, (24,))), batch_size=8)
trainer = Trainer(
    model=model,
    train_dataloader=loader,
    eval_dataloader=loader,
    optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
    algorithms=Mix(build("cutmix"), num_classes=10, label_smoothing=0.1),
    device_train_microbatch_size=4,
    max_duration="2ep",
    device="cpu",
    progress_bar=False,
)
trainer.fit()
loss = trainer.state.loss
