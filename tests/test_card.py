"""Promise: a model card says what the run's files say, nothing of a file works as markup, and no words are lost."""

import json
import math
import re
import shlex
import shutil
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from driver import Server
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from PIL import Image
from resuming import LOG, Reference
from runs import ENV, IMAGENET, Command, edit, make_run

from mixers import MIXERS
from mixup_recipes import flags
from mixup_recipes.benchmark import cells
from mixup_recipes.files import shipped
from mixup_recipes.hub import push as hub
from mixup_recipes.hub import verify
from mixup_recipes.pages.card import card, write_card
from mixup_recipes.pages.card_metadata import eval_results
from mixup_recipes.pages.methods import bibtex, markdown, methods
from mixup_recipes.recipe import Recipe, schema
from mixup_recipes.resolve import load_recipe, resolve, shipped_recipe
from mixup_recipes.runs.run import Run
from mixup_recipes.training.job import Job
from mixup_recipes.typed import UserError

TOP1 = (60.0, 71.0, 73.0, 72.0, 75.0)
HOSTILE = "a|b <script>alert(1)</script> [x](javascript:1) `c` *d* _e_ \n# f\n---\n<!-- mixup-recipes: end -->"
Made = Callable[..., Run]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A whole run of a published cell, or of a recipe, that was evaluated on ImageNet in its last epochs."""

    def make(recipe: str | Recipe = "r18_100e_cutmix", top1: Any = TOP1, last: int | None = None, **more: Any) -> Run:
        given = {k: more.pop(k) for k in ("classes", "env") if k in more}
        recipe = load_recipe(recipe, **more) if isinstance(recipe, str) else recipe
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        return Run.open(make_run(folder, recipe, top1, last=last or recipe.epochs, sizes=IMAGENET, **given))

    return make


@pytest.fixture
def published(made: Made) -> Run:
    """A whole run of a published cell."""
    return made()


def renamed(recipe: Recipe, **values: Any) -> Recipe:
    """A recipe with values that no name leads to."""
    return Recipe(**{f: getattr(recipe, f) for f in schema(Recipe)} | values)


@pytest.fixture
def real(reference: Reference) -> Run:
    """A real run. Read it only."""
    return Run.open(reference("--mixer", "deit"))


def metadata(text: str) -> dict[str, Any]:
    """The YAML block of a card, by another reading than the one of the code."""
    start, block, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(block)


def tokens(text: str) -> list[Any]:
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


def trained_by(words: list[str]) -> Recipe:
    """The recipe that train_mixup.py would train with these flags."""
    given = flags.parse(words, "train_mixup.py", "", {"Run": Job, "Recipe fields": Recipe})
    return resolve(flags.fill(Job, given["Run"]).recipe, given["Recipe fields"])[0]


# ------------------------------------------------------------------------------------------------ numbers


def test_the_numbers_are_those_of_the_log(real: Run) -> None:
    lines = [json.loads(line) for line in (real.folder / "log.jsonl").read_text().splitlines()]
    val = [line for line in lines if line["mode"] == "val"]
    text = card(real)
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
    environment = json.loads((real.folder / "env.json").read_text())
    assert all(f"{name} {version}" in text for name, version in environment["packages"].items())
    assert (real.folder / "README.md").read_text() == text, "a run ends with its card"


def test_the_metadata_hold_the_accuracy_of_the_exported_weights(published: Run) -> None:
    text = card(published, "someone/some-model")
    data = metadata(text)
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "some-model" and metadata(card(published))["model-index"][0]["name"] == "resnet18.cutmix_e100"
    assert [(r.metric_name, r.metric_value) for r in results] == [
        ("Top-1 accuracy (%)", 75.0), ("Top-5 accuracy (%)", 100.0),
    ]  # fmt: skip
    assert {(r.task_type, r.metric_type, r.dataset_type, r.dataset_split) for r in results} == {
        ("image-classification", "accuracy", "ILSVRC/imagenet-1k", "validation")
    }
    assert data["library_name"] == "timm" and data["pipeline_tag"] == "image-classification"
    assert {"image-classification", "timm", "transformers", "mixup-recipes", "cutmix", "r18_100e"} <= set(data["tags"])
    assert data["datasets"] == ["ILSVRC/imagenet-1k"] and data["metrics"] == ["accuracy"]
    read = ModelCard(text)  # as huggingface_hub sees it
    assert read.data.to_dict() == data == metadata(str(read))
    assert read.data.model_name == "some-model" and len(read.data.eval_results) == 2


def test_the_hub_accepts_the_card(published: Run, tmp_path: Path) -> None:
    """With the test Hub, which checks what the Hub checks."""
    hub_server = pytest.importorskip("hub_server")

    def validate(path: str) -> None:
        from huggingface_hub import ModelCard

        ModelCard.load(path).validate()

    write_card(published, "tester/model")
    with hub_server.HubServer(tmp_path / "hub") as hub:
        hub.client(validate, str(published.folder / "README.md"))
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
    made: Made, tmp_path: Path, pretrained: str | None, expected: str | None
) -> None:
    text = card(made(pretrained=str(tmp_path) if pretrained == "FOLDER" else pretrained), "someone/tuned")
    read = ModelCard(text).data
    assert read.to_dict() == metadata(text)
    assert read.base_model == expected
    assert metadata(text).get("base_model_relation") == ("finetune" if expected else None)
    assert (["fine-tuned from", expected] in rows(text, "Model")) == bool(expected)


def test_a_start_from_a_run_folder_is_named_once_that_is_published_and_never_when_private(made: Made) -> None:
    start = made("r18_100e_vanilla")
    run = made(pretrained=str(start.folder))
    told = {"repo_id": "someone/start", "private": False}  # where it goes; not yet there
    for changes, expected in (
        ({}, None), ({"card_sha256": "aa"}, "someone/start"), ({"card_sha256": "aa", "private": True}, None),
    ):  # fmt: skip
        hub.note(start, **told | changes)
        assert metadata(card(run)).get("base_model") == expected


def test_a_base_model_that_a_person_has_written_stays_where_none_is_known(made: Made) -> None:
    existing = "---\nbase_model: [a/b, c/d]\n---\n"
    assert metadata(card(made(), existing=existing))["base_model"] == ["a/b", "c/d"]
    assert metadata(card(made(pretrained="hf-hub:e/f"), existing=existing))["base_model"] == "e/f"


def test_results_name_the_commit_of_the_data_that_was_read(published: Run) -> None:
    edit(published.folder / "data.json", commit="b" * 40)
    _, results = model_index_to_eval_results(metadata(card(Run.open(published.folder)))["model-index"])
    assert {result.dataset_revision for result in results} == {"b" * 40}


def test_an_average_of_the_weights_is_what_is_reported(made: Made) -> None:
    run = made(ema_decay=0.9, report_ema=True)
    edit(run.folder / "eval_results.json", exported=run.exported | {"ema_top1": 12.5})
    text = card(Run.open(run.folder))
    assert metadata(text)["model-index"][0]["results"][0]["metrics"][0]["value"] == 12.5
    assert "moving average (EMA), epoch 100" in text


def test_leaderboards_get_the_same_number_of_a_whole_run_on_all_images_of_the_hub(
    published: Run, made: Made, real: Run
) -> None:
    files = write_card(published, "someone/some-model")
    assert [str(p.relative_to(published.folder)) for p in files] == ["README.md", ".eval_results/mixup-recipes.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[1].read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("ILSVRC/imagenet-1k", "default", 75.0)
    assert entry.source_url.endswith("/someone/some-model/blob/main/log.jsonl")
    assert "50000 images of validation, centre crop of 224 px after resizing to 256, epoch 100" in entry.notes
    assert [eval_results(run) for run in (made(last=40), real, made(max_eval_samples=50_000))] == [None] * 3


def test_an_unfinished_run_says_so_and_puts_no_number_into_the_metadata(made: Made) -> None:
    text = card(made(last=40))
    assert "**Not finished:** epoch 40 of 100." in text and "nothing to compare yet" in text
    assert "model-index" not in metadata(text)


def test_verify_holds_the_card_s_numbers_to_the_exported_weights_and_the_text_to_the_protocol(
    reference: Reference,
) -> None:
    run = Run.open(reference("--mixer", "vanilla", "--protocol", "median", "--protocol_epochs", 5))
    assert run.results["reported"]["top1"] != run.exported["top1"]
    rows = list(verify.of_files(run))
    assert [what for what, good in rows if not good] == []
    assert sum("card and" in what for what, _ in rows) == 1
    assert "top-1 (median of the last 5 epochs: 3 of 5 epochs, seed 0)." in (run.card or "")


# ------------------------------------------------------------------------------------------------ published


def band(published: float) -> float:
    """Half width for one run against one: the binomial deviation and Student's t of 8 degrees of freedom, 2.306."""
    return 2.306004 * 100 * math.sqrt(published / 100 * (1 - published / 100) / 50_000) * math.sqrt(2)


