"""Several models, real engines: who is loaded, who makes room, and what operators may say."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from phid import store
from phid.crew import Crew
from phid.errors import Code, Refused
from phid.jobs import Job, Load, Sampling, Turn
from phid.lineup import Lineup, Model
from phid.worker import EngineEnded, EngineSaid, Worker, WorkerEvent
from rig import ROOT
from wire import PATIENCE

GIB = 1 << 30
TINY = ROOT / "tests" / "models" / "tiny-phi3v"
TINY_BYTES = sum(file.stat().st_size for file in TINY.iterdir())


def model(name: str, gib: int = 1, path: str = "") -> Model:
    return Model(Load("scripted", name, path), "text", gib * GIB)


class Yard:
    """A crew with its mailbox, and a machine of so many GiB of which it alone takes."""

    def __init__(self, *models: Model, gib: int, **options: object) -> None:
        self.mail: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
        self.told: list[tuple[str, str]] = []
        self.gib = gib
        bad = {name: model(name, path="load_fail") for name in ("broken", "worse")}
        stored = {"stored": model("stored"), **bad}
        self.crew = Crew(
            Lineup(
                models,
                models[0].name,
                models[-1].name,
                frozenset(options.pop("pinned", ())),  # type: ignore[call-overload]
                stored.get,
            ),
            partial(Worker, post=self.mail.put, restart_max_s=1),
            available=self.free_bytes,
            tell=lambda name, state, _: self.told.append((name, state)),
            **options,  # type: ignore[arg-type]
        )
        self.sizes = {m.name: m.needed_bytes for m in (*models, *stored.values())}

    def free_bytes(self) -> int:
        states = self.crew.states.items()
        return self.gib * GIB - sum(self.sizes[n] for n, state in states if state != "stopped")

    def turn(self) -> None:
        self.crew.tick(time.monotonic())
        try:
            event = self.mail.get(timeout=0.05)
        except queue.Empty:
            return
        if isinstance(event, EngineSaid):
            self.crew.take(event)
        else:
            assert isinstance(event, EngineEnded)
            self.crew.ended(event, time.monotonic())

    def until(self, fact: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20 * PATIENCE
        while not fact():
            assert time.monotonic() < deadline, self.crew.states
            self.turn()

    def loaded(self) -> set[str]:
        return {name for name, state in self.crew.states.items() if state == "ready"}

    def want(self, name: str, **options: bool) -> None:
        self.until(
            lambda: self.crew.want(name, time.monotonic(), **options) or name in self.loaded()
        )


@pytest.fixture
def yard() -> Iterator[Callable[..., Yard]]:
    made: list[Yard] = []

    def make(*models: Model, **options: object) -> Yard:
        made.append(Yard(*models, **options))  # type: ignore[arg-type]
        made[-1].crew.start()
        return made[-1]

    yield make
    for one in made:
        one.crew.stop()


def test_both_defaults_are_loaded_one_after_the_other_where_there_is_room(
    yard: Callable[..., Yard],
) -> None:
    y = yard(model("a"), model("b"), gib=4)
    assert y.crew.states == {"a": "loading", "b": "stopped"}
    y.until(lambda: y.loaded() == {"a", "b"})
    assert y.told == [("a", "loading"), ("a", "ready"), ("b", "loading"), ("b", "ready")]


def test_a_default_without_room_waits_until_it_is_wanted_and_then_takes_the_others_place(
    yard: Callable[..., Yard],
) -> None:
    y = yard(model("a", 2), model("b", 2), gib=3)
    y.until(lambda: y.loaded() == {"a"})
    for _ in range(5):
        y.turn()
    assert y.loaded() == {"a"}
    assert y.crew.waits_for_room("b")
    y.want("b")
    assert y.loaded() == {"b"}
    # What answers at present speaks for the device.
    lead = y.crew.lead
    assert lead is not None
    assert lead.load.model == "b"
    y.want("a")
    assert y.loaded() == {"a"}


def test_the_one_used_longest_ago_makes_room(yard: Callable[..., Yard]) -> None:
    y = yard(model("a"), model("b"), model("c"), gib=2, keep_alive_s=1e6)
    y.until(lambda: y.loaded() == {"a"})
    y.want("b")
    use(y, "a")
    y.want("c")
    assert y.loaded() == {"a", "c"}


def test_one_that_runs_a_job_is_not_ended_for_another(yard: Callable[..., Yard]) -> None:
    y = yard(model("a", 2), model("b", 2), gib=3)
    y.until(lambda: y.loaded() == {"a"})
    worker = y.crew.ready("a")
    assert worker is not None
    slow = '@script {"tokens": 20, "token_ms": 20}'
    worker.submit(Job("1", (Turn("user", slow),), Sampling()))
    y.crew.want("b", time.monotonic())
    assert y.crew.states == {"a": "ready", "b": "stopped"}
    y.want("b")
    assert worker.running is None


def test_a_pinned_one_makes_no_room_and_whoever_needs_it_is_told(
    yard: Callable[..., Yard],
) -> None:
    y = yard(model("a", 2), model("b", 2), gib=3, pinned=("a",))
    y.until(lambda: y.loaded() == {"a"})
    with pytest.raises(Refused) as refused:
        y.crew.want("b", time.monotonic())
    assert refused.value.failure.code is Code.NO_MEMORY
    assert "pinned" in refused.value.failure.message
    assert y.loaded() == {"a"}


def test_the_budget_counts_though_the_machine_has_more(yard: Callable[..., Yard]) -> None:
    y = yard(model("a", 2), model("b", 2), model("c", 9), gib=99, budget_bytes=3 * GIB)
    y.until(lambda: y.loaded() == {"a"})
    y.want("b")
    assert y.loaded() == {"b"}
    with pytest.raises(Refused, match=r"engine\.budget_mb"):
        y.crew.want("c", time.monotonic())


def test_one_that_is_no_default_goes_when_nobody_has_asked_for_it(
    yard: Callable[..., Yard],
) -> None:
    y = yard(model("a"), model("b"), model("a2"), gib=9, keep_alive_s=0.3)
    y.until(lambda: y.loaded() == {"a", "a2"})
    y.want("b")
    y.until(lambda: y.crew.states["b"] == "stopped")
    assert y.loaded() == {"a", "a2"}
    assert y.told[-1] == ("b", "unloaded")
    y.want("b")  # and comes back


def test_who_asks_courteously_takes_no_place_of_one_that_was_just_used(
    yard: Callable[..., Yard],
) -> None:
    y = yard(model("a", 2), model("b", 2), gib=3, keep_alive_s=1000)
    y.until(lambda: y.loaded() == {"a"})
    y.crew.want("b", time.monotonic(), courteous=True)
    assert y.crew.states == {"a": "ready", "b": "stopped"}
    later = time.monotonic() + 1001
    y.until(lambda: y.crew.want("b", later, courteous=True) or y.loaded() == {"b"})


def test_an_operator_unloads_a_default_and_whoever_wants_it_has_it_back(
    yard: Callable[..., Yard],
) -> None:
    y = yard(model("a"), gib=9)
    y.until(lambda: y.loaded() == {"a"})
    y.crew.unload("a", time.monotonic())
    y.until(lambda: y.crew.states["a"] == "stopped")
    for _ in range(5):
        y.turn()
    assert y.loaded() == set()
    y.want("a")


def test_a_switch_lets_the_old_one_answer_until_the_new_one_can(
    yard: Callable[..., Yard],
) -> None:
    y = yard(model("a"), gib=9, keep_alive_s=1e6)
    y.until(lambda: y.loaded() == {"a"})
    y.crew.switch("stored", time.monotonic())
    assert y.crew.name_for(None, pictures=False) == "a"
    y.until(lambda: y.crew.name_for(None, pictures=False) == "stored")
    assert "stored" in y.loaded()
    y.until(lambda: y.crew.states["a"] == "stopped")


def test_a_switch_without_room_for_both_ends_the_old_one_first(
    yard: Callable[..., Yard],
) -> None:
    y = yard(model("a"), gib=1)
    y.until(lambda: y.loaded() == {"a"})
    y.crew.switch("stored", time.monotonic())
    # What is asked from now on waits for the new one.
    assert y.crew.name_for(None, pictures=False) == "stored"
    y.until(lambda: y.loaded() == {"stored"})
    assert y.crew.names[0] == "stored"


def test_a_switch_to_one_that_cannot_be_loaded_leaves_the_old_one(
    yard: Callable[..., Yard],
) -> None:
    for gib in (9, 1):
        y = yard(model("a"), gib=gib)
        y.until(lambda y=y: y.loaded() == {"a"})
        y.crew.switch("broken", time.monotonic())
        y.until(lambda y=y: ("broken", "failed") in y.told)
        assert y.crew.name_for(None, pictures=False) == "a"
        with pytest.raises(Refused) as refused:
            y.crew.check("broken", pictures=False)
        assert refused.value.failure.code is Code.LOADING
        y.want("a")


@pytest.mark.parametrize("second", ["worse", "broken"])
def test_a_switch_instead_of_another_that_is_pending_goes_back_to_what_answered(
    yard: Callable[..., Yard], second: str
) -> None:
    y = yard(model("a"), gib=1)
    y.until(lambda: y.loaded() == {"a"})
    y.crew.switch("broken", time.monotonic())
    y.until(lambda: y.crew.states["broken"] == "loading")
    y.crew.switch(second, time.monotonic())
    for pictures in (False, True):
        assert y.crew.name_for(None, pictures=pictures) == second
    y.until(lambda: (second, "failed") in y.told)
    for pictures in (False, True):
        assert y.crew.name_for(None, pictures=pictures) == "a"
    y.want("a")


def test_one_that_was_unloaded_while_it_failed_is_loaded_when_it_is_asked_for_again(
    yard: Callable[..., Yard],
) -> None:
    y = yard(model("a"), model("b", path="load_fail"), gib=9)
    y.until(lambda: ("b", "failed") in y.told)
    y.crew.unload("b", time.monotonic())
    y.until(lambda: y.crew.states["b"] == "stopped")
    assert y.crew.failure is None
    y.crew.check("b", pictures=False)
    y.told.clear()
    y.until(lambda: y.crew.want("b", time.monotonic()) or ("b", "failed") in y.told)


def test_an_order_that_cannot_be_followed_at_once_is_followed_later(
    yard: Callable[..., Yard],
) -> None:
    y = yard(model("a", path="load_fail"), gib=9)
    assert y.crew.states["a"] == "loading"
    y.crew.load("stored", time.monotonic(), pin=False)
    assert y.crew.states["stored"] == "stopped"
    y.until(lambda: y.loaded() == {"stored"})


@pytest.mark.parametrize("act", ["load", "switch", "unload"])
def test_a_model_that_is_not_on_this_machine_is_not_found(
    yard: Callable[..., Yard], act: str
) -> None:
    y = yard(model("a"), gib=9)
    options = {"pin": False} if act == "load" else {}
    with pytest.raises(Refused) as refused:
        getattr(y.crew, act)("../../etc", time.monotonic(), **options)
    assert refused.value.failure.code is Code.NOT_FOUND


def test_of_those_that_come_at_once_one_is_read_at_a_look(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    models = [Model(Load("genai", name, str(tmp_path / name))) for name in names]
    crew = Crew(Lineup(tuple(models)), partial(Worker, post=print, restart_max_s=1))
    for name in names:
        with pytest.raises(Refused):
            crew.want(name, 0.0)
        store.copy_in(TINY, tmp_path, name, lambda _stage, _fraction: None)
    for number in (1, 2, 3):
        crew.tick(2.0 * number)
        there = [m for m in crew._members.values() if m.absence is None]
        assert len(there) == number
        assert all(m.model.needed_bytes for m in there)


def test_one_that_was_completed_while_it_was_loaded_is_reckoned_by_what_it_is(
    yard: Callable[..., Yard], tmp_path: Path
) -> None:
    store.copy_in(TINY, tmp_path, "m", lambda _stage, _fraction: None)
    y = yard(Model(Load("genai", "m", str(tmp_path / "m")), seen="a part of it"), gib=9)
    y.until(lambda: y.loaded() == {"m"})
    assert y.crew._members["m"].model.needed_bytes > TINY_BYTES


def use(y: Yard, name: str) -> None:
    worker = y.crew.ready(name)
    assert worker is not None
    worker.submit(Job("u", (Turn("user", "x"),), Sampling()))
    y.until(lambda: worker.free)
