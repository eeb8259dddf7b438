"""What is wrong with a model's folder, as far as can be told without loading it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from phid import graphs, manifest
from phid.graphs import NotOnnx

CONFIG = "genai_config.json"
_LFS = b"version https://git-lfs"
_TOKENIZER = "tokenizer.json"
# A model's vocabulary is rounded up, by a few hundred at most; a tokenizer that names a smaller
# share of it belongs to another model.
_LEAST_NAMED = 0.9


class NoModel(Exception):  # noqa: N818 - it is an answer
    """The folder holds no model; the message says why, and how to mend it."""


def config(folder: Path) -> dict[str, Any]:
    """The `model` part of a folder's genai_config.json. Raises NoModel or PermissionError."""
    path = folder / CONFIG
    try:
        model = json.loads(path.read_text("utf-8"))["model"]
        int(model["context_length"])
        str(model["type"])
        dict(model.get("decoder") or {})
    except FileNotFoundError:
        hint = _below(folder)
        raise NoModel(f"there is no {CONFIG} in {folder}: {hint}") from None
    except PermissionError:  # the model may be whole: this user may not look
        raise
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        says = f"{path} cannot be read ({type(error).__name__}: {error})"
        raise NoModel(f"{says}: fetch it again") from None
    checked: dict[str, Any] = model
    return checked


def _below(folder: Path) -> str:
    """Where the model may be, if the folder that was named is above it."""
    if not folder.is_dir():
        return "there is no such folder"
    found = sorted(folder.glob(f"*/{CONFIG}")) + sorted(folder.glob(f"*/*/{CONFIG}"))
    if found:
        return f"{found[0].parent} has one"
    return "an ONNX Runtime GenAI model has one beside its .onnx files"


def faults(folder: Path) -> Iterator[str]:
    """In words, whatever makes the model in a folder unusable. Raises NoModel or OSError."""
    model = config(folder)
    try:
        manifest.read(folder)
    except manifest.Newer as newer:
        yield str(newer)
    except manifest.Damaged:
        pass  # what it would say is told by `verify`; the model may be whole
    wanted = {Path(_TOKENIZER), Path("tokenizer_config.json")}
    wanted |= {Path(name) for name in _named(model)}
    for name in sorted(wanted):
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif _is_pointer(path):
            yield f"{name} is a Git LFS pointer, not the file"
        elif path.suffix == ".onnx":
            yield from _graph_faults(folder, path)
        elif path.name == _TOKENIZER:
            yield from _tokenizer_faults(path, model)


def _named(part: Any) -> Iterable[str]:
    """Every file name in a part of genai_config.json."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key in ("filename", "config_filename") and isinstance(value, str):
                yield value
            else:
                yield from _named(value)
    elif isinstance(part, list):
        for item in part:
            yield from _named(item)


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def _graph_faults(folder: Path, path: Path) -> Iterator[str]:
    try:
        ends = graphs.read(path).external()
    except NotOnnx as error:
        yield f"{path.name} is no whole ONNX file ({error})"
        return
    for location, end in sorted(ends.items()):
        data = path.parent / location
        if not data.resolve().is_relative_to(folder.resolve()) and not data.is_symlink():
            yield f"{path.name} keeps weights outside its folder, in {location}"
        elif not data.is_file():
            yield f"{location}, which {path.name} needs, is missing"
        elif (size := data.stat().st_size) < end:
            yield f"{location} is cut off: it has {size} bytes, and {path.name} needs {end}"


def _tokenizer_faults(path: Path, model: dict[str, Any]) -> Iterator[str]:
    vocabulary = model.get("vocab_size")
    if not isinstance(vocabulary, int) or vocabulary <= 0:
        return
    try:
        most, count = _numbers(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        yield f"{path.name} cannot be read ({type(error).__name__}: {error})"
        return
    if says := misfit(max(most + 1, count), vocabulary):
        yield f"{path.name} belongs to another model: {says}"


def misfit(tokens: int, vocabulary: Any) -> str:
    """Why a tokenizer of so many tokens is not a model's of such a vocabulary; "" if it may be."""
    if not isinstance(vocabulary, int) or not tokens:
        return ""
    if tokens > vocabulary or tokens < _LEAST_NAMED * vocabulary:
        return f"it has {tokens} tokens, and the model {vocabulary}"
    return ""


def _numbers(tokenizer: dict[str, Any]) -> tuple[int, int]:
    """The greatest token, and how many there are; -1 and 0 where the form is not known."""
    words = (tokenizer.get("model") or {}).get("vocab") or {}
    # A unigram vocabulary is a list: a token's number is its place there.
    tokens = set(words.values()) if isinstance(words, dict) else set(range(len(words)))
    tokens |= {added["id"] for added in tokenizer.get("added_tokens") or ()}
    return max(tokens, default=-1), len(tokens)
