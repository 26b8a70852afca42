"""MMPretrain: a batch augmentation of its data preprocessor. Needs ``pip install mmpretrain mmcv-lite``."""

import torch
from mmengine.optim import OptimWrapper
from mmpretrain.registry import BATCH_AUGMENTS, MODELS
from mmpretrain.structures import DataSample

from mixers import build
from mixers.adapters import BatchMixer


@BATCH_AUGMENTS.register_module()
class MixupRecipes(BatchMixer):
    """In a configuration file: ``dict(type="MixupRecipes", mixer="cutmix", num_classes=10, alpha=1.0)``."""

    def __init__(self, mixer: str, num_classes: int, label_smoothing: float = 0.0, seed: int = 0, **args):
        super().__init__(build(mixer, **args), num_classes, label_smoothing, seed)

    def __call__(self, inputs, score):
        return super().__call__(inputs, score.float())  # the preprocessor's one-hot labels are integers


augment = dict(type="MixupRecipes", mixer="cutmix", num_classes=10, label_smoothing=0.1)
model = MODELS.build(
    dict(
        type="TimmClassifier",
        model_name="test_resnet",
        num_classes=10,
        loss=dict(type="CrossEntropyLoss", use_soft=True),
        data_preprocessor=dict(
            mean=[0.0] * 3,
            std=[1.0] * 3,
            num_classes=10,
            batch_augments=dict(augments=augment),
        ),
    )
)
optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
for _ in range(3):
    samples = [DataSample().set_gt_label(label) for label in torch.randint(10, (8,))]
    logs = model.train_step(dict(inputs=list(torch.randn(8, 3, 64, 64)), data_samples=samples), optimizer)
    loss = logs["loss"]
