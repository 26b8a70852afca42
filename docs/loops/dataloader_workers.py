"""Mixing in the workers of a DataLoader: a batch has the same plan with any number of them."""

import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from mixers import build
from mixers.adapters import BatchMixer, MixCollate, cross_entropy

model = timm.create_model("test_resnet", num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
dataset = TensorDataset(torch.randn(24, 3, 64, 64), torch.randint(10, (24,)))

if __name__ == "__main__":
    collate = MixCollate(BatchMixer(build("cutmix"), num_classes=10, seed=0))
    loader = DataLoader(dataset, batch_size=8, shuffle=True, num_workers=2, collate_fn=collate)
    for epoch in range(2):
        collate.start(epoch * len(loader))
        for x, target in loader:
            loss = cross_entropy(model(x), target).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
