"""Commands that compute: training, evaluation, predictions, sweeps, data sets, pictures of methods, checks."""

import signal
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

import evaluate_mixup
import train_mixup
from mixup_recipes import flags
from mixup_recipes.cli.base import Model, RecipeName, RunFolder, Whole, app, leaving_at_once, listed, said, text
from mixup_recipes.files import aside
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.job import Job
from mixup_recipes.typed import UserError, nearest
from mixup_recipes.words import many

# Their flags are those of the scripts, which read the command line themselves.
SCRIPTS = {"train": train_mixup.main, "evaluate": evaluate_mixup.main}
TRAIN = (
    "Train one recipe: mixup-recipes train --recipe deit_s_cutmix. On several GPUs: accelerate launch train_mixup.py"
)
EVALUATE = "Score a model: mixup-recipes evaluate RUN. On several GPUs: accelerate launch evaluate_mixup.py"
app.command(flags.command("train", TRAIN, {"Run": Job, "Recipe fields": Recipe}))
app.command(flags.command("evaluate", EVALUATE, {"Evaluation": evaluate_mixup.Evaluation}, evaluate_mixup.MODEL))


@app.command
def predict(
    run: Annotated[str, text("run folder, timm name or hf-hub:OWNER/NAME", "--run", "--model")],
    *images: Annotated[str, Parameter(metavar="IMAGES", help="files, folders or globs")],
    top_k: Annotated[Whole, said("how many classes of each image")] = 5,
    out: Annotated[Path | None, said("write them to this .csv or .jsonl file [default: print]")] = None,
    batch_size: Annotated[Whole, said("images per forward")] = 64,
    tta: Annotated[
        Literal["none", "flip", "five_crop", "ten_crop"], said("average the probabilities of several views of an image")
    ] = "none",
) -> int:
    """The likeliest classes of images, with probabilities. An image that cannot be read has a line that says so."""
    from mixup_recipes.runs.predict import predict

    return predict(run, list(images), top_k, batch_size, out, tta)


@app.command
def export(
    run: Annotated[str, text("run folder, timm name or hf-hub:OWNER/NAME", "--run", "--model")],
    *,
    out: Annotated[Path, said("file to write: .onnx, .pt (TorchScript) or .pt2 (torch.export)")],
    format: Annotated[
        Literal["onnx", "torchscript", "torch_export"] | None, said("default: by the ending of --out")
    ] = None,
) -> None:
    """A trained model as one file for other programs, checked against the model and its run; shows how to use it.

    The normalisation is inside, what else is done to a picture is in the file's metadata. ONNX needs the extra:
    pip install 'mixup-recipes[export]'.
    """
    with leaving_at_once(aside(out)):
        from mixup_recipes.runs.deploy import deploy

        print(deploy(run, format, out))


@app.command
def soup(
    *runs: Annotated[str, Parameter(metavar="RUNS", help="run folders or hf-hub:OWNER/NAME, of one architecture")],
    out: Annotated[Path, said("new folder for the model")],
    greedy: Annotated[bool, said("best run first, and each of the others unless the held-out score falls")] = False,
    last: Annotated[Whole | None, said("of one run: average its newest checkpoints, so many")] = None,
    bn_samples: Annotated[Whole, said("training images of the first run, for BatchNorm's statistics")] = 1024,
    dataset: Annotated[str | None, text("where the data of the first run are on this machine")] = None,
    batch_size: Annotated[Whole, said("images per forward of an evaluation")] = 64,
) -> None:
    """One model whose weights are the average of those of several runs, or of the last checkpoints of one run.

    Classes go by their names. The folder is one that evaluate, predict and export take; soup.json says what went in.
    """
    from mixup_recipes.runs.soup import soup

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left half-written
    print(soup(runs, out, greedy, last, bn_samples, dataset, batch_size))


