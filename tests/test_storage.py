"""Crash safety of folder updates: after a kill at any moment a reader sees the old state or the new one."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from shifcon_fast import storage
from shifcon_fast.storage import read_json, settle, sha256_file, staged_update, write_json

OLD = {"a.txt": "old a", "b.txt": "old b", "kept.txt": "kept"}
NEW = {"a.txt": "new a", "b.txt": "new b", "sub/c.txt": "new c"}


class Killed(BaseException):
    """Stands for a power cut: nothing after it runs in the writer, not even its clean-up."""


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def visible(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_files(tmp_path, OLD)
    return tmp_path


def test_an_update_replaces_its_files_and_keeps_the_others(folder: Path) -> None:
    with staged_update(folder) as staging:
        write_files(staging, NEW)
        assert visible(folder) == OLD  # nothing shows before the end
    assert visible(folder) == {**OLD, **NEW}
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_an_error_in_the_body_leaves_the_previous_state(folder: Path) -> None:
    with pytest.raises(OSError, match="No space left"), staged_update(folder) as staging:
        write_files(staging, {"a.txt": "half"})
        raise OSError(errno.ENOSPC, "No space left on device")
    assert visible(folder) == OLD
    assert list(folder.glob(".staging-*")) == []


@pytest.mark.parametrize("surviving_replaces", range(5))
def test_a_kill_at_any_rename_leaves_old_or_new(
    folder: Path, monkeypatch: pytest.MonkeyPatch, surviving_replaces: int
) -> None:
    """Renames happen in this order: the commit record, then each of the three files."""
    done = 0
    real_replace = os.replace

    def replace(source: str | Path, target: str | Path) -> None:
        nonlocal done
        if done == surviving_replaces:
            raise Killed
        done += 1
        real_replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "replace", replace)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # the dead do not tidy up
        try:
            with staged_update(folder) as staging:
                write_files(staging, NEW)
        except Killed:
            pass
    settle(folder)
    assert visible(folder) == (OLD if surviving_replaces == 0 else {**OLD, **NEW})
    with staged_update(folder) as staging:  # and the next writer goes on, and clears what was left over
        write_files(staging, {"a.txt": "third"})
    assert (folder / "a.txt").read_text() == "third"
    assert list(folder.glob(".*")) == []


def test_settle_leaves_a_running_writer_alone(folder: Path) -> None:
    with staged_update(folder) as staging:
        write_files(staging, NEW)
        settle(folder)  # a reader comes by
        assert (staging / "a.txt").read_text() == "new a"
    assert (folder / "a.txt").read_text() == "new a"


def test_a_commit_record_cannot_write_outside_of_the_folder(folder: Path) -> None:
    write_json(folder / ".commit.json", {"staging": ".staging-x", "files": ["../escaped.txt"]})
    write_files(folder / ".staging-x", {"ok": ""})
    with pytest.raises(ValueError, match="outside of the folder"):
        settle(folder)
    assert not (folder.parent / "escaped.txt").exists()


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"language": "Türkçe", "n": 3})
    assert read_json(path, "a test file") == {"language": "Türkçe", "n": 3}
    assert "Türkçe" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"none\.json: no such file; wanted a card"):
        read_json(tmp_path / "none.json", "a card")
    path.write_text('{"n": 3')
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json(path, "a card")
    path.write_text("[1]")
    with pytest.raises(ValueError, match="JSON list"):
        read_json(path, "a card")


def test_sha256_of_a_known_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
