"""Signals (B, C, L), such as sound or an ECG, are images of one row; CutMix along them is a mixer of a few lines."""

import torch

from mixers import Mixer, Mixup, Switch
from mixers.adapters import cross_entropy, mix_batch


class SegmentMix(Mixer):
    """A segment of ``1-lam`` of the length comes from the partner, with ``lam ~ Beta(alpha, alpha)``.

    A box of CutMix has a height, and one row has none to give: on signals CutMix would mix nothing.
    """

    def __init__(self, alpha: float = 1.0):
        super().__init__()
        self.alpha = alpha

    def plan(self, x, y, rng, *look):
        length = x.shape[-1]
        size = round(length * (1 - rng.beta(self.alpha, self.alpha)))
        start = int(rng.integers(length - size + 1))
        mask = torch.ones(len(x), 1, 1, length, device=x.device)
        mask[..., start : start + size] = 0
        return {"index": torch.from_numpy(rng.permutation(len(x))).to(x.device), "mask": mask}


model = torch.nn.Sequential(
    torch.nn.Conv1d(2, 8, 9, stride=4),
    torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool1d(1),
    torch.nn.Flatten(),
    torch.nn.Linear(8, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
mixer = Switch([Mixup(0.2), SegmentMix(1.0)])

for step in range(4):
    signals, labels = torch.randn(8, 2, 400), torch.randint(10, (8,))
    mixed, target, _ = mix_batch(mixer, signals[:, :, None], labels, num_classes=10, seed=0, step=step)
    loss = cross_entropy(model(mixed[:, :, 0]), target).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
