"""The Hub of the tests answers the unmodified clients as the Hub does, and fails on demand."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from hub_server import HubServer

REPO = "tester/m"

pytestmark = pytest.mark.slow  # whole clients and runs against a server: minutes


def noise(size: int) -> bytes:
    """Bytes that are nothing in particular."""
    return np.random.default_rng(0).bytes(size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is published: a card, a small text in a folder, and 11 MB of weights."""
    folder = tmp_path / "folder"
    (folder / "logs").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\n---\nHello\n")
    (folder / "logs" / "log.txt").write_text("1\n2\n")
    (folder / "model.safetensors").write_bytes(noise(11_000_000))
    return folder


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder by its path."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# --------------------------------------------------------------------------------------------- huggingface_hub


def publish_and_fetch(folder, target):
    from huggingface_hub import HfApi, ModelCard, snapshot_download

    api = HfApi()
    api.create_repo("tester/m")
    api.create_repo("tester/m", exist_ok=True)
    first = api.upload_folder(repo_id="tester/m", folder_path=folder, commit_message="all of it").oid
    again = api.upload_folder(repo_id="tester/m", folder_path=folder, commit_message="again").oid
    snapshot_download("tester/m", local_dir=target, ignore_patterns=".gitattributes")
    info = api.model_info("tester/m", files_metadata=True)
    return {
        "user": api.whoami()["name"],
        "oids": [first, again, info.sha, api.list_repo_refs("tester/m").branches[0].target_commit],
        "commits": [c.title for c in api.list_repo_commits("tester/m")],
        "tree": sorted(f"{type(e).__name__} {e.path}" for e in api.list_repo_tree("tester/m", recursive=True)),
        "sizes": {s.rfilename: s.size for s in info.siblings},
        "card": ModelCard.load("tester/m").data.to_dict(),
        "exists": [api.file_exists("tester/m", "logs/log.txt"), api.file_exists("tester/m", "log.txt")],
    }


def test_a_folder_comes_back_as_it_was_and_again_is_no_new_commit(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    answer = hub.client(publish_and_fetch, folder, tmp_path / "target")
    before = contents(folder)
    after = {p: h for p, h in contents(tmp_path / "target").items() if not p.startswith(".cache")}
    assert after == before
    assert answer["user"] == "tester" and len(set(answer["oids"])) == 1
    assert answer["commits"] == ["all of it", "initial commit"]
    files = [".gitattributes", "README.md", "logs/log.txt", "model.safetensors"]
    assert answer["tree"] == [*(f"RepoFile {f}" for f in files), "RepoFolder logs"]
    sizes = {p: (folder / p).stat().st_size for p in before}
    assert {p: s for p, s in answer["sizes"].items() if p != ".gitattributes"} == sizes
    assert answer["card"] == {"license": "mit", "tags": ["a", "b"]} and answer["exists"] == [True, False]
    assert {p: hashlib.sha256(d).hexdigest() for p, d in hub.files(REPO).items() if p != ".gitattributes"} == before
    assert hub.commits(REPO)[1]["paths"] == sorted(before) and hub.commits(REPO)[1]["oid"] == answer["oids"][0]
    puts = [r for r in hub.requests if r.startswith("PUT")]  # the weights alone are LFS, and sent once
    assert puts == ["PUT /lfs/" + before["model.safetensors"]]


def one_commit(_):
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationAdd("w.bin", b"few bytes")]
    operations += [CommitOperationDelete("old.txt"), CommitOperationDelete("logs/", is_folder=True)]
    HfApi().create_commit("tester/m", operations, commit_message="in one")


def test_a_commit_adds_and_deletes_at_once(hub: HubServer) -> None:
    hub.write(REPO, {"old.txt": b"old", "logs/1.txt": b"1", "logs/2/3.txt": b"3", "stays.txt": b"stays"})
    hub.client(one_commit, 0)
    assert hub.files(REPO).keys() == {".gitattributes", "new.txt", "w.bin", "stays.txt"}
    assert hub.commits(REPO)[-1]["paths"] == ["logs/1.txt", "logs/2/3.txt", "new.txt", "old.txt", "w.bin"]
    assert hub.files(REPO, revision=hub.commits(REPO)[1]["oid"])["old.txt"] == b"old"


