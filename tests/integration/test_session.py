"""Getting in, staying in, and being kept out: the session with a real broker."""

from __future__ import annotations

import json
import queue
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from authority import Authority
from few_words import FewWords, connack, suback
from phid.sections import MAX_PACKET_BYTES, Mqtt
from phid.session import Session
from phid.traffic import BrokerEvent, Disconnected, Endpoint
from rig import Daemon, DaemonFactory, Mosquitto, free_port, start_broker, until
from wire import BASE, PATIENCE, Requester

pytestmark = pytest.mark.mosquitto

TAKEN_OVER = 75


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


class Broker:
    """A mosquitto with listeners of its own; `port` is where tests look, in the clear."""

    def __init__(self, folder: Path, extra: str) -> None:
        folder.mkdir(exist_ok=True)
        self._mosquitto = Mosquitto(folder, extra, head="per_listener_settings true\n")
        self.port = self._mosquitto.port
        self._mosquitto.start()

    def stop(self) -> None:
        self._mosquitto.stop()


BrokerWith = Callable[[str], Broker]
RunDaemon = Callable[..., Daemon]


@pytest.fixture
def broker_with(tmp_path: Path) -> Iterator[BrokerWith]:
    brokers: list[Broker] = []

    def start(extra: str) -> Broker:
        brokers.append(Broker(tmp_path / "broker", extra))
        return brokers[-1]

    yield start
    for broker in brokers:
        broker.stop()


@pytest.fixture
def run_daemon(tmp_path: Path) -> Iterator[RunDaemon]:
    daemons: list[Daemon] = []

    def start(port: int, **settings: object) -> Daemon:
        daemons.append(Daemon(port, tmp_path, **settings))
        daemons[-1].start()
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.close()
        print(daemon.log[-5000:])


def tls_listener(port: int, authority: Authority, host: str = "127.0.0.1", *, days: int = 2) -> str:
    certificate, key = authority.issue(f"broker-{host}-{days}", host=host, days=days)
    return (
        f"listener {port} 127.0.0.1\ncertfile {certificate}\nkeyfile {key}\n"
        f"cafile {authority.certificate}\nallow_anonymous true\n"
    )


def is_answered(port: int) -> bool:
    with Requester(port) as asker:
        asker.listen(f"{BASE}/dut/out/status")
        asker.status("online")
        return bool(asker.ask("over here")["text"] == "over here")


def test_tls_with_its_own_authority(
    broker_with: BrokerWith, run_daemon: RunDaemon, authority: Authority
) -> None:
    port = free_port()
    broker = broker_with(tls_listener(port, authority))
    run_daemon(port, mqtt__tls="true", mqtt__ca_file=authority.certificate)
    assert is_answered(broker.port)


def test_a_client_certificate_is_shown_where_it_is_asked_for(
    broker_with: BrokerWith, run_daemon: RunDaemon, authority: Authority
) -> None:
    port = free_port()
    ours, key = authority.issue("device-one")
    broker = broker_with(tls_listener(port, authority) + "require_certificate true\n")
    run_daemon(
        port,
        mqtt__tls="true",
        mqtt__ca_file=authority.certificate,
        mqtt__cert_file=ours,
        mqtt__key_file=key,
    )
    assert is_answered(broker.port)


def test_without_the_certificate_that_is_asked_for_nobody_gets_in(
    broker_with: BrokerWith, run_daemon: RunDaemon, authority: Authority
) -> None:
    port = free_port()
    broker_with(tls_listener(port, authority) + "require_certificate true\n")
    daemon = run_daemon(port, mqtt__tls="true", mqtt__ca_file=authority.certificate)
    until(lambda: daemon.log.count("broker_away") >= 2, what="a refusal")
    assert "broker_connected" not in daemon.log


