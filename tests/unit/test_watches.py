"""Standing prompts: what one says, which frame is the next, which watches there are."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phid import attachments, settings, topics, watches
from phid.attachments import PictureLimits
from phid.commands import decode_watch
from phid.crew import Crew
from phid.errors import Code, Refused
from phid.health import Health
from phid.jobs import EngineFacts, Failed, Finish, Finished, Job, Load, Unchanged, Usage
from phid.lineup import Lineup, Model
from phid.lookout import Lookout
from phid.outbox import Outbox
from phid.roster import Notebook, Roster
from phid.settings import Settings
from phid.slots import MAX_CAMERAS, Cameras, Slots
from phid.traffic import Connected, Protocol, Subscribed
from phid.watches import MAX_WATCHES, Watch

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def watch(**fields: Any) -> Watch:
    return Watch(**{"name": "yard", "topic": "cams/+/+/snapshot", "prompt": "what?", **fields})


# What one says.


@pytest.mark.parametrize(
    ("topic_filter", "topic", "said"),
    [
        ("frigate/+/+/snapshot", "frigate/porch/dog/snapshot", "dog at porch"),
        ("frigate/+/person/snapshot", "frigate/porch/person/snapshot", " at porch"),
        ("cam/#", "cam/porch/deep/below", " at porch"),
        ("cam/front", "cam/front", " at yard"),
        ("+/+", "{label}/x", "x at {label}"),  # what came in is not looked through again
    ],
)
def test_the_question_names_camera_and_label(topic_filter: str, topic: str, said: str) -> None:
    asked = watch(topic=topic_filter, prompt="{label} at {camera}").question(topic)
    assert asked == said


names = st.sampled_from(["<|image_1|>", "|image_1|", "image_1|>", "<", "<|", "|", "x"])


@given(names, names, st.sampled_from(["{camera}", "<{camera}>", "{label}<{camera}{label}> ", ""]))
def test_no_camera_can_write_an_image_tag(camera: str, label: str, prompt: str) -> None:
    one = watch(topic="+/+", prompt=f"<|image_1|>{prompt}")
    asked = one.question(f"{camera}/{label}")
    assert re.findall(r"<\|image_[0-9]+\|>", asked) == ["<|image_1|>"]
    assert one.camera(f"{camera}/{label}") == camera


def test_other_braces_of_a_prompt_stay() -> None:
    prompt = 'answer {"n": number} for {camera}{x}{}'
    asked = watch(prompt=prompt).question("cams/a/b/snapshot")
    assert asked == 'answer {"n": number} for a{x}{}'


@given(st.text(max_size=600))
def test_any_topic_makes_a_question_of_bounded_length(topic: str) -> None:
    asked = watch(topic="#", prompt="{camera}").question(topic)
    assert len(asked) <= 64


@pytest.mark.parametrize(
    ("hours", "at", "quiet"),
    [
        ("22:00-06:00", "21:59", False),
        ("22:00-06:00", "22:00", True),
        ("22:00-06:00", "05:59", True),
        ("22:00-06:00", "06:00", False),
        ("12:00-13:30", "13:29", True),
        ("12:00-13:30", "00:00", False),
        ("12:00-12:00", "12:00", False),
        (None, "12:00", False),
    ],
)
def test_quiet_hours_may_cross_midnight(hours: str | None, at: str, quiet: bool) -> None:
    minute = int(at[:2]) * 60 + int(at[3:])
    assert watch(quiet_hours=hours).is_quiet(minute) is quiet


BAD = {
    "topic": ["", "a/#/b", "a+/b", "$SYS/x", "a\0b", "x" * 600, 7],
    "prompt": ["", "x" * 9000, "nul\0", None],
    "name": ["a/b", "", "x" * 65, None],
    "detail": [0, 17, "medium"],
    "min_interval_s": [-1, "soon", float("inf")],
    "max_age_s": [0, -5],
    "frames": [0, 17, 5],
    "every_s": [0],
    "quiet_hours": ["22-6", "25:00-06:00", "22:00"],
    "enabled": ["yes", 1],
    "max_tokens": [0, 10_000],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in BAD.items() for v in vs])
def test_a_bad_definition_is_refused_with_its_field(field: str, value: Any) -> None:
    content = {"name": "yard", "topic": "a/b", "prompt": "x", field: value}
    with pytest.raises(Refused) as refused:
        watches.check(watches.merged(None, content), "phid/v1", 4)
    assert refused.value.failure.code is Code.BAD_REQUEST
    assert refused.value.failure.field == field


def test_an_unknown_field_is_named_with_the_nearest() -> None:
    with pytest.raises(Refused, match="did you mean prompt"):
        watches.merged(watch(), {"promt": "x"})


@pytest.mark.parametrize("own", ["#", "+/#", "phid/#", "phid/v1/dut/out/#", "+/+/dut/in/frame/me"])
def test_a_watch_never_hears_ourselves(own: str) -> None:
    with pytest.raises(Refused) as refused:
        watches.check(watch(topic=own), "phid/v1", 4)
    assert refused.value.failure.field == "topic"


levels = st.lists(st.sampled_from(["a", "b", "+"]), min_size=1, max_size=4)


@given(levels, levels, st.booleans(), st.booleans(), st.lists(st.sampled_from("ab"), min_size=1))
def test_filters_that_cover_one_topic_overlap(
    one: list[str], other: list[str], open_1: bool, open_2: bool, topic: list[str]
) -> None:
    first = "/".join([*one, *(["#"] * open_1)])
    second = "/".join([*other, *(["#"] * open_2)])
    covered = "/".join(topic)
    if topics.matches(first, covered) and topics.matches(second, covered):
        assert topics.overlap(first, second)
    assert topics.overlap(first, second) == topics.overlap(second, first)


# In the settings.


def test_settings_take_watches_and_name_what_is_wrong_in_them(tmp_path: Path) -> None:
    file = tmp_path / "phid.toml"
    table = '[[watches]]\nname = "a"\ntopic = "cam/+"\nprompt = "x"\n'
    file.write_text(table + "min_interval_s = 2\n")
    loaded = settings.load(file)
    assert [w.name for w in loaded.watches] == ["a"]
    assert settings.differences(Settings(device=loaded.device), loaded) == ["watches"]
    merged = settings.merge(Settings(), loaded, lambda name: name == "watches")
    assert merged.watches == loaded.watches
    for wrong, says in (
        ("min_intervall_s = 2\n", "watches.0.min_interval_s"),
        ("frames = 9\n", "frames: at most 4"),
        ('quiet_hours = "never"\n', "watches.0.quiet_hours: must be two times"),
        (table, "two watches are named a"),
    ):
        file.write_text(table + wrong)
        with pytest.raises(settings.SettingsError, match=says):
            settings.load(file)


def test_the_frigate_example_is_taken() -> None:
    from rig import ROOT

    loaded = settings.load(ROOT / "config" / "watches-frigate.toml")
    assert loaded.watches[0].question("frigate/porch/person/snapshot").startswith("What is the per")


# The slots.


def offer(slots: Slots, topic: str, payload: bytes, at: float, room: int = 1 << 20) -> bool:
    return slots.offer(topic, payload, at, 1000 + at, room)


def test_the_newest_frame_wins_and_the_owner_is_told_once() -> None:
    slots = Slots(watch())
    told = [offer(slots, "c", b"%d" % n, n / 30) for n in range(90)]
    assert told == [True] + [False] * 89
    assert slots.waiting() == ["c"]
    assert [f.payload for f in slots.take("c")] == [b"89"]
    assert (slots.frames, slots.dropped) == (90, 89)
    assert slots.waiting() == []
    assert offer(slots, "c", b"90", 3.1)
    assert slots.held_bytes == 2


def test_what_comes_twice_because_filters_overlap_is_one_frame() -> None:
    slots = Slots(watch())
    assert offer(slots, "c", b"once", 0)
    slots.take("c")
    assert not offer(slots, "c", b"once", 0.001)
    assert slots.waiting() == []
    assert slots.frames == 1
    assert offer(slots, "c", b"once", 5)  # a camera that shows the same again


def test_a_frame_that_comes_while_the_last_is_taken_is_not_overlooked() -> None:
    slots = Slots(watch())
    offer(slots, "c", b"old", 0)
    slots.take("c")
    # The owner would sleep now; the network's thread sees that the last was looked at.
    assert offer(slots, "c", b"new", 1)


def test_cameras_do_not_displace_each_other_up_to_their_number() -> None:
    slots = Slots(watch())
    for n in range(MAX_CAMERAS + 5):
        offer(slots, f"c{n}", b"x", n)
    assert set(slots.waiting()) == {f"c{n}" for n in range(5, MAX_CAMERAS + 5)}
    assert slots.held_bytes == MAX_CAMERAS
    assert slots.dropped == 5
    assert offer(slots, "c0", b"again", 1000)


def test_memory_is_bounded_and_what_found_no_room_is_counted() -> None:
    cameras = Cameras(100)
    cameras.slots = (Slots(watch()), Slots(watch(name="other")))
    for n in range(50):
        cameras.offer(f"cams/{n}/x/snapshot", bytes(30), n, n)
    assert sum(s.held_bytes for s in cameras.slots) <= 100
    assert sum(s.frames for s in cameras.slots) == 100
    assert sum(s.dropped for s in cameras.slots) == 97
    assert not cameras.offer("other/topic", b"x", 0, 0)


def test_silent_cameras_make_room_for_those_that_speak() -> None:
    cameras = Cameras(100)
    slots = Slots(watch(max_age_s=5))
    cameras.slots = (slots,)
    for n in range(3):
        assert cameras.offer(f"cams/{n}/x/snapshot", bytes(30), 0, 0)
    slots.take("cams/0/x/snapshot")
    assert cameras.offer("cams/new/x/snapshot", bytes(30), 1, 1)
    assert set(slots.waiting()) == {f"cams/{n}/x/snapshot" for n in (1, 2, "new")}
    assert not cameras.offer("cams/more/x/snapshot", bytes(30), 2, 2)
    assert cameras.offer("cams/more/x/snapshot", bytes(30), 5.5, 5.5)
    assert set(slots.waiting()) == {f"cams/{n}/x/snapshot" for n in ("new", "more")}
    assert slots.held_bytes == 60


def test_of_several_frames_each_is_counted_once_looked_at_or_dropped() -> None:
    slots = Slots(watch(frames=3, every_s=1.0, max_age_s=60))
    for n in range(3):
        offer(slots, "c", b"%d" % n, n)
        assert (slots.frames, slots.dropped) == (n + 1, 0), "it may be asked of still"
    assert len(slots.take("c")) == 3
    assert (slots.looked, slots.dropped) == (3, 0)
    # Too near to be asked of beside the next, which takes its place.
    offer(slots, "c", b"near", 2.5)
    offer(slots, "c", b"next", 3.2)
    assert slots.dropped == 1
    assert [f.payload for f in slots.take("c")] == [b"1", b"2", b"next"]
    assert (slots.frames, slots.looked, slots.dropped) == (5, 4, 1)
    for n in range(10):
        offer(slots, "c", b"far %d" % n, 10.0 + n)
    assert (slots.frames, slots.looked, slots.dropped) == (15, 4, 1 + 10 - 4)


def test_a_frame_looked_at_is_not_looked_at_again_however_many_cameras_come_and_go() -> None:
    slots = Slots(watch())
    offer(slots, "steady", b"1", 0)
    slots.take("steady")
    for n in range(10 * MAX_CAMERAS):
        offer(slots, "steady", b"1", n)
        slots.take("steady")
        offer(slots, f"c{n}", b"x", n)
        slots.take(f"c{n}")
        assert slots.waiting() == []
    assert len(slots._looked_at) <= 5 * MAX_CAMERAS


@given(
    st.lists(st.floats(0.01, 3), min_size=1, max_size=60),
    st.integers(2, 4),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_several_frames_are_the_last_ones_and_far_enough_apart(
    gaps: list[float], n: int, every_s: float
) -> None:
    slots = Slots(watch(frames=n, every_s=every_s, max_age_s=5))
    at, dropped = 0.0, 0
    looked: set[bytes] = set()
    for number, gap in enumerate(gaps):
        at += gap
        told = offer(slots, "c", b"%d" % number, at)
        assert len(slots._slots["c"]) <= n + 1
        if slots.waiting():
            frames = slots.take("c")
            assert told
            assert frames[-1].payload == b"%d" % number
            assert len(frames) == n
            for before, after in pairwise(frames):
                assert after.at - before.at >= every_s
            looked.update(frame.payload for frame in frames)
        assert slots.looked == len(looked)
        assert dropped <= slots.dropped <= number + 1 - len(looked)
        dropped = slots.dropped
    # Enough of them, closely enough together: then it was asked.
    if at >= 2 * n * every_s and max(gaps) < every_s / 2:
        assert slots.looked


# Frames as cameras send them.


def test_a_frame_is_raw_or_json() -> None:
    coded = base64.b64encode(PNG).decode()
    for payload, ts in (
        (PNG, None),
        (json.dumps({"b64": coded}).encode(), None),
        (json.dumps({"image": f"data:image/png;base64,{coded}", "ts": 5, "fps": 3}).encode(), 5),
    ):
        image, said = attachments.of_camera(payload, PictureLimits())
        assert (image.data, said) == (PNG, ts)


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"hello", Code.UNSUPPORTED),
        (PNG[:20], Code.UNSUPPORTED),
        (b"{}", Code.BAD_REQUEST),
        (b'{"b64": "***"}', Code.BAD_REQUEST),
        (b'{"b64": ""}', Code.BAD_REQUEST),
        (b'{"image": "data:image/png"}', Code.BAD_REQUEST),
        (b'{"b64": 5}', Code.BAD_REQUEST),
        (b'{"b64": "aGVsbG8="}', Code.UNSUPPORTED),
        (b'{"ts": "now", "b64": "aGVsbG8="}', Code.BAD_REQUEST),
        (b'{"b64": "' + b"A" * 30_000_000 + b'"}', Code.TOO_LARGE),
        (b"{" + b"[" * 200_000, Code.BAD_REQUEST),
        (PNG + bytes(20 << 20), Code.TOO_LARGE),
    ],
)
def test_a_bad_frame_is_refused_with_a_code(payload: bytes, code: Code) -> None:
    with pytest.raises(Refused) as refused:
        attachments.of_camera(payload, PictureLimits())
    assert refused.value.failure.code is code


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda b: b"{" + b))
def test_no_frame_breaks_anything(payload: bytes) -> None:
    with suppress(Refused):
        attachments.of_camera(payload, PictureLimits())


# Which watches there are.


def roster(path: Path, *of_settings: Watch) -> tuple[Roster, Notebook]:
    notebook = Notebook(path / "watches.json")
    made = Roster(notebook, "phid/v1")
    made.configure(of_settings, 4)
    return made, notebook


def test_what_a_command_made_is_there_after_a_restart(tmp_path: Path) -> None:
    one, notebook = roster(tmp_path, watch())
    one.put("gate", {"topic": "cam/gate", "prompt": "open?", "max_age_s": 2})
    one.put("gate", {"prompt": "shut?"})
    one.put("yard", {"enabled": False})
    one.note({"cam/gate"}, {"gate", "yard"})
    notebook.stop()
    again, _ = roster(tmp_path, watch())
    assert again.all["gate"] == watch(name="gate", topic="cam/gate", prompt="shut?", max_age_s=2)
    assert not again.all["yard"].enabled
    assert (again.filters, again.names) == ({"cam/gate"}, {"gate", "yard"})
    again.remove("gate")
    again.put("yard", {"enabled": True})
    assert list(again.all) == ["yard"]
    assert again.all["yard"].enabled


def test_a_watch_of_the_settings_can_only_be_switched_off(tmp_path: Path) -> None:
    one, _ = roster(tmp_path, watch())
    for call, field in (
        (lambda: one.remove("yard"), "delete"),
        (lambda: one.put("yard", {"prompt": "x"}), "prompt"),
        (lambda: one.put("yard", {"enabled": "no"}), "enabled"),
        (lambda: one.remove("stranger"), "name"),
        (lambda: one.put("new", {"topic": "a"}), "prompt"),
        (lambda: one.put("new", {"topic": "phid/#", "prompt": "x"}), "topic"),
    ):
        with pytest.raises(Refused) as refused:
            call()
        assert refused.value.failure.field == field
    assert list(one.all) == ["yard"]


def test_there_are_not_endlessly_many(tmp_path: Path) -> None:
    one, notebook = roster(tmp_path)
    for n in range(MAX_WATCHES):
        one.put(f"w{n}", {"topic": "a", "prompt": "x"})
    with pytest.raises(Refused):
        one.put("more", {"topic": "a", "prompt": "x"})
    one.put("w0", {"prompt": "y"})
    notebook.stop()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"schema": 2, "watches": [{}]}',
        '{"schema": 1, "watches": {"a": 1}, "off": 7, "filters": [3], "names": null}',
        '{"schema": 1, "watches": [7, {}, {"name": "x", "topic": "#", "prompt": "y"}]}',
    ],
)
def test_a_damaged_notebook_is_no_obstacle(tmp_path: Path, content: str) -> None:
    (tmp_path / "watches.json").write_text(content)
    one, notebook = roster(tmp_path)
    assert one.all == {}
    one.put("gate", {"topic": "cam/gate", "prompt": "open?"})
    notebook.stop()
    assert list(roster(tmp_path)[0].all) == ["gate"]


def test_where_nothing_can_be_written_watches_run_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    notebook = Notebook(tmp_path / "file" / "watches.json")
    one = Roster(notebook, "phid/v1")
    one.configure((), 4)
    one.put("gate", {"topic": "cam/gate", "prompt": "open?"})
    notebook.stop()
    assert list(one.all) == ["gate"]


# At work.


class Line:
    """A link that keeps what is said on it."""

    session = "s"

    def __init__(self) -> None:
        self.published: list[tuple[str, bytes, bool]] = []
        self.subscribed: list[str] = []
        self.unsubscribed: list[str] = []

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, **_: Any) -> int:
        self.published.append((topic, payload, retain))
        return len(self.published)

    def subscribe(self, filters: list[str]) -> int:
        self.subscribed += filters
        return 7

    def unsubscribe(self, filters: list[str]) -> None:
        self.unsubscribed += filters


class Hands:
    """A worker without an engine."""

    def __init__(self, kind: Any = "vision") -> None:
        self.load = Load("genai", "m", "/m")
        self.facts = EngineFacts("m", kind, "scripted", "1", "cpu", 1, 4096, 1, 1)
        self.jobs: list[Job] = []
        self.cancelled: list[str] = []
        self.free = True
        self.state, self.failure, self.hopeless, self.used_at = "ready", None, False, 0.0
        self.why = "died"

    def submit(self, job: Job) -> None:
        assert self.free
        self.free = False
        self.jobs.append(job)

    def cancel(self, job_id: str) -> None:
        self.cancelled.append(job_id)


class Scene:
    """A lookout between a line and an engine's hands; its clock is set by hand."""

    def __init__(self, folder: Path, *of_settings: Watch, kind: str = "vision") -> None:
        self.settings = Settings(device="dut", watches=of_settings)
        self.now, self.minute, self.shots = 100.0, 720, 0
        self.worker, self.line, self.outbox = Hands(kind), Line(), Outbox()
        self.health = Health(folder)
        self.notebook = Notebook(folder / "watches.json")
        crew = Crew(Lineup((Model(self.worker.load),), "m", "m"), lambda _: self.worker)  # type: ignore[arg-type, return-value]
        self.lookout = Lookout(
            self.settings,
            Roster(self.notebook, "phid/v1"),
            crew,
            self.outbox,
            self.health,
            lambda: self.minute,
        )
        self.connect()

    def connect(self) -> None:
        self.connected = Connected(
            self.line,  # type: ignore[arg-type]
            "s",
            Protocol.V5,
            resumed=False,
            refused=(),
            packet_bytes=1 << 20,
            window=10_000,
        )
        self.outbox.connect(self.connected)
        self.lookout.connect(self.connected)

    def frame(self, topic: str = "cams/a/b/snapshot", payload: bytes | None = None) -> bool:
        self.shots += 1
        payload = PNG + b"%d" % self.shots if payload is None else payload
        return self.lookout.cameras.offer(topic, payload, self.now, time.time())

    def tick(self, after: float = 0.0, *, allowed: bool = True) -> None:
        self.now += after
        self.lookout.tick(self.now, allowed=allowed)

    def finish(self, text: str = "yes", finish: Finish = Finish.STOP) -> None:
        self.worker.free = True
        usage, looped = Usage(3, 0, 0, 1), finish is Finish.LENGTH
        done = Finished(self.worker.jobs[-1].id, finish, text, usage, 5, 6, 7, looped=looped)
        self.lookout.engine_said(done, self.now)

    def told(self, name: str = "yard") -> list[dict[str, Any]]:
        topic = f"phid/v1/dut/out/watch/{name}/result"
        return [json.loads(p) for t, p, _ in self.line.published if t == topic]

    def states(self, name: str = "yard") -> list[str]:
        topic = f"phid/v1/dut/out/watch/{name}"
        return [
            json.loads(p)["state"] if p else "gone"
            for t, p, retain in self.line.published
            if t == topic and retain
        ]

    def counted(self) -> dict[str, int]:
        self.lookout.count()
        counts = self.health.counts
        return {k[6:]: n for k, n in counts.items() if k.startswith("watch_") and n}

    def command(self, **fields: Any) -> dict[str, Any]:
        return self.lookout.command(decode_watch(json.dumps(fields).encode()))