def published_number(name: str) -> float:
    """The number of a cell, read from the table itself."""
    setting, mixer = name.rsplit("_", 1)
    lines = (shipped("model_cards") / "published.csv").read_text().splitlines()
    head = lines[0].split(",")
    (row,) = [r for r in (line.split(",") for line in lines) if r[head.index("setting")] == setting and mixer in r]
    return float(row[head.index("top1")])


@pytest.mark.parametrize(("offset", "words"), [(0.3, "reproduced within the band"), (-3.0, "too early to say")])
def test_the_run_is_held_against_the_published_number(offset: float, words: str, made: Made) -> None:
    number = published_number("r18_100e_cutmix")
    text = card(made(top1=[number + offset] * 5))
    assert f"Published: **{number:.2f}** top-1" in text and "median of the last 5 epochs" in text
    assert f"{number + offset:.2f}, {offset:+.2f} from the published number" in text
    assert f"±{band(number):.2f} is noise: **{words}**" in text


def test_a_run_that_no_number_can_be_held_against_says_why(made: Made, real: Run) -> None:
    text = card(made(smoothing=0.1))
    assert "Published: **" in text and "is noise" not in text
    assert "does not speak for that number: runs with smoothing 0.1 instead of 0.0 do not count" in text
    text = card(made("r50_100e_alignmix"))
    assert f"**{published_number('r50_100e_alignmix'):.2f}‡**" in text and "not trained by OpenMixup" in text
    assert "No published number belongs to this recipe." in card(real)


