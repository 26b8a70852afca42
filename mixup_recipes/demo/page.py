"""The page of ``mixup-recipes demo``, by gradio: photos, a mixer with its arguments, and what comes of them."""

import contextlib
import logging
import threading
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mixers.registry import docstring, usable
from mixup_recipes.demo import cards, playground
from mixup_recipes.demo.arguments import Field, fields
from mixup_recipes.demo.models import Model, examples, recipe_of
from mixup_recipes.demo.playground import Photo
from mixup_recipes.pages.methods import introduction, parse
from mixup_recipes.typed import UserError

log = logging.getLogger(__name__)
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # of the reader's machine: none is fetched
FIRST = "cutmix"
ABOUT = """# Mixup Recipes: the playground

Drop two to four photos or take these, choose a mixer, and see what a training step makes of them: the mixed photos,
the masks, the labels{}. A mask is white where the photo itself stays.
"""


def serve(model: Model | None, photos: str | None, host: str, port: int | None, folder: Path) -> None:
    """Open the page and wait for Ctrl-C. ``folder``: where the photos that people drop are kept meanwhile.

    Raises ``UserError`` for photos that cannot be read, and for a port that is taken.
    """
    blocks, how = page(model, photos, folder)
    try:
        _, address, _ = blocks.launch(server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, **how)
    except OSError:
        where = host if port is None else f"{host}:{port}"
        raise UserError(f"the page cannot listen at {where}; name another --port or --host") from None
    print(f"The page is at {address} (Ctrl-C ends it).", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    blocks.close(verbose=False)


def page(model: Model | None, photos: str | None, folder: Path) -> tuple[gr.Blocks, dict[str, Any]]:
    """The page, and what its ``launch`` is to be told. Example photos are written to ``folder``. Raises ``UserError``.

    Nothing is sent anywhere: no statistics, no fonts of others, no public link.
    """
    start = example_files(model, photos, folder)
    recipe = recipe_of(model)
    first = recipe.mixer if recipe.mixer not in ("", "vanilla") and recipe.mixer in usable() else FIRST

    def shown(paths: list[str] | None, mixer: str, seed: Any, fix: bool, lam: float, *held: Any) -> tuple[str, str]:
        taken = photos_of(paths) or start
        try:
            result = playground.mix(model, taken, mixer, list(held), seed, lam if fix else None)
            told = cards.cards(result, [photo.name for photo in taken], int(seed), model and model.name)
        except UserError as error:
            told = cards.problem(str(error))
        except Exception as error:  # what a mixer or a network raises on odd arguments is up to it
            log.exception("%s", mixer)
            told = cards.problem(f"{mixer} cannot mix these photos with these arguments: {error}")
        return cards.thumbnails(taken), told

    def with_defaults(paths: list[str] | None, mixer: str, seed: Any, fix: bool, lam: float) -> tuple[str, str]:
        return shown(paths, mixer, seed, fix, lam, *(field.value for field in fields(mixer, recipe)))

    with gr.Blocks(title="Mixup Recipes: the playground", analytics_enabled=False) as blocks:
        gr.Markdown(ABOUT.format(f", and what `{model.name}` says of them" if model else ""))
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                dropped = gr.File(
                    file_count="multiple",
                    label="Your photos, two to four",
                    height=150,
                    elem_id="photos",
                    interactive=True,
                )
                seen = gr.HTML(cards.thumbnails(start), elem_id="thumbnails")
                mixer = gr.Dropdown(usable(), value=first, label="Mixer", elem_id="mixer")
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=None, minimum=0, step=1, min_width=90, elem_id="seed")
                    fix = gr.Checkbox(False, label="Fix lambda", min_width=90, elem_id="fix")
                lam = gr.Slider(0, 1, 0.5, step=0.05, label="Lambda", visible=False, elem_id="lambda")
                go = gr.Button("Mix", variant="primary", elem_id="mix")
                with gr.Group(elem_id="arguments"):

                    @gr.render(inputs=mixer)
                    def arguments(chosen: str) -> None:
                        with gr.Row():
                            made = [control(field) for field in fields(chosen, recipe)]
                        if not made:
                            gr.Markdown("This mixer has no arguments.", padding=True)
                        entered = [c.input if isinstance(c, gr.Checkbox) else c.submit for c in (seed, *made)]
                        gr.on(
                            [go.click, dropped.change, fix.change, lam.release, *entered],
                            shown, [dropped, mixer, seed, fix, lam, *made], [seen, result], concurrency_id="mix",
                        )  # fmt: skip

            with gr.Column(scale=2, min_width=280):
                result = gr.HTML(elem_id="result")
                with gr.Accordion("About this mixer", open=False):
                    about = gr.Markdown(method(first), elem_id="about")
        basic = [dropped, mixer, seed, fix, lam]
        gr.on([blocks.load, mixer.change], with_defaults, basic, [seen, result], concurrency_id="mix")
        mixer.change(method, mixer, about)
        fix.change(lambda on: gr.update(visible=on), fix, lam)
    theme = gr.themes.Soft(font=FONTS, font_mono=("ui-monospace", "monospace"))
    return blocks, {
        "theme": theme,
        "css": cards.STYLE,
        "share": False,
        "show_error": True,
        "footer_links": [],
        "ssr_mode": False,
    }


def control(field: Field) -> Any:
    """The field of an argument."""
    same: dict[str, Any] = {"label": field.name, "interactive": True, "min_width": 140}
    same |= {"elem_classes": f"argument-{field.name}"}
    if field.kind == "switch":
        return gr.Checkbox(bool(field.value), **same)
    if field.kind == "number":
        return gr.Number(field.value, precision=None, **same)
    return gr.Textbox(str(field.value), placeholder="none", max_lines=1, **same)


def method(name: str) -> str:
    """What a mixer is, by whom, and its formula, as Markdown."""
    found = parse(docstring(name))
    parts = [introduction(found)]
    parts += [f"**{part}**: {found.parts[part]}" for part in ("Formula", "Published defaults") if part in found.parts]
    return "\n\n".join(parts)


def example_files(model: Model | None, photos: str | None, folder: Path) -> list[Photo]:
    """The photos to start with as files. Raises ``UserError``."""
    found, made = examples(model, photos), []
    for i, (image, name) in enumerate(zip(found.images, found.names, strict=True)):
        path = folder / f"example-{i}.png"
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path)
        made.append(Photo(path, name))
    return distinct(made)


def photos_of(paths: list[str] | None) -> list[Photo]:
    """The photos that people dropped, by the names of their files."""
    return distinct([Photo(Path(path), Path(path).stem[:40]) for path in paths or []])


def distinct(photos: list[Photo]) -> list[Photo]:
    """Photos each with a name of its own."""
    names: list[str] = []
    for photo in photos:
        names.append(photo.name if photo.name not in names else f"{photo.name} ({len(names) + 1})")
    return [photo._replace(name=name) for photo, name in zip(photos, names, strict=True)]
