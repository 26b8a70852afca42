"""Regression: values of an image, such as an age or a pose, are float targets, and those are blended by every mixer.

C-Mixup draws partners of near values, so that the blend is the value of an image that there could be.
"""

import timm
import torch
import torch.nn.functional as F

from mixers import build
from mixers.adapters import mix_batch

model = timm.create_model("test_resnet", num_classes=2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
mixer = build("cmixup", bandwidth=0.5)  # in the unit of the values; any other mixer goes here too

for step in range(3):
    images, values = torch.randn(8, 3, 64, 64), torch.randn(8, 2)  # (B, D); one value an image is values[:, None]
    mixed, target, _ = mix_batch(mixer, images, values, seed=0, step=step)  # no label_smoothing: there are no classes
    loss = F.mse_loss(model(mixed), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
