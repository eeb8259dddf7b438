"""What config/node-red promises, tried in a real Node-RED: its buttons, its debug sidebar."""

from __future__ import annotations

import itertools
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from client_proof.house import CHECKOUT, DEVICE, House, Program, http, same
from client_proof.websocket import WebSocket
from rig import free_port, until
from wire import BASE

NAME = "node-red"
FLOW = CHECKOUT / "config" / "node-red" / "flow.json"
INBOX = f"{BASE}/client/{NAME}/rx"
SETTINGS = """\
module.exports = {{ uiPort: {port}, uiHost: "127.0.0.1", credentialSecret: false,
    telemetry: {{ enabled: false, updateNotification: false }} }};
"""


class NodeRed:
    """A Node-RED with the flow in it, and what an editor would be shown."""

    def __init__(self, house: House, command: Sequence[str], folder: Path, inside: str) -> None:
        self.house = house
        self.shown: list[tuple[str, Any]] = []
        self.statuses: dict[str, str] = {}
        self.port = free_port()
        self._command = [*command, "--userDir", inside]
        self._log = folder / "node-red.log"
        folder.mkdir()
        (folder / "settings.js").write_text(SETTINGS.format(port=self.port))
        self.start()

    def start(self) -> None:
        """Also again, with the flow that it has by then."""
        self.program = Program(self._command, self._log)
        try:
            self.program.wait_for(self._is_up, 60, "Node-RED's API")
            self.version = http(self.port, "/settings")["version"]
            self._comms = WebSocket(self.port, "/comms")
            threading.Thread(target=self._hear, args=(self._comms,), daemon=True).start()
            for topic in ("debug", "status/#"):
                self._comms.send({"subscribe": topic})
        except BaseException:
            self.program.stop()
            raise

    def close(self) -> None:
        self._comms.close()
        self.program.stop()

    def press(self, button: str) -> int:
        """Press an inject node's button; how many lines the sidebar had before."""
        before = len(self.shown)
        http(self.port, f"/inject/{button}", {})
        return before

    def lines(self, debug: str, after: int = 0) -> list[Any]:
        """What a debug node has shown in the sidebar."""
        return [line for name, line in self.shown[after:] if name == debug]

    def line(self, debug: str, after: int = 0, timeout: float = 60) -> Any:
        """The last of it, once there is one."""
        return until(lambda: self.lines(debug, after), timeout, f"{debug} in the sidebar")[-1]

    def is_connected(self, node: str) -> bool:
        """What stands below an MQTT node."""
        return self.statuses.get(node, "").endswith(".connected")

    def _is_up(self) -> bool:
        with suppress(OSError, AssertionError):
            return bool(http(self.port, "/settings"))
        return False

    def _hear(self, comms: WebSocket) -> None:
        while (batch := comms.receive()) is not None:
            for message in batch if isinstance(batch, list) else [batch]:
                topic, data = message.get("topic", ""), message.get("data")
                if topic == "debug":
                    line = data["msg"]
                    if data.get("format", "").lower() == "object":
                        line = json.loads(line)
                    self.shown.append((data.get("name") or data["id"], line))
                elif topic.startswith("status/") and "text" in data:
                    self.statuses[topic.removeprefix("status/")] = data["text"]


def the_flow_is_taken_and_connects_with_mqtt_5(red: NodeRed) -> str:
    flow = json.loads(FLOW.read_text())
    (broker,) = (node for node in flow if node["type"] == "mqtt-broker")
    assert broker["protocolVersion"] == "5"
    # What is another one's in each house; all else as it is in the file.
    broker["port"] = str(red.house.broker.port)
    broker["credentials"] = {"user": NAME, "password": "any"}
    http(red.port, "/flows", flow, Node_RED_Deployment_Type="full")
    taken = http(red.port, "/flows")
    assert {node["id"] for node in taken} == {node["id"] for node in flow}
    known = http(red.port, "/nodes", Accept="application/json")
    types = {name for module in known for name in module["types"]}
    missing = {node["type"] for node in flow} - types - {"tab"}
    assert not missing, missing
    mqtt = [node["id"] for node in flow if node["type"].startswith("mqtt ")]
    same(lambda: {one for one in mqtt if not red.is_connected(one)}, set(), "unconnected")
    log = (red.house.broker.folder / "mosquitto.log").read_text()
    assert re.search(rf"as {broker['clientid']} \(p5, c0,", log), log
    return f"{len(flow)} nodes, {len(mqtt)} of them connected"


