"""The native runtime: text models through ONNX Runtime GenAI."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phid import chat, threads, vocabulary
from phid.errors import Code, Refused
from phid.jobs import EngineFacts, Job, Load, Loading, Sampling, Turn

# The only switch that turns off all of its telemetry, and only before the import.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime_genai as og

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONFIG = "genai_config.json"


def load(load: Load, report: Callable[[Loading], None]) -> TextRuntime:
    """Load the model in the folder `load.path` and generate a token with it.

    Raises Refused where the folder holds no model this runtime can run.
    """
    began_s = time.monotonic()
    report(Loading("reading the configuration"))
    folder = Path(load.path)
    config = _read_config(folder)
    kind = _kind(config)
    if kind != "text":
        what = f"model type {config.get('type', '?')!r} ({kind})"
        raise Refused(Code.UNSUPPORTED, f"{what} is not supported yet: use a text model")
    count = load.threads or threads.usable_cpus()
    og_config = og.Config(str(folder))
    # Left alone, the runtime takes one thread on some machines and all of them on others.
    options = {"session_options": {"intra_op_num_threads": count}}
    og_config.overlay(json.dumps({"model": {"decoder": options}}))
    report(Loading("loading the model"))
    model = og.Model(og_config)
    tokenizer = og.Tokenizer(model)
    report(Loading("warming up"))
    kv_bytes_per_token = _warm_up(model, tokenizer, config)
    context = int(config["context_length"])
    return TextRuntime(
        model,
        tokenizer,
        vocabulary.read(folder / "tokenizer.json"),
        load.prefill_slice,
        EngineFacts(
            model=load.model,
            kind="text",
            runtime="onnxruntime-genai",
            runtime_version=og.__version__,
            provider=model.device_type.lower(),
            threads=count,
            context=min(load.max_context or context, context),
            kv_bytes_per_token=kv_bytes_per_token,
            load_ms=round((time.monotonic() - began_s) * 1e3),
        ),
    )


class TextRuntime:
    """A loaded text model: a Generator of its own for each job."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tokens: vocabulary.Vocabulary,
        prefill_slice: int,
        facts: EngineFacts,
    ) -> None:
        self.facts = facts
        self._model = model
        self._tokenizer = tokenizer
        self._eos = frozenset(int(token) for token in tokenizer.eos_token_ids)
        self._slice = prefill_slice
        self._tokens = tokens
        self._guard = chat.MarkerGuard(tokens.markers)
        self._template = self._own_template()
        self._expected_markers = lru_cache(maxsize=64)(self._count_harmless)

    def open(self, job: Job) -> TextStream:
        """Encode the job's prompt; refuses one over the context, and one with forged markers."""
        prompt = self._encode(job.turns)
        context = self.facts.context
        if len(prompt) >= context:
            raise Refused(
                Code.TOO_LARGE,
                f"the prompt has {len(prompt)} tokens and the model takes {context - 1}",
                field="prompt",
            )
        # The text was made harmless, but the native tokenizer has rules of its own, such as
        # normalisation. A marker too many would end the user's turn inside the user's text.
        if self._markers(prompt) != self._expected_markers(tuple(t.role for t in job.turns)):
            raise Refused(
                Code.BAD_REQUEST, "the text contains the model's control tokens", field="prompt"
            )
        decode = self._tokens.decoder() or self._native_decoder()
        return TextStream(
            self._model,
            prompt,
            options=_search_options(job.sampling, len(prompt), context),
            slice_tokens=self._slice,
            decode=lambda token: None if token in self._eos else decode(token),
            room=context - len(prompt),
        )

    def close(self) -> None:
        """Release the model."""
        del self._tokenizer, self._model

    def _own_template(self) -> Callable[[str], str] | None:
        try:
            self._tokenizer.apply_chat_template('[{"role": "user", "content": "x"}]')
        except RuntimeError:
            return None
        apply: Callable[[str], str] = self._tokenizer.apply_chat_template
        return apply

    def _encode(self, turns: tuple[Turn, ...]) -> Any:
        # What these calls raise can quote the text, so it goes no further.
        try:
            text = chat.render(turns, self._guard, self._template)
        except RuntimeError:
            raise Refused(
                Code.BAD_REQUEST,
                "the model's chat template does not take these turns in this order",
                field="messages",
            ) from None
        try:
            ids = self._tokenizer.encode(text)
        except (RuntimeError, TypeError) as error:
            name = type(error).__name__
            raise Refused(Code.INTERNAL, f"the tokenizer failed: {name}") from None
        # Bytes the vocabulary lacks come as -1, which the model would take for its last token (and
        # a vision model for an image). They are left out, as other tokenizers do.
        return ids[ids >= 0]

    def _markers(self, prompt: Any) -> Counter[int]:
        known = set(self._tokens.markers.values())
        return Counter(token for token in prompt.tolist() if token in known)

    def _count_harmless(self, roles: tuple[Any, ...]) -> Counter[int]:
        return self._markers(self._encode(tuple(Turn(role, "x") for role in roles)))

    def _native_decoder(self) -> Callable[[int], bytes]:
        # Used only where the vocabulary is of an unknown form: it swallows the characters after
        # bytes that are none, and can hold back a whole one.
        stream = self._tokenizer.create_stream()
        return lambda token: stream.decode(token).encode()


