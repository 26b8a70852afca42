"""Keras 3 on the torch backend: ``train_step`` mixes, then Keras's own goes on. Needs ``pip install keras``."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
from keras import layers

from mixers import build
from mixers.adapters import mix_batch

mixer = build("cutmix")


class MixModel(keras.Model):
    def train_step(self, data):
        x, y = data
        step = int(self.optimizer.iterations)  # counts updates, also with gradient_accumulation_steps
        x = x.movedim(-1, 1)  # mixers want the channels first; no pixel is moved
        mixed, target, _ = mix_batch(mixer, x, y, label_smoothing=0.1, seed=0, step=step)
        return super().train_step((mixed.movedim(1, -1), target))


inputs = keras.Input((64, 64, 3))
hidden = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3, strides=2, activation="relu")(inputs))
model = MixModel(inputs, layers.Dense(10)(hidden))
model.compile(
    optimizer=keras.optimizers.SGD(0.01),
    loss=keras.losses.CategoricalCrossentropy(from_logits=True),  # the sparse one takes no mixed targets
    metrics=["accuracy"],
)
images, labels = torch.randn(24, 64, 64, 3), torch.eye(10)[torch.randint(10, (24,))]
history = model.fit(images, labels, batch_size=8, epochs=2, validation_data=(images, labels), verbose=0)
loss = history.history["loss"][-1]
