"""Probes of what a subject does to a batch."""

import torch
from torch import Tensor

from .bench import Bench, Finding, entry, four, noise, sources


@entry("labels it takes")
def labels_taken(bench: Bench) -> Finding:
    return Finding(None, " and ".join(bench.forms))


@entry("kind of mix")
def kind(bench: Bench) -> Finding:
    """What it does to the pixels."""
    return Finding(None, " or ".join(sorted(bench.kinds)) or "none")


@entry("pixel share = label share")
def same_shares(bench: Bench) -> Finding:
    """Each source has the same share of an image and of its label."""
    off, hidden = 0.0, 0
    for mixed, target in bench.calls(four(), 200):
        pixels, labels = sources(mixed).mean((2, 3)), target[:, :4]
        if bench.subject.is_mixer and torch.equal(mixed, four()) and (labels - torch.eye(4)).abs().max() > 1e-3:
            hidden += 1  # a feature is mixed instead of the images: the checks of the contract see to that
        else:
            off = max(off, largest(pixels - labels))
    return Finding(off < 1e-3, f"off by {off:.1g}" + f", {hidden} of 200 batches mixed in the network" * (hidden > 0))


def largest(differences: Tensor) -> float:
    """The largest magnitude; what is not a number is infinitely far off."""
    return differences.abs().nan_to_num(nan=float("inf")).max().item()


@entry("targets are distributions")
def distributions(bench: Bench) -> Finding:
    """Targets lie in [0, 1] and sum to 1."""
    low, off = 0.0, 0.0
    for _, target in bench.calls(noise(), 50):
        low = min(low, -largest(target.clamp(max=0)), -largest((target - 1).clamp(min=0)))
        off = max(off, largest(target.sum(1) - 1))
    return Finding(low > -1e-5 and off < 1e-4, f"off by {off:.1g}" if low > -1e-5 else f"outside by {-low:.2g}")
