"""What a training job calls: data, augmentation, backbones, losses, optimiser groups, checkpoints, logging."""
