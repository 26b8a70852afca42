"""The log and the lock of a run folder, without whole runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import environment

from mixup_recipes.files import lock
from mixup_recipes.training.log import Log, evaluations
from mixup_recipes.typed import UserError


def write(path: Path, count: int = 3) -> int:
    """A log of some lines; returns its length in bytes."""
    log = Log(path)
    for epoch in range(count):
        log.write(mode="val", epoch=epoch, update=epoch, top1=1.5)
    return log.length()


def test_a_resumed_log_is_cut_back_to_its_checkpoint(tmp_path: Path) -> None:
    length = write(tmp_path / "log.jsonl", 2)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"mode": "val", "epo')
    log = Log(tmp_path / "log.jsonl", length)
    assert list(evaluations(log.lines)) == [0, 1]
    log.write(mode="val", epoch=2, update=2)
    assert [json.loads(line)["epoch"] for line in log.path.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize("hurt", ["garbled", "cut in a line", "cut after a line", "gone"])
def test_a_damaged_log_is_one_error_and_left_as_it_is(tmp_path: Path, hurt: str) -> None:
    path = tmp_path / "log.jsonl"
    length = write(path)
    lines = path.read_text().splitlines(keepends=True)
    text = {"garbled": "{garbage" + "".join(lines)[8:], "cut in a line": lines[0][:9], "cut after a line": lines[0]}
    path.write_text(text[hurt]) if hurt in text else path.unlink()
    before = path.read_text() if path.exists() else ""
    with pytest.raises(UserError, match="is damaged or shorter than its checkpoint expects"):
        Log(path, length)
    assert path.read_text() == before


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    code = (
        f"from pathlib import Path; from mixup_recipes.files import lock; lock(Path({str(tmp_path)!r})); print('mine')"
    )
    lock(tmp_path)
    other = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert "another run is writing to" in other.stderr and "mine" not in other.stdout
