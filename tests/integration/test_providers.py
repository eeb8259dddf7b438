"""Where the model runs: tried in real processes, measured, and told everywhere."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phid import channel, packages, prover
from phid.crew import Crew
from phid.errors import Code
from phid.jobs import Job, Load, LoadFailed, Turn
from phid.lineup import Lineup, Model
from phid.proofs import Prove, Wanted
from phid.prover import SMALL_MODEL, prove, try_out
from phid.reports import State, state_of
from phid.selection import SMALL_ANSWER
from phid.worker import EngineSaid, Worker, WorkerEvent
from rig import DaemonFactory, child_pids, until
from wire import BASE, PATIENCE, Requester

SMALL = Load("genai", "small", str(SMALL_MODEL))
STATUS, INFO, EVENT = (f"{BASE}/dut/out/{name}" for name in ("status", "info", "event"))
HEALTH = f"{BASE}/dut/out/health"


@pytest.fixture
def qnn_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The word of pip that QNN's plugin is here: what is tried then is the real runtime."""
    told = tmp_path / "site" / "onnxruntime_qnn-2.7.0.dist-info" / "METADATA"
    told.parent.mkdir(parents=True)
    told.write_text("Metadata-Version: 2.1\nName: onnxruntime-qnn\nVersion: 2.7.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


# Trials.


def test_the_small_model_answers_as_it_did_when_it_was_made() -> None:
    stages: list[str] = []
    tokens = len(SMALL_ANSWER)
    evidence = try_out(SMALL, tokens, 60, lambda loading: stages.append(loading.stage))
    assert evidence.ran, evidence
    assert evidence.pieces == SMALL_ANSWER
    assert evidence.placement == {"cpu": 100.0}
    assert stages[-1] == "answering"


@pytest.mark.parametrize(
    ("fault", "died", "limit_s"),
    [("load_crash", "was ended by SIGKILL", 60.0), ("load_hang", "hung", 4.0)],
)
def test_whatever_becomes_of_a_trial_is_an_answer(fault: str, died: str, limit_s: float) -> None:
    began = time.monotonic()
    evidence = try_out(Load("scripted", "m", fault), 4, limit_s, lambda _: None)
    assert evidence.died.startswith(died)
    assert evidence.stage == "reading the script"
    assert time.monotonic() - began < 30  # a hang is one for ever


def test_who_has_no_model_yet_is_told_where_it_could_run(
    qnn_installed: None, tmp_path: Path
) -> None:
    wanted = Wanted(("auto",), memory=tmp_path / "p.json")
    stages: list[str] = []
    found = prover.usable(
        Load("genai", "", ""), wanted, lambda loading: stages.append(loading.stage)
    )
    assert found == ("cpu",)
    assert stages == []  # QNN's NPU takes no small model, and of the others nothing is installed


@pytest.mark.measures
def test_a_provider_that_is_absent_is_known_to_be_within_three_seconds(
    qnn_installed: None, tmp_path: Path
) -> None:
    task = Prove(SMALL, Wanted(("qnn",), memory=tmp_path / "p.json"))
    took = []
    for _ in range(4):  # somebody else may have had the CPU
        began = time.monotonic()
        found = prove(task, lambda _: None)
        took.append(time.monotonic() - began)
        (tmp_path / "p.json").unlink()
        if took[-1] < 3.0:
            break
    assert found.chosen == "cpu"
    assert found.reports[0].says == "its package is there, and finds no device that it can run on"
    assert min(took) < 3.0, took


# The worker.


def started(worker: Worker, events: queue.SimpleQueue[WorkerEvent]) -> list[str]:
    """The names of what ran until the engine was ready."""
    worker.start()
    ran = [kind(worker)]
    while worker.state != "ready":
        worker.tick(time.monotonic())
        event = events.get(timeout=60 * PATIENCE)
        generation = worker._generation
        if isinstance(event, EngineSaid):
            worker.take(event)
        elif worker.ended(event, time.monotonic()):
            ran.append(f"ended: {worker.why}")
            worker.retry_at = time.monotonic()
            worker.tick(time.monotonic())
        if worker._generation != generation:
            ran.append(kind(worker))
    return ran


def kind(worker: Worker) -> str:
    return "prover" if worker._proving else "engine"


def a_worker(tmp_path: Path) -> tuple[Worker, queue.SimpleQueue[WorkerEvent]]:
    events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
    wanted = Wanted(("qnn", "cpu"), memory=tmp_path / "providers.json")
    return Worker(SMALL, events.put, restart_max_s=1, wanted=wanted), events


def test_a_proof_comes_before_the_first_engine_and_is_remembered(
    qnn_installed: None, tmp_path: Path
) -> None:
    worker, events = a_worker(tmp_path)
    try:
        assert started(worker, events) == ["prover", "engine"]
        assert worker.facts is not None
        assert worker.facts.provider == "cpu"
        assert [r.provider for r in worker.placing.selection.reports] == ["qnn", "cpu"]  # type: ignore[union-attr]
        # An engine that is lost on the CPU casts no doubt on it.
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        while worker.state == "ready":
            event = events.get(timeout=10 * PATIENCE)
            if not isinstance(event, EngineSaid):
                worker.ended(event, time.monotonic())
        assert started(worker, events) == ["engine"]
    finally:
        worker.stop()
    again, events = a_worker(tmp_path)
    try:
        assert started(again, events) == ["engine"]
    finally:
        again.stop()


@pytest.mark.measures
def test_what_was_proven_holds_a_warm_start_up_by_less_than_50_ms(
    qnn_installed: None, tmp_path: Path
) -> None:
    prove(Prove(SMALL, Wanted(("qnn", "cpu"), memory=tmp_path / "providers.json")), lambda _: None)
    took = []
    for _ in range(5):
        worker, _events = a_worker(tmp_path)
        began = time.perf_counter()
        assert worker.placing.settle() is None
        took.append(time.perf_counter() - began)
    print(took)  # for the figure in FIGURES.md
    assert min(took) < 0.05, took


def test_a_prover_that_is_killed_leaves_the_cpu(qnn_installed: None, tmp_path: Path) -> None:
    worker, events = a_worker(tmp_path)
    worker.start()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    try:
        event = events.get(timeout=10 * PATIENCE)
        while isinstance(event, EngineSaid):
            event = events.get(timeout=10 * PATIENCE)
        assert worker.ended(event, time.monotonic())
        assert started(worker, events) == ["engine"]
        report = worker.placing.selection.reports[0]  # type: ignore[union-attr]
        assert "the prover was ended by SIGKILL" in report.says
    finally:
        worker.stop()


def test_the_provers_trials_end_with_it(qnn_installed: None, tmp_path: Path) -> None:
    worker, _events = a_worker(tmp_path)
    worker.start()
    try:
        pid = worker.pid
        assert pid is not None
        trials = until(lambda: child_pids(pid), what="a trial")
        os.kill(pid, signal.SIGKILL)
        until(lambda: not any(alive(trial) for trial in trials), what="the trials' end")
    finally:
        worker.stop()


# Says yes to the first provider that is not barred: who answers for it are the engines.
YES = """
from phid import channel
from phid.proofs import Proved, Report, Selection
connection = channel.inherited()
task = connection.recv()
name = next(n for n in task.wanted.providers if n not in dict(task.barred))
report = Report(name, True, "well")
connection.send(Proved(Selection(task.wanted.providers, name, (report,))))
"""


def test_the_third_lost_engine_is_the_last_on_its_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "PROVER", (sys.executable, "-c", YES))
    monkeypatch.setattr(packages, "installed", lambda _name: "1.0")
    events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
    wanted = Wanted(("cuda", "openvino"))
    worker = Worker(Load("scripted", "m", ""), events.put, restart_max_s=0.1, wanted=wanted)
    ran_on = []
    try:
        for _ in range(4):
            assert started(worker, events) == ["prover", "engine"]
            assert worker.facts is not None
            ran_on.append(worker.facts.provider)
            assert (state(worker).name == "degraded") == (len(ran_on) == 4)
            worker.submit(Job("j", (Turn("user", '@script {"crash_at": 0}'),)))
            while worker.state == "ready":
                event = events.get(timeout=20 * PATIENCE)
                if not isinstance(event, EngineSaid):
                    worker.ended(event, time.monotonic())
        assert ran_on == ["cuda", "cuda", "cuda", "openvino"]
        # What an operator asks for is no crash.
        assert started(worker, events) == ["prover", "engine"]
        worker.restart()
        while worker.state == "ready":
            event = events.get(timeout=20 * PATIENCE)
            if not isinstance(event, EngineSaid):
                worker.ended(event, time.monotonic())
        assert started(worker, events) == ["engine"]
        reason = state(worker).reason
        assert reason is not None
        assert reason.startswith(
            "the model runs on OpenVINO now: CUDA: 3 engines were lost within 10 minutes,"
            " the last was ended by SIGKILL"
        )
    finally:
        worker.stop()


