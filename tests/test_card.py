"""Promise: a model card says what the run's files say, nothing of a file works as markup, and no words are lost."""

import dataclasses
import itertools
import json
import math
import re
import shlex
import shutil
import statistics
import warnings
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from PIL import Image
from resuming import LOG
from runs import ENV, IMAGENET, edit, make_run

from mixers import MIXERS
from mixup_recipes import flags
from mixup_recipes.benchmark import cells
from mixup_recipes.hub import push, verify
from mixup_recipes.pages.card import card, write_card
from mixup_recipes.pages.card_metadata import eval_results
from mixup_recipes.pages.methods import bibtex, markdown, methods
from mixup_recipes.recipe import Recipe, schema
from mixup_recipes.resolve import load_recipe, resolve, shipped_recipe
from mixup_recipes.runs.run import Run
from mixup_recipes.training.job import Job
from mixup_recipes.typed import UserError

HOSTILE = "a|b <script>alert(1)</script> [x](javascript:1) `c` *d* _e_ \n# f\n---\n<!-- mixup-recipes: end -->"
BEGIN, END = "<!-- mixup-recipes: begin", "<!-- mixup-recipes: end -->"
MARKDOWN = MarkdownIt("commonmark").enable("table")


@pytest.fixture
def made(tmp_path):
    """Makes a whole run of a published cell, or of a recipe, that was evaluated on ImageNet in its last epochs."""

    def make(recipe="r18_100e_cutmix", top1=(60.0, 71.0, 73.0, 72.0, 75.0), last=None, classes=None, env=ENV, **more):
        recipe = load_recipe(recipe, **more) if isinstance(recipe, str) else recipe
        more = {"last": last or recipe.epochs, "classes": classes, "env": env, "sizes": IMAGENET}
        return Run.open(make_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", recipe, top1, **more))

    return make


@pytest.fixture
def published(made):
    return made()


@pytest.fixture
def real(reference):
    """A real run. Read it only."""
    return Run.open(reference("--mixer", "deit"))


def metadata(text: str) -> dict[str, Any]:
    """The YAML block of a card, by another reading than the one of the code."""
    start, block, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(block)


def tokens(text: str) -> list[Any]:
    """All block and inline tokens of the Markdown below the metadata."""
    return [t for token in MARKDOWN.parse(text.split("---\n", 2)[2]) for t in (token, *(token.children or []))]


def rows(text, heading):
    (section,) = [s for s in re.split(r"^## ", text, flags=re.M) if s.startswith(f"{heading}\n")]
    found = []
    for token, content in itertools.pairwise(MARKDOWN.parse(section)):
        if token.type == "tr_open":
            found.append([])
        elif token.type in ("td_open", "th_open"):
            found[-1].append("".join(t.content for t in content.children))
    return found


def blocks(text: str, language: str, word: str = "") -> list[str]:
    return [t.content for t in tokens(text) if t.type == "fence" and t.info == language and word in t.content]


def trained_by(words):
    """The recipe that train_mixup.py would train with these flags."""
    given = flags.parse(words, "train_mixup.py", "", {"Run": Job, "Recipe fields": Recipe})
    return resolve(flags.fill(Job, given["Run"]).recipe, given["Recipe fields"])[0]


def test_the_numbers_are_those_of_the_log(real):
    lines = [json.loads(line) for line in (real.folder / "log.jsonl").read_text().splitlines()]
    val, text = [line for line in lines if line["mode"] == "val"], card(real)
    shown, digits = {row[0]: row[1:] for row in rows(text, "Results")}, {"top1": 2, "top5": 2, "nll": 3, "ece": 2}
    for name, number in (
        ("reported: median of the last 2 epochs", lambda k: statistics.median(v[k] for v in val[-2:])),
        ("these weights, epoch 3", lambda k: val[-1][k]),
        ("models/ema", lambda k: val[-1][f"ema_{k}"]),
    ):
        assert shown[name] == [f"{number(k):.{d}f}" for k, d in digits.items()]
    tool = f"{statistics.median(v['top1'] for v in val):.2f}"
    assert shown["OpenMixup's tool: median of the last 3 epochs"] == [tool, "-", "-", "-"]
    assert "30 images of `test`" in text and "Not finished" not in text
    assert f"{lines[-1]['perf']['seconds'] / 3600:.3g} hours on 1 process" in text
    rate = statistics.median(line["perf"]["img_per_s"] for line in lines if line["mode"] == "train")
    assert f"{rate:,.0f} images/s" in text
    assert all(f"{name} {version}" in text for name, version in real.environment["packages"].items())
    assert (real.folder / "README.md").read_text() == text, "a run ends with its card"
    assert all(good for _, good in verify.of_files(real))


def test_the_metadata_hold_the_accuracy_of_the_exported_weights_on_the_data_that_was_read(published):
    edit(published.folder / "data.json", commit="b" * 40)
    published = Run.open(published.folder)
    text = card(published, "someone/some-model")
    data, read = metadata(text), ModelCard(text)  # as huggingface_hub sees it
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "some-model" and metadata(card(published))["model-index"][0]["name"] == "resnet18.cutmix_e100"
    assert {r.metric_name: r.metric_value for r in results} == {"Top-1 accuracy (%)": 75.0, "Top-5 accuracy (%)": 100.0}
    for r in results:
        assert (r.task_type, r.metric_type) == ("image-classification", "accuracy")
        assert (r.dataset_type, r.dataset_split, r.dataset_revision) == ("ILSVRC/imagenet-1k", "validation", "b" * 40)
    assert data["library_name"] == "timm" and data["pipeline_tag"] == "image-classification"
    assert {"image-classification", "timm", "transformers", "mixup-recipes", "cutmix", "r18_100e"} <= set(data["tags"])
    assert data["datasets"] == ["ILSVRC/imagenet-1k"] and data["metrics"] == ["accuracy"]
    assert read.data.to_dict() == data == metadata(str(read))
    assert read.data.model_name == "some-model" and len(read.data.eval_results) == 2


def test_the_card_of_a_fine_tuned_run_names_what_it_started_from_if_others_can_get_it(made, tmp_path):
    existing = "---\nbase_model: [a/b, c/d]\n---\n"
    known = {
        "timm": "timm/resnet18.a1_in1k",
        "resnet18.tv_in1k": "timm/resnet18.tv_in1k",
        "resnet18": "timm/resnet18.a1_in1k",
        "hf-hub:someone/some-model": "someone/some-model",
        "hf-hub:someone/some-model@0123abc": "someone/some-model",
    }
    unknown = (None, "resnet18.no_such", "hf-hub:a/../b", "hf-hub:no-owner", str(tmp_path), "/a/folder/that/is/gone")
    for pretrained, expected in (known | dict.fromkeys(unknown)).items():
        run = made(pretrained=pretrained)
        text = card(run, "someone/tuned")
        assert ModelCard(text).data.to_dict() == metadata(text)
        assert ModelCard(text).data.base_model == expected, pretrained
        assert metadata(text).get("base_model_relation") == ("finetune" if expected else None)
        assert (["fine-tuned from", expected] in rows(text, "Model")) == bool(expected)
        # what a person has written stays where nothing is known
        assert metadata(card(run, existing=existing))["base_model"] == (expected or ["a/b", "c/d"])
    # a run folder is named once it is published, and never when that is private
    start = made("r18_100e_vanilla")
    run, place, told = made(pretrained=str(start.folder)), "someone/start", {"card_sha256": "aa"}
    for private, changes, expected in ((False, {}, None), (False, told, place), (True, told, None)):
        push.note(start.folder, {}, repo_id=place, private=private, **changes)
        assert metadata(card(run)).get("base_model") == expected


def test_leaderboards_get_the_reported_number_of_a_whole_run_on_all_images_of_the_hub(published, made, real):
    files = write_card(published, "someone/some-model")
    assert [str(p.relative_to(published.folder)) for p in files] == ["README.md", ".eval_results/mixup-recipes.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[1].read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("ILSVRC/imagenet-1k", "default", 75.0)
    assert entry.source_url.endswith("/someone/some-model/blob/main/log.jsonl")
    assert "50000 images of validation, centre crop of 224 px after resizing to 256, epoch 100" in entry.notes
    run, young = made(ema_decay=0.9, report_ema=True), made(last=40)
    edit(run.folder / "eval_results.json", exported=run.exported | {"ema_top1": 12.5})
    text = card(Run.open(run.folder))
    assert metadata(text)["model-index"][0]["results"][0]["metrics"][0]["value"] == 12.5
    assert "moving average (EMA), epoch 100" in text
    assert [eval_results(run) for run in (young, real, made(max_eval_samples=50_000))] == [None] * 3
    text = card(young)
    assert "**Not finished:** epoch 40 of 100." in text and "nothing to compare yet" in text
    assert "model-index" not in metadata(text)
    text = card(made("quickstart_cutmix", (60.0, 71.0, 73.0), epochs=3))
    assert "top-1 (median of the last 5 epochs: 3 of 5 epochs, seed 0)." in text


def test_the_run_is_held_against_the_published_number(made, real):
    numbers = {f"{row['setting']}_{row['mixer']}": row["top1"] for row in cells.rows("published.csv")}
    number = float(numbers["r18_100e_cutmix"])
    # half width for one run against one: the binomial deviation and Student's t of 8 degrees of freedom
    band = 2.306004 * 100 * math.sqrt(number / 100 * (1 - number / 100) / 50_000) * math.sqrt(2)
    for offset, words in ((0.3, "reproduced within the band"), (-3.0, "too early to say")):
        text = card(made(top1=[number + offset] * 5))
        assert f"Published: **{number:.2f}** top-1" in text and "median of the last 5 epochs" in text
        assert f"{number + offset:.2f}, {offset:+.2f} from the published number" in text
        assert f"±{band:.2f} is noise. Verdict: **{words}**" in text
    text = card(made(smoothing=0.1))
    assert "Published: **" in text and "is noise" not in text
    assert "cannot be compared with that number: runs with smoothing 0.1 instead of 0.0 do not count" in text
    text = card(made("r50_100e_alignmix"))
    assert f"**{float(numbers['r50_100e_alignmix']):.2f}‡**" in text and "not trained by OpenMixup" in text
    assert "No published number belongs to this recipe." in card(real)


def test_values_that_are_not_the_settings_are_shown_with_their_origin(made):
    run = made("tiny_r18_automix", lr=0.3)
    found = rows(card(run), "Recipe")
    assert found[0] == ["field", "value", "origin"]
    cut = found.index(["field", "value", "origin"], 1)
    first, every = found[1:cut], {row[0]: row[1:] for row in found[cut + 1 :]}
    assert every["lr"] == ["0.3", "this run, instead of 0.2"] and ["lr", *every["lr"]] in first
    assert every["mixer"] == ["automix", "recipe name"] and ["mixer", *every["mixer"]] in first
    assert {"tiny_r18.yaml: per_mixer.automix", "mixer's default"} <= {origin for _, _, origin in first}
    assert every["epochs"] == ["400", "tiny_r18.yaml"] and "epochs" not in [row[0] for row in first]
    fields = {f for f in schema(Recipe) if f not in ("name", "mixer_args")}
    assert set(every) == fields | {f"mixer.{k}" for k in run.recipe.mixer_args["automix"]}


def test_the_command_trains_the_same_recipe_by_its_name_or_from_its_file(made, real, tiny_recipe, monkeypatch):
    for name, changes in (
        ("r18_100e_cutmix", {}),
        ("deit_s_samix", {"seed": 2}),
        ("quickstart_mixup", {"epochs": 6, "scale": (0.5, 1.0), "aa": "rand-m9-mstd0.5-inc1", "sync_bn": True}),
        ("deit_s_deit", {"mixer_args": {"mixup_alpha": 0.3}, "drop_path_rate": None, "model_args": {"depth": 6}}),
        ("r50_100e_alignmix", {"mixer_args": {"partner": "manifoldmix"}}),
        ("tiny_r18_automix", {"mixer": "fmix"}),
        ("quickstart_cutmix", {"dataset": "someone/photos", "eval_split": "two words"}),
    ):
        run = made(name, **changes)
        (line,) = blocks(card(run), "bash", "train_mixup.py")
        start, words = line.split(" train_mixup.py ")
        assert start == "accelerate launch" and "recipe.yaml" not in words
        assert trained_by(shlex.split(words)) == run.recipe
    for repo_id, start in ((None, "accelerate"), ("a/b", "hf download a/b recipe.yaml --local-dir . && accelerate")):
        text = card(real, repo_id)
        (line,) = blocks(text, "bash", "train_mixup.py")
        assert line.startswith(f"{start} launch train_mixup.py ")
    monkeypatch.chdir(real.folder)
    photos = load_recipe(str(tiny_recipe)).dataset
    words = [photos if word == "PATH" else word for word in shlex.split(line.split("train_mixup.py")[1])]
    assert trained_by(words) == load_recipe("./recipe.yaml")
    assert photos not in text, "a path of this machine"


def test_the_code_of_the_card_runs_and_names_a_class(real, made, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(real.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    Image.new("RGB", (48, 40), "red").save(run / "image.jpg")
    monkeypatch.chdir(run)
    for package in ("import timm", "from transformers"):
        (block,) = blocks(card(real), "python", package)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages
            exec(compile(block, "card", "exec"), {})
        printed = capsys.readouterr().out
        assert all(name in printed for name in ("blue", "green", "red", "white"))
    # an architecture that timm lacks says what to import
    first = [block.splitlines()[0].split("  #")[0] for block in blocks(card(made("pvt_t_deit")), "python")]
    assert first == ["import mixup_recipes.training.backbones"] * 2


AT_MOST = {
    "automix": 3.11, "samix": 3.11, "adautomix": 3.15, "supermix": 4.5, "comixup": 2.05, "puzzlemix": 1.8,
    "augmix": 3.0, "noisymix": 3.0, "smmix": 1.2, "transmix": 1.05, "mixpro": 1.05, "tlalign": 1.05,
    "regmixup": 2.05,
    "sumix": 2.01, "mergemix": 2.32,
}  # fmt: skip


def test_the_card_of_a_repository_loads_from_it_links_its_logs_and_shows_what_a_step_of_its_mixer_costs(real):
    text, here = card(real, "someone/some-model"), card(real)
    assert 'timm.create_model("hf-hub:someone/some-model", pretrained=True)' in text
    assert 'pipeline("image-classification", model="someone/some-model")' in text
    assert "evaluate_mixup.py hf-hub:someone/some-model --dataset PATH --split test" in text
    links = {t.attrs["href"] for t in tokens(text) if t.type == "link_open"}
    local = {link for link in links if "://" not in link}
    assert {"log.jsonl", "summary.csv", "recipe.yaml"} <= local
    assert all((real.folder / link).is_file() for link in local)
    for place in ("models/ema", "runs", "samples"):
        assert any(link.endswith(f"/someone/some-model/tree/main/{place}") for link in links)
        assert f"[{place}]({place})" in here
    assert any(link.endswith("/someone/some-model/tensorboard") for link in links)
    assert [t.attrs["src"] for t in tokens(text) if t.type == "image"] == ["samples/epoch_002.png"]
    counted = cells.rows("costs.csv")
    assert {row["mixer"] for row in counted if row["model"] == "deit_small_patch16_224"} == set(MIXERS)
    assert all(float(row["flops"]) <= AT_MOST.get(row["mixer"], 1.35) for row in counted)
    own = [row for row in counted if row["mixer"] == "deit"]
    assert {row["model"] for row in own} >= {"resnet50", "deit_small_patch16_224"}
    for row in own:
        assert f"| {row['model']} | {float(row['flops']):.2f}x | {float(row['kept']):.2f}x |" in text


def test_every_mixer_has_law_deviations_and_a_citation_and_its_docstring_is_rendered_as_it_is_written():
    """What looks like emphasis, a link or HTML in a docstring, such as H*W, is text."""
    plain = {"paragraph_open", "paragraph_close", "inline", "text", "code_inline", "softbreak"}
    plain |= {f"{what}_{end}" for what in ("bullet_list", "list_item") for end in ("open", "close")}
    for name in MIXERS:
        made = methods(name, {})
        assert all({"Formula", "Sampling law", "Deviations"} <= set(m.parts) for m in made), name
        papers = [p for m in made if (p := bibtex(m.head))]
        assert name == "vanilla" or papers, name
        for paper in papers:
            kind, text = re.fullmatch(r"@(\w+)\{\w+,\n(.*)\n\}", paper, re.S).groups()
            fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", text, re.M))
            assert re.fullmatch(r"20\d\d", fields["year"]) and fields["url"].startswith("https://"), name
            assert (kind == "inproceedings") == ("booktitle" in fields), name
            assert all(re.fullmatch(r"[A-Z][\w-]+|others", author) for author in fields["author"].split(" and ")), name
        for part in (p for m in made for p in m.parts.values()):
            assert {t.type for t in tokens(f"---\n---\n{part}")} <= plain, name
    for name, args, titles in (
        ("rsb", {}, ["rsb", "mixup", "CutMix"]),  # a composition takes what it is made of
        ("samix", {}, ["SAMix", "AutoMix"]),
        ("alignmix", {"partner": "manifoldmix"}, ["AlignMixup", "Manifold Mixup"]),
    ):
        assert [m.title for m in methods(name, args)] == titles
    touvron = bibtex(methods("deit", {})[0].head)
    assert "Training data-efficient image transformers" in touvron and "Touvron and Cord and others" in touvron
    assert markdown("H*W and a*b") == r"H\*W and a\*b" and markdown("``a*b``\n\n* c") == "``a*b``\n\n* c"


def test_names_of_a_file_are_text_whatever_they_hold(made):
    recipe = load_recipe("quickstart_cutmix", eval_split=HOSTILE, train_split=HOSTILE + "2", dataset=HOSTILE)
    recipe = dataclasses.replace(recipe, name=HOSTILE, opt=HOSTILE)
    env = ENV | {"commit": HOSTILE, "device": HOSTILE, "packages": {HOSTILE: HOSTILE}}
    run = made(recipe, classes=[HOSTILE, "!!python/object:os.system", "b"], env=env)
    text = card(run)
    markup = [t.content for t in tokens(text) if t.type in ("html_block", "html_inline")]
    ours = r"<!-- mixup-recipes: (begin|end)[^<]*-->|</?details>(<summary>All \d+ values</summary>)?|</?details>"
    assert all(re.fullmatch(ours, line.strip()) for line in markup), markup
    links = [t.attrs["href"] for t in tokens(text) if t.type == "link_open"]
    assert all(link.startswith("https://") or re.fullmatch(r"[\w.]+", link) for link in links)
    assert not [t for t in tokens(text) if t.type == "em_open"]
    assert ["classes", f"3: {' '.join(HOSTILE.split())}, !!python/object:os.system, b"] in rows(text, "Model")
    assert ModelCard(text).data.to_dict() == metadata(text)
    assert card(again(run, text)) == text, "a marker within a name was taken for ours"
    assert "\n# f" not in text and text.count(f"\n{END}") == 1


def test_a_command_of_several_lines_is_not_shown_and_a_recipe_name_that_is_a_path_is_not_opened(made, tmp_path):
    split = "a\n```\n<script>alert(1)</script>\n```"
    text = card(made("quickstart_cutmix", eval_split=split, train_split="b"))
    assert blocks(text, "bash", "train_mixup.py") == ["accelerate launch train_mixup.py --recipe recipe.yaml\n"]
    assert not [t for t in tokens(text) if t.type.startswith("html") and "script" in t.content]
    other = tmp_path / "other.yaml"
    other.write_text("!!python/object/apply:os.system [exit]")
    assert shipped_recipe(str(other)) is None
    named = dataclasses.replace(load_recipe("quickstart_cutmix"), name=str(other))
    assert "No published number belongs to this recipe." in card(made(named))


def again(run: Run, text: str | bytes) -> Run:
    """The run with another ``README.md``."""
    (run.folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return Run.open(run.folder)


def test_what_a_person_added_stays_and_the_rest_is_new(published):
    head, body = card(published).split("---\n", 2)[1:]
    mine = yaml.safe_load(head) | {"license": "mit", "language": ["en"], "extra": {"a": [1, 2]}}
    mine["tags"].append("birds")
    mine["model-index"][0]["results"].append({
        "task": {"type": "image-classification"}, "dataset": {"name": "ImageNet-V2", "type": "x/imagenet-v2"},
        "metrics": [{"type": "accuracy", "value": 61.2}],
    })  # fmt: skip
    mine["model-index"][0]["results"][0]["metrics"][0]["value"] = 1.0
    edited = body.replace(BEGIN, f"# Mine\r\n\r\nabove | *this*\n{BEGIN}").replace("CutMix", "Nonsense") + "below\n"
    write_card(again(published, b"\xef\xbb\xbf" + f"---\n{yaml.safe_dump(mine)}---\n{edited}".encode()))
    text = (published.folder / "README.md").read_bytes().decode()
    assert "Nonsense" not in text and text.endswith(f"{END}\nbelow\n")
    assert f"# Mine\r\n\r\nabove | *this*\n{BEGIN}" in text
    data = metadata(text)
    assert data["license"] == "mit" and data["language"] == ["en"] and data["extra"] == {"a": [1, 2]}
    assert "birds" in data["tags"] and len(set(data["tags"])) == len(data["tags"])
    found = {(r["dataset"]["type"], m["value"]) for r in data["model-index"][0]["results"] for m in r["metrics"]}
    assert found == {("ILSVRC/imagenet-1k", 75.0), ("ILSVRC/imagenet-1k", 100.0), ("x/imagenet-v2", 61.2)}
    write_card(Run.open(published.folder))
    assert (published.folder / "README.md").read_bytes().decode() == text, "written twice, it is another card"


def test_a_readme_that_is_no_card_of_ours_keeps_its_text_below_and_one_that_cannot_be_told_apart_is_left(published):
    for old in ("", "Notes of mine.\n", "---\nlanguage: en\n---\nNotes of mine.\n"):
        first = card(again(published, old))
        assert card(again(published, first)) == first
        assert ("language" in metadata(first)) == ("language" in old)
        assert first.split(END)[1].strip() == ("Notes of mine." if old else "")
    assert card(again(published, "local\n"), existing="from the Hub\n").endswith("\n\nfrom the Hub\n")
    before = sorted(published.folder.rglob("*"))
    for old, says in (
        (f"{BEGIN}. -->\n", "found begin"),
        (f"{END}\nmine\n{BEGIN}. -->\n", "found end, begin"),
        ("---\na: [\n---\n", "the metadata is not valid YAML"),
        ("---\n- a\n---\n", "the metadata must be a table"),
        ("---\na: !!python/name:os.system x\n---\n", "the metadata is not valid YAML"),
        ("---\nmodel-index: [{name: a}]\n---\n", "model-index cannot be read"),
        ("---\nmodel-index: 3\n---\n", "model-index cannot be read"),
    ):
        run = again(published, f"{old}mine\n")
        with pytest.raises(UserError, match=rf"^.*README\.md.*{says}.*$"):
            write_card(run)
        assert (run.folder / "README.md").read_text() == f"{old}mine\n" and sorted(run.folder.rglob("*")) == before


def test_the_licence_is_the_users_and_wrong_arguments_are_one_line(published):
    old = "---\nlicense: other\nlicense_name: mine\n---\n"
    given = ({}, {"license": "apache-2.0"}, {"license": "mit", "existing": old})
    assert [metadata(card(published, **more))["license"] for more in given] == ["unknown", "apache-2.0", "mit"]
    assert {"license": "other", "license_name": "mine"}.items() <= metadata(card(published, existing=old)).items()
    for wrong, says in (
        ({"license": "MIT: yes\n"}, "license: expected an identifier"),
        ({"repo_id": "a/b/c"}, "hub_model_id: expected"),
        ({"repo_id": 'x"y'}, "hub_model_id: expected"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            card(published, **wrong)
        assert "\n" not in str(caught.value)


def test_the_command_writes_into_the_run_or_to_a_file(published, console, tmp_path):
    out, own = tmp_path / "card.md", published.folder / "README.md"
    out.write_text("mine\n")
    argv = ("card", published.folder, "--license", "mit")
    assert console(*argv, "--out", out, "--repo_id", "a/b") == (0, f"{out}\n", "")
    assert out.read_text().endswith("\n\nmine\n") and not own.exists()
    status, shown, _ = console(*argv)
    assert status == 0 and shown.splitlines()[0] == str(own)
    assert all(metadata(path.read_text())["license"] == "mit" for path in (out, own))


def test_a_card_that_cannot_be_written_does_not_fail_the_run(real, tiny_recipe, server, tmp_path):
    out = shutil.copytree(real.folder, tmp_path / "run")
    (out / "README.md").write_text(f"{BEGIN} -->\nmine\n")
    given = ["--recipe", tiny_recipe, "--output_dir", out, "--dataloader_num_workers", 0, *LOG, "--mixer", "deit"]
    status, output = server.run(*given, "--resume_from_checkpoint", "auto")
    assert (
        status == 0 and "the model card could not be written: " in output and f"mixup-recipes card {out}" in output
    ), output
    assert (out / "README.md").read_text() == f"{BEGIN} -->\nmine\n"
