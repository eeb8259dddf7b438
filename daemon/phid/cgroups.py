"""The control groups that this process is in: its own and those above, whose limits hold too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
OF_THIS_PROCESS = Path("/proc/self/cgroup")


def own(text: str) -> dict[str, PurePosixPath]:
    """Read the text of /proc/self/cgroup: key "" is v2's group, the others are v1 controllers."""
    groups = {}
    for line in text.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            groups[""] = PurePosixPath(path)
        elif controllers:
            groups |= {name: PurePosixPath(path) for name in controllers.split(",")}
    return groups


def folders(root: Path, group: PurePosixPath) -> Iterator[Path]:
    """The folder of a group's files, then that of each group above it.

    In a container the path can lie outside what is mounted here; the root's own file counts then.
    """
    inside = PurePosixPath(*group.parts[1:])
    for path in (inside, *inside.parents):
        yield root / path


def read(path: Path) -> str:
    """A file's text; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
