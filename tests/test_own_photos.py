"""Promise: a folder or table of one's own photos is read, divided once and for all, and trained on as it is."""

import csv
import datetime
import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from resuming import small_model_for
from tiny import jpeg

from mixers import MIXERS, Step, build
from mixup_recipes.data import holdout, prepare
from mixup_recipes.data.classes import natural
from mixup_recipes.data.decoding import decode
from mixup_recipes.data.splits import load_split, load_splits
from mixup_recipes.pages import card_facts
from mixup_recipes.resolve import load_recipe, resolve
from mixup_recipes.training import backbones, dryrun, known_weights, optimisation, preprocessing
from mixup_recipes.training.update import new_step
from mixup_recipes.typed import UserError

CLASSES = ("ant", "bee", "cow")
TINY = ["--model", "test_resnet", "--pretrained", "none", "--data_config", "recipe", "--image_size", 32]
TINY += ["--eval_size", 32, "--eval_resize", 32, "--batch_size", 8, "--per_device_train_batch_size", 8]


def put(root, images=20, classes=CLASSES, start=0):
    """Photos that differ in their size, so that no two are compared by their content."""
    rng = np.random.default_rng(start)
    for kind, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(start, start + images):
            (root / name / f"{i}.jpg").write_bytes(jpeg(kind, rng) + bytes(1 + 7 * i + kind))
    return root


def recipe(dataset, name="finetune_cutmix", **changes):
    return load_recipe(name, dataset=str(dataset), **changes)


def files(table):
    return {path.rsplit("/", 2)[-2] + "/" + path.rsplit("/", 1)[-1] for path in table["image"]}


