"""What the training job calls: backbones, the update, optimisation, evaluation, checkpoints, launching, export."""
