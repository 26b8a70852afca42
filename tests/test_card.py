"""Promise: a model card says what the run's files say, nothing of a file works as markup, and no words are lost."""

import json
import math
import re
import shlex
import shutil
import statistics
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from driver import Server
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from PIL import Image
from resuming import LOG, Reference
from test_records import DATA, ENV

import mixup_recipes
from mixers import MIXERS
from mixup_recipes import flags as cli
from mixup_recipes.benchmark import cells
from mixup_recipes.hub import push as hub
from mixup_recipes.hub import verify
from mixup_recipes.pages import card as cards
from mixup_recipes.pages.card import card
from mixup_recipes.pages.methods import bibtex, markdown, methods
from mixup_recipes.recipe import Recipe, schema, to_yaml
from mixup_recipes.resolve import load_recipe, resolve
from mixup_recipes.training.job import Job
from mixup_recipes.typed import UserError

TOP1 = [60.0, 71.0, 73.0, 72.0, 75.0]
IMAGENET = {"train": 1_281_167, "validation": 50_000}
HOSTILE = "a|b <script>alert(1)</script> [x](javascript:1) `c` *d* _e_ \n# f\n---\n<!-- mixup-recipes: end -->"


def make_run(folder: Path, recipe: Recipe, top1=TOP1, classes=None, epochs=None, commit="abc") -> Path:
    """A run folder whose evaluations were ``top1``, the last of them in the epoch ``epochs`` (default the last)."""
    folder.mkdir(parents=True)
    count = IMAGENET["validation"]
    last = epochs or recipe.epochs
    lines = []
    for epoch, value in enumerate(top1, last - len(top1) + 1):
        perf = {"img_per_s": 1000.0 + epoch, "seconds": 360.0 * epoch}
        lines.append({"mode": "train", "epoch": epoch, "update": 9 * epoch, "lr": 0.1, "loss": 2.0, "perf": perf})
        scores = {"top1": value, "top5": value + 20, "nll": value / 50, "ece": epoch / 50, "count": count}
        scores |= {f"ema_{k}": v for k, v in scores.items()} if recipe.ema_decay is not None else {}
        lines.append({"mode": "val", "epoch": epoch, "update": 9 * epoch, **scores, "perf": perf})
    sizes = dict(zip((recipe.train_split, recipe.eval_split), IMAGENET.values(), strict=True))
    splits = {split: {"images": images, "labels_sha256": "aa"} for split, images in sizes.items()}
    classes = classes or [f"class {i}" for i in range(recipe.num_classes)]
    exported = {k: v for k, v in lines[-1].items() if k not in ("mode", "perf")}
    files = {"data.json": DATA | {"dataset": recipe.dataset, "splits": splits, "classes": classes}}
    files |= {"env.json": ENV | {"commit": commit}, "eval_results.json": {"exported": exported}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A whole run of a published cell."""
    return make_run(tmp_path / "published", load_recipe("r18_100e_cutmix"))


@pytest.fixture
def folder(reference: Reference) -> Path:
    """The folder of a real run. Read it only."""
    return reference("--mixer", "deit")


def metadata(text: str) -> dict:
    """The YAML block of a card, by another reading than the one of the code."""
    start, block, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(block)


def tokens(text: str) -> list:
    """All block and inline tokens of the Markdown below the metadata."""
    body = text.split("---\n", 2)[2]
    parsed = MarkdownIt("commonmark").enable("table").parse(body)
    return [t for token in parsed for t in (token, *(token.children or []))]


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of all tables of a section, as rendered text."""
    section = re.split(r"^## ", text, flags=re.M)
    (section,) = [s for s in section if s.startswith(f"{heading}\n")]
    parsed = MarkdownIt("commonmark").enable("table").parse(section)
    found, row = [], []
    for i, token in enumerate(parsed):
        if token.type == "tr_open":
            row = []
            found.append(row)
        elif token.type in ("td_open", "th_open"):
            row.append("".join(t.content for t in parsed[i + 1].children))
    return found


def blocks(text: str, language: str) -> list[str]:
    """Code blocks of a language."""
    return [t.content for t in tokens(text) if t.type == "fence" and t.info == language]


def trained_by(flags: list[str]) -> Recipe:
    """The recipe that train_mixup.py would train with these flags."""
    given = cli.parse(flags, "train_mixup.py", "", {"Run": Job, "Recipe fields": Recipe})
    return resolve(cli.fill(Job, given["Run"]).recipe, given["Recipe fields"])[0]


# ------------------------------------------------------------------------------------------------ numbers


def test_the_numbers_are_those_of_the_log(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    val = [line for line in lines if line["mode"] == "val"]
    text = card(folder)
    shown = {row[0]: row[1:] for row in rows(text, "Results")}
    last = {k: statistics.median(v[k] for v in val[-2:]) for k in ("top1", "top5", "nll", "ece")}
    digits = (("top1", 2), ("top5", 2), ("nll", 3), ("ece", 2))
    assert shown["reported: median of the last 2 epochs"] == [f"{last[k]:.{d}f}" for k, d in digits]
    assert shown["these weights, epoch 3"] == [f"{val[-1][k]:.{d}f}" for k, d in digits]
    assert shown["models/ema"] == [f"{val[-1][f'ema_{k}']:.{d}f}" for k, d in digits]
    tool = shown["OpenMixup's tool: median of the last 3 epochs"]
    assert tool == [f"{statistics.median(v['top1'] for v in val):.2f}", "-", "-", "-"]
    assert "30 images of `test`" in text and "Not finished" not in text
    hours = lines[-1]["perf"]["seconds"] / 3600
    assert f"{hours:.3g} hours on 1 process" in text
    rate = statistics.median(line["perf"]["img_per_s"] for line in lines if line["mode"] == "train")
    assert f"{rate:,.0f} images/s" in text
    environment = json.loads((folder / "env.json").read_text())
    assert all(f"{name} {version}" in text for name, version in environment["packages"].items())


def test_the_metadata_hold_the_accuracy_of_the_exported_weights(published: Path) -> None:
    data = metadata(card(published))
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "resnet18.cutmix_e100"
    assert [(r.metric_name, r.metric_value) for r in results] == [
        ("Top-1 accuracy (%)", 75.0), ("Top-5 accuracy (%)", 95.0),
    ]  # fmt: skip
    assert {(r.task_type, r.metric_type, r.dataset_type, r.dataset_split) for r in results} == {
        ("image-classification", "accuracy", "ILSVRC/imagenet-1k", "validation")
    }
    assert data["library_name"] == "timm" and data["pipeline_tag"] == "image-classification"
    assert {"image-classification", "timm", "transformers", "mixup-recipes", "cutmix", "r18_100e"} <= set(data["tags"])
    assert data["datasets"] == ["ILSVRC/imagenet-1k"] and data["metrics"] == ["accuracy"]


def test_huggingface_hub_reads_the_card_and_writes_the_same_metadata(published: Path) -> None:
    text = card(published, "someone/some-model")
    read = ModelCard(text)
    assert read.data.to_dict() == metadata(text)
    assert read.data.model_name == "some-model" and len(read.data.eval_results) == 2
    assert metadata(str(read)) == metadata(text)


def test_the_hub_accepts_the_card(published: Path, tmp_path: Path) -> None:
    """With the test Hub, which checks what the Hub checks."""
    hub_server = pytest.importorskip("hub_server")

    def validate(path: str) -> None:
        from huggingface_hub import ModelCard

        ModelCard.load(path).validate()

    cards.write(published, "tester/model")
    with hub_server.HubServer(tmp_path / "hub") as hub:
        hub.client(validate, str(published / "README.md"))
        assert any("validate-yaml" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("pretrained", "expected"),
    [
        (None, None),
        ("timm", "timm/resnet18.a1_in1k"),
        ("resnet18.tv_in1k", "timm/resnet18.tv_in1k"),
        ("resnet18", "timm/resnet18.a1_in1k"),
        ("resnet18.no_such", None),
        ("hf-hub:someone/some-model", "someone/some-model"),
        ("hf-hub:someone/some-model@0123abc", "someone/some-model"),
        ("hf-hub:a/../b", None),
        ("hf-hub:no-owner", None),
        ("FOLDER", None),
        ("/a/folder/that/is/gone", None),
    ],
)
def test_the_card_of_a_fine_tuned_run_names_what_it_started_from(
    tmp_path: Path, pretrained: str | None, expected: str | None
) -> None:
    start = str(tmp_path) if pretrained == "FOLDER" else pretrained
    text = card(make_run(tmp_path / "run", load_recipe("r18_100e_cutmix", pretrained=start)), "someone/tuned")
    read = ModelCard(text).data
    assert read.to_dict() == metadata(text)
    assert read.base_model == expected
    assert metadata(text).get("base_model_relation") == ("finetune" if expected else None)
    assert (["fine-tuned from", expected] in rows(text, "Model")) == bool(expected)


def test_a_start_from_a_run_folder_is_named_once_that_is_published_and_never_when_private(tmp_path: Path) -> None:
    start = make_run(tmp_path / "start", load_recipe("r18_100e_vanilla"))
    run = make_run(tmp_path / "run", load_recipe("r18_100e_cutmix", pretrained=str(start)))
    told = {"repo_id": "someone/start", "private": False}  # where it goes; not yet there
    for changes, expected in (
        ({}, None), ({"card_sha256": "aa"}, "someone/start"), ({"card_sha256": "aa", "private": True}, None),
    ):  # fmt: skip
        hub.note(start, **told | changes)
        assert metadata(card(run)).get("base_model") == expected


def test_a_base_model_that_a_person_has_written_stays_where_none_is_known(published: Path, tmp_path: Path) -> None:
    existing = "---\nbase_model: [a/b, c/d]\n---\n"
    assert metadata(card(published, existing=existing))["base_model"] == ["a/b", "c/d"]
    tuned = make_run(tmp_path / "run", load_recipe("r18_100e_cutmix", pretrained="hf-hub:e/f"))
    assert metadata(card(tuned, existing=existing))["base_model"] == "e/f"


def test_results_name_the_commit_of_the_data_that_was_read(published: Path) -> None:
    content = json.loads((published / "data.json").read_text())
    (published / "data.json").write_text(json.dumps(content | {"commit": "b" * 40}))
    _, results = model_index_to_eval_results(metadata(card(published))["model-index"])
    assert {result.dataset_revision for result in results} == {"b" * 40}
    (published / "data.json").write_text(json.dumps(content | {"commit": "<script>"}))
    with pytest.raises(UserError, match="commit: expected 40 hexadecimal digits, got '<script>'"):
        card(published)


def test_an_average_of_the_weights_is_what_is_reported(tmp_path: Path) -> None:
    recipe = load_recipe("r18_100e_cutmix", ema_decay=0.9, report_ema=True)
    run = make_run(tmp_path / "run", recipe)
    results = json.loads((run / "eval_results.json").read_text())
    results["exported"]["ema_top1"] = 12.5
    (run / "eval_results.json").write_text(json.dumps(results))
    text = card(run)
    assert metadata(text)["model-index"][0]["results"][0]["metrics"][0]["value"] == 12.5
    assert "moving average (EMA), epoch 100" in text


def test_leaderboards_get_the_same_number(published: Path) -> None:
    files = cards.write(published, "someone/some-model")
    assert [str(p.relative_to(published)) for p in files] == ["README.md", ".eval_results/mixup-recipes.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[1].read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("ILSVRC/imagenet-1k", "default", 75.0)
    assert entry.source_url.endswith("/someone/some-model/blob/main/log.jsonl")
    assert "50000 images of validation, centre crop of 224 px after resizing to 256, epoch 100" in entry.notes


def test_no_leaderboard_gets_part_of_a_run_or_of_the_images_or_a_local_folder(tmp_path: Path, folder: Path) -> None:
    recipe = load_recipe("r18_100e_cutmix")
    runs = [make_run(tmp_path / "a", recipe, epochs=40), folder]
    runs.append(make_run(tmp_path / "b", load_recipe("r18_100e_cutmix", max_eval_samples=50_000)))
    assert [cards.eval_results(cards.read(run)) for run in runs] == [None] * 3


def test_an_unfinished_run_says_so_and_puts_no_number_into_the_metadata(tmp_path: Path) -> None:
    text = card(make_run(tmp_path / "run", load_recipe("r18_100e_cutmix"), epochs=40))
    assert "**Not finished:** epoch 40 of 100." in text and "nothing to compare yet" in text
    assert "model-index" not in metadata(text)


# ------------------------------------------------------------------------------------------------ published


def band(published: float) -> float:
    """Half width for one run against one: the binomial deviation and Student's t of 8 degrees of freedom, 2.306."""
    return 2.306004 * 100 * math.sqrt(published / 100 * (1 - published / 100) / 50_000) * math.sqrt(2)


def published_number(name: str) -> float:
    """The number of a cell, read from the table itself."""
    setting, mixer = name.rsplit("_", 1)
    lines = (Path(cards.__file__).parent / "published.csv").read_text().splitlines()
    head = lines[0].split(",")
    (row,) = [r for r in (line.split(",") for line in lines) if r[head.index("setting")] == setting and mixer in r]
    return float(row[head.index("top1")])


@pytest.mark.parametrize(("offset", "words"), [(0.3, "reproduced within the band"), (-3.0, "too early to say")])
def test_the_run_is_held_against_the_published_number(offset: float, words: str, tmp_path: Path) -> None:
    number = published_number("r18_100e_cutmix")
    text = card(make_run(tmp_path / "run", load_recipe("r18_100e_cutmix"), [number + offset] * 5))
    assert f"Published: **{number:.2f}** top-1" in text and "median of the last 5 epochs" in text
    assert f"{number + offset:.2f}, {offset:+.2f} from the published number" in text
    assert f"±{band(number):.2f} is noise: **{words}**" in text


def test_a_changed_recipe_is_not_held_against_the_published_number(tmp_path: Path) -> None:
    text = card(make_run(tmp_path / "run", load_recipe("r18_100e_cutmix", smoothing=0.1)))
    assert "Published: **" in text and "is noise" not in text
    assert "does not speak for that number: runs with smoothing 0.1 instead of 0.0 do not count" in text


def test_a_number_that_openmixup_did_not_train_is_marked(tmp_path: Path) -> None:
    recipe = load_recipe("r50_100e_alignmix")
    text = card(make_run(tmp_path / "run", recipe))
    assert f"**{published_number('r50_100e_alignmix'):.2f}‡**" in text and "not trained by OpenMixup" in text


def test_a_recipe_without_a_published_number_says_so(folder: Path) -> None:
    assert "No published number belongs to this recipe." in card(folder)


# ------------------------------------------------------------------------------------------------ recipe


def test_values_that_are_not_the_settings_are_shown_with_their_origin(tmp_path: Path) -> None:
    recipe = load_recipe("tiny_r18_automix", lr=0.3)
    found = rows(card(make_run(tmp_path / "run", recipe)), "Recipe")
    assert found[0] == ["field", "value", "origin"]
    cut = found.index(["field", "value", "origin"], 1)
    first, every = found[1:cut], {row[0]: row[1:] for row in found[cut + 1 :]}
    assert every["lr"] == ["0.3", "this run, instead of 0.2"] and ["lr", *every["lr"]] in first
    assert every["mixer"] == ["automix", "recipe name"] and ["mixer", *every["mixer"]] in first
    assert any(origin == "tiny_r18.yaml: per_mixer.automix" for _, _, origin in first)
    assert any(origin == "mixer's default" for _, _, origin in first)
    assert every["epochs"] == ["400", "tiny_r18.yaml"] and "epochs" not in [row[0] for row in first]
    fields = {f for f in schema(Recipe) if f not in ("name", "mixer_args")}
    assert set(every) == fields | {f"mixer.{k}" for k in recipe.mixer_args["automix"]}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("r18_100e_cutmix", {}),
        ("deit_s_samix", {"seed": 2}),
        ("quickstart_mixup", {"epochs": 6, "scale": (0.5, 1.0), "aa": "rand-m9-mstd0.5-inc1", "sync_bn": True}),
        ("deit_s_deit", {"mixer_args": {"mixup_alpha": 0.3}, "drop_path_rate": None, "model_args": {"depth": 6}}),
        ("r50_100e_alignmix", {"mixer_args": {"partner": "manifoldmix"}}),
        ("tiny_r18_automix", {"mixer": "fmix"}),
        ("quickstart_cutmix", {"dataset": "someone/photos", "eval_split": "two words"}),
    ],
)
def test_the_command_trains_the_same_recipe(name: str, changes: dict, tmp_path: Path) -> None:
    recipe = load_recipe(name, **changes)
    (line,) = [b for b in blocks(card(make_run(tmp_path / "run", recipe)), "bash") if "train_mixup.py" in b]
    start, flags = line.split(" train_mixup.py ")
    assert start == "accelerate launch" and "recipe.yaml" not in flags
    assert trained_by(shlex.split(flags)) == recipe


def test_a_recipe_that_this_package_does_not_have_is_trained_from_its_file(
    folder: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for repo_id, start in ((None, "accelerate"), ("a/b", "hf download a/b recipe.yaml --local-dir . && accelerate")):
        text = card(folder, repo_id)
        (line,) = [b for b in blocks(text, "bash") if "train_mixup.py" in b]
        assert line.startswith(f"{start} launch train_mixup.py ")
    monkeypatch.chdir(folder)
    flags = shlex.split(line.split("train_mixup.py")[1])
    photos = load_recipe(str(tiny_recipe)).dataset
    assert trained_by([photos if f == "PATH" else f for f in flags]) == load_recipe("./recipe.yaml")
    assert photos not in text, "a path of this machine"


# ------------------------------------------------------------------------------------------------ use


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_the_code_of_the_card_runs_and_names_a_class(package: str, folder: Path, tmp_path: Path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(folder, run, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    Image.new("RGB", (48, 40), "red").save(run / "image.jpg")
    (block,) = [b for b in blocks(card(folder), "python") if f"import {package}" in b or f"from {package}" in b]
    monkeypatch.chdir(run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages
        exec(compile(block, "card", "exec"), {})
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("blue", "green", "red", "white"))


def test_the_card_of_a_repository_loads_from_it_and_links_its_logs(folder: Path) -> None:
    text = card(folder, "someone/some-model")
    assert 'timm.create_model("hf-hub:someone/some-model", pretrained=True)' in text
    assert 'pipeline("image-classification", model="someone/some-model")' in text
    assert "evaluate_mixup.py --model hf-hub:someone/some-model --dataset PATH --split test" in text
    links = {dict(t.attrs)["href"] for t in tokens(text) if t.type == "link_open"}
    local = {link for link in links if "://" not in link}
    assert {"log.jsonl", "summary.csv", "recipe.yaml"} <= local
    assert all((folder / link).is_file() for link in local)
    for place in ("models/ema", "runs", "samples"):
        assert any(link.endswith(f"/someone/some-model/tree/main/{place}") for link in links)
        assert f"[{place}]({place})" in card(folder)
    assert any(link.endswith("/someone/some-model/tensorboard") for link in links)
    assert [dict(t.attrs)["src"] for t in tokens(text) if t.type == "image"] == ["samples/epoch_002.png"]


def test_the_card_shows_what_a_step_with_the_mixer_was_counted_at(folder: Path) -> None:
    text = card(folder)
    rows = [row for row in cells.rows("costs.csv") if row["mixer"] == "cutmix"]
    assert {row["model"] for row in rows} >= {"resnet50", "deit_small_patch16_224"}
    for row in rows:
        assert f"| {row['model']} | {float(row['flops']):.2f}x | {float(row['kept']):.2f}x |" in text


def test_verify_holds_the_card_s_numbers_to_the_exported_weights_and_the_text_to_the_protocol(
    reference: Reference,
) -> None:
    run = reference("--mixer", "vanilla", "--protocol", "median", "--protocol_epochs", 5)
    results = json.loads((run / "eval_results.json").read_text())
    assert results["reported"]["top1"] != results["exported"]["top1"]
    rows = list(verify.of_files(run, load_recipe(str(run / "recipe.yaml"))))
    assert [what for what, good in rows if not good] == []
    assert sum("card and" in what for what, _ in rows) == 1
    assert "top-1 (median of the last 5 epochs: 3 of 5 epochs, seed 0)." in (run / "README.md").read_text()


AT_MOST = {
    "automix": 3.11,
    "samix": 3.11,
    "adautomix": 3.15,
    "supermix": 4.5,
    "comixup": 2.05,
    "puzzlemix": 1.8,
    "smmix": 1.2,
    "transmix": 1.05,
    "mixpro": 1.05,
    "tlalign": 1.05,
}


def test_every_mixer_has_been_counted_and_those_that_promise_little_keep_it() -> None:
    rows = cells.rows("costs.csv")
    assert {row["mixer"] for row in rows if row["model"] == "deit_small_patch16_224"} == set(MIXERS)
    assert all(float(row["flops"]) <= AT_MOST.get(row["mixer"], 1.35) for row in rows)


def test_an_architecture_that_timm_lacks_says_what_to_import(tmp_path: Path) -> None:
    text = card(make_run(tmp_path / "run", load_recipe("pvt_t_deit")))
    assert [b.splitlines()[0].split("  #")[0] for b in blocks(text, "python")] == [
        "import mixup_recipes.training.backbones"
    ] * 2


# ------------------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_has_law_deviations_and_a_citation(name: str) -> None:
    made = methods(name, {})
    assert all({"Formula", "Sampling law", "Deviations"} <= set(m.parts) for m in made)
    found = [p for m in made if (p := bibtex(m.head))]
    assert name == "vanilla" or found
    for paper in found:
        kind, fields = re.fullmatch(r"@(\w+)\{\w+,\n(.*)\n\}", paper, re.S).groups()
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", fields, re.M))
        assert re.fullmatch(r"20\d\d", fields["year"]) and fields["url"].startswith("https://")
        assert (kind == "inproceedings") == ("booktitle" in fields)
        assert all(re.fullmatch(r"[A-Z][\w-]+|others", author) for author in fields["author"].split(" and "))


def test_a_composition_takes_what_it_is_made_of() -> None:
    assert [m.title for m in methods("rsb", {})] == ["ResNet strikes back", "mixup", "CutMix"]
    assert [m.title for m in methods("samix", {})] == ["SAMix", "AutoMix"]
    assert [m.title for m in methods("alignmix", {"partner": "manifoldmix"})] == ["AlignMixup", "Manifold Mixup"]
    touvron = bibtex(methods("deit", {})[0].head)
    assert "Training data-efficient image transformers" in touvron and "Touvron and others" in touvron


@pytest.mark.parametrize("name", MIXERS)
def test_a_docstring_is_rendered_as_it_is_written(name: str) -> None:
    """What looks like emphasis, a link or HTML in a docstring, such as H*W, is text."""
    for part in (p for m in methods(name, {}) for p in m.parts.values()):
        found = [t for token in MarkdownIt("commonmark").parse(part) for t in (token, *(token.children or []))]
        assert {t.type for t in found} <= {
            "paragraph_open", "paragraph_close", "inline", "text", "code_inline", "softbreak", "bullet_list_open",
            "bullet_list_close", "list_item_open", "list_item_close",
        }  # fmt: skip
    assert markdown("H*W and a*b") == r"H\*W and a\*b" and markdown("``a*b``\n\n* c") == "``a*b``\n\n* c"


# ------------------------------------------------------------------------------------------------ hostile


def test_names_of_a_file_are_text_whatever_they_hold(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart_cutmix", eval_split=HOSTILE, train_split=HOSTILE + "2", dataset=HOSTILE)
    recipe = Recipe(**{f: getattr(recipe, f) for f in schema(Recipe)} | {"name": HOSTILE, "opt": HOSTILE})
    run = make_run(tmp_path / "run", recipe, classes=[HOSTILE, "!!python/object:os.system", "b"], commit=HOSTILE)
    environment = json.loads((run / "env.json").read_text()) | {"device": HOSTILE, "packages": {HOSTILE: HOSTILE}}
    (run / "env.json").write_text(json.dumps(environment))
    text = card(run)
    markup = [t.content for t in tokens(text) if t.type in ("html_block", "html_inline")]
    ours = r"<!-- mixup-recipes: (begin|end)[^<]*-->|</?details>(<summary>All \d+ values</summary>)?|</?details>"
    assert all(re.fullmatch(ours, line.strip()) for line in markup), markup
    links = {dict(t.attrs)["href"] for t in tokens(text) if t.type == "link_open"}
    assert all(link.startswith("https://") or re.fullmatch(r"[\w.]+", link) for link in links)
    assert not [t for t in tokens(text) if t.type == "em_open"]
    classes = dict(rows(text, "Model")[1:])["classes"]
    assert classes == f"3: {' '.join(HOSTILE.split())}, !!python/object:os.system, b"
    assert metadata(text)["pipeline_tag"] == "image-classification"
    assert ModelCard(text).data.to_dict() == metadata(text)
    (run / "README.md").write_text(text)
    assert card(run) == text, "a marker within a name was taken for ours"
    assert "\n# f" not in text and text.count("\n<!-- mixup-recipes: end -->") == 1


def test_a_command_of_several_lines_is_not_shown(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart_cutmix", eval_split="a\n```\n<script>alert(1)</script>\n```", train_split="b")
    text = card(make_run(tmp_path / "run", recipe))
    (block,) = [b for b in blocks(text, "bash") if "train_mixup.py" in b]
    assert block == "accelerate launch train_mixup.py --recipe recipe.yaml\n"
    assert not [t for t in tokens(text) if t.type.startswith("html") and "script" in t.content]


def test_a_recipe_name_that_is_a_path_is_not_opened(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("!!python/object/apply:os.system [exit]")
    recipe = load_recipe("quickstart_cutmix")
    recipe = Recipe(**{f: getattr(recipe, f) for f in schema(Recipe)} | {"name": str(other)})
    assert cards.published(recipe) is None


# ------------------------------------------------------------------------------------------------ again


def test_what_a_person_added_stays_and_the_rest_is_new(published: Path) -> None:
    text = card(published)
    head, body = text.split("---\n", 2)[1:]
    results = [
        {
            "task": {"type": "image-classification"},
            "dataset": {"name": "ImageNet-V2", "type": "x/imagenet-v2"},
            "metrics": [{"type": "accuracy", "value": 61.2}],
        }
    ]
    mine = yaml.safe_load(head) | {"license": "mit", "language": ["en"], "extra": {"a": [1, 2]}}
    mine["tags"].append("birds")
    mine["model-index"][0]["results"] += results
    mine["model-index"][0]["results"][0]["metrics"][0]["value"] = 1.0
    begin = body.index("<!-- mixup-recipes: begin")
    edited = body[:begin] + "# Mine\r\n\r\nabove | *this*\n" + body[begin:].replace("CutMix", "Nonsense") + "below\n"
    path = published / "README.md"
    path.write_bytes(b"\xef\xbb\xbf" + f"---\n{yaml.safe_dump(mine)}---\n{edited}".encode())
    cards.write(published)
    again = path.read_bytes().decode()
    assert "Nonsense" not in again and again.endswith("<!-- mixup-recipes: end -->\nbelow\n")
    assert "# Mine\r\n\r\nabove | *this*\n<!-- mixup-recipes: begin" in again
    data = metadata(again)
    assert data["license"] == "mit" and data["language"] == ["en"] and data["extra"] == {"a": [1, 2]}
    assert "birds" in data["tags"] and len(set(data["tags"])) == len(data["tags"])
    found = {(r["dataset"]["type"], m["value"]) for r in data["model-index"][0]["results"] for m in r["metrics"]}
    assert found == {("ILSVRC/imagenet-1k", 75.0), ("ILSVRC/imagenet-1k", 95.0), ("x/imagenet-v2", 61.2)}
    cards.write(published)
    assert path.read_bytes().decode() == again, "written twice, it is another card"


@pytest.mark.parametrize("old", ["", "Notes of mine.\n", "---\nlanguage: en\n---\nNotes of mine.\n"])
def test_a_readme_that_is_no_card_of_ours_keeps_its_text_below(old: str, published: Path) -> None:
    (published / "README.md").write_text(old)
    first = card(published)
    (published / "README.md").write_text(first)
    assert card(published) == first
    assert ("language" in metadata(first)) == ("language" in old)
    after = first.split("<!-- mixup-recipes: end -->")[1]
    assert after.strip() == ("Notes of mine." if old else "")


def test_the_text_of_the_card_on_the_hub_can_be_given(published: Path) -> None:
    (published / "README.md").write_text("local\n")
    assert card(published, existing="from the Hub\n").endswith("\n\nfrom the Hub\n")


@pytest.mark.parametrize(
    ("old", "says"),
    [
        ("<!-- mixup-recipes: begin. -->\nmine\n", "found begin"),
        ("<!-- mixup-recipes: end -->\nmine\n<!-- mixup-recipes: begin. -->\n", "found end, begin"),
        ("---\na: [\n---\nmine\n", "the metadata is not valid YAML"),
        ("---\n- a\n---\nmine\n", "the metadata must be a table"),
        ("---\na: !!python/name:os.system x\n---\nmine\n", "the metadata is not valid YAML"),
        ("---\nmodel-index: [{name: a}]\n---\nmine\n", "model-index cannot be read"),
        ("---\nmodel-index: 3\n---\nmine\n", "model-index cannot be read"),
    ],
)
def test_a_card_that_cannot_be_told_apart_is_refused_and_left(old: str, says: str, published: Path) -> None:
    path = published / "README.md"
    path.write_text(old)
    before = sorted(published.rglob("*"))
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        cards.write(published)
    assert "\n" not in str(caught.value) and "README.md" in str(caught.value)
    assert path.read_text() == old and sorted(published.rglob("*")) == before


def test_the_licence_is_the_users(published: Path) -> None:
    assert metadata(card(published))["license"] == "unknown"
    assert metadata(card(published, license="apache-2.0"))["license"] == "apache-2.0"
    old = "---\nlicense: other\nlicense_name: mine\n---\n"
    data = metadata(card(published, existing=old))
    assert data["license"] == "other" and data["license_name"] == "mine"
    assert metadata(card(published, license="mit", existing=old))["license"] == "mit"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"license": "MIT: yes\n"}, "license: expected an identifier"), ({"repo_id": "a/b/c"}, "repo_id: expected"),
     ({"repo_id": 'x"y'}, "repo_id: expected")],
)  # fmt: skip
def test_wrong_arguments_are_one_line(wrong: dict, says: str, published: Path) -> None:
    with pytest.raises(UserError, match=says) as caught:
        card(published, **wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("eval_results.json", '{"exported": {"epoch": 100}}', "exported.count is missing"),
        ("eval_results.json", '{"exported": {"epoch": 1, "count": 1, "top1": "<b>", "top5": 1}}', "exported.top1"),
        ("env.json", "{}", "device is missing"),
        ("data.json", '{"classes": 3}', "splits is missing"),
    ],
)
def test_damaged_files_of_a_run_are_named(file: str, content: str, says: str, published: Path) -> None:
    (published / file).write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        card(published)
    assert file in str(caught.value)


# ------------------------------------------------------------------------------------------------ commands


def test_the_command_writes_into_the_run_or_to_a_file(published: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "card.md"
    out.write_text("mine\n")
    argv = ["mixup-recipes", "card", str(published), "--license", "mit", "--out", str(out), "--repo_id", "a/b"]
    for flags, where in ((argv, out), (argv[:5], published / "README.md")):
        monkeypatch.setattr(sys, "argv", flags)
        with pytest.raises(SystemExit) as left:
            mixup_recipes.main()
        assert not left.value.code and capsys.readouterr().out.splitlines()[0] == str(where)
        assert metadata(where.read_text())["license"] == "mit"
        if where == out:
            assert out.read_text().endswith("\n\nmine\n") and not (published / "README.md").exists()


def test_a_run_ends_with_its_card(folder: Path) -> None:
    assert (folder / "README.md").read_text() == card(folder)


def test_a_card_that_cannot_be_written_does_not_fail_the_run(
    folder: Path, tiny_recipe: Path, server: Server, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(folder, out)
    (out / "README.md").write_text("<!-- mixup-recipes: begin -->\nmine\n")
    given = ["--recipe", tiny_recipe, "--output_dir", out, "--dataloader_num_workers", 0, *LOG, "--mixer", "deit"]
    status, output = server.run(*given, "--resume_from_checkpoint", "auto")
    assert status == 0 and "no model card: " in output and f"mixup-recipes card {out}" in output, output
    assert (out / "README.md").read_text() == "<!-- mixup-recipes: begin -->\nmine\n"
