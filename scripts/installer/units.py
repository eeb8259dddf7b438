"""The unit, what changes it on this machine, the user and the folders; and word to systemd."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from installer.acts import Acts, Failed, answer
from installer.layout import Layout

UNIT = "phid.service"
PROVIDER, MEMORY, STOP, CREDENTIALS = (
    "50-provider.conf", "60-memory.conf", "61-stop.conf", "70-credentials.conf",
)  # fmt: skip
DROP_INS = (PROVIDER, MEMORY, STOP, CREDENTIALS)
CREDENTIAL_NAMES = ("mqtt-username", "mqtt-password", "mqtt-ca", "mqtt-cert", "mqtt-key")
_WRITTEN = "# Written by scripts/install, anew each time: change it in another file.\n"
# The service itself, its threads and what SQLite keeps; 51 MB were measured.
_SERVICE_MB = 192
# The unit's TimeoutStopSec, and what a stop takes beside the draining: the engine's end, the
# journal's, and the broker's goodbye.
_STOP_S, _GOODBYE_S = 60, 20


def write(acts: Acts, layout: Layout) -> None:
    """The unit, the user's and the folders' files, as the checkout has them."""
    source = layout.checkout / "systemd"
    for path, name in (
        (layout.unit, UNIT),
        (layout.sysusers, "phid.sysusers"),
        (layout.tmpfiles, "phid.tmpfiles"),
    ):
        acts.write(path, (source / name).read_text(encoding="utf-8"))


def make_user_and_folders(acts: Acts, layout: Layout) -> None:
    """Have systemd make what the files say. Raises Failed."""
    acts.run("systemd-sysusers", layout.sysusers)
    acts.run("systemd-tmpfiles", "--create", layout.tmpfiles)


def write_drop_ins(
    acts: Acts, layout: Layout, settings: Mapping[str, Any], drop_in: str | None
) -> None:
    """What this machine's hardware, settings and secrets change in the unit.

    A drop-in for devices is not taken away again: it may have been put there by hand.
    """
    texts = {
        MEMORY: memory(settings),
        STOP: stop(settings),
        CREDENTIALS: credentials(layout.credentials),
    }
    if drop_in is not None:
        provider = layout.checkout / "systemd/provider" / f"{drop_in}.conf"
        texts[PROVIDER] = provider.read_text(encoding="utf-8")
    elif (layout.drop_ins / PROVIDER).exists():
        acts.say(f"{layout.drop_ins / PROVIDER} is kept, though nothing here needs it")
    for name, text in texts.items():
        if text is None:
            acts.remove(layout.drop_ins / name)
        else:
            acts.write(layout.drop_ins / name, text)


def memory(settings: Mapping[str, Any]) -> str | None:
    """Limits for the service and its engines from engine.budget_mb, or engine.memory_mb for each.

    None where neither is set. Above MemoryHigh the kernel slows them down and takes file pages
    back; at MemoryMax it ends an engine, which asks to be the one.
    """
    names = {settings.get("engine.model"), settings.get("engine.frame_model") or None}
    names |= set(settings.get("engine.models") or ())
    each_mb = int(settings.get("engine.memory_mb") or 0)
    engines_mb = int(settings.get("engine.budget_mb") or 0) or each_mb * len(names - {None})
    if not engines_mb:
        return None
    waiting = ("limits.backlog_bytes", "vision.parts_bytes")
    beside_mb = _SERVICE_MB + sum(int(settings.get(name) or 0) >> 20 for name in waiting)
    high_mb = engines_mb + beside_mb
    return (
        f"{_WRITTEN}# {engines_mb} for what runs models, {beside_mb} for the service and what waits"
        f" in it.\n[Service]\nMemoryHigh={high_mb}M\nMemoryMax={high_mb + high_mb // 10}M\n"
    )


def stop(settings: Mapping[str, Any]) -> str | None:
    """Time for a stop that may drain for longer than the unit gives it; None where that will do."""
    wanted_s = math.ceil(float(settings.get("limits.drain_s") or 0)) + _GOODBYE_S
    if wanted_s <= _STOP_S:
        return None
    why = f"# limits.drain_s, and {_GOODBYE_S} to end."
    return f"{_WRITTEN}{why}\n[Service]\nTimeoutStopSec={wanted_s}\n"


def credentials(folder: Path) -> str | None:
    """LoadCredential for each secret that is there; None without any.

    The assertion has systemd name the file that is missing, and not try again.
    """
    try:
        there = [name for name in CREDENTIAL_NAMES if (folder / name).is_file()]
    except PermissionError:  # a dry run without root
        there = []
    if not there:
        return None
    return "\n".join([
        _WRITTEN + "[Unit]",
        *(f"AssertPathExists={folder / name}" for name in there),
        "[Service]",
        *(f"LoadCredential={name}:{folder / name}" for name in there),
        "",
    ])  # fmt: skip


def check_credentials(layout: Layout) -> None:
    """Raises Failed, naming it, if a secret that the unit was given before is gone."""
    drop_in = layout.drop_ins / CREDENTIALS
    if not drop_in.exists():
        return
    for line in drop_in.read_text(encoding="utf-8").splitlines():
        if line.startswith("LoadCredential="):
            path = Path(line.partition(":")[2])
            try:
                there = path.is_file()
            except PermissionError:  # a dry run without root
                continue
            if not there:
                raise Failed(
                    f"the credential {path} is gone: put it back, or remove {drop_in} if it"
                    " is not wanted any more"
                )


def user_exists() -> bool:
    """Whether there is the daemon's user."""
    return answer("id", "-u", "phid")[0] == 0


def running() -> bool:
    """Whether systemd runs this machine: not in a chroot or an image that is being built."""
    return Path("/run/systemd/system").is_dir()


def properties(*names: str) -> dict[str, str]:
    """What systemd says of the unit now."""
    _, out, _ = answer("systemctl", "show", UNIT, "--property", ",".join(names))
    return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)


def started_at() -> float | None:
    """When the service's process was started, Unix seconds; None where none runs."""
    _, out, _ = answer(
        "systemctl", "show", UNIT, "--timestamp=unix", "--property", "ExecMainStartTimestamp"
    )
    stamp = out.strip().partition("=@")[2]
    return float(stamp) if stamp.isdigit() else None


def forgive() -> None:
    """Have systemd forget earlier failures: they count against StartLimitBurst."""
    answer("systemctl", "reset-failed", UNIT)  # of a unit that is not loaded there is nothing


def last_words() -> str:
    """The end of the unit's journal, indented."""
    _, out, _ = answer("journalctl", "-u", UNIT, "-n", "8", "-o", "cat", "--no-pager")
    return _indented(out.splitlines())


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"    {line[:300]}" for line in lines)
