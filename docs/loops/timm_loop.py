"""The loop of timm's train.py: ``BatchMixer`` in the place of ``timm.data.Mixup``, with gradient accumulation."""

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2

from mixers import build
from mixers.adapters import BatchMixer

model = timm.create_model("test_resnet", num_classes=10)
optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, momentum=0.9)
loader = [(torch.randn(size, 3, 64, 64), torch.randint(10, (size,))) for size in (8, 8, 8, 7)]
mixup_fn = BatchMixer(build("rsb"), num_classes=10, label_smoothing=0.1, seed=0)
loss_fn = SoftTargetCrossEntropy()
accum_steps, num_updates = 2, 0

for epoch in range(3):
    if epoch == 2:
        mixup_fn.mixup_enabled = False  # as after --mixup-off-epoch: smoothed targets, nothing mixed
    for batch_idx, (input, target) in enumerate(loader):
        mixup_fn.step = num_updates  # a loop that does not accumulate can leave this out: the object counts its calls
        input, target = mixup_fn(input, target)
        loss = loss_fn(model(input), target) / accum_steps
        loss.backward()
        if (batch_idx + 1) % accum_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
            num_updates += 1
