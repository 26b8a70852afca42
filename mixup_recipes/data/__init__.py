"""From a name to batches: datasets, their identity, the order of images, pictures."""
