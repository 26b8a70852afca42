"""A loop of your own: ``mix_batch`` mixes, the rest is as without it."""

import timm
import torch

from mixers import build
from mixers.adapters import cross_entropy, mix_batch

model = timm.create_model("test_resnet", num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
mixer = build("cutmix", alpha=1.0)
loader = [(torch.randn(8, 3, 64, 64), torch.randint(10, (8,))) for _ in range(3)]

for step, (x, labels) in enumerate(loader):
    mixed, target, plan = mix_batch(mixer, x, labels, num_classes=10, label_smoothing=0.1, seed=0, step=step)
    loss = cross_entropy(model(mixed), target).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
