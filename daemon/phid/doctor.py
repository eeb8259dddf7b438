"""phid doctor: what a request needs, looked at piece by piece, with the line that mends it."""

from __future__ import annotations

import argparse
import ipaddress
import json
import re
import shlex
import socket
import stat
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

from phid import (
    __version__,
    amounts,
    catalog,
    credentials,
    fit,
    graphs,
    health,
    lineup,
    memory,
    packages,
    probes,
    soundness,
    store,
    threads,
)
from phid import settings as settings_module
from phid.jobs import Load
from phid.probes import Reached, Verdict
from phid.proposal import Kind
from phid.sections import Mqtt
from phid.settings import Settings, SettingsError
from phid.whereabouts import Whereabouts

_ENGINE_WAIT_S = 4.0
_YEAR_S = 365.2425 * 86400
_PACKAGES = ("onnxruntime-genai", "paho-mqtt", "psutil", "pydantic", "pydantic-settings")
_DEFAULT = Mqtt()
_COMMANDS = re.compile(r"\bphid (?:run|ask|fleet|doctor)\b")
_SECRETS = frozenset({"password_file", "key_file"})


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    parents: list[argparse.ArgumentParser],
) -> None:
    """Give the command line `phid doctor`."""
    doctors = commands.add_parser(
        "doctor",
        parents=parents,
        help="find what is wrong, and what mends it",
        description="Looks at everything that an answer needs. Exit status 1 if anything is bad.",
    )
    doctors.add_argument("--json", action="store_true", help="as a JSON object")
    doctors.add_argument(
        "--wait",
        type=amounts.number,
        default=_ENGINE_WAIT_S,
        metavar="S",
        help="for the engine to load (default %(default)g)",
    )
    doctors.set_defaults(examine=_examine)


