"""What proves who we are to the broker, and the broker to us: files, read at each connect."""

from __future__ import annotations

import os
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from phid.sections import Mqtt
from phid.settings import SettingsError
from phid.traffic import End, Ended

# OpenSSL's verification errors, x509_vfy.h.
_NOT_YET_VALID, _EXPIRED = 9, 10

# The names of files in the credentials directory, by the settings they stand in for.
NAMES = {
    "username": "mqtt-username",
    "password_file": "mqtt-password",
    "ca_file": "mqtt-ca",
    "cert_file": "mqtt-cert",
    "key_file": "mqtt-key",
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """User name, password and TLS context of one connection; each None where there is none."""

    username: str | None = None
    password: str | None = None
    tls: ssl.SSLContext | None = None


def read(mqtt: Mqtt) -> Credentials:
    """The credentials as the files hold them now, so that a rotated one is taken at reconnect.

    Raises SettingsError with the file's name, never its content.
    """
    name = username(mqtt)
    password = _text(path) if (path := find(mqtt, "password_file")) is not None else None
    return Credentials(name, password, _context(mqtt) if mqtt.tls else None)


def username(mqtt: Mqtt) -> str | None:
    """The user name alone. Raises SettingsError as `read` does."""
    if mqtt.username is None and (path := find(mqtt, "username")) is not None:
        return _text(path)
    return mqtt.username


def find(mqtt: Mqtt, setting: str) -> Path | None:
    """The file for a setting: the named one, else the one in the credentials directory.

    Raises SettingsError where this user may not look whether it is there.
    """
    named = getattr(mqtt, setting)
    if isinstance(named, Path):
        return named
    directory = mqtt.credentials_dir or os.environ.get("CREDENTIALS_DIRECTORY")
    path = Path(directory) / NAMES[setting] if directory else None
    try:
        return path if path is not None and path.exists() else None
    except OSError as error:
        raise SettingsError(f"mqtt.credentials_dir: {path}: {error.strerror}") from None


def not_trusted(where: str, error: ssl.SSLCertVerificationError, now: float) -> Ended:
    """Why the broker's certificate was not accepted; our clock may be the reason."""
    says = f"the certificate of {where} is not trusted: {error.verify_message}"
    if error.verify_code not in (_NOT_YET_VALID, _EXPIRED):
        return Ended(End.NOT_LET_IN, says)
    says += f", by this machine's clock, which says {_date(now)}"
    if error.verify_code == _EXPIRED:
        return Ended(End.NOT_LET_IN, says)
    # It passes once the clock is right: no reason for the long pause after a refusal.
    return Ended(End.UNREACHABLE, f"{says}; to set it: timedatectl set-ntp true")


def _context(mqtt: Mqtt) -> ssl.SSLContext:
    ca_file, cert_file, key_file = (find(mqtt, n) for n in ("ca_file", "cert_file", "key_file"))
    try:
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"mqtt.ca_file: {ca_file}: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if mqtt.alpn:
        context.set_alpn_protocols(list(mqtt.alpn))
    if cert_file is not None:
        try:
            # Without a password callback a locked key would ask the terminal for one.
            context.load_cert_chain(cert_file, key_file, password=lambda: "")
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(f"mqtt.cert_file, mqtt.key_file: {cert_file}: {error}") from None
    return context


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from None


def _date(ts: float) -> str:
    try:
        return time.strftime("%Y-%m-%d", time.gmtime(ts))
    except (OverflowError, OSError, ValueError):
        return f"{ts:.0f}"