def a_button_asks_and_the_answer_is_shown(red: NodeRed) -> str:
    mark = red.house.mark
    before = red.press("phid-ask")
    shown = red.line("answer", before)
    told = red.house.answer(NAME, mark)
    assert told["type"] == "result", told
    assert shown == told["text"]
    request = red.house.asked(NAME)[-1]
    assert "reply_to" not in request
    assert told["id"] == request["id"]
    return f"by Response Topic: {shown!r}"


def a_stream_is_shown_as_it_comes_and_then_whole(red: NodeRed) -> str:
    mark = red.house.mark
    before = red.press("phid-stream")
    answer = red.line("answer", before)
    told = red.house.answer(NAME, mark)
    so_far = red.lines("so far", before)
    assert min(told["deltas"], len(so_far)) > 1, told
    texts = [*so_far, answer]
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts)), texts
    assert answer == told["text"]
    return f"{len(so_far)} times more of it, then all {len(answer)} characters"


def a_delta_that_is_lost_ends_what_is_shown_and_not_the_answer(red: NodeRed) -> str:
    before = len(red.shown)
    delta = {"type": "delta", "id": "x1"}
    for seq, text in ((0, "one "), (2, "three "), (3, "four ")):
        red.house.ear.publish(INBOX, {**delta, "seq": seq, "text": text})
    whole = {**red.house.heard(NAME, "result")[-1], "id": "x1", "text": "one two three four"}
    red.house.ear.publish(INBOX, whole)
    assert red.line("answer", before) == whole["text"]
    assert set(red.lines("so far", before)) == {"one "}, red.lines("so far", before)
    # The same outcome once more, as after a lost connection; then another, to wait for.
    red.house.ear.publish(INBOX, {**whole, "duplicate": True})
    red.house.ear.publish(INBOX, {**whole, "id": "x2", "text": "another"})
    same(lambda: red.lines("answer", before)[-1], "another", "the answer")
    assert red.lines("answer", before) == [whole["text"], "another"]
    return "and what comes twice is shown once"


def a_conversation_goes_on_until_it_is_forgotten(red: NodeRed) -> str:
    said = []
    for button, turns in (("phid-tell", 0), ("phid-recall", 2)):
        before = red.press(button)
        said.append(red.line("answer", before))
        same(
            lambda: red.statuses["phid-answers"].partition("hall: ")[2],
            f"{turns} turns before",
            "the function's status",
        )
    red.press("phid-forget")
    before = red.press("phid-recall")
    said.append(red.line("answer", before))
    same(
        lambda: red.statuses["phid-answers"].partition("hall: ")[2], "0 turns before", "the status"
    )
    return f"{said[1]!r}, and forgotten {said[2]!r}"


def an_error_is_shown_with_its_code(red: NodeRed) -> str:
    mark = red.house.mark
    before = red.press("phid-mistake")
    shown = red.line("error", before)
    told = red.house.answer(NAME, mark)
    assert told["code"] == "bad_request", told
    assert shown == f"bad_request (400): {told['message']}"
    red.house.ear.ctl("pause")
    try:
        before = red.press("phid-ask")
        paused = red.line("error", before)
    finally:
        red.house.ear.ctl("resume")
    assert paused.startswith("paused (503): "), paused
    same(lambda: red.statuses["phid-answers"], "paused", "the function's status")
    return f"{shown!r}; {paused!r}"


