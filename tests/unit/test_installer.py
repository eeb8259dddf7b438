"""scripts/installer: what it writes, what it keeps, and what it decides."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from installer import configuration, hardware, health, installation, models, units, venvs
from installer.acts import Acts, Failed, answer
from installer.installation import uninstall
from installer.layout import Layout
from rig import ROOT

LOCKS = ROOT / "scripts" / "lock"


@pytest.fixture
def acts() -> Acts:
    return Acts()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(ROOT, tmp_path)


@pytest.fixture
def phid(tmp_path: Path) -> Path:
    """The command of an environment: of the checkout, run by this Python."""
    command = tmp_path / "phid"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT}/daemon exec {sys.executable} -m phid "$@"\n')
    command.chmod(0o755)
    return command


# Acts.


def test_a_dry_run_tells_every_act_and_does_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    acts, there = Acts(dry=True), tmp_path / "there"
    there.write_text("x")
    acts.run("touch", tmp_path / "made")
    acts.write(tmp_path / "written", "x")
    acts.link(tmp_path / "linked", "there")
    acts.remove(there)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    told = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert told == ["run", "write", "link", "remove"]


def test_what_is_so_already_is_not_done_again(acts: Acts, tmp_path: Path) -> None:
    assert acts.write(tmp_path / "file", "x")
    assert acts.link(tmp_path / "link", "file")
    again = Acts()
    assert not again.write(tmp_path / "file", "x")
    assert not again.link(tmp_path / "link", "file")


def test_everything_is_put_back_as_it_was(tmp_path: Path) -> None:
    file, link, gone = (tmp_path / name for name in ("file", "link", "gone"))
    file.write_text("before")
    gone.write_text("before")
    link.symlink_to("file")
    acts = Acts()
    acts.write(file, "after")
    acts.write(file, "later still")
    acts.write(tmp_path / "new", "after")
    acts.link(link, "new")
    acts.remove(gone)
    acts.restore()
    assert file.read_text() == gone.read_text() == "before"
    assert link.readlink() == Path("file")
    assert not (tmp_path / "new").exists()


def test_a_command_that_fails_is_told_with_its_last_words(acts: Acts) -> None:
    with pytest.raises(Failed, match=r"status 3:\n    last word"):
        acts.run("sh", "-c", "echo last word; exit 3")
    with pytest.raises(Failed, match="no-such-command: No such file"):
        acts.run("no-such-command")


def test_what_takes_long_is_seen_on_a_terminal_and_told_where_there_is_none() -> None:
    asks = "test -t 2 && echo seen >&2 || { echo told >&2; exit 3; }"
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        f"from installer.acts import Acts; Acts().run('sh', '-c', {asks!r}, long=True)"
    )
    looks, written = os.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=written, check=True)
    assert b"\nseen" in os.read(looks, 4096)
    os.close(looks)
    os.close(written)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ended with status 3:\n    told" in done.stderr


# Environments.


def test_another_line_of_code_is_another_build(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    for part in ("daemon", "pyproject.toml", "scripts/lock"):
        source, target = ROOT / part, copy / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    layout = Layout(copy)
    locks = venvs.locks_of(layout, [])
    first = venvs.name(layout, locks)
    assert first == venvs.name(layout, locks)
    assert first.startswith(venvs.version(layout) + "-")
    log = copy / "daemon/phid/log.py"
    log.write_text(log.read_text() + "\n")
    assert venvs.name(layout, locks) != first


def test_a_build_that_fails_leaves_what_is_in_use(
    acts: Acts, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(venvs, "_has_ensurepip", lambda: False)  # which takes seconds to unpack
    monkeypatch.setattr(venvs, "_pip_in", lambda house, _lock: house / "pip-0.whl")
    in_use = layout.venvs / "old"
    in_use.mkdir(parents=True)
    venvs.switch(acts, layout, in_use)
    (tmp_path / "wheelhouse/pip-0.whl").mkdir(parents=True)
    with pytest.raises(Failed, match=r"pip-0.whl/pip install .* ended with status"):
        venvs.build(acts, layout, [], tmp_path / "wheelhouse")
    assert venvs.current(layout) == in_use
    assert [path.name for path in layout.venvs.iterdir()] == ["old"]


def test_a_pip_that_the_lock_does_not_name_is_not_run(tmp_path: Path) -> None:
    lock = tmp_path / "pip.txt"
    lock.write_text(f"pip==26.3 --hash=sha256:{hashlib.sha256(b'pip').hexdigest()}\n")
    with pytest.raises(Failed, match="no pip: pip download --require-hashes"):
        venvs._pip_in(tmp_path, lock)
    good, bad = tmp_path / "pip-26.3-py3-none-any.whl", tmp_path / "pip-99-py3-none-any.whl"
    bad.write_bytes(b"pip, and something else")
    with pytest.raises(Failed, match=r"a pip-99-.* that .*pip.txt does not name"):
        venvs._pip_in(tmp_path, lock)
    good.write_bytes(b"pip")
    assert venvs._pip_in(tmp_path, lock) == good


def test_a_wheelhouse_with_a_list_of_its_own_is_installed_by_that(
    layout: Layout, tmp_path: Path
) -> None:
    locked = venvs.locks_of(layout, ["hub"], tmp_path)
    assert [lock.name for lock in locked] == ["run.txt", "hub.txt"]
    own = tmp_path / "requirements.txt"
    own.write_text("onnxruntime-gpu==1.32.0 --hash=sha256:00\n")
    assert venvs.locks_of(layout, ["hub"], tmp_path) == [own]
    first = venvs.name(layout, [own])
    own.write_text("onnxruntime-gpu==1.32.1 --hash=sha256:00\n")
    assert venvs.name(layout, [own]) != first


def test_a_hand_made_environment_is_kept_to_come_back_to(acts: Acts, layout: Layout) -> None:
    layout.venv.mkdir(parents=True)
    (layout.venv / "mine").touch()
    venvs.adopt(acts, layout)
    (layout.venvs / "new").mkdir()
    assert venvs.switch(acts, layout, layout.venvs / "new")
    assert venvs.current(layout) == layout.venvs / "new"
    acts.restore()
    assert (layout.venv / "mine").exists()


def test_the_one_before_is_kept_and_older_ones_are_not(acts: Acts, layout: Layout) -> None:
    for name in ("first", "second", "third"):
        (layout.venvs / name).mkdir(parents=True)
    venvs.prune(acts, layout, {layout.venvs / "second", layout.venvs / "third"})
    assert sorted(path.name for path in layout.venvs.iterdir()) == ["second", "third"]


# Settings.


def test_the_settings_that_are_written_can_be_used(acts: Acts, layout: Layout, phid: Path) -> None:
    configuration.write(acts, layout, "phi")
    configuration.check(layout, phid)
    settings = configuration.settings(layout, phid)
    assert settings["models_dir"] == "/var/lib/phid/models"
    assert settings["state_dir"] == "/var/lib/phid"
    assert settings["engine.model"] == "phi"


def test_settings_are_never_overwritten_and_new_defaults_are_put_beside(
    acts: Acts, layout: Layout
) -> None:
    configuration.write(acts, layout, "")
    beside = layout.config.with_name("phid.toml.new")
    layout.config.write_text("mine")
    configuration.write(Acts(), layout, "")
    assert not beside.exists()  # nothing is new
    (layout.shipped / "phid.toml").write_text("the defaults of an older version")
    configuration.write(Acts(), layout, "")
    assert layout.config.read_text() == "mine"
    assert beside.read_text() == configuration.rendered(layout)


def test_settings_cut_off_in_the_middle_are_told(layout: Layout, phid: Path) -> None:
    layout.config.parent.mkdir(parents=True)
    layout.config.write_text('[mqtt]\nhost = "bro')
    with pytest.raises(Failed, match=r"phid.toml cannot be used; mend it(.|\n)*Unterminated"):
        configuration.check(layout, phid)


# The unit on this machine.


def test_limits_of_memory_leave_room_for_the_service() -> None:
    assert units.memory({"engine.memory_mb": 0, "engine.model": ""}) is None
    sizes = {
        "limits.backlog_bytes": 64 << 20,
        "vision.parts_bytes": 32 << 20,
        "engine.model": "",
    }
    text = units.memory({"engine.memory_mb": 4000, **sizes})
    assert text is not None
    assert text.endswith("[Service]\nMemoryHigh=4288M\nMemoryMax=4716M\n")
    several = {**sizes, "engine.model": "a", "engine.frame_model": "b", "engine.models": ["b", "c"]}
    text = units.memory({"engine.memory_mb": 1000, **several})
    assert text is not None
    assert "MemoryHigh=3288M" in text
    text = units.memory({"engine.memory_mb": 1000, "engine.budget_mb": 2000, **several})
    assert text is not None
    assert "MemoryHigh=2288M" in text


@pytest.mark.parametrize(
    ("drain_s", "stop_s"), [(None, None), (30, None), (40, None), (40.5, 61), (600, 620)]
)
def test_a_stop_is_given_the_time_that_draining_may_take(
    drain_s: float | None, stop_s: int | None
) -> None:
    text = units.stop({"limits.drain_s": drain_s})
    assert (text is None) == (stop_s is None)
    assert text is None or text.endswith(f"[Service]\nTimeoutStopSec={stop_s}\n")


def test_the_unit_gives_a_stop_what_is_reckoned_with() -> None:
    unit = (ROOT / "systemd/phid.service").read_text()
    assert f"\nTimeoutStopSec={units._STOP_S}\n" in unit


def test_each_credential_is_loaded_and_its_absence_asserted(tmp_path: Path) -> None:
    assert units.credentials(tmp_path) is None
    (tmp_path / "mqtt-password").touch()
    (tmp_path / "notes").touch()
    text = units.credentials(tmp_path)
    assert text is not None
    assert text.splitlines()[1:] == [
        "[Unit]",
        f"AssertPathExists={tmp_path}/mqtt-password",
        "[Service]",
        f"LoadCredential=mqtt-password:{tmp_path}/mqtt-password",
    ]


def test_a_credential_that_is_gone_is_named(acts: Acts, layout: Layout) -> None:
    layout.credentials.mkdir(parents=True)
    secret = layout.credentials / "mqtt-key"
    secret.touch()
    units.write_drop_ins(acts, layout, {}, None)
    units.check_credentials(layout)
    secret.unlink()
    with pytest.raises(Failed, match=f"the credential {secret} is gone: put it back"):
        units.check_credentials(layout)


def test_a_drop_in_that_is_not_needed_any_more_goes_and_one_for_devices_stays(
    acts: Acts, layout: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    units.write_drop_ins(acts, layout, {"engine.model": "", "engine.memory_mb": 4000}, "dri")
    assert sorted(path.name for path in layout.drop_ins.iterdir()) == [units.PROVIDER, units.MEMORY]
    units.write_drop_ins(acts, layout, {}, None)
    assert [path.name for path in layout.drop_ins.iterdir()] == [units.PROVIDER]
    assert f"{units.PROVIDER} is kept, though nothing here needs it" in capsys.readouterr().err


def test_credentials_that_one_may_not_see_are_not_missed_in_a_dry_run(acts: Acts) -> None:
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(ROOT, Path(folder))
        layout.root.chmod(0o755)
        layout.credentials.mkdir(parents=True)
        (layout.credentials / "mqtt-key").touch()
        units.write_drop_ins(acts, layout, {}, None)
        layout.credentials.chmod(0)
        with nobody():
            units.check_credentials(layout)
            assert units.credentials(layout.credentials) is None
        layout.credentials.chmod(0o755)


@contextmanager
def nobody() -> Iterator[None]:
    """Without root's rights to every file, for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("wanted", "installed", "devices", "opens"),
    [
        (["auto"], {"cpu"}, ["dev/nvidia0", "dev/dri/renderD128"], None),
        (["auto"], {"cpu", "cuda"}, [], None),
        (["auto"], {"cpu", "cuda"}, ["dev/nvidia0"], "cuda"),
        (["auto"], {"cpu", "cuda"}, ["etc/nv_tegra_release"], "jetson"),
        (["cpu"], {"cpu", "cuda"}, ["dev/nvidia0"], None),
        (["auto"], {"cpu", "qnn"}, ["dev/fastrpc-cdsp"], "qnn"),
        (["auto"], {"cuda", "openvino"}, ["dev/dri/renderD128"], "dri"),
        (["openvino", "cpu"], {"cuda", "openvino"}, ["dev/nvidia0", "dev/dri/renderD128"], "dri"),
    ],
)
def test_packages_and_devices_say_which_drop_in(
    tmp_path: Path, wanted: list[str], installed: set[str], devices: list[str], opens: str | None
) -> None:
    for device in devices:
        (tmp_path / device).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / device).touch()
    assert hardware.drop_in(wanted, frozenset(installed), tmp_path) == opens


