"""Runs from the Hub: pulled, verified and trained on by the real clients; a stranger's files do no harm."""

import json
import pickle
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from driver import ROOT, Server
from forks import Done, Forks
from hub_server import HubServer
from resuming import LOG, Reference
from safetensors.numpy import load_file

SHORT = ("--epochs", 2, "--protocol_epochs", 1, "--precise_bn_samples", "none")
COMMAND = "from mixup_recipes import cli\ncli.main()"
EVALUATE = "import evaluate_mixup\nfrom mixup_recipes import flags\nflags.run(evaluate_mixup.main)"
REPO = "tester/run"
NAME = f"hf-hub:{REPO}"


@pytest.fixture
def run(reference: Reference, tmp_path: Path) -> Path:
    """A finished run of 2 epochs that a test may change."""
    return shutil.copytree(reference(*SHORT), tmp_path / "run")


def push(clients: Forks, run: Path) -> None:
    """Publish a run as ``REPO``."""
    done = clients.run(COMMAND, "push", run, "--repo_id", REPO)
    assert done.returncode == 0, done.output


def config(run: Path, **changes: object) -> bytes:
    """A run's config.json with changes."""
    return json.dumps(json.loads((run / "config.json").read_text()) | changes).encode()


# --------------------------------------------------------------------------------------------- pull

LOGITS = """
import json, timm, torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
from mixup_recipes.training import backbones
repo, folder = sys.argv[1:]
x = torch.linspace(-2, 2, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
nets = {
    "folder": backbones.load_model(folder),
    "hub": backbones.load_model(f"hf-hub:{repo}"),
    "timm": timm.create_model(f"hf-hub:{repo}", pretrained=True),
    "transformers": AutoModelForImageClassification.from_pretrained(repo),
}
with torch.no_grad():
    logits = {k: net.eval()(x) for k, net in nets.items()}
logits["transformers"] = logits["transformers"].logits
named = pipeline("image-classification", model=repo, device="cpu")(Image.new("RGB", (40, 40), "red"))
print(json.dumps({
    "equal": [torch.equal(v, logits["folder"]) for v in logits.values()],
    "names": sorted(p["label"] for p in named),
    "timm": list(nets["timm"].pretrained_cfg["label_names"]),
    "id2label": list(nets["transformers"].config.id2label.values()),
}))
"""


def assert_all_pull_the_same(clients: Forks, run: Path) -> None:
    done = clients.run(LOGITS, REPO, run)
    assert done.returncode == 0, done.output
    found = json.loads(done.output.splitlines()[-1])
    assert found["equal"] == [True] * 4
    assert found["names"] == found["timm"] == found["id2label"] == tiny.CLASSES


def test_a_pulled_model_is_the_same_for_all_and_is_evaluated_by_its_own_recipe_and_verified(
    clients: Forks, hub: HubServer, run: Path, tmp_path: Path
) -> None:
    push(clients, run)
    assert_all_pull_the_same(clients, run)
    done = clients.run(EVALUATE, "--model", NAME, "--output", tmp_path / "scores.json")
    assert done.returncode == 0, done.output
    scores, claimed = (json.loads(p.read_text()) for p in (tmp_path / "scores.json", run / "eval_results.json"))
    assert scores["top1"] == claimed["exported"]["top1"]
    good = clients.run(COMMAND, "verify", NAME)
    assert good.returncode == 0 and "differs" not in good.output, good.output
    assert len(good.output.splitlines()) >= 9


def by_timm_alone(repo):
    import timm

    try:
        timm.create_model(f"hf-hub:{repo}", pretrained=True)
    except RuntimeError as e:
        return str(e)


@pytest.mark.slow
def test_a_model_that_timm_lacks_is_pulled_by_the_import_of_its_card_and_older_cards_are_good_ones(
    clients: Forks, hub: HubServer, reference: Reference, tmp_path: Path
) -> None:
    short = ("--epochs", 1, "--protocol_epochs", 1, "--precise_bn_samples", "none")
    run = shutil.copytree(reference("--model", "resnet18_cifar", *short), tmp_path / "run")
    push(clients, run)
    assert_all_pull_the_same(clients, run)
    assert "Unknown model" in hub.client(by_timm_alone, REPO)
    new, old = b"\nimport mixup_recipes.training.backbones  # of", b"\nimport training.backbones  # of"
    assert new.strip()[:39].decode() in (ROOT / "docs/hub.md").read_text()
    card = hub.files(REPO)["README.md"]
    assert card.count(new) == 2  # before timm, and before transformers
    # as version 0.1 wrote it, and an editor with Windows' line ends
    hub.write(REPO, {"README.md": card.replace(new, old).replace(b"\n", b"\r\n")})
    good = clients.run(COMMAND, "verify", NAME)
    assert good.returncode == 0 and "agrees   card and" in good.output, good.output
    hub.write(REPO, {"README.md": card.replace(new, old)})
    push(clients, run)
    assert hub.files(REPO)["README.md"] == card


