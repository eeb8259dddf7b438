"""A model with its worker, whose files come and go."""

from __future__ import annotations

import shutil
from pathlib import Path

from phid import lineup
from phid.errors import Code
from phid.member import Member
from phid.settings import Settings
from phid.worker import Worker
from rig import ROOT

TINY = ROOT / "tests" / "models" / "tiny-phi3v"


def test_a_model_that_comes_later_is_reckoned_with_then(tmp_path: Path) -> None:
    settings = Settings(device="dut", models_dir=tmp_path, engine={"model": "eyes"})  # type: ignore[arg-type]
    lines = lineup.read(settings)
    model = lines.models[0]
    member = Member(model, Worker(model.load, lambda _: None, restart_max_s=1))
    assert member.look(lines.again)
    assert not member.look(lines.again), "it is told once"
    assert member.refusal is not None
    assert (member.refusal.code, member.refusal.retry_after_ms) == (Code.NOT_FOUND, None)
    assert (member.kind, member.model.needed_bytes) == (None, 0)
    shutil.copytree(TINY, tmp_path / "eyes")
    assert member.look(lines.again)
    assert (member.refusal, member.kind) == (None, "vision")
    assert member.model.needed_bytes > 100 << 20


def test_a_folder_that_may_not_be_looked_at_is_left_to_the_engine(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    settings = Settings(device="dut", models_dir=tmp_path)
    model = lineup.model_of(settings, "a file")
    assert model is not None
    assert lineup.absence(model.load) is not None
    model = lineup.model_of(settings, "x" * 300)
    assert model is not None
    assert lineup.absence(model.load) is None  # the name is too long for any file