SceneFactory = Callable[..., Scene]


@pytest.fixture
def scene(tmp_path: Path) -> SceneFactory:
    return lambda *of_settings, **options: Scene(tmp_path, *of_settings, **options)


def test_a_frame_is_answered_where_the_watch_tells(scene: SceneFactory) -> None:
    s = scene(watch(prompt="{label}?", system="be short", detail="low", max_tokens=9))
    assert s.line.subscribed == ["cams/+/+/snapshot"]
    assert s.frame()
    s.tick(0.5)
    job = s.worker.jobs[0]
    assert [t.content for t in job.turns] == ["be short", "b?"]
    assert (job.images[0].data, job.crops, job.sampling.max_tokens) == (PNG + b"1", 1, 9)
    s.now += 1
    s.finish()
    (told,) = s.told()
    assert told["type"] == "watch_result"
    assert (told["text"], told["camera"], told["topic"]) == ("yes", "a", "cams/a/b/snapshot")
    assert (told["timing"]["queued_ms"], told["timing"]["total_ms"]) == (500, 1500)
    assert abs(told["ts"] - time.time()) < 60
    assert "looped" not in told
    assert s.counted() == {"frames": 1, "answers": 1}


def test_an_answer_that_only_repeated_itself_is_told_as_that(scene: SceneFactory) -> None:
    s = scene(watch())
    s.frame()
    s.tick(0.5)
    s.finish("no no no", Finish.LENGTH)
    (told,) = s.told()
    assert (told["finish"], told["looped"]) == ("length", True)
    assert s.counted() == {"frames": 1, "answers": 1, "looped": 1}


