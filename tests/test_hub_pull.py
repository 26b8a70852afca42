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
import torch
from forks import Forks
from resuming import LOG, SHORT
from safetensors.numpy import load_file
from test_hub import REPO, refused
from tiny import ROOT

from mixup_recipes.resolve import load_recipe
from mixup_recipes.training.backbones import create_model, load_start, start_from

COMMAND = "from mixup_recipes import cli\ncli.main()"
EVALUATE = "import evaluate_mixup\nfrom mixup_recipes import flags\nflags.run(evaluate_mixup.main)"
NAME = f"hf-hub:{REPO}"


def ran(clients, *given):
    """What a command prints that must succeed."""
    done = clients.run(*given)
    assert done.returncode == 0, done.output
    return done.output


def config(run, **changes):
    """A run's config.json with changes."""
    return json.dumps(json.loads((run / "config.json").read_text()) | changes).encode()


LOGITS = """
import json, timm, torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
from mixup_recipes.resolve import load_recipe
from mixup_recipes.training import backbones
repo, folder = sys.argv[1:]
x = torch.linspace(-2, 2, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
theirs = AutoModelForImageClassification.from_pretrained(repo)
timms = timm.create_model(f"hf-hub:{repo}", pretrained=True)
start = backbones.load_start(load_recipe(folder + "/recipe.yaml", pretrained=f"hf-hub:{repo}")).model
nets = backbones.load_model(folder), start, timms
with torch.no_grad():
    logits = [net.eval()(x) for net in nets] + [theirs.eval()(x).logits]
named = pipeline("image-classification", model=repo, device="cpu")(Image.new("RGB", (40, 40), "red"))
names = sorted(p["label"] for p in named), timms.pretrained_cfg["label_names"], theirs.config.id2label.values()
print(json.dumps([[torch.equal(v, logits[0]) for v in logits], *map(list, names)]))
"""


def assert_all_pull_the_same(clients, run):
    equal, *names = json.loads(ran(clients, LOGITS, REPO, run).splitlines()[-1])
    assert equal == [True] * 4 and names == [tiny.CLASSES] * 3


def test_a_pulled_model_is_the_same_for_all_and_is_evaluated_by_its_own_recipe_and_verified(
    clients, hub, run, tmp_path
):
    ran(clients, COMMAND, "push", run, "--repo_id", REPO)
    assert_all_pull_the_same(clients, run)
    ran(clients, EVALUATE, "--model", NAME, "--output", tmp_path / "scores.json")
    scores, claimed = (json.loads(p.read_text()) for p in (tmp_path / "scores.json", run / "eval_results.json"))
    assert scores["top1"] == claimed["exported"]["top1"]
    good = ran(clients, COMMAND, "verify", NAME)
    assert "differs" not in good and len(good.splitlines()) >= 9


def by_timm_alone(repo):
    import timm

    timm.create_model(f"hf-hub:{repo}", pretrained=True)


@pytest.mark.slow
def test_a_model_that_timm_lacks_is_pulled_by_the_import_of_its_card_and_older_cards_are_good_ones(
    clients, hub, reference, tmp_path
):
    short = ("--epochs", 1, "--protocol_epochs", 1, "--precise_bn_samples", "none")
    run = shutil.copytree(reference("--model", "resnet18_cifar", *short), tmp_path / "run")
    ran(clients, COMMAND, "push", run, "--repo_id", REPO)
    assert_all_pull_the_same(clients, run)
    with pytest.raises(AssertionError, match="Unknown model"):
        hub.client(by_timm_alone, REPO)
    new, old = b"\nimport mixup_recipes.training.backbones  # of", b"\nimport training.backbones  # of"
    assert new.strip()[:39].decode() in (ROOT / "docs/hub.md").read_text()
    card = hub.files(REPO)["README.md"]
    assert card.count(new) == 2  # before timm, and before transformers
    # as version 0.1 wrote it, and an editor with Windows' line ends
    hub.write(REPO, {"README.md": card.replace(new, old).replace(b"\n", b"\r\n")})
    assert "agrees   card and" in ran(clients, COMMAND, "verify", NAME)
    hub.write(REPO, {"README.md": card.replace(new, old)})
    ran(clients, COMMAND, "push", run, "--repo_id", REPO)
    assert hub.files(REPO)["README.md"] == card