@app.command
def probe(
    run: Annotated[str, text("run folder, timm name, hf-hub:OWNER/NAME or prepared weights", "--run", "--model")],
    *,
    method: Annotated[
        Literal["knn", "linear", "both"], said("nearest neighbours, a linear classifier, or both")
    ] = "both",
    recipe: Annotated[str | None, text("take data and evaluation fields from this recipe; a run has its own")] = None,
    dataset: Annotated[str | None, text("data instead of the recipe's: Hub id, prepared set or folder")] = None,
    train_split: Annotated[str | None, text("split to learn from [default: the recipe's, or train]")] = None,
    split: Annotated[str | None, text("split to score on [default: the recipe's, or validation]")] = None,
    image_column: Annotated[str | None, text("column with the encoded images")] = None,
    label_column: Annotated[str | None, text("column with the class")] = None,
    max_train_samples: Annotated[Whole | None, said("learn from the first n images of a fixed shuffle")] = None,
    max_eval_samples: Annotated[Whole | None, said("score the first n images of a fixed shuffle")] = None,
    k: Annotated[list[str] | None, listed("neighbours [default: 10 20 100 200]", metavar="INT...")] = None,
    temperature: Annotated[float, said("of the neighbours' votes")] = 0.07,
    batch_size: Annotated[Whole, said("images per forward")] = 64,
    on_bad_image: Annotated[Literal["stop", "skip"], said("a corrupt image stops the probe, or is left out")] = "stop",
    dataloader_num_workers: Annotated[Whole | None, said("loader processes [default: as in evaluate]")] = None,
    features: Annotated[Path | None, said("keep the features in this .safetensors file, or take them from it")] = None,
    output: Annotated[Path | None, said("write the scores to this JSON file too")] = None,
) -> None:
    """How good a frozen model's features are: top-1 and top-5 of nearest neighbours and of a linear classifier on them.

    Both learn from the training split's features and are scored on the evaluation split's; images are seen as in an
    evaluation.
    """
    from mixup_recipes.runs.probe import probe

    given: dict[str, Any] = {"dataset": dataset, "train_split": train_split, "eval_split": split}
    given |= {"image_column": image_column, "label_column": label_column, "max_train_samples": max_train_samples}
    given |= {"max_eval_samples": max_eval_samples, "batch_size": batch_size, "per_device_train_batch_size": batch_size}
    changes = {name: value for name, value in given.items() if value is not None}
    methods = ("knn", "linear") if method == "both" else (method,)
    more = (on_bad_image, dataloader_num_workers, features, output)
    print(probe(run, methods, changes, recipe, k, temperature, *more))


@app.command
def sweep(
    file: Annotated[Path | None, said("sweep file; flags add to it")] = None,
    *,
    recipes: Annotated[list[str] | None, listed("recipe names or files")] = None,
    seeds: Annotated[list[str] | None, listed("seeds of each recipe", metavar="INT...")] = None,
    set_: Annotated[list[str] | None, listed("flags of train_mixup.py for all runs, epochs=20 ...", "--set")] = None,
    grid: Annotated[list[str] | None, listed("fields to vary, lr=0.1,0.2 ...: every combination")] = None,
    launcher: Annotated[str | None, text("what starts train_mixup.py, 'accelerate launch'; slurm: jobs of it")] = None,
    output_dir: Annotated[str | None, text("folder of all runs and results [default: runs/sweep]")] = None,
    jobs: Annotated[Whole | None, said("runs at a time, each on a GPU or a share of the cores [default: 1]")] = None,
    dry_run: Annotated[bool, said("print commands and states only")] = False,
    report: Annotated[bool, said("tables and plots of what is finished, no runs")] = False,
    slurm: Annotated[Path | None, said("write an sbatch script instead of running")] = None,
    slurm_options: Annotated[list[str] | None, listed("of sbatch, gres=gpu:1 time=12:00:00")] = None,
) -> int:
    """Recipes x grid x seeds, --jobs runs at a time; what is finished is skipped. Then tables and plots.

    --launcher slurm submits each run as a job of a Slurm cluster, and says what became of those submitted before.
    """
    from mixup_recipes.pages.sweep import sweep

    parts = {"recipes": recipes, "seeds": seeds, "launcher": launcher, "output_dir": output_dir}
    parts |= {"slurm_options": slurm_options}
    return sweep(file, parts | {"set": set_, "grid": grid}, dry_run, report, slurm, jobs)


@app.command
def prepare(
    name: Annotated[str, text("a data set such as cifar100 or cub200, or weights: efficientnet_lite0")],
    *,
    from_: Annotated[list[str] | None, listed("what its authors distribute: archives, or a folder", "--from")] = None,
    folder: Annotated[Path | None, said("write its images too, as FOLDER/SPLIT/CLASS/IMAGE")] = None,
) -> None:
    """Write a data set, or trained weights, once and whole; recipes find it by its name.

    Downloaded: groceries (61 MB), cifar10, cifar100, efficientnet_lite0. Of cub200, aircraft, inat2017, inat2018 and
    places205 download what the authors have and pass it: prepare cub200 --from CUB_200_2011.tgz. Numbers of images and
    classes must be those that the authors publish.
    """
    from mixup_recipes.data.prepare import PREPARED, prepare, unpack
    from mixup_recipes.training.known_weights import WEIGHTS, prepare_weights

    if name not in (known := [*PREPARED, *WEIGHTS]):
        raise UserError(f"unknown prepared data set or weights {name!r}; {nearest(name, known)}")
    if name in WEIGHTS and from_:
        raise UserError(f"{name} is downloaded; leave out --from")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that nothing half-written is left
    paths = [Path(word).expanduser() for word in from_ or ()]
    place = prepare_weights(name) if name in WEIGHTS else prepare(name, paths)
    if folder is not None:
        unpack(place, folder)
    print(folder or place)