def test_a_camera_waits_for_its_interval_and_another_does_not(scene: SceneFactory) -> None:
    s = scene(watch(min_interval_s=5, max_age_s=60))
    s.frame()
    s.tick()
    s.finish()
    assert s.frame()
    s.tick(1)
    assert s.worker.free
    assert s.lookout.due_at(allowed=True) == 105
    s.frame("cams/other/b/snapshot")
    s.tick()
    assert not s.worker.free
    s.finish()
    s.tick(4)
    assert not s.worker.free


def test_no_camera_starves(scene: SceneFactory) -> None:
    s = scene(watch(min_interval_s=0))
    for _ in range(40):
        for camera in "abcd":
            s.frame(f"cams/{camera}/x/snapshot")
        s.tick(0.1)
        s.finish()
    seen = [told["camera"] for told in s.told()]
    assert all(set(seen[n : n + 4]) == set("abcd") for n in range(0, 40, 4))


def test_a_stale_frame_is_counted_and_not_looked_at(scene: SceneFactory) -> None:
    s = scene(watch(max_age_s=2))
    s.frame()
    s.tick(2.1)
    assert s.worker.jobs == []
    old = {"b64": base64.b64encode(PNG).decode(), "ts": time.time() - 3600}
    s.frame(payload=json.dumps(old).encode())
    s.tick()
    ahead = old | {"ts": time.time() + 3600}
    assert s.worker.jobs == []
    s.frame(payload=json.dumps(ahead).encode())
    s.tick()
    assert len(s.worker.jobs) == 1
    s.finish()
    assert s.counted() == {"frames": 3, "stale": 2, "answers": 1}


