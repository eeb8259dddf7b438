"""An installation from its first file to a daemon that is well, and back where it is not."""

from __future__ import annotations

import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path

from installer import configuration, hardware, health, models, systems, units, venvs
from installer.acts import Acts, Failed
from installer.layout import Layout

_COMMAND = """\
#!/bin/sh
# Written by scripts/install. For root, with the secrets and the state that the service has.
if [ "$(id -u)" = 0 ]; then
    : "${CREDENTIALS_DIRECTORY:=/etc/phid/credentials}" "${STATE_DIRECTORY:=/var/lib/phid}"
    export CREDENTIALS_DIRECTORY STATE_DIRECTORY
fi
exec /opt/phid/.venv/bin/phid "$@"
"""

_NO_CONTROLLER = (
    "this kernel has no memory controller (Raspberry Pi OS: append cgroup_enable=memory to the line"
    " in /boot/firmware/cmdline.txt, and reboot)"
)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the command line asks for; `model` as `models.provide` takes it.

    `provider` is whose packages are wanted beside the CPU's or in their place; None: those that
    the environment in use has.
    """

    model: str | None = None
    provider: str | None = None
    wheelhouse: Path | None = None
    limit_s: float = 300.0


@dataclass(frozen=True, slots=True)
class _Before:
    """How an installation was found: what to come back to. `seen` is None without a systemd."""

    seen: health.Seen | None
    enabled: bool

    @classmethod
    def of(cls, layout: Layout) -> _Before:
        """That of now."""
        seen = health.look(layout, _device(layout)) if units.running() else None
        return cls(seen, layout.wanted.is_symlink())


def install(acts: Acts, layout: Layout, wishes: Wishes) -> bool:
    """Install, or bring an installation up to this checkout: True if the daemon is online.

    Raises Failed; an installation that was there is then as it was before.
    """
    system = systems.of(layout.root)
    acts.say(system.says)
    system.check()
    _check_writable(acts, layout)
    units.check_credentials(layout)
    venvs.adopt(acts, layout)
    previous = venvs.current(layout)
    before = _Before.of(layout) if previous else None
    folder = _environment(acts, layout, wishes)
    phid = folder / "bin/phid"
    if phid.exists():  # a dry run has built none
        configuration.check(layout, phid)
    drop_in = _drop_in(acts, layout, phid)
    try:
        changed = _put_in_place(acts, layout, wishes, folder, drop_in)
        if acts.dry or not units.running():
            return _not_started(acts)
        seen = _start(acts, layout, wishes, before, changed=changed)
    except (Failed, OSError, KeyboardInterrupt) as failed:
        if before is not None:
            _roll_back(acts, layout, wishes, before, failed)
            if folder != previous:
                acts.remove(folder)
        raise
    venvs.prune(acts, layout, {folder, previous or folder})
    acts.say(f"phid {venvs.version(layout)}: {seen.says}")
    return seen.online


def uninstall(acts: Acts, layout: Layout, *, purge: bool) -> None:
    """Remove the program; the settings, the secrets, the state and the models only to `purge`."""
    if units.running() and layout.unit.exists():
        acts.run("systemctl", "disable", "--now", units.UNIT)
    acts.remove(layout.wanted)  # in a chroot nobody else does it
    for name in units.DROP_INS:
        acts.remove(layout.drop_ins / name)
    for path in (layout.unit, layout.sysusers, layout.tmpfiles):
        acts.remove(path)
    if _is_ours(layout.command):
        acts.remove(layout.command)
    acts.remove(layout.home)
    if layout.drop_ins.is_dir() and not any(layout.drop_ins.iterdir()):
        acts.remove(layout.drop_ins)
    if units.running():
        acts.run("systemctl", "daemon-reload")
    if not purge:
        acts.say(f"kept: {layout.config.parent}, {layout.state}; --purge removes them, too")
        return
    acts.remove(layout.drop_ins)
    acts.remove(layout.config.parent)
    acts.remove(layout.state)
    if layout.root == Path("/") and units.user_exists():
        acts.run("userdel", "phid")


def _environment(acts: Acts, layout: Layout, wishes: Wishes) -> Path:
    extras: set[str] = set()
    if (previous := venvs.current(layout)) is not None:
        extras |= set(venvs.extras_of(previous))
    if wishes.provider is not None:
        hardware.check(wishes.provider, layout.root)
        extras = extras - set(venvs.PROVIDERS) | {wishes.provider} - {venvs.CPU}
    # What fetches models is wanted of each device whose model is not brought to it.
    if models.is_to_be_fetched(layout, wishes.model):
        extras.add("hub")
    if wishes.wheelhouse is not None:
        if wishes.provider in extras and not venvs.brings(wishes.wheelhouse, wishes.provider):
            raise Failed(
                f"{wishes.wheelhouse} was not filled for {wishes.provider}: pip download into it"
                f" with -r scripts/lock/{wishes.provider}.txt too"
            )
        extras = {extra for extra in extras if venvs.brings(wishes.wheelhouse, extra)}
    if wishes.model == models.DEMO:
        extras.add("demo")
    there = [extra for extra in sorted(extras) if venvs.locks_of(layout, [extra])[1].exists()]
    return venvs.build(acts, layout, there, wishes.wheelhouse)


def _drop_in(acts: Acts, layout: Layout, phid: Path) -> str | None:
    """The file of systemd/provider that this environment and this machine need."""
    if not phid.exists():
        acts.say("which drop-in of systemd/provider is needed hangs on packages and devices")
        return None
    settings = configuration.settings(layout, phid)
    installed = hardware.installed(health.findings(layout, phid))
    if hint := hardware.hint(installed, layout.root):
        acts.say(hint)
    return hardware.drop_in(settings.get("providers", ("auto",)), installed, layout.root)


def _put_in_place(
    acts: Acts, layout: Layout, wishes: Wishes, folder: Path, drop_in: str | None
) -> bool:
    """Everything but the start: True if what runs has to be started anew for it."""
    phid = folder / "bin/phid"
    before = _starts_from(layout)
    units.write(acts, layout)
    units.make_user_and_folders(acts, layout)
    model = models.provide(acts, layout, phid, wishes.model)
    configuration.write(acts, layout, model)
    settings = configuration.settings(layout, phid)
    if model and settings and settings.get("engine.model") != model:
        acts.say(f'{layout.config} is yours: to run {model}, set model = "{model}" in [engine]')
    units.write_drop_ins(acts, layout, settings, drop_in)
    if (layout.drop_ins / units.MEMORY).exists() and not systems.has_memory_controller(layout.root):
        acts.say(f"{layout.drop_ins / units.MEMORY} holds nothing back: {_NO_CONTROLLER}")
    for name in ("README.md", "LICENSE"):
        text = (layout.checkout / name).read_text(encoding="utf-8")
        acts.write(layout.shipped / name, text)
    if not layout.command.exists() or _is_ours(layout.command):
        acts.write(layout.command, _COMMAND, 0o755)
    switched = venvs.switch(acts, layout, folder)
    return switched or before != _starts_from(layout)


def _start(
    acts: Acts, layout: Layout, wishes: Wishes, before: _Before | None, *, changed: bool
) -> health.Seen:
    """Start the daemon and see it well. Raises Failed."""
    if changed:
        acts.run("systemctl", "daemon-reload")
    acts.run("systemctl", "enable", "--quiet", units.UNIT)
    units.forgive()
    again = changed or _is_newer(layout, units.started_at())
    acts.run("systemctl", "restart" if again else "start", units.UNIT)
    device = _device(layout)
    expected = before is not None and before.seen is not None and before.seen.online
    well, seen = health.wait(
        lambda: health.look(layout, device),
        wishes.limit_s,
        wanted_online=expected,
        version=venvs.version(layout),
    )
    if not well:
        raise Failed(f"{seen.says}\n{units.last_words()}")
    return seen


def _roll_back(
    acts: Acts,
    layout: Layout,
    wishes: Wishes,
    before: _Before,
    failed: BaseException,
) -> None:
    """Put back what was there, and start it if it ran; an impatient Ctrl-C waits for that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    reason = str(failed) or type(failed).__name__
    acts.say(f"this does not work: {reason}\nback to what was there before")
    acts.restore()
    if not units.running():
        return
    acts.run("systemctl", "daemon-reload")
    if not before.enabled:
        acts.run("systemctl", "disable", "--quiet", units.UNIT)
    if before.seen is None or before.seen.active != "active":
        acts.run("systemctl", "stop", units.UNIT)
        acts.say("rolled back, and stopped as it was")
        return
    units.forgive()
    acts.run("systemctl", "restart", units.UNIT)
    device = _device(layout)
    well, seen = health.wait(
        lambda: health.look(layout, device), wishes.limit_s, wanted_online=before.seen.online
    )
    acts.say(f"rolled back: {seen.says}" + ("" if well else f"\n{units.last_words()}"))