@pytest.mark.slow
def test_each_lie_is_found_and_where_it_is(clients, run):
    ran(clients, COMMAND, "card", run)
    for name, place, lie, words in (
        ("model.safetensors", rb"(?s).{400}$", bytes(400), "weights and eval_results.json"),
        ("summary.csv", rb"$", b"4,1,1,1\n", "log and summary.csv"),
        ("README.md", rb"value: [\d.]+", b"value: 99.99", "card and"),
        ("eval_results.json", rb'"top1": [\d.]+', b'"top1": 99.5', "log and eval_results"),
    ):
        truth = (run / name).read_bytes()
        (run / name).write_bytes(re.sub(place, lambda _, lie=lie: lie, truth, count=name == "README.md"))
        found = clients.run(COMMAND, "verify", run)
        assert found.returncode == 1, found.output
        assert any(row.startswith("differs") and words in row for row in found.output.splitlines()), found.output
        (run / name).write_bytes(truth)


@pytest.mark.slow
def test_damaged_and_hostile_files_of_a_run_are_one_line(clients, run, tmp_path):
    """Of verify, and of evaluate where it reads them. Single values that cannot be: see test_run, test_recipes."""
    deep, results = b"[" * 100000, json.loads((run / "eval_results.json").read_text())
    scored = results["exported"]

    def exported(nll):
        """The results with a top-1 that is found first, and with such an NLL; None: without one."""
        scores = {k: 99.0 if k.endswith("top1") else nll if k.endswith("nll") else v for k, v in scored.items()}
        return json.dumps(results | {"exported": {k: v for k, v in scores.items() if v is not None}}).encode()

    cases = [
        ("README.md", b"---\nmodel-index: " + deep + b"\n---\n", "damaged files: RecursionError"),
        ("README.md", b"---\nmodel-index: 5\n---\n", "damaged files: TypeError"),
        ("README.md", b"\xff", "README.md is not UTF-8 text"),
        ("eval_results.json", deep, "eval_results.json is not valid JSON"),
        ("eval_results.json", b"[]", "eval_results.json: expected a table"),
        ("eval_results.json", exported(None), "damaged files: KeyError"),
        ("eval_results.json", exported("low"), "damaged files: ValueError"),
        ("eval_results.json", exported([1]), "damaged files: TypeError"),
        ("data.json", b'{"classes": [], "splits": {}}', "data.json: splits.train is missing"),
        ("data.json", deep, "data.json is not valid JSON"),
        ("config.json", config(run, global_pool="", model_args={"global_pool": ""}), "does not take 64 images"),
        ("predictions.safetensors", pickle.dumps({}), "predictions.safetensors is damaged"),
        ("log.jsonl", b"", "no validation line"),
        ("log.jsonl", b"\xff\n", "log.jsonl, line 1: expected a JSON object"),
        ("recipe.yaml", b"!!python/object/apply:os.system ['touch ran']", "not valid YAML"),
        ("recipe.yaml", b"a: &a [*a]", "not valid YAML"),
        ("recipe.yaml", b"mixer_args: {vanilla: {exec: 1}}\n", "exec"),
    ]
    (run / "README.md").touch()
    here = f"import os\nos.chdir({str(tmp_path)!r})\n"
    for name, lie, words in cases:
        truth = (run / name).read_bytes()
        (run / name).write_bytes(lie)
        for code in ((COMMAND, "verify"), (EVALUATE, "--model"))[: 1 + (name == "recipe.yaml")]:
            done = clients.run(here + code[0], code[1], run)
            assert refused(done, words), (name, done.output)
        (run / name).write_bytes(truth)
    assert refused(clients.run(COMMAND, "verify", run, "--batch_size", 0), "batch_size: expected an integer at least 1")
    assert not (tmp_path / "ran").exists()