# --------------------------------------------------------------------------------------------- verify


def refused(done: Done, words: str) -> bool:
    """Whether a command has ended in one line with these words, and status 2."""
    return done.returncode == 2 and words in done.output and len(done.output.splitlines()) == 1


@pytest.mark.slow
def test_each_lie_is_found_and_where_it_is(clients: Forks, run: Path) -> None:
    card = clients.run(COMMAND, "card", run)
    assert card.returncode == 0, card.output
    lies = {
        "model.safetensors": (rb"(?s).{400}$", bytes(400), "weights and eval_results.json"),
        "summary.csv": (rb"$", b"4,1,1,1\n", "log and summary.csv"),
        "README.md": (rb"value: [\d.]+", b"value: 99.99", "card and"),
        "eval_results.json": (rb'"top1": [\d.]+', b'"top1": 99.5', "log and eval_results"),
    }
    for name, (place, lie, words) in lies.items():
        truth = (run / name).read_bytes()
        (run / name).write_bytes(re.sub(place, lambda _, lie=lie: lie, truth, count=name == "README.md"))
        found = clients.run(COMMAND, "verify", run)
        assert found.returncode == 1, found.output
        assert any(row.startswith("differs") and words in row for row in found.output.splitlines()), found.output
        (run / name).write_bytes(truth)


@pytest.mark.slow
def test_damaged_and_hostile_files_of_a_run_are_one_line(clients: Forks, run: Path, tmp_path: Path) -> None:
    recipe, deep = (run / "recipe.yaml").read_bytes(), b"[" * 100000
    results, data = (json.loads((run / name).read_text()) for name in ("eval_results.json", "data.json"))

    def exported(**changes: object) -> bytes:
        """The results with other scores; without those that are None."""
        scores = {k: v for k, v in (results["exported"] | changes).items() if v is not None}
        return json.dumps(results | {"exported": scores}).encode()

    lies = {k: 99.0 for k in results["exported"] if k.endswith("top1")}  # found first
    nlls = [k for k in results["exported"] if k.endswith("nll")]
    recipes = [
        (b"!!python/object/apply:os.system ['touch ran']", "not valid YAML"),
        (b"a: &a [*a]", "not valid YAML"),
        (b"mixer_args: {vanilla: {exec: 1}}\n", "exec"),
        (b"dataset: x\nunknown: 1\n", "unknown recipe field"),
        (re.sub(rb"eval_resize: \d+", b"eval_resize: 1000000", recipe), "at most 4096 pixels"),
    ]
    cases = [
        ("README.md", b"---\nmodel-index: " + deep + b"\n---\n", "damaged files: RecursionError"),
        ("README.md", b"---\nmodel-index: 5\n---\n", "damaged files: TypeError"),
        ("README.md", b"\xff", "README.md is not UTF-8 text"),
        ("eval_results.json", deep, "eval_results.json is not valid JSON"),
        ("eval_results.json", b"[]", "eval_results.json: expected a table"),
        ("eval_results.json", exported(top1=133.0), "exported.top1: expected a number from 0 to 100, got 133.0"),
        ("eval_results.json", exported(**lies, **dict.fromkeys(nlls)), "damaged files: KeyError"),
        ("eval_results.json", exported(**lies, **dict.fromkeys(nlls, "low")), "damaged files: ValueError"),
        ("eval_results.json", exported(**lies, **{key: [1] for key in nlls}), "damaged files: TypeError"),
        ("data.json", json.dumps({"classes": data["classes"]}).encode(), "data.json: splits is missing"),
        ("data.json", json.dumps(data | {"splits": {}}).encode(), "data.json: splits.train is missing"),
        ("data.json", json.dumps(data | {"splits": 5}).encode(), "data.json: splits: expected a table"),
        ("data.json", deep, "data.json is not valid JSON"),
        ("config.json", config(run, global_pool="", model_args={"global_pool": ""}), "does not take 64 images"),
        ("predictions.safetensors", pickle.dumps({}), "predictions.safetensors is damaged"),
        ("log.jsonl", b"", "no validation line"),
        ("log.jsonl", b"\xff\n", "log.jsonl, line 1: expected a JSON object"),
        *(("recipe.yaml", content, words) for content, words in recipes),
    ]
    (run / "README.md").touch()
    here = f"import os\nos.chdir({str(tmp_path)!r})\n"
    for name, lie, words in cases:
        truth = (run / name).read_bytes()
        (run / name).write_bytes(lie)
        done = clients.run(here + COMMAND, "verify", run)
        assert refused(done, words), (name, done.output)
        if name == "recipe.yaml":
            done = clients.run(here + EVALUATE, "--model", run)
            assert refused(done, words), done.output
        (run / name).write_bytes(truth)
    assert refused(clients.run(COMMAND, "verify", run, "--batch_size", 0), "batch_size: expected an integer at least 1")
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------------------------------------- fine-tune

