"""Run by scripts/install with the Python that it has found: python3 scripts/installer."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from installer.commands import main  # noqa: E402 - found by the line above

sys.exit(main())