def refused(dataset, **changes):
    with pytest.raises(UserError) as error:
        load_splits(recipe(dataset, **changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_hold_out_follows_from_names_alone_so_that_more_photos_move_none(tmp_path):
    root = put(tmp_path / "photos")
    before = load_splits(recipe(root))
    train, held = files(before.train), files(before.eval)
    assert len(train) + len(held) == 60 and not train & held and before.classes == list(CLASSES)
    shares = [sum(name.startswith(kind) for name in held) / 20 for kind in CLASSES]
    assert all(0.05 <= share <= 0.4 for share in shares) and len(held) == len(before.held_out)
    assert before.identity["holdout"] == {"of": "train", "share": 0.2, "seed": 0}
    put(root, 10, start=20)
    after = load_splits(recipe(root))
    assert train < files(after.train) and held <= files(after.eval)
    assert files(load_split(recipe(root), "validation", None).table) == files(after.eval)
    other = files(load_splits(recipe(root, holdout_seed=1)).eval)
    assert other != files(after.eval) and len(files(load_splits(recipe(root, holdout=0.5)).eval)) > 30
    # one photo stays in training; a whole class is never held out
    put(tmp_path / "few", 1)
    assert "none is held out" in refused(tmp_path / "few")
    labels = np.repeat(np.arange(100), 3)
    sides = holdout.held_out([f"{i}.jpg" for i in range(300)], labels, [str(k) for k in range(100)], 0.9, 0)
    assert np.bincount(labels[~sides], minlength=100).min() == 1 and sides.sum() > 150


def test_a_photo_whose_content_is_held_out_is_not_trained_on(tmp_path):
    root = put(tmp_path / "photos")
    held = sorted(files(load_splits(recipe(root)).eval))[0]
    kind = held.split("/")[0]
    names = [f"{kind}/copy{i}.jpg" for i in range(9)]
    for name in names:
        (root / name).write_bytes((root / held).read_bytes())
    found = load_splits(recipe(root))
    copies = {*names} & files(found.train), {*names} & files(found.eval)
    assert not copies[0] and len(copies[1]) < 9
    said = f"validation: {9 - len(copies[1])} left out of training because the same content is held out: copy"
    assert any(note.startswith(said) for note in found.notes)


def test_which_folders_are_classes_and_what_is_refused(tmp_path):
    put(tmp_path / "split/train")
    assert len(load_splits(recipe(tmp_path / "split")).train) < 60  # training alone
    put(tmp_path / "split/test", 2)
    assert load_splits(recipe(tmp_path / "split")).identity["holdout"]["of"] == "train"  # tests stay aside
    assert len(load_splits(recipe(tmp_path / "split", eval_split="test")).train) == 60
    put(tmp_path / "split/val", 3)
    assert len(load_splits(recipe(tmp_path / "split")).eval) == 9
    put(tmp_path / "vehicles", classes=("train", "bus"))
    assert load_splits(recipe(tmp_path / "vehicles")).classes == ["bus", "train"]
    assert f"pass one of them: --dataset {tmp_path}/split" in refused(tmp_path)
    assert "has one class, 'ant'" in refused(put(tmp_path / "one", classes=("ant",)))
    assert "has no folder for split 'train'" in refused(put(tmp_path / "flat"), holdout=0)
    assert "flat has no split 'trian' and no folders for splits" in refused(tmp_path / "flat", eval_split="trian")
    put(tmp_path / "one_split/train", 2)
    assert "has no folder for split 'trian'; did you mean 'train'" in refused(
        tmp_path / "one_split", eval_split="trian"
    )
    (tmp_path / "names.csv").write_text("image,label\n" + "".join(f"flat/{c}/0.jpg,{c}\n" for c in CLASSES))
    assert "names.csv has no split 'trian' and no folders for splits" in refused(
        tmp_path / "names.csv", eval_split="trian"
    )


def test_a_table_of_paths_has_labels_in_words_and_what_it_lacks_is_counted(tmp_path):
    root = put(tmp_path / "photos", 8)
    rows = [(f"{kind}/{i}.jpg", f"a {kind}") for kind in CLASSES for i in range(8)]
    odd = [("gone.jpg", "a bee"), ("", "a bee"), ("ant/0.jpg", ""), ("../secret.jpg", "a bee"), rows[0]]
    (tmp_path / "secret.jpg").write_bytes(b"")
    lines = "".join(f'{path},"{label}"\n' for path, label in rows + odd)
    (root / "labels.csv").write_text("\ufefffile,what\n" + lines)
    own = {"image_column": "file", "label_column": "what"}
    found = load_splits(recipe(root / "labels.csv", **own))
    assert found.classes == ["a ant", "a bee", "a cow"] and len(found.train) + len(found.eval) == 24
    said = "\n".join(found.notes)
    for words in (
        "1 left out (files outside of the table's folder): ../secret.jpg",
        "(files that are not there): gone.jpg",
        "2 left out (rows without a path or a label): row 26, row 27",
        "(rows that are there twice): ant/0.jpg",
    ):
        assert words in said
    assert "no column 'image'; valid names: file, what (set image_column" in refused(root / "labels.csv")
    # numbers are classes in their order, a column of splits is followed
    split = ["train", "train", "val"]
    rows = [
        {"image": f"{k}/{i}.jpg", "label": 2 + 8 * n, "split": split[i % 3]}
        for n, k in enumerate(CLASSES)
        for i in range(8)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_splits(recipe(root / "rows.jsonl"))
    assert found.classes == ["2", "10", "18"] and (len(found.train), len(found.eval)) == (18, 6)
    assert found.notes == ["validation: read from the rows of val"] and "holdout" not in found.identity
    rows = [{"image": name, "label": k} for k, name in enumerate(("ant/0.jpg", "bee/0.jpg", "ant/\0.jpg"))]
    (root / "null.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = load_split(recipe(root / "null.jsonl", holdout=0), "train", None).notes
    assert notes == ["1 left out (files that are not there): ant/\\x00.jpg"]
    (root / "twice.csv").write_text("image,label\nant/0.jpg,a\nant/0.jpg,b\n")
    assert "ant/0.jpg is there with two labels, 'a' and 'b'" in refused(root / "twice.csv")
    (root / "spaced.csv").write_text(
        "image, label ,split\n" + "".join(f"ant/{i}.jpg,0{i % 2},train\n" for i in range(8))
    )
    assert load_splits(recipe(root / "spaced.csv")).classes == ["00", "01"]  # not the numbers 0 and 1
    (root / "splits.csv").write_text("image,label,split\nant/0.jpg,a,train\nbee/0.jpg,b,train\nant/1.jpg,a,Train\n"
                                     "ant/2.jpg,a,\nbee/3.jpg,b,val\n")  # fmt: skip
    notes = load_splits(recipe(root / "splits.csv")).notes
    assert "train: 2 rows belong to no split that is read: , Train" in notes
    (root / "quote.csv").write_text('image,label\nant/0.jpg,"a\nant/1.jpg,b\nant/2.jpg,b"\n')
    assert "row 1 has a line break in its path or label; is a quote not closed?" in refused(root / "quote.csv")
    assert sorted(["1", "02", "01", "2"], key=natural(["1"])) == sorted(["2", "01", "02", "1"], key=natural(["1"]))
    (root / "notes.txt").write_text("")
    assert "is a file; expected a folder, or a table of paths (.csv, .tsv, .jsonl, .parquet)" in refused(
        root / "notes.txt"
    )


DAY, NO_LABEL = datetime.date(2020, 1, 2), "expected a word or a whole number, got"
TEXT_DAY = "2020-01-02"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "images"])
@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([" ant", "bee "], ["ant", "bee"]), ([TEXT_DAY, "bee"], [TEXT_DAY, "bee"]), ([True, False], ["false", "true"]),
        ([1.0, 0.0], ["0", "1"]), ([1, 0.5], f"row 2: {NO_LABEL} 0.5"), ([DAY] * 2, f"row 1: {NO_LABEL} {TEXT_DAY}"),
        ([2.0**53, 1.5], "row 1: expected a word or a whole number, but the float 9007199254740992.0 may stand for"),
        ([{"x": 1}] * 2, f"row 1: {NO_LABEL} {{'x': 1}}"), ([b"ant"] * 2, f"row 1: {NO_LABEL} b'ant'"),
    ],
)  # fmt: skip
def test_labels_are_words_or_whole_numbers_in_tables_of_every_form(tmp_path, kind, values, found):
    photos = [jpeg(i, np.random.default_rng(i)) for i in range(2)]
    for i, photo in enumerate(photos):
        (tmp_path / f"{i}.jpg").write_bytes(photo)
    names, table = ["0.jpg", "1.jpg"], tmp_path / f"train.{kind.replace('images', 'parquet')}"
    if kind in ("parquet", "images"):
        images = names if kind == "parquet" else [{"bytes": photo, "path": None} for photo in photos]
        pq.write_table(pa.table({"image": images, "label": pa.array(values)}), table)
    elif kind == "csv":  # where all is text, and stays what it says
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([("image", "label"), *zip(names, values, strict=True)])
        found = sorted({str(value).strip() for value in values})
    elif isinstance(values[0], datetime.date | bytes):
        pytest.skip("JSON has no such value")
    else:
        rows = [{"image": name, "label": value} for name, value in zip(names, values, strict=True)]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = recipe(tmp_path if kind == "images" else table, holdout=0)
    if isinstance(found, list):
        assert sorted(load_split(own, "train", None).classes) == sorted(found)
        return
    with pytest.raises(UserError) as error:
        load_split(own, "train", None)
    assert f"column 'label', {found}" in str(error.value)


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.duration("s"), pa.date64()])
@pytest.mark.parametrize("several", [False, True])
def test_labels_of_a_type_whose_values_python_lacks_are_refused(tmp_path, kind, several):
    photo = {"bytes": jpeg(0, np.random.default_rng(0)), "path": None}
    for name, images in (("table", ["0.jpg"] * 2), ("images", [photo] * 2)):
        (tmp_path / name).mkdir()
        table = tmp_path / name / "train.parquet"
        pq.write_table(pa.table({"image": images, "label": pa.array([2**62, 5], kind)}), table)
        with pytest.raises(
            UserError, match=r"column 'label': expected a word or a whole number, but the column holds \w+\["
        ):
            own = recipe(table if name == "table" else table.parent, holdout=0, multi_label=several)
            load_split(own, "train", None)