def state(worker: Worker) -> State:
    model = Model(worker.load)
    return state_of(
        crew=Crew(Lineup((model,), model.name, model.name), lambda _: worker),
        paused=False,
        draining=False,
        refused_filters=(),
        silenced=False,
        unkept=None,
        heat=None,
    )


def alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def test_a_refusal_by_proof_ends_who_waits(qnn_installed: None, tmp_path: Path) -> None:
    events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
    worker = Worker(SMALL, events.put, restart_max_s=1, wanted=Wanted(("qnn",), strict=True))
    worker.start()
    try:
        said = None
        while not isinstance(said, LoadFailed):
            event = events.get(timeout=20 * PATIENCE)
            assert isinstance(event, EngineSaid)
            said = worker.take(event)
        assert said.code is Code.LOADING
        assert "QNN: its package is there, and finds no device" in said.message
        assert worker.hopeless
        assert worker.pid is None
        assert worker.retry_at is not None
    finally:
        worker.stop()


# The engine.


def placement_by_a_process(first: str) -> str:
    """What one that runs this line, and then loads the small model, prints of where that ran."""
    program = (
        f"{first}\n"
        "from phid import runtime; from phid.jobs import Load\n"
        f"facts = runtime.load(Load('genai', 'm', {str(SMALL_MODEL)!r}), lambda _: None).facts\n"
        "print(facts.provider, facts.placement)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(prover.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_an_engine_on_the_cpu_alone_is_not_profiled_and_knows_where_it_runs() -> None:
    """The runtime's thread pool never forgets a profile: 1.4 kB for each token of SmolLM2 after."""
    tell = (
        "import sys; sys.addaudithook(lambda what, _: what == 'tempfile.mkdtemp' and print(what))"
    )
    assert placement_by_a_process(tell) == "cpu {'cpu': 100.0}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the loaded libraries are read from /proc")
