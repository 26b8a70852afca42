"""The loop of torchvision's references/classification/train.py, where a ``collate_fn`` mixes: ``MixCollate``."""

import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import get_model

from mixers import build
from mixers.adapters import BatchMixer, MixCollate

model = get_model("mobilenet_v3_small", weights=None, num_classes=10)
dataset = TensorDataset(torch.randn(24, 3, 64, 64), torch.randint(10, (24,)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
# linear in the target, so smoothing after mixing is the same
criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
mixup_cutmix = MixCollate(BatchMixer(build("deit"), num_classes=10, seed=0))


def train_one_epoch(data_loader: DataLoader) -> None:
    model.train()
    for image, target in data_loader:
        loss = criterion(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def evaluate(data_loader: DataLoader) -> float:
    model.eval()
    with torch.inference_mode():
        losses = [criterion(model(image), target).item() for image, target in data_loader]
    return sum(losses) / len(losses)


data_loader = DataLoader(dataset, batch_size=8, shuffle=True, drop_last=True, collate_fn=mixup_cutmix)
data_loader_test = DataLoader(dataset, batch_size=8)
for epoch in range(2):
    mixup_cutmix.start(epoch * len(data_loader))  # the one line that is new in main()
    train_one_epoch(data_loader)
    loss = evaluate(data_loader_test)