class TextStream:
    """One job's Generator, made at the first slice: it takes the memory for its whole length."""

    def __init__(
        self,
        model: Any,
        prompt: Any,
        *,
        options: dict[str, Any],
        slice_tokens: int,
        decode: Callable[[int], bytes | None],
        room: int,
    ) -> None:
        self.prompt_tokens = len(prompt)
        self.room = room
        self._model = model
        self._prompt = prompt
        self._options = options
        self._slice = slice_tokens
        self._decode = decode
        self._generator: Any = None

    def prefill(self) -> Iterator[int]:
        """Append the prompt in slices: a whole one could not be interrupted."""
        params = og.GeneratorParams(self._model)
        params.set_search_options(**self._options)
        self._generator = og.Generator(self._model, params)
        for start in range(0, self.prompt_tokens, self._slice):
            end = min(start + self._slice, self.prompt_tokens)
            self._generator.append_tokens(self._prompt[start:end])
            yield end

    def step(self) -> bytes | None:
        """Generate one token."""
        self._generator.generate_next_token()
        return self._decode(int(self._generator.get_next_tokens()[0]))

    def close(self) -> None:
        """Release the job's memory."""
        self._generator = None


def _search_options(sampling: Sampling, prompt_tokens: int, context: int) -> dict[str, Any]:
    # The cache is taken for all of max_length when the Generator is made.
    options: dict[str, Any] = {
        "max_length": min(prompt_tokens + sampling.max_tokens, context),
        "num_beams": 1,
        "num_return_sequences": 1,
        "do_sample": sampling.temperature > 0,
    }
    if sampling.temperature > 0:
        options |= {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
        if sampling.seed is not None:
            options["random_seed"] = sampling.seed
    return options


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


def _has_file(part: Any) -> bool:
    return isinstance(part, dict) and bool(part.get("filename"))


def _kind(config: dict[str, Any]) -> str:
    """Tell by its parts what a model takes: a type's name says nothing about new ones."""
    for part, kind in (("vision", "vision"), ("speech", "speech"), ("encoder", "encoder")):
        if part in config:
            return kind
    return "text"


def _warm_up(model: Any, tokenizer: Any, config: dict[str, Any]) -> int:
    """Generate one token, so the first job does not pay for it; the cache's bytes per token."""
    prompt = tokenizer.encode("Hello")
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 1, do_sample=False, num_beams=1)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    generator.generate_next_token()
    decoder = config["decoder"]
    width = 4
    try:
        name = decoder["inputs"]["past_key_names"].replace("%d", "0")
        width = generator.get_input(name).dtype.itemsize
    except (KeyError, RuntimeError):
        # A model whose cache has another form: as for float32, the larger.
        pass
    heads = decoder["num_hidden_layers"] * decoder["num_key_value_heads"]
    return int(heads * decoder["head_size"] * 2 * width)
