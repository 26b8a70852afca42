"""Run folders to the Hub: one commit per publication, only when something changed, never anything half-written.

Everything lies in the run folder first. A push sends what a reader needs (``published_files``); state of training goes
only when asked for. It is one ``create_commit``, so that a repository shows a publication whole or not at all; what was
uploaded before a push broke off is not uploaded again.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from mixup_recipes import files
from mixup_recipes.hub_errors import passing, reason, wanted_pause
from mixup_recipes.mixer_args import absent_mixers
from mixup_recipes.pages import card
from mixup_recipes.pages.card_metadata import eval_results
from mixup_recipes.recipe import Recipe, differences
from mixup_recipes.resolve import resolve
from mixup_recipes.runs import robustness_file
from mixup_recipes.runs.run import Run
from mixup_recipes.training.job import HUB_STRATEGIES
from mixup_recipes.typed import UserError

ROOT = (
    "README.md", "config.json", "model.safetensors", "recipe.yaml", "env.json", "data.json", "log.jsonl",
    "summary.csv", "eval_results.json", "predictions.safetensors", robustness_file.NAME, robustness_file.PICTURE,
)  # fmt: skip
FOLDERS = ("models", "runs", "samples", ".eval_results")  # published as they are: what has gone here goes there
SHORT = {
    "ILSVRC/imagenet-1k": "in1k",
    "zh-plus/tiny-imagenet": "tiny_in200",
    "uoft-cs/cifar10": "cifar10",
    "uoft-cs/cifar100": "cifar100",
    "bentrevett/caltech-ucsd-birds-200-2011": "cub200",
}
PAUSES = (1.0, 4.0, 15.0)  # seconds before each new attempt, where the Hub does not ask for more
LONGEST = 300.0  # seconds that it may ask for
SECRETS = 2**24  # bytes up to which files are searched for the token


class Pushed(NamedTuple):
    """Where a push went; ``changed``: whether there was anything new."""

    repo_id: str
    url: str
    changed: bool


# --------------------------------------------------------------------------------------------- names


def default_name(recipe: Recipe) -> str:
    """``<model>.<mixer>_e<epochs>_<dataset>``, as timm names weights; seeds other than 0 are told apart."""
    dataset = SHORT.get(recipe.dataset) or Path(recipe.dataset).name
    seed = f"_seed{recipe.seed}" if recipe.seed else ""
    name = f"{recipe.model}.{recipe.mixer}_e{recipe.epochs}_{dataset}{seed}"
    name = re.sub(r"\.{2,}|-{2,}", "_", re.sub(r"[^\w.-]", "_", name, flags=re.ASCII))
    return name[:96].removesuffix(".git").strip("-.")


def check_repo_id(name: str) -> None:
    """Raise ``UserError`` unless a repository can have this name. Needs no network."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            f"hub_model_id: expected NAME or OWNER/NAME of letters, digits and - _ . (at most 96), got {name!r}"
        ) from None


def find_token(given: str | None) -> str:
    """The token given, or that of this machine. Raises ``UserError`` without one, never showing it."""
    token = given or get_token()
    if not token:
        raise UserError("pushing to the Hub needs a token: `hf auth login`, HF_TOKEN, or --hub_token")
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError("the token for the Hub has blanks or unusual characters in it; copy it again")
    return token


# --------------------------------------------------------------------------------------------- what goes


def published_files(run: Path, strategy: str = "end") -> dict[str, Path]:
    """What is published, by its path in the repository. Links, hidden files and what is none of a run's stay here.

    ``strategy``: ``checkpoint`` adds the newest checkpoint, ``all_checkpoints`` those that the run keeps.
    """
    found = {name: run / name for name in ROOT}
    places = [run / name for name in FOLDERS]
    if strategy in ("checkpoint", "all_checkpoints"):
        checkpoints = sorted(p for p in (run / "checkpoints").glob("step-*") if p.is_dir())
        places += checkpoints[-1:] if strategy == "checkpoint" else checkpoints
    for place in places:
        if not place.is_symlink():
            for path in sorted(place.rglob("*")):
                inside = path.relative_to(place)
                if not any(part.startswith(".") for part in inside.parts) and not linked(path, place):
                    found[path.relative_to(run).as_posix()] = path
    return {name: path for name, path in found.items() if path.is_file() and not path.is_symlink()}


