"""What the page shows of a result, as HTML: a card for each photo, sentences, or the one message of an error."""

import base64
import io
from html import escape

import torch
from PIL import Image
from torch import Tensor

from mixup_recipes.demo.playground import Photo, Result, Shown, thumbnail

LEAST_SIDE = 256  # pixels of a picture on the page: a small one is shown larger, with its pixels to be seen
COLOURS = ("#2563eb", "#ea580c", "#059669", "#a21caf")  # of the photos, in their order
STYLE = """
.gradio-container { max-width: 1240px !important; }
#arguments .row, #arguments .form { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
#arguments .form .form, #arguments .row .form { display: contents; }
#arguments .row { background: var(--block-background-fill); }
.thumbnails { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 8px; }
.thumbnails figure { margin: 0; font-size: .75rem; color: var(--body-text-color-subdued); min-width: 0; }
.thumbnails img, .thumbnails .none { width: 100%; aspect-ratio: 1; border-radius: 8px; object-fit: cover; margin: 0;
                                     display: grid; place-items: center; text-align: center; box-sizing: border-box; }
.thumbnails .none { border: 1px dashed #dc2626; }
.thumbnails figcaption { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; text-align: center; }
.cards { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); }
.card { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 14px; min-width: 0;
        background: var(--background-fill-primary); }
.card h3 { margin: 0 0 8px; font-size: 1rem; overflow-wrap: anywhere; }
.card h4 { margin: 12px 0 4px; font-size: .85rem; font-weight: 600; color: var(--body-text-color-subdued); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
.pair figure { margin: 0; min-width: 0; }
.pair img, .pair .none { width: 100%; aspect-ratio: 1; border-radius: 8px; margin: 0; display: block;
                         box-sizing: border-box; object-fit: contain; border: 1px solid var(--border-color-primary); }
.pair .none { display: grid; place-items: center; text-align: center; padding: 8px; font-size: .8rem;
              border-style: dashed; color: var(--body-text-color-subdued); }
.pair figcaption { font-size: .8rem; color: var(--body-text-color-subdued); text-align: center; }
.shares { display: flex; height: 14px; border-radius: 7px; overflow: hidden; }
.shares span { display: block; }
.label { margin: 4px 0 0; font-size: .9rem; overflow-wrap: anywhere; }
.label b { font-variant-numeric: tabular-nums; }
.says { display: grid; grid-template-columns: minmax(0, 1fr) 72px 4.2em; gap: 3px 8px; align-items: center;
        font-size: .85rem; margin: 0; }
.says dt { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; margin: 0; font-weight: 400; }
.says dd { margin: 0; }
.says .bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; }
.says .bar span { display: block; height: 100%; background: var(--color-accent); }
.says .share { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.told { margin: 0 0 12px; font-size: .9rem; color: var(--body-text-color-subdued); }
.problem { border: 1px solid #dc2626; border-left-width: 6px; border-radius: 8px; padding: 12px 14px;
           overflow-wrap: anywhere; }
"""


def problem(message: str) -> str:
    """The one message of an error."""
    return f'<p class="problem" role="alert">{escape(message)}</p>'


def thumbnails(photos: list[Photo]) -> str:
    """The photos themselves, small, with their names."""
    made = []
    for photo in photos:
        pixels = thumbnail(photo)
        seen = '<div class="none">no photo</div>' if pixels is None else f'<img src="{png(pixels)}" alt="">'
        made.append(
            f'<figure>{seen}<figcaption title="{escape(photo.name)}">{escape(photo.name)}</figcaption></figure>'
        )
    return f'<div class="thumbnails">{"".join(made)}</div>'


def cards(result: Result, names: list[str], seed: int, model: str | None) -> str:
    """A result. ``names``: of all photos, whose order gives them their colours. ``model``: who was asked."""
    told = " ".join([*result.notes, f"Seed {seed}, update {result.update}."])
    inside = "".join(card(photo, names[i], names, model) for i, photo in enumerate(result.photos))
    return f'<p class="told">{escape(told)}</p><div class="cards">{inside}</div>'


def card(photo: Shown, name: str, names: list[str], model: str | None) -> str:
    """What became of one photo."""
    mask = '<div class="none">no mask in this update</div>'
    if photo.mask is not None:
        mask = f'<img src="{grey(photo.mask)}" alt="mask of {escape(name)}">'
        mask += "<figcaption>mask</figcaption>"
    colours = {other: COLOURS[i] for i, other in enumerate(names)}
    bar = "".join(f'<span style="width:{100 * s:.1f}%;background:{colours[n]}"></span>' for n, s in photo.labels)
    label = " + ".join(f'<b style="color:{colours[n]}">{s:.2f}</b> {escape(n)}' for n, s in photo.labels)
    parts = [
        f"<h3>{escape(name)}</h3>",
        f'<div class="pair"><figure><img src="{png(photo.pixels)}" alt="{escape(name)}, mixed">'
        f"<figcaption>mixed</figcaption></figure><figure>{mask}</figure></div>",
        f'<h4>Label</h4><div class="shares">{bar}</div><p class="label">{label}</p>',
    ]
    if photo.says:
        rows = "".join(
            f'<dt title="{escape(n)}">{escape(n)}</dt><dd class="bar"><span style="width:{100 * p:.1f}%"></span></dd>'
            f'<dd class="share">{100 * p:.1f} %</dd>'
            for n, p in photo.says
        )
        parts.append(f'<h4>{escape(model or "The model")} says</h4><dl class="says">{rows}</dl>')
    return f'<section class="card">{"".join(parts)}</section>'


def grey(mask: Tensor) -> str:
    """A mask (H, W) in [0, 1] as a picture, white where it is 1."""
    return png((mask * 255).round().to(torch.uint8).expand(3, -1, -1))


def png(pixels: Tensor) -> str:
    """uint8 (3, H, W) as the address of a picture, a whole number of times as large where it is small."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    times = max(1, -(-LEAST_SIDE // max(image.size)))
    buffer = io.BytesIO()
    image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
