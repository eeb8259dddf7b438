"""The tables of phid.toml: each setting with its default, its bounds and its meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

# Three times this still fits an expiry of MQTT 5, and the system can wait for so long.
_MAX_S = 1e9
Seconds = Annotated[float, Field(gt=0, le=_MAX_S, allow_inf_nan=False)]
SecondsFrom0 = Annotated[float, Field(ge=0, le=_MAX_S, allow_inf_nan=False)]
MAX_PACKET_BYTES = 268_435_455
"""MQTT's own ceiling."""
PARTS_KEPT_S = 3600.0
"""How long the journal keeps parts that no open request asks for."""
Verb = Literal[
    "ping", "pause", "resume", "drain", "discover", "log", "reload", "restart", "watch", "model"
]


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
        86400,
        ge=0,
        le=0xFFFFFFFF,
        description="How long the broker keeps requests for us while we are away.",
    )
    packet_bytes: int = Field(
        16_777_216,
        ge=4096,
        le=MAX_PACKET_BYTES,
        description="Largest packet we take; told to the broker at connect.",
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
        "",
        description="A model's name in models_dir or a folder's path; empty: the only one, or of "
        "several the text model that `phid models fit` prefers.",
    )
    frame_model: str = Field(
        "",
        description="Answers requests with pictures that name no model; empty: engine.model, or "
        "where that is empty too the vision model that `phid models fit` prefers.",
    )
    models: tuple[str, ...] = Field(
        (), description="Others that requests may name; loaded when asked for."
    )
    pinned: tuple[str, ...] = Field(
        (), description="Models that stay loaded; others make room for each other."
    )
    keep_alive_s: SecondsFrom0 = Field(
        300, description="How long a model that is no default stays after its last answer."
    )
    budget_mb: int = Field(
        0, ge=0, description="Most memory of all loaded models, MiB; 0: what the machine has."
    )
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads; 0: what affinity and cgroup quota allow."
    )
    prefill_slice: int = Field(
        0,
        ge=0,
        le=8192,
        description="Prompt tokens per uninterruptible step of the runtime; "
        "0: 64, and 512 on cuda.",
    )
    max_context: int = Field(
        0, ge=0, description="Cap on prompt plus answer, in tokens; 0: the model's own context."
    )
    memory_mb: int = Field(
        0, ge=0, description="Most memory it may take, MiB; 0: what the machine has to spare."
    )
    prefix_cache: bool = Field(
        True,
        description="Keep a prompt's cache for the next that begins alike, as those with the same "
        "instructions do.",
    )
    loop_tokens: int = Field(
        256, ge=0, description="An answer that repeats itself for so many tokens is cut; 0: never."
    )
    hang_s: Seconds = Field(
        10, description="Shortest silence in mid-answer for which an engine is ended as hung."
    )
    recycle_mb: int = Field(
        64, ge=0, description="One that has leaked this much is replaced when idle, MiB; 0: never."
    )
    restart_max_s: Seconds = Field(
        30, description="Longest pause before a failing engine is started again."
    )


Options = dict[str, str | int | bool]


class ProviderOptions(Section):
    """What a provider is told beside its name, as ONNX Runtime documents it."""

    cuda: Options = Field({}, description='For cuda, such as {device_id = "1"}.')
    directml: Options = Field({}, description='For DirectML, such as {device_filter = "gpu"}.')
    qnn: Options = Field({}, description='For QNN, such as {backend_path = "libQnnHtp.so"}.')
    openvino: Options = Field({}, description='For OpenVINO, such as {device_type = "GPU"}.')


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
    rate_per_client: float = Field(
        0, ge=0, le=1e6, description="Requests a minute of one client, in the long run; 0: any."
    )
    burst_per_client: int = Field(
        16, ge=1, le=10_000, description="So many of one client at once, where there is a rate."
    )
    dedupe_s: Seconds = Field(
        600, description="How long an outcome is kept for a retry with the same id."
    )
    dedupe_entries: int = Field(1024, ge=1, description="How many outcomes are kept at most.")
    drain_s: SecondsFrom0 = Field(
        30, description="How long a stop waits for what was accepted to be answered."
    )


class Sessions(Section):
    """Conversations that are kept on the device, for requests that go on with one."""

    most: int = Field(
        64,
        ge=0,
        le=1000,
        description="How many, of all clients; the one longest unused goes first. 0: none.",
    )
    per_client: int = Field(8, ge=1, le=1000, description="How many, of one client.")
    keep_s: Seconds = Field(3600, description="How long one is kept after its last request.")
    chars: int = Field(
        32_768,
        ge=256,
        le=1_000_000,
        description="Most characters of one; of a longer one the newer half is kept.",
    )


class Control(Section):
    """Commands: who may send them is the broker's to say, which there are is said here."""

    allow: tuple[Verb, ...] = Field(
        get_args(Verb), description="The verbs of in/ctl that are obeyed; []: none."
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
    parts_s: float = Field(
        30,
        gt=0,
        le=PARTS_KEPT_S,
        description="How long a request waits for its parts, and parts for their request.",
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
    discover_spread_s: SecondsFrom0 = Field(
        2.0, description="Longest random delay before a broadcast discover is answered."
    )


class Log(Section):
    """What the journal of the machine sees; never a prompt or an answer."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level.")
    format: Literal["auto", "json", "text"] = Field(
        "auto", description="auto: text on a terminal, JSON lines elsewhere."
    )