# ------------------------------------------------------------------------------------------------ recipe


def test_values_that_are_not_the_settings_are_shown_with_their_origin(made: Made) -> None:
    run = made("tiny_r18_automix", lr=0.3)
    found = rows(card(run), "Recipe")
    assert found[0] == ["field", "value", "origin"]
    cut = found.index(["field", "value", "origin"], 1)
    first, every = found[1:cut], {row[0]: row[1:] for row in found[cut + 1 :]}
    assert every["lr"] == ["0.3", "this run, instead of 0.2"] and ["lr", *every["lr"]] in first
    assert every["mixer"] == ["automix", "recipe name"] and ["mixer", *every["mixer"]] in first
    assert any(origin == "tiny_r18.yaml: per_mixer.automix" for _, _, origin in first)
    assert any(origin == "mixer's default" for _, _, origin in first)
    assert every["epochs"] == ["400", "tiny_r18.yaml"] and "epochs" not in [row[0] for row in first]
    fields = {f for f in schema(Recipe) if f not in ("name", "mixer_args")}
    assert set(every) == fields | {f"mixer.{k}" for k in run.recipe.mixer_args["automix"]}


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
def test_the_command_trains_the_same_recipe(name: str, changes: dict[str, Any], made: Made) -> None:
    run = made(name, **changes)
    (line,) = [b for b in blocks(card(run), "bash") if "train_mixup.py" in b]
    start, flags = line.split(" train_mixup.py ")
    assert start == "accelerate launch" and "recipe.yaml" not in flags
    assert trained_by(shlex.split(flags)) == run.recipe