def attempts(steps):
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

    api = HfApi()

    def commit(*operations, repo="tester/m", **more):
        return api.create_commit(repo, list(operations), commit_message="-", **more)

    def read(*names, **more):
        with open(hf_hub_download(*names, **more), "rb") as file:
            return file.read()

    names = {"api": api, "read": read, "commit": commit, "add": CommitOperationAdd, "delete": CommitOperationDelete}
    answers = []
    for step in steps:
        try:
            answers.append(f"done {eval(step, names)}")
        except Exception as e:
            status = getattr(getattr(e, "response", None), "status_code", None)
            answers.append(f"{type(e).__name__} {status}")
    return answers


def test_what_is_not_there_or_not_allowed_is_the_clients_own_error(hub: HubServer) -> None:
    hub.write(REPO, {"a.txt": b"a"})
    steps = {
        "read('tester/m', 'b.txt')": "RemoteEntryNotFoundError 404",
        "read('tester/m', 'a.txt', revision='v1')": "RevisionNotFoundError 404",
        "read('tester/no', 'a.txt')": "RepositoryNotFoundError 404",
        "read('tester/no', 'a.txt', token=False)": "RepositoryNotFoundError 401",
        "api.model_info('tester/m', revision='v1')": "RevisionNotFoundError 404",
        "api.model_info('tester/m', token='hf_unknown')": "HfHubHTTPError 401",
        "list(api.list_repo_tree('tester/m', 'logs'))": "RemoteEntryNotFoundError 404",
        "api.create_repo('tester/m')": "HfHubHTTPError 409",
        "api.create_repo('stranger/m')": "HfHubHTTPError 403",
        f"api.create_repo('tester/n', token='{hub.read_token}')": "HfHubHTTPError 403",
        "api.create_repo('tester/s', repo_type='space', space_sdk='static').repo_id": "done tester/s",
        "api.create_repo('lab/m').repo_id": "done lab/m",
        f"commit(add('b.txt', b'b'), token='{hub.read_token}')": "HfHubHTTPError 403",
        f"commit(add('b.txt', b'b'), token='{hub.stranger_token}')": "HfHubHTTPError 403",
        "commit(add('b.txt', b'b'), parent_commit='0' * 40)": "HfHubHTTPError 412",
        "commit(add('b.txt', b'b'), delete('c.txt'))": "RemoteEntryNotFoundError 404",
        "commit(add('README.md', b'---\\na: [\\n---\\n'))": "BadRequestError 400",
        "api.delete_repo('lab/m')": "done None",
        "api.model_info('lab/m')": "RepositoryNotFoundError 404",
    }
    assert dict(zip(steps, hub.client(attempts, list(steps)), strict=True)) == steps
    assert hub.files(REPO).keys() == {".gitattributes", "a.txt"}


def test_private_and_gated_repos_are_for_their_members(hub: HubServer) -> None:
    hub.write("tester/p", {"a.txt": b"a"}, private=True)
    hub.write("tester/g", {"a.txt": b"a"}, gated=True)
    tokens = [f"token={t or False!r}" for t in ("", hub.stranger_token, hub.read_token, hub.token)]
    steps = [f"read('tester/{r}', 'a.txt', {t})" for r in "pg" for t in tokens]
    steps += [f"commit(add('b.txt', b'b'), repo='tester/p', {t}).oid" for t in tokens]
    steps += [f"api.model_info('tester/p', {t}).private" for t in tokens]
    private, gated, write, info = (list(part) for part in np.array_split(hub.client(attempts, steps), 4))
    missing = ["RepositoryNotFoundError 401", "RepositoryNotFoundError 404"]
    assert private == [*missing, "done b'a'", "done b'a'"] and info == [*missing, "done True", "done True"]
    assert gated == ["GatedRepoError 401", "GatedRepoError 403", "done b'a'", "done b'a'"]
    assert write == [*missing, "HfHubHTTPError 403", f"done {hub.commits('tester/p')[-1]['oid']}"]


# --------------------------------------------------------------------------------------------- faults