@pytest.mark.parametrize("writable", [True, False], ids=["", "and no trace can be written"])
def test_where_another_providers_library_is_loaded_a_profile_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, writable: bool
) -> None:
    """Some other library in the name of OpenVINO's: it does nothing."""
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    some = next(word for word in mapped.split() if "/libm.so" in word or "/libm-" in word)
    foreign, scratch = tmp_path / "libopenvino.so", tmp_path / "scratch"
    foreign.write_bytes(Path(some).read_bytes())
    scratch.mkdir()
    monkeypatch.setenv("LD_PRELOAD", str(foreign))
    there = str(scratch if writable else scratch / "not there")
    said = placement_by_a_process(f"import tempfile; tempfile.tempdir = {there!r}")
    assert said == ("cpu {'cpu': 100.0}\n" if writable else "unknown {}\n")
    assert list(scratch.iterdir()) == []


# The daemon.


@pytest.mark.mosquitto
def test_a_provider_that_is_not_there_is_told_everywhere(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    for topic in (STATUS, INFO, EVENT, HEALTH):
        requester.listen(topic)
    start_daemon(
        wait=False,
        engine__runtime="genai",
        engine__model=SMALL_MODEL,
        providers="CUDA",
        health__interval_s=0.3,
    )
    status = requester.status("degraded")
    assert status["reason"].startswith("the model runs on the CPU: CUDA: not installed")
    assert status["provider"] == "cpu"
    event = requester.wait(lambda h: h.topic == EVENT and h.json["type"] == "provider").json
    info = requester.wait(lambda h: h.topic == INFO and bool(h.json.get("model"))).json
    assert event["provider"] == info["provider"]
    found = info["provider"]
    assert (found["requested"], found["actual"]) == (["cuda"], "cpu")
    assert found["placement"] == {"cpu": 100.0}
    assert found["tokens_per_s"] > 0
    assert [(r["provider"], r["passed"]) for r in found["report"]] == [
        ("cuda", False),
        ("cpu", True),
    ]
    assert 'pip install "onnxruntime-gpu[cuda,cudnn]"' in found["report"][0]["mend"]
    health = requester.wait(lambda h: h.topic == HEALTH and "placement_pct_cpu" in h.json).json
    assert health["placement_pct_cpu"] == 100
    assert requester.ask("1", max_tokens=2)["provider"] == "cpu"


@pytest.mark.mosquitto
def test_a_provider_that_is_required_is_waited_for(
    start_daemon: DaemonFactory, requester: Requester
) -> None:
    requester.listen(STATUS, INFO)
    daemon = start_daemon(
        wait=False,
        engine__runtime="genai",
        engine__model=SMALL_MODEL,
        providers='["qnn"]',
        require_provider="true",
    )
    status = requester.status("degraded")
    reason = "no provider that may run the model passes (QNN: not installed: onnxruntime-qnn)"
    assert status["reason"] == f"loading: {reason}"
    error = requester.ask("1")
    assert error["code"] == Code.LOADING
    assert reason in error["message"]
    report = requester.wait(lambda h: h.topic == INFO).json["provider"]["report"]
    assert [(r["provider"], r["passed"]) for r in report] == [("qnn", False)]
    assert daemon.process is not None
    assert child_pids(daemon.process.pid) == []
