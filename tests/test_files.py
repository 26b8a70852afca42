"""Promise: a file is written whole or not at all, whoever else writes it, and what is no file is not replaced."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from mixup_recipes import files
from mixup_recipes.typed import UserError


def test_two_processes_that_write_one_file_at_a_time_publish_what_is_whole(tmp_path, monkeypatch):
    path, replace = tmp_path / "a.json", os.replace

    def another_first(first, final):
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: 0)
        files.write(path, "of the other")
        replace(first, final)

    monkeypatch.setattr(os, "replace", another_first)
    files.write(path, "of this one")
    assert path.read_text() == "of this one" and os.listdir(tmp_path) == ["a.json"]


def test_pipes_and_devices_are_written_into_and_stay(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    files.write(pipe, "content")
    reader.join(5)
    assert read == ["content"] and stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "null").symlink_to("/dev/null")
    files.write(tmp_path / "null", "content")
    assert (tmp_path / "null").is_symlink() and os.listdir(tmp_path) != ["null"]
    code = "import pathlib, mixup_recipes.files as f; print(1); f.write(pathlib.Path('/dev/stdout'), 'content')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1\ncontent", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*folder: Is a directory"):
        files.write(tmp_path / "folder", "content")


LEAVING = """
import os, signal, sys, time
from pathlib import Path
from mixup_recipes.cli.base import leaving_at_once

signal.signal(signal.SIGUSR1, lambda *_: None)
with leaving_at_once(Path(sys.argv[1])):
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), number)
        time.sleep(0.2)
    time.sleep(5)
"""


@pytest.mark.parametrize("heard", [True, False])
def test_a_signal_is_not_lost_to_another_signal_a_folder_in_the_way_or_a_reader_that_is_gone(tmp_path, heard):
    reading, writing = os.pipe()
    left = subprocess.Popen([sys.executable, "-c", LEAVING, tmp_path], stderr=writing)
    os.close(writing)
    if not heard:
        os.close(reading)
    assert left.wait(30) == 128 + 15
    if heard:
        with open(reading) as said:
            assert said.read().startswith("stopped: ")


def test_an_output_takes_no_place_of_a_file_of_a_run(run, console):
    before = (run / "model.safetensors").read_bytes()
    for command in (
        ("evaluate", run, "--predictions", run / "model.safetensors"),
        ("evaluate", run, "--output", run / "data.json"),
        ("table", "--benchmark", "tiny", "--out", run / "recipe.yaml"),
    ):
        status, _, errors = console(*command)
        assert status == 2 and f"is a file of the run in {run}, which would be lost" in errors
    assert (run / "model.safetensors").read_bytes() == before
