"""Documents keep their word: commands parse, code runs, method files say what they must, nothing local leaks."""

import re
import runpy
import shlex
import subprocess
import warnings
from importlib.util import find_spec

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub.cli.hf import app as hub_tool
from runs import markdown_rows
from tiny import ROOT

import mixup_recipes
from mixers import MIXERS
from mixup_recipes import flags
from mixup_recipes.benchmark import cells
from mixup_recipes.benchmark.small_runs import small_runs
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import resolve, settings
from mixup_recipes.runs import records
from mixup_recipes.training.job import Job

DOCS = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
TEXT = "\n".join(DOCS.values())
BLOCKS = re.findall(r"```(?:bash|sh)\n(.*?)```", TEXT, re.S)
LINES = [line.strip() for block in BLOCKS for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
PAPER = re.compile(r"https://(arxiv\.org/abs|openaccess\.thecvf\.com|www\.sciencedirect\.com)/")


def test_each_training_command_of_the_documents_and_the_settings_resolves(subtests):
    lines = re.findall(r"train_mixup\.py[^`\n|]*", TEXT)
    lines += [re.findall(r"train_mixup\.py.*", path.read_text())[0] for path in settings().values()]
    commands = {line.split("#")[0].rstrip(" &") for line in lines if "--" in line and "--help" not in line}
    assert len(commands) >= 8
    for line in sorted(commands):
        with subtests.test(line):
            given = flags.parse(shlex.split(line)[1:], "train_mixup.py", "", {"Run": Job, "Recipe fields": Recipe})
            job = flags.fill(Job, given["Run"])
            assert job.list or resolve(job.recipe, given["Recipe fields"])[0].epochs


@pytest.mark.skipif(huggingface_hub.__version__ < "2", reason="jobs know no --attempts yet")
def test_the_hubs_tool_knows_the_commands_and_options_that_the_documents_give_it_and_takes_their_job(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commands = [shlex.split(line, comments=True)[1:] for line in LINES if line.startswith("hf ")]
    assert {"jobs", "upload", "auth"} <= {words[0] for words in commands}
    ask = CliRunner(env={"HF_TOKEN": "hf_none", "NO_COLOR": "1", "COLUMNS": "200"}).invoke
    for words in commands:
        deep = 2 if words[0] in ("auth", "jobs", "repos") else 1
        done = ask(hub_tool, [*words[:deep], "--help"])
        assert done.exit_code == 0, done.output
        given = [w for w in words[deep : words.index("bash") if "bash" in words else None] if w.startswith("-")]
        assert set(given) <= set(re.findall(r"(?<![\w-])--?\w[\w-]*", done.output)), words
    (job,) = [words for words in commands if words[0] == "jobs"]
    done = ask(hub_tool, [*job[:2], "--dry-run", *job[2:]])
    assert done.exit_code == 0, done.output
    assert "hf://buckets/OWNER/runs:/runs" in done.output and "Job not submitted" in done.output


def test_the_python_of_the_documents_runs() -> None:
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS[ROOT / "docs/mixers.md"], re.S):
        exec(compile(block, "docs/mixers.md", "exec"), names)
    assert names["out"].loss.isfinite() and names["mixed"].shape == names["x"].shape
    (block,) = re.findall(r"```python\n(import numpy.*?)```", DOCS[ROOT / "README.md"], re.S)
    exec(block, names := {})
    assert names["target"].sum(1).allclose(torch.ones(4))


def test_tables_of_our_runs_in_documents_have_the_numbers_of_the_records() -> None:
    """A row begins with a mixer's name, or with "without mixing" or "no mixing"; top-1, NLL and ECE follow in it."""
    found = 0
    for name, setting in (("README.md", "small_data"), ("README.md", "quickstart"), ("docs/which_mixer.md", "")):
        table = small_runs(setting or "finetune_groceries", records.all_records())
        rows = {row[0]: row for row in markdown_rows(table) if len(row) > 6}
        text = DOCS[ROOT / name]
        part = text.partition(f"| `{setting}`, " if setting else "| five seeds |")[2].partition("\n\n")[0]
        for shown in (row for row in markdown_rows(part) if re.search(r"\d", row[1])):
            words = shown[0].replace("without mixing", "vanilla").replace("CutMix", "cutmix")
            own = rows[re.findall(r"\w+", words)[0]]
            means = [own[at].split(" ±")[0] for at in (5, 6)]
            assert [shown[1], *shown[-2:]] == [own[2], *means], (name, shown)
            assert len(shown) == 4 or shown[2] == own[3], (name, shown)
            found += 1
    assert found == 2 + 2 + 7


def test_a_table_of_our_runs_is_what_its_command_prints() -> None:
    cards = {path: path.read_text() for path in (ROOT / "model_cards").glob("*.md")}
    assert {path.stem for path in cards} == {
        "cifar10_small",
        "cifar10_vit",
        "finetune_groceries",
        "quickstart",
        "small_data",
    }
    for path, card in cards.items():
        ((setting, against, beside),) = re.findall(
            r"`mixup-recipes table --setting (\w+)(?: --against (\w+))?(?: --beside ([\w ]+))?`", card
        )
        found = small_runs(setting, records.all_records(), against or "vanilla", beside=tuple(beside.split()))
        assert card == found and path.stem == setting


def test_the_citation_names_the_version_of_the_package() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == mixup_recipes.__version__ and cited["license"] == "Apache-2.0"


HEAVY = {"composer", "fastai", "keras", "mmpretrain"}  # no test installs them, and what they warn of is theirs
EXAMPLES = sorted((ROOT / "docs").glob("*/*.py"))
IMPORTS = {path: set(re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.M)) for path in EXAMPLES}


