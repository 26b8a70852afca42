"""Commands that compute: training, evaluation, predictions, sweeps, data sets, pictures of methods, checks."""

import signal
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

import evaluate_mixup
import train_mixup
from mixup_recipes import flags
from mixup_recipes.cli.base import (
    AnyModel,
    Model,
    RecipeName,
    RunFolder,
    Whole,
    app,
    leaving_at_once,
    listed,
    said,
    text,
)
from mixup_recipes.files import aside
from mixup_recipes.recipe import Recipe
from mixup_recipes.training.job import Job
from mixup_recipes.typed import UserError, nearest
from mixup_recipes.words import many

# Their flags are those of the scripts, which read the command line themselves.
SCRIPTS = {"train": train_mixup.main, "evaluate": evaluate_mixup.main}
TRAIN = """Train one recipe.

For example: `mixup-recipes train --recipe deit_s_cutmix`. On several GPUs, start the script instead:
`accelerate launch train_mixup.py --recipe deit_s_cutmix`.
"""
EVALUATE = evaluate_mixup.__doc__ or ""
VIEWS = flags.field_docs(evaluate_mixup.Evaluation)["tta"]
app.command(flags.command("train", TRAIN, {"Run": Job, "Recipe fields": Recipe}))
app.command(flags.command("evaluate", EVALUATE, {"Evaluation": evaluate_mixup.Evaluation}, evaluate_mixup.MODEL))


@app.command
def predict(
    run: AnyModel,
    *images: Annotated[str, Parameter(metavar="IMAGES", help="Image files, folders of images, or globs.")],
    top_k: Annotated[Whole, said("Number of classes to list for each image.")] = 5,
    out: Annotated[
        Path | None, said("Write the predictions to this .csv or .jsonl file instead of printing them.")
    ] = None,
    batch_size: Annotated[Whole, said("Images per forward pass.")] = 64,
    tta: Annotated[Literal["none", "flip", "five_crop", "ten_crop"], said(VIEWS)] = "none",
) -> int:
    """Predict the likeliest classes of images, with their probabilities.

    An image that cannot be read gets a line that says so. The exit status is 1 when no image can be read.
    """
    from mixup_recipes.runs.predict import predict

    return predict(run, list(images), top_k, batch_size, out, tta)


@app.command
def export(
    run: AnyModel,
    *,
    out: Annotated[Path, said("File to write: .onnx, .pt (TorchScript) or .pt2 (torch.export).")],
    format: Annotated[
        Literal["onnx", "torchscript", "torch_export"] | None,
        said("Format of the file. The default follows the ending of --out."),
    ] = None,
) -> None:
    """Write a trained model as one file for other programs, and show how to use it.

    The file is checked against the model and its run. The normalisation is inside the file. Its metadata say what else
    is done to a picture. ONNX needs the extra: `pip install 'mixup-recipes[export]'`.
    """
    with leaving_at_once(aside(out)):
        from mixup_recipes.runs.deploy import deploy

        print(deploy(run, format, out))


@app.command
def soup(
    *runs: Annotated[str, Parameter(metavar="RUNS", help="Run folders or hf-hub:OWNER/NAME, of one architecture.")],
    out: Annotated[Path, said("New folder for the model.")],
    greedy: Annotated[
        bool, said("Start with the best run, and add each of the others unless the held-out score falls.")
    ] = False,
    last: Annotated[Whole | None, said("Average the newest n checkpoints of one run.")] = None,
    bn_samples: Annotated[
        Whole, said("Number of training images of the first run from which BatchNorm's statistics are taken.")
    ] = 1024,
    dataset: Annotated[str | None, text("Place of the first run's data on this machine.")] = None,
    batch_size: Annotated[Whole, said("Images per forward pass of an evaluation.")] = 64,
) -> None:
    """Average the weights of several runs, or of the last checkpoints of one run, into one model.

    Classes are matched by their names. The commands evaluate, predict and export take the new folder. Its soup.json
    says what went in.
    """
    from mixup_recipes.runs.soup import soup

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left half-written
    print(soup(runs, out, greedy, last, bn_samples, dataset, batch_size))


