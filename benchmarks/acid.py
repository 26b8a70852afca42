"""Our job beside the training code of a method's authors.

It writes the record model_cards/acid.json and the page docs/acid_measured.md:

    python benchmarks/acid.py --originals FOLDER

``FOLDER`` holds checkouts of the repositories that ``--list`` names, each under the repository's own name; nothing of
them is kept here. Both sides train on a CPU, with the same images, first weights, seeds and epochs. Each finished run
is written into the record at once, and a run that the record has is not repeated. With ``--only NAME...`` these
comparisons alone run. ``--page`` only renders the page. The page says what OpenMixup needs.
"""

# ruff: noqa: E402
import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
import yaml
from acid_originals import SETTING, Acid, Epochs, scores
from acid_originals.openmixup import OPENMIXUP
from acid_originals.scripts import SCRIPTS
from originals import Checkout

from mixup_recipes import files
from mixup_recipes.pages.markdown import markdown_table, shown
from mixup_recipes.resolve import resolve
from mixup_recipes.runs.noise import verdict

RECORD, PAGE = ROOT / "model_cards/acid.json", ROOT / "docs/acid_measured.md"
ACIDS: tuple[Acid, ...] = (*SCRIPTS, *OPENMIXUP)
SIDES = ("original", "ours")
INTRODUCTION = """# Trained beside the original code

This page is for you if you want to know whether a whole training run of this project comes out as one of the authors'
own code. [Parity](parity.md) compares single formulas and steps on the same draws. Here each side draws for itself and
trains from its first update to its last one.

Both sides have the same training images in the same order with the same flips, the same network with the same first
weights, the same seeds, optimiser, learning rates and number of epochs. The same code evaluates both on the 10,000 test
images of CIFAR-10. The loop, the mixing, the loss, the optimiser and the learned parts are the authors' on one side and
ours, by `train_mixup.py`, on the other side. Nothing of the authors' code is kept in this project.

```bash
python benchmarks/acid.py --list              # the repositories to check out, and their commits
python benchmarks/acid.py --originals FOLDER  # all runs that the record does not have yet
```

OpenMixup needs mmcv, addict, yapf and OpenCV besides. It ran with mmcv 1.7.2, addict 2.4.0, yapf 0.43.0 and
opencv-python-headless 5.0.0.93. Building mmcv 1.7.2 takes setuptools below 70. Other packages that OpenMixup imports
are replaced by empty modules where they are missing, because nothing of them runs here.

## Results

The table has the top-1 of each run in percent, one run for each seed. The band is the half width of a 95 % interval
of a difference between two means. It comes from the spread of our seeds and from the number of test images, by the rule
of `mixup_recipes/runs/noise.py`, by which [results](results.md) are judged too. A difference within the band can be
noise.
"""
END = """## What can be concluded

A difference within the band says that these runs show no difference. It does not show that both programs are equal: a
true difference that is smaller than the band would not be seen. The runs are short, and the images and networks are
small, so the numbers say nothing about how good a method is.
"""


