"""Settings: from the file and the environment, and never an unknown one in silence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phid import control, settings
from phid.settings import Settings, SettingsError


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("PHID_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "phid.toml"


def load(file: Path, text: str = "") -> Settings:
    file.write_text(text, encoding="utf-8")
    return settings.load(file)


def test_the_environment_wins_over_the_file_and_the_file_over_the_defaults(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "device = 'filed'\n[mqtt]\nport = 1111\nhost = 'filed'\n"
    monkeypatch.setenv("PHID_MQTT__PORT", "2222")
    loaded = load(file, text)
    assert loaded.mqtt.port == 2222
    assert loaded.mqtt.host == "filed"
    assert loaded.device == "filed"
    assert loaded.mqtt.base == "phid/v1"


@pytest.mark.parametrize(
    ("name", "most", "beyond"),
    [
        ("mqtt.packet_bytes", "268435455", "268435456"),
        ("mqtt.session_expiry_s", "4294967295", "4294967296"),
        ("health.heartbeat_s", "1000000000", "1000000001"),
        ("mqtt.reconnect_max_s", "1000000000", "1e18"),
        ("limits.drain_s", "1000000000", "inf"),
        ("engine.keep_alive_s", "1000000000", "nan"),
        ("vision.parts_s", "3600", "3601"),
    ],
)
def test_what_no_clock_and_no_packet_can_hold_is_refused_with_the_most_there_may_be(
    file: Path, name: str, most: str, beyond: str
) -> None:
    section, _, key = name.partition(".")
    load(file, f"[{section}]\n{key} = {most}\n")
    says = "finite" if beyond in ("inf", "nan") else f"less than or equal to {most}"
    with pytest.raises(SettingsError, match=f"{name}: .*{says}"):
        load(file, f"[{section}]\n{key} = {beyond}\n")


@pytest.mark.parametrize(
    ("text", "name", "nearest"),
    [
        ("[mqtt]\nprot = 1\n", "mqtt.prot", "mqtt.port"),
        ("devise = 'x'\n", "devise", "device"),
        ("[limit]\nbacklog = 1\n", "limit", "limits"),
        ("[limits]\nmax_token = 1\n", "limits.max_token", "limits.max_tokens"),
        ("[mqtt]\npassword = 'x'\n", "mqtt.password", ""),  # of credentials alone
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(
    file: Path, text: str, name: str, nearest: str
) -> None:
    with pytest.raises(SettingsError, match=f"{name} is no setting.*{nearest}"):
        load(file, text)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("PHID_MQTT__PROT", "PHID_MQTT__PORT"), ("PHID_MQTT_PORT", "PHID_MQTT__PORT")],
)
def test_an_unknown_variable_is_refused_with_the_nearest(
    file: Path, monkeypatch: pytest.MonkeyPatch, name: str, nearest: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError, match=f"{name} is no setting.*{nearest}"):
        load(file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[mqtt]\nport = 0\n", "mqtt.port"),
        ("[mqtt]\nport = 'x'\n", "mqtt.port"),
        ("[limits]\nbacklog = 0\n", "limits.backlog"),
        ("[limits]\ndrain_s = -1\n", "limits.drain_s"),
        ("[health]\ninterval_s = 0\n", "health.interval_s"),
        ("[health]\ninterval_s = inf\n", "health.interval_s"),
        ("[log]\nlevel = 'loud'\n", "log.level"),
        ("[engine]\nruntime = 'gpu'\n", "engine.runtime"),
        ("device = 'a/b'\n", "device"),
        ("device = 'all'\n", "device"),
        ("[mqtt]\nbase = 'a/+/b'\n", "base"),
        ("mqtt = 1\n", "mqtt"),
        ("not toml", "phid.toml"),
    ],
)
def test_a_wrong_value_is_told_by_name(file: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        load(file, text)


def test_all_mistakes_are_told_at_once(file: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load(file, "[mqtt]\nport = 0\n[limits]\nbacklog = 0\n")
    assert "mqtt.port" in str(caught.value)
    assert "limits.backlog" in str(caught.value)


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        settings.load(tmp_path / "none.toml")


def test_a_file_that_is_no_text_is_told(file: Path) -> None:
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"phid\.toml"):
        settings.load(file)


def test_a_reload_takes_only_what_it_may(file: Path) -> None:
    old = load(file, "[mqtt]\nport = 1\n[limits]\nbacklog = 1\nper_client = 1\n")
    new = load(file, "[mqtt]\nport = 2\n[limits]\nbacklog = 2\nper_client = 1\n")
    assert settings.differences(old, new) == ["mqtt.port", "limits.backlog"]
    merged = settings.merge(old, new, lambda name: name.startswith("limits."))
    assert merged.limits.backlog == 2
    assert merged.mqtt.port == 1
    assert old.limits.backlog == 1


def test_every_verb_can_be_switched_off_and_none_is_by_default() -> None:
    assert settings.Control().allow == tuple(control.VERBS)


def test_a_device_without_a_name_has_its_hosts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "line 3.plant.example")
    assert load(file).device == "line-3"


def test_every_setting_has_a_description() -> None:
    assert all(field.description for field in settings.names().values())


def test_providers_are_named_in_any_case(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(file).wanted.providers == ("auto",)
    text = "providers = ['CUDA', 'DirectML', 'cpu']\n"
    assert load(file, text).wanted.providers == ("cuda", "directml", "cpu")
    for value in ("QNN,OpenVINO", '["qnn", "openvino"]'):
        monkeypatch.setenv("PHID_PROVIDERS", value)
        assert load(file, text).providers == ("qnn", "openvino")


def test_a_misspelt_provider_is_refused_with_the_nearest(file: Path) -> None:
    with pytest.raises(SettingsError, match="providers: 'cude' is no provider: did you mean cuda"):
        load(file, "providers = ['cude']\n")
    with pytest.raises(SettingsError, match="'abc' is no provider: there are auto, cuda, directml"):
        load(file, "providers = ['abc']\n")
    with pytest.raises(SettingsError, match="providers: name one at least, or auto"):
        load(file, "providers = []\n")
    with pytest.raises(SettingsError, match=r"provider_options.cud is no setting.*\.cuda"):
        load(file, "[provider_options.cud]\nx = 1\n")


def test_a_provider_has_options_of_its_own(file: Path) -> None:
    text = (
        "require_provider = true\nstate_dir = '/s'\n[provider_options.openvino]\n"
        "device_type = 'GPU'\nnum_streams = 2\n[provider_options]\nqnn = {shared = true}\n"
    )
    wanted = load(file, text).wanted
    assert wanted.strict
    assert wanted.options_of("openvino") == (("device_type", "GPU"), ("num_streams", "2"))
    assert wanted.options_of("qnn") == (("shared", "1"),)
    assert wanted.options_of("cuda") == ()
    assert wanted.memory == Path("/s/providers.json")