def _examine(settings: Callable[[], Settings], options: argparse.Namespace) -> int:
    asked = Asked(settings, options.config, options.wait)
    return run(asked, sys.stdout, as_json=options.json)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the doctor is to look at, and how long it may wait for the engine."""

    settings: Callable[[], Settings]
    config: Path | None
    wait_s: float = _ENGINE_WAIT_S


def run(asked: Asked, out: TextIO, *, as_json: bool) -> int:
    """Look, print, and give the exit status: 0 when nothing is bad, else 1."""
    began = time.monotonic()
    where = Whereabouts()
    verdicts = examine(asked, where)
    took_ms = round((time.monotonic() - began) * 1000)
    worst = max((v.verdict for v in verdicts), key=("ok", "warn", "bad").index)
    if as_json:
        checks = [asdict(verdict) for verdict in verdicts]
        whole = {"verdict": worst, "took_ms": took_ms, "checks": checks}
        print(json.dumps(whole | {"provider": where.told()}), file=out)
    else:
        width = max(len(v.name) for v in verdicts)
        for v in verdicts:
            says = v.says.replace("\n", "\n" + " " * (width + 8))
            print(f"{v.verdict:4}  {v.name.ljust(width)}  {says}", file=out)
            if v.mend:
                print(f"{' ' * (width + 8)}-> {v.mend}", file=out)
    return int(worst == "bad")


def examine(asked: Asked, where: Whereabouts) -> list[Verdict]:
    """Every verdict, in the order in which things are to be mended; `where` is filled in."""
    try:
        settings = asked.settings()
    except SettingsError as error:
        file = settings_module.source(asked.config)
        config = Verdict("config", "bad", str(error), f"phid config check --config {file}")
        return [config, clock(time.time()), versions(packages.installed, "genai")]
    with ThreadPoolExecutor(1) as pool:
        reaching = pool.submit(probes.ping, settings, __version__)
        verdicts = [
            _config(asked.config),
            *_tried("credentials", lambda: [_credentials(settings)]),
            *_tried("model", lambda: [_model(settings, _default(settings))]),
            *_other_models(settings),
            *_tried("threads", lambda: [_threads(settings)]),
            *_tried("clock", lambda: [clock(time.time())]),
            *_tried("disk", lambda: [_disk(settings)]),
            *_tried("versions", lambda: [versions(packages.installed, settings.engine.runtime)]),
        ]
        reached = reaching.result()
    verdicts[2:2] = [reached.broker, reached.daemon]
    load = _default(settings)
    room = _tried("memory", lambda: [_memory(settings, load, reached)])
    whole = not any(v.verdict == "bad" for v in [*room, *verdicts] if v.name in _FOR_ENGINE)
    late = time.monotonic() + asked.wait_s
    provider = _tried(
        "provider", lambda: [where.find(settings, load if whole else None, reached, late)]
    )
    placed = where.place(load) if load is not None else None
    engine = _tried(
        "engine",
        lambda: [_engine(placed, reached, where, whole=whole, wait_s=asked.wait_s)],
    )
    return [_aimed(verdict, settings.mqtt) for verdict in (*verdicts, *room, *provider, *engine)]


def _aimed(verdict: Verdict, mqtt: Mqtt) -> Verdict:
    """The verdict, with --host and --port in its mend where the broker is not the default."""
    where = ""
    if mqtt.host != _DEFAULT.host:
        where += f" --host {shlex.quote(mqtt.host)}"
    if mqtt.port != _DEFAULT.port:
        where += f" --port {mqtt.port}"
    if not where or verdict.mend is None:
        return verdict
    mend = _COMMANDS.sub(lambda found: found[0] + where, verdict.mend)
    return replace(verdict, mend=mend)


def _default(settings: Settings) -> Load | None:
    """The model that the daemon would load first, as far as this user may look."""
    try:
        model = lineup.model_of(settings, settings.engine.model)
    except PermissionError:  # `_model` says so
        return None
    return model.load if model is not None else None


_FOR_ENGINE = frozenset({"model", "memory"})


def _tried(name: str, check: Callable[[], list[Verdict]]) -> list[Verdict]:
    """The check's verdicts; a check that fails is a finding, not the end of the others."""
    try:
        return check()
    except PermissionError as error:
        says = f"this user may not look at {error.filename}"
        return [Verdict(name, "bad", says, "sudo phid doctor")]
    except Exception as error:  # noqa: BLE001 - see above
        says = f"could not be looked at: {type(error).__name__}: {error}"
        return [Verdict(name, "bad", says, "tell whoever maintains phid")]


def _config(path: Path | None) -> Verdict:
    file = settings_module.source(path)
    variables = len(settings_module.environment())
    says = f"{file} is sound" if file.exists() else f"no {file}: the defaults hold"
    return Verdict("config", "ok", says + (f"; {variables} from the environment" * bool(variables)))


def _credentials(settings: Settings) -> Verdict:
    mqtt = settings.mqtt
    files: dict[str, Path] = {}
    try:
        files = {name: path for name in credentials.NAMES if (path := _file(settings, name))}
        proof = credentials.read(mqtt)
    except SettingsError as error:
        mend = "; ".join(f"ls -l {path}" for path in files.values())
        if not mend:
            mend = f"ls -ld {mqtt.credentials_dir or '$CREDENTIALS_DIRECTORY'}"
        return Verdict("credentials", "bad", str(error), mend)
    for name in _SECRETS & files.keys():
        if files[name].stat().st_mode & stat.S_IROTH:
            says = f"everybody on this machine can read {files[name]}"
            return Verdict("credentials", "warn", says, f"chmod o-rwx {files[name]}")
    if proof.password and proof.tls is None and not _is_local(settings):
        says = f"the password travels to {mqtt.host} in clear text"
        return Verdict("credentials", "warn", says, "mqtt.tls = true")
    what = [f"user {proof.username}"] if proof.username else ["no user name"]
    what += ["a password"] * bool(proof.password) + ["TLS"] * bool(proof.tls)
    return Verdict("credentials", "ok", ", ".join(what))


