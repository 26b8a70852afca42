"""Documents keep their word: commands parse, code runs, method files say what they must, nothing local leaks."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ROOT

from mixers import MIXERS
from mixup_recipes import flags
from mixup_recipes.benchmark import cells
from mixup_recipes.benchmark.small_runs import small_runs
from mixup_recipes.cli import app, jobs
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import resolve, settings
from mixup_recipes.runs import records
from mixup_recipes.training.job import Job

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAPERS = [p for p in sorted((ROOT / "mixers").glob("*.py")) if "Sampling law" in p.read_text()]
PAPER = re.compile(r"https://(arxiv\.org/abs|openaccess\.thecvf\.com|www\.sciencedirect\.com)/")
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def training_commands() -> list[str]:
    """Every command line in the documents that starts train_mixup.py, without comments."""
    lines = [line for doc in DOCS for line in re.findall(r"train_mixup\.py[^`\n|]*", doc.read_text())]
    lines += [re.search(r"train_mixup\.py.*", p.read_text()).group() for p in settings().values()]
    return sorted({line.split("#")[0].rstrip(" &") for line in lines if "--" in line})


def test_the_documents_hold_commands() -> None:
    assert len(training_commands()) >= 8


@pytest.mark.parametrize("line", training_commands())
def test_each_training_command_of_the_documents_resolves(line: str) -> None:
    given = flags.parse(shlex.split(line)[1:], "train_mixup.py", "", {"Run": Job, "Recipe fields": Recipe})
    job = flags.fill(Job, given["Run"])
    assert job.list or resolve(job.recipe, given["Recipe fields"])[0].epochs


def console_commands() -> list[str]:
    """Every command line of mixup-recipes in the documents' blocks of shell and in their tables, without comments."""
    blocks = [block for doc in DOCS for block in re.findall(r"```(?:bash|sh)\n(.*?)```", doc.read_text(), re.S)]
    lines = [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return sorted({line for line in lines if line.startswith("mixup-recipes ")})


@pytest.mark.parametrize("line", console_commands())
def test_each_console_command_of_the_documents_is_one(line: str) -> None:
    words = shlex.split(re.split(r" [|>&] ?", line)[0], comments=True)[1:]
    if words[0] in jobs.SCRIPTS:
        return
    command, *_ = app.parse_args(words, exit_on_error=False, print_error=False)
    assert command.__module__.startswith("mixup_recipes.cli")


def hub_commands() -> list[list[str]]:
    """Every command of the Hub's own tool in the documents' blocks of shell, in words."""
    blocks = [block for doc in DOCS for block in re.findall(r"```bash\n(.*?)```", doc.read_text(), re.S)]
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("hf ")]


def hub_tool(*words: str) -> subprocess.CompletedProcess[str]:
    """Run that tool, without a network."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_none", "NO_COLOR": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_the_hubs_tool_knows_every_option_that_the_documents_give_it() -> None:
    assert {"jobs", "upload", "auth"} <= {words[1] for words in hub_commands()}
    for words in hub_commands():
        deep = 3 if words[1] in ("auth", "jobs", "repos") else 2
        done = hub_tool(*words[1:deep], "--help")
        assert done.returncode == 0, done.stderr
        given = [w for w in words[deep : words.index("bash") if "bash" in words else None] if w.startswith("-")]
        assert set(given) <= set(re.findall(r"(?<![\w-])--?\w[\w-]*", done.stdout)), words


def test_the_hubs_tool_takes_the_job_of_the_documents() -> None:
    (job,) = [words for words in hub_commands() if words[1] == "jobs"]
    done = hub_tool(*job[1:3], "--dry-run", *job[3:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hf://buckets/OWNER/runs:/runs" in done.stdout and "Job not submitted" in done.stdout


@pytest.mark.parametrize("doc", ["docs/mixers.md"])
def test_the_python_of_the_documents_runs(doc: str) -> None:
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / doc).read_text(), re.S):
        exec(compile(block, doc, "exec"), names)
    assert names["out"].loss.isfinite() and names["mixed"].shape == names["x"].shape


TABLE = re.compile(r"`mixup-recipes table --setting (\w+)(?: --against (\w+))?`")
GENERATED = TABLE.findall("".join(doc.read_text() for doc in DOCS))


def test_the_documents_hold_tables_of_our_runs() -> None:
    assert len(GENERATED) >= 2


@pytest.mark.parametrize(("setting", "against"), GENERATED)
def test_a_table_of_our_runs_is_what_its_command_prints(setting: str, against: str) -> None:
    text = small_runs(setting, records.all_records(), against or "vanilla")
    assert any(text in doc.read_text() for doc in DOCS)


SCRIPTS = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", (ROOT / "docs/loops.md").read_text(), re.S | re.M))


# Lightning 2.6 asks torch's pytree in a way that torch 2.14 calls deprecated, and advises workers for any loader.
# A Trainer pins memory unless told that there is no GPU.
@pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec:FutureWarning", "ignore:.*many workers", "ignore:.pin_memory"
)
@pytest.mark.parametrize("loop", SCRIPTS)
def test_each_script_of_the_loops_document_runs_by_itself(loop: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {"__name__": "__main__"}
    exec(compile(SCRIPTS[loop], loop, "exec"), names)
    assert 0 < torch.as_tensor(names["loss"]).item() < 20


def test_the_loops_document_has_a_script_for_every_loop() -> None:
    text = (ROOT / "docs/loops.md").read_text()
    assert len(SCRIPTS) == text.count("```python") == text.count("\n## ") == 6
    for name in ("mix_batch", "BatchMixer", "MixCollate", "TrainerMixin", "LightningMixin"):
        assert f"`{name}`" in text and any(name in code for code in SCRIPTS.values())


def test_the_readme_snippet_of_one_mixer_runs() -> None:
    block = re.search(r"```python\n(import numpy.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict = {}
    exec(block.group(1), names)
    assert names["target"].sum(1).allclose(torch.ones(4))


def test_links_between_documents_lead_somewhere() -> None:
    for doc in [*DOCS, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", doc.read_text()):
            assert (doc.parent / link).exists(), f"{doc.name}: {link}"


@pytest.mark.parametrize("path", PAPERS, ids=lambda p: p.stem)
def test_each_method_file_states_formula_law_and_deviations(path: Path) -> None:
    text = path.read_text().split('"""')[1]
    for part in ("Formula: ", "Sampling law: ``", "Deviations: "):
        assert part in text, f"{path.name} does not say {part!r}"
    assert path.stem == "vanilla" or (PAPER.search(text) and "Published defaults: " in text)


