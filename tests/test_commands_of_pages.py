"""Every line of every block of commands in the pages runs here where that is cheap; else its flags must exist."""

import os
import re
import shlex

import pytest
from tiny import ROOT

import evaluate_mixup
from mixers import MIXERS
from mixup_recipes import cli, flags
from mixup_recipes.recipe import Recipe
from mixup_recipes.resolve import resolve
from mixup_recipes.training.job import Job
from mixup_recipes.typed import UserError

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKE = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
SCRIPTS: dict[str, tuple[str, flags.Classes, tuple[str, ...]]] = {
    "train": ("Run", {"Run": Job, "Recipe fields": Recipe}, ()),
    "evaluate": ("Evaluation", {"Evaluation": evaluate_mixup.Evaluation}, evaluate_mixup.MODEL),
}
RUN_HERE = re.compile(r"((recipes|methods|cells) (list|show|explain|diff)|table --benchmark)\b")
"""Commands that need neither torch nor a file: the test runs them."""
OTHERS = {
    "hf": "test_docs.py asks the Hub's own tool",
    "pip": "installs what an extra or another library needs",
    "trackio": "a tracker's own command",
    "cd": "into a package that new-mixer wrote, which test_new_mixer.py installs and trains",
    "trap": "a job script of Slurm", "wait": "a job script of Slurm", "job=$!": "a job script of Slurm",
}  # fmt: skip
"""Lines that are marked: the first word, and why nothing here runs them."""


def lines(text: str) -> list[str]:
    """The lines of the blocks of commands in a page, without comments."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    joined = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return [line.strip() for line in joined if line.strip() and not line.strip().startswith("#")]


def check(line: str) -> str:
    """Hold one line against the commands that exist; returns how. Raises what the command raises, or ``UserError``."""
    words = shlex.split(line, comments=True)
    if line.startswith("hf "):  # what it starts elsewhere is text to it
        return "marked"
    for end in {"|", ">", "&&", "&"} & {*words}:
        words = words[: words.index(end)] if end in words else words
    while "=" in words[0] and words[0] not in OTHERS:  # variables of the environment
        words.pop(0)
    script = next((w for w in words if w in ("train_mixup.py", "evaluate_mixup.py")), "")
    if words[0] == "mixup-recipes" and words[1] in SCRIPTS:
        return parsed(words[1], words[2:])
    if script:
        return parsed(script.removesuffix("_mixup.py"), words[words.index(script) + 1 :])
    if words[0] == "mixup-recipes":
        cli.app.parse_args(words[1:], exit_on_error=False, print_error=False)
        if not RUN_HERE.match(" ".join(words[1:])) or {"--out", "--results"} & {*words}:
            return "parsed"
        assert not cli.command(words[1:])
        return "run"
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        code = (ROOT / words[1]).read_text()
        unknown = [w for w in words if w.startswith("--") and f'"{w}"' not in code and w[2:] not in code]
        if unknown:
            raise UserError(f"{words[1]} has no flag {unknown[0]}")
        return "parsed"
    if words[0] == "make":
        if words[1] not in MAKE:
            raise UserError(f"the Makefile has no target {words[1]}")
        return "parsed"
    if words[0] not in OTHERS:
        raise UserError(f"no test knows {words[0]!r}: check it here, or mark it in OTHERS")
    return "marked"


def parsed(name: str, words: list[str]) -> str:
    """Read the flags of a training or an evaluation; a recipe of ours must take the values."""
    title, classes, first = SCRIPTS[name]
    given = flags.parse(words, name, "", classes, first)
    job = flags.fill(classes[title], given[title])
    if name == "train" and not job.list and job.recipe.rpartition("_")[2] in MIXERS:
        assert resolve(job.recipe, given["Recipe fields"])[0].epochs
    return "parsed"


def test_every_command_in_a_page_runs_or_has_flags_that_exist_or_is_marked(subtests, capsys):
    found = []
    for name, line in sorted({(page.name, line) for page in PAGES for line in lines(page.read_text())}):
        with subtests.test(f"{name}: {line}"):
            found.append(check(line))
    assert found.count("run") >= 8 and found.count("parsed") > 80
    assert len(capsys.readouterr().out) > 5000  # of the commands that ran


@pytest.mark.parametrize(
    "line",
    [
        "mixup-recipes predict runs/photos --no_such_flag 3",
        "mixup-recipes cells show no_such_recipe",
        "mixup-recipes train --recipe quickstart_cutmix --no_such_field 3",
        "accelerate launch evaluate_mixup.py resnet50.a1_in1k --no_such_flag",
        "python train_mixup.py --recipe quickstart_cutmix --epochs many",
        "python benchmarks/step.py --no_such_flag",
        "make no_such_target",
        "no_such_program",
    ],
)
def test_a_line_with_what_does_not_exist_fails(line):
    with pytest.raises(Exception, match=r"(?i)no.?such|many"):
        check(line)


def test_comments_variables_pipes_and_continued_lines_are_understood():
    text = "```bash\n# a comment\nA=1 mixup-recipes predict \\\n  runs/photos photos/ | head   # words\n```\n"
    (line,) = lines(text)
    assert check(line) == "parsed" and os.environ.get("A") is None