START = """
import json
import torch
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training import backbones
repo, folder = sys.argv[1:]
own = json.loads(open(folder + "/config.json").read())["label_names"]
answers = []
for start in (repo, folder):
    for count, classes in ((4, own), (4, ["w", "x", "y", "z"]), (7, list("abcdefg"))):
        recipe = load_recipe(folder + "/recipe.yaml", pretrained=start, num_classes=count)
        fresh, model = backbones.create_model(recipe), backbones.create_model(recipe)
        source = backbones.load_start(recipe)
        said = backbones.start_from(model, source, classes)
        a, b, c = (m.state_dict() for m in (model, source, fresh))
        body = all(torch.equal(a[k], b[k]) for k in a if not k.startswith("fc."))
        head = "theirs" if count == 4 and torch.equal(a["fc.weight"], b["fc.weight"]) else "?"
        head = "fresh" if torch.equal(a["fc.weight"], c["fc.weight"]) else head
        answers.append([body, head, said])
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_fine_tuning_starts_from_the_pulled_weights_and_replaces_the_head_of_other_classes(
    clients: Forks, hub: HubServer, run: Path
) -> None:
    push(clients, run)
    done = clients.run(START, NAME, run)
    assert done.returncode == 0, done.output
    others = [[True, "fresh", f"with a new head for {n} classes"] for n in (4, 7)]
    assert json.loads(done.output.splitlines()[-1]) == [[True, "theirs", "with its head"], *others] * 2


@pytest.mark.slow
def test_a_run_starts_from_a_run_folder_and_resumes_without_it(
    server: Server, tiny_recipe: Path, run: Path, tmp_path: Path
) -> None:
    given = ("--recipe", tiny_recipe, "--output_dir", tmp_path / "tuned", "--dataloader_num_workers", 0, *LOG, *SHORT)
    given = (*given, "--pretrained", run, "--lr", 1e-9, "--warmup_epochs", 0, "--ema_decay", "none")
    given = (*given, "--ema_warmup_epochs", 0)
    status, output = server.run(*given)
    assert status == 0 and f"starts from {run} with its head" in output, output
    before, after = (load_file(f / "model.safetensors") for f in (run, tmp_path / "tuned"))
    for key in (k for k in before if "running" not in k and "num_batches" not in k):
        assert np.allclose(before[key], after[key], atol=1e-5), key
    shutil.rmtree(run)
    status, output = server.run(*given, "--resume_from_checkpoint", "auto")
    assert status == 0 and "starts from" not in output, output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pretrained", "words"),
    [
        ("nowhere", "neither a run folder"),
        ("RUN", "pass --model test_resnet"),
        ("timm", "timm has no weights of 'resnet18_cifar'"),
        ("resnet5", "did you mean 'resnet50'"),
    ],
)
def test_a_start_that_cannot_be_is_one_line(
    server: Server, tiny_recipe: Path, run: Path, tmp_path: Path, pretrained: str, words: str
) -> None:
    start = run if pretrained == "RUN" else pretrained
    given = ("--recipe", tiny_recipe, "--output_dir", tmp_path / "tuned", "--model", "resnet18_cifar")
    status, output = server.run(*given, "--pretrained", start)
    assert status == 2 and words in output and "Traceback" not in output, output
    assert not (tmp_path / "tuned").exists()


# --------------------------------------------------------------------------------------------- strangers

LOAD = """
from mixup_recipes import flags
from mixup_recipes.training import backbones
flags.run(lambda: print(type(backbones.load_model(sys.argv[1])).__name__))
"""
LOAD_ALL = """
import json, torch
from mixers import AttentiveMix, taps
from mixup_recipes.training import backbones

