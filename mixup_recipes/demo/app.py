"""The page of a trained classifier: drop a photo and see its likeliest classes. Run it with ``python app.py``.

It needs the packages of requirements.txt, and config.json and model.safetensors beside this file.
"""

import functools
import json
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config

FOLDER = Path(__file__).parent


@functools.cache
def load() -> tuple[Any, Any, dict[str, Any]]:
    """The model, what it makes of a picture, and its configuration."""
    config = json.loads((FOLDER / "config.json").read_text())
    model = timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()
    return model, create_transform(**resolve_model_data_config(model, use_test_size=True)), config


@torch.inference_mode()
def classify(path: str) -> dict[str, float]:
    """The probability of each class for a picture file. Raises ``OSError`` for a file that is no picture."""
    model, transform, config = load()
    picture: Image.Image = Image.open(path)
    if config.get("exif_orientation"):
        picture = ImageOps.exif_transpose(picture)
    logits = model(transform(picture.convert("RGB"))[None])[0]
    likely = logits.sigmoid() if config.get("multi_label") else logits.softmax(0)
    names = config.get("label_names") or map(str, range(len(likely)))
    return dict(zip(names, likely.tolist(), strict=True))


def demo() -> Any:
    """The page, a ``gradio.Interface``."""
    import gradio

    def answer(path: str | None) -> dict[str, float]:
        if path is None:
            raise gradio.Error("Choose a photo first.")
        try:
            return classify(path)
        except OSError:
            raise gradio.Error("This file cannot be read as a photo.") from None

    _, _, config = load()
    return gradio.Interface(
        answer,
        gradio.Image(type="filepath", image_mode=None, label="Photo"),
        gradio.Label(num_top_classes=5, label="Likeliest classes"),
        title=config.get("title", FOLDER.resolve().name),
        description=f"{config['architecture']}, {config['num_classes']} classes",
        flagging_mode="never",
        analytics_enabled=False,
    )


if __name__ == "__main__":
    demo().launch()
