"""What scripts/install promises of the model: the one that fits, fetched from the Hub.

The Hub is tests/hub_server on the machine's own loopback. What it has under a build's name is the
demo model: real, small, and not that build's weights.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import hub_server  # where the tests have it
from systemd_proof.machine import CHECKOUT, UNIT, install, online, pid, requester, run

DEMO = Path("/root/lent/models/smollm2-135m-instruct")
MODELS = Path("/var/lib/phid/models")
NOBODY = "http://127.0.0.1:9"  # discard, which nothing listens on
EXIT_NOT_ONLINE = 3


def without_the_hub_it_is_installed_all_the_same_and_says_how_to_go_on() -> str:
    _have_no_model()
    status, said = install(environment={"HF_ENDPOINT": NOBODY})
    assert status == EXIT_NOT_ONLINE, said
    (told,) = re.findall(r"^\S+ fits this machine, and could not be fetched:$", said, re.MULTILINE)
    assert "Connection refused" in said, said
    assert "later: phid models fit; sudo -u phid phid models pull NAME" in said, said
    assert "Traceback" not in said, said
    assert run("systemctl", "is-active", UNIT).strip() == "active"
    with requester() as client:
        reason = client.status("degraded")["reason"]
    return f"{told.rstrip(':')}; out/status: {reason}"


def the_model_that_fits_is_fetched_from_the_hub_and_answers() -> str:
    _have_no_model()
    with _hub() as hub:
        began = time.monotonic()
        status, said = install(environment={"HF_ENDPOINT": hub.endpoint})
        took_s = time.monotonic() - began
        sent_mb = hub.sent / 1e6
    assert status == 0, said
    (name,) = re.findall(r"/bin/phid models pull (\S+)$", said, re.MULTILINE)
    files = [path for path in (MODELS / name).rglob("*") if path.is_file()]
    assert {path.owner() for path in files} == {"phid"}, files
    assert (MODELS / name / "manifest.json") in files
    online()
    with requester() as client:
        assert client.status("online")["model"] == name
        text = client.ask("What is the capital of France?", max_tokens=16)["text"]
    assert "Paris" in text, text
    again, said = install(environment={"HF_ENDPOINT": NOBODY})
    assert again == 0, said
    assert f"models that are there already: {name}" in said, said
    return (
        f"{name} by phid models fit, {sent_mb:.0f} MB of a stand-in for it, online after"
        f" {took_s:.0f} s: {text!r}"
    )


def a_folder_that_only_root_reads_is_copied_and_replaced_by_the_daemons_user() -> str:
    _have_no_model()
    folder = Path("/root/closed/meadow")
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("manifest.json"))
    run("chmod", "-R", "go=", folder.parent)
    began = time.monotonic()
    status, said = install("--model", folder)
    took_s = time.monotonic() - began
    assert status == 0, said
    files = [path for path in (MODELS / folder.name).rglob("*") if path.is_file()]
    assert {path.owner() for path in files} == {"phid"}, files
    assert _answer() == (folder.name, True)
    before = pid()
    status, said = install("--model", folder)
    assert (status, pid()) == (0, before), said
    config = folder / "genai_config.json"
    config.write_text(config.read_text() + "\n")
    status, said = install("--model", folder)
    assert status == 0, said
    assert pid() != before, said
    assert (MODELS / folder.name / config.name).read_bytes() == config.read_bytes()
    assert _answer() == (folder.name, True)
    config.unlink()
    status, said = install("--model", folder)
    assert status == 1, said
    assert f"{folder} is no model: it has no genai_config.json" in said, said
    assert _answer() == (folder.name, True)
    shutil.rmtree(folder.parent)
    return f"online after {took_s:.0f} s; replaced when it changed; half a folder changes nothing"


def _answer() -> tuple[str, bool]:
    """The model that is told, and whether it knows what it is asked."""
    online()
    with requester() as client:
        name = client.status("online")["model"]
        text = client.ask("What is the capital of France?", max_tokens=16)["text"]
    return name, "Paris" in text


def _have_no_model() -> None:
    if list(MODELS.glob("*/genai_config.json")):
        status, said = install("--uninstall", "--purge")
        assert status == 0, said


@contextlib.contextmanager
def _hub() -> Iterator[hub_server.Hub]:
    """The Hub, which has each build for the CPU where the catalog says."""
    catalog = tomllib.loads((CHECKOUT / "daemon/phid/catalog.toml").read_text())
    files = {
        path.name: path.read_bytes() for path in DEMO.iterdir() if path.name != "manifest.json"
    }
    with hub_server.hub() as hub:
        for build in catalog["build"]:
            if build.get("source", "hub") == "hub" and "cpu" in build["providers"]:
                hub.commit(
                    build["repo"], {f"{build['folder']}/{name}": files[name] for name in files}
                )
        yield hub
