"""Recipes and published cells, sweeps, and what is made from runs: numbers, records, tables, plots."""

# The console command mixup-recipes: one thin line per subcommand; the work is done where it belongs.

import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from mixup_recipes import flags as cli
from mixup_recipes.recipe import differences, explain, to_yaml
from mixup_recipes.resolve import load_recipe, resolve, settings
from mixup_recipes.typed import UserError

app = App(name="mixup-recipes", help=__doc__.splitlines()[0], version_flags=[], result_action="return_value")
app.command(recipes_app := App(name="recipes", help="List, show, explain and compare recipes."))
app.command(cells_app := App(name="cells", help="The published numbers: list, show, explain, diff, export."))
app.command(plot_app := App(name="plot", help="Draw runs into a .png or .svg file."))


def listed(words: str, name: str | None = None) -> Parameter:
    """A flag that takes several values; ``name`` where it is not that of the argument."""
    return Parameter(name=name, consume_multiple=True, negative="", help=words)


def whole(_kind: type, tokens: Any) -> int:
    """An integer; cyclopts itself would round."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"expected an integer, got {tokens[0].value!r}") from None


Whole = Annotated[int, Parameter(converter=whole)]


@recipes_app.command(name="list")
def list_() -> None:
    """All settings with the first line of their file, and all mixers."""
    from mixers import MIXERS

    for name, path in settings().items():
        print(f"{name:20} {path.read_text().splitlines()[0].lstrip('# ')}")
    print(f"\nmixers: {' '.join(MIXERS)}\na recipe is <setting>_<mixer>")


@recipes_app.command
def show(name: str) -> None:
    """The resolved recipe as a file that --recipe accepts."""
    print(to_yaml(resolve(name)[0]), end="")


@recipes_app.command(name="explain")
def explain_recipe(name: str) -> None:
    """Every value of a recipe with its origin."""
    print(explain(*resolve(name)))


@recipes_app.command
def diff(first: str, second: str) -> None:
    """Fields in which two recipes differ."""
    (a, _), (b, _) = (resolve(name) for name in (first, second))
    for key, (x, y) in differences(a, b).items():
        print(f"{key:32} {x!s:36} {y}")


@cells_app.command(name="list")
def list_cells(
    *,
    benchmark: str | None = None,
    setting: str | None = None,
    backbone: str | None = None,
    mixer: str | None = None,
    source: str | None = None,
    upstream_config: str | None = None,
    numbered: bool | None = None,
    results: Path | None = None,
) -> None:
    """One line per published cell: number, marks, status of our runs."""
    from mixup_recipes.benchmark import cells
    from mixup_recipes.benchmark.listing import listing
    from mixup_recipes.benchmark.verdicts import of_cells

    wanted = {"benchmark": benchmark, "setting": setting, "backbone": backbone, "mixer": mixer, "source": source}
    chosen = cells.select(numbered, **wanted, upstream_config=upstream_config)
    print(listing(chosen, of_cells(results)))


@cells_app.command(name="show")
def show_cell(name: str, *, results: Path | None = None) -> None:
    """A published number with its source, protocol, recipe, estimated hours and the status of our runs."""
    from mixup_recipes.benchmark import cells
    from mixup_recipes.benchmark.listing import describe
    from mixup_recipes.benchmark.verdicts import of_cells

    if name in settings():
        name = load_recipe(name).name  # a setting alone is its vanilla row
    if name in cells.cells():
        print(describe(cells.find(name), of_cells(results).get(name)))
    else:
        recipe, _ = cells.resolve_cell(name)
        print(f"{recipe.name} is a recipe, but no published cell.\n\n{to_yaml(recipe)}", end="")


@cells_app.command(name="explain")
def explain_cell(name: str) -> None:
    """Every value of a cell's recipe with its origin."""
    from mixup_recipes.benchmark import cells

    print(explain(*cells.resolve_cell(name)))


@cells_app.command(name="diff")
def diff_cells(first: str, second: str) -> None:
    """Recipe fields, mixer arguments and published numbers in which two cells or recipes differ."""
    from mixup_recipes.benchmark.listing import difference

    print(difference(first, second))


@cells_app.command
def export(name: str, *, out: Path | None = None) -> None:
    """A cell's recipe as a file that --recipe accepts."""
    from mixup_recipes.benchmark import cells

    put(to_yaml(cells.resolve_cell(name)[0]), out)