def answer(load, name):
    try:
        return list(load(name).eval()(torch.zeros(2, 3, 32, 32)).shape)
    except ValueError as e:
        return str(e)

said = {name: answer(taps.Frozen, name) for name in sys.argv[1:]}
models = {name: answer(backbones.load_model, name) for name in sys.argv[1:] if name.startswith("hf-hub:")}
AttentiveMix(teacher=sys.argv[1]).setup(torch.nn.Identity())
print(json.dumps([said, models]))
"""


class Trap:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_a_hostile_model_or_teacher_does_no_harm_and_is_one_line(
    clients: Forks, hub: HubServer, run: Path, tmp_path: Path
) -> None:
    mark, trap_file = tmp_path / "read", tmp_path / "trap.pth"
    trap, weights = pickle.dumps(Trap(mark)), (run / "model.safetensors").read_bytes()
    trap_file.write_bytes(trap)
    nested = json.loads((run / "config.json").read_text())["pretrained_cfg"]
    sources = {"file": str(trap_file), "url": f"file://{trap_file}", "custom_load": True, "source": "url"}
    sources |= {"hf_hub_filename": "pytorch_model.bin", "hf_hub_id": "stranger/other", "state_dict": {"a": 1}}
    configurations = [
        ({"architecture": "os.system"}, "is a 'os.system', which timm does not have"),
        ({"architecture": "hf-hub:stranger/other"}, "is a 'hf-hub:stranger/other'"),
        ({"architecture": ["resnet10t"]}, "names no architecture"),
        ({"architecture": "resnet5"}, "did you mean"),
        ({"model_args": {"checkpoint_path": str(trap_file)}}, "the argument 'checkpoint_path'"),
        ({"model_args": {"pretrained_cfg": {"file": str(trap_file)}}}, "the argument 'pretrained_cfg'"),
        ({"model_args": {"layers": [2, 2, 10**9, 2]}}, "no classifier is that large"),
        ({"model_args": {"width": 10**9}}, "no classifier is that large"),
        ({"model_args": {"no_such": 1}}, "an unexpected keyword argument"),
        ({"model_args": "rm"}, "must be tables"),
        ({"num_classes": 10**9}, "no classifier is that large"),
    ]
    cases = [
        ({"pytorch_model.bin": trap}, None),
        ({"config.json": config(run, pretrained_cfg=nested | sources), "pytorch_model.bin": trap}, None),
        ({"model.safetensors": None, "pytorch_model.bin": trap}, "has no model.safetensors; weights in other files, "),
        ({"model.safetensors": trap + bytes(len(weights))}, "SafetensorError"),
        ({"model.safetensors": (2**63 - 1).to_bytes(8, "little") + weights[8:]}, "SafetensorError"),
        ({"model.safetensors": weights[:-100]}, "SafetensorError"),
        ({"config.json": b"[" * 100000}, "config.json cannot be read"),
        ({"config.json": None}, "has no config.json"),
        *(({"config.json": config(run, **changes)}, words) for changes, words in configurations),
    ]
    expected = {}
    for number, (changes, words) in enumerate(cases):
        files = {"config.json": config(run), "model.safetensors": weights} | changes
        files = {name: content for name, content in files.items() if content is not None}
        hub.write(f"stranger/{number}", files)
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        expected |= {f"hf-hub:stranger/{number}": words, str(folder): words}
    expected.pop(str(tmp_path / "7"))  # a folder without config.json is no name of a model
    done = clients.run(LOAD_ALL, *expected)
    assert done.returncode == 0, done.output
    teachers, models = json.loads(done.output.splitlines()[-1])
    assert teachers.keys() == expected.keys() and len(models) == len(cases)
    for name, answer in (*teachers.items(), *models.items()):
        words = expected[name]
        if words is None:
            assert answer == [2, 4], (name, answer)
        else:
            assert words in answer and "\n" not in answer, (name, answer)
    refusals = [answer for name, answer in teachers.items() if expected[name]]
    assert all(answer.startswith("no weights for the teacher '") for answer in refusals)
    assert refused(clients.run(LOAD, "hf-hub:stranger/nobody"), "the Hub answered 404")
    assert not mark.exists() and not any(r.endswith("pytorch_model.bin") for r in hub.requests)


@pytest.mark.slow
def test_what_is_announced_too_large_is_not_begun(clients: Forks, hub: HubServer, run: Path) -> None:
    hub.write("stranger/large", {"config.json": b" " * 2**24, "model.safetensors": b"x"})
    done = clients.run(LOAD, "hf-hub:stranger/large")
    assert refused(done, "config.json has 17 MB, and 8 MB are the most here"), done.output
    assert not [r for r in hub.requests if r.startswith("GET")]
    hub.write("stranger/large", {"config.json": config(run), "model.safetensors": bytes(2**21)})
    full = "import shutil; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(2**40, 2**40, 2**20)\n"
    done = clients.run(full + LOAD, "hf-hub:stranger/large")
    assert refused(done, "model.safetensors has 2 MB, and 1 MB are the most here"), done.output


@pytest.mark.slow
def test_names_that_leave_the_folder_and_code_for_python_are_never_touched(
    clients: Forks, hub: HubServer, run: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    evil = f"open({str(mark)!r}, 'w')".encode()
    files = {n: (run / n).read_bytes() for n in ("model.safetensors", "recipe.yaml", "data.json")}
    files["config.json"] = config(run, auto_map={"AutoModelForImageClassification": "modeling.Evil"})
    files |= {n: evil for n in ("modeling.py", "../../escaped.py", "../escaped.py", "/tmp/escaped-hub.py")}
    card = f"---\nlicense: !!python/object/apply:os.system ['touch {mark}']\n---\n<script>alert(1)</script>"
    hub.write("stranger/escape", files | {"README.md": card.encode()})
    for code, *args in ((LOAD,), (COMMAND, "verify")):
        clients.run(code, *args, "hf-hub:stranger/escape")
    assert not mark.exists()
    assert not [r for r in hub.requests if "escaped" in r or "modeling" in r]
    assert not [*hub.folder.rglob("escaped*"), *Path("/tmp").glob("escaped*")]


# --------------------------------------------------------------------------------------------- metrics as Spaces

HF = "from huggingface_hub.cli.hf import main\nsys.argv[0] = 'hf'\nmain()"
USE = """
import json, os, socket
if os.environ["HF_HUB_OFFLINE"] == "1":
    def refuse(*_): raise AssertionError("the metric asked for a connection")
    socket.socket.connect = refuse