@app.command
def supermix(
    recipe: RecipeName,
    *,
    out: Annotated[Path, said("new folder; what was killed goes on with the same command")],
    teacher: Annotated[str | None, text("run folder, hf-hub: or timm name [default: the recipe's]")] = None,
    images: Annotated[Whole | None, said("how many [default: as many as the training split has]")] = None,
    steps: Annotated[Whole, said("of the search, at most")] = 50,
    seed: Whole = 0,
    all_pairs: Annotated[bool, said("keep images whose classes the teacher misses")] = False,
    with_originals: Annotated[bool, said("the training split's images too")] = False,
    dataset: Annotated[str | None, text("where the recipe's data are on this machine")] = None,
) -> None:
    """Mix a recipe's images by SuperMix once, before training; a run takes the folder as its --dataset."""
    from mixup_recipes.training.premix import premix

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    made = premix(recipe, out, teacher, images, steps, seed, all_pairs, with_originals, dataset)
    print(f"{out}: {many(made, 'mixed image')}")


@app.command
def preview(
    *names: Annotated[str, Parameter(metavar="NAMES", help="recipes or run folders")],
    mixers: Annotated[list[str] | None, listed("a row for each, under the recipe's setting or with defaults")] = None,
    images: Annotated[Whole, said("how many")] = 8,
    photos: Annotated[str | None, text("folder of images, or 'synthetic' for drawn shapes")] = None,
    out: Annotated[Path, said("file to write, .png")] = Path("runs/preview.png"),
) -> None:
    """What recipes, runs or mixers do to a few images, as a picture: rows are methods, columns images.

    Without names and mixers: all mixers with their published defaults. Without --photos: the recipe's own images
    when they are on this machine, else the prepared groceries, else drawn shapes.
    """
    from mixup_recipes.pages.preview import preview

    print(preview(list(names), mixers or [], images, photos, out))


@app.command
def masks(
    run: RunFolder,
    *,
    pairs: Annotated[Whole, said("rows of the picture")] = 6,
    out: Annotated[Path, said("file to write, .png")] = Path("runs/masks.png"),
) -> None:
    """What a run of automix, samix or adautomix has learned: masks on photos of the evaluation split, as a picture.

    Prints how the mean of the masks follows lambda. Needs a checkpoint of the run.
    """
    from mixup_recipes.pages.masks import masks
    from mixup_recipes.runs.run import Run

    print(masks(Run.open(run), pairs, out), out, sep="\n")


@app.command
def replay(
    run: RunFolder,
    *,
    step: Annotated[Whole, said("update, counted from 0")],
    micro: Annotated[Whole, said("micro-batch within the update, counted from 0")] = 0,
    out: Annotated[Path | None, said("draw it into this .png file")] = None,
    data: Annotated[Path | None, said("write it to this .safetensors file")] = None,
) -> None:
    """The mixed batch of any update of a run, rebuilt bit for bit: as text, picture or tensors.

    A mixer that looks at the model needs the run's checkpoint of that update.
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
def check(
    *targets: Annotated[str, Parameter(metavar="TARGETS", help="mixers, timm:cutmix, path/to/file.py:callable ...")],
    alpha: Annotated[float | None, said("Beta parameter whose law a callable without such declares")] = None,
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
def verify(
    run: Model,
    *,
    dataset: Annotated[str | None, text("where the recipe's data are on this machine")] = None,
    batch_size: Annotated[Whole, said("images per forward")] = 64,
) -> int:
    """Whether card, results, log and weights of a model on the Hub or of a run folder agree; exit status 1 when not.

    The weights are evaluated again by the recipe's own protocol.
    """
    from mixup_recipes.hub.verify import verify
    from mixup_recipes.runs.run import Run

    text, good = verify(Run.open(run), dataset, batch_size)
    print(text)
    return int(not good)
