"""The command line of scripts/install."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from installer import health, units, venvs
from installer.acts import Acts, Failed, answer
from installer.installation import Wishes, install, uninstall
from installer.layout import Layout

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_ONLINE = 3
EXIT_INTERRUPTED = 130

_EPILOG = """\
Run again, it changes what has to change and nothing else. Settings, once they are in /etc/phid,
are yours: changed defaults are put beside them as phid.toml.new.

exit status:
  0  installed, and online (or removed)
  1  it could not be done; what was installed before runs as before
  2  wrong use
  3  installed, and not online: the doctor says why
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks: the exit status."""
    options = _parser().parse_args(arguments)
    layout = Layout(Path(__file__).resolve().parents[2], options.root)
    acts = Acts(dry=options.dry_run)
    if options.purge and not options.uninstall:
        print("scripts/install: --purge goes with --uninstall", file=sys.stderr)
        return EXIT_USAGE
    if os.geteuid() != 0 and not acts.dry:
        print("scripts/install: needs root: sudo scripts/install", file=sys.stderr)
        return EXIT_USAGE
    # A connection that breaks must not leave half of an upgrade; Ctrl-C and SIGTERM roll it back.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.uninstall:
            uninstall(acts, layout, purge=options.purge)
            return 0
        if options.upgrade and not layout.venv.exists():
            raise Failed(f"there is nothing to upgrade: no {layout.venv}")
        model = options.model or ("none" if options.upgrade else None)
        wheelhouse = options.offline.resolve() if options.offline else None
        online = install(acts, layout, Wishes(model, options.provider, wheelhouse, options.limit))
    except (Failed, OSError) as error:
        print(f"scripts/install: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("scripts/install: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    if acts.dry or not units.running():
        return 0
    _, says, _ = answer(
        layout.phid, "doctor", "--config", layout.config, env=health.secrets(layout)
    )
    print(says, end="")
    return 0 if online else EXIT_NOT_ONLINE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/install",
        allow_abbrev=False,  # scripts/install looks for whole words, too
        description="phid as a system service: its own Python environment in /opt/phid from"
        " hash-locked packages, a user, settings in /etc/phid, a hardened unit, a model; started,"
        " and looked at by its doctor.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        metavar="NAME|FOLDER|demo|none",
        help="a model of the catalog, a folder to copy, a small one to try with, or none;"
        " without: what is there, else what fits this machine",
    )
    parser.add_argument(
        "--provider",
        choices=venvs.PROVIDERS,
        help="whose packages to install: cuda in place of the CPU's (2.5 GB more), openvino or qnn"
        " beside them; without: those that are installed, else the CPU's",
    )
    parser.add_argument(
        "--offline",
        type=Path,
        metavar="WHEELHOUSE",
        help="take packages from this folder alone (pip download --require-hashes"
        " --only-binary :all: -d WHEELHOUSE -r scripts/lock/run.txt)",
    )
    parser.add_argument(
        "--upgrade",
        action="store_true",
        help="only what is installed already, its model and settings as they are; rolled back"
        " if it does not become as healthy as it was",
    )
    parser.add_argument(
        "--limit", type=float, default=300.0, metavar="S", help="for that (default 300)"
    )
    parser.add_argument("--uninstall", action="store_true", help="keeps settings, state, models")
    parser.add_argument("--purge", action="store_true", help="with --uninstall: removes them, too")
    parser.add_argument("--dry-run", action="store_true", help="say every act, do none")
    parser.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)
    return parser
