"""What the examples for Node-RED and Home Assistant say is what the code knows.

scripts/prove-clients runs them in the real programs.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any, get_args

import pytest
import yaml  # huggingface_hub's

from phid import acl, messages, topics
from phid.commands import CancelRequest
from phid.health import KEYS
from phid.requests import Request
from phid.topics import Topics
from rig import ROOT

BASE = "phid/v1"
FLOW = ROOT / "config" / "node-red" / "flow.json"
PACKAGE = ROOT / "config" / "home-assistant" / "phid.yaml"
CLIENTS = {FLOW: "node-red", PACKAGE: "home-assistant"}
# Node-RED's own palette.
CORE = {"tab", "comment", "inject", "function", "debug", "mqtt in", "mqtt out", "mqtt-broker"}


def nodes() -> dict[str, dict[str, Any]]:
    return {node["id"]: node for node in json.loads(FLOW.read_text())}


def package() -> dict[str, Any]:
    return dict(yaml.safe_load(PACKAGE.read_text()))


def entities() -> dict[str, dict[str, Any]]:
    return {e["default_entity_id"]: e for kind in package()["mqtt"].values() for e in kind}


def named_topics(path: Any) -> set[str]:
    return set(re.findall(rf"{BASE}/[\w+/-]+", path.read_text()))


def is_known(topic: str) -> bool:
    """True for a topic, or a filter, of which the code knows what it is for."""
    first, *rest = topic.removeprefix(f"{BASE}/").replace("+", "any").split("/")
    if first == "client":
        return "/".join([BASE, first, *rest]) == Topics(BASE, "any").rx(rest[0])
    device = Topics(BASE, first)
    match rest:
        case ["in", *_]:
            return device.parse("/".join([BASE, first, *rest])) is not None
        case ["out", "watch", name]:
            return device.watch(name).endswith("/".join(rest))
        case ["out", "watch", name, _]:
            return device.watch_result(name).endswith("/".join(rest))
        case ["out", _]:
            known = {device.status, device.info, device.health, device.event}
            return "/".join([BASE, first, *rest]) in known
    return False


@pytest.mark.parametrize("path", CLIENTS, ids=lambda path: path.stem)
def test_each_topic_is_one_of_the_wire(path: Any) -> None:
    named = named_topics(path)
    assert len(named) >= 6, named
    assert {topic for topic in named if not is_known(topic)} == set()
    assert not is_known(f"{BASE}/porch/out/healthy")
    assert not is_known(f"{BASE}/porch/in/txt/me")


@pytest.mark.parametrize(("path", "client"), CLIENTS.items(), ids=lambda value: str(value)[-9:])
def test_the_rights_of_a_client_and_a_watcher_are_enough(path: Any, client: str) -> None:
    everyone = acl.members(acl.Fleet(BASE, clients=(client,), watchers=("wall",)))
    rights = [right for member in everyone for right in member.rights]
    for topic in named_topics(path):
        access = "write" if "/in/" in topic else "read"
        assert any(
            right.access == access and topics.matches(right.topic, topic.replace("+", "any"))
            for right in rights
        ), topic
    (inbox,) = (topic for topic in named_topics(path) if topic.endswith("/rx"))
    assert Topics(BASE, "porch").may_reply(inbox, client)


def test_the_flow_is_of_core_nodes_that_are_wired_to_each_other() -> None:
    flow = nodes()
    assert {node["type"] for node in flow.values()} == CORE
    wired = {end for node in flow.values() for wire in node.get("wires", ()) for end in wire}
    assert wired <= flow.keys()
    (broker,) = (node for node in flow.values() if node["type"] == "mqtt-broker")
    assert broker["protocolVersion"] == "5"
    for node in flow.values():
        if node["type"].startswith("mqtt "):
            assert (node["broker"], node["qos"]) == (broker["id"], "1")
        if node["type"] == "function":
            assert len(node["wires"]) == node["outputs"]


def test_each_request_of_the_flow_is_taken_but_the_mistake() -> None:
    asked = 0
    for node in nodes().values():
        if node["type"] != "inject":
            continue
        told = json.loads(node["payload"])
        if node["wires"] == [["phid-out-cancel"]]:
            assert CancelRequest.model_validate(told).session
            continue
        asked += 1
        assert told.keys() <= Request.model_fields.keys()
        if node["id"] == "phid-mistake":
            with pytest.raises(ValueError, match="max_tokens"):
                Request.model_validate(told)
        else:
            Request.model_validate(told)
    assert asked == 5


def test_each_field_that_home_assistant_asks_with_is_one_of_a_request() -> None:
    script = package()["script"]["phid_ask"]["sequence"]
    template = script[0]["variables"]["request"]
    assert isinstance(template, str)
    named = set(re.findall(r"(\w+)=", template)) - {"topic"}  # of a picture
    assert {"id", "prompt", "reply_to", "session", "images"} <= named
    assert named <= Request.model_fields.keys()


def test_each_health_key_is_told() -> None:
    read = set()
    for entity in entities().values():
        if entity["state_topic"].endswith("/out/health"):
            (key,) = re.findall(r"value_json\.get\('(\w+)'\)", entity["value_template"])
            read.add(key)
    assert len(read) >= 10
    found = re.search(r"const \{ (.*) \} = msg\.payload", nodes()["phid-numbers"]["func"])
    assert found
    read |= set(found[1].split(", "))
    assert read <= KEYS.keys()


def test_home_assistant_knows_every_state_and_event() -> None:
    states = get_args(messages.Status.model_fields["state"].annotation)
    assert set(entities()["sensor.porch_state"]["options"]) == set(states)
    for entity_id, told in (
        (
            "event.porch_event",
            (
                *(messages.JobEvent, messages.StateEvent, messages.ModelEvent),
                *(messages.ProviderEvent, messages.ReloadEvent),
            ),
        ),
        ("event.porch_finding", (messages.WatchResult, messages.WatchFailure)),
    ):
        types = {message.model_fields["type"].default for message in told}
        assert set(entities()[entity_id]["event_types"]) == types


def test_the_watch_in_home_assistant_is_the_one_of_the_other_example() -> None:
    watches = tomllib.loads((ROOT / "config" / "watches-frigate.toml").read_text())["watches"]
    named = {topic.split("/")[5] for topic in named_topics(PACKAGE) if "/out/watch/" in topic}
    assert named - {"+"} <= {watch["name"] for watch in watches}


def test_each_field_that_is_read_of_an_answer_is_one_of_an_answer() -> None:
    fields = {"get"}
    for told in (messages.Accepted, messages.Delta, messages.Result, messages.ErrorMessage):
        fields |= told.model_fields.keys()
    read = set(re.findall(r"\btold\.(\w+)", nodes()["phid-answers"]["func"]))
    assert {"seq", "text", "code", "retry_after_ms"} <= read
    inbox = json.dumps([package()[part] for part in ("template", "script", "automation")])
    found = re.findall(r"\b(?:told|payload_json)\.(?:get\('(\w+)'\)|(\w+))", inbox)
    in_home_assistant = {name for pair in found for name in pair if name}
    assert {"id", "text", "code", "finish", "session_turns"} <= in_home_assistant
    of_a_watch = messages.WatchResult.model_fields.keys()
    assert read <= fields
    assert in_home_assistant <= fields | of_a_watch
    of_a_status = set(re.findall(r"\b(?:told|last)\.(\w+)", nodes()["phid-state"]["func"]))
    assert {"session", "state"} <= of_a_status
    assert of_a_status <= messages.Status.model_fields.keys()
