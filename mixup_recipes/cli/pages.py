"""Commands that make something of finished runs: tables, reports, plots, records, model cards, publications."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from mixup_recipes.cli.base import Output, Repository, Results, RunFolder, Whole, app, group, listed, put, said, text
from mixup_recipes.typed import UserError

Runs = Annotated[Path, Parameter(metavar="RUNS", help="Run folders.")]
Picture = Annotated[Path, said("Picture to write, a .png or .svg file.")]
plot = group("plot", "Draw runs into a .png or .svg file.")


@app.command
def record(
    *runs: Runs,
    out: Annotated[
        Path | None, said("Folder of the records. The default is model_cards/results of this package.")
    ] = None,
) -> None:
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
    benchmark: Annotated[
        str | None, text("Benchmark, such as deit, rsb_a3, cifar100 or cub200. The default is all.")
    ] = None,
    setting: Annotated[
        str | None,
        text("Show our runs of a setting, such as cifar10_small: every mixer trained with it, seed by seed."),
    ] = None,
    against: Annotated[str, text("With --setting: the mixer that the others are compared with.")] = "vanilla",
    beside: Annotated[
        tuple[str, ...],
        Parameter(
            metavar="TEXT",
            consume_multiple=True,
            show_default=False,
            help="With --setting: published settings, such as cifar10_r18_200e, whose order of mixers is compared with "
            "that of our runs.",
        ),
    ] = (),
    plot: Annotated[
        Path | None,
        said("With --setting: PNG or SVG file for a picture of top-1 against the time of an update."),
    ] = None,
    format: Annotated[
        Literal["md", "csv", "latex", "html"] | None,
        said("Format of the table. The default follows the ending of --out, else it is md."),
    ] = None,
    results: Results = None,
    out: Output = None,
) -> None:
    """Print the published tables with our runs beside them, or our runs of one setting.

    The published tables can be md, csv, latex or html. The table of a setting is md.
    """
    from mixup_recipes.benchmark import small_runs, tables, verdicts
    from mixup_recipes.runs import records

    endings = {".csv": "csv", ".tex": "latex", ".html": "html", ".htm": "html"}
    written = format or endings.get(out.suffix if out else "", "md")
    if setting is not None:
        if benchmark is not None or written != "md":
            raise UserError(f"--setting goes with Markdown and without --benchmark, got {benchmark or written}")
        found = records.all_records(results)
        shown = small_runs.small_runs(setting, found, against, results, beside)
        if plot is not None:
            from mixup_recipes.pages.record_plot import cost_of_records

            cost_of_records(setting, small_runs.points(setting, found), plot)
        put(shown, out)
        return
    alone = {f"--against {against}": against != "vanilla", f"--beside {' '.join(beside)}": beside, "--plot": plot}
    if given := [flag for flag, there in alone.items() if there]:
        raise UserError(f"{given[0]} needs --setting")
    put(tables.published_table(benchmark, verdicts.of_cells(results), written, results), out)


@app.command
def leaderboard(
    *runs: Annotated[Path, Parameter(metavar="RUNS", help="Run folders whose curves are shown too.")],
    out: Annotated[Path, said("Folder to write to.")] = Path("site"),
    results: Results = None,
) -> None:
    """Write a page to browse and share, with published numbers, our runs beside them, and accuracy against cost.

    The folder gets an index.html, which works as a file and on GitHub Pages, and a README.md that makes it a static
    Space.
    """
    from mixup_recipes.pages.leaderboard import leaderboard

    print(*leaderboard(out, results, list(runs)), sep="\n")


@app.command
def report(*runs: Runs, out: Annotated[Path, said("Folder to write to.")] = Path("runs/report")) -> None:
    """Write a report of runs: tables, learning curves and mixed samples.

    For each run it also has scores by class, confusions, errors and calibration.
    """
    from mixup_recipes.pages.report import report
    from mixup_recipes.runs.run import Run

    print(report([Run.open(run) for run in runs], out))
    print("\nwritten:", *sorted(str(path) for path in out.iterdir()))


@app.command
def protocol(
    *logs: Annotated[Path, Parameter(metavar="LOGS", help="Run folders, logs or folders of logs.")],
    recipe: Annotated[str | None, text("Recipe whose rule is used.")] = None,
    protocol: Annotated[
        Literal["median", "best", "best_of_last"] | None,
        said("Rule: the median of the last epochs, the best epoch, or the best of the last epochs."),
    ] = None,
    last: Annotated[Whole | None, said("Number of epochs that the rule means by the last epochs.")] = None,
    epochs: Annotated[Whole | None, said("Number of epochs that were planned.")] = None,
) -> None:
    """Print a log's number as the setting's text states it and as OpenMixup's tools compute it.

    A log is a run folder, our log.jsonl or summary.csv, an OpenMixup JSON log or a folder of them, or timm's
    summary.csv. For several logs the command also prints the mean over the newest three. The rule is the run's own,
    that of --recipe, or that of --protocol, --last and --epochs.
    """
    from mixup_recipes.runs.curves import describe, opened

    print(describe([opened(log) for log in logs], recipe, protocol, last, epochs))


@app.command
def compare(
    *,
    a: Annotated[list[Path], listed("Runs of one method, one for each seed.", metavar="RUNS...")],
    b: Annotated[list[Path], listed("Runs of the other method, one for each seed.", metavar="RUNS...")],
    ignore: Annotated[list[str] | None, listed("Recipe fields that may differ, beside the mixer.")] = None,
) -> None:
    """Compare the top-1, or mAP, of two methods on the same images, with the 95 % interval of the difference."""
    from mixup_recipes.runs.compare import compare
    from mixup_recipes.runs.run import Run

    print(compare([Run.open(run) for run in a], [Run.open(run) for run in b], tuple(ignore or ())))


@app.command
def robustness(
    *runs: Annotated[Path, Parameter(metavar="RUNS", help="Run folders, or JSON files that the suite wrote.")],
    out: Output = None,
) -> None:
    """Show the robustness results of several runs side by side, as Markdown.

    `mixup-recipes evaluate RUN --suite robustness` measures them.
    """
    from mixup_recipes.pages.robustness import side_by_side

    put(side_by_side(runs), out)


@app.command
def card(
    run: RunFolder,
    *,
    hub_model_id: Repository = None,
    license: Annotated[
        str | None, text("Licence of the weights, as the Hub names it, such as apache-2.0 or mit.")
    ] = None,
    out: Annotated[Path | None, said("Write only the card, to this file.")] = None,
) -> None:
    """Write the model card of a run folder.

    What a person wrote around the generated part stays.
    """
    from mixup_recipes.pages import card
    from mixup_recipes.runs.run import Run

    for path in card.write_card(Run.open(run), hub_model_id, license, out):
        print(path)


@app.command
def push(
    run: RunFolder,
    *,
    hub_model_id: Repository = None,
    private: Annotated[
        bool | None, Parameter(name=("--hub_private_repo", "--private"), help="Make the repository private.")
    ] = None,
    strategy: Annotated[
        Literal["end", "every_save", "checkpoint", "all_checkpoints"] | None,
        said(
            "checkpoint also publishes the newest checkpoint, all_checkpoints all that the run keeps. The others "
            "publish none.",
            "--hub_strategy",
            "--strategy",
        ),
    ] = None,
) -> None:
    """Publish a run folder on the Hub, or finish a push that failed.

    A push is one commit, and none when nothing changed. What is not given is as at the last push. At the first push the
    repository has its usual name, MODEL.MIXER_eEPOCHS_DATASET of the token's user.
    """
    from mixup_recipes.hub import push as hub
    from mixup_recipes.runs.run import Run

    pushed = hub.push(Run.open(run), hub_model_id, private, strategy)
    print(f"{pushed.url}: {'published' if pushed.changed else 'up to date'}")


@plot.command
def curves(*runs: Runs, out: Picture) -> None:
    """Draw training loss and top-1 over epochs."""
    from mixup_recipes.pages import plots
    from mixup_recipes.runs.run import Run

    plots.curves([Run.open(run) for run in runs], out)


@plot.command
def cost(*runs: Runs, out: Picture) -> None:
    """Draw top-1 against training time.

    The time is relative to vanilla where a vanilla run of the same machine is among the runs.
    """
    from mixup_recipes.pages import plots
    from mixup_recipes.runs.run import Run

    plots.cost([Run.open(run) for run in runs], out)


@plot.command
def dots(
    *runs: Runs,
    out: Picture,
    published: Annotated[bool, said("Draw the published numbers of the setting too.")] = False,
) -> None:
    """Draw top-1 of each seed with mean and standard deviation.

    Each mixer has a row, each setting a panel.
    """
    from mixup_recipes.benchmark.published import published as published_numbers
    from mixup_recipes.pages import plots
    from mixup_recipes.runs.run import Run

    opened = [Run.open(run) for run in runs]
    plots.dots(opened, out, published_numbers(opened) if published else None)