def test_fine_tuning_starts_from_trained_weights_and_replaces_the_head_of_other_classes(run):
    """Of pulled ones, which load_start returns too: see LOGITS."""
    for classes, said in (
        (tiny.CLASSES, "with its head"),
        (["w", "x", "y", "z"], "with a new head for 4 classes"),
        (list("abcdefg"), "with a new head for 7 classes"),
    ):
        recipe = load_recipe(str(run / "recipe.yaml"), pretrained=str(run), num_classes=len(classes))
        fresh, model, source = (f(recipe) for f in (create_model, create_model, load_start))
        assert start_from(model, source.model, classes) == said
        found, given, drawn = (net.state_dict() for net in (model, source.model, fresh))
        small = drawn["fc.weight"] * (0.01 / drawn["fc.weight"].std())
        head = given if said == "with its head" else {"fc.weight": small, "fc.bias": torch.zeros(len(classes))}
        for k, value in found.items():
            torch.testing.assert_close(value, (head if k.startswith("fc.") else given)[k], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_run_starts_from_a_run_folder_and_resumes_without_it(server, tiny_recipe, run, tmp_path):
    given = ("--recipe", tiny_recipe, "--output_dir", tmp_path / "tuned")
    for pretrained, words in (  # no start at all
        ("nowhere", "neither a run folder"),
        (run, "pass --model test_resnet"),
        ("timm", "timm has no weights of 'resnet18_cifar'"),
        ("resnet5", "did you mean 'resnet50'"),
    ):
        status, output = server.run(*given, "--model", "resnet18_cifar", "--pretrained", pretrained)
        assert status == 2 and words in output and "Traceback" not in output, output
        assert not (tmp_path / "tuned").exists()
    given = (*given, "--dataloader_num_workers", 0, *LOG, *SHORT, "--pretrained", run, "--lr", 1e-9)
    given = (*given, "--warmup_epochs", 0, "--ema_decay", "none", "--ema_warmup_epochs", 0)
    status, output = server.run(*given)
    assert status == 0 and f"starts from {run} with its head" in output, output
    before, after = (load_file(f / "model.safetensors") for f in (run, tmp_path / "tuned"))
    for key in (k for k in before if "running" not in k and "num_batches" not in k):
        assert np.allclose(before[key], after[key], atol=1e-5), key
    shutil.rmtree(run)
    status, output = server.run(*given, "--resume_from_checkpoint", "auto")
    assert status == 0 and "starts from" not in output, output


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

said = [[name, answer(taps.Frozen, name)] for name in sys.argv[1:]]
models = [[name, answer(backbones.load_model, name)] for name in sys.argv[1:] if name.startswith("hf-hub:")]
AttentiveMix(teacher=sys.argv[1]).setup(torch.nn.Identity())
print(json.dumps([said, models]))
"""


def test_a_hostile_model_or_teacher_does_no_harm_and_is_one_line(clients, hub, run, tmp_path):
    mark, trap_file = tmp_path / "read", tmp_path / "trap.pth"
    trap = f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()  # a pickle that leaves a mark when it is read
    trap_file.write_bytes(trap)
    weights = (run / "model.safetensors").read_bytes()
    nested = json.loads((run / "config.json").read_text())["pretrained_cfg"]
    nested |= {"file": str(trap_file), "url": f"file://{trap_file}", "custom_load": True, "source": "url"}
    nested |= {"hf_hub_filename": "pytorch_model.bin", "hf_hub_id": "stranger/other", "state_dict": {"a": 1}}
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
        ({"config.json": None}, "has no config.json"),
        ({"pytorch_model.bin": trap}, None),
        ({"config.json": config(run, pretrained_cfg=nested), "pytorch_model.bin": trap}, None),
        ({"model.safetensors": None, "pytorch_model.bin": trap}, "has no model.safetensors; weights in other files, "),
        ({"model.safetensors": trap + bytes(len(weights))}, "SafetensorError"),
        ({"model.safetensors": (2**63 - 1).to_bytes(8, "little") + weights[8:]}, "SafetensorError"),
        ({"model.safetensors": weights[:-100]}, "SafetensorError"),
        ({"config.json": b"[" * 100000}, "config.json cannot be read"),
        *(({"config.json": config(run, **changes)}, words) for changes, words in configurations),
    ]
    expected = {}
    for number, (changes, words) in enumerate(cases):
        given = {"config.json": config(run), "model.safetensors": weights} | changes
        files = {name: content for name, content in given.items() if content is not None}
        hub.write(f"stranger/{number}", files)
        expected[f"hf-hub:stranger/{number}"] = words
        if number:  # a folder without config.json is no name of a model
            folder = tmp_path / str(number)
            folder.mkdir()
            for name, content in files.items():
                (folder / name).write_bytes(content)
            expected[str(folder)] = words
    names = sorted(expected, key=lambda name: expected[name] is not None)  # good ones first: the first is set up too
    teachers, models = json.loads(ran(clients, LOAD_ALL, *names).splitlines()[-1])
    assert [name for name, _ in teachers] == names and len(models) == len(cases)
    for name, answer in (*teachers, *models):
        good = answer == [2, 4] if expected[name] is None else expected[name] in answer and "\n" not in answer
        assert good, (name, answer)
    assert all(answer.startswith("no weights for the teacher '") for name, answer in teachers if expected[name])
    assert refused(clients.run(LOAD, "hf-hub:stranger/nobody"), "the Hub answered 404")
    assert not mark.exists() and not any(r.endswith("pytorch_model.bin") for r in hub.requests)


@pytest.mark.slow
def test_what_is_announced_too_large_and_what_else_a_repository_holds_is_not_begun(clients, hub, run, tmp_path):
    hub.write("stranger/large", {"config.json": b" " * 2**24, "model.safetensors": b"x"})
    done = clients.run(LOAD, "hf-hub:stranger/large")
    assert refused(done, "config.json has 17 MB, and 8 MB are the most here"), done.output
    assert not [r for r in hub.requests if r.startswith("GET")]
    hub.write("stranger/large", {"config.json": config(run), "model.safetensors": bytes(2**21)})
    full = "import shutil; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(2**40, 2**40, 2**20)\n"
    done = clients.run(full + LOAD, "hf-hub:stranger/large")
    assert refused(done, "model.safetensors has 2 MB, and 1 MB are the most here"), done.output
    # names that leave the folder and code for Python are never touched
    mark = tmp_path / "ran"
    evil = f"open({str(mark)!r}, 'w')".encode()
    files = {n: (run / n).read_bytes() for n in ("model.safetensors", "recipe.yaml", "data.json")}
    files["config.json"] = config(run, auto_map={"AutoModelForImageClassification": "modeling.Evil"})
    files |= {n: evil for n in ("modeling.py", "../../escaped.py", "../escaped.py", "/tmp/escaped-hub.py")}
    card = f"---\nlicense: !!python/object/apply:os.system ['touch {mark}']\n---\n<script>alert(1)</script>"
    hub.write("stranger/escape", files | {"README.md": card.encode()})
    clients.run(LOAD, "hf-hub:stranger/escape")
    clients.run(COMMAND, "verify", "hf-hub:stranger/escape")
    assert not mark.exists() and not [r for r in hub.requests if "escaped" in r or "modeling" in r]
    assert not [*hub.folder.rglob("escaped*"), *Path("/tmp").glob("escaped*")]


HF = f"""
import os
os.chdir({str(ROOT)!r})
from huggingface_hub.cli.hf import main
sys.argv[0] = 'hf'
main()
"""
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
def test_the_documented_commands_make_a_metric_a_space_that_loads_from_there_and_from_a_copy(clients, hub, tmp_path):
    section = re.search(r"^## Metrics as Spaces\n.*?```bash\n(.*?)```", (ROOT / "docs/hub.md").read_text(), re.S | re.M)
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    with Forks(hub.env) as online, Forks(hub.env | offline) as alone:
        for name, expected in (
            ("topk_accuracy", {"top1": 50.0, "top5": 100.0}),
            ("calibration", {"ece": 25.0, "nll": 1.0}),
        ):
            lines = section[1].replace("OWNER", "tester").replace("topk_accuracy", name).splitlines()
            assert [shlex.split(line)[:2] for line in lines] == [["hf", "repos"], ["hf", "upload"], ["hf", "download"]]
            for line in lines:
                words = (w if w.startswith("--") else w.replace("copies/", f"{tmp_path}/") for w in shlex.split(line))
                ran(clients, HF, *[*words][1:])
            source = ROOT / shlex.split(lines[1])[3]
            here = {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}
            there = {k: v for k, v in hub.files(f"tester/{name}", "space").items() if k != ".gitattributes"}
            assert there == here and {"README.md", "app.py", "requirements.txt"} <= there.keys()
            for forks, metric in ((online, f"tester/{name}"), (alone, tmp_path / name)):
                found = ran(forks, USE, metric, tmp_path / "cache").splitlines()[-1]
                assert json.loads(found) == pytest.approx(expected)