def test_every_mixer_comes_from_a_file_that_states_its_paper() -> None:
    for name, make in MIXERS.items():
        doc = f"{make.__doc__} {__import__(make.__module__, fromlist=['x']).__doc__}"
        assert name == "vanilla" or PAPER.search(doc), name


def imports(path: Path) -> set[str]:
    """The modules that a file imports, by dotted names, and what it takes from them."""
    found, package = set(), path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "mixers").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_mixers_import_nothing_of_ours_and_no_paper(path: Path) -> None:
    """Only the package itself shows the papers' classes: no paper, no composition and no tool imports one."""
    others = {file.split("/")[0].removesuffix(".py") for file in TRACKED if file.endswith(".py")} - {"mixers"}
    assert {"mixup_recipes", "train_mixup", "tests"} <= others
    assert not others & {name.split(".")[0] for name in imports(path)}
    assert path == ROOT / "mixers/__init__.py" or not imports(path) & {f"mixers.{paper.stem}" for paper in PAPERS}
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    late = [n for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not late, "imports stand at the top"


@pytest.mark.parametrize(("head", "key"), [("FLOPs", "flops"), ("kept for backward", "kept"), ("time", "time")])
def test_tables_of_costs_are_those_that_model_cards_quote(head: str, key: str) -> None:
    text = (ROOT / "docs/speed.md").read_text()
    first, _, *lines = text[text.index(f"\n| {head} |") :].strip().split("\n\n")[0].splitlines()
    costs = {(row["model"], row["mixer"]): row[key] for row in cells.rows("costs.csv")}
    shown = {}
    for line in lines:
        mixer, *values = line.strip("| ").split(" | ")
        shown |= {(m, mixer): value for m, value in zip(first.strip("| ").split(" | ")[1:], values, strict=True)}
    assert {place: value for place, value in shown.items() if value != "-"} == {
        place: f"{float(value):.2f}x" for place, value in costs.items() if value
    }


@pytest.mark.parametrize("name", sorted(settings()))
def test_the_head_of_each_setting_states_command_and_source(name: str) -> None:
    head = settings()[name].read_text().split("\ndataset:")[0]
    assert f"--recipe {name}_" in head
    if name not in ("quickstart", "cifar10_small", "cifar10_vit"):  # ours: there is no source to differ from
        assert all(word in head for word in ("Needs: ", "Hours: ", "Published: ", "Where sources differ"))


def test_nothing_of_the_machine_or_of_an_index_is_tracked() -> None:
    hosts = ["pypi" + ".org", "files.python" + "hosted", "/root" + "/", "/tmp" + "/lab"]
    found = [
        (file, host)
        for file in TRACKED
        if not file.endswith("LICENSE")
        for host in hosts
        if host.encode() in (ROOT / file).read_bytes()
    ]
    assert not found


def test_no_document_holds_a_placeholder() -> None:
    for doc in [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        assert not re.search(r"^[A-Z]+_[A-Z_]+$|TODO|FIXME", doc.read_text(), re.M), doc.name


def test_the_training_job_stays_readable() -> None:
    text = (ROOT / "train_mixup.py").read_text()
    assert text.count("\n") < 300
    assert not [name for name in MIXERS if re.search(rf"""["']{name}["']""", text)], "the loop names a method"
