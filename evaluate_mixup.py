"""Score a model on a data set.

For example: `mixup-recipes evaluate RUN`. On several GPUs, start the script instead:
`accelerate launch evaluate_mixup.py RUN`.

The model is a run folder, a timm name (resnet50.a1_in1k) or a Hub id (hf-hub:OWNER/NAME). The data and the evaluation
protocol come from the run's recipe or from --recipe. They may also come from --dataset, with the checkpoint's own
resize, crop, interpolation, mean and standard deviation.

The scores are top-1, top-5, ECE (percent) and NLL (nats). Where images may have several labels, they are mAP, F1 and
NLL. --suite robustness tries the model on attacked, corrupted, occluded and mixed images, and on images of other
classes. --subset scores a model whose classes are ImageNet's on a test set made for them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from mixup_recipes import flags
from mixup_recipes.files import check_output
from mixup_recipes.typed import Between, UserError
from mixup_recipes.words import many


@dataclass(frozen=True)
class Evaluation:
    """What to score, and on what."""

    model: str | None = None
    """Run folder, timm name or hf-hub:OWNER/NAME."""
    recipe: str | None = None
    """Take data and evaluation fields from this recipe. A run folder has its own recipe."""
    dataset: str | None = None
    """Data to score on instead of the recipe's: a Hub id, prepared set or folder."""
    split: str | None = None
    """Split to score on. The default is the recipe's eval_split, or validation."""
    image_column: str | None = None
    """Column that holds the encoded images. The default is the recipe's, or image."""
    label_column: str | None = None
    """Column that holds the class. The default is the recipe's, or label."""
    batch_size: Annotated[int, Between(1)] = 64
    """Images per forward pass of each process."""
    max_eval_samples: Annotated[int, Between(1)] | None = None
    """Score only the first n images of a fixed shuffle."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Autocast precision. The default is the recipe's, else 'no'."""
    dataloader_num_workers: Annotated[int, Between(0)] | None = None
    """Loader processes per evaluating process. 'none' is 0 on a CPU, else the number of cores, at most 16 and at most
    what /dev/shm holds."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """stop: a corrupt image ends the evaluation. skip: it is left out and counted."""
    max_image_pixels: Annotated[int, Between(1)] = 178_956_970
    """A picture of more pixels is a bad image. The default is Pillow's limit, about 0.5 GB of decoded picture."""
    output: Path | None = None
    """Write the scores to this JSON file too."""
    predictions: Path | None = None
    """Write what the model says of each image to this .safetensors file."""
    subset: Literal["imagenet-a", "imagenet-r", "imagenet-v2", "imagenet-sketch", "real"] | None = None
    """The ImageNet test set that the data are. Its labels and scores follow rules of their own."""
    suite: Literal["robustness"] | None = None
    """Measure robustness. The results go to robustness.json and robustness.png of the run folder, or to --output and a
    .png beside it. Parts that were measured before stay there."""
    parts: tuple[Literal["attacks", "corruptions", "occlusion", "calibration", "ood"], ...] = ()
    """Parts of the suite to measure. The default is all parts, and ood only with --ood."""
    ood: str | None = None
    """Second data set for the suite, of classes that the model does not know."""
    ood_split: str | None = None
    """Split of the second data set. The default is the split that is scored on."""
    tta: Literal["none", "flip", "five_crop", "ten_crop"] = "none"
    """Average the probabilities of several views of an image. flip: the image and its mirror image. five_crop: the four
    corners and the centre. ten_crop: these and their mirror images."""


MODEL = ("run", "model")  # the first argument