@app.command
def record(*runs: Path, out: Annotated[Path | None, Parameter(help="folder of the records")] = None) -> None:
    """Write run folders of one recipe, one per seed, into its run record."""
    from mixup_recipes.runs import recording, records
    from mixup_recipes.runs.run import Run

    path = recording.save([Run.open(run) for run in runs], out)
    content = records.read_record(path)
    print(f"{path}: {content['recipe']}, seeds {', '.join(content['seeds'])}")
    if unfinished := content["seeds"].keys() - records.finished_seeds(content).keys():
        print(f"left out of tables: seeds {', '.join(sorted(unfinished))}, unfinished or shorter than the protocol")


@app.command
def table(
    *,
    benchmark: str | None = None,
    setting: str | None = None,
    against: str = "vanilla",
    format: str | None = None,
    results: Path | None = None,
    out: Path | None = None,
) -> None:
    """The published tables with our runs beside them, as md, csv, latex or html; or our runs of one setting, as md.

    Parameters
    ----------
    benchmark
        pytorch_100e, pytorch_300e, rsb_a3, rsb_a2, deit or tiny; default all.
    setting
        A setting such as cifar10_small: all mixers that were trained with it, seed by seed.
    against
        With --setting: the mixer that the others are compared with.
    format
        md, csv, latex or html; default what the ending of --out says, else md.
    results
        Folder of run records; default that of this package.
    out
        File to write to.
    """
    from mixup_recipes.benchmark import small_runs, tables, verdicts
    from mixup_recipes.runs import records

    if format is None:
        format = {".csv": "csv", ".tex": "latex", ".html": "html", ".htm": "html"}.get(out.suffix if out else "", "md")
    if setting is not None:
        if benchmark is not None or format != "md":
            raise UserError(f"--setting goes with Markdown and without --benchmark, got {benchmark or format}")
        put(small_runs.small_runs(setting, records.all_records(results), against, results), out)
        return
    if against != "vanilla":
        raise UserError(f"--against {against} needs --setting")

    put(tables.published_table(benchmark, verdicts.of_cells(results), format, results), out)


def put(text: str, out: Path | None) -> None:
    """Print a text, or write it to a file, whole or not at all."""
    if out is None:
        print(text, end="")
        return
    from mixup_recipes.files import write

    write(out, text)
    print(out)


@app.command
def replay(run: Path, *, step: Whole, micro: Whole = 0, out: Path | None = None, data: Path | None = None) -> None:
    """The mixed batch of any update of a run, rebuilt bit for bit: as text, --out FILE.png, --data FILE.safetensors.

    --step counts updates from 0, --micro the micro-batches within one. A mixer that looks at the model needs the
    run's checkpoint of that update.
    """
    from mixup_recipes.data.pictures import check_png
    from mixup_recipes.runs import replay
    from mixup_recipes.runs.run import Run

    if out is not None:
        check_png(out)
    batch = replay.replay(Run.open(run), step, micro)
    print(batch)
    for path, save in ((out, replay.save_picture), (data, replay.save_data)):
        if path is not None:
            save(batch, path)
            print(path)


@app.command
def masks(run: Path, *, pairs: Whole = 6, out: Path = Path("runs/masks.png")) -> None:
    """What a run of automix, samix or adautomix has learned: masks on photos of the evaluation split, as a picture.

    Prints how the mean of the masks follows lambda. Needs a checkpoint of the run.
    """
    from mixup_recipes.pages.masks import masks
    from mixup_recipes.runs.run import Run

    print(masks(Run.open(run), pairs, out), out, sep="\n")


@app.command
def preview(
    *names: str,
    mixers: Annotated[list[str] | None, listed("a row for each, under the recipe's setting or with defaults")] = None,
    images: Whole = 8,
    photos: Annotated[str | None, Parameter(help="folder of images, or 'synthetic' for drawn shapes")] = None,
    out: Path = Path("runs/preview.png"),
) -> None:
    """What recipes or mixers do to a few images, as a picture: rows are methods, columns images.

    Without recipes and mixers: all mixers with their published defaults. Without --photos: the recipe's own images
    when they are on this machine, else the prepared groceries, else drawn shapes.
    """
    from mixup_recipes.pages.preview import preview

    print(preview(list(names), mixers or [], images, photos, out))


