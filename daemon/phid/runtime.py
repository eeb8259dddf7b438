"""The native runtime: text and Phi-3 vision models through ONNX Runtime GenAI."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phid import (
    devices,
    execution,
    graphs,
    manifest,
    memory,
    placement,
    rope,
    soundness,
    threads,
    traces,
    vocabulary,
)
from phid.errors import Code, Refused
from phid.jobs import EngineFacts, Load, Loading
from phid.native import og
from phid.providers import PROVIDERS, UNKNOWN
from phid.soundness import CONFIG
from phid.text import TextRuntime

if TYPE_CHECKING:
    from collections.abc import Callable

# Tokens of the warm-up: those whose kernels are looked at, and those that are timed (for at most
# so long: on a small board a token of a large model takes a quarter of a second).
_LOOKED_AT, _TIMED, _TIMED_S = 2, 8, 0.25
# What CUDA is shown while loading: prompts and answers, in tokens, and how long the cache is.
_REHEARSED = ((8, 2, 64), (640, 4, 2048))


def load(load: Load, report: Callable[[Loading], None]) -> TextRuntime:
    """Load the model in the folder `load.path`; generate a token with it, and show it a frame.

    Raises Refused where the folder holds no model this runtime can run, or memory is not enough.
    """
    began_s = time.monotonic()
    report(Loading("reading the configuration"))
    folder = Path(load.path)
    config = _read_config(folder)
    try:
        manifest.read(folder)
    except manifest.Newer as newer:
        raise Refused(Code.UNSUPPORTED, str(newer)) from None
    except manifest.Damaged:
        pass  # what it would say is for `phid models verify`
    kind = _kind(config)
    estimate = _estimate_bytes(folder, config, kind)
    if not devices.has_own_memory(load.provider):
        memory.check(estimate, load.memory_bytes)
    count = load.threads or threads.usable_cpus()
    context = int(config["context_length"])
    native = _native_config(load, config, count)
    report(Loading("loading the model"))
    try:
        model = og.Model(native)
        tokenizer = og.Tokenizer(model)
        report(Loading("warming up"))
        if load.provider == "cuda":
            _rehearse(model, tokenizer, min(load.max_context or context, context))
        warm = _warm_up(model, tokenizer, config)
    except RuntimeError as error:
        raise _explained(error, folder) from None
    measured = warm.placement or dict(load.proven)
    tokens = vocabulary.read(folder / "tokenizer.json")
    if tokens.pieces and (fault := soundness.misfit(len(tokens.pieces), config.get("vocab_size"))):
        raise Refused(Code.INTERNAL, f"tokenizer.json belongs to another model: {fault}")
    tokens = tokens.of_size(int(config.get("vocab_size") or 0))
    facts = EngineFacts(
        model=load.model,
        kind=kind,
        runtime="onnxruntime-genai",
        runtime_version=og.__version__,
        provider=traces.main_provider(measured) or UNKNOWN,
        threads=count,
        context=min(load.max_context or context, context),
        kv_bytes_per_token=warm.kv_bytes_per_token,
        estimate_mb=estimate >> 20,
        load_ms=_since_ms(began_s),
        placement=measured,
        tokens_per_s=warm.tokens_per_s,
        prefill_slice=load.prefill_slice or PROVIDERS[load.provider].slice,
    )
    line = rope.of_model(folder, config, facts.provider)
    if kind == "text":
        return TextRuntime(model, tokenizer, tokens, load, facts, line)
    # It loads OpenCV, which a text model's engine has no use for.
    from phid.vision import Eye, VisionRuntime  # noqa: PLC0415

    eye = Eye(model, tokenizer, stock=load.processor == "stock")
    facts = replace(facts, crops_padded=eye.views > 0, load_ms=_since_ms(began_s))
    return VisionRuntime(model, tokenizer, tokens, load, facts, line, eye)


def _native_config(load: Load, config: dict[str, Any], count: int) -> Any:
    """The model's own configuration, with what `load` says put over it."""
    native = og.Config(load.path)
    # Left alone, the runtime takes one thread on some machines and all of them on others.
    options: dict[str, Any] = {"intra_op_num_threads": count}
    if load.profile:
        options["enable_profiling"] = load.profile
    native.overlay(json.dumps({"model": execution.sessions(load, config, options)}))
    execution.place(native, load)
    return native


def _since_ms(began_s: float) -> int:
    return round((time.monotonic() - began_s) * 1e3)


def _read_config(folder: Path) -> dict[str, Any]:
    """Read the `model` part of the folder's configuration."""
    path = folder / CONFIG
    if not path.is_file():
        raise Refused(Code.NOT_FOUND, f"there is no {CONFIG} in {folder}")
    try:
        model: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model"]
        files = [part["filename"] for part in model.values() if _has_file(part)]
    except (ValueError, KeyError, AttributeError) as error:
        raise Refused(Code.INTERNAL, f"{path} cannot be read: {error}") from None
    for name in files:
        if not (folder / name).is_file():
            raise Refused(Code.NOT_FOUND, f"{CONFIG} names {name}, which is not in {folder}")
    return model


