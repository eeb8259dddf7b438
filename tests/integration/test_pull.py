"""Pulling from a server that speaks the Hub's protocol, and does what can go wrong with one."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hub_server
from hub_server import Fault, Hub
from phid import manifest, pull, store
from phid.catalog import Build, KnownFile
from phid.hub import HubError
from phid.pull import Endurance, Pulled
from phid.store import StoreError
from rig import ROOT, until
from weighty import model_folder
from wire import PATIENCE

REPO, BELOW = "acme/some-model-onnx", "cpu/int4"
BUILD = Build(name="some-model", repo=REPO, folder=BELOW, license="MIT")
QUICK = Endurance(
    attempts=4, pause_s=0.01, pause_max_s=0.05, timeout_s=1.0, window_s=0.3, least_bytes_s=4096
)
DATA = random.Random(1).randbytes(3_000_000)
LARGE = "model.onnx.data"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with hub_server.hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def source(tmp_path: Path, hub: Hub) -> Path:
    """The folder that the repository has below cpu/int4."""
    folder = model_folder(tmp_path / "source", data=DATA)
    hub.folder(REPO, BELOW, folder)
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "Modelle für Zuhause"


class Stages(list[str]):
    def __call__(self, stage: str, _fraction: float | None) -> None:
        self.append(stage)


def fetch(models: Path, build: Build = BUILD, **how: Any) -> Pulled:
    return pull.pull(build, models, Stages(), endurance=QUICK, **how)


def same(folder: Path, source: Path) -> bool:
    names = sorted(path.name for path in source.iterdir())
    found = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    return names == found and all(
        (folder / name).read_bytes() == (source / name).read_bytes() for name in names
    )


def leftovers(models: Path) -> list[str]:
    return sorted(p.name for p in models.iterdir() if p.name not in {".known", ".some-model.lock"})


def test_a_model_is_pulled_whole_and_once(hub: Hub, source: Path, models: Path) -> None:
    first = fetch(models)
    assert same(first.folder, source)
    assert (first.new, first.known, first.recorded) == (True, 0, 5)
    assert first.fetched == first.size_bytes == sum(p.stat().st_size for p in source.iterdir())
    made = manifest.read(first.folder)
    assert made is not None
    assert made.license == "MIT"
    assert made.source["commit"] == first.commit == hub.files(REPO, "main")[0]  # type: ignore[index]
    asked = len(hub.requests)
    assert not fetch(models).new
    assert len(hub.requests) == asked
    assert leftovers(models) == ["some-model"]


def test_nothing_but_the_model_is_asked_for(
    hub: Hub, source: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AI_AGENT", "x")  # of what huggingface_hub would tell
    fetch(models)
    kinds = {request.path.split("/")[1] for request in hub.requests}
    assert kinds == {"api", "acme", "cdn"}
    assert sum(request.path.startswith("/api/") for request in hub.requests) == 1
    assert {request.method for request in hub.requests} == {"GET"}
    told = " ".join(r.headers["user-agent"] for r in hub.requests)
    assert "agent" not in told
    assert "torch" not in told


def test_half_a_model_is_never_seen(hub: Hub, source: Path, models: Path) -> None:
    hub.rate = 1_000_000
    seen: list[list[str]] = []
    pulling = threading.Thread(target=fetch, args=(models,))
    pulling.start()
    until(lambda: hub.sent > 500_000)
    seen = [[model.name for model in store.models(models)]]
    assert not (models / "some-model").exists()
    hub.rate = None
    pulling.join()
    assert seen == [[]]
    assert [model.name for model in store.models(models)] == ["some-model"]


def test_a_branch_stays_where_the_first_pull_found_it(hub: Hub, source: Path, models: Path) -> None:
    first = fetch(models)
    (source / "extra.txt").write_text("of a newer commit")
    newest = hub.folder(REPO, BELOW, source)
    store.remove(models, "some-model", Stages(), forget=False)
    again = fetch(models)
    assert again.commit == first.commit != newest
    assert (again.known, again.recorded) == (5, 0)
    latest = fetch(models, latest=True)
    assert latest.commit == newest
    assert latest.fetched < len(DATA)  # what is the same in both is not fetched again
    assert not fetch(models, latest=True).new
    assert (latest.folder / "extra.txt").exists()
    assert leftovers(models) == ["some-model"]
    store.remove(models, "some-model", Stages(), forget=False)
    assert fetch(models).commit == newest


def test_the_first_pulls_hashes_are_enforced(hub: Hub, source: Path, models: Path) -> None:
    commit = fetch(models).commit
    store.remove(models, "some-model", Stages(), forget=False)
    # The server changes what a commit is: small files have no SHA-256 there, large ones have.
    hub.repos[REPO][commit][f"{BELOW}/tokenizer_config.json"] = b'{"evil": 1}'
    with pytest.raises(HubError, match=r"tokenizer_config\.json came with another content"):
        fetch(models)
    assert store.models(models) == []
    hub.repos[REPO][commit][f"{BELOW}/{LARGE}"] = DATA[::-1]
    with pytest.raises(HubError, match=r"offers other bytes for model\.onnx\.data than are known"):
        fetch(models)
    store.remove(models, "some-model", Stages(), forget=True)
    assert fetch(models).recorded == 5


def test_the_catalogs_hashes_are_enforced_from_the_first_pull_on(
    hub: Hub, source: Path, models: Path
) -> None:
    right = hashlib.sha256(DATA).hexdigest()
    known = BUILD.model_copy(update={"files": (KnownFile(name=LARGE, sha256=right),)})
    assert fetch(models, known).known == 1
    store.remove(models, "some-model", Stages(), forget=True)
    wrong = BUILD.model_copy(update={"files": (KnownFile(name=LARGE, sha256="0" * 64),)})
    with pytest.raises(HubError, match="nothing was pulled"):
        fetch(models, wrong)
    assert store.models(models) == []


def test_a_pinned_build_is_pulled_at_its_commit(hub: Hub, source: Path, models: Path) -> None:
    commit = next(iter(hub.repos[REPO]))
    hub.commit(REPO, {f"{BELOW}/genai_config.json": b"{}"})
    pinned = BUILD.model_copy(update={"revision": commit})
    assert fetch(models, pinned).commit == commit


FAULTS = {
    "429": Fault(status=429, headers={"Retry-After": "1"}),
    "503": Fault(status=503),
    "cut": Fault(cut_after=1_000_000),
    "cut at once": Fault(cut_after=0),
    "hang": Fault(hang=True),
    "loris": Fault(loris=True),
    "changed": Fault(instead=b"something else"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_pull_gets_over_a_fault(hub: Hub, source: Path, models: Path, name: str) -> None:
    hub.faults = {"/cdn/": [FAULTS[name]], "/api/": [Fault(status=502)]}
    began = time.monotonic()
    pulled = fetch(models)
    took = time.monotonic() - began
    assert same(pulled.folder, source)
    assert hub.faults == {"/cdn/": [], "/api/": []}
    if name == "429":
        assert took >= 1
    if name == "cut":
        # What had come is not fetched again.
        assert pulled.fetched == pulled.size_bytes
        assert any(r.headers.get("range") == "bytes=1000000-" for r in hub.requests)


def test_a_file_that_was_continued_wrongly_is_fetched_again(
    hub: Hub, source: Path, models: Path
) -> None:
    # Cut off, then continued by a cache that has other bytes under the same ETag.
    wrong = Fault(instead=bytes(len(DATA)), keep_etag=True)
    hub.faults = {"/cdn/": [Fault(cut_after=1_000_000), wrong]}
    pulled = fetch(models)
    assert same(pulled.folder, source)
    assert pulled.fetched == pulled.size_bytes + len(DATA)


def test_a_file_that_has_changed_meanwhile_is_fetched_from_its_beginning(
    hub: Hub, source: Path, models: Path
) -> None:
    hub.faults = {"/cdn/": [Fault(cut_after=1_000_000), Fault(instead=bytes(len(DATA)))]}
    pulled = fetch(models)
    assert same(pulled.folder, source)
    assert pulled.fetched == pulled.size_bytes + 1_000_000


def test_a_wrong_hash_is_not_kept(hub: Hub, source: Path, models: Path) -> None:
    hub.faults = {LARGE: [Fault(instead=DATA[:-1] + b"x")] * 3}
    with pytest.raises(HubError, match=r"model.onnx.data came with another content .* not kept"):
        fetch(models)
    assert store.models(models) == []
    hub.faults = {}
    assert same(fetch(models).folder, source)


@pytest.mark.parametrize("fault", [Fault(status=500), Fault(hang=True)])
def test_a_server_that_stays_bad_ends_it_and_the_next_goes_on(
    hub: Hub, source: Path, models: Path, fault: Fault
) -> None:
    hub.faults = {"/cdn/": [Fault(cut_after=2_000_000), *[fault] * 4]}
    with pytest.raises(HubError, match=r"tried 4 times.* goes on where it stopped"):
        fetch(models)
    assert store.models(models) == []
    hub.faults = {}
    pulled = fetch(models)
    assert same(pulled.folder, source)
    assert pulled.fetched == pulled.size_bytes - hub_bytes_before(hub, pulled)


def hub_bytes_before(hub: Hub, pulled: Pulled) -> int:
    """What the pulls before this one had fetched."""
    return hub.sent - pulled.fetched


REFUSED = {
    "acme/nothing": ("there is no such repository, or it is private: set HF_TOKEN", {}),
    REPO: ("has no folder gpu/int4 at", {"folder": "gpu/int4"}),
}


@pytest.mark.parametrize("repo", REFUSED)
def test_what_is_not_there_is_said(hub: Hub, source: Path, models: Path, repo: str) -> None:
    says, update = REFUSED[repo]
    with pytest.raises(HubError, match=says):
        fetch(models, BUILD.model_copy(update={"repo": repo, **update}))
    with pytest.raises(HubError, match="there is no such revision"):
        fetch(models, BUILD.model_copy(update={"revision": "f" * 40}))


@pytest.mark.parametrize("repo", ["acme//mine", "acme/my model", "https://hub/acme/mine"])
def test_what_no_repository_is_called_is_one_line(hub: Hub, models: Path, repo: str) -> None:
    with pytest.raises(HubError, match="a repository is called OWNER/NAME") as told:
        fetch(models, BUILD.model_copy(update={"repo": repo}))
    assert "\n" not in str(told.value)
    assert hub.requests == []


def test_a_folder_that_is_no_model_is_not_published(hub: Hub, models: Path) -> None:
    hub.commit(REPO, {f"{BELOW}/README.md": b"nothing"})
    with pytest.raises(HubError, match=r"is no model: there is no genai_config.json"):
        fetch(models)
    assert leftovers(models) == []


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a\\b", "pull.json"])
def test_no_file_lands_outside(hub: Hub, source: Path, models: Path, name: str) -> None:
    (commit,) = hub.repos[REPO]
    hub.repos[REPO][commit][f"{BELOW}/{name}"] = b"evil"
    with pytest.raises(HubError, match="which no model has: not pulled"):
        fetch(models)
    assert leftovers(models) == []


def test_a_token_goes_to_the_hub_and_to_nobody_else(
    hub: Hub, source: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_secret"
    with pytest.raises(HubError, match="HF_TOKEN"):
        fetch(models)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    before = len(hub.requests)
    assert same(fetch(models).folder, source)
    for request in hub.requests[before:]:
        assert ("authorization" in request.headers) == ("/cdn/" not in request.path), request


def test_offline_never_tries(
    hub: Hub, source: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set.* `phid models import` it"):
        fetch(models)
    assert hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    fetch(models)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not fetch(models).new


def test_a_server_that_is_not_there_is_said(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="tried 4 times"):
        fetch(models)
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    with pytest.raises(HubError):
        fetch(models)


def test_a_model_put_there_by_hand_is_not_overwritten(hub: Hub, source: Path, models: Path) -> None:
    model_folder(models / "some-model")
    with pytest.raises(StoreError, match="was not pulled: `phid models rm some-model` first"):
        fetch(models)


def test_of_a_damaged_model_only_what_is_damaged_is_fetched(
    hub: Hub, source: Path, models: Path
) -> None:
    folder = fetch(models).folder
    (folder / "tokenizer_config.json").unlink()
    again = fetch(models)
    assert same(again.folder, source)
    assert 0 < again.fetched < len(DATA)
    (folder / LARGE).write_bytes(DATA[:-1])
    assert fetch(models).fetched >= len(DATA)


def test_an_imported_model_is_not_replaced(hub: Hub, source: Path, models: Path) -> None:
    store.copy_in(source, models, "some-model", Stages())
    pinned = BUILD.model_copy(update={"revision": next(iter(hub.repos[REPO]))})
    with pytest.raises(StoreError, match="was not pulled"):
        fetch(models, pinned)


def test_a_server_that_only_drips_ends_it(hub: Hub, source: Path, models: Path) -> None:
    hub.faults = {"/cdn/": [Fault(loris=True) for _ in range(4)]}
    with pytest.raises(HubError, match="hardly a byte comes any more"):
        fetch(models)


def test_a_record_of_a_later_phid_is_refused(hub: Hub, source: Path, models: Path) -> None:
    fetch(models)
    store.remove(models, "some-model", Stages(), forget=False)
    store.record_path(models, "some-model").write_text('{"schema": 2}')
    with pytest.raises(StoreError, match="is of schema 2"):
        fetch(models)


# As a process of its own: killed, starved of disk, and two at a time.


def command(models: Path, hub: Hub, *arguments: str) -> tuple[list[str], dict[str, str]]:
    config = models.parent / "phid.toml"
    config.write_text(
        f'[[catalog]]\nname = "some-model"\nrepo = "{REPO}"\nfolder = "{BELOW}"\nlicense = "MIT"\n'
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PHID_", "HF_"))} | {
        "HF_ENDPOINT": hub.endpoint,
        "PYTHONPATH": str(ROOT / "daemon"),
        "PHID_MODELS_DIR": str(models),
        "PHID_CONFIG": str(config),
    }
    return [sys.executable, "-m", "phid", "models", *arguments], environment


def run(models: Path, hub: Hub, *arguments: str) -> subprocess.CompletedProcess[str]:
    words, environment = command(models, hub, *arguments)
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=60 * PATIENCE, check=False
    )


def test_a_pull_that_is_killed_goes_on_from_there(hub: Hub, source: Path, models: Path) -> None:
    """Few times here; scripts/prove-pull does it twenty times with a real model's files."""
    hub.rate = 1_500_000
    chance = random.Random(7)
    words, environment = command(models, hub, "pull", "some-model")
    partial = models / ".some-model.part" / f"{LARGE}.partial"
    kept = [0]
    for kill in range(3):
        at = kept[-1] + int(chance.uniform(0.1, 0.3) * len(DATA))
        child = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
        # It is on the disk as it comes; what a kill finds on the way there is lost with it.
        until(lambda at=at: partial.exists() and partial.stat().st_size >= at, 60)
        child.send_signal(signal.SIGKILL)
        child.wait()
        kept.append(partial.stat().st_size)
        assert store.models(models) == [], kill
    hub.rate = None
    done = run(models, hub, "pull", "some-model")
    assert done.returncode == 0, done.stderr
    assert same(models / "some-model", source)
    assert set(kept[1:]) <= asked_from(hub)