def test_a_request_that_waits_has_a_running_watch_given_up(scene: SceneFactory) -> None:
    s = scene(watch())
    s.frame()
    s.tick()
    s.tick(allowed=False)
    s.tick(allowed=False)
    assert s.worker.cancelled == ["w1"]
    s.finish(finish=Finish.CANCELLED)
    s.frame()
    s.tick(allowed=False)
    assert len(s.worker.jobs) == 1
    s.tick()
    assert len(s.worker.jobs) == 2  # its interval has not begun
    s.finish()
    assert len(s.told()) == 1
    assert s.counted() == {"frames": 2, "yielded": 1, "answers": 1}


def test_an_answer_that_was_whole_before_it_was_given_up_is_told(scene: SceneFactory) -> None:
    """The engine's gate has its frame for answered: the scene would be hidden from then on."""
    s = scene(watch(min_interval_s=5, max_age_s=60))
    s.frame()
    s.tick()
    s.tick(allowed=False)
    s.finish("a person")
    assert [told["text"] for told in s.told()] == ["a person"]
    s.frame()
    s.tick(4)
    assert s.worker.free, "its interval goes on"
    assert s.counted() == {"frames": 2, "answers": 1}


@pytest.mark.parametrize("fields", [{"delete": True}, {"prompt": "closed?"}])
def test_a_whole_answer_to_what_is_not_asked_any_more_is_not_told(
    scene: SceneFactory, fields: dict[str, Any]
) -> None:
    s = scene()
    s.command(name="gate", topic="cam/gate", prompt="open?")
    s.frame("cam/gate")
    s.tick()
    s.command(name="gate", **fields)
    s.finish("yes")
    assert s.told("gate") == []
    assert s.counted() == {"frames": 1, "yielded": 1}
    s.notebook.stop()


