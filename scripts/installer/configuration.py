"""The settings in /etc/phid: written once, and from then on the administrator's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from installer.acts import Acts, Failed, answer
from installer.layout import Layout


def rendered(layout: Layout, model: str = "") -> str:
    """The checkout's config/phid.toml with the places of an installed daemon."""
    text = (layout.checkout / "config/phid.toml").read_text(encoding="utf-8")
    set_here = {"models_dir": "/var/lib/phid/models", "state_dir": "/var/lib/phid"}
    if model:
        set_here["model"] = model
    for key, value in set_here.items():
        text, count = re.subn(
            rf"^#{key} = .*$", f"{key} = {json.dumps(value)}", text, flags=re.MULTILINE
        )
        assert count == 1, key
    return text


def write(acts: Acts, layout: Layout, model: str) -> None:
    """Write the settings where there are none; else put changed defaults beside them."""
    shipped, text = layout.shipped / "phid.toml", rendered(layout)
    known = shipped.read_text(encoding="utf-8") if shipped.exists() else None
    if not layout.config.exists():
        acts.write(layout.config, rendered(layout, model))
    elif text not in (known, layout.config.read_text(encoding="utf-8")):
        acts.write(layout.config.with_name("phid.toml.new"), text)
        acts.say(f"this version's defaults are in {layout.config}.new; yours stay in force")
    acts.write(shipped, text)


def check(layout: Layout, phid: Path) -> None:
    """Raises Failed, with what is wrong, if this phid cannot use the settings that are there."""
    if not layout.config.exists():
        return
    status, _, says = answer(phid, "config", "check", "--config", layout.config)
    if status:
        reason = says.strip().removeprefix("phid: ")
        raise Failed(f"{layout.config} cannot be used; mend it and run this again:\n{reason}")


def settings(layout: Layout, phid: Path) -> dict[str, Any]:
    """Every setting by its dotted name, as this phid reads them; nothing where it cannot."""
    status, out, _ = answer(phid, "config", "show", "--json", "--config", layout.config)
    if status:
        return {}
    return {name: entry["value"] for name, entry in json.loads(out).items()}
