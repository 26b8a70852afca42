"""The Hub of the tests answers the unmodified clients as the Hub does; test_hub*.py hold what else it does."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer

REPO = "tester/m"

pytestmark = pytest.mark.slow  # whole clients against a server


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
        "oids": [first, again, info.sha],
        "tree": sorted(f"{type(e).__name__} {e.path}" for e in api.list_repo_tree("tester/m", recursive=True)),
        "sizes": {s.rfilename: s.size for s in info.siblings},
        "card": ModelCard.load("tester/m").data.to_dict(),
        "exists": [api.file_exists("tester/m", "logs/log.txt"), api.file_exists("tester/m", "log.txt")],
    }


@pytest.mark.parametrize("xet", [False, True])
def test_a_folder_comes_back_as_it_was_and_again_is_no_new_commit(tmp_path: Path, xet: bool) -> None:
    if xet:
        pytest.importorskip("hf_xet")
    files = {"README.md": b"---\nlicense: mit\ntags: [a, b]\n---\nHello\n", "logs/log.txt": b"1\n2\n"}
    files["model.safetensors"] = np.random.default_rng(0).bytes(11_000_000)
    folder, target = tmp_path / "folder", tmp_path / "target"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with HubServer(tmp_path / "hub", xet) as hub:
        answer = hub.client(publish_and_fetch, folder, target)
    there = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert {name: content for name, content in there.items() if not name.startswith(".cache")} == files
    assert answer["user"] == "tester" and len(set(answer["oids"])) == 1
    names = [".gitattributes", *sorted(files)]
    assert answer["tree"] == [*(f"RepoFile {name}" for name in names), "RepoFolder logs"]
    assert {name: answer["sizes"][name] for name in files} == {name: len(content) for name, content in files.items()}
    assert answer["card"] == {"license": "mit", "tags": ["a", "b"]} and answer["exists"] == [True, False]
    assert [(c["summary"], c["paths"]) for c in hub.commits(REPO)[1:]] == [("all of it", sorted(files))]
    weights = hashlib.sha256(files["model.safetensors"]).hexdigest()
    puts = [r for r in hub.requests if r.startswith("PUT")]  # the weights alone are LFS, and sent once
    assert puts == ([] if xet else [f"PUT /lfs/{weights}"])
    assert hub.xet_hashes().keys() == ({weights} if xet else set())
    assert any("xet-read-token" in r for r in hub.requests) == xet


def attempts(steps):
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

    api = HfApi()

    def commit(*operations, **more):
        return api.create_commit("tester/m", list(operations), commit_message="-", **more)

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


def test_what_is_not_there_or_not_allowed_is_the_clients_own_error_and_a_wrong_byte_is_none(hub: HubServer) -> None:
    hub.write(REPO, {"a.txt": b"a", "w.bin": b"0123456789"})
    hub.write("tester/p", {"a.txt": b"a"}, private=True)
    hub.write("stranger/g", {"a.txt": b"a"}, gated=True)
    hub.fault("^GET .*/w.bin", wrong_bytes=True)
    steps = {
        "read('tester/m', 'b.txt')": "RemoteEntryNotFoundError 404",
        "read('tester/m', 'a.txt', revision='v1')": "RevisionNotFoundError 404",
        "read('tester/no', 'a.txt')": "RepositoryNotFoundError 404",
        "read('tester/no', 'a.txt', token=False)": "RepositoryNotFoundError 401",
        "read('tester/p', 'a.txt', token=False)": "RepositoryNotFoundError 401",
        f"read('tester/p', 'a.txt', token='{hub.stranger_token}')": "RepositoryNotFoundError 404",
        f"read('tester/p', 'a.txt', token='{hub.read_token}')": "done b'a'",
        "api.model_info('tester/p').private": "done True",
        "read('stranger/g', 'a.txt', token=False)": "GatedRepoError 401",
        "read('stranger/g', 'a.txt')": "GatedRepoError 403",
        f"read('stranger/g', 'a.txt', token='{hub.stranger_token}')": "done b'a'",
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
        # so whoever wants to know compares hashes; 0xcf: all bits of 0
        "read('tester/m', 'w.bin')": r"done b'\xcf123456789'",
    }
    assert dict(zip(steps, hub.client(attempts, list(steps)), strict=True)) == steps
    assert hub.files(REPO).keys() == {".gitattributes", "a.txt", "w.bin"} and len(hub.commits(REPO)) == 2