def test_failures_are_told_at_most_once_in_an_interval(scene: SceneFactory) -> None:
    s = scene(watch(min_interval_s=5))
    for n in range(40):
        s.frame(payload=b"no image %d" % n)
        s.tick(0.25)
    assert [t["code"] for t in s.told()] == ["unsupported"] * 2
    assert {t["type"] for t in s.told()} == {"watch_error"}
    s.now += 5
    s.frame()
    s.tick()
    s.worker.free = True
    s.lookout.engine_said(Failed("w1", Code.NO_MEMORY, "full"), s.now)
    assert s.told()[-1]["code"] == "no_memory"


def test_what_looks_the_same_is_skipped_and_looked_at_again_soon(scene: SceneFactory) -> None:
    s = scene(watch(min_change_pct=3, min_interval_s=60))
    s.frame()
    s.tick()
    gate = s.worker.jobs[0].gate
    assert gate is not None
    assert gate.min_change_pct == 3
    s.worker.free = True
    s.lookout.engine_said(Unchanged("w1", 0.4), s.now)
    s.frame()
    s.tick(0.5)
    assert s.worker.free
    s.tick(0.5)
    assert s.worker.jobs[1].gate == gate
    s.finish()
    assert s.counted() == {"frames": 2, "skipped": 1, "answers": 1}


