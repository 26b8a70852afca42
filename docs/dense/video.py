"""Video: frames are channels for a mixer, so that all frames of a clip have one mask and one partner."""

import torch

from mixers import build
from mixers.adapters import cross_entropy, mix_batch
from mixers.dense import mix_like

model = torch.nn.Sequential(
    torch.nn.Conv3d(3, 8, 3, stride=2),
    torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool3d(1),
    torch.nn.Flatten(),
    torch.nn.Linear(8, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
mixer = build("cutmix")

for step in range(3):
    clips, labels = torch.randn(4, 5, 3, 32, 32), torch.randint(10, (4,))  # (B, T, C, H, W)
    mixed, target, _ = mix_batch(mixer, clips.flatten(1, 2), labels, num_classes=10, seed=0, step=step)
    mixed = mixed.unflatten(1, clips.shape[1:3])  # no pixel was moved
    loss = cross_entropy(model(mixed.movedim(2, 1)), target).mean()  # a Conv3d wants (B, C, T, H, W)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# A mixer that looks at colours plans on one frame, and the others follow.
clips, labels = torch.randn(4, 5, 3, 32, 32), torch.randint(10, (4,))
first, target, plan = mix_batch(build("saliencymix"), clips[:, 0], labels, num_classes=10, seed=0, step=step + 1)
mixed = mix_like(plan, clips)
