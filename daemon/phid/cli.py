"""The command line: phid run, ask, fleet, doctor, config, models, acl, broker."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from phid import __version__, acl, ask, doctor, fleet, lineup, log, origins, shelf
from phid import settings as settings_module
from phid.client import Unreachable
from phid.settings import Settings, SettingsError

EXIT_USAGE = 2
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h: systemd shows it by name

_EPILOG = """\
settings: --config FILE, else $PHID_CONFIG, else /etc/phid/phid.toml; any of them as PHID_*,
such as PHID_MQTT__HOST for mqtt.host.

  phid run                                the daemon
  phid ask "Why is the sky blue?"         a request, its answer streamed
  phid fleet --once                       who is there
  phid doctor                             what is wrong here, and what mends it
  phid config show                        every setting, and where it comes from
  phid models fit                         which model this machine should run
  phid models pull phi-3.5-mini           fetch one
  phid models prepare demo                a small real model to try it with
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command: its exit status."""
    options = _parser().parse_args(arguments)
    log.configure("error")  # structlog's own default is to print everything on stdout
    try:
        if hasattr(options, "examine"):  # it reads the settings itself, for they may be wrong
            return int(options.examine(options))
        settings = _settings(options)
        command: Callable[[Settings, argparse.Namespace], int] = options.command
        return command(settings, options)
    except SettingsError as error:
        print(f"phid: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except Unreachable as error:
        print(f"phid: {error} (mqtt.host, mqtt.port or --host, --port)", file=sys.stderr)
        return ask.EXIT_UNREACHABLE
    except BrokenPipeError:  # the reader of our output has had enough
        sys.stdout = None
        return 0


def _run(settings: Settings, options: argparse.Namespace) -> int:
    from phid import operations, service  # noqa: PLC0415 - the clients start faster without it

    log.configure(settings.log.level, settings.log.format)
    daemon = service.Service(
        settings, lambda: _settings(options, settings_module.load_again), lineup.read(settings)
    )
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(
                getattr(signal, name),
                lambda number, _frame: daemon.post_signal(signal.Signals(number).name),
            )
    status = daemon.run()
    if status == operations.RESTART_STATUS:
        os.execv(sys.executable, [sys.executable, "-m", "phid", *sys.argv[1:]])  # noqa: S606
    return status


def _ask(settings: Settings, options: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    try:
        images = _images(options)
    except (OSError, ValueError) as error:
        print(f"phid ask: {error}", file=sys.stderr)
        return EXIT_USAGE
    fields = ask.request_fields(
        prompt,
        system=options.system,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        images=images,
        detail=options.detail,
        model=options.model,
    )
    question = ask.Question(
        settings.device,
        fields,
        timeout_s=options.timeout,
        wait=options.wait,
        as_json=options.json,
        client=options.client,
    )
    try:
        return ask.ask(settings.mqtt, question, sys.stdout, sys.stderr)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(level) for level in first["loc"])
        print(f"phid ask: {name}: {first['msg']}", file=sys.stderr)
        return EXIT_USAGE


def _images(options: argparse.Namespace) -> list[tuple[str, bytes]]:
    """The pictures to send, each with its label. Raises OSError or ValueError, with what to say."""
    images = [(path.name, path.read_bytes()) for path in options.image]
    if options.video or options.camera:
        from phid import clips  # noqa: PLC0415 - it brings OpenCV, which only this needs

        count, every_s = options.frames, options.every
        for film in options.video:
            images += [(still.label, still.jpeg) for still in clips.of_film(film, count)]
        if options.camera:
            stills = clips.of_camera(options.camera, count, every_s)
            images += [(still.label, still.jpeg) for still in stills]
    return images


def _fleet(settings: Settings, options: argparse.Namespace) -> int:
    while True:
        seen = fleet.look(settings.mqtt, wait_s=options.wait)
        if options.json:
            print(json.dumps([device.row() for device in seen.devices()]))
        elif seen.devices():
            print(fleet.table(seen))
        else:
            print(f"no device answered under {settings.mqtt.base}", file=sys.stderr)
        if options.once:
            return 0 if seen.devices() else ask.EXIT_NO_ANSWER
        sys.stdout.flush()
        time.sleep(options.every)


def _doctor(options: argparse.Namespace) -> int:
    asked = doctor.Asked(lambda: _settings(options), options.config, options.wait)
    return doctor.run(asked, sys.stdout, as_json=options.json)


def _config_show(settings: Settings, options: argparse.Namespace) -> int:
    found = origins.of(settings, options.config, _on_command_line(options))
    print(origins.as_json(found) if options.json else origins.as_toml(found))
    return 0


def _config_check(settings: Settings, options: argparse.Namespace) -> int:
    del settings  # to be here is to have passed
    file = settings_module.source(options.config)
    print(f"{file} is sound" if file.exists() else f"there is no {file}: the defaults hold")
    return 0


def _acl(settings: Settings, options: argparse.Namespace) -> int:
    fleet = acl.Fleet(
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
        print(acl.WRITERS[options.broker](acl.members(fleet)), end="")
    except ValueError as error:
        print(f"phid acl: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _broker(settings: Settings, options: argparse.Namespace) -> int:
    from phid import embedded  # noqa: PLC0415 - needs what phid[demo] brings

    host = options.host or "127.0.0.1"
    return embedded.run(host, options.port or settings.mqtt.port)


def _add_ask(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    parents: list[argparse.ArgumentParser],
) -> None:
    statuses = "\n".join(f"  {status:3}  {meaning}" for status, meaning in ask.EXITS.items())
    asks = commands.add_parser(
        "ask",
        parents=parents,
        help="send a request and stream its answer",
        description="Send a request and stream its answer to stdout; the summary goes to stderr.",
        epilog=f"exit status:\n{statuses}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    asks.add_argument("prompt", help="what to ask; - reads it from stdin")
    asks.add_argument("--system", help="the system turn")
    asks.add_argument("--model", metavar="NAME", help="one of out/info's models")
    asks.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of the answer")
    asks.add_argument("--temperature", type=float, metavar="T", help="0 (default) is greedy")
    asks.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a picture to look at; may come several times",
    )
    asks.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help="frames from evenly spread places of a film, in one request",
    )
    asks.add_argument(
        "--camera",
        metavar="N",
        help="frames of a local camera: its number, device file or address",
    )
    asks.add_argument(
        "--frames", type=_count, default=4, metavar="K", help="of each film or camera (default 4)"
    )
    asks.add_argument(
        "--every", type=float, default=1.0, metavar="S", help="between a camera's (default 1)"
    )
    asks.add_argument("--detail", metavar="D", help="low, auto (default), high, or crops 1 to 16")
    asks.add_argument("--client", metavar="NAME", help="our level in the topics (default: random)")
    asks.add_argument("--timeout", type=float, default=120.0, metavar="S", help="default 120")
    asks.add_argument(
        "--wait", action="store_true", help="ask again until a device takes it, or time is up"
    )
    asks.add_argument("--json", action="store_true", help="print the outcome's JSON, nothing else")
    asks.set_defaults(command=_ask)


def _add_acl(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    parents: list[argparse.ArgumentParser],
) -> None:
    acls = commands.add_parser(
        "acl",
        parents=parents,
        help="write the broker's access list, by role",
        description="Writes who may publish and hear what, for mosquitto's acl_file or EMQX 5's "
        "acl.conf, to stdout. A name is the broker's user (with client certificates: the CN) and "
        "the level in the topics at once. Cameras' topics, of the watches too, and "
        "mqtt.reply_allow are taken from the settings.",
    )
    acls.add_argument("broker", choices=list(acl.WRITERS))
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
    acls.set_defaults(command=_acl)


def _camera(text: str) -> tuple[str, str]:
    """A user and a topic filter."""
    name, _, topic = text.partition("=")
    if not topic:
        raise argparse.ArgumentTypeError("must be NAME=FILTER, such as frigate=frigate/#")
    return name, topic


def _count(text: str) -> int:
    """At least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _on_command_line(options: argparse.Namespace) -> list[str]:
    """The settings that the command line puts over the others."""
    names = {"host": "mqtt.host", "port": "mqtt.port", "device": "device"}
    return [name for option, name in names.items() if getattr(options, option, None)]


