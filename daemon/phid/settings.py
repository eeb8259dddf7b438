"""All settings together: where they come from, and what they may be side by side."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import socket
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as UnparsableEnvironmentError

from phid import catalog, proven, providers, topics, watches
from phid.catalog import Build
from phid.errors import Refused
from phid.proofs import Wanted
from phid.sections import (
    Control,
    Engine,
    Health,
    Journal,
    Limits,
    Log,
    Mqtt,
    ProviderOptions,
    Section,
    Sessions,
    Stream,
    Vision,
)
from phid.watches import Watch

SYSTEM_FILE = Path("/etc/phid/phid.toml")
PREFIX = "PHID_"
# Names with our prefix that are no settings: where the file is, and what the tests use.
_OTHER_NAMES = frozenset({"PHID_CONFIG", "PHID_TEST_MODELS"})


class SettingsError(Exception):
    """The settings cannot be used; the message says which, why and what is nearest."""


class Settings(BaseSettings):
    """All settings: PHID_* wins over the file, the file over the defaults."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    device: str = Field(
        default_factory=lambda: topics.level_from(socket.gethostname().split(".")[0]),
        description="This device's level in every topic; from the host name when absent.",
    )
    models_dir: Path = Field(
        default_factory=lambda: default_models_dir(),  # noqa: PLW0108 - defined below
        description="Where models are kept.",
    )
    state_dir: Path = Field(
        default_factory=lambda: default_state_dir(),  # noqa: PLW0108 - defined below
        description="Where the daemon keeps what it must remember.",
    )
    providers: Annotated[tuple[str, ...], NoDecode] = Field(
        ("auto",),
        description="Where the model may run, in order: cuda, DirectML, QNN, OpenVINO, cpu; auto: "
        "each of them. The first that passes its proof runs it; the CPU is last anyway.",
    )
    require_provider: bool = Field(
        False,
        description="true: run on one that providers names (auto: any but the CPU) or not at all.",
    )
    watches: tuple[Watch, ...] = Field(
        (), description="Standing prompts on camera topics: a [[watches]] table for each."
    )
    catalog: tuple[Build, ...] = Field(
        (), description="Models of your own to pull: a [[catalog]] table for each."
    )
    mqtt: Mqtt = Mqtt()
    engine: Engine = Engine()
    provider_options: ProviderOptions = ProviderOptions()
    limits: Limits = Limits()
    sessions: Sessions = Sessions()
    control: Control = Control()
    vision: Vision = Vision()
    journal: Journal = Journal()
    stream: Stream = Stream()
    health: Health = Health()
    log: Log = Log()

    @field_validator("models_dir", "state_dir")
    @classmethod
    def _expand(cls, path: Path) -> Path:
        return path.expanduser()

    @field_validator("providers", mode="before")
    @classmethod
    def _provider_names(cls, value: Any) -> Any:
        if isinstance(value, str):  # of the environment: a list as JSON, or names with commas
            value = json.loads(value) if value.startswith("[") else value.split(",")
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            return value
        if not value:
            raise ValueError("name one at least, or auto")
        return tuple(providers.canonical(word) for word in value)

    @model_validator(mode="after")
    def _topics_are_legal(self) -> Settings:
        self.topics  # noqa: B018 - its constructor is the check
        return self

    @model_validator(mode="after")
    def _watches_can_run(self) -> Settings:
        try:
            watches.check_all(self.watches, self.mqtt.base, self.vision.max_images)
        except Refused as refused:
            raise ValueError(f"watches: {refused.failure.message}") from None
        return self

    @model_validator(mode="after")
    def _catalog_is_sound(self) -> Settings:
        try:
            catalog.check(self.catalog)
        except ValueError as error:
            raise ValueError(f"catalog: {error}") from None
        return self

    @model_validator(mode="after")
    def _cameras_are_others(self) -> Settings:
        for one in self.vision.camera_topics:
            if not topics.is_filter(one):
                raise ValueError(f"vision.camera_topics: {one} is no topic filter")
            if topics.overlap(one, f"{self.mqtt.base}/#"):
                raise ValueError(f"vision.camera_topics: {one} covers topics of our own")
        return self

    @property
    def topics(self) -> topics.Topics:
        """The topics of this device."""
        return topics.Topics(self.mqtt.base, self.device)

    @property
    def wanted(self) -> Wanted:
        """What is wanted of providers."""
        every = {
            name: getattr(self.provider_options, name) for name in ProviderOptions.model_fields
        }
        return Wanted(
            self.providers,
            tuple((name, _texts(options)) for name, options in every.items() if options),
            self.require_provider,
            self.state_dir / proven.FILE,
        )

    @property
    def client_id(self) -> str:
        """The daemon's MQTT client id."""
        return self.mqtt.client_id or f"phid-{self.device}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment first; what is passed to the constructor is the file's content."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings


def _texts(options: dict[str, str | int | bool]) -> tuple[tuple[str, str], ...]:
    """Options as the runtime takes them: as text, flags as 1 and 0."""
    return tuple(
        (name, str(int(value)) if isinstance(value, bool) else str(value))
        for name, value in options.items()
    )


def default_models_dir() -> Path:
    """Below the service's state directory where there is one, else in the user's cache."""
    if state := os.environ.get("STATE_DIRECTORY"):  # systemd's StateDirectory=
        return Path(state.split(":")[0]) / "models"
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "phid" / "models"
    return Path("~/.cache/phid/models").expanduser()


def default_state_dir() -> Path:
    """The service's state directory where there is one, else the user's."""
    if state := os.environ.get("STATE_DIRECTORY"):
        return Path(state.split(":")[0])
    if home := os.environ.get("XDG_STATE_HOME"):
        return Path(home) / "phid"
    return Path("~/.local/state/phid").expanduser()


def load(path: Path | None = None) -> Settings:
    """The settings from a file and the environment.

    Without a path, PHID_CONFIG or /etc/phid/phid.toml is read if it is there; a path that was
    named must be. Raises SettingsError with a line for each mistake.
    """
    content = read_file(path)
    # Names with a leading underscore are switches of the library's constructor.
    mistakes = [f"{name} is no setting" for name in content if name.startswith("_")]
    mistakes += _unknown_environment()
    try:
        settings = Settings(**{n: v for n, v in content.items() if not n.startswith("_")})
    except ValidationError as error:
        mistakes += [_in_words(dict(e)) for e in error.errors()]
    except UnparsableEnvironmentError as error:
        mistakes += [f'environment: {error}: a list is written as JSON, such as ["a"]']
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    return settings


def load_again(path: Path | None = None) -> Settings:
    """The settings for a reload: as `load`, but a file that may be half written is refused."""
    file = source(path)
    with contextlib.suppress(OSError):
        if file.stat().st_size == 0:
            # An editor, or a script's `>`, empties a file before it fills it.
            says = "empty, perhaps half written: the old settings hold; a comment in it will do"
            raise SettingsError(f"{file}: {says}")
    return load(path)


def source(path: Path | None = None) -> Path:
    """The file the settings come from, which need not be there."""
    return path or Path(os.environ.get("PHID_CONFIG") or SYSTEM_FILE)


def read_file(path: Path | None = None) -> dict[str, Any]:
    """What the file says; nothing where none was named and there is none. Raises SettingsError."""
    file = source(path)
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path or os.environ.get("PHID_CONFIG"):
            raise SettingsError(f"{file}: no such file") from None
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{file}: {error}") from None


def names() -> dict[str, Any]:
    """Every setting by its dotted name, with its field: for checks, docs and suggestions."""
    found: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found |= {f"{name}.{key}": f for key, f in section.model_fields.items()}
        else:
            found[name] = field
    return found


def differences(old: Settings, new: Settings) -> list[str]:
    """The dotted names of the settings that differ."""
    return [name for name in names() if get(old, name) != get(new, name)]


def merge(old: Settings, new: Settings, takes: Callable[[str], bool]) -> Settings:
    """The old settings with the new values of those that `takes` says yes to."""
    merged = old
    for name in differences(old, new):
        if takes(name):
            section, _, key = name.rpartition(".")
            change = {key: get(new, name)}
            if section:
                change = {section: getattr(merged, section).model_copy(update=change)}
            merged = merged.model_copy(update=change)
    return merged


def get(settings: Settings, name: str) -> Any:
    """A setting's value by its dotted name."""
    value: Any = settings
    for level in name.split("."):
        value = getattr(value, level)
    return value


def environment() -> dict[str, str]:
    """The settings that come from the environment: the variable's name by the setting's."""
    wanted = {PREFIX + name.upper().replace(".", "__"): name for name in names()}
    return {wanted[v.upper()]: v for v in os.environ if v.upper() in wanted}


def _unknown_environment() -> list[str]:
    known = {PREFIX + name.upper().replace(".", "__") for name in names()}
    return [
        f"environment: {name} is no setting{_nearest(name, known)}"
        for name in sorted(os.environ)
        if name.upper().startswith(PREFIX) and name.upper() not in known | _OTHER_NAMES
    ]


def _in_words(error: dict[str, Any]) -> str:
    name = ".".join(str(level) for level in error["loc"])
    if error["type"] == "extra_forbidden":
        known = set(names()) | {dotted.partition(".")[0] for dotted in names()}
        if error["loc"][0] == "watches":
            known = {f"{name.rpartition('.')[0]}.{field}" for field in Watch.model_fields}
        if error["loc"][0] == "catalog":
            known = {f"{name.rpartition('.')[0]}.{field}" for field in Build.model_fields}
        return f"{name} is no setting{_nearest(name, known)}"
    variable = environment().get(name)
    where = f" (in {variable})" if variable else ""
    return f"{name or 'settings'}: {error['msg'].removeprefix('Value error, ')}{where}"


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f": did you mean {close[0]}?" if close else ""
