"""The model card: ``README.md`` of a run folder, made from what the run folder says.

Numbers come from the run's files, the method from its mixer's docstring, published numbers from ``published.csv``.
All of it stands between two HTML comments, and is replaced whenever the card is written again; text around them and
metadata of other names are somebody's own and stay. What a run or data set calls itself is shown as text: no markup
of it works.

Two places hold the accuracy in a form that the Hub reads: ``model-index`` in the card's metadata, and
``.eval_results/``, which feeds the leaderboards of benchmark data sets. Both speak of the exported weights, which
anybody can score again; the number by the setting's protocol is in the text.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from mixup_recipes import files
from mixup_recipes.pages.card_metadata import eval_results, metadata
from mixup_recipes.pages.card_sections import (
    citation_section,
    cost_section,
    deviations_section,
    files_section,
    model_section,
    recipe_section,
    reproduce_section,
    results_section,
    use_section,
)
from mixup_recipes.pages.markdown import code, line, prose
from mixup_recipes.pages.methods import methods
from mixup_recipes.pages.robustness import section as robustness_section
from mixup_recipes.runs.run import Run
from mixup_recipes.runs.shapes import read_card
from mixup_recipes.training.protocols import NAMES
from mixup_recipes.typed import UserError, from_yaml

CARD = "README.md"
EVAL_RESULTS = ".eval_results/mixup-recipes.yaml"
BEGIN = (
    "<!-- mixup-recipes: begin. Generated text. Write above this line or below the last one; text between them is "
    "lost. -->"
)
END = "<!-- mixup-recipes: end -->"
MARK = re.compile(r"^<!-- mixup-recipes: (begin|end)\b.*?-->", re.M)


def body(run: Run, name: str, repo_id: str | None) -> str:
    """Everything between the two comments."""
    recipe, s = run.recipe, run.summary
    args = recipe.mixer_args[recipe.mixer]
    made = methods(recipe.mixer, args)
    text = [f"# {prose(name)}"]
    if not run.finished:
        text.append(f"> **Not finished:** epoch {s.epochs} of {s.epochs_planned}. The numbers are those so far.")
    for change in run.data.changes:
        words = prose(change["changed"])
        text.append(f"> **Other images from update {change['update']:,} on:** {words}.")
    used, wanted = s.epochs_used, s.epochs_wanted
    protocol = s.protocol + (f": {used} of {wanted} epochs" if used < wanted else "")
    text.append(
        f"{code(recipe.model)} was trained with {made[0].title} (`{recipe.mixer}`) by Mixup Recipes. It reaches "
        f"**{s.reading.value:.2f} %** {NAMES[s.metric]} ({protocol}, seed {recipe.seed})."
    )
    sections = [model_section(run), recipe_section(run, made), results_section(run, repo_id), robustness_section(run)]
    sections += [cost_section(run, made), use_section(run, repo_id), reproduce_section(run, repo_id)]
    sections += [deviations_section(run, made), citation_section(made), files_section(run, repo_id)]
    return "\n\n".join([*text, *filter(None, sections)])


def split(text: str, where: str) -> tuple[dict[str, Any], str, str]:
    """An existing card as metadata, text above the generated part, text below it. Raises ``UserError``."""
    block = REGEX_YAML_BLOCK.search(text)
    try:
        old = (from_yaml(block[2]) or {}) if block else {}
    except UserError as e:
        raise UserError(f"{where}: the metadata is {e}") from None
    if not isinstance(old, dict):
        raise UserError(f"{where}: the metadata must be a table of names and values, got {type(old).__name__}")
    text = text[block.end() :] if block else text
    marks = list(MARK.finditer(text))
    if not marks:
        return old, "\n", f"\n\n{text}" if text.strip() else "\n"
    if [mark[1] for mark in marks] != ["begin", "end"]:
        raise UserError(
            f"{where}: expected the line {END[:-4]}... once and before it {BEGIN[:28]}... once, found "
            f"{', '.join(mark[1] for mark in marks)}; put the lines back, or take all of them out"
        )
    return old, text[: marks[0].start()], text[marks[1].end() :]


def card(run: Run, repo_id: str | None = None, license: str | None = None, existing: str | None = None) -> str:
    """The model card of a run, with all that ``existing`` (default: its ``README.md``) has beside it.

    ``repo_id``: owner/name of the Hub repository that the folder is for; without, the card speaks of the folder.
    ``license``: identifier of the Hub, for the weights; default that of the existing card, else ``unknown``. Raises
    ``UserError`` for a run without an evaluation, damaged files, or a card whose generated part cannot be told.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise UserError(f"license: expected an identifier of the Hub such as apache-2.0, got {license!r}")
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError:
            raise UserError(f"hub_model_id: expected OWNER/NAME, got {repo_id!r}") from None
    recipe, where = run.recipe, str(run.folder / CARD)
    old, above, below = split((run.card if existing is None else existing) or "", where)
    name = repo_id.split("/")[-1] if repo_id else line(f"{recipe.model}.{recipe.mixer}_e{recipe.epochs}")
    data = metadata(run, name, license, old, where)
    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n{above}{BEGIN}\n{body(run, name, repo_id)}\n\n{END}{below}"


def write_card(run: Run, repo_id: str | None = None, license: str | None = None, out: Path | None = None) -> list[Path]:
    """Write the card, and what leaderboards read of it, into the run folder, or the card alone to ``out``.

    Returns the files. Raises ``UserError``: see ``card``; then nothing is written.
    """
    existing = run.card if out is None else read_card(out)
    path, text = out or run.folder / CARD, card(run, repo_id, license, existing or "")
    files.write_into(path, text)
    return [path] if out else [path, *write_results(run, repo_id)]


def write_results(run: Run, repo_id: str | None = None) -> list[Path]:
    """Write what leaderboards read into the run folder; returns the file, or nothing where there is nothing to say."""
    text = eval_results(run, repo_id)
    if text is None:
        return []
    files.write_into(run.folder / EVAL_RESULTS, text)
    return [run.folder / EVAL_RESULTS]
