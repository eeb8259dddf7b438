"""phid acl: who may say and hear what, the rights of each role, written for a broker's ACL."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from phid import exits, topics
from phid.settings import Settings

Access = Literal["read", "write"]


@dataclass(frozen=True, slots=True)
class Right:
    """To read or to write what a topic filter covers."""

    access: Access
    topic: str


@dataclass(frozen=True, slots=True)
class Member:
    """One user of the broker, with the rights of its role."""

    name: str
    role: str
    rights: tuple[Right, ...]


@dataclass(frozen=True, slots=True)
class Fleet:
    """Who is there. Each name is both a user of the broker and a level in the topics.

    `cameras` are pairs of a user and the topic filter that it publishes to. `reads` and
    `writes` are what the devices' settings name beyond that: cameras' topics, and mqtt.reply_allow.
    """

    base: str
    devices: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    watchers: tuple[str, ...] = ()
    cameras: tuple[tuple[str, str], ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


def members(fleet: Fleet) -> tuple[Member, ...]:
    """Everyone with their rights. Raises ValueError for an invalid name or filter.

    A user has one role: else a client named like a device could speak as that device.
    """
    found = (
        *(Member(name, "device", _of_device(fleet, name)) for name in fleet.devices),
        *(Member(name, "client", _of_client(fleet.base, name)) for name in fleet.clients),
        *(Member(name, "operator", _of_operator(fleet.base, name)) for name in fleet.operators),
        *(Member(name, "watcher", _of_watcher(fleet.base)) for name in fleet.watchers),
        *(Member(name, "camera", (Right("write", topic),)) for name, topic in fleet.cameras),
    )
    seen: dict[str, str] = {}
    for member in found:
        if not topics.is_level(member.name):
            raise ValueError(f"{member.role} {member.name!r}: must be 1 to 64 of A-Z a-z 0-9 _ -")
        if member.name in {*topics.RESERVED_DEVICES, topics.ANON}:
            raise ValueError(f"{member.role} {member.name!r}: the wire itself has taken this name")
        if seen.setdefault(member.name, member.role) != member.role:
            roles = f"{seen[member.name]} and {member.role}"
            raise ValueError(f"{member.name} cannot be {roles}: give each role a user of its own")
    for topic in (*fleet.reads, *fleet.writes, *(topic for _, topic in fleet.cameras)):
        if not topics.is_filter(topic):
            raise ValueError(f"{topic!r} is no topic filter")
        if topics.overlap(topic, f"{fleet.base}/#") and topic not in fleet.writes:
            raise ValueError(f"{topic} covers topics of phid's own, below {fleet.base}")
    return _merged(found)


def mosquitto(everyone: Iterable[Member]) -> str:
    """The text of an acl_file: whoever is not in it may do nothing."""
    lines = [
        "# For mosquitto's acl_file: whoever is not named here, anonymous too, may do nothing.",
    ]
    for member in everyone:
        lines += ["", f"# {member.role}", f"user {member.name}"]
        lines += [f"topic {right.access} {right.topic}" for right in member.rights]
    return "\n".join(lines) + "\n"


def emqx(everyone: Iterable[Member]) -> str:
    """The text of an acl.conf of EMQX 5: the same rights, then a rule that denies all else."""
    lines = [
        "%% For EMQX 5, authorization of type file. The last rule denies whatever none allows:",
        "%% set authorization.no_match = deny as well.",
    ]
    for member in everyone:
        lines += ["", f"%% {member.role}"]
        for access, action in (("read", "subscribe"), ("write", "publish")):
            wanted = [_erlang(right.topic) for right in member.rights if right.access == access]
            if wanted:
                whom = f"{{username, {_erlang(member.name)}}}"
                lines.append(f"{{allow, {whom}, {action}, [{', '.join(wanted)}]}}.")
    return "\n".join((*lines, "", "{deny, all}.", ""))


WRITERS = {"mosquitto": mosquitto, "emqx": emqx}
"""The function that writes the rights, by the kind of broker."""


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    parents: list[argparse.ArgumentParser],
) -> None:
    """Give the command line `phid acl`."""
    acls = commands.add_parser(
        "acl",
        parents=parents,
        help="write the broker's access list, by role",
        description="Writes who may publish and hear what, for mosquitto's acl_file or EMQX 5's "
        "acl.conf, to stdout. A name is the broker's user (with client certificates: the CN) and "
        "the level in the topics at once. Cameras' topics, of the watches too, and "
        "mqtt.reply_allow are taken from the settings.",
    )
    acls.add_argument("broker", choices=list(WRITERS))
    for role, says in (
        ("device", "runs phid (default: the settings' device)"),
        ("client", "sends requests under its own name, and hears their answers"),
        ("operator", "sends commands (in/ctl), and sees what a watcher sees"),
        ("watcher", "hears status, info, health, events and watches; says nothing"),
    ):
        acls.add_argument(f"--{role}", action="append", default=[], metavar="NAME", help=says)
    acls.add_argument(
        "--camera",
        type=_camera,
        action="append",
        default=[],
        metavar="NAME=FILTER",
        help="publishes frames on these topics; every device hears them",
    )
    acls.set_defaults(command=_run)


def _run(settings: Settings, options: argparse.Namespace) -> int:
    fleet = Fleet(
        settings.mqtt.base,
        devices=tuple(options.device or [settings.device]),
        clients=tuple(options.client),
        operators=tuple(options.operator),
        watchers=tuple(options.watcher),
        cameras=tuple(options.camera),
        reads=(*settings.vision.camera_topics, *(watch.topic for watch in settings.watches)),
        writes=settings.mqtt.reply_allow,
    )
    try:
        print(WRITERS[options.broker](members(fleet)), end="")
    except ValueError as error:
        print(f"phid acl: {error}", file=sys.stderr)
        return exits.USAGE
    return 0


def _camera(text: str) -> tuple[str, str]:
    """A user and a topic filter."""
    name, _, topic = text.partition("=")
    if not topic:
        raise argparse.ArgumentTypeError("must be NAME=FILTER, such as frigate=frigate/#")
    return name, topic


def _of_device(fleet: Fleet, name: str) -> tuple[Right, ...]:
    mine = topics.Topics(fleet.base, name)
    seen = dict.fromkeys((*(topic for _, topic in fleet.cameras), *fleet.reads))
    return (
        *_rights("read", mine.filters),
        # What it publishes itself: `rivals` reads the status, and `phid doctor` runs as the device.
        *_rights("read", [f"{fleet.base}/{name}/out/#"]),
        *_rights("read", seen),
        *_rights("write", [f"{fleet.base}/{name}/out/#", f"{fleet.base}/client/+/#"]),
        # `loopback` sends a ping to this device itself, to prove that messages reach it.
        *_rights("write", [mine.ctl("ping"), *fleet.writes]),
    )


def _of_client(base: str, name: str) -> tuple[Right, ...]:
    asked = ("text/{}", "frame/{}", "part/{}/+/+", "cancel/{}")
    return (
        *_rights("write", [f"{base}/+/in/{kind.format(name)}" for kind in asked]),
        *_rights("read", [f"{base}/client/{name}/#", f"{base}/+/out/res/{name}/#"]),
        *_rights("read", [f"{base}/+/out/{what}" for what in ("status", "info")]),
    )


def _of_operator(base: str, name: str) -> tuple[Right, ...]:
    anon = f"{base}/+/out/res/{topics.ANON}/#"
    return (
        *_rights("write", [f"{base}/+/in/ctl/+", f"{base}/all/in/ctl/discover"]),
        # A command without a reply topic is answered as if `anon` had sent it.
        *_rights("read", [f"{base}/client/{name}/#", anon]),
        *_of_watcher(base),
    )


def _of_watcher(base: str) -> tuple[Right, ...]:
    told = ("status", "info", "health", "event", "watch/#")
    return _rights("read", [f"{base}/+/out/{what}" for what in told])


def _erlang(text: str) -> str:
    escaped = text.replace("\\", r"\\").replace('"', r"\"")
    return f'"{escaped}"'


def _rights(access: Access, filters: Iterable[str]) -> tuple[Right, ...]:
    return tuple(Right(access, topic) for topic in filters)


def _merged(found: Sequence[Member]) -> tuple[Member, ...]:
    """Each user once: a camera may publish below several filters."""
    merged: dict[str, Member] = {}
    for member in found:
        known = merged.get(member.name, Member(member.name, member.role, ()))
        rights = tuple(dict.fromkeys((*known.rights, *member.rights)))
        merged[member.name] = Member(member.name, member.role, rights)
    return tuple(merged.values())