def health_is_shown(red: NodeRed) -> str:
    shown = red.line("health", len(red.shown))
    told = red.house.latest("health")
    assert shown["device"] == DEVICE
    assert shown["jobs_ok_total"] <= told["jobs_ok_total"]
    numbers = {k: v for k, v in shown.items() if k in told}
    assert {"cpu_pct", "ram_used_mb", "queue_depth", "tokens_per_s_p50"} <= numbers.keys(), shown
    assert all(isinstance(number, int | float) for number in numbers.values()), numbers
    return json.dumps(numbers)


def what_a_watch_finds_is_shown(red: NodeRed) -> str:
    before = len(red.shown)
    text = red.house.see()
    shown = red.line("finding", before)
    assert shown == {"name": "people", "camera": "door", "text": text}, shown
    return json.dumps(shown)


def a_device_that_dies_is_offline_and_comes_back(red: NodeRed) -> str:
    house = red.house
    same(lambda: red.statuses["phid-state"], f"{DEVICE} online", "the function's status")
    before = len(red.shown)
    house.device.stop(signal.SIGKILL)
    shown = red.line("device", before)
    assert (shown["state"], shown["reason"]) == ("offline", "lwt"), shown
    house.device.start()
    same(lambda: red.statuses["phid-state"], f"{DEVICE} online", "the function's status", 60)
    states = [line["state"] for line in red.lines("device", before)]
    assert (states[0], states[-1]) == ("offline", "online"), states
    return " > ".join(states)


def the_will_of_a_connection_that_is_past_is_not_taken(red: NodeRed) -> str:
    before = len(red.shown)
    red.house.stale_will()
    # A message behind it tells that it was looked at.
    red.house.ear.publish(f"{BASE}/shed/out/status", {"state": "online", "session": "s"})
    same(
        lambda: red.statuses["phid-state"], f"{DEVICE} online, shed online", "the function's status"
    )
    assert [line["device"] for line in red.lines("device", before)] == ["shed"]
    return red.statuses["phid-state"]


def an_answer_that_comes_while_it_restarts_is_taken(red: NodeRed) -> str:
    house = red.house
    mark = house.mark
    house.device.signal(signal.SIGSTOP)
    try:
        red.press("phid-recall")
        until(lambda: len(house.asked(NAME, after=mark)) == 1, 20, "the request")
        red.close()
    finally:
        house.device.signal(signal.SIGCONT)
    told = house.answer(NAME, mark)
    red.statuses.clear()
    red.start()
    # The sidebar was closed when it came; a node's status is kept for whoever opens the editor.
    says = f"{told['finish']}, {told['usage']['output_tokens']} tokens, hall: "
    same(lambda: red.statuses.get("phid-answers", "").startswith(says), True, "the status", 30)
    return red.statuses["phid-answers"]


def after_a_restart_of_the_broker_it_asks_again(red: NodeRed) -> str:
    house = red.house
    house.broker.stop()
    same(lambda: red.is_connected("phid-out"), False, "in/text connected")
    house.broker.start()
    same(lambda: red.is_connected("phid-out"), True, "in/text connected", 60)
    house.ear.ctl("ping", 60)
    before = red.press("phid-ask")
    return repr(red.line("answer", before))


PROMISES: tuple[Callable[[NodeRed], str], ...] = (
    the_flow_is_taken_and_connects_with_mqtt_5,
    a_button_asks_and_the_answer_is_shown,
    a_stream_is_shown_as_it_comes_and_then_whole,
    a_delta_that_is_lost_ends_what_is_shown_and_not_the_answer,
    a_conversation_goes_on_until_it_is_forgotten,
    an_error_is_shown_with_its_code,
    health_is_shown,
    what_a_watch_finds_is_shown,
    a_device_that_dies_is_offline_and_comes_back,
    the_will_of_a_connection_that_is_past_is_not_taken,
    an_answer_that_comes_while_it_restarts_is_taken,
    after_a_restart_of_the_broker_it_asks_again,
)

# So many of them set it up for the others.
NEEDED = 1


@contextmanager
def running(house: House, command: Sequence[str], folder: Path, inside: str) -> Iterator[NodeRed]:
    red = NodeRed(house, command, folder, inside)
    try:
        yield red
    finally:
        red.close()
