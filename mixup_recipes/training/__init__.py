"""What the training job calls: backbones, losses, optimisation, evaluation, checkpoints, launching."""
