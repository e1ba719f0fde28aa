"""Folders that are whole or do not count: an update that is killed at any moment leaves no mixture behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shifcon_fast import storage
from shifcon_fast.storage import (
    read_json,
    read_tensors,
    remove,
    replacing,
    retract,
    sha256_file,
    staging_folder,
    verify,
    write_file,
    write_json,
)

CARD = "card.json"
OLD = {"a.txt": "old a", "b.txt": "old b", "gone.txt": "old only", CARD: "old", "kept.txt": "a stranger's"}
NEW = {"a.txt": "new a", "b.txt": "new b", "sub/c.txt": "new c", CARD: "new"}
AFTER = {**NEW, "kept.txt": "a stranger's"}
OTHERS = ("a.txt", "b.txt", "gone.txt", "sub/c.txt")


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


def update(folder: Path) -> None:
    with replacing(folder, CARD, OTHERS) as staging:
        write_files(staging, NEW)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_files(tmp_path / "folder", OLD)
    return tmp_path / "folder"


def test_an_update_replaces_what_belongs_to_the_card_and_keeps_the_rest(folder: Path) -> None:
    with replacing(folder, CARD, OTHERS) as staging:
        write_files(staging, NEW)
        assert {name: text for name, text in contents(folder).items() if ".saving" not in name} == OLD
    assert contents(folder) == AFTER
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_new_folder_is_made(tmp_path: Path) -> None:
    update(tmp_path / "deep" / "folder")
    assert contents(tmp_path) == {f"deep/folder/{name}": text for name, text in NEW.items()}


def test_the_card_may_lie_in_a_folder_of_its_own(tmp_path: Path) -> None:
    with replacing(tmp_path, "checkpoint-2/card.json") as staging:
        assert staging == staging_folder(tmp_path, "checkpoint-4/card.json")  # also for who helps to write
        write_files(staging, {"checkpoint-2/card.json": "c", "checkpoint-2/weights": "w"})
    assert contents(tmp_path) == {"checkpoint-2/card.json": "c", "checkpoint-2/weights": "w"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_in_the_body_leaves_the_previous_state(folder: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), replacing(folder, CARD, OTHERS) as staging:
        write_files(staging, {**NEW, "a.txt": "half"})
        raise error
    assert contents(folder) == OLD


def test_a_full_disk_at_the_last_write_leaves_the_previous_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            update(folder)
    assert contents(folder) == OLD


def test_an_update_without_a_card_is_refused(folder: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"card\.json: the update of .* has no card"),
        replacing(folder, CARD, OTHERS) as staging,
    ):
        write_files(staging, {"a.txt": "new a"})
    assert contents(folder) == OLD


def run_and_kill(action: Callable[[], object], survives: int) -> bool:
    """Run ``action`` in a process that dies after ``survives`` file system calls; False if it came to its end."""
    child = os.fork()
    if child == 0:
        count = 0

        def count_down(event: str, args: Any) -> None:
            nonlocal count
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
                count += 1
                if count > survives:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count_down)
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.waitstatus_to_exitcode(status) == 0
    return killed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to be killed and to look at what is left")
@pytest.mark.parametrize("start", [OLD, {}], ids=["over an old state", "into an empty folder"])
def test_a_kill_at_any_moment_leaves_old_or_new_or_no_card(tmp_path: Path, start: dict[str, str]) -> None:
    outcomes = []
    for survives in range(100):
        folder = tmp_path / str(survives)
        write_files(folder, start)
        killed = run_and_kill(lambda folder=folder: update(folder), survives)
        found = {name: text for name, text in contents(folder).items() if ".saving" not in name}
        if CARD in found:
            assert found in (start, {**start, **AFTER} if not start else AFTER, NEW)
            outcomes.append(found[CARD])
        else:
            outcomes.append("no card")
        update(folder)  # the next writer sets it right
        assert contents(folder) == (AFTER if start else NEW)
        if not killed:
            break
    else:
        pytest.fail("it never came to an end")
    assert len(outcomes) > 12
    first = "old" if start else "no card"
    assert outcomes == sorted(
        outcomes, key=[first, "no card", "new"].index
    )  # each follows from the one before
    assert {first, "no card", "new"} == set(outcomes)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to be killed and to look at what is left")
@pytest.mark.parametrize(
    "deletion", [lambda f: retract(f, CARD, OTHERS), lambda f: remove(f, CARD)], ids=["retract", "remove"]
)
def test_a_deletion_that_is_killed_leaves_nothing_that_counts(
    tmp_path: Path, deletion: Callable[[Path], None]
) -> None:
    survives = 0
    while True:
        folder = tmp_path / str(survives)
        write_files(folder, OLD)
        killed = run_and_kill(lambda folder=folder: deletion(folder), survives)
        assert not (folder / CARD).exists() or contents(folder) == OLD
        if not killed:
            break
        survives += 1
    assert survives >= len(OTHERS)


def test_leftovers_of_a_dead_writer_go_with_the_next_update(folder: Path) -> None:
    write_files(staging_folder(folder, CARD), {"half.txt": "half"})
    update(folder)
    assert contents(folder) == AFTER


def test_records_of_an_older_release_are_nobodys_business(folder: Path) -> None:
    """Such a record once made readers delete the folder's parent."""
    write_json(folder / ".commit.json", {"staging": "..", "files": []})
    before = contents(folder.parent)
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json(folder / CARD, "a card")
    assert contents(folder.parent) == before
    update(folder)
    assert contents(folder) == {**AFTER, ".commit.json": before["folder/.commit.json"]}


