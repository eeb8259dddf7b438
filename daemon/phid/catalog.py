"""The builds that phid knows: where each comes from, what it weighs, and what it needs."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Provider = Literal["cpu", "cuda", "directml", "openvino", "qnn"]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

_COMMIT_DIGITS = 40
# huggingface_hub's own rule; that package may be missing where nothing is pulled.
_REPOSITORY = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KnownFile(_Frozen):
    """A file whose content is known beforehand; `name` is relative to the build's folder."""

    name: str
    sha256: Sha256


class Build(_Frozen):
    """One build of a model. A size of 0 is not known."""

    name: Name = Field(description="Its folder in models_dir, and what engine.model says.")
    title: str = Field("", description="What people call the model.")
    kind: Literal["text", "vision"] = Field("text", description="vision: it takes pictures.")
    source: Literal["hub", "demo", "builder"] = Field(
        "hub", description="hub: pulled; demo: made by phid; builder: made by `command`."
    )
    repo: str = Field("", description="The repository on the Hub.")
    revision: str = Field(
        "main", description="A commit; a branch is told as unpinned until the first pull."
    )
    folder: str = Field("", description="The build's folder in the repository.")
    files: tuple[KnownFile, ...] = Field((), description="Files whose hash is known.")
    size_bytes: int = Field(0, ge=0, description="All files together.")
    size_is_estimate: bool = Field(False, description="The size is reckoned, not told by the Hub.")
    context: int = Field(0, ge=0, description="Most tokens of prompt and answer.")
    providers: tuple[Provider, ...] = Field(("cpu",), description="Where it runs.")
    kv_bytes_per_token: int = Field(0, ge=0, description="The cache of one token.")
    layers: int = Field(0, ge=0, description="Layers of the decoder.")
    width: int = Field(0, ge=0, description="Numbers a token has between two layers.")
    vocabulary: int = Field(0, ge=0, description="Words of the embedding.")
    license: str = Field("unknown", description="As SPDX names it.")
    rank: int = Field(20, description="`fit` prefers the greater.")
    command: str = Field("", description="What makes it, where nobody offers it.")
    unsupported: str = Field("", description="Why phid cannot run it yet; empty: it can.")

    @property
    def pinned(self) -> bool:
        """True if the revision is a commit, which cannot change."""
        return len(self.revision) == _COMMIT_DIGITS and set(self.revision) <= set(
            "0123456789abcdef"
        )

    @property
    def sha256(self) -> dict[str, str]:
        """The hashes known beforehand, by file."""
        return {file.name: file.sha256 for file in self.files}


class Unknown(Exception):  # noqa: N818 - it is an answer
    """No build has this name; the message names the nearest."""


@cache
def shipped() -> tuple[Build, ...]:
    """The builds in phid's own catalog.toml, in its order."""
    text = resources.files("phid").joinpath("catalog.toml").read_text("utf-8")
    return tuple(Build.model_validate(entry) for entry in tomllib.loads(text)["build"])


def builds(own: Iterable[Build] = ()) -> tuple[Build, ...]:
    """All builds; a user's own one replaces the shipped one of the same name."""
    by_name = {build.name: build for build in (*shipped(), *own)}
    return tuple(by_name.values())


def find(name: str, own: Iterable[Build] = ()) -> Build:
    """The build of this name. Raises Unknown."""
    known = {build.name: build for build in builds(own)}
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "`phid models list --all` shows what is known"
    raise Unknown(f"there is no model {name} in the catalog: {hint}")


def is_repository(name: str) -> bool:
    """True for a valid name of a repository on the Hub: OWNER/NAME."""
    return _REPOSITORY.fullmatch(name) is not None


def check(own: Iterable[Build]) -> None:
    """Raises ValueError if the user's builds repeat a name, lack a repository or are the demo."""
    seen = set()
    for build in own:
        if build.name in seen:
            raise ValueError(f"{build.name} stands there twice")
        seen.add(build.name)
        if build.source == "hub" and not is_repository(build.repo):
            raise ValueError(f"{build.name} needs repo = OWNER/NAME, as the Hub has it")
        if build.source == "demo":
            raise ValueError(f"{build.name}: the demo model is phid's own")