@app.command
def check(
    *targets: str,
    alpha: Annotated[float | None, Parameter(help="Beta parameter whose law a callable without such declares")] = None,
    format: Literal["text", "md"] = "text",
) -> int:
    """Hold mixers against the contract: what they do to pixels, labels, lambda, pairs, and to the caller's tensors.

    A target is a mixer (cutmix), timm:mixup, timm:cutmix, torchvision:mixup, torchvision:cutmix, or
    path/to/file.py:callable, a Mixer, a factory, or a function (x, y) -> (x', y'). The file is run. Exit status 1
    when something fails that the contract asks for.
    """
    from mixup_recipes import conformance

    reports = conformance.check(list(targets), alpha)
    print(conformance.table(reports, format), end="")
    return int(not all(report.passed for report in reports))


@app.command
def prepare(name: str) -> None:
    """Download and write a small real data set once: groceries or cifar10."""
    from mixup_recipes.data.prepare import prepare

    print(prepare(name))


@app.command
def supermix(
    recipe: str,
    *,
    out: Annotated[Path, Parameter(help="new folder; what was killed goes on with the same command")],
    teacher: Annotated[str | None, Parameter(help="run folder, hf-hub: or timm name [default: the recipe's]")] = None,
    images: Annotated[Whole | None, Parameter(help="how many [default: as many as the training split has]")] = None,
    steps: Annotated[Whole, Parameter(help="of the search, at most")] = 50,
    seed: Whole = 0,
    all_pairs: Annotated[bool, Parameter(help="keep images whose classes the teacher misses", negative=())] = False,
    with_originals: Annotated[bool, Parameter(help="the training split's images too", negative=())] = False,
    dataset: Annotated[str | None, Parameter(help="where the recipe's data are on this machine")] = None,
) -> None:
    """Mix a recipe's images by SuperMix once, before training; a run takes the folder as its --dataset."""
    from mixup_recipes.training.premix import premix

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        made = premix(recipe, out, teacher, images, steps, seed, all_pairs, with_originals, dataset)
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        raise
    print(f"{out}: {made:,} mixed images")


@app.command
def report(*runs: Path, out: Annotated[Path, Parameter(help="folder to write to")] = Path("runs/report")) -> None:
    """Table, learning curves and mixed samples of finished runs."""
    from mixup_recipes.pages.report import report
    from mixup_recipes.runs.run import Run

    print(report([Run.open(run) for run in runs], out))
    print("\nwritten:", *sorted(str(path) for path in out.iterdir()))


@app.command
def card(
    run: Path,
    *,
    repo_id: Annotated[str | None, Parameter(help="owner/name of the Hub repository that the folder is for")] = None,
    license: Annotated[str | None, Parameter(help="of the weights, as the Hub names it: apache-2.0, mit, ...")] = None,
    out: Annotated[Path | None, Parameter(help="write the card alone to this file")] = None,
) -> None:
    """Write the model card of a run folder; what a person wrote around the generated part stays."""
    from mixup_recipes.pages import card
    from mixup_recipes.runs.run import Run

    for path in card.write_card(Run.open(run), repo_id, license, out):
        print(path)


@app.command
def protocol(
    *logs: Path,
    recipe: str | None = None,
    protocol: Literal["median", "best"] | None = None,
    last: int | None = None,
    epochs: int | None = None,
) -> None:
    """A log's number as the setting's text states it and as OpenMixup's tools compute it.

    A log is a run folder, our log.jsonl or summary.csv, an OpenMixup JSON log or a folder of them, or timm's
    summary.csv; of several logs the mean over the newest three is told too. The rule is the run's own, that of
    --recipe, or --protocol median or best, --last and --epochs.
    """
    from mixup_recipes.runs.curves import describe, opened

    print(describe([opened(log) for log in logs], recipe, protocol, last, epochs))


@app.command
def compare(
    *,
    a: Annotated[list[Path], listed("runs of one method, a seed each")],
    b: Annotated[list[Path], listed("runs of the other")],
    ignore: Annotated[list[str] | None, listed("recipe fields that may differ beside the mixer")] = None,
) -> None:
    """The difference of two methods' top-1 on the same images, with its 95 % interval."""
    from mixup_recipes.runs.compare import compare
    from mixup_recipes.runs.run import Run

    print(compare([Run.open(run) for run in a], [Run.open(run) for run in b], tuple(ignore or ())))