def main(argv: list[str] | None = None) -> int | None:
    """The evaluation job, of ``argv`` or the command line; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    given = flags.parse(argv, "evaluate_mixup.py", __doc__ or "", {"Evaluation": Evaluation}, MODEL)
    args = flags.fill(Evaluation, given["Evaluation"])
    if args.model is None:
        raise UserError("no model was given; pass a run folder, a timm name, or hf-hub:owner/name")
    check(args)

    import evaluate

    from mixup_recipes import files, metrics
    from mixup_recipes.data.splits import placed
    from mixup_recipes.pages import robustness
    from mixup_recipes.robustness import subsets, suite
    from mixup_recipes.robustness.examples import examples
    from mixup_recipes.robustness.passes import Bench
    from mixup_recipes.runs.models import eval_transform, evaluation_recipe, open_model
    from mixup_recipes.runs.per_class import per_class
    from mixup_recipes.runs.scored import load_scored, other_data
    from mixup_recipes.runs.tta import Views
    from mixup_recipes.training import backbones, evaluation, launch
    from mixup_recipes.training.export import write_predictions

    net, run = open_model(args.model)
    if args.dataset is None and args.recipe is None and run is None:
        raise UserError(f"{args.model} comes without a recipe, so the data are not known; pass --dataset or --recipe")
    recipe = evaluation_recipe(net, args.model, run, changes(args), args.recipe)
    asked = suite.chosen(args.parts, args.ood) if args.suite else ()
    target = suite.target(recipe, args.model, args.output, run, asked) if args.suite else None
    outputs = subsets.check(net, args.model, args.subset) if args.subset else []
    transform = eval_transform(net, recipe, own=run is None and args.recipe is None)
    views = Views(args.tta, transform)
    accelerator = launch.accelerator(recipe, Path("."))
    world = accelerator.num_processes
    accelerator.print(
        f"{args.model}: {many(world, 'process')} on {accelerator.device.type}, "
        f"{recipe.mixed_precision} mixed precision, {recipe.dataset} {recipe.eval_split}, "
        f"{transform}" + f", tta {args.tta}" * (args.tta != "none"),
        flush=True,
    )
    backbones.check_input(net, args.batch_size, tuple(transform.size), args.model, training=False)
    with accelerator.main_process_first():
        known = backbones.cfg_of(net).get("label_names") or ()
        if args.subset in (None, subsets.REAL):
            found = load_scored(run, recipe, known)
            split = placed(found, recipe, args.model, net)
        else:
            found = split = subsets.load(recipe, args.subset, outputs)
        second = suite.second_set(recipe, args.ood, args.ood_split, split.classes) if args.ood else None
    for note in (*split.notes, *other_data(run, recipe, found), *(second.notes if second else ())):
        accelerator.print(note, flush=True)
    net = views.averaged(launch.on_device(net, recipe, accelerator), recipe.multi_label).eval()
    workers = launch.workers(args.dataloader_num_workers, accelerator, views.room(recipe))
    bench = Bench(net, split.table, recipe, transform, accelerator, workers, args.on_bad_image, args.max_image_pixels)

    if target is not None:
        about = suite.about(args.model, bench, found, run)
        old = robustness.before(target, about, run)
        if target.is_file() and not old:
            accelerator.print(f"{target} belongs to other weights and is made again", flush=True)
        content = robustness.joined(old, about | suite.measure(bench, asked, found.classes, second))
        if accelerator.is_main_process:
            print(robustness.write(content, examples(bench, split.classes, tuple(content["budgets"])), target))
        accelerator.wait_for_everyone()
        launch.end(accelerator)
        return None

    if args.subset:
        scores, columns = subsets.score_subset(bench, args.subset, outputs)
    else:
        columns = evaluation.predict_all(net, bench.samples(views.transform), recipe, accelerator, workers)
        scores = evaluation.score(columns) if recipe.multi_label else {}
    if accelerator.is_main_process:
        if not scores:
            scores = by_modules(evaluate.load, Path(metrics.__file__).parent, columns)
            by_class = per_class(columns["label"], columns["top"][:, 0], len(split.classes))
            scores |= {"macro_recall": by_class.macro(by_class.recall), "macro_f1": by_class.macro(by_class.f1)}
        scores |= {"bad_images": len(split.table) - len(columns["index"])}
        wide = max(14, *(len(name) + 1 for name in scores))
        print("\n".join(f"{k:{wide}}{v:.4f}" if isinstance(v, float) else f"{k:{wide}}{v}" for k, v in scores.items()))
        if args.predictions:
            write_predictions(args.predictions, columns, {"tta": args.tta} if args.tta != "none" else None)
        if args.output:
            files.write_json(args.output, {"model": args.model, "dataset": recipe.dataset, "tta": args.tta, **scores})
    accelerator.wait_for_everyone()
    launch.end(accelerator)
    return None


def check(args: Evaluation) -> None:
    """Raise ``UserError`` for flags that do not go together, and for files that cannot be written."""
    of_suite = {"parts": args.parts, "ood": args.ood, "ood_split": args.ood_split}
    for name, value in of_suite.items():
        if value and args.suite is None:
            raise UserError(f"--{name} needs --suite robustness")
    if args.suite and (args.subset or args.predictions):
        other = "subset" if args.subset else "predictions"
        raise UserError(f"--suite {args.suite} and --{other} cannot be combined; choose one of them")
    if args.tta != "none" and (args.suite or args.subset):
        raise UserError(f"--tta {args.tta} is for plain scores and cannot be combined with --suite or --subset")
    if args.ood_split and args.ood is None:
        raise UserError("--ood_split is the split of a second data set; pass --ood DATASET too")
    if args.subset not in (None, "real") and args.dataset is None:
        raise UserError(f"no images of {args.subset} were given; pass --dataset FOLDER")
    for file in (args.output, args.predictions):
        if file and not file.parent.is_dir():
            raise UserError(f"cannot write {file}: there is no folder {file.parent}")
        if file:
            own = "robustness.json" if args.suite else "predictions.safetensors"
            check_output(file, *[own] * (file == args.predictions or args.suite is not None))


def by_modules(load: Any, formulas: Path, columns: dict[str, Any]) -> dict[str, Any]:
    """Scores through modules that ``load`` finds in a folder, and the count of images; of ``evaluation.predict``."""
    top = columns["top"]
    topk = load(str(formulas / "topk_accuracy"))
    calibration = load(str(formulas / "calibration"))
    rates = topk.compute(predictions=top, references=columns["label"], ks=(1, top.shape[1]))
    scores = {"top1": rates["top1"], "top5": rates[f"top{top.shape[1]}"]}
    scores |= calibration.compute(
        predictions=top[:, 0], references=columns["label"], confidences=columns["confidence"], nlls=columns["nll"]
    )
    return scores | {"count": len(top)}


def changes(args: Evaluation) -> dict[str, Any]:
    """The fields of a recipe that the flags replace."""
    given: dict[str, Any] = {"dataset": args.dataset, "eval_split": args.split, "image_column": args.image_column}
    given |= {"label_column": args.label_column, "max_eval_samples": args.max_eval_samples}
    given |= {"mixed_precision": args.mixed_precision}
    given |= {"batch_size": args.batch_size, "per_device_train_batch_size": args.batch_size}
    return {k: v for k, v in given.items() if v is not None}


if __name__ == "__main__":
    flags.run(main)
