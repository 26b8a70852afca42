"""A tiny photo set and recipe for whole runs in seconds: JPEGs of noisy coloured stripes, four classes."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["blue", "green", "red", "white"]

RECIPE = {
    "eval_split": "test", "num_classes": 4, "model": "test_resnet", "epochs": 3, "batch_size": 16,
    "per_device_train_batch_size": 8, "lr": 0.05, "warmup_epochs": 1, "image_size": 32, "scale": [0.5, 1.0],
    "eval_size": 32, "eval_resize": 32, "interpolation": "bilinear", "reprob": 0.3, "aa": "rand-m9-mstd0.5-inc1",
    "smoothing": 0.1, "ema_decay": 0.9, "ema_warmup_epochs": 1, "precise_bn_samples": 20, "protocol_epochs": 2,
}  # fmt: skip


def jpeg(kind: int, rng: np.random.Generator) -> bytes:
    """One JPEG of 48 x 40 pixels whose stripes and colour belong to its class."""
    pixels = rng.integers(0, 120, (40, 48, 3))
    pixels[:, :: kind + 2, :] += 60
    pixels[..., kind % 3] += 70 if kind < 3 else 0
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_photos(folder: Path, train: int = 72, test: int = 30) -> Path:
    """Write the set in the Hub's parquet layout; returns the folder."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES)})
    rng = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    for split, size in (("train", train), ("test", test)):
        images = [{"bytes": jpeg(i % 4, rng), "path": f"{split}-{i}.jpg"} for i in range(size)]
        columns = {"image": images, "label": [i % 4 for i in range(size)]}
        pq.write_table(pa.table(columns, schema=features.arrow_schema), folder / f"data/{split}-00000-of-00001.parquet")
    return folder


def make_recipe(folder: Path, photos: Path, **changes: object) -> Path:
    """Write the recipe as ``tiny.yaml``; returns its path."""
    path = folder / "tiny.yaml"
    path.write_text("".join(f"{k}: {v}\n" for k, v in ({"dataset": photos} | RECIPE | changes).items()))
    return path


def environment() -> dict[str, str]:
    """One thread, no network, no GPU: the same numbers on every machine."""
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return os.environ | fixed


def start(*args: object, processes: int = 1, script: str = "train_mixup.py") -> subprocess.CompletedProcess[str]:
    """Run a script to its end, on one or several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else ()), str(ROOT / script), *map(str, args)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)