@app.command
def push(
    run: Path,
    *,
    repo_id: Annotated[str | None, Parameter(help="NAME or OWNER/NAME [default: as before, or the usual name]")] = None,
    private: Annotated[bool | None, Parameter(help="make the repository private")] = None,
    strategy: Annotated[str | None, Parameter(help="checkpoint or all_checkpoints: state of training too")] = None,
) -> None:
    """Publish a run folder on the Hub, or finish a push that failed: one commit, and none when nothing changed."""
    from mixup_recipes.hub import push as hub
    from mixup_recipes.runs.run import Run

    pushed = hub.push(Run.open(run), repo_id, private, strategy)
    print(f"{pushed.url}: {'published' if pushed.changed else 'up to date'}")


@app.command
def verify(
    model: str,
    *,
    dataset: Annotated[str | None, Parameter(help="where the recipe's data are on this machine")] = None,
    batch_size: Whole = 64,
) -> int:
    """Whether card, results, log and weights of hf-hub:OWNER/NAME or a run folder agree; exit status 1 when not.

    The weights are evaluated again by the recipe's own protocol.
    """
    from mixup_recipes.hub.verify import verify
    from mixup_recipes.runs.run import Run

    text, good = verify(Run.open(model), dataset, batch_size)
    print(text)
    return int(not good)


@app.command
def sweep(
    file: Annotated[Path | None, Parameter(help="sweep file; flags add to it")] = None,
    *,
    recipes: Annotated[list[str] | None, listed("recipe names or files", "--recipes")] = None,
    seeds: Annotated[list[str] | None, listed("seeds of each recipe", "--seeds")] = None,
    set_: Annotated[list[str] | None, listed("flags of train_mixup.py for all runs, epochs=20 ...", "--set")] = None,
    grid: Annotated[list[str] | None, listed("fields to vary, lr=0.1,0.2 ...: every combination", "--grid")] = None,
    launcher: Annotated[str | None, Parameter(help="what starts train_mixup.py, 'accelerate launch'")] = None,
    output_dir: Annotated[str | None, Parameter(help="folder of all runs and results [default: runs/sweep]")] = None,
    dry_run: Annotated[bool, Parameter(help="print commands and states only", negative=())] = False,
    report: Annotated[bool, Parameter(help="tables and plots of what is finished, no runs", negative=())] = False,
    slurm: Annotated[Path | None, Parameter(help="write an sbatch script instead of running")] = None,
    slurm_options: Annotated[list[str] | None, listed("of sbatch, gres=gpu:1 time=12:00:00", "--slurm_options")] = None,
) -> int:
    """Recipes x grid x seeds, one run after another; what is finished is skipped. Then tables and plots."""
    from mixup_recipes.pages.sweep import sweep

    parts = {"recipes": recipes, "seeds": seeds, "launcher": launcher, "output_dir": output_dir}
    return sweep(file, parts | {"set": set_, "grid": grid}, dry_run, report, slurm, slurm_options)


Picture = Annotated[Path, Parameter(help="file to write, .png or .svg")]


@plot_app.command
def curves(*runs: Path, out: Picture) -> None:
    """Training loss and top-1 over epochs."""
    from mixup_recipes.pages import plots
    from mixup_recipes.runs.run import Run

    plots.curves([Run.open(run) for run in runs], out)


@plot_app.command
def cost(*runs: Path, out: Picture) -> None:
    """Top-1 against training time, relative to vanilla where a vanilla run of the same machine is among the runs."""
    from mixup_recipes.pages import plots
    from mixup_recipes.runs.run import Run

    plots.cost([Run.open(run) for run in runs], out)


@plot_app.command
def dots(*runs: Path, out: Picture, published: bool = False) -> None:
    """Top-1 of each seed with mean and standard deviation, a row per mixer, a panel per setting.

    Parameters
    ----------
    published
        Draw the published numbers of the runs' setting too.
    """
    from mixup_recipes.benchmark.published import published as published_numbers
    from mixup_recipes.pages import plots
    from mixup_recipes.runs.run import Run

    opened = [Run.open(run) for run in runs]
    plots.dots(opened, out, published_numbers(opened) if published else None)


def main() -> None:
    """Entry point."""
    cli.run(command)


def command() -> int | None:
    """The command that the arguments ask for. A file or folder that the system does not let us use is one line."""
    try:
        return app(sys.argv[1:])
    except OSError as e:
        if e.filename is None:  # no file of the user's
            raise
        raise UserError(f"{e.filename}: {e.strerror}") from None


if __name__ == "__main__":
    main()