def test_each_fault_happens_as_often_as_asked_and_leaves_nothing_half_done(hub: HubServer) -> None:
    hub.write(REPO, {"a.txt": b"a"})
    w = "add('w.bin', bytes(100_000))"
    for pattern, what in {
        "^POST .*preupload": {"status": 401},
        "^POST .*info/lfs/objects/batch": {"status": 403},
        "^PUT /lfs": {"wrong_bytes": True},
        "^POST .*commit/main": {"status": 429, "headers": {"Retry-After": "1"}},
        "commit/main$": {"status": 409},
        "commit/[a-z]+": {"status": 500},
        "commit/": {"status": 503},
        "POST /api/models/tester/m/commit": {"after_bytes": 100},
        "commit.main": {"status": 200, "body": b"<html>log in</html>"},
    }.items():
        hub.fault(pattern, **what)
    before = hub.files(REPO)
    failures = hub.client(attempts, [f"commit({w})"] * 9)
    assert failures[0] == "HfHubHTTPError 401" and failures[1] == "HfHubHTTPError 403"
    assert failures[2] == "RuntimeError None"  # of "400 BadDigest"
    assert failures[3:7] == [f"HfHubHTTPError {s}" for s in (429, 409, 500, 503)]  # a commit is not tried again
    assert failures[7] == "RemoteProtocolError None" and failures[8].startswith("JSONDecodeError")
    assert hub.files(REPO) == before and len(hub.commits(REPO)) == 2
    assert sum(r.startswith("PUT") for r in hub.requests) == 2  # bytes that have arrived are not sent again
    hub.fault("commit", no_answer=True)
    assert hub.client(attempts, [f"commit({w})"] * 2)[0] == "RemoteProtocolError None"
    assert len(hub.commits(REPO)) == 3 and hub.files(REPO)["w.bin"] == bytes(100_000)  # it was done, once


def test_uploads_and_downloads_that_are_cut_go_on(hub: HubServer) -> None:
    weights = noise(30_000_000)
    hub.write(REPO, {"w.bin": weights})
    hub.fault("^GET .*/w.bin", after_bytes=20_000_000)
    hub.fault("^PUT", after_bytes=50_000)
    sha256 = "__import__('hashlib').sha256(read('tester/m', 'w.bin')).hexdigest()"
    answers = hub.client(attempts, [sha256, "commit(add('v.bin', bytes(100_000))) is not None"])
    assert answers == [f"done {hashlib.sha256(weights).hexdigest()}", "done True"]
    assert hub.files(REPO)["v.bin"] == bytes(100_000)
    first, second = (r.split("w.bin")[1] for r in hub.requests if r.startswith("GET") and "w.bin" in r)
    start = re.fullmatch(r" bytes=(\d+)-", second)
    assert first == "" and start and 0 < int(start[1]) <= 20_000_000


def test_a_wrong_byte_of_a_download_is_not_seen_by_the_client(hub: HubServer) -> None:
    """So whoever wants to know compares hashes."""
    hub.write(REPO, {"w.bin": b"0123456789"})
    hub.fault("^GET .*/w.bin", wrong_bytes=True)
    assert hub.client(attempts, ["read('tester/m', 'w.bin')"]) == [r"done b'\xcf123456789'"]  # 0xcf: all bits of 0


def test_a_stopped_hub_refuses_connections_and_comes_back_on_its_port_with_all_it_had(hub: HubServer) -> None:
    hub.write(REPO, {"a.txt": b"a"})
    url = hub.url
    hub.stop()
    assert hub.client(attempts, ["api.model_info('tester/m')"]) == ["ConnectError None"]
    hub.start()
    assert hub.url == url and hub.client(attempts, ["api.model_info('tester/m').id"]) == ["done tester/m"]


def crowd(_):
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import HfApi

    def push(i):
        return HfApi().upload_file(path_or_fileobj=b"%d" % i, path_in_repo=f"{i}.txt", repo_id="tester/m").oid

    with ThreadPoolExecutor(8) as pool:
        return len(set(pool.map(push, range(40))))


