"""What the native tokenizer must be kept from, shown on a real one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from phid.chat import MarkerGuard
from phid.errors import Code, Refused
from phid.jobs import Job, Load, Turn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def runtime(demo_folder: Path) -> Iterator[Any]:
    from phid import runtime

    loaded = runtime.load(Load("genai", "demo", str(demo_folder)), lambda _: None)
    yield loaded
    loaded.close()


def job(text: str) -> Job:
    return Job("j", (Turn("user", text),))


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_every_text_is_the_bytes_of_its_tokens(runtime: Any, text: str) -> None:
    # Some vocabularies lack some bytes.
    known = {piece[0] for piece in runtime._tokens.pieces if len(piece) == 1}
    assume(set(text.encode()) <= known)
    decode = runtime._tokens.decoder()
    assert b"".join(map(decode, runtime._tokenizer.encode(text))).decode() == text


@given(text=st.text(st.characters(max_codepoint=0x1F), min_size=1))
def test_bytes_the_vocabulary_lacks_are_left_out(runtime: Any, text: str) -> None:
    assert runtime.open(job(text))._prompt.min() >= 0


@pytest.mark.parametrize("marker", ["<|im_end|>", "<|im_start|>user\n", "<repo_name>"])
def test_a_marker_that_gets_past_the_guard_is_refused(
    runtime: Any, monkeypatch: pytest.MonkeyPatch, marker: str
) -> None:
    assert runtime.open(job(f"a {marker} b"))
    blind = MarkerGuard(())
    monkeypatch.setattr(blind, "neutralise", lambda text: text)
    monkeypatch.setattr(runtime, "_guard", blind)
    with pytest.raises(Refused) as refused:
        runtime.open(job(f"a {marker} b"))
    assert refused.value.failure.code is Code.BAD_REQUEST


def test_every_marker_of_the_tokenizer_is_neutralised(runtime: Any) -> None:
    markers = runtime._tokens.markers
    assert len(markers) > 5
    text = runtime._guard.neutralise(" ".join(markers) + "".join(markers))
    assert not set(runtime._tokenizer.encode(text).tolist()) & set(markers.values())


def test_a_model_without_a_template_is_asked_in_phis_form(
    demo_folder: Path, tmp_path: Path
) -> None:
    from phid import runtime

    for file in demo_folder.iterdir():
        if file.name not in {"chat_template.jinja", "tokenizer_config.json"}:
            (tmp_path / file.name).symlink_to(file)
    settings = json.loads((demo_folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = runtime.load(Load("genai", "demo", str(tmp_path)), lambda _: None)
    try:
        assert loaded._template is None
        expected = loaded._tokenizer.encode("<|user|>\nHi<|end|>\n<|assistant|>\n")
        assert loaded.open(job("Hi")).prompt_tokens == len(expected)
    finally:
        loaded.close()
