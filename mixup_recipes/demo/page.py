"""The page of ``mixup-recipes demo``, by gradio: photos, a mixer with its arguments, and what comes of them."""

import contextlib
import logging
import threading
from pathlib import Path
from typing import Any

import gradio as gr

from mixers.registry import docstring, usable
from mixup_recipes.demo import cards, playground
from mixup_recipes.demo.arguments import Field, fields
from mixup_recipes.demo.models import Model, examples, recipe_of
from mixup_recipes.pages.methods import introduction, parse
from mixup_recipes.pages.preview import picture
from mixup_recipes.typed import UserError

log = logging.getLogger(__name__)
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # of the reader's machine: none is fetched
FIRST = "cutmix"
EXAMPLE = "example-"  # how the files of the example photos begin
ABOUT = """# Mixup Recipes: the playground

Drop two to four photos, choose a mixer, and see what a training step makes of them: the mixed photos, the mask, the
labels{}.
"""


def serve(model: Model | None, photos: str | None, host: str, port: int | None, folder: Path) -> None:
    """Open the page and wait for Ctrl-C. ``folder``: where the photos that people drop are kept meanwhile.

    Raises ``UserError`` for photos that cannot be read, and for a port that is taken.
    """
    blocks, how = page(model, photos, folder)
    try:
        _, address, _ = blocks.launch(server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, **how)
    except OSError as error:
        raise UserError(f"cannot open the page: {error}; name another --port") from None
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

    def shown(given: Any, mixer: str, seed: Any, fix: bool, lam: float, *values: Any) -> str:
        taken = photos_of(given)
        try:
            result = playground.mix(model, taken, mixer, list(values), seed, lam if fix else None)
        except UserError as error:
            return cards.problem(str(error))
        except Exception as error:  # what a mixer or a network raises on odd arguments is up to it
            log.exception("%s", mixer)
            return cards.problem(f"{mixer} cannot mix these photos with these arguments: {error}")
        return cards.cards(result, [photo.name for photo in taken], int(seed), model and model.name)

    def with_defaults(given: Any, mixer: str, seed: Any, fix: bool, lam: float) -> str:
        return shown(given, mixer, seed, fix, lam, *(field.value for field in fields(mixer, recipe)))

    with gr.Blocks(title="Mixup Recipes: the playground", analytics_enabled=False) as blocks:
        gr.Markdown(ABOUT.format(f", and what `{model.name}` says of them" if model else ""))
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                gallery = gr.Gallery(
                    start, label="Photos", type="filepath", file_types=None, columns=4, height=150, object_fit="cover",
                    interactive=True, elem_id="photos", buttons=[], fit_columns=False,
                )  # fmt: skip
                again = gr.Button("Use the example photos", size="sm")
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
                            [go.click, gallery.change, fix.change, lam.release, *entered],
                            shown, [gallery, mixer, seed, fix, lam, *made], result, concurrency_id="mix",
                        )  # fmt: skip

            with gr.Column(scale=2, min_width=280):
                result = gr.HTML(elem_id="result")
                with gr.Accordion("About this mixer", open=False):
                    about = gr.Markdown(method(first), elem_id="about")
        basic = [gallery, mixer, seed, fix, lam]
        gr.on([blocks.load, mixer.change], with_defaults, basic, result, concurrency_id="mix")
        mixer.change(method, mixer, about)
        fix.change(lambda on: gr.update(visible=on), fix, lam)
        gallery.upload(own_photos, gallery, gallery)
        again.click(lambda: start, None, gallery)
    theme = gr.themes.Soft(font=FONTS, font_mono=("ui-monospace", "monospace"))
    return blocks, {"theme": theme, "css": cards.STYLE, "share": False, "footer_links": [], "ssr_mode": False}


def control(field: Field) -> Any:
    """The field of an argument."""
    same: dict[str, Any] = {"label": field.name, "interactive": True, "min_width": 120}
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


def example_files(model: Model | None, photos: str | None, folder: Path) -> list[tuple[str, str]]:
    """The photos to start with as files, each with its name. Raises ``UserError``."""
    found, made = examples(model, photos), []
    for i, (image, name) in enumerate(zip(found.images, found.names, strict=True)):
        path = folder / f"{EXAMPLE}{i}.png"
        side = min(image.shape[1:])
        top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
        picture(image[:, top : top + side, left : left + side].contiguous(), side).save(path)
        made.append((str(path), name))
    return made


def own_photos(given: Any) -> list[tuple[str, str | None]]:
    """The photos of the gallery: those that people have added, where there are any, in place of the examples."""
    own = [(path, caption) for path, caption in given or [] if not (caption and Path(path).name.startswith(EXAMPLE))]
    return own or given or []


def photos_of(given: Any) -> list[playground.Photo]:
    """The photos of the gallery, each with a name of its own."""
    names: list[str] = []
    taken = own_photos(given)
    for path, caption in taken:
        name = (caption or Path(path).stem)[:40]
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return [playground.Photo(Path(path), name) for (path, _), name in zip(taken, names, strict=True)]
