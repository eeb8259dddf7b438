from __future__ import annotations

import re
from pathlib import Path

import pytest

from phid import acl, cli, exits
from phid.acl import Fleet, Right
from phid.topics import matches
from rig import ROOT

EXAMPLE = [
    *("--device", "porch", "--device", "garage", "--client", "app", "--operator", "ops"),
    *("--watcher", "wall", "--camera", "frigate=frigate/#"),
]
FLEET = Fleet(
    "phid/v1",
    devices=("porch", "garage"),
    clients=("app",),
    operators=("ops",),
    watchers=("wall",),
    cameras=(("frigate", "frigate/#"),),
)


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    file = tmp_path / "phid.toml"
    file.touch()
    monkeypatch.setenv("PHID_CONFIG", str(file))
    return file


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize(
    ("broker", "file"), [("mosquitto", "mosquitto/phid.acl"), ("emqx", "emqx/acl.conf")]
)
def test_the_examples_are_what_the_command_writes(
    broker: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["acl", broker, *EXAMPLE]) == 0
    assert capsys.readouterr().out == (ROOT / "config" / file).read_text()


def test_both_brokers_are_told_the_same() -> None:
    everyone = acl.members(FLEET)
    told: set[tuple[str, str, str]] = set()
    user = ""
    for line in acl.mosquitto(everyone).splitlines():
        words = line.split(" ")
        if words[0] == "user":
            user = words[1]
        elif words[0] == "topic":
            told.add((user, words[1], words[2]))
    rule = re.compile(r'\{allow, \{username, "(.*?)"\}, (subscribe|publish), \[(.*)\]\}\.')
    same: set[tuple[str, str, str]] = set()
    for line in acl.emqx(everyone).splitlines():
        if found := rule.fullmatch(line):
            access = {"subscribe": "read", "publish": "write"}[found[2]]
            same |= {(found[1], access, topic) for topic in re.findall(r'"(.*?)"', found[3])}
    assert told == same
    assert len(told) == sum(len(member.rights) for member in everyone)
    assert acl.emqx(everyone).rstrip().endswith("{deny, all}.")


def test_what_the_settings_name_is_in_the_devices_rights(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(
        'device = "porch"\n[mqtt]\nbase = "site/a"\nreply_allow = ["app/+/in"]\n'
        '[vision]\ncamera_topics = ["cam/+"]\n'
        '[[watches]]\nname = "yard"\ntopic = "yard/#"\nprompt = "What?"\n'
    )
    assert cli.main(["acl", "mosquitto"]) == 0
    said = capsys.readouterr().out
    assert "user porch" in said
    for line in ("read site/a/porch/in/#", "write app/+/in", "read cam/+", "read yard/#"):
        assert f"topic {line}\n" in said


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--device", "a", "--client", "a"], "a cannot be device and client"),
        (["--device", "a/b"], "'a/b'"),
        (["--client", "+"], "'+'"),
        (["--client", "anon"], "'anon'"),
        (["--watcher", "x\nuser y"], r"'x\nuser y'"),
        (["--camera", "cam=phid/v1/porch/out/#"], "topics of phid's own"),
        (["--camera", "cam=#"], "topics of phid's own"),
        (["--camera", "cam=a/#/b"], "no topic filter"),
        (["--camera", "cam=a\ntopic write #"], "no topic filter"),
    ],
)
def test_what_would_give_too_much_is_refused(
    wrong: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["acl", "mosquitto", *wrong]) == exits.USAGE
    said = capsys.readouterr()
    assert says in said.err
    assert said.out == ""


def test_a_topic_cannot_end_its_string() -> None:
    fleet = Fleet("phid/v1", devices=("porch",), reads=('cam/"}, all}. \\"/x',))
    line = next(line for line in acl.emqx(acl.members(fleet)).splitlines() if "cam/" in line)
    assert r'"cam/\"}, all}. \\\"/x"' in line


def test_a_camera_may_have_several_topics() -> None:
    fleet = Fleet("phid/v1", devices=("a",), cameras=(("cam", "x/#"), ("cam", "y")))
    (camera,) = [m for m in acl.members(fleet) if m.role == "camera"]
    assert camera.rights == (Right("write", "x/#"), Right("write", "y"))


def test_nobody_but_an_operator_and_the_loopback_writes_commands() -> None:
    for member in acl.members(FLEET):
        written = [right.topic for right in member.rights if right.access == "write"]
        commands = [t for t in written if matches(t, "phid/v1/porch/in/ctl/pause")]
        assert bool(commands) == (member.role == "operator")
