"""The embedded MQTT 5 broker, for trying phid without installing one. iotcore's one home."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

# rumqttd's own format. Version 5 only: a property in any publish brings its 3.1.1 listener down.
_CONFIG = """\
id = 0
[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 500
max_segment_size = 104857600
max_segment_count = 10
[v5.1]
name = "phid"
listen = "{host}:{port}"
next_connection_delay_ms = 0
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 16777216
max_inflight_count = 200
dynamic_filters = true
"""


def run(host: str, port: int) -> int:
    """Serve until SIGINT or SIGTERM: the exit status."""
    try:
        import iotcore  # noqa: PLC0415 - an extra
    except ImportError:
        return _fail("the embedded broker is in an extra: pip install 'phid[demo]'")
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stopped.set())
    with tempfile.TemporaryDirectory(prefix="phid-broker-") as folder:
        config = Path(folder) / "rumqttd.toml"
        config.write_text(_CONFIG.format(host=_bracketed(host), port=port), encoding="utf-8")
        broker = iotcore.Broker(config_path=str(config))
        try:
            _check_free(host, port)
            broker.start()
        except (OSError, RuntimeError) as error:
            return _fail(f"no broker on {host}:{port}: {error}")
        print(f"listening on {host}:{port}, MQTT 5 only", flush=True)
        try:
            while not stopped.wait(0.5):
                if not broker.is_running:
                    return _fail("the broker has ended")
        finally:
            broker.stop()
    return 0


def _check_free(host: str, port: int) -> None:
    """Raise OSError in the system's own words when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        if os.name == "posix":  # else a port in TIME_WAIT would look taken
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _fail(why: str) -> int:
    print(f"phid broker: {why}", file=sys.stderr)
    return 1