def main() -> None:
    """Train what is lacking, write the record, render the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    where = "has the checkouts that --list names, each in a folder of the repository's own name"
    parser.add_argument("--originals", type=Path, metavar="FOLDER", help=where)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[a.name for a in ACIDS], help="these comparisons")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="a run of each side for each seed")
    parser.add_argument("--record", type=Path, default=RECORD, help="where the runs are kept")
    parser.add_argument("--list", action="store_true", help="the comparisons, and the repositories that they run")
    parser.add_argument("--page", action="store_true", help="render the page from the record that is there")
    args = parser.parse_args()
    rows = recorded(args.record)
    if args.list:
        last = {row["repository"]: row["commit"] for row in rows}
        for acid in ACIDS:
            print(f"{acid.name:24} https://github.com/{acid.repository} {last.get(acid.repository, '')}")
        return
    if not args.page:
        if not args.originals:
            parser.error(f"--originals FOLDER is needed, which {where}")
        chosen = [a for a in ACIDS if not args.only or a.name in args.only]
        for acid in chosen:
            if not (args.originals / acid.repository.split("/")[1]).is_dir():
                parser.error(f"{args.originals} lacks a checkout of {acid.repository}")
            if lacking := [name for name in acid.needs if importlib.util.find_spec(name) is None]:
                parser.error(
                    f"{acid.name} needs {', '.join(lacking)}; install it, or leave this comparison out by --only"
                )
        torch.set_num_threads(1)
        for acid in chosen:
            compare(acid, args.originals, args.seeds, args.record)
    if args.record == RECORD:
        PAGE.write_text(page(recorded(RECORD)))


def recorded(record: Path) -> list[dict[str, Any]]:
    """The rows of a record; none where there is no record yet."""
    rows: list[dict[str, Any]] = json.loads(record.read_text())["rows"] if record.is_file() else []
    return rows


def compare(acid: Acid, originals: Path, seeds: list[int], record: Path) -> None:
    """The runs of both sides that the record lacks; each is written into it when it is done."""
    checkout = Checkout((originals / acid.repository.split("/")[1]).resolve())
    checkout.check(*acid.files)
    rows = {row["name"]: row for row in recorded(record)}
    fresh = described(acid, checkout)
    row = rows.get(acid.name, fresh)
    if any(row[key] != fresh[key] for key in ("commit", "values")):
        row = fresh  # runs of another commit or recipe are no longer compared
    rows[acid.name] = row
    for seed in seeds:
        for side in SIDES:
            if str(seed) in row["scores"][side]:
                continue
            print(f"{acid.name}, seed {seed}, {side}: ", end="", flush=True)
            found = trained_by_us(acid, seed) if side == "ours" else trained_by_them(acid, checkout, seed)
            print(f"top-1 {found['top1']:.2f}, NLL {found['nll']:.3f}", flush=True)
            row["scores"][side][str(seed)] = found
            row |= {key: fresh[key] for key in ("date", "machine", "versions", "project")}
            order = [a.name for a in ACIDS if a.name in rows] + [n for n in rows if n not in {a.name for a in ACIDS}]
            files.write_into(record, (json.dumps({"rows": [rows[name] for name in order]}, indent=1) + "\n").encode())


def described(acid: Acid, checkout: Checkout) -> dict[str, Any]:
    """A row without runs: what is compared, and with what."""
    packages = ("torch", "timm", "numpy", *(name for name in acid.needs if name == "mmcv"))
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    return {
        "name": acid.name, "repository": acid.repository, "commit": checkout.commit, "files": [*acid.files],
        "values": SETTING | acid.values,
        "scores": {side: {} for side in SIDES},
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, 1 thread" + ("" if "avx512" in flags else ", no AVX-512"),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "project": Checkout(ROOT).commit,
    }  # fmt: skip


def written(acid: Acid, folder: Path) -> Path:
    """The recipe of a comparison as a file."""
    path = folder / f"{acid.name.replace(' ', '_')}.yaml"
    path.write_text(yaml.safe_dump(SETTING | acid.values))
    return path


def trained_by_them(acid: Acid, checkout: Checkout, seed: int) -> dict[str, float]:
    """The scores of the original's run."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, _ = resolve(str(written(acid, Path(folder))), {"seed": seed})
    return scores(acid.train(checkout, recipe, Epochs(recipe)), recipe)