def _not_started(acts: Acts) -> bool:
    if not acts.dry:
        acts.say("systemd does not run here: enabled, for the next start of this system")
    acts.run("systemctl", "enable", "--quiet", units.UNIT)
    if acts.dry:
        acts.run("systemctl", "restart", units.UNIT)
        acts.run("/opt/phid/.venv/bin/phid", "doctor")
    return True


def _device(layout: Layout) -> str:
    return str(configuration.settings(layout, layout.phid).get("device", ""))


def _starts_from(layout: Layout) -> dict[Path, bytes | int | None]:
    """What the daemon is started from, beside its environment; its models are looked for then."""
    files = [layout.unit, *sorted(layout.drop_ins.glob("*.conf"))]
    found: dict[Path, bytes | int | None] = {path: _content(path) for path in files}
    return found | {layout.models / name: mark for name, mark in models.seen(layout).items()}


def _is_newer(layout: Layout, started: float | None) -> bool:
    """Whether settings or secrets have been changed since the service was started."""
    if started is None:
        return False
    given = [layout.config, *(layout.credentials / name for name in units.CREDENTIAL_NAMES)]
    return any(path.stat().st_ctime // 1 > started for path in given if path.exists())


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _is_ours(command: Path) -> bool:
    return command.is_file() and b"Written by scripts/install" in command.read_bytes()


def _check_writable(acts: Acts, layout: Layout) -> None:
    """Raises Failed for a read-only /opt, /etc or /var, before anything is done."""
    if acts.dry:
        return
    for folder in (layout.home, layout.config.parent, layout.state, layout.unit.parent):
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        try:
            # By a name that nobody can have put a link at: one of the folders is the daemon's.
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise Failed(f"{there} cannot be written: {error.strerror}") from None
