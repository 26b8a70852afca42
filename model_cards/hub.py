"""Run folders to the Hub: one commit per publication, only when something changed, never anything half-written.

Everything lies in the run folder first. A push sends what a reader needs (``files``); state of training goes only when
asked for. It is one ``create_commit``, so that a repository shows a publication whole or not at all; what was uploaded
before a push broke off is not uploaded again.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import recipes
from recipes import Recipe, UserError
from training.hub_errors import passing, reason, wanted_pause
from training.job import HUB_STRATEGIES

ROOT = (
    "README.md", "config.json", "model.safetensors", "recipe.yaml", "env.json", "data.json", "log.jsonl",
    "summary.csv", "eval_results.json", "predictions.safetensors",
)  # fmt: skip
FOLDERS = ("models", "runs", "samples", ".eval_results")  # published as they are: what has gone here goes there
REMEMBERED = ".hub.json"  # where the run was pushed to; not pushed itself
SHORT = {"ILSVRC/imagenet-1k": "in1k", "zh-plus/tiny-imagenet": "tiny_in200", "uoft-cs/cifar10": "cifar10"}
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


def check_name(name: str) -> None:
    """Raise ``UserError`` unless a repository can have this name. Needs no network."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as e:
        raise UserError(f"hub_model_id: expected NAME or OWNER/NAME, got {name!r}: {e}") from None


def find_token(given: str | None) -> str:
    """The token given, or that of this machine. Raises ``UserError`` without one, never showing it."""
    from huggingface_hub import get_token

    token = given or get_token()
    if not token:
        raise UserError("pushing to the Hub needs a token: `hf auth login`, HF_TOKEN, or --hub_token")
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError("the token for the Hub has blanks or unusual characters in it; copy it again")
    return token


# --------------------------------------------------------------------------------------------- what goes


def files(run: Path, strategy: str = "end") -> dict[str, Path]:
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


def check_whole(run: Path, strategy: str = "end") -> Recipe:
    """The run's recipe, after checking that the folder holds a whole publication. Raises ``UserError``."""
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a run: it has no recipe.yaml")
    recipe, _ = recipes.resolve(str(run / "recipe.yaml"))
    results, weights = run / "eval_results.json", run / "model.safetensors"
    if not results.exists() or not weights.exists():
        if strategy in ("checkpoint", "all_checkpoints") and any((run / "checkpoints").glob("step-*")):
            return recipe
        raise UserError(f"{run} was not evaluated yet: there is nothing to publish")
    try:
        expected = json.loads(results.read_text()).get("weights_sha256")
    except ValueError as e:
        raise UserError(f"{results} is damaged: {e}") from None
    from training.checkpoint import file_hash

    if expected is not None and file_hash(weights) != expected:
        raise UserError(
            f"{run}: eval_results.json is of other weights: the run was stopped while it wrote them; "
            "continue it with --resume_from_checkpoint auto first"
        )
    return recipe


def check_secrets(found: dict[str, Path], token: str) -> None:
    """Raise ``UserError`` when a file that would be published holds the token."""
    for name, path in found.items():
        text = path.suffix not in (".safetensors", ".png", ".pt") and path.stat().st_size <= SECRETS
        if text and token.encode() in path.read_bytes():
            raise UserError(f"{path} holds your token for the Hub: nothing is pushed; remove it from {name}")


def write_card(folder: Path, repo_id: str) -> None:
    """Bring README.md and .eval_results/ of a run folder up to date; a run without evaluation has none."""
    from . import card

    if (folder / "eval_results.json").exists():
        card.write(folder, repo_id)


# --------------------------------------------------------------------------------------------- push


def push(
    run: Path,
    repo_id: str | None = None,
    private: bool | None = None,
    strategy: str | None = None,
    token: str | None = None,
    say: Callable[[str], object] = print,
) -> Pushed:
    """Publish a run folder that no run is writing to. What is not given is as at its last push, or the default.

    Raises ``UserError`` with the reason in one line; then the repository is as it was, and pushing again goes on.
    """
    if not run.is_dir():
        raise UserError(f"no run folder {run}")
    before = remembered(run)
    strategy = strategy or before.get("strategy") or "end"
    if strategy not in HUB_STRATEGIES:
        raise UserError(f"strategy: expected one of {', '.join(HUB_STRATEGIES)}, got {strategy!r}")
    private = bool(before.get("private")) if private is None else private
    with alone(run):
        recipe = check_whole(run, strategy)
        name = repo_id or before.get("repo_id") or default_name(recipe)
        check_name(name)
        return publish(run, run, name, private, strategy, find_token(token), say)


def publish(
    folder: Path,
    run: Path,
    repo_id: str,
    private: bool,
    strategy: str,
    token: str,
    say: Callable[[str], object] = print,
) -> Pushed:
    """Push ``folder``, the run folder ``run`` or a picture of it, with new attempts where that may help."""
    for pause in (*PAUSES, None):
        try:
            return attempt(folder, run, repo_id, private, strategy, token)
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