def test_classes_are_counted_from_data_of_ones_own_and_only_there():
    assert load_recipe("quickstart_cutmix").num_classes == 14
    assert load_recipe("quickstart_cutmix", dataset="groceries").num_classes == 14
    assert load_recipe("quickstart_cutmix", dataset="photos").num_classes == 0
    assert load_recipe("quickstart_cutmix", dataset="photos", num_classes=3).num_classes == 3
    assert load_recipe("r50_100e_cutmix").num_classes == 1000


def test_photos_are_turned_as_their_camera_noted_it_where_the_recipe_says_so():
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:12, :20] = 255
    for orientation in range(1, 9):
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            exif, buffer = Image.Exif(), io.BytesIO()
            exif[0x0112] = orientation
            Image.fromarray(pixels).save(buffer, kind, exif=exif, quality=95)
            plain, upright = decode(buffer.getvalue()), decode(buffer.getvalue(), upright=True)
            seen = Image.fromarray(plain.permute(1, 2, 0).numpy())
            operation = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)  # Pillow's transpositions
            seen = seen if operation is None else seen.transpose(Image.Transpose(operation))
            assert plain.shape == (3, 24, 40)
            assert torch.equal(upright, torch.from_numpy(np.array(seen)).permute(2, 0, 1)), (orientation, kind)