def test_a_text_model_and_a_strange_model_are_told(scene: SceneFactory) -> None:
    s = scene(watch(), watch(name="far", model="other", topic="far"), kind="text")
    s.frame()
    s.frame("far")
    s.tick()
    assert (s.told()[0]["code"], s.told("far")[0]["code"]) == ("unsupported", "not_found")
    assert s.worker.jobs == []


def test_a_watch_that_kills_engines_is_suspended_until_it_is_changed(scene: SceneFactory) -> None:
    s = scene()
    s.command(name="yard", topic="cams/+/+/snapshot", prompt="x", min_interval_s=0)
    for _ in range(2):
        s.frame()
        s.tick(2)
        s.worker.free = True
        s.lookout.engine_lost(s.worker, s.now)  # type: ignore[arg-type]
    assert [t["code"] for t in s.told()] == ["engine_lost"] * 2
    s.frame()
    s.tick(2)
    assert len(s.worker.jobs) == 2
    assert s.states() == ["on", "suspended"]
    assert s.line.unsubscribed == ["cams/+/+/snapshot"]
    s.command(name="yard", enabled=True)
    assert s.states()[-1] == "on"
    s.notebook.stop()


def test_quiet_hours_end_the_subscription_and_are_told(scene: SceneFactory) -> None:
    s = scene(watch(quiet_hours="13:00-14:00"))
    s.minute = 13 * 60
    s.tick(1)
    assert s.line.unsubscribed == ["cams/+/+/snapshot"]
    s.frame()
    s.tick(1)
    assert s.worker.jobs == []
    s.minute = 14 * 60
    s.tick(1)
    assert s.states() == ["on", "quiet", "on"]
    assert s.line.subscribed == ["cams/+/+/snapshot"] * 2


