"""The model: one that is there, one that was named, or what `phid models fit` chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from installer.acts import Acts, Failed, answer
from installer.layout import Layout

NONE, DEMO = "none", "demo"
_READ_ALL = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
_LATER = "  later: phid models fit; sudo -u phid phid models pull NAME; systemctl restart phid"


def present(layout: Layout) -> list[str]:
    """The names of the models that are there."""
    try:
        return sorted(path.parent.name for path in layout.models.glob("[!.]*/genai_config.json"))
    except PermissionError:  # a dry run without root
        return []


def seen(layout: Layout) -> dict[str, int]:
    """The models that are there, each with a number that is another where it was replaced."""
    configs = (layout.models / name / "genai_config.json" for name in present(layout))
    return {path.parent.name: path.stat().st_ctime_ns for path in configs}


def is_to_be_fetched(layout: Layout, wanted: str | None) -> bool:
    """Whether the model is to come from the hub."""
    if wanted is None:
        return not present(layout)
    return wanted not in (NONE, DEMO) and not _is_folder(wanted) and wanted not in present(layout)


def provide(acts: Acts, layout: Layout, phid: Path, wanted: str | None) -> str:
    """Have the model there: its name, empty for none or the only one.

    What cannot be fetched is told, and is no reason not to install. Raises Failed for a name or
    folder that was asked for and cannot be had.
    """
    if wanted == NONE:
        return ""
    if wanted is None:
        if there := present(layout):
            acts.say(f"models that are there already: {', '.join(there)}")
            return ""
        return _fitting(acts, layout, phid)
    if wanted == DEMO:
        _as_phid(acts, layout, phid, "models", "prepare", "demo")
        return _if_several(layout, "smollm2-135m-instruct")
    if _is_folder(wanted):
        return _if_several(layout, _imported(acts, layout, phid, Path(wanted).resolve()))
    if wanted not in present(layout):
        _as_phid(acts, layout, phid, "models", "pull", wanted)
    return _if_several(layout, wanted)


def _is_folder(wanted: str) -> bool:
    folder = Path(wanted)
    return folder.is_absolute() or len(folder.parts) > 1 or folder.is_dir()


def _fitting(acts: Acts, layout: Layout, phid: Path) -> str:
    if acts.dry:
        print("would run phid models fit, and phid models pull with what it chooses", flush=True)
        return ""
    status, out, says = answer(phid, "models", "fit", "--json", env=_environment(layout))
    name = chosen(out) if status == 0 else None
    if name is None:
        # What it prints first is what it does; and no error is told where it has an answer.
        words = [] if out.strip() else says.strip().splitlines()
        reason = (words or ["nothing fits this machine"])[-1]
        acts.say(f"no model was chosen: {reason}\n{_LATER}")
        return ""
    try:
        _as_phid(acts, layout, phid, "models", "pull", name)
    except Failed as failed:
        acts.say(f"{name} fits this machine, and could not be fetched:\n{failed}\n{_LATER}")
    return ""


def chosen(out: str) -> str | None:
    """The name in what `phid models fit --json` printed."""
    try:
        name: Any = json.loads(out)["chosen"]
    except (ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and name else None


def _imported(acts: Acts, layout: Layout, phid: Path, folder: Path) -> str:
    """A copy in the store, for the service sees nobody's home: its name.

    Made by the daemon's user, who may read any file for this once: nothing is written as root where
    that user could have put a link.
    """
    if not (folder / "genai_config.json").is_file():
        raise Failed(f"{folder} is no model: it has no genai_config.json")
    if folder != (layout.models / folder.name).resolve():
        arguments = ("models", "import", "--replace", str(folder))
        _as_phid(acts, layout, phid, *arguments, rights=_READ_ALL)
    return folder.name


def _if_several(layout: Layout, name: str) -> str:
    """The settings need not name the only one."""
    return name if set(present(layout)) - {name} else ""


def _as_phid(
    acts: Acts, layout: Layout, phid: Path, *arguments: str, rights: tuple[str, ...] = ()
) -> None:
    drop = ("setpriv", "--reuid=phid", "--regid=phid", "--init-groups", *rights, "--")
    acts.run(*drop, phid, *arguments, env=_environment(layout), long=True)


def _environment(layout: Layout) -> dict[str, str]:
    return {
        "HOME": str(layout.state),
        "PHID_CONFIG": str(layout.config) if layout.config.exists() else "/dev/null",
        "PHID_MODELS_DIR": str(layout.models),
    }