def test_each_drop_in_for_devices_is_there() -> None:
    files = {path.stem for path in (ROOT / "systemd/provider").iterdir()}
    assert files == hardware.DROP_INS


def test_the_doctor_says_which_providers_have_their_packages(layout: Layout, phid: Path) -> None:
    assert "cpu" in hardware.installed(health.findings(layout, phid))
    assert hardware.installed({}) == hardware.installed({"provider": {"installed": None}}) == set()


# Models.


def test_what_fits_is_read_as_it_is_printed() -> None:
    assert models.chosen(json.dumps({"chosen": "phi-3.5-mini", "tokens": 2048})) == "phi-3.5-mini"
    for nothing in ("", "[]", '{"chosen": null}', '{"chosen": ""}'):
        assert models.chosen(nothing) is None


def test_a_model_that_cannot_be_chosen_is_no_reason_not_to_install(
    acts: Acts, layout: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = tmp_path / "old-phid"
    silent.write_text("#!/bin/sh\necho 'no route to the hub' >&2; exit 1\n")
    silent.chmod(0o755)
    assert models.provide(acts, layout, silent, None) == ""
    assert "no model was chosen: no route to the hub" in capsys.readouterr().err


def test_what_was_tried_is_not_told_as_the_reason_why_no_model_was_chosen(
    acts: Acts, layout: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phid = tmp_path / "phid"
    said = """echo trying CUDA >&2; echo '{"chosen": null}'; exit 1"""
    phid.write_text(f"#!/bin/sh\n{said}\n")
    phid.chmod(0o755)
    assert models.provide(acts, layout, phid, None) == ""
    assert "no model was chosen: nothing fits this machine" in capsys.readouterr().err


def test_a_model_that_is_there_is_kept(acts: Acts, layout: Layout) -> None:
    folder = layout.models / "mine"
    folder.mkdir(parents=True)
    (folder / "genai_config.json").touch()
    assert models.provide(acts, layout, Path("/no/phid"), None) == ""


def test_a_model_that_comes_or_is_replaced_is_a_reason_to_start_anew(layout: Layout) -> None:
    before = installation._starts_from(layout)
    config = layout.models / "mine/genai_config.json"
    config.parent.mkdir(parents=True)
    config.touch()
    came = installation._starts_from(layout)
    assert came != before
    assert installation._starts_from(layout) == came
    config.rename(config.with_name("old"))
    shutil.copy2(config.with_name("old"), config)
    assert installation._starts_from(layout) != came


def test_a_folder_that_is_no_model_is_refused(acts: Acts, layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="is no model"):
        models.provide(acts, layout, Path("/no/phid"), str(tmp_path))


def test_what_comes_from_the_hub_needs_its_client(layout: Layout, tmp_path: Path) -> None:
    assert models.is_to_be_fetched(layout, None)
    assert models.is_to_be_fetched(layout, "phi-3.5-mini")
    for brought in ("none", "demo", str(tmp_path), "./models/mine"):
        assert not models.is_to_be_fetched(layout, brought)
    there = layout.models / "phi-3.5-mini"
    there.mkdir(parents=True)
    (there / "genai_config.json").touch()
    assert not models.is_to_be_fetched(layout, None)
    assert not models.is_to_be_fetched(layout, "phi-3.5-mini")


# Health.


def looks(*seen: health.Seen) -> Callable[[], health.Seen]:
    """One look after another, the last for ever."""
    script: Iterator[health.Seen] = iter(seen)

    def look() -> health.Seen:
        return next(script, seen[-1])

    return look


def waited(*seen: health.Seen, wanted_online: bool) -> tuple[bool, float]:
    """Whether it is well, and after how long by a clock that only sleeping moves."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    well, _ = health.wait(
        looks(*seen), 60, wanted_online=wanted_online, clock=lambda: now[0], sleep=sleep
    )
    return well, now[0]


UP = health.Seen("active", 0, "0")
LOADING = health.Seen("active", 0, "0", "loading")
ONLINE = health.Seen("active", 0, "0", "online")
DEGRADED = health.Seen("active", 0, "0", "degraded", reason="no model")


def test_it_is_well_once_it_is_online() -> None:
    assert waited(UP, LOADING, ONLINE, wanted_online=True) == (True, 1.0)


def test_it_is_not_well_while_it_loads_and_loads() -> None:
    assert waited(LOADING, wanted_online=True) == (False, 60.0)


@pytest.mark.parametrize("seen", [UP, DEGRADED])
def test_it_is_as_well_as_it_was_when_it_stays_up(seen: health.Seen) -> None:
    well, after_s = waited(seen, wanted_online=False)
    assert well
    assert after_s < 20


def test_the_word_of_another_version_is_not_the_new_ones() -> None:
    old, new = (replace(ONLINE, version=version) for version in ("1", "2"))
    wait = functools.partial(health.wait, wanted_online=True, version="2", sleep=lambda _: None)
    assert wait(looks(old, old, new), 60) == (True, new)


def test_what_was_online_must_be_online_again() -> None:
    well, after_s = waited(DEGRADED, wanted_online=True)
    assert not well
    assert after_s < 20
    assert waited(UP, wanted_online=True) == (False, 60.0)


def test_a_daemon_that_keeps_ending_is_not_waited_for() -> None:
    crashes = [health.Seen("activating", n, "1") for n in range(9)]
    assert waited(*crashes, wanted_online=False) == (False, 1.5)
    failed = health.Seen("failed", 0, "78")
    assert waited(failed, wanted_online=False) == (False, 0.0)
    assert failed.says == "phid.service has failed: the settings cannot be used"


# The way back.


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was asked of systemd, which only takes note of it."""
    asked, folder = tmp_path / "asked", tmp_path / "bin"
    folder.mkdir()
    (folder / "systemctl").write_text(f'#!/bin/sh\necho "$*" >>{asked}\n')
    (folder / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(units, "running", lambda: True)
    return asked


@pytest.mark.parametrize(
    ("enabled", "asked_too"), [(True, []), (False, ["disable --quiet phid.service"])]
)
def test_what_did_not_run_before_does_not_run_after_the_way_back(
    acts: Acts, layout: Layout, systemctl: Path, *, enabled: bool, asked_too: list[str]
) -> None:
    before = installation._Before(health.Seen("inactive", 0, "0"), enabled=enabled)
    with kept_signals():
        installation._roll_back(acts, layout, installation.Wishes(), before, KeyboardInterrupt())
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    asked = systemctl.read_text().splitlines()
    assert asked == ["daemon-reload", *asked_too, "stop phid.service"]


@contextmanager
def kept_signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("name", ["phid.toml", "credentials/mqtt-password"])
def test_settings_and_secrets_that_changed_are_a_reason_to_start_anew(
    layout: Layout, name: str
) -> None:
    path = layout.config.parent / name
    path.parent.mkdir(parents=True)
    path.touch()
    now = path.stat().st_ctime
    assert installation._is_newer(layout, now - 2)
    assert not installation._is_newer(layout, now + 2)
    assert not installation._is_newer(layout, None)


def test_a_link_in_the_daemons_folder_is_not_written_through(acts: Acts, layout: Layout) -> None:
    for folder in (layout.home, layout.config.parent, layout.state, layout.unit.parent):
        folder.mkdir(parents=True)
    (layout.state / ".phid-probe").symlink_to(layout.root / "elsewhere")
    installation._check_writable(acts, layout)
    assert not (layout.root / "elsewhere").exists()


def test_commands_run_where_nobody_can_have_put_anything(acts: Acts) -> None:
    assert answer("pwd")[1].strip() == "/"
    acts.run("sh", "-c", "test $PWD = /")


# Removal, and the command.


def test_what_is_not_its_own_is_kept(acts: Acts, layout: Layout) -> None:
    units.write(acts, layout)
    configuration.write(acts, layout, "")
    units.write_drop_ins(acts, layout, {"engine.model": "", "engine.memory_mb": 4000}, None)
    (layout.drop_ins / "mine.conf").touch()
    layout.command.parent.mkdir(parents=True)
    layout.command.write_text("somebody else's")
    layout.models.mkdir(parents=True)
    layout.wanted.parent.mkdir()
    layout.wanted.symlink_to(layout.unit)
    uninstall(acts, layout, purge=False)
    assert not layout.wanted.is_symlink()
    files = sorted(str(p.relative_to(layout.root)) for p in layout.root.rglob("*") if p.is_file())
    assert files == [
        "etc/phid/phid.toml",
        "etc/systemd/system/phid.service.d/mine.conf",
        "usr/local/bin/phid",
    ]
    assert layout.models.exists()


def install(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [str(part) for part in (ROOT / "scripts/install", *arguments)]
    return subprocess.run(
        argv, capture_output=True, text=True, check=False, env=environment or None
    )


def test_the_command_tells_a_whole_installation_and_does_nothing(tmp_path: Path) -> None:
    done = install("--dry-run", "--root", tmp_path, "--model", "demo")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("would ")]
    for part in ("-m venv", "--require-hashes", "demo.txt", "systemd-sysusers", "prepare demo",
                 "etc/phid/phid.toml", "phid.service", "enable", "restart", "doctor"):  # fmt: skip
        assert any(part in line for line in told), part
    assert not list(tmp_path.iterdir())


def test_without_a_network_the_hubs_client_is_only_wanted_where_it_was_brought(
    tmp_path: Path,
) -> None:
    house = tmp_path / "house"
    house.mkdir()
    argv = ("--dry-run", "--root", tmp_path / "root", "--offline", house)
    (house / "pip-0.whl").touch()
    assert "hub.txt" not in install(*argv).stdout
    (house / "huggingface_hub-2.4.0-py3-none-any.whl").touch()
    assert "hub.txt" in install(*argv).stdout


def test_a_wheelhouse_need_not_bring_what_only_the_demo_needed(tmp_path: Path) -> None:
    assert not venvs.brings(tmp_path, "demo")
    (tmp_path / "iotcore-1.0-py3-none-any.whl").touch()
    assert venvs.brings(tmp_path, "demo")


def test_half_a_word_is_no_option(tmp_path: Path) -> None:
    assert install("--dry", "--root", tmp_path).returncode == 2


def test_there_must_be_something_to_upgrade(tmp_path: Path) -> None:
    done = install("--dry-run", "--upgrade", "--root", tmp_path)
    assert done.returncode == 1
    assert "there is nothing to upgrade" in done.stderr


# Packages for accelerators.


def test_cudas_packages_take_the_place_of_the_cpus(
    acts: Acts, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(
        Acts, "run", lambda _acts, *argv, **_how: ran.append(" ".join(map(str, argv)))
    )
    monkeypatch.setattr(venvs, "_make", lambda *_: ("pip",))
    monkeypatch.setattr(venvs, "_check_room", lambda *_: None)
    venvs.build(acts, layout, ["cuda", "hub"], tmp_path)
    first, gone, second, ours = ran
    assert "lock/run.txt" in first
    assert "lock/hub.txt" in first
    assert "cuda.txt" not in first
    assert gone.endswith("--yes onnxruntime onnxruntime-genai")
    assert "--no-deps" in second
    assert "--require-hashes" in second
    assert second.endswith("-r " + str(layout.checkout / "scripts/lock/cuda.txt"))
    assert ours.endswith(str(layout.checkout))


def test_what_takes_a_place_is_locked_with_all_that_it_needs() -> None:
    locked = {
        name: set(re.findall(r"^([\w-]+)==", (LOCKS / f"{name}.txt").read_text(), re.MULTILINE))
        for name in ("run", "cuda", "qnn", "openvino")
    }
    brought = locked["cuda"] - locked["run"]
    assert {"onnxruntime-gpu", "onnxruntime-genai-cuda"} <= brought
    assert all(name.startswith(("onnxruntime-", "nvidia-")) for name in brought)
    assert not locked["cuda"] & set(venvs._CPUS)
    assert locked["qnn"] > locked["run"]
    assert locked["openvino"] > locked["run"]


def test_the_common_packages_of_all_locks_are_the_same() -> None:
    versions: dict[str, set[str]] = {}
    for name in ("run", "hub", "cuda", "qnn", "openvino"):
        for line in re.findall(
            r"^(\S+==[^\\\n]+)", (LOCKS / f"{name}.txt").read_text(), re.MULTILINE
        ):
            package, _, version = line.partition("==")
            marker = version.partition(";")[2]
            versions.setdefault(f"{package};{marker}", set()).add(version)
    assert {key: found for key, found in versions.items() if len(found) > 1} == {}


def test_a_provider_stays_until_another_is_asked_for(
    acts: Acts, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[list[str]] = []
    monkeypatch.setattr(
        venvs, "build", lambda _acts, layout, extras, _house: built.append(extras) or layout.venvs
    )
    folder = layout.venvs / "one"
    folder.mkdir(parents=True)
    (folder / ".whole").write_text("cuda hub")
    venvs.switch(acts, layout, folder)
    for provider in (None, "openvino", "cuda", "cpu"):
        installation._environment(acts, layout, installation.Wishes("none", provider))
    assert built == [["cuda", "hub"], ["hub", "openvino"], ["cuda", "hub"], ["hub"]]


def test_a_provider_that_a_wheelhouse_does_not_bring_is_not_left_out_in_silence(
    acts: Acts, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[list[str]] = []
    monkeypatch.setattr(
        venvs, "build", lambda _acts, layout, extras, _house: built.append(extras) or layout.venvs
    )
    house = tmp_path / "house"
    house.mkdir()
    with pytest.raises(Failed, match=r"cuda.*scripts/lock/cuda\.txt"):
        installation._environment(acts, layout, installation.Wishes("none", "cuda", house))
    (house / "onnxruntime_gpu-1.whl").touch()
    for provider in ("cuda", "cpu"):
        installation._environment(acts, layout, installation.Wishes("none", provider, house))
    assert built == [["cuda"], []]


def test_a_jetson_is_not_given_packages_without_code_for_it(tmp_path: Path) -> None:
    hardware.check("cuda", tmp_path)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").touch()
    hardware.check("cpu", tmp_path)
    with pytest.raises(Failed, match="Jetson"):
        hardware.check("cuda", tmp_path)


def test_a_card_that_is_not_used_is_told_of(tmp_path: Path) -> None:
    cpus = frozenset({"cpu"})
    assert hardware.hint(cpus, tmp_path) is None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    told = hardware.hint(cpus, tmp_path)
    assert told is not None
    assert "--provider cuda" in told
    assert hardware.hint(frozenset({"cpu", "cuda"}), tmp_path) is None
    assert hardware.hint(frozenset(), tmp_path) is None
