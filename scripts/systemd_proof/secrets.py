"""What scripts/install and phid.service promise of secrets: given, missed, rotated."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

from authority import Authority  # where the tests have it
from systemd_proof.machine import (
    CONFIG,
    CREDENTIALS,
    DROP_INS,
    UNIT,
    SecureBroker,
    install,
    online,
    pid,
    run,
    show,
    start_anew,
    until,
    words,
)

_PASSWORD, _AUTHORITY = CREDENTIALS / "mqtt-password", CREDENTIALS / "mqtt-ca"
_SECURE = {
    "#port = 1883": f"port = {SecureBroker.PORT}",
    '#username = "porch"': 'username = "porch"',
    "#tls = false": "tls = true",
    "#reconnect_max_s = 60": "reconnect_max_s = 1",
    "#credentials_dir =": "credentials_dir =",
}


def a_credential_reaches_it_and_a_missing_one_is_named() -> str:
    secret = CREDENTIALS / "mqtt-password"
    secret.write_text("of no use to this broker\n")
    secret.chmod(0o600)
    status, said = install()
    assert status == 0, said
    (loaded,) = Path("/run/credentials").glob(f"{UNIT}/mqtt-password")
    assert loaded.read_text() == secret.read_text()
    wall = time.time()
    secret.unlink()
    status, said = install("--upgrade")
    assert status == 1
    assert f"the credential {secret} is gone: put it back" in said, said
    run("systemctl", "restart", UNIT, check=False)
    assert show("ActiveState") != "active"
    assert f"AssertPathExists={secret}" in run("systemctl", "status", UNIT, check=False) + words(
        wall
    )
    (DROP_INS / "70-credentials.conf").unlink()
    run("systemctl", "daemon-reload")
    start_anew()
    return said.strip().splitlines()[-1].removeprefix("scripts/install: ")


def a_rotated_password_and_authority_are_taken_without_a_restart() -> str:
    good = CONFIG.read_text()
    folder = Path("/var/tmp/broker")  # noqa: S108 - a machine for this alone
    folder.mkdir()
    first, second = (Authority(folder / name, name) for name in ("first", "second"))
    broker = SecureBroker(folder)
    rotations = (
        ("a second password", first, "not authori[sz]ed|bad user name"),
        ("a second password", second, "is not trusted"),
    )
    try:
        _give("a first password", first)
        CONFIG.write_text(_changed(good))
        broker.start("a first password", first)
        run("systemctl", "restart", UNIT)
        online(port=SecureBroker.PLAIN_PORT)
        before, restarts = pid(), show("NRestarts")
        for password, authority, refusal in rotations:
            broker.stop()
            wall = time.time()
            broker.start(password, authority)
            until(lambda r=refusal, w=wall: re.search(r, words(w), re.IGNORECASE), what=refusal)
            _give(password, authority)
            online(port=SecureBroker.PLAIN_PORT)
            assert (pid(), show("NRestarts")) == (before, restarts)
        assert not re.search("a (first|second) password", words(0))
    finally:
        broker.stop()
        CONFIG.write_text(good)
        for path in (_PASSWORD, _AUTHORITY):
            path.unlink()
        shutil.rmtree(folder)
    start_anew()
    return "a password, then an authority; each first refused, then let in, by one process"


def _changed(settings: str) -> str:
    """With a secure broker, and secrets that are files for the group: what README says."""
    for default, setting in _SECURE.items():
        assert settings.count(default) == 1, default
        settings = settings.replace(default, setting)
    return settings


def _give(password: str, authority: Authority) -> None:
    for path, text in ((_PASSWORD, password), (_AUTHORITY, authority.certificate.read_text())):
        path.write_text(text)
        path.chmod(0o640)
        shutil.chown(path, group="phid")