def attempt(folder: Path, run: Path, repo_id: str, private: bool, strategy: str, token: str) -> Pushed:
    """One attempt: repository, card, and a single commit of what differs."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    from training.run import write

    if not os.isatty(2):
        disable_progress_bars()
    api = HfApi(token=token, library_name="mixup-recipes")
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    there = api.model_info(repo_id)
    if private and not there.private:
        raise UserError(f"{repo_id} exists and is public: not pushed; make it private on the Hub, or take another name")
    names = {s.rfilename for s in there.siblings or ()}
    check_same_run(api, repo_id, there.sha, names, folder)
    if folder != run and (run / "README.md").exists():  # a push since the picture may have taken an edit over
        write(folder / "README.md", (run / "README.md").read_bytes())
    take_edits(api, repo_id, there.sha, names, folder, run)
    write_card(folder, repo_id)
    card = keep_card(folder, run, repo_id)
    note(run, card_sent=card)
    found = files(folder, strategy)
    check_secrets(found, token)
    managed = (*FOLDERS, *(("checkpoints",) if strategy == "checkpoint" else ()))
    gone = [n for n in sorted(names) if n.partition("/")[0] in managed and "/" in n and n not in found]
    changes = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=str(p)) for n, p in found.items()]
    changes += [CommitOperationDelete(path_in_repo=n, is_folder=False) for n in gone]
    # what is there by now is not sent; that holds as long as nobody else has committed since
    done = api.create_commit(repo_id, changes, commit_message=headline(folder), parent_commit=there.sha)
    note(run, repo_id=repo_id, private=private, strategy=strategy, card_sha256=card)
    return Pushed(repo_id, f"{api.endpoint}/{repo_id}", done.oid != there.sha)


def headline(folder: Path) -> str:
    """The first line of a commit: recipe, and what it has reached."""
    recipe, _ = recipes.resolve(str(folder / "recipe.yaml"))
    results = folder / "eval_results.json"
    if not results.exists():
        return f"{recipe.name}: checkpoint"
    scores = json.loads(results.read_text())["exported"]
    return f"{recipe.name}: epoch {scores['epoch']} of {recipe.epochs}"


def check_same_run(api: Any, repo_id: str, commit: str, names: set[str], folder: Path) -> None:
    """Raise ``UserError`` when the repository holds something else than this run."""
    if "recipe.yaml" not in names:
        others = sorted(n for n in names if n not in ("README.md", ".gitattributes", "LICENSE"))
        if others:
            raise UserError(f"{repo_id} holds something else ({others[0]}, ...): not pushed; take another name")
        return
    own, _ = recipes.resolve(str(folder / "recipe.yaml"))
    try:
        there, _ = recipes.resolve(api.hf_hub_download(repo_id, "recipe.yaml", revision=commit))
    except UserError as e:
        raise UserError(f"{repo_id} holds another recipe ({e}): not pushed; take another name") from None
    if different := recipes.differences(there, own, ignore=("name",)):
        rows = "; ".join(f"{k}: {a} there, {b} here" for k, (a, b) in list(different.items())[:3])
        raise UserError(f"{repo_id} holds a run of another recipe ({rows}): not pushed; take another name")


def take_edits(api: Any, repo_id: str, commit: str, names: set[str], folder: Path, run: Path) -> None:
    """Take over the Hub's card when it is none that was pushed from here: a person has edited it there.

    Raises ``UserError`` for one whose generated part cannot be told; the card here stays as it is.
    """
    if "README.md" in names:
        from training.run import write

        from . import card

        text = Path(api.hf_hub_download(repo_id, "README.md", revision=commit)).read_bytes()
        before = remembered(run)
        if digest(text) == before.get("card_sent"):  # it has arrived, though perhaps nobody was told
            note(run, card_sha256=digest(text))
        elif digest(text) != before.get("card_sha256"):
            card.split(text.decode("utf-8", "replace"), f"{repo_id}: README.md on the Hub")
            write(folder / "README.md", text)


def digest(data: bytes) -> str:
    """SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


# --------------------------------------------------------------------------------------------- beside the run


def remembered(run: Path) -> dict[str, Any]:
    """Where the run was pushed to, how, and the card's hash: ``card_sha256`` of the last push that is known to have
    arrived, ``card_sent`` of the last one begun. Empty before the first push."""
    try:
        content = json.loads((run / REMEMBERED).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def note(run: Path, **values: Any) -> None:
    """Remember something for the next push."""
    from training.run import write_json

    write_json(run / REMEMBERED, remembered(run) | values)


def keep_card(folder: Path, run: Path, repo_id: str) -> str | None:
    """Give the run folder the card that is published; its hash.

    A run that was evaluated again since the picture keeps its own numbers, and gets what persons wrote around them.
    """
    from training.run import write

    from . import card

    readme = folder / "README.md"
    text = readme.read_bytes() if readme.exists() else None
    if folder != run and evaluated(folder) == evaluated(run):
        for path in (readme, *folder.glob(".eval_results/*.yaml")) if text is not None else ():
            place = run / path.relative_to(folder)
            place.parent.mkdir(exist_ok=True)
            write(place, path.read_bytes())
    elif folder != run and text is not None:
        try:
            newer = card.card(run, repo_id, existing=text.decode("utf-8", "replace")).encode()
        except UserError:  # the run is just writing its files
            newer = text
        write(run / "README.md", newer)
    return None if text is None else digest(text)


def evaluated(folder: Path) -> bytes:
    """The results of a run folder, or nothing."""
    path = folder / "eval_results.json"
    return path.read_bytes() if path.exists() else b""


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """Keep runs and other pushes away from a folder. Raises ``UserError`` when one is there."""
    import fcntl

    with (run / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"a run or another push is at work in {run}; try again when it is done") from None
        yield