@app.command
def probe(
    run: Annotated[str, text("Run folder, timm name, hf-hub:OWNER/NAME or prepared weights.", "--run", "--model")],
    *,
    method: Annotated[
        Literal["knn", "linear", "both"], said("knn: nearest neighbours. linear: a linear classifier.")
    ] = "both",
    recipe: Annotated[
        str | None, text("Take data and evaluation fields from this recipe. A run folder has its own recipe.")
    ] = None,
    dataset: Annotated[str | None, text("Data instead of the recipe's: a Hub id, prepared set or folder.")] = None,
    train_split: Annotated[str | None, text("Split to learn from. The default is the recipe's, or train.")] = None,
    split: Annotated[str | None, text("Split to score on. The default is the recipe's, or validation.")] = None,
    image_column: Annotated[
        str | None, text("Column that holds the encoded images. The default is the recipe's, or image.")
    ] = None,
    label_column: Annotated[
        str | None, text("Column that holds the class. The default is the recipe's, or label.")
    ] = None,
    max_train_samples: Annotated[Whole | None, said("Learn from only the first n images of a fixed shuffle.")] = None,
    max_eval_samples: Annotated[Whole | None, said("Score only the first n images of a fixed shuffle.")] = None,
    k: Annotated[
        list[str] | None,
        listed("Numbers of neighbours, each scored on its own. The default is 10 20 100 200.", metavar="INT..."),
    ] = None,
    temperature: Annotated[float, said("Temperature of the neighbours' votes.")] = 0.07,
    batch_size: Annotated[Whole, said("Images per forward pass.")] = 64,
    on_bad_image: Annotated[
        Literal["stop", "skip"], said("stop: a corrupt image ends the probe. skip: it is left out and counted.")
    ] = "stop",
    dataloader_num_workers: Annotated[Whole | None, said("Loader processes. The default is that of evaluate.")] = None,
    features: Annotated[
        Path | None, said("Keep the features in this .safetensors file, or read them from it if it exists.")
    ] = None,
    output: Annotated[Path | None, said("Write the scores to this JSON file too.")] = None,
) -> None:
    """Measure how good a frozen model's features are, by nearest neighbours and by a linear classifier on them.

    The scores are top-1 and top-5. Both methods learn from the features of the training split and are scored on those
    of the evaluation split. Images are seen as in an evaluation.
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
    file: Annotated[
        Path | None, said("Sweep file. --set and --grid add to what it says, the other flags replace it.")
    ] = None,
    *,
    recipes: Annotated[list[str] | None, listed("Names or files of recipes.")] = None,
    seeds: Annotated[list[str] | None, listed("Seeds that each recipe is trained with.", metavar="INT...")] = None,
    set_: Annotated[
        list[str] | None, listed("Flags of train_mixup.py for all runs, such as epochs=20.", "--set")
    ] = None,
    grid: Annotated[
        list[str] | None, listed("Fields to vary, such as lr=0.1,0.2. Every combination is trained.")
    ] = None,
    launcher: Annotated[
        str | None,
        text(
            "Command that starts train_mixup.py, such as 'accelerate launch'. The default is one Python process per "
            "run. slurm: submit the runs as jobs of Slurm."
        ),
    ] = None,
    output_dir: Annotated[str | None, text("Folder of all runs and results. The default is runs/sweep.")] = None,
    jobs: Annotated[
        Whole | None,
        said(
            "Number of runs at a time, each on a GPU or a share of the cores. The default is 1, and with a queue as "
            "many as it will take."
        ),
    ] = None,
    dry_run: Annotated[bool, said("Only print the commands and states of the runs.")] = False,
    report: Annotated[bool, said("Make tables and plots of the finished runs, and start no run.")] = False,
    slurm: Annotated[Path | None, said("Write an sbatch script to this file, and start no run.")] = None,
    slurm_options: Annotated[list[str] | None, listed("Options of sbatch, such as gres=gpu:1 time=12:00:00.")] = None,
) -> int:
    """Train every combination of recipes, grid and seeds, then make tables and plots.

    --jobs says how many runs work at a time. Finished runs are skipped. --launcher slurm submits each run as a job of a
    Slurm cluster, and says what became of the jobs that were submitted before.
    """
    from mixup_recipes.pages.sweep import sweep

    parts = {"recipes": recipes, "seeds": seeds, "launcher": launcher, "output_dir": output_dir}
    parts |= {"slurm_options": slurm_options}
    return sweep(file, parts | {"set": set_, "grid": grid}, dry_run, report, slurm, jobs)


@app.command
def prepare(
    name: Annotated[str, text("Name of a data set, such as cifar100 or cub200, or of weights: efficientnet_lite0.")],
    *,
    from_: Annotated[list[str] | None, listed("What the authors distribute: archives, or a folder.", "--from")] = None,
    folder: Annotated[Path | None, said("Write the images to this folder too, as FOLDER/SPLIT/CLASS/IMAGE.")] = None,
) -> None:
    """Write a data set or trained weights, once and whole, so that recipes find them by name.

    The command downloads groceries (61 MB), cifar10, cifar100 and efficientnet_lite0. For cub200, aircraft, inat2017,
    inat2018 and places205, download what the authors distribute and pass it:
    `mixup-recipes prepare cub200 --from CUB_200_2011.tgz`. The numbers of images and classes must be those that the
    authors publish.
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
    out: Annotated[Path, said("New folder for the images. After a kill, the same command goes on.")],
    teacher: Annotated[
        str | None, text("Run folder, timm name or hf-hub:OWNER/NAME of the teacher. The default is the recipe's.")
    ] = None,
    images: Annotated[
        Whole | None, said("Number of mixed images. The default is the number of training images.")
    ] = None,
    steps: Annotated[Whole, said("Largest number of steps of the search.")] = 50,
    seed: Annotated[Whole, said("Seed of the pairs and of their shares.")] = 0,
    all_pairs: Annotated[bool, said("Also keep images in which the teacher does not find both classes.")] = False,
    with_originals: Annotated[bool, said("Add the unmixed images of the training split.")] = False,
    dataset: Annotated[str | None, text("Place of the recipe's data on this machine.")] = None,
) -> None:
    """Mix a recipe's images by SuperMix once, before training.

    A run takes the new folder as its --dataset.
    """
    from mixup_recipes.training.premix import premix

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    made = premix(recipe, out, teacher, images, steps, seed, all_pairs, with_originals, dataset)
    print(f"{out}: {many(made, 'mixed image')}")