def _file(settings: Settings, name: str) -> Path | None:
    if name == "username" and settings.mqtt.username is not None:
        return None
    return credentials.find(settings.mqtt, name)


def _is_local(settings: Settings) -> bool:
    if settings.mqtt.transport == "unix" or settings.mqtt.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(settings.mqtt.host).is_loopback
    except ValueError:
        return settings.mqtt.host == socket.gethostname()


def _model(
    settings: Settings, load: Load | None, name: str = "model", kind: Kind | None = None
) -> Verdict:
    """Whether a model is there, whole, and of the kind that it must be."""
    if settings.engine.runtime == "scripted":
        return Verdict(name, "ok", "the scripted engine needs none")
    folder = settings.models_dir
    here = store.models(folder)
    if load is None:
        if here:
            names = ", ".join(model.name for model in here)
            return Verdict(
                name, "bad", f"which? {folder} has {names}", "engine.model = one of them"
            )
        return Verdict(name, "bad", f"no model in {folder}", "phid models fit")
    path = Path(load.path)
    stored = store.read(path)
    try:
        faults = list(soundness.faults(path))
    except soundness.NoModel as error:
        return Verdict(name, "bad", f"{load.model}: {error}", _fetch(settings, load, again=False))
    if faults or stored is None:
        says = f"{load.model}: {'; '.join(faults[:5])}"
        return Verdict(name, "bad", says, _fetch(settings, load, again=True))
    if kind not in (None, stored.kind):
        says = f"{stored.name} is a {stored.kind} model, and does not look at pictures"
        able = next((model.name for model in here if model.kind == kind), None)
        mend = f'engine.frame_model = "{able}"' if able else "phid models fit --kind vision"
        return Verdict(name, "bad", says, mend)
    mb = stored.size_bytes / 1e6
    says = f"{stored.name}: {stored.type}, {stored.kind}, {mb:.0f} MB, all files there"
    return Verdict(name, "ok", says)


def _other_models(settings: Settings) -> list[Verdict]:
    """The verdicts on the models that are run beside the default."""
    engine = settings.engine
    if engine.runtime == "scripted":
        return []
    verdicts: list[Verdict] = []

    def look(name: str, wanted: str, kind: Kind | None = None) -> None:
        def verdict() -> list[Verdict]:
            model = lineup.model_of(settings, wanted, kind or "text")
            if not wanted and (model is None or model.load == _default(settings)):
                return []  # the default answers frames, too
            return [_model(settings, model.load if model else None, name, kind if wanted else None)]

        verdicts.extend(_tried(name, verdict))

    if engine.frame_model or not engine.model:
        look("frame_model", engine.frame_model, "vision")
    for other in dict.fromkeys((*engine.models, *engine.pinned)):
        if other not in (engine.model, engine.frame_model):
            look(f"model {other}", other)
    return verdicts


def _fetch(settings: Settings, load: Load, *, again: bool) -> str:
    """The line that brings a model, or brings it anew."""
    name, path = load.model, Path(load.path)
    if path != settings.models_dir / name:
        return (
            f"fetch the model again into {path}"
            if again
            else f"put a model into {path}, or name another"
        )
    remove = f"phid models rm {name} && " * again
    for build in catalog.builds(settings.catalog):
        if build.name == name and build.source != "builder":
            return f"{remove}phid models pull {name}"
    return f"{remove}phid models import FOLDER --name {name}"


def _threads(settings: Settings) -> Verdict:
    usable, wanted = threads.usable_cpus(), settings.engine.threads
    if wanted > usable:
        says = f"engine.threads is {wanted}, but affinity and cgroup quota allow {usable}"
        return Verdict("threads", "warn", says, "engine.threads = 0")
    return Verdict("threads", "ok", f"{wanted or usable} of {usable} that may be used")