def test_concurrent_commits_are_all_kept(hub: HubServer) -> None:
    hub.write(REPO, {"a.txt": b"a"})
    assert hub.client(crowd, 0) == 40
    assert {f"{i}.txt": b"%d" % i for i in range(40)}.items() <= hub.files(REPO).items()
    assert all(len(c["paths"]) == 1 for c in hub.commits(REPO)[1:])


# --------------------------------------------------------------------------------------------- what builds on it


def with_libraries(photos):
    import json

    import datasets
    import evaluate
    import timm
    import torch
    from huggingface_hub import hf_hub_download, upload_file
    from timm.models import push_to_hf_hub
    from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

    def equal(one, other):  # the last bit of a sum depends on where its terms lie in memory
        return torch.allclose(one, other, rtol=0, atol=1e-6)

    torch.manual_seed(0)
    image = torch.rand(1, 3, 64, 64)
    model = timm.create_model("test_resnet").eval()
    names = {"label_names": [f"class {i}" for i in range(1000)]}
    push_to_hf_hub(model, "tester/timm", safe_serialization=True, model_config=names)
    again = timm.create_model("hf-hub:tester/timm", pretrained=True).eval()
    answer = {"timm": equal(model(image), again(image)), "names": again.pretrained_cfg["label_names"][7]}

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    model = ResNetForImageClassification(config).eval()
    model.push_to_hub("tester/transformers")
    again = AutoModelForImageClassification.from_pretrained("tester/transformers").eval()
    answer["transformers"] = equal(model(image).logits, again(image).logits)
    with open(hf_hub_download("tester/timm", "config.json")) as file:
        config = json.load(file)
    del config["model_args"]["num_classes"]  # transformers would pass it twice
    upload_file(path_or_fileobj=json.dumps(config).encode(), path_in_repo="config.json", repo_id="tester/timm")
    wrapped = AutoModelForImageClassification.from_pretrained("tester/timm").eval()
    expected = timm.create_model("hf-hub:tester/timm", pretrained=True).eval()(image)
    answer["timm in transformers"] = equal(wrapped(image).logits, expected)

    table = datasets.load_dataset(photos)
    table.push_to_hub("tester/photos", num_shards={"train": 2, "test": 1})
    again = datasets.load_dataset("tester/photos")
    for split in ("train", "test"):
        old, new = (t[split].cast_column("image", datasets.Image(decode=False)) for t in (table, again))
        names = [old.features["label"].names, new.features["label"].names]
        answer[split] = [len(new), names[0] == names[1], old["label"][:] == new["label"][:]]
        answer[split].append([i["bytes"] for i in old["image"]] == [i["bytes"] for i in new["image"]])
    stream = datasets.load_dataset("tester/photos", split="train", streaming=True)
    answer["streamed"] = [stream.num_shards, [r["label"] for r in stream] == again["train"]["label"][:]]
    answer["metric"] = evaluate.load("tester/count").compute(predictions=[1, 2], references=[1, 1])
    return answer


COUNT = b"""
import datasets
import evaluate

class Count(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"right": sum(p == r for p, r in zip(predictions, references))}
"""


def test_timm_transformers_datasets_and_evaluate_round_trip(hub: HubServer, tmp_path: Path) -> None:
    photos = tiny.make_photos(tmp_path / "photos")
    hub.write("tester/count", {"count.py": COUNT}, kind="space")
    answer = hub.client(with_libraries, photos)
    assert answer == {
        "timm": True,
        "names": "class 7",
        "transformers": True,
        "timm in transformers": True,
        "train": [72, True, True, True],
        "test": [30, True, True, True],
        "streamed": [2, True],
        "metric": {"right": 1},
    }


@pytest.mark.slow
def test_real_xet_takes_the_same_round_trip(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet")
    with HubServer(tmp_path / "hub", xet=True) as hub:
        answer = hub.client(publish_and_fetch, folder, tmp_path / "target")
    after = {p: h for p, h in contents(tmp_path / "target").items() if not p.startswith(".cache")}
    assert after == contents(folder) and len(set(answer["oids"])) == 1
    assert not any(r.startswith("PUT") for r in hub.requests) and any("xet-read-token" in r for r in hub.requests)
    assert hub.xet_hashes().keys() == {contents(folder)["model.safetensors"]}