@app.command
def preview(
    *names: Annotated[str, Parameter(metavar="NAMES", help="Recipes or run folders.")],
    mixers: Annotated[
        list[str] | None,
        listed(
            "Mixers, a row for each. They run under the recipe's setting, or without one with their published defaults."
        ),
    ] = None,
    images: Annotated[Whole, said("Number of images, 2 to 32.")] = 8,
    photos: Annotated[
        str | None,
        text(
            "Folder of images, or 'synthetic' for drawn shapes. The default is the recipe's own images if they are on "
            "this machine, else the prepared groceries, else drawn shapes."
        ),
    ] = None,
    out: Annotated[Path, said("Picture to write, a .png file.")] = Path("runs/preview.png"),
) -> None:
    """Draw what recipes, runs or mixers do to a few images.

    The rows of the picture are methods, its columns are images. Without NAMES and --mixers the picture shows all mixers
    with their published defaults.
    """
    from mixup_recipes.pages.preview import preview

    print(preview(list(names), mixers or [], images, photos, out))


@app.command
def masks(
    run: RunFolder,
    *,
    pairs: Annotated[Whole, said("Number of pairs of photos, 1 to 16. Each pair is a row of the picture.")] = 6,
    out: Annotated[Path, said("Picture to write, a .png file.")] = Path("runs/masks.png"),
) -> None:
    """Draw the masks that a run of automix, samix or adautomix has learned, on photos of the evaluation split.

    The command also prints how the mean of the masks follows lambda. It needs a checkpoint of the run.
    """
    from mixup_recipes.pages.masks import masks
    from mixup_recipes.runs.run import Run

    print(masks(Run.open(run), pairs, out), out, sep="\n")


@app.command
def replay(
    run: RunFolder,
    *,
    step: Annotated[Whole, said("Number of the update, counted from 0.")],
    micro: Annotated[Whole, said("Number of the micro-batch within the update, counted from 0.")] = 0,
    out: Annotated[Path | None, said("Draw the batch into this .png file.")] = None,
    data: Annotated[Path | None, said("Write the batch to this .safetensors file.")] = None,
) -> None:
    """Rebuild the mixed batch of any update of a run bit for bit, as text, a picture or tensors.

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
    *targets: Annotated[
        str, Parameter(metavar="TARGETS", help="Mixers, such as cutmix, timm:cutmix or path/to/file.py:callable.")
    ],
    alpha: Annotated[
        float | None,
        said(
            "Parameter of the Beta law that lambda should follow. It declares the law of a callable that has no alpha."
        ),
    ] = None,
    format: Annotated[Literal["text", "md"], said("Format of the report: plain text or Markdown.")] = "text",
) -> int:
    """Check mixers against the contract: what they do to pixels, labels, lambda, pairs and the caller's tensors.

    A target is a mixer (cutmix), timm:mixup, timm:cutmix, torchvision:mixup, torchvision:cutmix or
    path/to/file.py:callable. The callable is a Mixer, a factory, or a function (x, y) -> (x', y'). The file is run. The
    exit status is 1 when something fails that the contract asks for.
    """
    from mixup_recipes import conformance

    reports = conformance.check(list(targets), alpha)
    print(conformance.table(reports, format), end="")
    return int(not all(report.passed for report in reports))


@app.command
def verify(
    run: Model,
    *,
    dataset: Annotated[str | None, text("Place of the recipe's data on this machine.")] = None,
    batch_size: Annotated[Whole, said("Images per forward pass.")] = 64,
) -> int:
    """Check that card, results, log and weights of a model on the Hub or of a run folder agree.

    The weights are evaluated again by the recipe's own protocol. The exit status is 1 when something does not agree.
    """
    from mixup_recipes.hub.verify import verify
    from mixup_recipes.runs.run import Run

    text, good = verify(Run.open(run), dataset, batch_size)
    print(text)
    return int(not good)