def test_a_command_makes_changes_and_deletes_a_watch(scene: SceneFactory) -> None:
    s = scene()
    made = s.command(name="gate", topic="cam/gate", prompt="open?")
    assert (made["state"], made["source"], made["watch"]["max_age_s"]) == ("on", "command", 10)
    assert s.line.subscribed == ["cam/gate"]
    s.frame("cam/gate")
    s.tick()
    s.command(name="gate", enabled=False)  # in the middle of its work
    assert s.worker.cancelled == ["w1"]
    s.finish(finish=Finish.CANCELLED)
    assert s.line.unsubscribed == ["cam/gate"]
    assert s.command(name="gate")["state"] == "off"
    assert s.command(name="gate", delete=True) == {"name": "gate", "deleted": True}
    assert s.states("gate") == ["on", "off", "gone"]
    with pytest.raises(Refused):
        s.command(name="gate", delete=True)
    assert s.counted() == {"frames": 1, "yielded": 1}
    s.notebook.stop()


def test_what_the_broker_keeps_of_an_earlier_run_is_taken_back(tmp_path: Path) -> None:
    first = Scene(tmp_path)
    first.command(name="gate", topic="cam/gate", prompt="open?")
    first.lookout.disconnect()
    first.command(name="gate", delete=True)
    first.notebook.stop()
    second = Scene(tmp_path)
    assert second.line.unsubscribed == ["cam/gate"]
    assert second.states("gate") == ["gone"]
    assert second.line.subscribed == []
    second.notebook.stop()


def test_every_connection_is_told_again_and_a_refused_topic_too(scene: SceneFactory) -> None:
    s = scene(watch())
    s.lookout.disconnect()
    s.outbox.disconnect()
    s.connect()
    assert s.line.subscribed == ["cams/+/+/snapshot"] * 2
    assert s.states() == ["on", "on"]
    s.lookout.subscribed(Subscribed("s", 7, (False,)))
    told = json.loads(s.line.published[-1][1])
    assert told["reason"] == "the broker refuses us its topic"
    s.lookout.subscribed(Subscribed("other", 7, (False,)))
    s.lookout.disconnect()
    s.lookout.subscribed(Subscribed("s", 7, (False,)))


def test_a_reload_keeps_the_frames_of_what_did_not_change(scene: SceneFactory) -> None:
    s = scene(watch(), watch(name="gone", topic="x/y"))
    s.frame()
    s.lookout.configure(s.settings.model_copy(update={"watches": (watch(),)}))
    s.tick()
    assert len(s.worker.jobs) == 1
    assert s.line.unsubscribed == ["x/y"]
    assert s.states("gone") == ["on", "gone"]
    s.notebook.stop()
