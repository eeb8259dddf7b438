"""The store: what is taken in, found, hashed again and removed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from phid import lockfile, manifest, programs, soundness, store
from phid.manifest import Kept, Manifest
from phid.store import StoreError
from rig import bound
from weighty import model_folder, weighty_graph


def silent(_stage: str, _fraction: float | None) -> None:
    pass


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def kept(tmp_path: Path, shelf: Path) -> Path:
    """A model that was imported."""
    source = model_folder(tmp_path / "source")
    return store.copy_in(source, shelf, "kept", silent)[0]


def verified(folder: Path) -> list[str]:
    return store.verify(store.find(folder.name, folder.parent), silent)[1]


def test_an_imported_model_is_whole_and_recorded(kept: Path, tmp_path: Path) -> None:
    made = manifest.read(kept)
    assert made is not None
    assert set(made.files) == {p.name for p in (tmp_path / "source").iterdir()}
    assert made.source == {"imported": str(tmp_path / "source")}
    assert verified(kept) == []
    assert [model.name for model in store.models(kept.parent)] == ["kept"]


def test_a_linked_import_takes_no_room(tmp_path: Path, shelf: Path) -> None:
    source = model_folder(tmp_path / "source")
    folder, _ = store.copy_in(source, shelf, "linked", silent, link=True)
    data = "model.onnx.data"
    assert (folder / data).stat().st_ino == (source / data).stat().st_ino


def test_the_files_of_a_hub_cache_are_copied_not_its_links(tmp_path: Path, shelf: Path) -> None:
    blobs = model_folder(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    folder, _ = store.copy_in(snapshot, shelf, "copied", silent)
    assert not any(path.is_symlink() for path in folder.iterdir())


def no_config(folder: Path) -> None:
    (folder / "genai_config.json").unlink()


def cut_data(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(b"w")


def cut_graph(folder: Path) -> None:
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:40])


def other_tokenizer(folder: Path) -> None:
    words = {f"w{n}": n for n in range(11)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))


def small_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"w": 0}}}))


def outside(folder: Path) -> None:
    graph = weighty_graph({"w": ("../secret", 0, 1)})
    (folder / "model.onnx").write_bytes(graph)
    (folder.parent / "secret").write_bytes(b"x")


def newer(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"schema": 2, "shape": "unheard of"}')


def of_no_schema(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"schema": "2", "files": {}}')


BROKEN = [
    (no_config, "there is no genai_config.json in"),
    (cut_data, "model.onnx.data is cut off: it has 1 bytes, and model.onnx needs 28000"),
    (cut_graph, "model.onnx is no whole ONNX file"),
    (
        other_tokenizer,
        "tokenizer.json belongs to another model: it has 11 tokens, and the model 10",
    ),
    (small_tokenizer, "tokenizer.json belongs to another model: it has 1 tokens, and the model 10"),
    (outside, "model.onnx keeps weights outside its folder, in ../secret"),
    (newer, "is of schema 2, and this phid reads 1"),
    (of_no_schema, "is of schema '2', and this phid reads 1"),
]


@pytest.mark.parametrize(("breaks", "says"), BROKEN)
def test_what_is_no_whole_model_is_not_taken_in(
    tmp_path: Path, shelf: Path, breaks: object, says: str
) -> None:
    source = model_folder(tmp_path / "source")
    breaks(source)  # type: ignore[operator]
    with pytest.raises(StoreError) as error:
        store.copy_in(source, shelf, "broken", silent)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert store.models(shelf) == []


def test_the_folder_that_was_meant_is_told(tmp_path: Path, shelf: Path) -> None:
    model_folder(tmp_path / "repo" / "cpu" / "int4")
    with pytest.raises(StoreError, match="cpu/int4 has one"):
        store.copy_in(tmp_path / "repo", shelf, "m", silent)


def test_a_tokenizer_may_have_fewer_tokens_than_a_rounded_vocabulary() -> None:
    assert soundness.misfit(32011, 32064) == ""
    assert soundness.misfit(200029, 200064) == ""
    assert soundness.misfit(32011, 200064)
    assert soundness.misfit(0, 32064) == ""


@pytest.mark.parametrize(
    "odd",
    [
        {"context_length": 2048, "type": "phi3", "decoder": "model.onnx"},
        {"context_length": 2048, "type": "phi3", "decoder": [1]},
        {"context_length": float("inf"), "type": "phi3"},
        {"context_length": 2048},
        "phi3",
    ],
)
def test_an_odd_configuration_is_no_model_and_no_fault_of_ours(odd: object, tmp_path: Path) -> None:
    """A folder that somebody has put there is looked at by the service, too."""
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/genai_config.json").write_text(json.dumps({"model": odd}))
    assert store.models(tmp_path) == []
    with pytest.raises(soundness.NoModel, match="cannot be read"):
        soundness.config(tmp_path / "odd")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "ü", "x" * 65])
def test_a_name_is_a_folders_name(tmp_path: Path, shelf: Path, name: str) -> None:
    source = model_folder(tmp_path / "source")
    with pytest.raises(StoreError, match="cannot be a model's name"):
        store.copy_in(source, shelf, name, silent)
    with pytest.raises(StoreError, match="is no model's name"):
        store.remove(shelf, name, silent, forget=False)
    assert source.exists()


def test_a_name_is_not_taken_twice(kept: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="kept is there already: --replace it"):
        store.copy_in(tmp_path / "source", kept.parent, "kept", silent)


def test_one_that_has_the_same_bytes_is_kept_and_another_takes_its_place(
    kept: Path, tmp_path: Path
) -> None:
    source, inode = tmp_path / "source", (kept / "model.onnx.data").stat().st_ino
    store.copy_in(source, kept.parent, "kept", silent, replace=True)
    assert (kept / "model.onnx.data").stat().st_ino == inode
    data = bytearray((source / "model.onnx.data").read_bytes())
    data[7] ^= 1
    (source / "model.onnx.data").write_bytes(data)
    store.copy_in(source, kept.parent, "kept", silent, replace=True)
    assert (kept / "model.onnx.data").read_bytes() == data
    assert verified(kept) == []
    (kept / "model.onnx.data").write_bytes(b"rotten")
    store.copy_in(source, kept.parent, "kept", silent, replace=True)
    assert (kept / "model.onnx.data").read_bytes() == data, "what has rotted is no longer the same"


def test_what_is_there_stays_until_its_successor_is_whole(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "source" / "notes.txt").write_text("of another build")
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.copy_in(tmp_path / "source", kept.parent, "kept", silent, replace=True)
    assert verified(kept) == []


@pytest.fixture
def cut_short(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that was moved aside for another when the power failed."""
    source = model_folder(tmp_path / "other")
    (source / "genai_config.json").write_text(
        (source / "genai_config.json").read_text().replace("}", " }")
    )
    rename = Path.rename

    def rename_once(path: Path, target: Path) -> Path:
        if target == kept:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_once)
        with pytest.raises(KeyboardInterrupt):
            store.copy_in(source, kept.parent, "kept", silent, replace=True)
    assert store.models(kept.parent) == []
    return kept


