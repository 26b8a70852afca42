"""Detection: the boxes of a mixed image are those of both images, cut down to what shows of them."""

import torch
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from mixers import build
from mixers.adapters import mix_batch
from mixers.dense import mix_boxes

backbone = torch.nn.Conv2d(3, 32, 8, stride=8)  # stands for a network
backbone.out_channels = 32
model = FCOS(backbone, 3, min_size=64, max_size=64, anchor_generator=AnchorGenerator(((8,),), ((1.0,),)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
mixer = build("cutmix")
images = torch.rand(4, 3, 64, 64)  # detectors of torchvision normalise by themselves
boxes = [torch.tensor([[4.0, 4.0, 30.0, 30.0], [20.0, 10.0, 60.0, 50.0]])] * 4  # left, top, right, bottom
labels = [torch.tensor([1, 2])] * 4
unused = torch.zeros(4, 1)  # labels of whole images, which there are none of

for step in range(2):
    mixed, _, plan = mix_batch(mixer, images, unused, seed=0, step=step)
    # This loss weights no box, so an object counts wholly or not at all: half of it has to show. Under Mixup every box
    # of both images stays, and a loss that weights boxes takes ``shares``.
    objects = mix_boxes(plan, boxes, labels, least=0.5)
    losses = model(list(mixed), [{"boxes": found.boxes, "labels": found.labels} for found in objects])
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
