"""Which models the settings name, where they are, and what each will take: read when asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from phid import fit, graphs, proposal, proven, soundness, store
from phid.jobs import Load
from phid.newcomer import Newcomer
from phid.proposal import Kind
from phid.settings import Settings
from phid.store import StoredModel

# A job of a usual length must fit too.
_USUAL_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be run. `kind` is None where its files do not tell.

    `needed_bytes` is what its process will take with a job of usual length: reckoned, not measured,
    from the files whose fingerprint was `seen`.
    """

    load: Load
    kind: Kind | None = None
    needed_bytes: int = 0
    seen: str = ""

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.load.model


@dataclass(frozen=True, slots=True)
class Lineup:
    """The models of this device, and which one answers where a request names none.

    `text` answers on in/text, `frame` on in/frame; `pinned` ones stay loaded. `find` gives any
    other model on this machine, for operators; where there is no model at all, `again` looks for
    those that have come whole, and reads one graph at most at each call.
    """

    models: tuple[Model, ...] = ()
    text: str | None = None
    frame: str | None = None
    pinned: frozenset[str] = frozenset()
    find: Callable[[str], Model | None] = field(default=lambda _: None, compare=False)
    again: Callable[[float], Lineup] = field(default=lambda _now: NOTHING, compare=False)


NOTHING: Lineup = Lineup()


def read(
    settings: Settings, *, measured: bool = True, here: Sequence[StoredModel] | None = None
) -> Lineup:
    """The models that the settings name, there or not; none if there is not even a default.

    `measured`: the choice among several goes by this machine's speed too, which takes a second.
    `here` are the models to choose from; left out: all in the models folder.
    """
    engine = settings.engine
    nothing = replace(NOTHING, find=lambda name: _stored(settings, name), again=_Again(settings))
    text = model_of(settings, engine.model, measured=measured, here=here)
    if text is None:
        return nothing
    frame: Model | None = text
    if engine.frame_model or not engine.model:
        frame = model_of(settings, engine.frame_model, "vision", measured=measured, here=here)
    others = [model_of(settings, name) for name in (*engine.models, *engine.pinned)]
    models = {model.name: model for model in (text, frame, *others) if model is not None}
    pinned = [model_of(settings, name) for name in engine.pinned]
    return replace(
        nothing,
        models=tuple(models.values()),
        text=text.name,
        frame=frame.name if frame else text.name,
        pinned=frozenset(model.name for model in pinned if model is not None),
    )


def absence(load: Load) -> str | None:
    """Says in words that there is no such model; None if there is one, whole or not."""
    if load.runtime == "scripted":
        return None
    folder = Path(load.path)
    try:
        (folder / soundness.CONFIG).stat()
    except (FileNotFoundError, NotADirectoryError):
        return f"there is no model {load.model} in {folder.parent}: see `phid models list`"
    except OSError:  # the engine says what is wrong
        pass
    return None


def has_changed(model: Model) -> bool:
    """Whether its files have changed since it was reckoned from them."""
    return model.load.runtime != "scripted" and proven.fingerprint(Path(model.load.path)) != (
        model.seen
    )


def reckoned(model: Model) -> Model:
    """The model reckoned anew from its files; itself where they have not changed."""
    if not has_changed(model):
        return model
    kind, needed, seen = _reckon(Path(model.load.path))
    return replace(model, kind=kind, needed_bytes=needed, seen=seen)


def model_of(
    settings: Settings,
    wanted: str,
    kind: Kind = "text",
    *,
    measured: bool = True,
    here: Sequence[StoredModel] | None = None,
) -> Model | None:
    """The model of this name or path; None where an empty name finds none that can run.

    An empty name means the one of this kind that `fit` prefers; `measured` and `here` as for
    `read`.
    """
    engine = settings.engine
    its_kind: Kind | None = None
    needed, seen = 0, ""
    if engine.runtime == "scripted":
        name, _, path = wanted.partition("?")  # what the script says of its loading
        name = name or "scripted"
    else:
        found = store.resolve(wanted, settings.models_dir) if wanted else None
        if not wanted and (
            best := proposal.preferred(settings, kind, measured=measured, here=here)
        ):
            found = best.name, best.path
        if found is None:
            return None
        name, path = found[0], str(found[1])
        its_kind, needed, seen = _reckon(found[1])
    load = Load(
        runtime=engine.runtime,
        model=name,
        path=path,
        threads=engine.threads,
        prefill_slice=engine.prefill_slice,
        max_context=engine.max_context,
        processor=settings.vision.processor,
        memory_bytes=engine.memory_mb << 20,
        loop_tokens=engine.loop_tokens,
        prefix_cache=engine.prefix_cache,
    )
    return Model(load, its_kind, needed, seen)


class _Again:
    """Looks for models where there was none. Owner thread only."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._newcomers: dict[Path, Newcomer] = {}
        self._read: set[Path] = set()

    def __call__(self, now: float) -> Lineup:
        """The lineup out of the models that are whole; NOTHING while there are graphs to read."""
        try:
            found = store.models(self._settings.models_dir)
            before = self._newcomers
            self._newcomers = {m.path: before.get(m.path) or Newcomer(m.path) for m in found}
            whole = [model for model in found if self._newcomers[model.path].is_whole(now)]
            unread = [model.path for model in whole if model.path not in self._read]
            if unread:  # one takes tens of milliseconds, once: the result is remembered
                _reckon(unread[0])
                self._read.add(unread[0])
            if not whole or unread[1:]:
                return NOTHING
            return read(self._settings, measured=False, here=whole)
        except OSError:  # tried again at the next look
            return NOTHING


def _stored(settings: Settings, name: str) -> Model | None:
    """A model in the models folder; no path leads out of it."""
    known = {model.name for model in store.models(settings.models_dir)}
    return model_of(settings, name) if name in known else None


def _reckon(folder: Path) -> tuple[Kind | None, int, str]:
    """The kind of a folder's model, the bytes its engine will take, its files' fingerprint.

    The bytes are 0 where they are not known.
    """
    seen = proven.fingerprint(folder)
    stored = store.read(folder)
    if stored is None:
        return None, 0, seen
    try:
        return stored.kind, fit.of_folder(stored).memory_bytes(_USUAL_TOKENS), seen
    except (soundness.NoModel, graphs.NotOnnx, OSError):
        return stored.kind, 0, seen
