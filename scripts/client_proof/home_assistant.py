"""What config/home-assistant promises, tried in a real Home Assistant: its states, its script."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from client_proof.house import CAMERA, CHECKOUT, DEVICE, House, Program, http, same
from client_proof.websocket import WebSocket
from rig import free_port, until
from wire import BASE

NAME = "home-assistant"
PACKAGE = CHECKOUT / "config" / "home-assistant" / "phid.yaml"
ORIGIN = "http://127.0.0.1/"
# Nothing that is ours is in here but the package, as its first lines say.
CONFIGURATION = """\
homeassistant:
  packages: !include_dir_named packages
http:
  server_host: 127.0.0.1
  server_port: {port}
api:
config:
"""
LONGEST = 255
# What its voice assistant would have to be compiled: without it, nothing here is missing.
UNBUILT = ("--skip-pip-packages", "pymicro-vad,pyspeex-noise")


class HomeAssistant:
    """A Home Assistant with the package in it, and an owner who is logged in."""

    def __init__(self, house: House, command: Sequence[str], folder: Path, inside: str) -> None:
        self.house = house
        self.port = free_port()
        self.command = [*command, "-c", inside]
        self.folder = folder
        self.events: list[dict[str, Any]] = []
        folder.mkdir()
        (folder / "configuration.yaml").write_text(CONFIGURATION.format(port=self.port))
        (folder / "packages").mkdir()
        self._start()
        try:
            self._log_in()
            self._connect()
            self.version = self.api("/config")["version"]
        except BaseException:
            self.program.stop()
            raise

    def _start(self) -> None:
        self.program = Program([*self.command, *UNBUILT], self.folder / "output.log")
        try:
            self.program.wait_for(self._is_up, 300, "Home Assistant's API")
        except BaseException:
            self.program.stop()
            raise

    def _connect(self) -> None:
        """The session that a browser would have."""
        self.program.wait_for(lambda: self.api("/config")["state"] == "RUNNING", 300, "its start")
        self._results: dict[int, dict[str, Any]] = {}
        self._calls = 1
        self._socket = WebSocket(self.port, "/api/websocket")
        self._socket.receive()  # auth_required
        self._socket.send({"type": "auth", "access_token": self._token})
        assert self._socket.receive()["type"] == "auth_ok"
        self._socket.send({"id": 1, "type": "subscribe_events", "event_type": "phid_answer"})
        threading.Thread(target=self._hear, args=(self._socket,), daemon=True).start()

    def restart(self) -> None:
        self.close()
        self._start()
        self._connect()

    def close(self) -> None:
        self._socket.close()
        self.program.stop()

    def api(self, path: str, body: Any = None, **options: Any) -> Any:
        return http(
            self.port, f"/api{path}", body, Authorization=f"Bearer {self._token}", **options
        )

    def act(self, action: str, **data: Any) -> Any:
        """Run an action to its end."""
        return self.api(f"/services/{action.replace('.', '/')}", data)

    def ask(self, question: str, **fields: Any) -> dict[str, Any]:
        """What script.phid_ask answers."""
        body = {"question": question, **fields}
        came = self.api("/services/script/phid_ask?return_response", body)
        return dict(came["service_response"])

    def entity(self, entity_id: str) -> dict[str, Any]:
        try:
            return dict(self.api(f"/states/{entity_id}"))
        except AssertionError:
            return {"state": None, "attributes": {}}

    def state(self, entity_id: str) -> Any:
        return self.entity(entity_id)["state"]

    def attributes(self, entity_id: str) -> dict[str, Any]:
        return dict(self.entity(entity_id)["attributes"])

    def notification(self, name: str) -> dict[str, Any]:
        """A notification that is shown."""
        self._calls += 1
        number = self._calls
        self._socket.send({"id": number, "type": "persistent_notification/get"})
        found = until(lambda: self._results.get(number), 10, "the notifications")["result"]
        return dict(next((n for n in found if n["notification_id"] == name), {}))

    def _is_up(self) -> bool:
        with suppress(OSError, AssertionError):
            return bool(http(self.port, "/api/onboarding"))
        return False

    def _log_in(self) -> None:
        owner = {
            "client_id": ORIGIN,
            "name": "Owner",
            "username": "owner",
            "password": "of-this-run-alone",
            "language": "en",
        }
        code = http(self.port, "/api/onboarding/users", owner)["auth_code"]
        form = {"grant_type": "authorization_code", "code": code, "client_id": ORIGIN}
        self._token = http(self.port, "/auth/token", form, form=True)["access_token"]

    def _hear(self, socket: WebSocket) -> None:
        while (message := socket.receive()) is not None:
            if message["type"] == "event":
                self.events.append(message["event"]["data"]["told"])
            else:
                self._results[message["id"]] = message


def the_integration_connects_with_mqtt_5(home: HomeAssistant) -> str:
    flow = home.api("/config/config_entries/flow", {"handler": "mqtt"})
    broker = {
        "broker": "127.0.0.1",
        "port": home.house.broker.port,
        "protocol": "5",
        "username": NAME,
        "password": "any",
        "other_settings": {"set_client_cert": False, "set_ca_cert": "off"},
    }
    done = home.api(f"/config/config_entries/flow/{flow['flow_id']}", broker)
    assert done["type"] == "create_entry", done
    log = home.house.broker.folder / "mosquitto.log"
    until(lambda: re.search(rf"\(p5, [^)]*u'{NAME}'", log.read_text()), 10, "a connection")
    return "by its own form"


def the_package_is_valid_and_makes_every_entity(home: HomeAssistant) -> str:
    shutil.copy(PACKAGE, home.folder / "packages")
    command = [*home.command[:-2], "--script", "check_config", *home.command[-2:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
    assert done.returncode == 0, said[-2000:]
    assert not re.search(r"Failed|ERROR|WARNING", said), said[-2000:]
    home.restart()
    text = PACKAGE.read_text()
    named = set(re.findall(r"default_entity_id: (\S+)", text))
    named |= {f"script.{name}" for name in ("phid_ask", "phid_forget")}
    named |= {f"input_text.{name}" for name in ("phid_question", "phid_answer")}
    same(lambda: {e for e in named if home.state(e) is None}, set(), "what is not there", 30)
    running = {s["attributes"].get("id") for s in home.api("/states") if s["state"] == "on"}
    wanted = set(re.findall(r"^  - id: (\S+)", text, re.MULTILINE))
    assert wanted, "no automation"
    assert wanted <= running, (wanted, running)
    return f"{len(named)} entities, {len(wanted)} automations"


def the_devices_state_and_what_it_says_of_itself(home: HomeAssistant) -> str:
    same(lambda: home.state("sensor.porch_state"), "online", "the state", 30)
    told = home.house.latest("status")
    attributes = home.attributes("sensor.porch_state")
    for key in ("model", "provider", "version", "session", "since"):
        assert attributes[key] == told[key], (key, attributes)
    assert home.state("binary_sensor.porch_connected") == "on"
    return f"online, {told['model']} on {told['provider']}"


HEALTH = {
    "sensor.porch_cpu": "cpu_pct",
    "sensor.porch_temperature": "temp_c",
    "sensor.porch_ram_used": "ram_used_mb",
    "sensor.porch_disk_free": "disk_free_mb",
    "sensor.porch_queue": "queue_depth",
    "sensor.porch_rate": "tokens_per_s_p50",
    "sensor.porch_first_token": "ttft_ms_p50",
    "sensor.porch_answers": "jobs_ok_total",
    "sensor.porch_engines_lost": "engine_restarts_total",
    "binary_sensor.porch_throttled": "throttled",
}


def the_numbers_are_those_of_health(home: HomeAssistant) -> str:
    home.ask("Hello.", max_tokens=8)  # some are there from the first answer on
    told: dict[str, Any] = {}
    states: dict[str, Any] = {}

    def agree() -> bool:
        told.update(home.house.latest("health"))
        states.update({entity: home.state(entity) for entity in HEALTH})
        return told["jobs_ok_total"] > 0 and all(
            states[entity] in _states_of(told.get(key)) for entity, key in HEALTH.items()
        )

    try:
        until(agree, 10, "health")
    except AssertionError:
        wanted = {entity: told.get(key) for entity, key in HEALTH.items()}
        raise AssertionError(f"{states} for {wanted}") from None
    absent = [key for key in HEALTH.values() if key not in told]
    units = {e: home.attributes(e).get("unit_of_measurement") for e in HEALTH}
    assert units["sensor.porch_ram_used"] == "MiB"
    assert units["sensor.porch_rate"] == "tokens/s"
    return f"{json.dumps(states)}; absent: {absent}"


def _states_of(number: float | None) -> set[str]:
    """How a number of the health may be written; what is absent is not known."""
    if number is None:
        return {"unknown"}
    return {str(number), str(float(number)), *({"off"} if number == 0 else {"on"})}


def every_report_of_the_wire_is_taken(home: HomeAssistant) -> str:
    home.house.device.signal(signal.SIGSTOP)  # its own would come between
    try:
        golden = CHECKOUT / "tests" / "golden"
        out = f"{BASE}/{DEVICE}/out"
        told = json.loads((golden / "health.json").read_text())
        home.house.ear.publish(f"{out}/health", told)
        same(lambda: home.state("sensor.porch_temperature"), str(told["temp_c"]), "temperature")
        same(lambda: home.state("binary_sensor.porch_throttled"), "off", "throttled")
        home.house.ear.publish(f"{out}/health", {**told, "throttled": 1})
        same(lambda: home.state("binary_sensor.porch_throttled"), "on", "throttled")
        seen = []
        for file in sorted(golden.glob("event-*.json")):
            event = json.loads(file.read_text())
            home.house.ear.publish(f"{out}/event", event)
            same(
                lambda: home.attributes("event.porch_event").get("event_type"),
                event["type"],
                "the event",
            )
            shown = home.attributes("event.porch_event")
            assert event.items() <= shown.items(), (event, shown)
            seen.append(event["type"])
    finally:
        home.house.device.signal(signal.SIGCONT)
    same(lambda: home.state("sensor.porch_state"), "online", "the state")
    return f"health with a temperature; events {seen}"


def the_script_asks_and_has_the_answer(home: HomeAssistant) -> str:
    mark = home.house.mark
    answer = home.ask("What is the capital of France?", max_tokens=32)
    told = home.house.answer(NAME, mark)
    assert (answer["text"], answer["code"]) == (told["text"], told["finish"]), (answer, told)
    same(lambda: home.state("input_text.phid_answer"), told["text"], "the input_text")
    same(lambda: home.notification("phid_answer").get("message"), told["text"], "the notification")
    same(lambda: home.events[-1]["text"] if home.events else None, told["text"], "the event")
    return f"{answer}"


def what_looks_like_a_number_or_json_stays_text(home: HomeAssistant) -> str:
    said: list[str] = []
    for text in ("42", '{"person": true}', "[1, 2]", "None", "{{ now() }}", 'it\'s "so"\n- yes\\'):
        inbox = f"{BASE}/client/{NAME}/rx"
        told = {**home.house.heard(NAME, "result")[-1], "id": f"n{len(said)}", "text": text}
        home.house.ear.publish(inbox, told)
        same(lambda: home.attributes("sensor.phid_answer")["told"]["text"], text, "the sensor's")
        same(lambda: home.events[-1]["text"], text, "the event's text")
        shown = "None." if text == "None" else text
        same(lambda: home.notification("phid_answer").get("message"), shown, "the notification")
        same(lambda: home.state("input_text.phid_answer"), shown, "the input_text")
        said.append(text)
    return f"{said}"


def a_long_answer_is_whole_where_there_is_room(home: HomeAssistant) -> str:
    mark = home.house.mark
    question = "Tell a long story of a lighthouse, its keeper, and the sea, with every detail."
    answer = home.ask(question, max_tokens=160)
    told = home.house.answer(NAME, mark)
    assert len(told["text"]) > LONGEST, told
    assert answer["text"] == told["text"]
    assert home.attributes("sensor.phid_answer")["told"]["text"] == told["text"]
    same(lambda: home.notification("phid_answer").get("message"), told["text"], "the notification")
    short = home.state("input_text.phid_answer")
    assert short == told["text"][:LONGEST], short
    return f"{len(told['text'])} characters, and {len(short)} of them in the input_text"


def a_question_that_is_typed_is_answered(home: HomeAssistant) -> str:
    said = []
    for question in ("42", "How many legs has a spider?"):
        mark = home.house.mark
        home.act("input_text.set_value", entity_id="input_text.phid_question", value=question)
        told = home.house.answer(NAME, mark)
        assert home.house.asked(NAME)[-1]["prompt"] == question
        text = told["text"][:LONGEST].strip()
        same(lambda: home.state("input_text.phid_answer"), text, "the input_text")
        said.append(text)
    return f"{said}"


def questions_asked_at_once_have_their_own_answers(home: HomeAssistant) -> str:
    questions = [f"Say the number {n}." for n in range(4)]
    with ThreadPoolExecutor(len(questions)) as threads:
        answers = list(threads.map(lambda q: home.ask(q, max_tokens=12)["text"], questions))
    prompts = {told["id"]: told["prompt"] for told in home.house.asked(NAME)}
    told = {prompts.get(r["id"]): r["text"] for r in home.house.heard(NAME, "result")}
    assert answers == [told[question] for question in questions], (answers, told)
    assert len(set(answers)) > 1, answers
    return f"{answers}"


def a_conversation_goes_on_until_it_is_forgotten(home: HomeAssistant) -> str:
    turns = [home.ask("My dog is called Rex.", session="7", max_tokens=24)["session_turns"]]
    answer = home.ask("What is my dog called?", session="7", max_tokens=24)
    turns.append(answer["session_turns"])
    home.act("script.phid_forget", session="7")
    forgotten = home.ask("What is my dog called?", session="7", max_tokens=24)
    turns.append(forgotten["session_turns"])
    assert turns == [0, 2, 0], turns
    return f"{answer['text']!r}, and forgotten {forgotten['text']!r}"


def an_error_has_its_code(home: HomeAssistant) -> str:
    answer = home.ask("Hello", max_tokens=0)
    assert (answer["code"], answer["text"]) == ("bad_request", None), answer
    same(
        lambda: home.state("input_text.phid_answer"),
        f"bad_request: {answer['error']}",
        "input_text",
    )
    home.house.ear.ctl("pause")
    try:
        same(lambda: home.state("sensor.porch_state"), "paused", "the state")
        paused = home.ask("Hello")
    finally:
        home.house.ear.ctl("resume")
    assert paused["code"] == "paused", paused
    same(lambda: home.state("sensor.porch_state"), "online", "the state")
    return f"{answer}; {paused}"


def a_camera_is_looked_at(home: HomeAssistant) -> str:
    finding = home.house.see()
    answer = home.ask("Describe the scene.", camera=CAMERA, max_tokens=32)
    assert answer["code"] == "stop", answer
    assert answer["text"], answer
    assert home.house.asked(NAME, "frame")[-1]["images"] == [{"topic": CAMERA}]
    return f"{answer['text']!r} (the watch: {finding!r})"


def what_a_watch_finds_is_shown(home: HomeAssistant) -> str:
    told = home.house.latest("watch/people/result")  # of the promise before
    same(lambda: home.state("sensor.porch_people"), told["text"][:LONGEST], "the sensor")
    attributes = home.attributes("sensor.porch_people")
    assert (attributes["camera"], attributes["text"]) == ("door", told["text"]), attributes
    assert home.state("binary_sensor.porch_people_watched") == "on"
    event = home.attributes("event.porch_finding")
    assert (event["event_type"], event["text"]) == ("watch_result", told["text"]), event
    assert home.notification("phid_people_door")["message"] == told["text"]
    long = {**told, "text": "so " * 200, "camera": "gate"}
    home.house.ear.publish(f"{BASE}/{DEVICE}/out/watch/people/result", long)
    same(lambda: home.state("sensor.porch_people"), long["text"][:LONGEST].strip(), "the sensor")
    assert home.attributes("sensor.porch_people")["text"] == long["text"]
    return repr(told["text"])


def why_a_watch_could_not_look_is_shown(home: HomeAssistant) -> str:
    told = {
        "type": "watch_error",
        "name": "people",
        "camera": "door",
        "topic": CAMERA,
        "ts": 1.5,
        "code": "unsupported",
        "status": 415,
        "message": "this is no image",
    }
    home.house.ear.publish(f"{BASE}/{DEVICE}/out/watch/people/result", told)
    same(lambda: home.state("sensor.porch_people"), "unsupported: this is no image", "the sensor")
    event = home.attributes("event.porch_finding")
    assert (event["event_type"], event["code"]) == ("watch_error", "unsupported"), event
    return str(home.state("sensor.porch_people"))


def events_are_told(home: HomeAssistant) -> str:
    home.ask("Hello.", max_tokens=4)
    same(lambda: home.attributes("event.porch_event").get("event_type"), "job", "the event")
    attributes = home.attributes("event.porch_event")
    assert (attributes["client"], attributes["outcome"]) == (NAME, "length"), attributes
    return f"job: {attributes['outcome']} after {attributes['total_ms']} ms"


def a_device_that_dies_is_offline_and_its_numbers_are_not_there(home: HomeAssistant) -> str:
    home.house.device.stop(signal.SIGKILL)
    same(lambda: home.state("sensor.porch_state"), "offline", "the state")
    assert home.attributes("sensor.porch_state")["reason"] == "lwt"
    gone = ["sensor.porch_cpu", "sensor.porch_people", "event.porch_finding"]
    same(lambda: {home.state(e) for e in gone}, {"unavailable"}, "what it measures")
    same(lambda: home.state("binary_sensor.porch_connected"), "off", "the connection")
    home.house.device.start()
    same(lambda: home.state("sensor.porch_state"), "online", "the state", 60)
    same(lambda: home.state("binary_sensor.porch_connected"), "on", "the connection")
    same(lambda: home.state("sensor.porch_cpu") not in ("unavailable", "unknown"), True, "a number")
    return "offline, numbers unavailable; online again"


def the_will_of_a_connection_that_is_past_is_not_taken(home: HomeAssistant) -> str:
    house = home.house
    house.device.signal(signal.SIGSTOP)  # it would say again that it is there
    try:
        before = home.attributes("sensor.porch_state")
        house.stale_will()
        # A message behind it tells that it was looked at.
        watch = {"type": "watch", "state": "quiet", "reason": "behind it"}
        house.ear.publish(f"{BASE}/{DEVICE}/out/watch/people", watch)
        same(lambda: home.state("binary_sensor.porch_people_watched"), "off", "the watch")
        assert home.state("sensor.porch_state") == "online"
        after = home.attributes("sensor.porch_state")
        assert after == before, (before, after)
        assert home.state("binary_sensor.porch_connected") == "on"
        assert home.state("sensor.porch_ram_used") != "unavailable"
    finally:
        house.device.signal(signal.SIGCONT)
    same(lambda: home.state("sensor.porch_state"), "online", "the state")
    return "online"


def a_stop_is_told_as_one(home: HomeAssistant) -> str:
    home.house.device.stop()
    same(lambda: home.state("sensor.porch_state"), "offline", "the state")
    same(lambda: home.attributes("sensor.porch_state").get("reason"), "stopped", "the reason")
    home.house.device.start()
    same(lambda: home.state("sensor.porch_state"), "online", "the state", 60)
    return "offline: stopped"


def after_a_restart_of_the_broker_it_asks_again(home: HomeAssistant) -> str:
    home.house.broker.stop()
    same(lambda: home.state("sensor.porch_state"), "unavailable", "the state")
    home.house.broker.start()
    same(lambda: home.state("sensor.porch_state"), "online", "the state", 90)
    home.house.ear.ctl("ping", 60)
    return f"{home.ask('What is the capital of France?', max_tokens=32)}"


def the_log_has_nothing_against_the_package(home: HomeAssistant) -> str:
    lines = home.program.log.splitlines()
    ours = [
        line
        for line in lines
        if re.search(r" (WARNING|ERROR) ", line)
        and re.search(r"phid|porch|mqtt|template|automation|script", line, re.IGNORECASE)
        and not re.search(
            r"Disconnected from MQTT|connection was lost|pymicro-vad|pyspeex|assist_", line
        )
    ]
    assert not ours, "\n".join(ours[:10])
    return f"of {len(lines)} lines"


PROMISES: tuple[Callable[[HomeAssistant], str], ...] = (
    the_integration_connects_with_mqtt_5,
    the_package_is_valid_and_makes_every_entity,
    the_devices_state_and_what_it_says_of_itself,
    the_numbers_are_those_of_health,
    every_report_of_the_wire_is_taken,
    the_script_asks_and_has_the_answer,
    what_looks_like_a_number_or_json_stays_text,
    a_long_answer_is_whole_where_there_is_room,
    a_question_that_is_typed_is_answered,
    questions_asked_at_once_have_their_own_answers,
    a_conversation_goes_on_until_it_is_forgotten,
    an_error_has_its_code,
    a_camera_is_looked_at,
    what_a_watch_finds_is_shown,
    why_a_watch_could_not_look_is_shown,
    events_are_told,
    a_device_that_dies_is_offline_and_its_numbers_are_not_there,
    the_will_of_a_connection_that_is_past_is_not_taken,
    a_stop_is_told_as_one,
    after_a_restart_of_the_broker_it_asks_again,
    the_log_has_nothing_against_the_package,
)

# So many of them set it up for the others.
NEEDED = 2


@contextmanager
def running(
    house: House, command: Sequence[str], folder: Path, inside: str
) -> Iterator[HomeAssistant]:
    home = HomeAssistant(house, command, folder, inside)
    try:
        yield home
    finally:
        home.close()