def test_credentials_come_from_a_directory_and_a_rotated_one_is_taken_at_reconnect(
    broker_with: BrokerWith, run_daemon: RunDaemon, authority: Authority, tmp_path: Path
) -> None:
    port = free_port()
    passwords = tmp_path / "passwords"
    passwords.write_text("")
    subprocess.run(["mosquitto_passwd", "-b", passwords, "porch", "right"], check=True)
    extra = f"allow_anonymous false\npassword_file {passwords}\n"
    broker_with(f"listener {port} 127.0.0.1\n{extra}")
    directory = tmp_path / "credentials"
    directory.mkdir()
    (directory / "mqtt-username").write_text("porch\n")
    (directory / "mqtt-password").write_text("wrong\n")
    daemon = run_daemon(port, mqtt__credentials_dir=directory, mqtt__reconnect_max_s="1")
    until(lambda: "Not authorized" in daemon.log or "Bad user" in daemon.log, what="a refusal")
    (directory / "mqtt-password").write_text("right\n")
    until(lambda: "broker_connected" in daemon.log, what="the connection")
    assert "wrong" not in daemon.log
    assert "right" not in daemon.log


def test_a_rotated_certificate_is_taken_at_reconnect(
    broker_with: BrokerWith, run_daemon: RunDaemon, authority: Authority, tmp_path: Path
) -> None:
    port = free_port()
    broker = broker_with(tls_listener(port, authority) + "require_certificate true\n")
    ours, key = tmp_path / "ours.crt", tmp_path / "ours.key"

    def take(certificate: Path, its_key: Path) -> None:
        for fresh, place in ((certificate, ours), (its_key, key)):
            place.write_bytes(fresh.read_bytes())

    take(*authority.issue("old", days=-1))
    daemon = run_daemon(
        port,
        mqtt__tls="true",
        mqtt__ca_file=authority.certificate,
        mqtt__cert_file=ours,
        mqtt__key_file=key,
        mqtt__reconnect_max_s="1",
    )
    until(lambda: daemon.log.count("broker_away") >= 2, what="a refusal")
    assert "broker_connected" not in daemon.log
    take(*authority.issue("new"))
    assert is_answered(broker.port)


@pytest.mark.parametrize("names", [["x-amzn-mqtt-ca", "mqtt"], []])
def test_the_alpn_names_that_are_set_are_offered(
    run_daemon: RunDaemon, authority: Authority, names: list[str]
) -> None:
    """A port that is shared with HTTPS: the first name that both know is the protocol."""
    certificate, key = authority.issue("shared", host="127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2", "mqtt"])
    with socket.create_server(("127.0.0.1", 0)) as plain:
        daemon = run_daemon(
            plain.getsockname()[1],
            mqtt__tls="true",
            mqtt__ca_file=authority.certificate,
            mqtt__alpn=json.dumps(names),
        )
        plain.settimeout(20 * PATIENCE)
        with context.wrap_socket(plain.accept()[0], server_side=True) as secure:
            assert secure.selected_alpn_protocol() == ("mqtt" if names else None)
            assert secure.recv(1) == b"\x10"  # CONNECT
        daemon.close()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("a stranger's authority", "is not trusted"),
        ("another host's certificate", "IP address mismatch"),
        ("another name's certificate", "Hostname mismatch"),
        ("a self-signed certificate", "self-signed certificate"),
        ("an expired certificate", "has expired"),
        ("no TLS at all", "no TLS at"),
    ],
)
def test_a_bad_certificate_is_told_in_a_sentence(
    broker_with: BrokerWith,
    run_daemon: RunDaemon,
    authority: Authority,
    tmp_path: Path,
    what: str,
    says: str,
) -> None:
    port = free_port()
    signer = Authority(tmp_path / "stranger", "stranger") if "stranger" in what else authority
    host = "10.9.9.9" if "another host" in what else "127.0.0.1"
    listener = tls_listener(port, signer, host, days=-1 if "expired" in what else 2)
    if "no TLS" in what:
        listener = f"listener {port} 127.0.0.1\n"
    if "another name" in what:
        listener = tls_listener(port, signer, "other.example")
    if "self-signed" in what:
        own = Authority(tmp_path / "itself", "127.0.0.1")
        listener = f"listener {port} 127.0.0.1\ncertfile {own.certificate}\nkeyfile {own.key}\n"
    broker_with(listener)
    name = "localhost" if "another name" in what else "127.0.0.1"
    daemon = run_daemon(
        port, mqtt__host=name, mqtt__tls="true", mqtt__ca_file=authority.certificate
    )
    until(lambda: "broker_away" in daemon.log, what="a refusal")
    assert says in daemon.log
    assert "Traceback" not in daemon.log
    assert "broker_connected" not in daemon.log