import evaluate
inputs = {"predictions": [[3, 7, 1, 0, 2], [2, 0, 5, 1, 3]], "references": [3, 5]}
if sys.argv[1].endswith("calibration"):
    inputs |= {"confidences": [1, 0.5], "nlls": [0, 2]}
print(json.dumps(evaluate.load(sys.argv[1], cache_dir=sys.argv[2]).compute(**inputs)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [("topk_accuracy", {"top1": 50.0, "top5": 100.0}), ("calibration", {"ece": 25.0, "nll": 1.0})],
)
def test_the_documented_commands_make_a_metric_a_space_that_loads_from_there_and_from_a_copy(
    clients: Forks, hub: HubServer, tmp_path: Path, name: str, expected: dict[str, float]
) -> None:
    section = re.search(r"^## Metrics as Spaces\n.*?```bash\n(.*?)```", (ROOT / "docs/hub.md").read_text(), re.S | re.M)
    lines = section[1].replace("OWNER", "tester").replace("topk_accuracy", name).splitlines()
    assert [shlex.split(line)[:2] for line in lines] == [["hf", "repos"], ["hf", "upload"], ["hf", "download"]]
    for line in lines:
        words = [w if w.startswith("--") else w.replace("copies/", f"{tmp_path}/") for w in shlex.split(line)[1:]]
        done = clients.run(f"import os\nos.chdir({str(ROOT)!r})\n{HF}", *words)
        assert done.returncode == 0, done.output
    source = ROOT / shlex.split(lines[1])[3]
    here = {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}
    there = {k: v for k, v in hub.files(f"tester/{name}", "space").items() if k != ".gitattributes"}
    assert there == here and {"README.md", "app.py", "requirements.txt"} <= there.keys()
    copy = [tmp_path / name, {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}]
    for source, env in ([f"tester/{name}", {}], copy):
        with Forks(hub.env | env, "") as one:
            done = one.run(USE, source, tmp_path / "cache", env=env)
        assert done.returncode == 0, done.output
        assert json.loads(done.output.splitlines()[-1]) == pytest.approx(expected)