def test_a_recipe_that_this_package_does_not_have_is_trained_from_its_file(
    real: Run, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for repo_id, start in ((None, "accelerate"), ("a/b", "hf download a/b recipe.yaml --local-dir . && accelerate")):
        text = card(real, repo_id)
        (line,) = [b for b in blocks(text, "bash") if "train_mixup.py" in b]
        assert line.startswith(f"{start} launch train_mixup.py ")
    monkeypatch.chdir(real.folder)
    flags = shlex.split(line.split("train_mixup.py")[1])
    photos = load_recipe(str(tiny_recipe)).dataset
    assert trained_by([photos if f == "PATH" else f for f in flags]) == load_recipe("./recipe.yaml")
    assert photos not in text, "a path of this machine"


# ------------------------------------------------------------------------------------------------ use


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_the_code_of_the_card_runs_and_names_a_class(
    package: str, real: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(real.folder, run, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    Image.new("RGB", (48, 40), "red").save(run / "image.jpg")
    (block,) = [b for b in blocks(card(real), "python") if f"import {package}" in b or f"from {package}" in b]
    monkeypatch.chdir(run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages
        exec(compile(block, "card", "exec"), {})
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("blue", "green", "red", "white"))


def test_the_card_of_a_repository_loads_from_it_and_links_its_logs(real: Run) -> None:
    text, here = card(real, "someone/some-model"), card(real)
    assert 'timm.create_model("hf-hub:someone/some-model", pretrained=True)' in text
    assert 'pipeline("image-classification", model="someone/some-model")' in text
    assert "evaluate_mixup.py hf-hub:someone/some-model --dataset PATH --split test" in text
    links = {dict(t.attrs)["href"] for t in tokens(text) if t.type == "link_open"}
    local = {link for link in links if "://" not in link}
    assert {"log.jsonl", "summary.csv", "recipe.yaml"} <= local
    assert all((real.folder / link).is_file() for link in local)
    for place in ("models/ema", "runs", "samples"):
        assert any(link.endswith(f"/someone/some-model/tree/main/{place}") for link in links)
        assert f"[{place}]({place})" in here
    assert any(link.endswith("/someone/some-model/tensorboard") for link in links)
    assert [dict(t.attrs)["src"] for t in tokens(text) if t.type == "image"] == ["samples/epoch_002.png"]


def test_an_architecture_that_timm_lacks_says_what_to_import(made: Made) -> None:
    first = [b.splitlines()[0].split("  #")[0] for b in blocks(card(made("pvt_t_deit")), "python")]
    assert first == ["import mixup_recipes.training.backbones"] * 2


AT_MOST = {
    "automix": 3.11, "samix": 3.11, "adautomix": 3.15, "supermix": 4.5, "comixup": 2.05, "puzzlemix": 1.8,
    "smmix": 1.2, "transmix": 1.05, "mixpro": 1.05, "tlalign": 1.05,
}  # fmt: skip


def test_every_mixer_has_been_counted_and_a_card_shows_what_a_step_with_its_own_costs(real: Run) -> None:
    counted = cells.rows("costs.csv")
    assert {row["mixer"] for row in counted if row["model"] == "deit_small_patch16_224"} == set(MIXERS)
    assert all(float(row["flops"]) <= AT_MOST.get(row["mixer"], 1.35) for row in counted)
    own, text = [row for row in counted if row["mixer"] == "deit"], card(real)
    assert {row["model"] for row in own} >= {"resnet50", "deit_small_patch16_224"}
    for row in own:
        assert f"| {row['model']} | {float(row['flops']):.2f}x | {float(row['kept']):.2f}x |" in text


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
    assert [m.title for m in methods("rsb", {})] == ["rsb", "mixup", "CutMix"]
    assert [m.title for m in methods("samix", {})] == ["SAMix", "AutoMix"]
    assert [m.title for m in methods("alignmix", {"partner": "manifoldmix"})] == ["AlignMixup", "Manifold Mixup"]
    touvron = bibtex(methods("deit", {})[0].head)
    assert "Training data-efficient image transformers" in touvron and "Touvron and Cord and others" in touvron


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


def test_names_of_a_file_are_text_whatever_they_hold(made: Made) -> None:
    recipe = load_recipe("quickstart_cutmix", eval_split=HOSTILE, train_split=HOSTILE + "2", dataset=HOSTILE)
    env = ENV | {"commit": HOSTILE, "device": HOSTILE, "packages": {HOSTILE: HOSTILE}}
    classes = [HOSTILE, "!!python/object:os.system", "b"]
    run = made(renamed(recipe, name=HOSTILE, opt=HOSTILE), classes=classes, env=env)
    text = card(run)
    markup = [t.content for t in tokens(text) if t.type in ("html_block", "html_inline")]
    ours = r"<!-- mixup-recipes: (begin|end)[^<]*-->|</?details>(<summary>All \d+ values</summary>)?|</?details>"
    assert all(re.fullmatch(ours, line.strip()) for line in markup), markup
    links = {dict(t.attrs)["href"] for t in tokens(text) if t.type == "link_open"}
    assert all(link.startswith("https://") or re.fullmatch(r"[\w.]+", link) for link in links)
    assert not [t for t in tokens(text) if t.type == "em_open"]
    shown = dict(rows(text, "Model")[1:])["classes"]
    assert shown == f"3: {' '.join(HOSTILE.split())}, !!python/object:os.system, b"
    assert metadata(text)["pipeline_tag"] == "image-classification"
    assert ModelCard(text).data.to_dict() == metadata(text)
    (run.folder / "README.md").write_text(text)
    assert card(Run.open(run.folder)) == text, "a marker within a name was taken for ours"
    assert "\n# f" not in text and text.count("\n<!-- mixup-recipes: end -->") == 1


def test_a_command_of_several_lines_is_not_shown(made: Made) -> None:
    split = "a\n```\n<script>alert(1)</script>\n```"
    text = card(made("quickstart_cutmix", eval_split=split, train_split="b"))
    (block,) = [b for b in blocks(text, "bash") if "train_mixup.py" in b]
    assert block == "accelerate launch train_mixup.py --recipe recipe.yaml\n"
    assert not [t for t in tokens(text) if t.type.startswith("html") and "script" in t.content]


def test_a_recipe_name_that_is_a_path_is_not_opened(made: Made, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("!!python/object/apply:os.system [exit]")
    assert shipped_recipe(str(other)) is None
    run = made(renamed(load_recipe("quickstart_cutmix"), name=str(other)))
    assert "No published number belongs to this recipe." in card(run)


# ------------------------------------------------------------------------------------------------ again


def again(run: Run, text: str | bytes) -> Run:
    """The run with another ``README.md``."""
    (run.folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return Run.open(run.folder)


def test_what_a_person_added_stays_and_the_rest_is_new(published: Run) -> None:
    head, body = card(published).split("---\n", 2)[1:]
    mine = yaml.safe_load(head) | {"license": "mit", "language": ["en"], "extra": {"a": [1, 2]}}
    mine["tags"].append("birds")
    mine["model-index"][0]["results"].append({
        "task": {"type": "image-classification"}, "dataset": {"name": "ImageNet-V2", "type": "x/imagenet-v2"},
        "metrics": [{"type": "accuracy", "value": 61.2}],
    })  # fmt: skip
    mine["model-index"][0]["results"][0]["metrics"][0]["value"] = 1.0
    begin = body.index("<!-- mixup-recipes: begin")
    edited = body[:begin] + "# Mine\r\n\r\nabove | *this*\n" + body[begin:].replace("CutMix", "Nonsense") + "below\n"
    write_card(again(published, b"\xef\xbb\xbf" + f"---\n{yaml.safe_dump(mine)}---\n{edited}".encode()))
    text = (published.folder / "README.md").read_bytes().decode()
    assert "Nonsense" not in text and text.endswith("<!-- mixup-recipes: end -->\nbelow\n")
    assert "# Mine\r\n\r\nabove | *this*\n<!-- mixup-recipes: begin" in text
    data = metadata(text)
    assert data["license"] == "mit" and data["language"] == ["en"] and data["extra"] == {"a": [1, 2]}
    assert "birds" in data["tags"] and len(set(data["tags"])) == len(data["tags"])
    found = {(r["dataset"]["type"], m["value"]) for r in data["model-index"][0]["results"] for m in r["metrics"]}
    assert found == {("ILSVRC/imagenet-1k", 75.0), ("ILSVRC/imagenet-1k", 100.0), ("x/imagenet-v2", 61.2)}
    write_card(Run.open(published.folder))
    assert (published.folder / "README.md").read_bytes().decode() == text, "written twice, it is another card"


@pytest.mark.parametrize("old", ["", "Notes of mine.\n", "---\nlanguage: en\n---\nNotes of mine.\n"])
def test_a_readme_that_is_no_card_of_ours_keeps_its_text_below(old: str, published: Run) -> None:
    first = card(again(published, old))
    assert card(again(published, first)) == first
    assert ("language" in metadata(first)) == ("language" in old)
    after = first.split("<!-- mixup-recipes: end -->")[1]
    assert after.strip() == ("Notes of mine." if old else "")
    assert card(again(published, "local\n"), existing="from the Hub\n").endswith("\n\nfrom the Hub\n")


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
def test_a_card_that_cannot_be_told_apart_is_refused_and_left(old: str, says: str, published: Run) -> None:
    run = again(published, old)
    before = sorted(run.folder.rglob("*"))
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        write_card(run)
    assert "\n" not in str(caught.value) and "README.md" in str(caught.value)
    assert (run.folder / "README.md").read_text() == old and sorted(run.folder.rglob("*")) == before


def test_the_licence_is_the_users(published: Run) -> None:
    assert metadata(card(published))["license"] == "unknown"
    assert metadata(card(published, license="apache-2.0"))["license"] == "apache-2.0"
    old = "---\nlicense: other\nlicense_name: mine\n---\n"
    data = metadata(card(published, existing=old))
    assert data["license"] == "other" and data["license_name"] == "mine"
    assert metadata(card(published, license="mit", existing=old))["license"] == "mit"


def test_wrong_arguments_are_one_line(published: Run) -> None:
    for wrong, says in (
        ({"license": "MIT: yes\n"}, "license: expected an identifier"),
        ({"repo_id": "a/b/c"}, "hub_model_id: expected"),
        ({"repo_id": 'x"y'}, "hub_model_id: expected"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            card(published, **wrong)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ commands


def test_the_command_writes_into_the_run_or_to_a_file(published: Run, console: Command, tmp_path: Path) -> None:
    out = tmp_path / "card.md"
    out.write_text("mine\n")
    argv = ("card", published.folder, "--license", "mit")
    assert console(*argv, "--out", out, "--repo_id", "a/b") == (0, f"{out}\n", "")
    assert out.read_text().endswith("\n\nmine\n") and not (published.folder / "README.md").exists()
    status, shown, _ = console(*argv)
    assert status == 0 and shown.splitlines()[0] == str(published.folder / "README.md")
    assert all(metadata(path.read_text())["license"] == "mit" for path in (out, published.folder / "README.md"))


def test_a_card_that_cannot_be_written_does_not_fail_the_run(
    real: Run, tiny_recipe: Path, server: Server, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(real.folder, out)
    (out / "README.md").write_text("<!-- mixup-recipes: begin -->\nmine\n")
    given = ["--recipe", tiny_recipe, "--output_dir", out, "--dataloader_num_workers", 0, *LOG, "--mixer", "deit"]
    status, output = server.run(*given, "--resume_from_checkpoint", "auto")
    assert status == 0 and "no model card: " in output and f"mixup-recipes card {out}" in output, output
    assert (out / "README.md").read_text() == "<!-- mixup-recipes: begin -->\nmine\n"
