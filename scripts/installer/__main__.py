"""Run by scripts/install with the Python that it has found: python3 scripts/installer."""

import sys
from pathlib import Path

_SCRIPTS = Path(__file__).resolve().parent.parent
# What phid knows of devices it knows by Python's own library alone.
sys.path[:1] = [str(_SCRIPTS), str(_SCRIPTS.parent / "daemon")]

from installer.commands import main  # noqa: E402 - found by the line above

sys.exit(main())