def test_one_that_was_moved_aside_for_another_is_put_back(cut_short: Path) -> None:
    store.put_back(cut_short.parent)
    assert verified(cut_short) == []
    store.put_back(cut_short.parent)
    assert verified(cut_short) == []


def test_the_next_change_puts_it_back_first(cut_short: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is there already"):
        store.copy_in(tmp_path / "source", cut_short.parent, "kept", silent)
    assert verified(cut_short) == []


def test_one_that_another_process_works_on_is_left_alone(cut_short: Path) -> None:
    with lockfile.alone(cut_short.with_name(".kept.lock"), lambda: None):
        store.put_back(cut_short.parent)
        assert store.models(cut_short.parent) == []
    store.put_back(cut_short.parent)
    assert verified(cut_short) == []


def test_where_nothing_may_be_changed_nothing_is_put_back_and_nobody_minds(
    cut_short: Path,
) -> None:
    store.put_back(cut_short.parent / "not there")
    program = (
        "import sys; from pathlib import Path; from phid import store; "
        "store.put_back(Path(sys.argv[1])); print(store.models(Path(sys.argv[1])))"
    )
    command = [*bound(), sys.executable, "-c", program, str(cut_short.parent)]
    cut_short.parent.chmod(0o500)
    try:
        said = subprocess.check_output(command, env=programs.environment(), text=True)
    finally:
        cut_short.parent.chmod(0o700)
    assert said == "[]\n"


def test_a_changed_byte_is_seen(kept: Path) -> None:
    data = bytearray((kept / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (kept / "model.onnx.data").write_bytes(data)
    (fault,) = verified(kept)
    assert fault.startswith("model.onnx.data has changed: its sha256 is")


def test_what_is_missing_or_cut_off_is_told_once(kept: Path) -> None:
    (kept / "model.onnx.data").write_bytes(b"w")
    (kept / "tokenizer_config.json").unlink()
    assert verified(kept) == [
        "model.onnx.data has 1 bytes and had 28000",
        "tokenizer_config.json is missing",
    ]


def test_a_model_that_was_put_here_by_hand_is_looked_at(shelf: Path) -> None:
    folder = model_folder(shelf / "by-hand")
    assert verified(folder) == []
    cut_data(folder)
    assert verified(folder) == [
        "model.onnx.data is cut off: it has 1 bytes, and model.onnx needs 28000"
    ]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"files": 1}', '{"files": {"a": {}}}'])
def test_a_damaged_manifest_is_told(kept: Path, content: str) -> None:
    (kept / "manifest.json").write_text(content)
    (fault,) = verified(kept)
    assert "manifest.json cannot be read" in fault


def test_a_manifest_of_a_later_phid_is_refused(kept: Path) -> None:
    newer(kept)
    with pytest.raises(StoreError, match="is of schema 2, and this phid reads 1: use the newer"):
        verified(kept)


def test_a_manifest_says_what_was_written(tmp_path: Path) -> None:
    made = Manifest({"a": Kept(1, "0" * 64)}, {"repo": "x"}, "MIT", "2026-11-25T00:00:00Z")
    (tmp_path / "manifest.json").write_text(made.text())
    assert manifest.read(tmp_path) == made


def test_a_removed_model_is_gone_with_what_a_pull_left(kept: Path) -> None:
    left = kept.parent / ".kept.part"
    left.mkdir()
    (left / "x.partial").write_bytes(bytes(1000))
    freed = store.remove(kept.parent, "kept", silent, forget=False)
    assert freed > 29_000
    assert store.models(kept.parent) == []
    assert not left.exists()
    with pytest.raises(StoreError, match=r"there is no model kept in .* \(there: none\)"):
        store.remove(kept.parent, "kept", silent, forget=False)


def test_a_link_to_a_model_elsewhere_is_removed_and_the_model_stays(
    tmp_path: Path, shelf: Path
) -> None:
    source = model_folder(tmp_path / "source")
    shelf.mkdir()
    (shelf / "there").symlink_to(source)
    store.remove(shelf, "there", silent, forget=False)
    assert (source / "model.onnx").exists()
    assert store.models(shelf) == []


def test_an_import_that_fails_halfway_leaves_nothing(
    tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_source: Path, target: Path) -> None:
        if target.name.endswith(".data"):
            raise OSError(28, "No space left on device")
        target.write_bytes(b"")

    source = model_folder(tmp_path / "source")
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.copy_in(source, shelf, "m", silent)
    assert [path.name for path in shelf.iterdir()] == [".m.lock"]


def test_one_process_at_a_time_changes_a_model(shelf: Path) -> None:
    holds = (
        "import sys; from pathlib import Path; from phid import store\n"
        "with store.changing(Path(sys.argv[1]), 'm', print):\n"
        "    print('inside', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holds, str(shelf)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == b"inside\n"
    waited, inside = threading.Event(), threading.Event()
    said: list[str] = []

    def change() -> None:
        def report(stage: str, _fraction: float | None) -> None:
            said.append(stage)
            waited.set()

        with store.changing(shelf, "m", report):
            inside.set()

    second = threading.Thread(target=change)
    second.start()
    assert waited.wait(60)
    assert said == ["waiting for another process that works on m"]
    assert not inside.is_set()
    other.kill()  # however it ends
    assert inside.wait(60)
    second.join()
    other.communicate()


def test_models_need_not_be_named_where_there_is_one(kept: Path) -> None:
    assert store.resolve("", kept.parent) == ("kept", kept)
    model_folder(kept.parent / "another")
    assert store.resolve("", kept.parent) is None
