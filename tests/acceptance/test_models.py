"""phid run with several models and none named: what `fit` prefers, measured here, is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from rig import ROOT, DaemonFactory
from wire import BASE, Requester

pytestmark = [pytest.mark.mosquitto, pytest.mark.model]


def test_of_several_models_the_preferred_one_is_run(
    start_daemon: DaemonFactory, requester: Requester, models_dir: Path, tmp_path: Path
) -> None:
    store = tmp_path / "two models"
    store.mkdir()
    (store / "smollm2-135m-instruct").symlink_to(models_dir / "smollm2-135m-instruct")
    (store / "my-own").symlink_to(ROOT / "tests" / "models" / "tiny-phi3v")
    start_daemon(engine__runtime="genai", models_dir=str(store), wait=False)
    requester.listen(f"{BASE}/dut/out/status")
    # One that was put there on purpose goes before the demo model.
    assert requester.status("online", timeout=60)["model"] == "my-own"
    result = requester.ask("What is there?", max_tokens=4)
    assert result["model"] == "my-own"
