"""Lightning: ``LightningMixin`` is the training step, for any mixer; what that owns is trained and saved."""

import lightning
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from mixers import build
from mixers.adapters import LightningMixin


class Classifier(LightningMixin, lightning.LightningModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def validation_step(self, batch, batch_idx):
        x, labels = batch
        self.log("accuracy", (self(x).argmax(1) == labels).float().mean())


model = timm.create_model("test_resnet", num_classes=10)
classifier = Classifier(model, build("deit"), num_classes=10, label_smoothing=0.1, seed=0)
loader = DataLoader(TensorDataset(torch.randn(24, 3, 64, 64), torch.randint(10, (24,))), batch_size=8)
trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(classifier, loader, loader)
loss = trainer.callback_metrics["train_loss"]