def test_wrong_credentials_are_tried_slowly_and_told_loudly(
    broker_with: BrokerWith, run_daemon: RunDaemon, tmp_path: Path
) -> None:
    port = free_port()
    passwords = tmp_path / "passwords"
    passwords.write_text("")
    broker_with(f"listener {port} 127.0.0.1\nallow_anonymous false\npassword_file {passwords}\n")
    daemon = run_daemon(port, mqtt__username="nobody")
    until(lambda: "broker_away" in daemon.log, what="a refusal")
    line = next(line for line in daemon.log.splitlines() if "broker_away" in line)
    assert '"level": "error"' in line
    assert float(line.partition('"retry_s": ')[2].partition(",")[0]) >= 30


@pytest.mark.parametrize("trusted", [None, True, False], ids=["plain", "TLS", "TLS, a stranger"])
def test_websockets(
    broker_with: BrokerWith,
    run_daemon: RunDaemon,
    authority: Authority,
    tmp_path: Path,
    *,
    trusted: bool | None,
) -> None:
    port = free_port()
    listener = f"listener {port} 127.0.0.1\nallow_anonymous true\n"
    own: dict[str, object] = {}
    if trusted is not None:
        signer = authority if trusted else Authority(tmp_path / "stranger", "stranger")
        listener = tls_listener(port, signer)
        own = {"mqtt__tls": "true", "mqtt__ca_file": authority.certificate}
    broker = broker_with(f"{listener}protocol websockets\n")
    daemon = run_daemon(port, mqtt__transport="websockets", **own)
    if trusted is False:
        until(lambda: "is not trusted" in daemon.log, what="a refusal")
        assert "broker_connected" not in daemon.log
    else:
        assert is_answered(broker.port)


def test_a_unix_socket(broker_with: BrokerWith, run_daemon: RunDaemon, tmp_path: Path) -> None:
    path = tmp_path / "mqtt.sock"
    broker = broker_with(f"listener 0 {path}\nallow_anonymous true\n")
    run_daemon(1883, mqtt__transport="unix", mqtt__host=path)
    assert is_answered(broker.port)


@pytest.mark.parametrize("own", [None, "another"], ids=["", "or with another, answer twice"])
def test_two_daemons_with_one_client_id_do_not_fight_for_ever(
    start_daemon: DaemonFactory, mosquitto: Mosquitto, tmp_path: Path, own: str | None
) -> None:
    often: dict[str, object] = {"health__heartbeat_s": 1}
    first = start_daemon(**often)
    (tmp_path / "second").mkdir()
    ids = {"mqtt__client_id": own} if own else {}
    second = Daemon(mosquitto.port, tmp_path / "second", **often, **ids)
    second.start()
    try:
        both = (first, second)
        leaver = until(lambda: next((d for d in both if d.has_ended), None), what="giving way")
        assert leaver.process is not None
        assert leaver.process.returncode == TAKEN_OVER
        assert "taken_over" in leaver.log
        assert is_answered(mosquitto.port)
        assert not all(d.has_ended for d in both)
    finally:
        second.close()


