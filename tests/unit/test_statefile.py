from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from phid import statefile

SOUND = {"schema": 1, "brokers": {"a": 1}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "brokers.json"


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_what_is_written_is_read(path: Path) -> None:
    statefile.write(path, 1, {"brokers": {"ä": 1}})
    assert statefile.read(path, 1) == {"schema": 1, "brokers": {"ä": 1}}
    assert [file.name for file in path.parent.iterdir()] == ["brokers.json"]


def test_what_an_earlier_version_wrote_is_read(path: Path) -> None:
    put(path, json.dumps(SOUND))
    assert statefile.read(path, 2) == SOUND


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"schema": 2, "brokers": {"a": 1}}', "a later version of phid: its schema is 2, ours 1"),
        ('{"schema": 1, "brok', "damaged"),
        (b"\xff\xfe", "damaged"),
        ("", "damaged"),
        ("[" * 100_000, "damaged"),
        ("[]", "names no schema"),
        ('{"brokers": {}}', "names no schema"),
        ('{"schema": "1"}', "names no schema"),
        ('{"schema": true}', "names no schema"),
    ],
)
def test_what_is_not_understood_is_set_aside_whole_and_told(
    path: Path, content: str | bytes, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(path, content)
    before = path.read_bytes()
    assert statefile.read(path, 1) == {}
    (kept,) = path.parent.iterdir()
    assert kept.name.startswith("brokers.json.")
    assert kept.name.endswith(".bad")
    assert kept.read_bytes() == before
    told = capsys.readouterr()
    assert "state_set_aside" in told.err + told.out
    assert says in told.err + told.out
    statefile.write(path, 1, {})
    assert statefile.read(path, 1) == {"schema": 1}
    assert kept.read_bytes() == before


def test_of_what_is_set_aside_the_last_two_are_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    clock = iter([5_000_000, 9_000_000, 10_000_000, 11_000_000, 1_000_000])  # set back at last
    monkeypatch.setattr(statefile.time, "time_ns", lambda: next(clock) * 1_000_000)
    others = [path.with_name("brokers.json.mine.bad"), path.with_name("watches.json.5000000.bad")]
    for other in others:
        other.touch()
    for n in range(5):
        for suffix in ("", "-wal"):
            path.with_name(path.name + suffix).write_text(f"{n}{suffix}")
        aside = statefile.set_aside(path, ("-wal", "-shm"))
        assert aside.read_text() == f"{n}"
    kept = sorted(file.read_text() for file in path.parent.iterdir() if file not in others)
    assert kept == ["3", "3-wal", "4", "4-wal"]
    assert all(other.exists() for other in others)


def test_what_is_written_is_on_the_disk_before_it_takes_the_old_ones_place(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may come at any moment."""
    statefile.write(path, 1, {"brokers": "old"})
    steps: list[tuple[str, str, bool]] = []
    fsync = os.fsync

    def see(number: int) -> None:
        flushed = Path(f"/proc/self/fd/{number}").readlink()
        whole = flushed.is_dir() or "new" in flushed.read_text()
        steps.append((flushed.name.split(".")[0], statefile.read(path, 1)["brokers"], whole))
        fsync(number)

    monkeypatch.setattr(os, "fsync", see)
    statefile.write(path, 1, {"brokers": "new"})
    assert steps == [("", "old", True), ("state", "new", True)]


@pytest.mark.parametrize("there", ["a link", "a file"])
def test_what_stands_in_the_way_is_neither_followed_nor_an_obstacle(
    path: Path, tmp_path: Path, there: str
) -> None:
    path.parent.mkdir()
    other = tmp_path / "other"
    other.write_text("untouched")
    way = path.with_name(f".{path.name}.{os.getpid()}")
    if there == "a link":
        way.symlink_to(other)
    else:
        way.write_text("left by a power cut, and long")
    statefile.write(path, 1, {"brokers": {}})
    assert statefile.read(path, 1) == {"schema": 1, "brokers": {}}
    assert not path.is_symlink()
    assert other.read_text() == "untouched"
    assert list(path.parent.iterdir()) == [path]


def test_what_is_no_file_is_told_and_left(path: Path) -> None:
    path.mkdir(parents=True)
    assert statefile.read(path, 1) == {}
    assert path.is_dir()
