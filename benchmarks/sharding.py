"""What each process holds of a model in training, counted after one update: parameters, gradients, optimiser, average.

    torchrun --nproc_per_node 2 benchmarks/sharding.py --model vit_base_patch16_224
    torchrun --nproc_per_node 2 benchmarks/sharding.py --model vit_base_patch16_224 --shard

Bytes of the tensors that a process has between its updates, largest of all processes; activations come on top, and with
``--shard``, while it runs, the largest block whole. One image per process.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from mixup_recipes.recipe import Recipe
from mixup_recipes.training import launch, sharding
from mixup_recipes.training.backbones import create_model
from mixup_recipes.training.update import new_learner, new_step, one_hot


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes in this process."""
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


def main() -> None:
    """Print one row of a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--shard", action="store_true")
    args = parser.parse_args()
    recipe = Recipe(
        dataset="none", model=args.model, mixer="cutmix", mixer_args={"cutmix": {}}, opt="adamw", ema_decay=0.999,
        num_classes=1000, image_size=args.image_size,
    )  # fmt: skip
    accelerator = launch.accelerator(recipe, Path("."), shard=args.shard)
    step = launch.on_device(new_step(create_model(recipe), recipe), recipe, accelerator)
    learner = new_learner(step, recipe, accelerator, args.shard)
    x = torch.randn(1, 3, args.image_size, args.image_size, device=accelerator.device)
    y = one_hot(torch.zeros(1, dtype=torch.long, device=accelerator.device), recipe)
    accelerator.backward(learner.wrapped(x, y, np.random.default_rng(0)).loss)
    gradients = [p.grad for p in step.parameters() if p.grad is not None]
    learner.optimizer.step()
    assert learner.ema is not None
    counts = {
        "parameters": held(step.parameters()),
        "gradients": held(gradients),
        "optimiser": held(v for s in learner.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)),
        "average": held(learner.ema.module.parameters()),
    }
    largest = {name: max(gather_object([count])) for name, count in counts.items()}
    blocks = (sum(p.numel() * p.element_size() for p in block.parameters()) for block in sharding.blocks(step.model))
    accelerator.print(
        f"{args.model}, {accelerator.num_processes} processes, {'sharded' if args.shard else 'copies'}: "
        + ", ".join(f"{name} {count / 1e6:.0f} MB" for name, count in largest.items())
        + f", together {sum(largest.values()) / 1e6:.0f} MB; largest block {max(blocks) / 1e6:.0f} MB"
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