def _explained(error: RuntimeError, folder: Path) -> Exception:
    """A fault of the folder that a person can mend, if there is one; else the runtime's own error.

    It is looked for only now, so that a sound model starts without being searched for faults.
    """
    try:
        fault = next(soundness.faults(folder), None)
    except (soundness.NoModel, OSError):
        fault = None
    if fault is None and "was not found" in str(error):  # an input or output of a graph
        fault = (
            f"{CONFIG} tells of another kind of model, text or vision, than its graphs ({error})"
        )
    if fault is None:
        return error
    return Refused(Code.INTERNAL, f"{fault}: fetch the model again (`phid models verify`)")


def _estimate_bytes(folder: Path, config: dict[str, Any], kind: Literal["text", "vision"]) -> int:
    """What the model will take of memory: by its graphs, and the data that lies beside each."""
    names = {part["filename"] for part in config.values() if _has_file(part)}
    files = sum(path.stat().st_size for name in names for path in folder.glob(f"{name}*"))
    named = _has_file(config.get("decoder"))
    block = graphs.block_size(folder / config["decoder"]["filename"]) if named else graphs.BLOCK
    return memory.model_bytes(files, block, kind)


def _has_file(part: Any) -> bool:
    return isinstance(part, dict) and bool(part.get("filename"))


def _kind(config: dict[str, Any]) -> Literal["text", "vision"]:
    """Tell by its parts what a model takes: a type's name says nothing about new ones.

    Raises Refused for a model that takes what this runtime cannot give.
    """
    name = config.get("type", "?")
    if "vision" in config and name == "phi3v":
        if not all(_has_file(config.get(graph)) for graph in execution.GRAPHS):
            graphs_needed = ", ".join(execution.GRAPHS)
            raise Refused(Code.UNSUPPORTED, f"a {name} model needs the graphs {graphs_needed}")
        return "vision"
    for part in ("vision", "speech", "encoder"):
        if part in config:
            raise Refused(Code.UNSUPPORTED, f"model type {name!r} ({part}) is not supported")
    return "text"


@dataclass(frozen=True, slots=True)
class _Warm:
    """What the first tokens showed."""

    kv_bytes_per_token: int
    placement: dict[str, float]
    tokens_per_s: float


def _warm_up(model: Any, tokenizer: Any, config: dict[str, Any]) -> _Warm:
    """Generate a few tokens, so the first job does not pay for it: some looked at, some timed."""
    prompt = tokenizer.encode("Hello")
    params = og.GeneratorParams(model)
    most = _LOOKED_AT + _TIMED
    params.set_search_options(
        max_length=len(prompt) + most, min_length=len(prompt) + most, do_sample=False, num_beams=1
    )
    generator = og.Generator(model, params)
    with placement.measured(generator) as told:
        generator.append_tokens(prompt)
        for _ in range(_LOOKED_AT):
            generator.generate_next_token()
        measured = told()
    began_s, count = time.monotonic(), 0
    while count < _TIMED and (count == 0 or time.monotonic() - began_s < _TIMED_S):
        generator.generate_next_token()
        count += 1
    tokens_per_s = count / max(time.monotonic() - began_s, 1e-6)
    return _Warm(_kv_bytes(generator, config["decoder"]), measured, round(tokens_per_s, 1))


def _rehearse(model: Any, tokenizer: Any, context: int) -> None:
    """Have the GPU load the kernels that jobs will need, or the first would wait a second for them.

    Which ones are needed depends on how long the prompt, its slices and the cache are.
    """
    word = tokenizer.encode("Hello")[:1]
    for prompt, answer, cache in _REHEARSED:
        if cache > context:
            return
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=cache, min_length=cache, num_beams=1)
        try:
            generator = og.Generator(model, params)
            # In two slices: the second finds a cache that has something in it.
            for tokens in (prompt * 4 // 5, prompt - prompt * 4 // 5):
                generator.append_tokens(word.repeat(tokens))
            for _ in range(answer):
                generator.generate_next_token()
        except RuntimeError:  # the card has no room for so much; the warm-up tells what is broken
            return


def _kv_bytes(generator: Any, decoder: dict[str, Any]) -> int:
    """The cache's bytes per token."""
    width = 4
    try:
        name = decoder["inputs"]["past_key_names"].replace("%d", "0")
        width = generator.get_input(name).dtype.itemsize
    except (KeyError, RuntimeError):
        # A cache of another form: it is reckoned as float32, the larger.
        pass
    heads = decoder["num_hidden_layers"] * decoder["num_key_value_heads"]
    return int(heads * decoder["head_size"] * 2 * width)