def linked(path: Path, place: Path) -> bool:
    """Whether a symbolic link lies between ``place`` and ``path``."""
    return any(p.is_symlink() for p in (path, *path.parents) if place in p.parents)


def check_whole(run: Run, strategy: str = "end") -> None:
    """Raise ``UserError`` unless the folder holds a whole publication."""
    if not (run.folder / "eval_results.json").exists() or not (run.folder / "model.safetensors").exists():
        if strategy in ("checkpoint", "all_checkpoints") and run.checkpoints:
            return
        raise UserError(f"{run.folder} was not evaluated yet, so there is nothing to publish")
    expected = run.results.get("weights_sha256")
    if expected is not None and expected != run.weights_hash:
        raise UserError(
            f"{run.folder}: eval_results.json belongs to other weights, because the run was stopped while it wrote "
            "them; continue it with --resume_from_checkpoint auto first"
        )


def check_secrets(found: dict[str, Path], token: str) -> None:
    """Raise ``UserError`` when a file that would be published holds the token."""
    for name, path in found.items():
        text = path.suffix not in (".safetensors", ".png", ".pt") and path.stat().st_size <= SECRETS
        if text and token.encode() in path.read_bytes():
            raise UserError(f"{path} holds your token for the Hub, so nothing is pushed; remove it from {name}")


# --------------------------------------------------------------------------------------------- push


def push(
    run: Run,
    repo_id: str | None = None,
    private: bool | None = None,
    strategy: str | None = None,
    token: str | None = None,
    say: Callable[[str], object] = print,
) -> Pushed:
    """Publish a run that nobody is writing to. What is not given is as at its last push, or the default.

    Raises ``UserError`` with the reason in one line; then the repository is as it was, and pushing again goes on.
    """
    before = run.pushed
    strategy = strategy or before.get("strategy") or "end"
    if strategy not in HUB_STRATEGIES:
        raise UserError(f"strategy: expected one of {', '.join(HUB_STRATEGIES)}, got {strategy!r}")
    private = bool(before.get("private")) if private is None else private
    with alone(run.folder):
        check_whole(run, strategy)
        name = repo_id or before.get("repo_id") or default_name(run.recipe)
        check_repo_id(name)
        return publish(run.folder, run.folder, name, private, strategy, find_token(token), say)


def publish(
    folder: Path,
    home: Path,
    repo_id: str,
    private: bool,
    strategy: str,
    token: str,
    say: Callable[[str], object] = print,
) -> Pushed:
    """Push ``folder``, the run folder ``home`` or a picture of it, with new attempts where that may help."""
    for pause in (*PAUSES, None):
        try:
            return attempt(folder, home, repo_id, private, strategy, token)
        except UserError:
            raise
        except Exception as e:  # the clients below raise some twenty types between them
            why = reason(e, token)
            asked = wanted_pause(e)
            if pause is None or not passing(e) or asked > LONGEST:
                raise UserError(f"{repo_id}: {why}") from None
            say(f"{repo_id}: {why}; trying again in {max(pause, asked):g} s")
            time.sleep(max(pause, asked))
    raise AssertionError("not reached")


def attempt(folder: Path, home: Path, repo_id: str, private: bool, strategy: str, token: str) -> Pushed:
    """One attempt: repository, card, and a single commit of what differs."""
    if not os.isatty(2):
        disable_progress_bars()
    run, kept = Run.open(folder), Run.open(home)
    memory = dict(kept.pushed)
    api = HfApi(token=token, library_name="mixup-recipes")
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    there = api.model_info(repo_id)
    if private and not there.private:
        raise UserError(
            f"{repo_id} exists and is public, so nothing is pushed; make it private on the Hub, or take another name"
        )
    names = {s.rfilename for s in there.siblings or ()}
    check_same_run(api, repo_id, there.sha, names, run.recipe)
    # a push since the picture was taken may have taken an edit over
    existing = run.card if kept.card is None else kept.card
    if "README.md" in names:
        content = Path(api.hf_hub_download(repo_id, "README.md", revision=there.sha)).read_bytes()
        if digest(content) == memory.get("card_sent"):  # it has arrived, though perhaps nobody was told
            note(home, memory, card_sha256=digest(content))
        elif digest(content) != memory.get("card_sha256"):  # a person has edited it there
            existing = edited_card(content, f"{repo_id}: README.md on the Hub")
    sent = write_cards(run, kept, repo_id, existing)
    note(home, memory, card_sent=sent)
    found = published_files(folder, strategy)
    check_secrets(found, token)
    managed = (*FOLDERS, *(("checkpoints",) if strategy == "checkpoint" else ()))
    gone = [n for n in sorted(names) if n.partition("/")[0] in managed and "/" in n and n not in found]
    changes: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=n, path_or_fileobj=str(p)) for n, p in found.items()
    ]
    changes += [CommitOperationDelete(path_in_repo=n, is_folder=False) for n in gone]
    # what is there by now is not sent; that holds as long as nobody else has committed since
    done = api.create_commit(repo_id, changes, commit_message=headline(run), parent_commit=there.sha)
    note(home, memory, repo_id=repo_id, private=private, strategy=strategy, card_sha256=sent)
    return Pushed(repo_id, f"{api.endpoint}/{repo_id}", done.oid != there.sha)


