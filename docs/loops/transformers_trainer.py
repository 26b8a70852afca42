"""The Trainer of transformers, accumulating gradients: the images of an update count the same and share its draws."""

import torch
from transformers import AutoModelForImageClassification, TimmWrapperConfig, Trainer, TrainingArguments

from mixers import build
from mixers.adapters import TrainerMixin


class MixTrainer(TrainerMixin, Trainer):
    pass


config = TimmWrapperConfig(architecture="test_resnet", num_labels=10)
images, labels = torch.randn(28, 3, 64, 64), torch.randint(10, (28,)).tolist()
photos = [{"pixel_values": x, "label": y} for x, y in zip(images, labels, strict=True)]

trainer = MixTrainer(
    model=AutoModelForImageClassification.from_config(config),
    args=TrainingArguments(
        "runs/trainer",
        num_train_epochs=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        label_smoothing_factor=0.1,
        eval_strategy="epoch",
        seed=0,
    ),
    train_dataset=photos,
    eval_dataset=photos,
    mixer=build("cutmix"),
)
loss = trainer.train().training_loss