def test_what_the_process_before_us_never_read_of_itself_is_no_second_daemon(
    start_daemon: DaemonFactory, mosquitto: Mosquitto
) -> None:
    """It came back once, unheard, and died: the broker has kept all of it for our client id."""
    topic = f"{BASE}/dut/out/status"
    with Requester(mosquitto.port, name="phid-dut", session_expiry_s=3600) as before:
        before.listen(topic)
    with Requester(mosquitto.port) as requester:
        said = {"v": 1, "state": "online", "since": 1, "ts": 1, "version": "0"}
        for n in (1, 2):  # less than any name that a process gives itself
            requester.publish(topic, said | {"session": f"0-{n}"})
        daemon = start_daemon()
        assert requester.ask("still there?")["text"] == "still there?"
        assert not daemon.logged("taken_over")
        assert daemon.stop() == 0


def test_an_acl_that_silences_what_it_granted_is_found_out(
    broker_with: BrokerWith, run_daemon: RunDaemon, tmp_path: Path
) -> None:
    acl = tmp_path / "acl"
    # Mosquitto grants the subscription and then delivers nothing that may not be read.
    acl.write_text(
        f"pattern write {BASE}/dut/#\npattern read {BASE}/dut/out/#\npattern read {BASE}/client/#\n"
    )
    broker = broker_with(f"acl_file {acl}\n")
    run_daemon(broker.port)
    with Requester(broker.port) as watcher:
        watcher.listen(f"{BASE}/dut/out/status")
        assert "do not reach us" in watcher.status("degraded", timeout=40)["reason"]


def test_an_acl_that_only_keeps_us_from_asking_ourselves_is_no_trouble(
    broker_with: BrokerWith, run_daemon: RunDaemon, tmp_path: Path
) -> None:
    acl = tmp_path / "acl"
    acl.write_text(
        f"pattern write {BASE}/dut/out/#\npattern read {BASE}/dut/#\n"
        f"pattern readwrite {BASE}/client/#\n"
    )
    broker = broker_with(f"acl_file {acl}\n")
    daemon = run_daemon(broker.port)
    with Requester(broker.port) as watcher:
        watcher.listen(f"{BASE}/dut/out/status")
        watcher.status("online")
        time.sleep(11)  # longer than the patience with the ping
        assert watcher.status("online")
    assert "degraded" not in daemon.log


def test_a_receive_maximum_of_five_is_kept(broker_with: BrokerWith, run_daemon: RunDaemon) -> None:
    broker = broker_with("max_inflight_messages 5\n")
    daemon = run_daemon(broker.port, limits__backlog="200", limits__per_client="200")
    with Requester(broker.port) as asker:
        asker.listen(f"{BASE}/dut/out/status")
        asker.status("online")
        for n in range(150):
            asker.request({"id": f"r{n}", "prompt": "x"})
        for n in range(150):
            assert asker.outcome(f"r{n}")["type"] == "result"
    assert "broker_away" not in daemon.log


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_is_sent_at_once_than_a_broker_takes_which_acknowledges_nothing(
    run_daemon: RunDaemon, most: int
) -> None:
    published: list[bytes] = []

    def serve(connection: socket.socket, packets: Iterator[tuple[int, bytes]]) -> None:
        for header, body in packets:
            match header >> 4:
                case 1:
                    connection.sendall(connack(0x21, 0, most))
                case 8:
                    connection.sendall(suback(body, filters=3))
                case 3 if header & 6:
                    published.append(body)

    with FewWords(serve) as strict:
        daemon = run_daemon(strict.port)
        until(lambda: "broker_connected" in daemon.log, what="the connection")
        until(lambda: len(published) >= most, what="what it takes")
        time.sleep(1)  # whatever is too much would have come
    assert len(published) == most