def test_layers_have_rates_of_their_own_and_frozen_ones_none():
    own = recipe("photos", "finetune_mixup", model="test_resnet", num_classes=3, lr=1.0, head_lr=4.0, layer_decay=0.5)
    model = backbones.create_model(own)
    step = Step(model, build("vanilla"), torch.nn.CrossEntropyLoss(reduction="none"))
    groups = optimisation.optimizer(step, own).param_groups
    rate = {id(p): group["schedule"]["lr"] for group in groups for p in group["params"]}
    layer = backbones.layers(model)
    for name, p in model.named_parameters():
        assert rate[id(p)] == (4.0 if name.startswith("fc.") else 0.5 ** (layer["fc.weight"] - layer[name])), name
    for group in groups:
        expected = optimisation.learning_rate(own, 30, 10) * group["schedule"]["lr"]
        assert optimisation.learning_rate(own, 30, 10, **group["schedule"]) == pytest.approx(expected)
    for freeze, trained in (("body", {"fc"}), ("layer2", {"layer3", "layer4", "fc"})):
        found = timm.create_model("test_resnet", num_classes=3)
        backbones.freeze(found, freeze)
        assert {name.split(".")[0] for name, p in found.named_parameters() if p.requires_grad} == trained
    with pytest.raises(UserError, match="freeze 'layer9': did you mean 'layer"):
        backbones.freeze(model, "layer9")


def test_a_new_head_is_small_so_that_all_classes_are_about_as_likely():
    source = timm.create_model("test_efficientnet", num_classes=1000)
    model = timm.create_model("test_efficientnet", num_classes=2)
    assert backbones.start_from(model, source, ["a", "b"]) == "with a new head for 2 classes"
    head = model.get_classifier()
    assert head.weight.std().item() == pytest.approx(0.01) and not head.bias.any()
    loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 3, 64, 64)), torch.tensor([0, 1] * 4))
    assert loss.item() == pytest.approx(np.log(2), abs=0.1)


def test_some_updates_train_on_the_images_as_they_are(images_and_targets):
    own = recipe("photos", "finetune_mixup", model="test_resnet", num_classes=5, mix_prob=0.5)
    step = new_step(backbones.create_model(own), own)
    x, y = images_and_targets
    mixed = [not torch.equal(step(x, y, np.random.default_rng(i)).target, y) for i in range(40)]
    assert 10 < sum(mixed) < 30
    for mixer in MIXERS:  # each goes into such a step
        own = recipe("photos", f"finetune_{mixer}", model=small_model_for(mixer), num_classes=5)
        net = backbones.create_model(own)
        assert new_step(net, own).mixer.probs == [0.25, 0.75]


