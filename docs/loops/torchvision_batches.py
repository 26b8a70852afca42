"""torchvision's transforms v2 on batches: ``BatchMixer`` is the last one, in the place of ``v2.MixUp``."""

import timm
import torch
from torchvision.transforms import v2

from mixers import build
from mixers.adapters import BatchMixer, cross_entropy

model = timm.create_model("test_resnet", num_classes=10)
transform = v2.Compose(
    [
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        BatchMixer(build("mixup", alpha=0.2), num_classes=10, seed=0),
    ]
)

for _ in range(2):
    pixels, labels = torch.randint(256, (8, 3, 64, 64), dtype=torch.uint8), torch.randint(10, (8,))
    images, target = transform(pixels, labels)
    loss = cross_entropy(model(images), target).mean()
    loss.backward()
