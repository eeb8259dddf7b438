"""Every setting there is, where it comes from, and what it may be."""

from __future__ import annotations

import difflib
import os
import socket
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as UnparsableEnvironmentError

from phid import topics, watches
from phid.errors import Refused
from phid.watches import Watch

SYSTEM_FILE = Path("/etc/phid/phid.toml")
PREFIX = "PHID_"
# Names with our prefix that are no settings: where the file is, and what the tests use.
_OTHER_NAMES = frozenset({"PHID_CONFIG", "PHID_TEST_MODELS"})

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SettingsError(Exception):
    """The settings cannot be used; the message says which, why and what is nearest."""


class Section(BaseModel):
    """One table of phid.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Mqtt(Section):
    """The broker and how to talk to it."""

    host: str = Field("localhost", description="The broker's host name or address.")
    port: int = Field(1883, ge=1, le=65535, description="The broker's port.")
    base: str = Field("phid/v1", description="The first levels of every topic.")
    client_id: str | None = Field(
        None, description="MQTT client id, stable across restarts; phid-<device> when absent."
    )
    protocol: Literal["auto", "5", "3.1.1"] = Field(
        "auto", description="MQTT version; auto: 5, and 3.1.1 where a broker takes only that."
    )
    transport: Literal["tcp", "websockets", "unix"] = Field(
        "tcp", description="unix: host is the path of a socket."
    )
    websocket_path: str = Field("/mqtt", description="The path of a websocket broker.")
    username: str | None = Field(None, description="User name, where the broker asks for one.")
    password_file: Path | None = Field(
        None, description="A file that holds the password; passwords never stand in settings."
    )
    tls: bool = Field(False, description="Encrypt, and check the broker's certificate and name.")
    ca_file: Path | None = Field(
        None, description="The authority that signed it; the system's when absent."
    )
    cert_file: Path | None = Field(None, description="Our own certificate, where one is wanted.")
    key_file: Path | None = Field(None, description="The key of our own certificate.")
    alpn: tuple[str, ...] = Field(
        (), description="ALPN names, for brokers that share a port with HTTPS."
    )
    credentials_dir: Path | None = Field(
        None,
        description="A directory with mqtt-username, mqtt-password, mqtt-ca, mqtt-cert, mqtt-key; "
        "systemd's when absent. Files named above win.",
    )
    keepalive_s: int = Field(
        30, ge=5, le=3600, description="A dead link is noticed within 1.5 times this."
    )
    session_expiry_s: int = Field(
        86400, ge=0, description="How long the broker keeps requests for us while we are away."
    )
    packet_bytes: int = Field(
        16_777_216, ge=4096, description="Largest packet we take; told to the broker at connect."
    )
    send_bytes: int = Field(
        0, ge=0, description="Largest packet the broker takes, where it does not say; 0: any."
    )
    reconnect_max_s: Seconds = Field(
        60, description="Longest pause between two attempts to connect; jittered."
    )
    reply_allow: tuple[str, ...] = Field(
        (), description="Topic filters beyond a client's own levels that reply_to may name."
    )


class Engine(Section):
    """The program that runs the model."""

    runtime: Literal["genai", "scripted"] = Field(
        "genai", description="genai runs models; scripted answers without one, for tests."
    )
    model: str = Field(
        "", description="A model's name in models_dir or a folder's path; empty: the only one."
    )
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads; 0: what affinity and cgroup quota allow."
    )
    prefill_slice: int = Field(
        64, ge=1, le=8192, description="Prompt tokens per uninterruptible step of the runtime."
    )
    max_context: int = Field(
        0, ge=0, description="Cap on prompt plus answer, in tokens; 0: the model's own context."
    )
    memory_mb: int = Field(
        0, ge=0, description="Most memory it may take, MiB; 0: what the machine has to spare."
    )
    hang_s: Seconds = Field(
        10, description="Shortest silence in mid-answer for which an engine is ended as hung."
    )
    restart_max_s: Seconds = Field(
        30, description="Longest pause before a failing engine is started again."
    )


class Limits(Section):
    """What may be asked for; whatever is beyond is refused with a code."""

    backlog: int = Field(64, ge=1, le=10_000, description="Requests waiting, of all clients.")
    per_client: int = Field(16, ge=1, le=10_000, description="Requests waiting, of one client.")
    payload_bytes: int = Field(
        1_048_576, ge=1024, description="Largest text request, in bytes of payload."
    )
    frame_bytes: int = Field(
        12_582_912, ge=1024, description="Largest frame request, in bytes of payload."
    )
    backlog_bytes: int = Field(
        67_108_864, ge=1024, description="Memory that waiting requests may take, in all."
    )
    max_tokens: int = Field(4096, ge=1, description="Most tokens one request may ask for.")
    deadline_ms: int = Field(
        3_600_000, ge=1, description="Longest deadline; longer ones are shortened to it."
    )
    dedupe_s: Seconds = Field(
        600, description="How long an outcome is kept for a retry with the same id."
    )
    dedupe_entries: int = Field(1024, ge=1, description="How many outcomes are kept at most.")
    drain_s: float = Field(
        30, ge=0, description="How long a stop waits for what was accepted to be answered."
    )


class Vision(Section):
    """Pictures: what may be sent, and how a model gets to see it."""

    processor: Literal["phid", "stock"] = Field(
        "phid", description="stock: the runtime's own, which makes 16 crops of every picture."
    )
    max_images: int = Field(4, ge=1, le=64, description="Pictures in one request.")
    image_bytes: int = Field(8_388_608, ge=1024, description="Largest picture, in bytes of file.")
    parts_bytes: int = Field(
        33_554_432, ge=1024, description="Memory that pictures sent in parts may take, in all."
    )
    parts_s: Seconds = Field(
        30, description="How long a request waits for its parts, and parts for their request."
    )
    camera_topics: tuple[str, ...] = Field(
        (), description="Topic filters of cameras whose newest frame a request may name."
    )
    camera_age_s: Seconds = Field(
        60, description="Older frames of theirs are not given to a request."
    )
    max_pixels: int = Field(25_000_000, ge=1, description="Most pixels of a picture.")
    max_side: int = Field(16_384, ge=1, description="Most pixels along one side of a picture.")


class Journal(Section):
    """What is accepted is kept on disk until it is answered."""

    enabled: bool = Field(
        True, description="false: a restart forgets what was accepted; for disks not to be written."
    )
    max_bytes: int = Field(
        268_435_456, ge=1 << 20, description="Largest size; beyond it new requests are busy."
    )


class Stream(Section):
    """How answers are streamed."""

    delta_interval_ms: int = Field(
        100, ge=0, le=10_000, description="Tokens within this are sent as one delta."
    )


class Health(Section):
    """What fleets watch."""

    interval_s: Seconds = Field(60, description="Seconds between two messages on out/health.")
    heartbeat_s: Seconds = Field(
        30, description="Seconds between two refreshes of out/status, which expires after three."
    )
    pause_above_c: float = Field(
        0, ge=0, le=150, description="Nothing is begun while it is hotter, Celsius; 0: go on."
    )
    discover_spread_s: float = Field(
        2.0, ge=0, description="Longest random delay before a broadcast discover is answered."
    )


class Log(Section):
    """What the journal of the machine sees; never a prompt or an answer."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level.")
    format: Literal["auto", "json", "text"] = Field(
        "auto", description="auto: text on a terminal, JSON lines elsewhere."
    )


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
    watches: tuple[Watch, ...] = Field(
        (), description="Standing prompts on camera topics: a [[watches]] table for each."
    )
    mqtt: Mqtt = Mqtt()
    engine: Engine = Engine()
    limits: Limits = Limits()
    vision: Vision = Vision()
    journal: Journal = Journal()
    stream: Stream = Stream()
    health: Health = Health()
    log: Log = Log()

    @field_validator("models_dir", "state_dir")
    @classmethod
    def _expand(cls, path: Path) -> Path:
        return path.expanduser()

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


def default_models_dir() -> Path:
    """The service's state directory where it may be written, else the user's cache."""
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
    # Such names are switches of the library's constructor.
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
        return f"{name} is no setting{_nearest(name, known)}"
    variable = environment().get(name)
    where = f" (in {variable})" if variable else ""
    return f"{name or 'settings'}: {error['msg'].removeprefix('Value error, ')}{where}"


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f": did you mean {close[0]}?" if close else ""
