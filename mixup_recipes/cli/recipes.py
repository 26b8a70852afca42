"""Commands about recipes and published cells, which need no torch."""

import shlex
import signal
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from mixers import MIXERS
from mixup_recipes.benchmark import cells
from mixup_recipes.cli.base import Output, RecipeName, Results, app, group, put, said, text
from mixup_recipes.new_mixer import new_mixer
from mixup_recipes.pages.method_index import Format, listing, render
from mixup_recipes.pages.method_page import text as method_text
from mixup_recipes.recipe import differences, explain, to_yaml
from mixup_recipes.resolve import load_recipe, resolve, settings
from mixup_recipes.typed import UserError
from mixup_recipes.words import many

Kind = Literal["input", "feature", "learned", "label"]
Either = Annotated[str, text("Recipe name SETTING_MIXER, or the path of a recipe file.")]
recipe_commands = group("recipes", "List, show, explain and compare recipes.")
method_commands = group(
    "methods",
    "List and show the mixers with their papers, laws, arguments and gaps to the original code, and make their pages.",
)
cell_commands = group("cells", "List, show, explain, compare and export the published cells and their numbers.")


@recipe_commands.command(name="list")
def list_recipes() -> None:
    """List all settings with the first line of their file, and all mixers."""
    for name, path in settings().items():
        print(f"{name:25} {path.read_text().splitlines()[0].lstrip('# ')}")
    print(f"\nmixers: {' '.join(MIXERS)}\na recipe is <setting>_<mixer>")


@recipe_commands.command(name="show")
def show_recipe(recipe: RecipeName) -> None:
    """Print the resolved recipe as a file that --recipe accepts."""
    print(to_yaml(resolve(recipe)[0]), end="")


@recipe_commands.command(name="explain")
def explain_recipe(recipe: RecipeName) -> None:
    """Print every value of a recipe with its origin."""
    print(explain(*resolve(recipe)))


@recipe_commands.command(name="diff")
def diff_recipes(first: Either, second: Either) -> None:
    """Print the fields in which two recipes differ."""
    (a, _), (b, _) = (resolve(name) for name in (first, second))
    for key, (x, y) in differences(a, b).items():
        print(f"{key:32} {x!s:36} {y}")


@method_commands.command(name="list")
def list_methods(
    *,
    kind: Annotated[
        Kind | None,
        said(
            "List only methods that change this: the images (input), a hidden feature, a learned mask, or the labels "
            "or the loss (label). The default is all."
        ),
    ] = None,
    works_with: Annotated[
        Literal["cnn", "vit"] | None, said("List only methods that work with this kind of network. The default is all.")
    ] = None,
    format: Annotated[Format, said("Format of the table.")] = "md",
    out: Output = None,
) -> None:
    """List all mixers side by side, with kind, networks, cost and published numbers.

    The table also says what a loop hands over to each mixer. --format csv adds year and title.
    """
    put(listing(kind, works_with, format), out)


@method_commands.command(name="show")
def show_method(mixer: Annotated[str, text("Name of the mixer.", "--mixer", "--name")]) -> None:
    """Show the page of a mixer: formula, law, cost, numbers, gaps to its original code, deviations, and its use."""
    print(method_text(mixer), end="")


@method_commands.command(name="render")
def render_methods(*, out: Annotated[Path, said("Folder to write to.")] = Path("docs/methods")) -> None:
    """Write the page of every mixer of this package, and the page that compares them."""
    changed = render(out)
    print(*changed, f"{out}: {many(len(changed), 'page')} changed", sep="\n")