def trained_by_us(acid: Acid, seed: int) -> dict[str, float]:
    """The scores of the run of ``train_mixup.py``, which its log has."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, out = written(acid, Path(folder)), Path(folder) / "run"
        command = [sys.executable, str(ROOT / "train_mixup.py"), "--recipe", str(recipe), "--seed", str(seed)]
        command += ["--output_dir", str(out), "--dataloader_num_workers", "0"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["mode"] == "val"][-1]
    return {name: value for name, value in last.items() if name not in ("mode", "epoch", "update", "perf")}


def page(rows: list[dict[str, Any]], acids: Sequence[Acid] = ACIDS) -> str:
    """The whole page, ``docs/acid_measured.md``; ``rows`` as the record has them. Both sides of a row have runs."""
    shown_rows = [row for row in rows if all(row["scores"][side] for side in SIDES)]
    texts = {acid.name: acid for acid in acids}
    shown_rows = [row for row in shown_rows if row["name"] in texts]  # a comparison may have been given up
    head = ["comparison", "original, each seed", "ours, each seed", "original", "ours", "difference", "band", "verdict"]
    parts = [INTRODUCTION, markdown_table(head, [cells(row) for row in shown_rows], 3, 7), ""]
    parts += ["The same runs by their negative log-likelihood on the test images, in nats:\n", nll(shown_rows), ""]
    if lacking := [name for name in texts if name not in {row["name"] for row in shown_rows}]:
        parts += [f"The script can run these comparisons too, and nobody has run them yet: {', '.join(lacking)}.", ""]
    parts += [section(row, texts[row["name"]]) for row in shown_rows]
    return "\n".join([*parts, shared(), "", END])


def values(row: dict[str, Any], side: str, score: str = "top1") -> list[float]:
    """A score of the runs of one side, by seed."""
    return [found[score] for _, found in sorted(row["scores"][side].items(), key=lambda item: int(item[0]))]


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the first table."""
    theirs, ours = (values(row, side) for side in SIDES)
    found = verdict(ours, statistics.fmean(theirs), len(theirs), int(values(row, "ours", "count")[0]))
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    each = [", ".join(f"{value:.2f}" for value in side) for side in (theirs, ours)]
    means = [f"{statistics.fmean(side):.2f}" for side in (theirs, ours)]
    said = "within the band" if abs(difference) <= found.band else "beyond the band"
    return [f"[{row['name']}](#{row['name'].lower().replace(' ', '-')})", *each, *means, f"{difference:+.2f}",
            f"{found.band:.2f}", said]  # fmt: skip


def nll(rows: list[dict[str, Any]]) -> str:
    """The second table: negative log-likelihoods."""
    head = ["comparison", "NLL, original", "NLL, ours", "original, each seed", "ours, each seed"]
    table = []
    for row in rows:
        sides = [values(row, side, "nll") for side in SIDES]
        each = [", ".join(f"{value:.3f}" for value in side) for side in sides]
        table.append([row["name"], *(f"{statistics.fmean(side):.3f}" for side in sides), *each])
    return markdown_table(head, table, 1, 3)


def section(row: dict[str, Any], acid: Acid) -> str:
    """What ran in a comparison, and with what."""
    commit = f"[{row['repository']}](https://github.com/{row['repository']}/tree/{row['commit']}) {row['commit'][:7]}"
    own = {key: value for key, value in row["values"].items() if key not in SETTING or SETTING[key] != value}
    seeds = sorted({int(seed) for side in SIDES for seed in row["scores"][side]})
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    lines = [
        f"## {row['name']}", "",
        f"The original is {commit}. {acid.runs}", "",
        acid.differs, "",
        "In the recipe: " + ", ".join(f"`{key}: {shown(value)}`" for key, value in own.items()) + ".", "",
        f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. Measured on {row['date']}, {row['machine']}, "
        f"{versions}; this project at {row['project'][:7]}. "
        f"Made by `python benchmarks/acid.py --originals FOLDER --only \"{row['name']}\"`.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def shared() -> str:
    """The recipe that all comparisons share."""
    listed = "\n".join(f"- `{key}: {shown(value)}`" for key, value in SETTING.items())
    return f"## The recipe of all comparisons\n\n`train_mixup.py --help` explains each field.\n\n{listed}"


if __name__ == "__main__":
    main()