def test_writers_do_not_follow_links_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write_files(outside, {"a.txt": "mine", "c.txt": "mine"})
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(outside / "a.txt")
    (folder / "sub").symlink_to(outside)
    staging_folder(folder, CARD).symlink_to(outside)
    with pytest.raises(OSError, match=r"sub/c\.txt: lies outside of .*behind a link; nothing was written"):
        update(folder)
    assert contents(outside) == {"a.txt": "mine", "c.txt": "mine"}
    assert (folder / CARD).read_text() == "old"
    (folder / "sub").unlink()
    update(folder)  # a link in the place of a file is replaced, not followed
    assert contents(outside) == {"a.txt": "mine", "c.txt": "mine"}
    assert not (folder / "a.txt").is_symlink()
    (tmp_path / "link").symlink_to(outside)
    remove(tmp_path / "link", "a.txt")
    assert contents(outside) == {"a.txt": "mine", "c.txt": "mine"}
    assert not (tmp_path / "link").is_symlink()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "x", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_file(tmp_path / "x", b"new")
    assert contents(tmp_path) == {"x": "old"}


@dataclass(frozen=True)
class Shape:
    n: int
    x: float
    names: list[str]
    inner: dict[str, dict[str, float | None]]

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError(f"n: got {self.n}; wanted 0 or more")


GOOD: dict[str, Any] = {"n": 3, "x": 1, "names": ["Türkçe"], "inner": {"a": {"b": None, "c": float("nan")}}}


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, GOOD)
    assert read_json(path, "a test file")["names"] == ["Türkçe"]
    assert "Türkçe" in path.read_text(encoding="utf-8")
    found = read_json(path, "a test file", Shape)
    assert (found.n, found.x, found.names) == (3, 1.0, ["Türkçe"])
    assert read_json(path, "a test file", Shape, wanted={"n": 3}) is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"n": 3', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON .*recursion"),
        ('{"n": ' * 300 + "1" + "}" * 300, "not valid JSON .*recursion"),
        ('{"n": 1' + "0" * 5000 + "}", "not valid JSON .*out of range"),
        ('{"n": 1' + "0" * 4000 + "}", r"holds the integer 1000\d*\.\.\.\d*000; wanted at most 64 bits"),
        ('{"n": "\\ud800"}', "not valid JSON"),
        ("[1]", "holds a JSON list; wanted a card, an object"),
        ("null", "holds a JSON null; wanted a card, an object"),
        ("{}", "lacks 'n'; wanted a card"),
        (json.dumps({**GOOD, "n": 3.0}), r"n: .*valid integer.*got 3\.0; wanted a card"),
        (json.dumps({**GOOD, "n": True}), "n: .*valid integer.*got True"),
        (json.dumps({**GOOD, "n": -1}), "n: got -1; wanted 0 or more"),
        (json.dumps({**GOOD, "names": ["a", 7]}), r"names\.1: .*valid string.*got 7"),
        (json.dumps({**GOOD, "inner": {"a": {"b": "x" * 9999}}}), r"inner\.a\.b: .*number.*got 'x+\.\.\.x+'"),
    ],
)
def test_wrong_json_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"x\.json: {message}") as caught:
        read_json(path, "a card", Shape)
    assert len(str(caught.value)) < 500


def test_a_file_that_is_not_there_and_one_of_another_version(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json: no such file; wanted a card"):
        read_json(tmp_path / "none.json", "a card")
    path = tmp_path / "x.json"
    wanted = {"format": "ours", "format_version": 1}
    for card, message in (
        ({"format": "theirs"}, "format is 'theirs'; wanted 'ours'"),
        ({"format": "ours", "format_version": 2}, "format_version is 2; this release reads 1"),
        ({"format": "ours", "format_version": True}, "format_version is True; this release reads 1"),
        ({"format": ["x"] * 999}, "format is .*; wanted 'ours'"),
    ):
        write_json(path, card)
        with pytest.raises(ValueError, match=rf"x\.json: {message}"):
            read_json(path, "a card", Shape, wanted=wanted)  # before it is called damaged


def test_tensors_are_the_ones_of_their_card(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.arange(3.0)}, path)
    digest = sha256_file(path)
    verify(path, digest, "card.json")
    assert torch.equal(read_tensors(path)["a"], torch.arange(3.0))
    save_file({"a": torch.arange(4.0)}, path)
    with pytest.raises(ValueError, match=r"t\.safetensors: its SHA-256 is not the one in card\.json"):
        verify(path, digest, "card.json")
    path.write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"t\.safetensors: not a safetensors file"):
        read_tensors(path)
    with pytest.raises(ValueError, match=r"none: no such file"):
        read_tensors(tmp_path / "none")
    with pytest.raises(ValueError, match=r"none: no such file, though card\.json lies beside it"):
        verify(tmp_path / "none", digest, "card.json")


def test_sha256_of_a_known_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
