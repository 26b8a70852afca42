"""What ``train_mixup.py`` calls: data, backbones, losses, optimiser, evaluation, checkpoints, the run folder."""
