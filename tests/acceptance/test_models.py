"""phid run with several models and none named: what `fit` prefers, measured here, is loaded."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from rig import ROOT, DaemonFactory
from wire import BASE, Requester

MODELS = ROOT / "tests" / "models"

pytestmark = [pytest.mark.mosquitto, pytest.mark.model]


def test_of_several_models_each_kind_answers_what_it_is_for(
    start_daemon: DaemonFactory, requester: Requester, models_dir: Path, tmp_path: Path
) -> None:
    store = tmp_path / "two models"
    store.mkdir()
    (store / "smollm2-135m-instruct").symlink_to(models_dir / "smollm2-135m-instruct")
    # One that was put there on purpose goes before the demo model, but not before its kind.
    (store / "my-own").symlink_to(MODELS / "tiny-phi3v")
    start_daemon(engine__runtime="genai", models_dir=str(store), wait=False)
    requester.listen(f"{BASE}/dut/out/status")
    assert requester.status("online", timeout=60)["model"] == "smollm2-135m-instruct"
    result = requester.ask("What is there?", max_tokens=4)
    assert result["model"] == "smollm2-135m-instruct"
    picture = base64.b64encode((MODELS / "scene.jpg").read_bytes()).decode()
    frame = {"id": "f", "prompt": "Describe the scene.", "images": [{"b64": picture}]}
    requester.publish(f"{BASE}/dut/in/frame/{requester.name}", frame, reply_to=requester.rx)
    seen = requester.outcome("f", 60)
    assert seen["model"] == "my-own"
    assert "triangle" in seen["text"]