def asked_from(hub: Hub) -> set[int]:
    """From which byte on files were asked for that were not from their beginning."""
    ranges = [request.headers.get("range", "") for request in hub.requests]
    return {int(match[1]) for text in ranges if (match := re.fullmatch(r"bytes=(\d+)-", text))}


def test_a_second_puller_waits_and_then_has_it(hub: Hub, source: Path, models: Path) -> None:
    hub.rate = 100_000
    words, environment = command(models, hub, "pull", "some-model")
    first = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    until(lambda: hub.sent > 50_000, 60)
    second = subprocess.Popen(
        words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert second.stderr is not None
    assert second.stderr.readline() == "waiting for another process that works on some-model\n"
    hub.rate = None
    assert first.wait(60 * PATIENCE) == 0
    out, _ = second.communicate(timeout=60 * PATIENCE)
    assert second.returncode == 0
    assert "some-model is here already" in out
    size = sum(path.stat().st_size for path in source.iterdir())
    assert hub.sent == size


def test_the_command_says_what_it_did(hub: Hub, source: Path, models: Path) -> None:
    done = run(models, hub, "pull", "some-model")
    assert done.returncode == 0, done.stderr
    assert "5 have the" in done.stdout
    assert "recorded and from now on must be the same" in done.stdout
    assert "main can move: it was commit" in done.stdout
    assert "Traceback" not in done.stderr
    assert "warn" not in done.stderr.lower()
    (row,) = json.loads(run(models, hub, "verify", "--json").stdout)
    assert row == {"name": "some-model", "hashed": 5, "faults": []}


def may_mount() -> bool:
    if sys.platform != "linux" or os.geteuid():
        return False
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        check=False,
    )
    return tried.returncode == 0