def test_a_folder_becomes_a_classifier_its_report_predictions_and_a_file_for_a_phone(server, console, tmp_path):
    root, run, report = put(tmp_path / "photos", 12), tmp_path / "run", tmp_path / "report"
    args = ["--recipe", "finetune_cutmix", "--dataset", root, "--output_dir", run, "--epochs", 2, *TINY]
    status, output = server.run(*args)
    assert status == 0, output
    data = json.loads((run / "data.json").read_text())
    assert "train: " in output and "held out to evaluate on" in output and data["classes"] == list(CLASSES)
    held = (run / "holdout.txt").read_text().splitlines()
    assert (
        len(held)
        == data["splits"]["validation"]["images"]
        == json.loads((run / "log.jsonl").read_text().splitlines()[-1])["count"]
    )
    assert load_recipe(str(run / "recipe.yaml")).num_classes == 3
    assert server.run(*args, "--resume_from_checkpoint", "auto")[0] == 0  # the classes are counted again
    (root / "bee/new.jpg").write_bytes(jpeg(1, np.random.default_rng(9)))
    status, output = server.run(*args, "--resume_from_checkpoint", "auto")
    assert status == 2 and "is not what" in output and "images then" in output
    (root / "bee/new.jpg").unlink()
    status, output, errors = console("evaluate", run)  # the same images, not those that it was trained on
    assert status == 0 and f"count {len(held)}" in " ".join(output.replace('"', "").replace(":", "").split()), errors
    assert "other images" not in output
    (tmp_path / "link").symlink_to(root)
    for name in (os.path.relpath(root), f"{root}/../photos/", tmp_path / "link"):  # never what it was trained on
        status, output, errors = console("evaluate", run, "--dataset", name, "--output", tmp_path / "again.json")
        assert status == 0 and "other images" not in output, errors
        assert json.loads((tmp_path / "again.json").read_text())["count"] == len(held)
    status, output, errors = console("evaluate", run, "--split", "train", "--output", tmp_path / "train.json")
    assert json.loads((tmp_path / "train.json").read_text())["count"] == data["splits"]["train"]["images"]
    assert f"these are the images that the run was trained on; {len(held)} images are held out and not among" in output
    assert console("report", run, "--out", report)[0] == 0
    assert {"classes.csv", "confusion.png", "reliability.png", "report.md"} <= {p.name for p in report.iterdir()}
    assert console("predict", run, root, "--out", tmp_path / "predictions.csv")[0] == 0
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + 36
    status, output, errors = console("export", run, "--out", tmp_path / "photos.onnx")
    assert status == 0 and "get the class of predictions" in output and "exif_transpose" in output, errors


def test_a_dry_run_opens_data_of_this_machine_and_says_of_them_what_a_run_says(server, tmp_path):
    root, run = put(tmp_path / "photos", 12), tmp_path / "run"
    args = ["--recipe", "finetune_cutmix", "--dataset", root, "--output_dir", run, *TINY, "--epochs", 1]
    status, said = server.run(*args, "--dry_run")
    assert status == 0 and not run.exists()
    status, output = server.run(*args)
    assert status == 0, output
    lines = [line for line in output.splitlines() if line.startswith(("train: ", "validation: "))]
    assert len(lines) > 2 and [line for line in said.splitlines() if line in lines] == lines
    trained = json.loads((run / "data.json").read_text())["splits"]["train"]["images"]
    assert f"images        {trained}, " in said and "updates       " in said
    note = "the warm-up lasts for all of the run, 1 epoch, so the learning rate stays below 0.0005; --warmup_epochs 0"
    assert note in output and note in said


def test_a_dry_run_finds_what_is_wrong_with_the_data_and_asks_no_hub(tmp_path):
    root = put(tmp_path / "photos", 4)
    (root / "names.csv").write_text("image,name\n" + "".join(f"{c}/{i}.jpg,{c}\n" for c in CLASSES for i in range(4)))

    def dry(dataset, **changes):
        own = recipe(dataset, **{"model": "test_resnet", "batch_size": 4, "per_device_train_batch_size": 4} | changes)
        return dryrun.dry_run(own, new_step(backbones.create_model(own), own), 1)

    assert "model         test_resnet, " in dry(root) and "train: " in dry(root)
    known = dry("someone/photos", num_classes=3, max_train_samples=8)
    assert "images        8, 80 in all; the data were not opened, this is --max_train_samples" in known
    for dataset, changes, says in (
        (root, {"num_classes": 4}, "has 3 classes, but the recipe has num_classes 4"),
        (tmp_path / "photso", {}, "is neither a folder, a Hub id"),
        (root / "names.csv", {}, "no column 'label'; valid names: image, name"),
    ):
        with pytest.raises(UserError, match=says):
            dry(dataset, **changes)
    assert "unknown before 'somebody/photos' is opened" in dry("somebody/photos", num_classes=3)