def test_an_answer_over_the_brokers_packet_limit_is_an_error_not_a_broken_connection(
    broker_with: BrokerWith, run_daemon: RunDaemon
) -> None:
    broker = broker_with("max_packet_size 20000\n")
    daemon = run_daemon(broker.port)
    with Requester(broker.port) as asker:
        asker.listen(f"{BASE}/dut/out/status")
        asker.status("online")
        script = '@script {"tokens": 9000}'
        error = asker.ask(script, id="long", max_tokens=4000)
        assert (error["type"], error["code"]) == ("error", "too_large")
        assert asker.ask("short")["text"] == "short"
    assert "broker_away" not in daemon.log


def test_retained_state_is_told_again_to_a_broker_that_forgot_it(
    start_daemon: DaemonFactory, mosquitto: Mosquitto
) -> None:
    start_daemon(mqtt__reconnect_max_s="1")
    mosquitto.stop(signal.SIGKILL)
    for file in mosquitto.folder.glob("*.db"):
        file.unlink()
    mosquitto.start()
    assert is_answered(mosquitto.port)


def test_a_broker_that_accepts_and_never_answers_is_given_up(run_daemon: RunDaemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        daemon = run_daemon(mute.getsockname()[1])
        threading.Thread(target=lambda: [mute.accept() for _ in range(3)], daemon=True).start()
        until(lambda: "did not answer within" in daemon.log, timeout=30, what="giving up")
        assert daemon.stop() == 0


def test_a_fault_of_ours_in_connecting_is_told_and_the_next_attempt_is_made(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One stands for all: a packet size that settings do not let through."""
    mqtt = Mqtt(reconnect_max_s=0.1).model_copy(update={"packet_bytes": MAX_PACKET_BYTES + 1})
    events: queue.SimpleQueue[BrokerEvent] = queue.SimpleQueue()
    session = Session(Endpoint(mqtt, "us", ("in",)), events.put, lambda _: None)
    session.start()
    for _ in range(3):
        event = events.get(timeout=5 * PATIENCE)
        assert isinstance(event, Disconnected)
        assert re.search(r"a fault of ours .*: MQTTException at properties\.py:\d+", event.reason)
    session.stop()
    told = capsys.readouterr()
    assert "connection_failed" in told.out + told.err


def test_a_subscription_that_is_refused_is_told(run_daemon: RunDaemon) -> None:
    """A broker of few words: yes to the connection, no to the first subscription."""
    connack = bytes([0x20, 3, 0, 0, 0])
    with socket.create_server(("127.0.0.1", 0)) as strict:

        def serve() -> None:
            connection, _ = strict.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(connack)
                subscribe = connection.recv(4096)
                # Packet id, no properties, and a reason code for each of the three filters.
                suback = bytes([0x90, 6]) + subscribe[2:4] + bytes([0, 0x87, 0x01, 0x01])
                connection.sendall(suback)
                while connection.recv(4096):
                    pass

        threading.Thread(target=serve, daemon=True).start()
        daemon = run_daemon(strict.getsockname()[1])
        until(lambda: "the broker refuses us phid/v1/dut/in/#" in daemon.log, what="the word")
        until(lambda: '"state": "degraded"' in daemon.log, what="the state")


def test_a_broker_of_old_is_spoken_to_in_its_own_protocol_from_the_first_try_next_time(
    run_daemon: RunDaemon, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    port, broker = start_broker("rumqttd 3.1.1", folder)
    try:
        daemon = run_daemon(port, mqtt__reconnect_max_s="0.5")
        until(lambda: "broker_connected" in daemon.log, what="the connection")
        assert '"event": "fell_back"' in daemon.log
        assert daemon.stop() == 0
        refusals = daemon.log.count("broker_away")
        assert refusals == 3
        daemon.start()
        until(lambda: daemon.log.count("broker_connected") == 2, what="the second connection")
        assert daemon.log.count("broker_away") == refusals
    finally:
        assert isinstance(broker, subprocess.Popen)
        assert broker.stdin is not None
        broker.stdin.close()
        broker.wait(10 * PATIENCE)
