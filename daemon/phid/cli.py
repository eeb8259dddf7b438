"""The command line: phid run, ask, chat, fleet, doctor, config, models, acl, broker."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from phid import (
    __version__,
    acl,
    amounts,
    ask,
    dialogue,
    doctor,
    exits,
    fleet,
    lineup,
    log,
    origins,
    programs,
    shelf,
    store,
)
from phid import settings as settings_module
from phid.client import Unreachable
from phid.settings import Settings, SettingsError

_EPILOG = """\
settings: --config FILE, else $PHID_CONFIG, else /etc/phid/phid.toml; any of them as PHID_*,
such as PHID_MQTT__HOST for mqtt.host.

  phid run                                the daemon
  phid ask "Why is the sky blue?"         a request, its answer streamed
  phid chat                               a conversation, line by line
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
            return int(options.examine(lambda: _settings(options), options))
        settings = _settings(options)
        command: Callable[[Settings, argparse.Namespace], int] = options.command
        return command(settings, options)
    except SettingsError as error:
        print(f"phid: {error}", file=sys.stderr)
        return exits.CONFIG
    except Unreachable as error:
        print(f"phid: {error} (mqtt.host, mqtt.port or --host, --port)", file=sys.stderr)
        return exits.UNREACHABLE
    except KeyboardInterrupt:
        print(file=sys.stderr)  # behind the terminal's ^C
        return exits.INTERRUPTED
    except BrokenPipeError:  # the reader of our output has had enough
        sys.stdout = None
        return 0


def _run(settings: Settings, options: argparse.Namespace) -> int:
    from phid import operations, service  # noqa: PLC0415 - the clients start faster without it

    log.configure(settings.log.level, settings.log.format)
    store.put_back(settings.models_dir)
    try:
        models = lineup.read(settings)
    except PermissionError as error:
        says = f"this user may not look at {error.filename}: give it the right to, or set another"
        raise SettingsError(f"models_dir: {says}") from None
    daemon = service.Service(
        settings, lambda: _settings(options, settings_module.load_again), models
    )
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(
                getattr(signal, name),
                lambda number, _frame: daemon.post_signal(signal.Signals(number).name),
            )
    status = daemon.run()
    if status == operations.RESTART_STATUS:
        again = [*programs.command("phid"), *sys.argv[1:]]
        os.execve(sys.executable, again, programs.environment())  # noqa: S606
    return status


def _config_show(settings: Settings, options: argparse.Namespace) -> int:
    found = origins.of(settings, options.config, _on_command_line(options))
    print(origins.as_json(found) if options.json else origins.as_toml(found))
    return 0


def _config_check(settings: Settings, options: argparse.Namespace) -> int:
    del settings  # loading them was the check
    file = settings_module.source(options.config)
    print(f"{file} is sound" if file.exists() else f"there is no {file}: the defaults hold")
    return 0


def _broker(settings: Settings, options: argparse.Namespace) -> int:
    from phid import embedded  # noqa: PLC0415 - needs what phid[demo] brings

    host = options.host or "127.0.0.1"
    return embedded.run(host, options.port or settings.mqtt.port)


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
    wire.add_argument("--port", type=amounts.port, help="the broker's port (mqtt.port)")
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

    ask.add_parser(commands, [shared, wire, device])
    dialogue.add_parser(commands, [shared, wire, device])
    fleet.add_parser(commands, [shared, wire])
    doctor.add_parser(commands, [shared, wire, device])
    _add_config(commands, shared, [wire, device])
    shelf.add_parser(commands, [shared])
    acl.add_parser(commands, [shared])

    broker = commands.add_parser(
        "broker",
        parents=[shared, wire],
        help="run the embedded MQTT 5 broker, for trying things out",
        description="An embedded MQTT 5 broker on loopback: for trying phid, not for a fleet.",
    )
    broker.set_defaults(command=_broker)
    return parser


def _add_config(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    shared: argparse.ArgumentParser,
    over: list[argparse.ArgumentParser],
) -> None:
    configs = commands.add_parser("config", help="show and check the settings")
    below = configs.add_subparsers(required=True, metavar="COMMAND")
    show = below.add_parser(
        "show", parents=[shared, *over], help="every setting in force, and where it comes from"
    )
    show.add_argument("--json", action="store_true", help="as a JSON object")
    show.set_defaults(command=_config_show)
    check = below.add_parser(
        "check", parents=[shared], help=f"name every mistake; exit status {exits.CONFIG} if any"
    )
    check.set_defaults(command=_config_check)