# Lightning 2.6 asks torch's pytree in a way that torch 2.14 calls deprecated, and advises workers for any loader.
# A Trainer pins memory unless told that there is no GPU.
@pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec:FutureWarning", "ignore:.*many workers", "ignore:.pin_memory"
)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_script_of_the_documents_runs_whole_and_draws_by_seed_and_update(path, tmp_path, monkeypatch):
    if missing := [name for name in IMPORTS[path] if not find_spec(name)]:
        pytest.skip(f"{missing[0]} is not installed: docs/loops.md says how")
    if IMPORTS[path] & HEAVY:
        warnings.simplefilter("ignore")
    drawn, default_rng = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed=None: drawn.append(seed) or default_rng(seed))
    monkeypatch.setenv("KERAS_BACKEND", "torch")  # what a script sets is taken back
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = runpy.run_path(str(path), run_name="__main__")
    assert 0 < torch.as_tensor(names["loss"]).item() < 20
    steps = [seed[1] for seed in drawn if isinstance(seed, tuple)]
    assert steps == sorted(steps) and (len(set(steps)) > 1 or path.stem == "dataloader_workers")
    assert set(steps) == set(range(len(set(steps))))  # the updates, from 0, none left out


def test_each_script_has_a_link_on_its_page_and_each_adapter_a_script() -> None:
    for page in ("loops", "dense"):
        links = re.findall(rf"\]\({page}/(\w+\.py)\)", DOCS[ROOT / f"docs/{page}.md"])
        assert sorted(links) == sorted(path.name for path in EXAMPLES if path.parent.name == page)
    code = "".join(path.read_text() for path in EXAMPLES)
    for name in ("mix_batch", "BatchMixer", "MixCollate", "TrainerMixin", "LightningMixin", "mix_like", "mix_boxes"):
        assert re.search(rf"import .*\b{name}\b", code), name


def test_documents_hold_no_dead_link_and_no_placeholder() -> None:
    for doc in (*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", doc.read_text()):
            assert (doc.parent / link).exists(), f"{doc.name}: {link}"
        assert not re.search(r"^[A-Z]+_[A-Z_]+$|TODO|FIXME", doc.read_text(), re.M), doc.name


def test_each_method_file_states_formula_law_and_deviations_and_every_mixer_its_paper() -> None:
    papers = {path.stem: path.read_text() for path in (ROOT / "mixers").glob("*.py")}
    for name, text in {k: v.split('"""')[1] for k, v in papers.items() if "Sampling law" in v}.items():
        for part in ("Formula: ", "Sampling law: ``", "Deviations: "):
            assert part in text, f"{name}.py does not say {part!r}"
        assert name == "vanilla" or (PAPER.search(text) and "Published defaults: " in text), name
    for name, make in MIXERS.items():
        doc = f"{make.__doc__} {__import__(make.__module__, fromlist=['x']).__doc__}"
        assert name == "vanilla" or PAPER.search(doc), name


def test_tables_of_costs_are_those_that_model_cards_quote() -> None:
    text = DOCS[ROOT / "docs/speed.md"] + DOCS[ROOT / "docs/speed_measured.md"]
    rows = cells.rows("costs.csv")

    def table(head: str) -> tuple[list[str], list[list[str]]]:
        first, _, *lines = text[text.index(f"\n| {head} |") :].strip().split("\n\n")[0].splitlines()
        return first.strip("| ").split(" | ")[1:], [line.strip("| ").split(" | ") for line in lines]

    for head, key in (("FLOPs", "flops"), ("kept for backward", "kept")):
        models, lines = table(head)
        shown = {(m, mixer): v for mixer, *values in lines for m, v in zip(models, values, strict=True) if v != "-"}
        assert shown == {(row["model"], row["mixer"]): f"{float(row[key]):.2f}x" for row in rows}, head
    for model in {row["model"] for row in rows if row["time"]}:
        timed = [row for row in rows if row["model"] == model and row["time"]]
        assert table(f"{model} | counted")[1] == [measured(row) for row in timed], model


def measured(row: dict[str, str]) -> list[str]:
    """A line of a table of times: mixer, counted, measured with its range where there is one, and their ratio."""
    flops, time = float(row["flops"]), float(row["time"])
    spread = f" ({float(row['least']):.2f} to {float(row['most']):.2f})" if row["least"] else ""
    return [row["mixer"], f"{flops:.2f}x", f"{time:.2f}x{spread}", f"{time / flops:.2f}"]


def test_the_head_of_each_setting_states_command_and_source() -> None:
    for name, path in settings().items():
        head = path.read_text().split("\ndataset:")[0]
        assert f"--recipe {name}_" in head
        if not name.startswith(
            ("quickstart", "cifar10_small", "cifar10_vit", "small_data", "finetune")
        ):  # ours: there is no source to differ from
            assert all(word in head for word in ("Needs: ", "Hours: ", "Published: ", "Where sources differ")), name


def test_nothing_of_the_machine_or_of_an_index_is_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    contents = {file: (ROOT / file).read_bytes() for file in tracked if not file.endswith("LICENSE")}
    for host in ("pypi" + ".org", "files.python" + "hosted", "/root" + "/", "/tmp" + "/lab"):
        assert not [file for file, content in contents.items() if host.encode() in content], host


def test_the_training_loop_names_no_method() -> None:
    text = (ROOT / "train_mixup.py").read_text()
    assert not [name for name in MIXERS if re.search(rf"""["']{name}["']""", text)]
