"""Every mixer beside its original code: the record model_cards/parity.json and the page docs/parity.md.

    python benchmarks/parity.py --originals FOLDER

``FOLDER`` holds checkouts of the repositories that ``--list`` names, each under the repository's own name; nothing of
them is kept here. With ``--only NAME...`` the rows of these are made anew and the others stay. ``--page`` only renders
the page from the record. The graph cuts of puzzlemix and comixup, and cmixup, need the extra ``oracle``.
"""

# ruff: noqa: E402
import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy
import scipy
import timm
import torch
from originals import (
    COMPARISONS,
    Checkout,
    Comparison,
    blending,
    by_labels,
    cutting,
    cutting_shapes,
    decoupling,
    features,
    hidden,
    learned,
    learned_adversary,
    puzzles,
    puzzles_mosaics,
    saliency,
    saliency_guided,
    semantic,
    tokens,
    tokens_inside,
    tokens_openmixup,
    training,
    views,
)

from mixup_recipes.pages.parity import RECORD, page, recorded

PAGE = ROOT / "docs/parity.md"
FILES = (
    by_labels,
    blending,
    cutting,
    cutting_shapes,
    decoupling,
    features,
    hidden,
    learned,
    learned_adversary,
    puzzles,
    puzzles_mosaics,
    saliency,
    saliency_guided,
    semantic,
    tokens,
    tokens_inside,
    tokens_openmixup,
    training,
    views,
)
"""They fill ``COMPARISONS``."""


def main() -> None:
    """Compare, write the record, render the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    where = "has the checkouts that --list names, each in a folder of the repository's own name"
    parser.add_argument("--originals", type=Path, metavar="FOLDER", help=where)
    names = sorted({c.subject for c in COMPARISONS})
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help="these rows anew, the others stay")
    parser.add_argument("--list", action="store_true", help="the repositories that are compared with")
    parser.add_argument("--page", action="store_true", help="render the page from the record that is there")
    args = parser.parse_args()
    if args.list:
        last = {r["repository"]: r["commit"] for r in recorded()}
        for name in sorted({c.repository for c in COMPARISONS}):
            print(f"https://github.com/{name} {last.get(name, '')}")
        return
    if not args.page:
        if not args.originals:
            parser.error(f"--originals FOLDER is needed, which {where}")
        chosen = [c for c in COMPARISONS if not args.only or c.subject in args.only]
        lacking = {c.repository for c in chosen if not (args.originals / c.repository.split("/")[1]).is_dir()}
        if lacking:
            parser.error(f"{args.originals} lacks a checkout of {', '.join(sorted(lacking))}")
        torch.set_num_threads(1)
        rows = [row(comparison, args.originals) for comparison in chosen]
        kept = recorded() if args.only else []
        order = [c.subject for c in COMPARISONS]
        rows += [r for r in kept if r["subject"] in {*order} - {*args.only}]
        rows.sort(key=lambda r: (order.index(r["subject"]), r["repository"]))
        RECORD.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    PAGE.write_text(page(recorded()))


def row(comparison: Comparison, originals: Path) -> dict[str, Any]:
    """What one comparison found, and when, with what."""
    checkout = Checkout(originals / comparison.repository.split("/")[1])
    checkout.check(*comparison.files)
    gaps = [gap._asdict() for gap in comparison.run(checkout)]
    for gap in gaps:
        print(f"{comparison.subject:14} {gap['gap']:<10.3g} {gap['unit']:9} {gap['compared']}", flush=True)
    return {
        "subject": comparison.subject,
        "repository": comparison.repository,
        "commit": checkout.commit,
        "files": comparison.files,
        "held": comparison.held,
        "gaps": gaps,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, 1 thread" + ("" if avx512() else ", no AVX-512"),
        "versions": {m.__name__: m.__version__ for m in (torch, numpy, scipy, timm)},
    }


def avx512() -> bool:
    """Whether this CPU has AVX-512, with which sums are rounded differently."""
    return os.path.exists("/proc/cpuinfo") and "avx512" in Path("/proc/cpuinfo").read_text()


if __name__ == "__main__":
    main()
