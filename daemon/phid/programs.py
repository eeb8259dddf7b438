"""How a module of phid's is started as a program: the command, and where it finds phid."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def command(module: str) -> tuple[str, ...]:
    """The command that runs a module, on the interpreter that runs this.

    Nothing is imported from the folder it is started in (-P), which may be anybody's.
    """
    return (sys.executable, "-P", "-m", module)


def environment() -> dict[str, str]:
    """Our environment for such a program, which is to find the same phid.

    A checkout may be on our path in a way that the program does not share: PYTHONPATH names it. An
    installed phid is found anyway, and site-packages must not come before the standard library.
    """
    if _ROOT.name in {"site-packages", "dist-packages"}:
        return dict(os.environ)
    paths = [str(_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