@method_commands.command(name="draw")
def draw_methods(
    *mixers: Annotated[str, Parameter(metavar="MIXERS", help="Mixers to draw. The default is all of this package.")],
    photos: Annotated[
        str | None, text("Folder of images, or 'synthetic' for drawn shapes. The default is the groceries.")
    ] = None,
    out: Annotated[Path, said("Folder of the pictures.")] = Path("docs/methods"),
    sheet: Annotated[
        Path | None, said("Draw only one picture of the named mixers, a tile for each, into this .jpg file.")
    ] = None,
) -> None:
    """Draw the pictures of the mixers' pages, and try which networks the mixers work with.

    What was tried goes to model_cards/methods.csv. With other photos, or another folder, that table goes beside the
    pictures. The command needs the groceries and the weights of efficientnet_lite0: see `mixup-recipes prepare`.
    """
    from mixup_recipes.pages.method_facts import draw, overview, saved

    if sheet is not None:
        if not mixers or photos is not None:
            raise UserError("--sheet is of mixers that are named, on the photos of the groceries")
        print(saved(overview(list(mixers)), sheet))
        return
    theirs = photos is not None or out != Path("docs/methods")
    print(draw(list(mixers), photos, out, *([out / "methods.csv"] if theirs else [])))


@cell_commands.command(name="list")
def list_cells(
    *,
    benchmark: Annotated[str | None, text("List only cells of this benchmark, such as deit or cifar100.")] = None,
    setting: Annotated[str | None, text("List only cells of this setting, such as deit_s.")] = None,
    backbone: Annotated[str | None, text("List only cells of this backbone, such as resnet50.")] = None,
    mixer: Annotated[str | None, text("List only cells of this mixer, such as cutmix.")] = None,
    source: Annotated[str | None, text("List only numbers of this source: own, arxiv or official.")] = None,
    upstream_config: Annotated[
        str | None,
        text("List only cells whose original configuration is public (yes), public as a base (base), or not (no)."),
    ] = None,
    numbered: Annotated[
        bool | None, Parameter(help="List only cells with a published number, or with --no-numbered those without.")
    ] = None,
    results: Results = None,
) -> None:
    """List the published cells, one line each, with number, marks and status of our runs."""
    from mixup_recipes.benchmark.listing import listing
    from mixup_recipes.benchmark.verdicts import of_cells

    wanted = {"benchmark": benchmark, "setting": setting, "backbone": backbone, "mixer": mixer, "source": source}
    chosen = cells.select(numbered, **wanted, upstream_config=upstream_config)
    print(listing(chosen, of_cells(results)))


@cell_commands.command(name="show")
def show_cell(recipe: RecipeName, *, results: Results = None) -> None:
    """Show a published number with its source, protocol, recipe, estimated hours and the status of our runs."""
    from mixup_recipes.benchmark.listing import describe
    from mixup_recipes.benchmark.verdicts import of_cells

    name = load_recipe(recipe).name if recipe in settings() else recipe  # a setting alone is its vanilla row
    if name in cells.cells():
        print(describe(cells.find(name), of_cells(results).get(name)))
    else:
        resolved, _ = resolve(name)
        print(f"{resolved.name} is a recipe, but no published cell.\n\n{to_yaml(resolved)}", end="")


@cell_commands.command(name="explain")
def explain_cell(recipe: RecipeName) -> None:
    """Print every value of a cell's recipe with its origin."""
    print(explain(*resolve(recipe)))


@cell_commands.command(name="diff")
def diff_cells(first: Either, second: Either) -> None:
    """Print the recipe fields, mixer arguments and published numbers in which two cells or recipes differ."""
    from mixup_recipes.benchmark.listing import difference

    print(difference(first, second))


@cell_commands.command
def export(recipe: RecipeName, *, out: Output = None) -> None:
    """Print a cell's recipe as a file that --recipe accepts."""
    put(to_yaml(resolve(recipe)[0]), out)


@app.command(name="new-mixer")
def write_new_mixer(
    name: Annotated[str, text("Name of the mixer, in lower-case letters and digits.", "--name")],
    *,
    out: Annotated[
        Path | None, said("Folder to write to, such as . for this one. The default is a new folder of that name.")
    ] = None,
) -> None:
    """Write a small package for a mixer of your own, with a method that works, its test and its page.

    After `pip install -e .` in that folder the mixer is known by its name like ours, in recipes (quickstart_NAME),
    check, preview, sweep and methods. Change what it does, run pytest, and go on from there. No file is overwritten.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left half-written
    files = new_mixer(name, out)
    folder = files[0].parent
    print(*files, sep="\n")
    print(f"\nNext: cd {shlex.quote(str(folder))} && pip install -e '.[test]' && pytest && mixup-recipes check {name}")