def _memory(settings: Settings, load: Load | None, reached: Reached) -> Verdict:
    available = memory.available_bytes() >> 20
    stored = store.read(Path(load.path)) if load is not None else None
    if settings.engine.runtime == "scripted" or stored is None:
        return Verdict("memory", "ok", f"{available} MB available")
    try:
        needs = fit.of_folder(stored)
    except (soundness.NoModel, graphs.NotOnnx, OSError):  # `_model` says what is wrong with it
        return Verdict("memory", "ok", f"{available} MB available")
    facts = reached.facts
    context = min(settings.engine.max_context or needs.context, needs.context)
    kv_bytes = int(facts.get("kv_bytes_per_token") or needs.kv_bytes_per_token)
    # A loaded model's memory is not available any more, and not needed a second time.
    model_mb = 0 if facts else needs.loaded_bytes >> 20
    return fits(available, model_mb, kv_bytes, context)


def fits(available_mb: int, model_mb: int, kv_bytes: int, context: int) -> Verdict:
    """Whether the model, and the cache for a whole context, have room."""
    if not kv_bytes:
        return Verdict("memory", "ok", f"{model_mb} of {available_mb} MB available, plus cache")
    room = ((available_mb - model_mb) << 20) // kv_bytes
    needed_mb = model_mb + (context * kv_bytes >> 20)
    says = f"{needed_mb} of {available_mb} MB available, at {context} tokens of context"
    if room >= context:
        return Verdict("memory", "ok", says)
    if room < min(context, 512):
        return Verdict("memory", "bad", says, "a smaller model, or end what else takes memory")
    return Verdict("memory", "warn", says, f"engine.max_context = {room // 256 * 256}")


def clock(now: float) -> Verdict:
    """Whether the machine knows what year it is: certificates and time stamps hang on it."""
    year = int(1970 + now // _YEAR_S)
    if year < 2024:
        return Verdict("clock", "bad", f"it is {year} here", "timedatectl set-ntp true")
    if year > 2099:
        return Verdict("clock", "warn", f"it is {year} here", "timedatectl set-ntp true")
    return Verdict("clock", "ok", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)))


def _disk(settings: Settings) -> Verdict:
    free = health.disk_free_mb(settings.models_dir)
    says = f"{free} MB free for {settings.models_dir}"
    if free < 50:
        return Verdict("disk", "bad", says, f"du -xh {settings.models_dir} | sort -h | tail")
    if free < 500:
        return Verdict("disk", "warn", says, "make room: a model takes gigabytes")
    return Verdict("disk", "ok", says)


def versions(installed: Callable[[str], str | None], runtime: str) -> Verdict:
    """Whether the packages are there, and none that overwrites another."""
    if (mix := packages.fault(installed)) is not None:
        return Verdict("versions", "bad", mix.says, mix.mend)
    if runtime == "genai" and not any(installed(name) for name in packages.GENAI):
        says = "onnxruntime-genai is not installed"
        return Verdict("versions", "bad", says, "pip install onnxruntime-genai")
    python = sys.version.split()[0]
    named = dict.fromkeys([*packages.versions(installed), *_PACKAGES])
    found = [f"{name} {v}" for name in named if (v := installed(name))]
    says = ", ".join([f"phid {__version__}", f"Python {python}", *found])
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Verdict("versions", "warn", says, "Python 3.11 to 3.13 is what phid is tested with")
    return Verdict("versions", "ok", says)


def _engine(
    load: Load | None, reached: Reached, where: Whereabouts, *, whole: bool, wait_s: float
) -> Verdict:
    facts = reached.facts
    # Where several models take turns, any of them may be the loaded one.
    if facts and load is not None and load.model not in (reached.info.get("models") or ()):
        says = f"the daemon has {facts.get('model')} loaded, the settings say {load.model}"
        return Verdict("engine", "warn", says, "restart the daemon: systemctl restart phid")
    if facts:
        says = f"the daemon has {facts.get('model')} loaded, on {facts.get('provider')}"
        return Verdict("engine", "ok", says)
    if load is None or not whole:
        return Verdict("engine", "bad", "not started: see above", "mend what is bad above first")
    return probes.start_engine(load, wait_s, where.measured)
