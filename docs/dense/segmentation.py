"""Segmentation: the label map of a mixed image is mixed by the same plan."""

import torch
import torch.nn.functional as F

from mixers import CutMix, Mixup, Switch
from mixers.adapters import mix_batch
from mixers.dense import mix_like

classes = 4
model = torch.nn.Conv2d(3, classes, 3, padding=1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
mixer = Switch([CutMix(1.0), Mixup(0.2)])
images, maps = torch.randn(8, 3, 32, 48), torch.randint(classes, (8, 32, 48))
unused = torch.zeros(8, 1)  # labels of whole images, which there are none of

for step in range(6):
    mixed, _, plan = mix_batch(mixer, images, unused, seed=0, step=step)
    # One-hot floats follow any mask: CutMix's gives each pixel one class, Mixup's a share of two.
    target = mix_like(plan, F.one_hot(maps, classes).movedim(-1, 1).float())
    loss = F.cross_entropy(model(mixed), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# Where every mixer in use cuts and none blends, class numbers are enough, here for a network that predicts at a quarter
# of the size, with 255 for the pixels that count for nothing.
small = maps[:, ::4, ::4].clone()
small[:, 0] = 255
mixed, _, plan = mix_batch(CutMix(), images, unused, seed=0, step=step + 1)
loss = F.cross_entropy(F.avg_pool2d(model(mixed), 4), mix_like(plan, small), ignore_index=255)
