"""A folder with the page of a trained classifier, which can be pushed to a Space as it is."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from timm.models import model_entrypoint, save_for_hf
from torch import nn

from mixup_recipes import fetch
from mixup_recipes.files import writing
from mixup_recipes.runs.models import open_model, output_names
from mixup_recipes.runs.shapes import read_object
from mixup_recipes.training.backbones import cfg_of, folder_of
from mixup_recipes.typed import UserError, printable
from mixup_recipes.words import many

WEIGHTS = ("config.json", "model.safetensors")
GRADIO = "6.31.0"  # with which the page was tried
REQUIREMENTS = "gradio>=6.18\npillow>=11.3\nsafetensors>=0.8\ntimm>=1.0.31\ntorch>=2.7.1\ntorchvision>=0.22.1\n"
README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
{more}---

# {name}

Drop a photo, and {architecture} says which of its {classes} are the likeliest.

{source} `config.json` and `model.safetensors` are in timm's format:

```python
import timm

model = timm.create_model("local-dir:.", pretrained=True)
```

To try the page on your machine: `pip install -r requirements.txt`, then `python app.py`.
"""


def write_space(name: str, out: Path) -> str:
    """``mixup-recipes demo RUN --share_to_space OUT``: write the folder; returns what it is and how to push it.

    ``name``: a run folder, timm name or ``hf-hub:owner/name``. The folder is written whole or not at all. Raises
    ``UserError`` for one that is there and not empty, and for an architecture that timm does not have.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"cannot write {out}: it is there already; name a new folder")
    net, run = open_model(name)
    architecture = str(cfg_of(net)["architecture"])
    if model_entrypoint(architecture).__module__.startswith("mixup_recipes."):
        raise UserError(
            f"{architecture} is an architecture of this package, which timm does not have, so a Space that installs "
            "timm cannot load it; show it on this machine: mixup-recipes demo RUN"
        )
    classes = output_names(net)
    title = name.rpartition("/")[2] if fetch.is_hub(name) else Path(name).resolve().name
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with writing(out):
            aside.mkdir()
            write_weights(name, net, aside, title, classes)
            shutil.copyfile(Path(__file__).with_name("app.py"), aside / "app.py")
            (aside / "requirements.txt").write_text(REQUIREMENTS)
            said = "The model was trained with Mixup Recipes." if run else f"The weights are `{printable(title)}`."
            text = readme(name, title, said, architecture, len(classes), aside)
            (aside / "README.md").write_text(text, encoding="utf-8")
            if out.exists():
                out.rmdir()
            os.rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    folder = shlex.quote(str(out))
    return "\n".join(
        (
            f"{out}: the page of {title}, {many(len(classes), 'class')}, {size:.1f} MB",
            "",
            "To try it here:",
            f"    pip install -r {folder}/requirements.txt && python {folder}/app.py",
            "To publish it as a Space of yours, once you are logged in (hf auth login):",
            "    hf repos create OWNER/NAME --repo-type space --space-sdk gradio",
            f"    hf upload OWNER/NAME {folder} . --repo-type space",
        )
    )


def write_weights(name: str, net: nn.Module, folder: Path, title: str, classes: list[str]) -> None:
    """``config.json`` and ``model.safetensors``: those of a folder or repository, or the weights of a timm name."""
    source = folder_of(name)
    if source is not None:
        shutil.copyfile(source / WEIGHTS[1], folder / WEIGHTS[1])
        config = read_object(source / WEIGHTS[0])
    else:
        net = net.to(memory_format=torch.contiguous_format)  # safetensors takes no other
        save_for_hf(net, str(folder), safe_serialization=True, model_config={"label_names": classes})
        config = read_object(folder / WEIGHTS[0])
    config["title"] = title
    (folder / WEIGHTS[0]).write_text(json.dumps(config, indent=1) + "\n")


def readme(name: str, title: str, source: str, architecture: str, classes: int, folder: Path) -> str:
    """The page's README with what a Space reads of it. ``source``: a sentence that says where the weights are from."""
    cfg: dict[str, Any] = read_object(folder / WEIGHTS[0]).get("pretrained_cfg") or {}
    more = f"license: {json.dumps(cfg['license'])}\n" if cfg.get("license") else ""
    more += f"models:\n- {fetch_id(name)}\n" if fetch.is_hub(name) else ""
    return README.format(
        title=json.dumps(title, ensure_ascii=False),
        gradio=GRADIO,
        more=more,
        name=printable(title),
        source=source,
        architecture=f"a `{architecture}`",
        classes=many(classes, "class"),
    )


def fetch_id(name: str) -> str:
    """``owner/name`` of ``hf-hub:owner/name@revision``."""
    return name.partition(":")[2].partition("@")[0]