def _settings(
    options: argparse.Namespace, load: Callable[[Path | None], Settings] = settings_module.load
) -> Settings:
    """The settings, with what the command line says put over them."""
    settings = load(options.config)
    mqtt = {name: value for name in ("host", "port") if (value := getattr(options, name, None))}
    update: dict[str, object] = {"mqtt": settings.mqtt.model_copy(update=mqtt)}
    if isinstance(getattr(options, "device", None), str):
        update["device"] = options.device
    settings = settings.model_copy(update=update)
    try:
        settings.topics  # noqa: B018 - its constructor is the check
    except ValueError as error:
        raise SettingsError(str(error)) from None
    return settings


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--config", type=Path, metavar="FILE", help="the settings file")
    wire = argparse.ArgumentParser(add_help=False)
    wire.add_argument("--host", help="the broker's host (mqtt.host)")
    wire.add_argument("--port", type=int, help="the broker's port (mqtt.port)")
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", help="the device's name (device)")

    parser = argparse.ArgumentParser(
        prog="phid",
        description="Small language and vision models on devices, asked and answered over MQTT.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"phid {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        parents=[shared, wire, device],
        help="run the daemon in the foreground",
        description="Run the daemon in the foreground; it starts without a broker and without a "
        "model, and waits for both.",
        epilog="""\
SIGTERM, SIGINT  finish what was accepted (limits.drain_s at most), then end; twice: at once
SIGHUP           read the settings again

exit status:
    0  stopped
   75  another client has connected with our client id
   78  the settings cannot be used
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(command=_run)

    _add_ask(commands, [shared, wire, device])

    fleets = commands.add_parser(
        "fleet",
        parents=[shared, wire],
        help="show the devices, their state and their numbers",
        description="Ask every device under mqtt.base for its status, info and health, and show "
        "them as a table, again and again until Ctrl-C.",
    )
    fleets.add_argument("--once", action="store_true", help="look once and exit")
    fleets.add_argument("--json", action="store_true", help="as a JSON array")
    fleets.add_argument(
        "--wait", type=float, default=3.0, metavar="S", help="gather for so long (default 3)"
    )
    fleets.add_argument(
        "--every", type=float, default=5.0, metavar="S", help="look again after (default 5)"
    )
    fleets.set_defaults(command=_fleet)

    doctors = commands.add_parser(
        "doctor",
        parents=[shared, wire, device],
        help="find what is wrong, and what mends it",
        description="Looks at everything that an answer needs. Exit status 1 if anything is bad.",
    )
    doctors.add_argument("--json", action="store_true", help="as a JSON object")
    doctors.add_argument(
        "--wait", type=float, default=4.0, metavar="S", help="for the engine to load (default 4)"
    )
    doctors.set_defaults(examine=_doctor)

    configs = commands.add_parser("config", help="show and check the settings")
    config_commands = configs.add_subparsers(required=True, metavar="COMMAND")
    show = config_commands.add_parser(
        "show",
        parents=[shared, wire, device],
        help="every setting in force, and where it comes from",
    )
    show.add_argument("--json", action="store_true", help="as a JSON object")
    show.set_defaults(command=_config_show)
    check = config_commands.add_parser(
        "check", parents=[shared], help=f"name every mistake; exit status {EXIT_CONFIG} if any"
    )
    check.set_defaults(command=_config_check)

    shelf.add_parser(commands, [shared])

    _add_acl(commands, [shared])

    broker = commands.add_parser(
        "broker",
        parents=[shared, wire],
        help="run the embedded MQTT 5 broker, for trying things out",
        description="An embedded MQTT 5 broker on loopback: for trying phid, not for a fleet.",
    )
    broker.set_defaults(command=_broker)
    return parser