def in_mount(models: Path, hub: Hub, script: str, *arguments: str) -> Any:
    """Run phid after a shell script in a mount namespace of its own, whose $1 is the store."""
    words, environment = command(models, hub, *arguments)
    models.mkdir(exist_ok=True)
    shell = ["unshare", "--mount", "sh", "-ec", f'{script}; shift; exec "$@"', "sh", str(models)]
    return subprocess.run(
        [*shell, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60 * PATIENCE,
        check=False,
    )


@pytest.mark.skipif(not may_mount(), reason="a small disk cannot be mounted here")
class TestDisks:
    def test_a_disk_that_is_too_small_is_seen_before_anything_is_fetched(
        self, hub: Hub, source: Path, models: Path
    ) -> None:
        mount = 'mount -t tmpfs -o size=66m tmpfs "$1"'
        done = in_mount(models, hub, mount, "pull", "some-model")
        assert done.returncode == 1
        assert "some-model needs 3 MB more and" in done.stderr
        assert "make room for" in done.stderr
        assert hub.sent == 0

    def test_a_disk_that_fills_up_meanwhile_is_said_and_the_next_goes_on(
        self, hub: Hub, source: Path, models: Path
    ) -> None:
        hub.rate = 1_500_000
        # Another program takes the disk while the pull is under way; then it lets it go.
        script = (
            'mount -t tmpfs -o size=72m tmpfs "$1"; '
            '(while [ ! -e "$1"/.some-model.part/model.onnx.data.partial ]; do sleep 0.05; done; '
            'head -c 100m /dev/zero >"$1"/.other 2>/dev/null) & '
            'store=$1; shift; "$@" || first=$?; rm "$store"/.other; set -- x "$@"; '
            'kept=$(stat -c %s "$store"/.some-model.part/model.onnx.data.partial); '
            'echo "first $first, kept $kept" >&2'
        )
        done = in_mount(models, hub, script, "pull", "some-model")
        kept = re.search(r"^first 1, kept (\d+)$", done.stderr, re.MULTILINE)
        assert kept is not None, done.stderr
        assert "is full: make room, then the same command goes on where it stopped" in done.stderr
        assert "Traceback" not in done.stderr
        assert done.returncode == 0, done.stderr
        assert int(kept[1]) in asked_from(hub)

    def test_a_store_that_cannot_be_written_is_said(
        self, hub: Hub, source: Path, models: Path
    ) -> None:
        mount = 'mount -t tmpfs -o ro tmpfs "$1"'
        for arguments in (("pull", "some-model"), ("import", str(source), "--name", "m")):
            done = in_mount(models, hub, mount, *arguments)
            assert done.returncode == 1
            (line,) = [text for text in done.stderr.splitlines() if text.startswith("phid models:")]
            assert "Read-only file system" in line
            assert "give this user the right to, or set another models_dir" in line
            assert "Traceback" not in done.stderr
