"""Commands that make something of finished runs: tables, reports, plots, records, model cards, publications."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from mixup_recipes.cli.base import Repository, Results, RunFolder, Whole, app, group, listed, put, said, text
from mixup_recipes.typed import UserError

Runs = Annotated[Path, Parameter(metavar="RUNS", help="run folders")]
Picture = Annotated[Path, said("file to write, .png or .svg")]
plot = group("plot", "Draw runs into a .png or .svg file.")


@app.command
def record(*runs: Runs, out: Annotated[Path | None, said("folder of the records")] = None) -> None:
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
    benchmark: Annotated[str | None, text("such as deit, rsb_a3, cifar100 or cub200 [default: all]")] = None,
    setting: Annotated[
        str | None, text("such as cifar10_small: all mixers that were trained with it, seed by seed")
    ] = None,
    against: Annotated[str, text("with --setting: the mixer that the others are compared with")] = "vanilla",
    beside: Annotated[
        tuple[str, ...],
        Parameter(
            metavar="TEXT",
            consume_multiple=True,
            help="with --setting: published settings whose order of mixers is compared with it, cifar10_r18_200e ...",
        ),
    ] = (),
    format: Annotated[
        Literal["md", "csv", "latex", "html"] | None, said("default: by the ending of --out, else md")
    ] = None,
    results: Results = None,
    out: Annotated[Path | None, said("file to write to")] = None,
) -> None:
    """The published tables with our runs beside them, as md, csv, latex or html; or our runs of one setting, as md."""
    from mixup_recipes.benchmark import small_runs, tables, verdicts
    from mixup_recipes.runs import records

    endings = {".csv": "csv", ".tex": "latex", ".html": "html", ".htm": "html"}
    written = format or endings.get(out.suffix if out else "", "md")
    if setting is not None:
        if benchmark is not None or written != "md":
            raise UserError(f"--setting goes with Markdown and without --benchmark, got {benchmark or written}")
        put(small_runs.small_runs(setting, records.all_records(results), against, results, beside), out)
        return
    alone = {f"--against {against}": against != "vanilla", f"--beside {' '.join(beside)}": beside}
    if given := [flag for flag, there in alone.items() if there]:
        raise UserError(f"{given[0]} needs --setting")
    put(tables.published_table(benchmark, verdicts.of_cells(results), written, results), out)


@app.command
def leaderboard(
    *runs: Annotated[Path, Parameter(metavar="RUNS", help="run folders whose curves are shown too")],
    out: Annotated[Path, said("folder to write to")] = Path("site"),
    results: Results = None,
) -> None:
    """A page to browse and share: published numbers, our runs beside them, accuracy against cost.

    The folder gets an index.html, which works as a file and on GitHub Pages, and a README.md that makes it a static
    Space.
    """
    from mixup_recipes.pages.leaderboard import leaderboard

    print(*leaderboard(out, results, list(runs)), sep="\n")


@app.command
def report(*runs: Runs, out: Annotated[Path, said("folder to write to")] = Path("runs/report")) -> None:
    """Tables, learning curves and mixed samples of runs; of each, scores by class, confusions, errors, calibration."""
    from mixup_recipes.pages.report import report
    from mixup_recipes.runs.run import Run

    print(report([Run.open(run) for run in runs], out))
    print("\nwritten:", *sorted(str(path) for path in out.iterdir()))


@app.command
def protocol(
    *logs: Annotated[Path, Parameter(metavar="LOGS", help="run folders, logs or folders of logs")],
    recipe: Annotated[str | None, text("whose rule is meant")] = None,
    protocol: Annotated[Literal["median", "best", "best_of_last"] | None, said("the rule")] = None,
    last: Annotated[Whole | None, said("how many epochs the last ones are")] = None,
    epochs: Annotated[Whole | None, said("epochs that were planned")] = None,
) -> None:
    """A log's number as the setting's text states it and as OpenMixup's tools compute it.

    A log is a run folder, our log.jsonl or summary.csv, an OpenMixup JSON log or a folder of them, or timm's
    summary.csv; of several logs the mean over the newest three is told too. The rule is the run's own, that of
    --recipe, or --protocol, --last and --epochs.
    """
    from mixup_recipes.runs.curves import describe, opened

    print(describe([opened(log) for log in logs], recipe, protocol, last, epochs))


@app.command
def compare(
    *,
    a: Annotated[list[Path], listed("runs of one method, a seed each", metavar="RUNS...")],
    b: Annotated[list[Path], listed("runs of the other", metavar="RUNS...")],
    ignore: Annotated[list[str] | None, listed("recipe fields that may differ beside the mixer")] = None,
) -> None:
    """The difference of two methods' top-1, or mAP, on the same images, with its 95 % interval."""
    from mixup_recipes.runs.compare import compare
    from mixup_recipes.runs.run import Run

    print(compare([Run.open(run) for run in a], [Run.open(run) for run in b], tuple(ignore or ())))


@app.command
def robustness(
    *runs: Annotated[Path, Parameter(metavar="RUNS", help="run folders, or JSON files that the suite wrote")],
    out: Annotated[Path | None, said("file to write to")] = None,
) -> None:
    """What `evaluate RUN --suite robustness` found of several runs, side by side, as Markdown."""
    from mixup_recipes.pages.robustness import side_by_side

    put(side_by_side(runs), out)


@app.command
def card(
    run: RunFolder,
    *,
    hub_model_id: Repository = None,
    license: Annotated[str | None, text("of the weights, as the Hub names it: apache-2.0, mit, ...")] = None,
    out: Annotated[Path | None, said("write the card alone to this file")] = None,
) -> None:
    """Write the model card of a run folder; what a person wrote around the generated part stays."""
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
        bool | None, Parameter(name=("--hub_private_repo", "--private"), help="make the repository private")
    ] = None,
    strategy: Annotated[
        Literal["end", "every_save", "checkpoint", "all_checkpoints"] | None,
        said("with checkpoint or all_checkpoints: state of training too", "--hub_strategy", "--strategy"),
    ] = None,
) -> None:
    """Publish a run folder on the Hub, or finish a push that failed: one commit, and none when nothing changed.

    What is not given is as at the last push, or the usual name.
    """
    from mixup_recipes.hub import push as hub
    from mixup_recipes.runs.run import Run

    pushed = hub.push(Run.open(run), hub_model_id, private, strategy)
    print(f"{pushed.url}: {'published' if pushed.changed else 'up to date'}")


@plot.command
def curves(*runs: Runs, out: Picture) -> None:
    """Training loss and top-1 over epochs."""
    from mixup_recipes.pages import plots
    from mixup_recipes.runs.run import Run

    plots.curves([Run.open(run) for run in runs], out)


@plot.command
def cost(*runs: Runs, out: Picture) -> None:
    """Top-1 against training time, relative to vanilla where a vanilla run of the same machine is among the runs."""
    from mixup_recipes.pages import plots
    from mixup_recipes.runs.run import Run

    plots.cost([Run.open(run) for run in runs], out)


@plot.command
def dots(
    *runs: Runs, out: Picture, published: Annotated[bool, said("the published numbers of the setting too")] = False
) -> None:
    """Top-1 of each seed with mean and standard deviation, a row per mixer, a panel per setting."""
    from mixup_recipes.benchmark.published import published as published_numbers
    from mixup_recipes.pages import plots
    from mixup_recipes.runs.run import Run

    opened = [Run.open(run) for run in runs]
    plots.dots(opened, out, published_numbers(opened) if published else None)
