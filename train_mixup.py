"""Train one recipe, for example by `accelerate launch train_mixup.py --recipe deit_s_cutmix`.

The script runs in the same way under accelerate launch, torchrun and plain python.
"""

# Read it top to bottom: recipe, processes, model and mixer, data, state, folder, loop, end. One update of the loop is
# `train_update`: micro-batches through `Step`, in which a mixer of mixers/ trains; backward; clip; optimiser;
# after_step. All chance is a function of seed and update, so a run that was killed goes on as if nothing had happened.

import math
import sys
import time
from pathlib import Path
from typing import Any

from mixers import MIXERS
from mixup_recipes import flags
from mixup_recipes.recipe import Recipe, changed
from mixup_recipes.resolve import resolve, settings
from mixup_recipes.training.job import STOPPED, Job
from mixup_recipes.typed import UserError


def main(argv: list[str] | None = None) -> int | None:
    """The training job; returns its exit status. ``argv``: flags, default those of the command line."""
    # ----------------------------------------------------------------------------------------- recipe
    given = flags.parse(
        sys.argv[1:] if argv is None else argv, "train_mixup.py", __doc__ or "", {"Run": Job, "Recipe fields": Recipe}
    )
    job = flags.fill(Job, given["Run"])
    if job.list:
        print(f"settings: {' '.join(settings())}\nmixers:   {' '.join(MIXERS)}\nrecipe:   <setting>_<mixer>")
        return None
    if job.recipe is None:
        raise UserError("no recipe was given; pass --recipe <setting>_<mixer>; --list prints all settings and mixers")
    recipe, origin = resolve(job.recipe, given["Recipe fields"])
    folder = Path(job.output_dir or f"runs/{recipe.name}-seed{recipe.seed}")

    # All that imports torch waits until here, so that --help and --list answer at once.
    import torch
    from timm.utils import distribute_bn

    from mixup_recipes.data import images, streaming
    from mixup_recipes.data.order import TrainOrder
    from mixup_recipes.data.pictures import sample_sheet
    from mixup_recipes.hub.publisher import Publisher
    from mixup_recipes.pages import card
    from mixup_recipes.runs.run import Run
    from mixup_recipes.training import backbones, checkpoint, evaluation, launch, optimisation, precise_bn, trackers
    from mixup_recipes.training.data import open_data
    from mixup_recipes.training.dryrun import dry_run, try_checkpointed
    from mixup_recipes.training.export import export_epoch
    from mixup_recipes.training.folder import begin_folder, begun, check_disk, check_folder, check_mixer, environment
    from mixup_recipes.training.log import Log, NoLog, done, forget_skipped, skipped
    from mixup_recipes.training.preprocessing import of_weights
    from mixup_recipes.training.progress import Progress
    from mixup_recipes.training.signals import Stop
    from mixup_recipes.training.update import load_teacher, meet_data, new_learner, new_step, prepared, train_update

    # ----------------------------------------------------------------------------------------- processes
    stop = Stop()  # from here on a signal means: leave, and later: save and leave
    recipe, _ = resolve(job.recipe, given["Recipe fields"] | of_weights(recipe, origin))
    accelerator = launch.accelerator(recipe, folder, job.report_to, job.deterministic, job.shard)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    launch.announce(recipe, accelerator)
    hub = Publisher(folder, recipe, job, accelerator.print) if job.push_to_hub else None
    resumed = None if job.dry_run else job.resume_from_checkpoint
    if not job.dry_run:  # open_data looks whether the same data lie elsewhere by now
        check_folder(folder, recipe, resumed is not None, ignore=("name", "dataset"))
    found, said = checkpoint.choose(resumed, folder, recipe, job, accelerator)
    if said:
        accelerator.print(said)
        return None

    # ----------------------------------------------------------------------------------------- model and mixer
    model = backbones.create_model(recipe)
    backbones.check_input(model, recipe.per_device_train_batch_size, recipe.image_size, recipe.model, training=True)
    backbones.check_input(model, 1, recipe.eval_size, recipe.model, training=False)
    train_transform, eval_transform = images.TrainTransform(recipe), images.EvalTransform.of(recipe)
    with accelerator.main_process_first():
        start = backbones.load_start(recipe) if found is None else None
        teacher = load_teacher(recipe)

    try:
        step = new_step(model, recipe, teacher)
    except ValueError as e:
        raise UserError(f"mixer {recipe.mixer!r} with model {recipe.model!r}: {e}") from None
    try_checkpointed(step, recipe)
    if job.dry_run:
        accelerator.print(dry_run(recipe, step, world, job.shard))
        return None
    check_mixer(folder, step)
    origin = begun(folder, recipe, start.sha256 if start else None, accelerator.print)

    # ----------------------------------------------------------------------------------------- data
    with accelerator.main_process_first():  # one process downloads and lists, the others read
        splits = open_data(folder, recipe, found, job.accept_changed_data, accelerator.print)
    if recipe.num_classes == 0:
        recipe = changed(recipe, num_classes=len(splits.classes))
        model = backbones.create_model(recipe)
        step = new_step(model, recipe, teacher)
    workers = launch.workers(job.dataloader_num_workers, accelerator, recipe, training=True)
    bad = job.on_bad_image, job.max_image_pixels
    samples = streaming.reader(splits.train, recipe, train_transform, *bad, skipped(folder, "train"))
    eval_samples = streaming.reader(splits.eval, recipe, eval_transform, *bad, skipped(folder, "eval"))

    # ----------------------------------------------------------------------------------------- state
    if start is not None:
        head = backbones.start_from(step.model, start.model, splits.classes)
        accelerator.print("\n".join([*start.notes, f"starts from {recipe.pretrained} {head}"]))
        step, start = new_step(model, recipe, teacher), None  # a mixer may have copied the model
    step = launch.on_device(step, recipe, accelerator)
    meet_data(step, recipe, splits, device, accelerator.print)
    if recipe.torch_compile:
        launch.compile_step(step)
    learner = new_learner(step, recipe, accelerator, job.shard)
    optimizer = learner.optimizer
    # every process checks, so that every process leaves with the same status before anything is written
    check_disk(folder, checkpoint.needed_bytes(learner.modules, job.save_total_limit, recipe))
    state: dict[str, Any] = {"update": 0, "evaluated": 0, "log_length": 0, "seconds": 0.0}
    sums: dict[str, torch.Tensor] = {}
    if found is not None:
        state, sums = checkpoint.restore(found, learner.modules, [optimizer, accelerator.scaler], rank, world, device)
        accelerator.print(checkpoint.resumed(found, state["processes"], world))
    order = TrainOrder(len(samples), recipe, rank, world, state["update"], samples.labels)
    update, evaluated, total, per_epoch = order.start, state["evaluated"], order.updates, order.updates_per_epoch
    if isinstance(samples, streaming.Stream) and update % per_epoch:
        accelerator.print("streaming: the rest of this epoch is drawn again, so some images come twice or not at all")

    # ----------------------------------------------------------------------------------------- folder
    forget_skipped(folder, accelerator, found)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        begun_from = environment(accelerator, recipe, step, origin)
        begin_folder(folder, recipe, splits, begun_from, resumed is not None)
        checkpoint.forget(folder / "checkpoints", update, accelerator.print)
    if hub := hub if accelerator.is_main_process else None:
        hub.begin()
    log = Log(folder / "log.jsonl", state["log_length"]) if accelerator.is_main_process else NoLog()
    for change in splits.identity["changed"]:
        if change["update"] == update:
            log.write(mode="data", epoch=update // per_epoch + 1, **change)
    trackers.start(accelerator, recipe, folder, job.project, update)
    progress = Progress(accelerator, recipe, update, total)
    began = time.perf_counter() - state["seconds"]
    save_every = per_epoch if job.checkpointing_steps == "epoch" else int(job.checkpointing_steps)
    last_saved = update if found else -1
    pictured = {0, recipe.epochs // 2, recipe.epochs - 1}  # epochs that begin with a sheet of mixed samples

    def write(mode: str, perf: dict[str, float], **values: float) -> None:
        perf = {"seconds": round(time.perf_counter() - began, 3)} | perf
        log.write(mode=mode, epoch=math.ceil(update / per_epoch), update=update, **values, perf=perf)
        trackers.log(accelerator, {f"{mode}/{k}": v for k, v in (values | perf).items()}, update)

    # ----------------------------------------------------------------------------------------- loop
    stop.begin(accelerator)
    batches = prepared(progress.timed(stop.watched(samples.train_batches(order, workers, device))), order, device)
    while True:
        epoch, within = divmod(update, per_epoch)

        # evaluate at the end of an epoch
        leaving = False
        if within == 0 and epoch > evaluated and (epoch % recipe.eval_epochs == 0 or epoch == recipe.epochs):
            nets, scored, refreshed = learner.classifiers, None, True
            if recipe.precise_bn_samples is not None:
                refreshed = precise_bn.refresh(step, samples, recipe, epoch, workers, accelerator, stop)
                if refreshed and world > 1:
                    distribute_bn(step, world, reduce=True)
            if refreshed:
                scored = evaluation.evaluate(nets, eval_samples, recipe, accelerator, workers, stop)
            if scored is None:
                leaving = True
            else:
                (scores, columns), evaluated = scored, epoch
                write("val", {}, **scores)
                progress.say(f"epoch {epoch}/{recipe.epochs}: {evaluation.scores_line(scores)}")
                nets = learner.whole_classifiers(recipe, accelerator.is_main_process)
                if accelerator.is_main_process:
                    export_epoch(folder, nets, columns, recipe, splits.classes, log.lines, epoch)
            progress.restart()

        # save, and leave when asked to
        finished = update == total and not leaving
        leaving = leaving or (not finished and stop.agreed(accelerator))
        unsaved = update != last_saved or (finished and evaluated > state["evaluated"])  # stopped while it evaluated
        if unsaved and (finished or leaving or (update and update % save_every == 0)):
            state = {"evaluated": evaluated, "log_length": log.length(), "seconds": time.perf_counter() - began}
            state |= {"data": {"splits": splits.identity["splits"], "classes": splits.classes}}
            kept = learner.modules, [optimizer, accelerator.scaler], sums, state
            checkpoint.save(folder / "checkpoints", update, *kept, accelerator, job.save_total_limit)
            last_saved = update
            if hub and not finished and not leaving:
                hub.saved()
            progress.restart()
        if finished or leaving:
            break

        # one update
        optimisation.set_learning_rates(optimizer, recipe, update, per_epoch)
        batch, out = train_update(learner, batches, order, update, sums, accelerator)
        if accelerator.is_main_process and within == 0 and epoch in pictured:
            mixed, _ = step.mixer.mix(batch.x, batch.y, **out.plan)
            sheet = sample_sheet(mixed, out.target, recipe, splits.classes, folder / f"samples/epoch_{epoch:03d}.png")
            trackers.picture(accelerator, sheet, update)
        del batch, out  # the device's memory is for the next ones
        update += 1
        if update % per_epoch == 0 and world > 1:
            for module in learner.modules.values():
                distribute_bn(module, world, reduce=True)
        progress.update()

        # log: the only place where the device is read
        if update % job.logging_steps == 0 or update % per_epoch == 0:
            values = accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist()
            means = dict(zip(sums, values, strict=True))
            steps, seen_images, bad_images = means.pop("steps"), means.pop("images"), means.pop("bad")
            means = {k: v / steps for k, v in means.items()}
            rate, waiting = progress.speed()
            lr = optimisation.learning_rate(recipe, update - 1, per_epoch)
            perf = {"img_per_s": round(rate, 1), "waiting": round(waiting, 3)}
            write("train", perf, lr=lr, **means, images=int(seen_images), bad_images=int(bad_images))
            if not math.isfinite(means["loss"]):
                raise RuntimeError(f"loss {means['loss']} at update {update}: lower lr, or use bf16, not fp16")
            sums = {}
            if hub:
                hub.poll()
            progress.restart()

    # ----------------------------------------------------------------------------------------- end
    progress.bar.close()
    if leaving:
        accelerator.print(
            f"{stop.requested or 'a signal'} at update {update}: saved; continue with --resume_from_checkpoint auto"
        )
    else:
        accelerator.print(done(folder, accelerator))
        if accelerator.is_main_process:
            try:
                card.write_card(Run.open(folder))
            except UserError as e:  # the run is whole without it
                print(f"the model card could not be written: {e}; fix this, then run: mixup-recipes card {folder}")
    trackers.finish(accelerator, folder, leaving)
    launch.end(accelerator, stop)
    if hub and not leaving:
        hub.finish(lambda: stop.requested)
    return STOPPED if leaving else None


if __name__ == "__main__":
    flags.run(main)