def headline(run: Run) -> str:
    """The first line of a commit: recipe, and what it has reached."""
    if not results_of(run):
        return f"{run.recipe.name}: checkpoint"
    return f"{run.recipe.name}: epoch {run.exported['epoch']} of {run.recipe.epochs}"


def check_same_run(api: Any, repo_id: str, commit: str | None, names: set[str], own: Recipe) -> None:
    """Raise ``UserError`` when the repository holds something else than a run of this recipe."""
    if "recipe.yaml" not in names:
        others = sorted(n for n in names if n not in ("README.md", ".gitattributes", "LICENSE"))
        if others:
            raise UserError(
                f"{repo_id} holds something else ({others[0]}, ...), so nothing is pushed; take another name"
            )
        return
    try:
        saved = api.hf_hub_download(repo_id, "recipe.yaml", revision=commit)
        there, _ = resolve(saved, absent=absent_mixers(own))
    except UserError as e:
        raise UserError(f"{repo_id} holds another recipe ({e}), so nothing is pushed; take another name") from None
    if different := differences(there, own, ignore=("name",)):
        rows = "; ".join(f"{k}: {a} there, {b} here" for k, (a, b) in list(different.items())[:3])
        raise UserError(f"{repo_id} holds a run of another recipe ({rows}), so nothing is pushed; take another name")


def edited_card(content: bytes, where: str) -> str:
    """The text of a card. Raises ``UserError`` for one whose generated part cannot be told."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{where} is not UTF-8 text: {e}") from None
    card.split(text, where)
    return text


def write_cards(run: Run, kept: Run, repo_id: str, existing: str | None) -> str | None:
    """Bring the card up to date in what is published, and in the run folder; the published one's hash.

    ``existing``: the card to go on from. A run without an evaluation has no card of its own: it keeps what there is. A
    run that was evaluated again since its picture was taken keeps its own numbers, and gets what persons wrote around
    them.
    """
    made, results = existing, None
    if results_of(run):
        made, results = card.card(run, repo_id, existing=existing or ""), eval_results(run, repo_id)
    if made is None:
        return None
    texts = {card.CARD: made} | ({card.EVAL_RESULTS: results} if results else {})
    for name, text in texts.items():
        files.write_into(run.folder / name, text)
    if run.folder != kept.folder:
        try:
            if results_of(run) != results_of(kept):
                texts = {card.CARD: card.card(kept, repo_id, existing=made)}
        except UserError:  # the run is just writing its files
            texts = {card.CARD: made}
        for name, text in texts.items():
            files.write_into(kept.folder / name, text)
    return digest(made.encode())


def digest(data: bytes) -> str:
    """SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


# --------------------------------------------------------------------------------------------- beside the run


def note(folder: Path, memory: dict[str, Any], **values: Any) -> None:
    """Remember something for the next push, in ``memory`` (``Run.pushed`` so far) and beside the run.

    ``card_sha256`` is the hash of the card of the last push that is known to have arrived, ``card_sent`` that of the
    last one begun.
    """
    memory.update(values)
    files.write_json(folder / ".hub.json", memory)


def results_of(run: Run) -> dict[str, Any]:
    """The results of a run; empty before its first evaluation."""
    return run.results if (run.folder / "eval_results.json").exists() else {}


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """Keep runs and other pushes away from a folder. Raises ``UserError`` when one is there."""
    with (run / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"a run or another push is at work in {run}; try again when it is done") from None
        yield
