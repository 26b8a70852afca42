"""Top-1 and top-5 accuracy from class ids. ``formula`` is plain numpy, ``topk_accuracy`` the metric."""
