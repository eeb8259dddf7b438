"""Where everything stands on the machine, and in the checkout that it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one installation; `root` is / but in tests."""

    checkout: Path
    root: Path = Path("/")

    @property
    def home(self) -> Path:
        """All of the program: /opt/phid."""
        return self.root / "opt/phid"

    @property
    def venvs(self) -> Path:
        """An environment for each build, of which one is in use."""
        return self.home / "venvs"

    @property
    def venv(self) -> Path:
        """The link to the one in use: what phid.service starts."""
        return self.home / ".venv"

    @property
    def phid(self) -> Path:
        """The command of the environment in use."""
        return self.venv / "bin/phid"

    @property
    def shipped(self) -> Path:
        """What came with it, to read and to compare with."""
        return self.home / "shipped"

    @property
    def command(self) -> Path:
        """The administrator's command."""
        return self.root / "usr/local/bin/phid"

    @property
    def config(self) -> Path:
        """The settings: the administrator's own, once they are there."""
        return self.root / "etc/phid/phid.toml"

    @property
    def credentials(self) -> Path:
        """Secrets for the broker, a file each."""
        return self.root / "etc/phid/credentials"

    @property
    def state(self) -> Path:
        """The journal and what else the daemon remembers."""
        return self.root / "var/lib/phid"

    @property
    def models(self) -> Path:
        """A folder for each model."""
        return self.state / "models"

    @property
    def unit(self) -> Path:
        """The unit's file."""
        return self.root / "etc/systemd/system/phid.service"

    @property
    def wanted(self) -> Path:
        """The link that has it started with the machine."""
        return self.unit.parent / "multi-user.target.wants" / self.unit.name

    @property
    def drop_ins(self) -> Path:
        """What changes the unit on this machine: ours are named in `units`."""
        return self.root / "etc/systemd/system/phid.service.d"

    @property
    def sysusers(self) -> Path:
        """The user, for systemd-sysusers."""
        return self.root / "etc/sysusers.d/phid.conf"

    @property
    def tmpfiles(self) -> Path:
        """The folders, for systemd-tmpfiles."""
        return self.root / "etc/tmpfiles.d/phid.conf"
