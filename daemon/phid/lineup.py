"""Which models the settings name, where they are, and what each will take: read when asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from phid import fit, graphs, proposal, soundness, store
from phid.jobs import Load
from phid.proposal import Kind
from phid.settings import Settings

# A job of a usual length must fit too.
_USUAL_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be run. `kind` is None where its files do not tell.

    `needed_bytes` is what its process will take with a job of usual length: reckoned, not measured.
    """

    load: Load
    kind: Kind | None = None
    needed_bytes: int = 0

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.load.model


@dataclass(frozen=True, slots=True)
class Lineup:
    """The models of this device, and whose turn it is where a request names none.

    `text` answers on in/text, `frame` on in/frame; `pinned` ones stay loaded. `find` gives another
    one that is on this machine, for whoever operates it; `again` reads it all anew, in no time.
    """

    models: tuple[Model, ...] = ()
    text: str | None = None
    frame: str | None = None
    pinned: frozenset[str] = frozenset()
    find: Callable[[str], Model | None] = field(default=lambda _: None, compare=False)
    again: Callable[[], Lineup] = field(default=lambda: NOTHING, compare=False)


NOTHING: Lineup = Lineup()


def read(settings: Settings, *, measured: bool = True) -> Lineup:
    """The models that the settings name, there or not; none if there is not even a default.

    `measured`: of several one is chosen by how fast this machine is, too, which takes a second.
    """
    engine = settings.engine
    text = model_of(settings, engine.model, measured=measured)
    if text is None:
        return replace(
            NOTHING, find=lambda name: _stored(settings, name), again=lambda: _again(settings)
        )
    frame: Model | None = text
    if engine.frame_model or not engine.model:
        frame = model_of(settings, engine.frame_model, "vision", measured=measured)
    others = [model_of(settings, name) for name in (*engine.models, *engine.pinned)]
    models = {model.name: model for model in (text, frame, *others) if model is not None}
    pinned = [model_of(settings, name) for name in engine.pinned]
    return Lineup(
        models=tuple(models.values()),
        text=text.name,
        frame=frame.name if frame else text.name,
        pinned=frozenset(model.name for model in pinned if model is not None),
        find=lambda name: _stored(settings, name),
        again=lambda: _again(settings),
    )


def absence(load: Load) -> str | None:
    """That there is no such model, in words; None where there is, whole or not."""
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


def model_of(
    settings: Settings, wanted: str, kind: Kind = "text", *, measured: bool = True
) -> Model | None:
    """The model of this name or path; None where an empty name finds none that can run.

    Of several it means the one of this kind that `fit` prefers; `measured` as for `read`.
    """
    engine = settings.engine
    its_kind: Kind | None = None
    needed = 0
    if engine.runtime == "scripted":
        name, _, path = wanted.partition("?")  # what the script says of its loading
        name = name or "scripted"
    else:
        found = store.resolve(wanted, settings.models_dir)
        if found is None and (best := proposal.preferred(settings, kind, measured=measured)):
            found = best.name, best.path
        if found is None:
            return None
        name, path = found[0], str(found[1])
        its_kind, needed = _reckon(found[1])
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
    )
    return Model(load, its_kind, needed)


def _again(settings: Settings) -> Lineup:
    try:
        return read(settings, measured=False)
    except OSError:  # not now
        return NOTHING


def _stored(settings: Settings, name: str) -> Model | None:
    """A model in the models folder; no path leads out of it."""
    known = {model.name for model in store.models(settings.models_dir)}
    return model_of(settings, name) if name in known else None


def _reckon(folder: Path) -> tuple[Kind | None, int]:
    """What kind of model a folder holds, and what its engine will take, in bytes; 0: unknown."""
    stored = store.read(folder)
    if stored is None:
        return None, 0
    try:
        return stored.kind, fit.of_folder(stored).memory_bytes(_USUAL_TOKENS)
    except (soundness.NoModel, graphs.NotOnnx, OSError):
        return stored.kind, 0