def test_a_photo_is_turned_alike_in_training_evaluation_predictions_and_the_card(server, console, tmp_path):
    root, rng = tmp_path / "photos", np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, kind in enumerate(CLASSES):  # upright the lower half of one class is white, of another the upper one
        (root / kind).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 40, (32, 32, 3), dtype=np.uint8)
            pixels[[slice(16, 32), slice(0, 16), slice(12, 20)][number]] += 200
            if i % 2:  # as the sensor saw it, with the camera's note
                Image.fromarray(np.rot90(pixels)).save(root / kind / f"{i}.jpg", exif=exif)
            else:
                Image.fromarray(pixels).save(root / kind / f"{i}.jpg")
    args = ["--recipe", "finetune_vanilla", "--dataset", root, "--output_dir", tmp_path / "run", *TINY, "--epochs", 5]
    args += ["--hflip", 0, "--scale", 0.9, 1, "--aa", "none"]
    assert server.run(*args)[0] == 0
    assert json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])["top1"] == 100
    assert console("predict", tmp_path / "run", root, "--top_k", 1, "--out", tmp_path / "said.csv")[0] == 0
    rows = [line.split(",") for line in (tmp_path / "said.csv").read_text().splitlines()[1:]]
    assert sum(f"/{label}/" in path for path, label, *_ in rows) == len(rows) == 60
    assert "ImageOps.exif_transpose(Image.open" in (tmp_path / "run/README.md").read_text()


def test_prepared_sets_are_written_as_files_whole_and_prepared_weights_are_no_weights_of_timm(tiny_recipe, tmp_path):
    (photos,) = [path.parent.parent for path in tiny_recipe.parent.rglob("train-*.parquet")]
    prepare.unpack(photos, tmp_path / "files")
    found = load_splits(recipe(tmp_path / "files", eval_split="test"))
    assert (len(found.train), len(found.eval), len(found.classes)) == (72, 30, 4)
    with pytest.raises(UserError, match=r"files is not empty; choose another --folder"):
        prepare.unpack(photos, tmp_path / "files")
    assert [path.name for path in tmp_path.iterdir()] == ["files"]
    (table,) = photos.rglob("train-*.parquet")
    assert "column 'image' holds no paths; for a file that holds the images, pass its folder" in refused(table)
    assert card_facts.base_model(recipe("photos")) is None  # timm has an efficientnet_lite0 of its own
    with pytest.raises(UserError, match="are not those of the model, tensor by tensor"):
        known_weights.in_order({"a": torch.ones(2)}, {"b": torch.ones(3)})
    assert known_weights.in_order({"a": torch.ones(2)}, {"b": torch.ones(2)}).keys() == {"b"}


def test_what_is_not_given_comes_from_the_weights(tmp_path):
    cfg = {
        "input_size": [3, 160, 160],
        "crop_pct": 0.8,
        "mean": [0.5] * 3,
        "std": [0.4] * 3,
        "interpolation": "bilinear",
    }
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": cfg}))
    (tmp_path / "model.safetensors").touch()
    given = {"dataset": "photos", "pretrained": str(tmp_path), "std": [0.1, 0.1, 0.1]}
    fields = preprocessing.of_weights(*resolve("finetune_mixup", given))
    expected = {
        "image_size": 160,
        "eval_size": 160,
        "eval_resize": 200,
        "mean": (0.5,) * 3,
        "interpolation": "bilinear",
    }
    assert fields == expected
    smaller = preprocessing.of_weights(*resolve("finetune_mixup", given | {"image_size": 80}))
    assert (smaller["eval_size"], smaller["eval_resize"], "image_size" in smaller) == (80, 100, False)
    assert preprocessing.of_weights(*resolve("finetune_mixup", given | {"data_config": "recipe"})) == {}
