"""Text models through ONNX Runtime GenAI."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from phid import chat, devices, guidance, memory, prefix, vocabulary
from phid.errors import Code, Refused
from phid.jobs import EngineFacts, Job, Load, Sampling, Turn
from phid.native import og

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from phid.rope import Line


@dataclass(frozen=True, slots=True)
class Setup:
    """How a stream is run, beside its prompt.

    `options` are the runtime's search options; `room` is how many tokens the answer may have;
    `decode` gives a token's bytes, None for an end. The first call takes `first_call` tokens of the
    prompt at least, the others `slice_tokens`. `warm` is a Generator and how many of the prompt's
    tokens it has read; `kept` takes this job's for the next. `grammar` is `schema` as the runtime
    takes it.
    """

    options: dict[str, Any]
    slice_tokens: int
    decode: Callable[[int], bytes | None]
    room: int
    first_call: int = 0
    schema: str | None = None
    grammar: str | None = None
    warm: tuple[Any, int] | None = None
    kept: prefix.Prefix | None = None


class TextRuntime:
    """A loaded text model: a Generator of its own for each job."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tokens: vocabulary.Vocabulary,
        load: Load,
        facts: EngineFacts,
        line: Line | None = None,
    ) -> None:
        self.facts = facts
        self._line = line
        self._memory_bytes = load.memory_bytes
        self._elsewhere = devices.has_own_memory(load.provider)
        self._model = model
        self._tokenizer = tokenizer
        self._eos = frozenset(int(token) for token in tokenizer.eos_token_ids)
        self._slice = facts.prefill_slice
        self._tokens = tokens
        self._guard = chat.MarkerGuard(tokens.markers)
        self._template = self._own_template()
        self._prefix: prefix.Prefix | None = None
        if load.prefix_cache and facts.kind == "text":
            self._prefix = prefix.Prefix(self._slice, line.at if line else facts.context)
        self._expected_markers = lru_cache(maxsize=64)(self._count_harmless)

    def open(self, job: Job) -> TextStream:
        """Encode the job's prompt; refuses one over the context, and one with forged markers."""
        if job.images:
            raise Refused(Code.UNSUPPORTED, "this model takes no images", field="images")
        prompt = self._encode(job.turns)
        self._check(prompt, job.turns)
        return TextStream(self._model, prompt, self._setup(job, prompt, kept=self._prefix))

    def _check(self, prompt: Any, turns: tuple[Turn, ...], image_tokens: int = 0) -> None:
        context = self.facts.context
        if len(prompt) >= context:
            of_images = f", {image_tokens} of them for images," if image_tokens else ""
            raise Refused(
                Code.TOO_LARGE,
                f"the prompt has {len(prompt)} tokens{of_images} and the model takes {context - 1}",
                field="images" if 2 * image_tokens > len(prompt) else "prompt",
            )
        # The text was made harmless, but the native tokenizer has rules of its own, such as
        # normalisation. A marker too many would end the user's turn inside the user's text.
        if self._markers(prompt) != self._expected_markers(tuple(t.role for t in turns)):
            raise Refused(
                Code.BAD_REQUEST, "the text contains the model's control tokens", field="prompt"
            )

    def _setup(
        self,
        job: Job,
        prompt: Any,
        views: int = 0,
        decoding_bytes: int = 0,
        kept: prefix.Prefix | None = None,
    ) -> Setup:
        """How the job is run: on from the cache in `kept`, if of use; its own is kept after it.

        Raises Refused (no_memory) where there is no room for its cache and the views of its images,
        or for decoding them before; Refused, too, where the runtime does not take its schema.
        """
        end, first = self.facts.context, 0
        if (line := self._line) is not None:
            end, first = line.end(len(prompt), end), line.first_call(len(prompt))
        if first and job.history:
            # Beyond the line no cache is reused: each turn would read the whole conversation anew.
            raise Refused(Code.TOO_LARGE, "the conversation passes the model's short context")
        options = _search_options(job.sampling, len(prompt), end)
        schema, warm = job.sampling.schema, None
        if kept is not None:
            if first:
                kept.drop()
                kept = None
            elif (warm := kept.take(prompt, options, schema)) is None:
                grows = kept.outgrown or job.history is not None
                options["max_length"] = self._roomy(options["max_length"], end, grows=grows)
        cache = 0 if warm else options["max_length"] * self.facts.kv_bytes_per_token
        if first and line is not None:
            cache += (len(prompt) if views else first) * line.token_bytes
        computing = 0 if self._elsewhere else cache + views * memory.VIEW_BYTES
        needed = max(computing, decoding_bytes) + (guidance.BYTES if schema else 0)
        memory.check(needed, self._memory_bytes)
        grammar = guidance.grammar(self._model, schema) if schema else None
        decode = self._tokens.decoder() or self._native_decoder()
        return Setup(
            options=options,
            slice_tokens=self._slice,
            decode=lambda token: None if token in self._eos else decode(token),
            room=end - len(prompt),
            first_call=first,
            schema=schema,
            grammar=grammar,
            warm=warm,
            kept=kept,
        )

    def _roomy(self, needed: int, end: int, *, grows: bool) -> int:
        """How long to make a job's cache: longer than it needs, where memory allows that."""
        for much in (grows, False):
            more = prefix.length(needed, end, grows=much)
            try:
                if not self._elsewhere:
                    memory.check(more * self.facts.kv_bytes_per_token, self._memory_bytes)
            except Refused:
                continue
            return more
        return needed

    def close(self) -> None:
        """Release the model."""
        self._prefix = None
        del self._tokenizer, self._model

    def _own_template(self) -> Callable[[str], str] | None:
        try:
            self._tokenizer.apply_chat_template('[{"role": "user", "content": "x"}]')
        except RuntimeError:
            return None
        apply: Callable[[str], str] = self._tokenizer.apply_chat_template
        return apply

    def _encode(self, turns: tuple[Turn, ...]) -> Any:
        return self._ids(self._render(turns, self._guard))

    def _render(self, turns: tuple[Turn, ...], guard: chat.MarkerGuard) -> str:
        # What these calls raise can quote the text, so it goes no further.
        try:
            return chat.render(turns, guard, self._template)
        except RuntimeError:
            raise Refused(
                Code.BAD_REQUEST,
                "the model's chat template does not take these turns in this order",
                field="messages",
            ) from None

    def _ids(self, text: str) -> Any:
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
        # Used only where the vocabulary is of an unknown form: it swallows characters that follow
        # invalid bytes, and can hold back a whole one.
        stream = self._tokenizer.create_stream()
        return lambda token: stream.decode(token).encode()


class TextStream:
    """One job's Generator, made at the first slice: it takes the memory for its whole length."""

    def __init__(self, model: Any, prompt: Any, setup: Setup) -> None:
        self.prompt_tokens = len(prompt)
        self.image_tokens = 0
        self.crops = 0
        self.room = setup.room
        self._model = model
        self._prompt = prompt
        self._setup = setup
        self._generator: Any
        self._generator, self.cached_tokens = setup.warm or (None, 0)
        self._sound, self._computed = True, self.cached_tokens

    def prefill(self) -> Iterator[int]:
        """Append the prompt in slices: a whole one could not be interrupted."""
        self._begin()
        yield from self._append(self.cached_tokens)

    def _begin(self) -> None:
        if self._generator is not None:
            return
        params = og.GeneratorParams(self._model)
        params.set_search_options(**self._setup.options)
        if self._setup.grammar is not None:
            guidance.guide(params, self._setup.grammar)
        self._generator = og.Generator(self._model, params)

    def _append(self, start: int) -> Iterator[int]:
        at, setup = start, self._setup
        while at < self.prompt_tokens:
            end = min(max(at + setup.slice_tokens, setup.first_call), self.prompt_tokens)
            self._sound = False
            self._generator.append_tokens(self._prompt[at:end])
            self._sound, self._computed = True, end
            yield end
            at = end

    def step(self) -> bytes | None:
        """Generate one token. Raises Refused where the schema asks too much of the runtime."""
        self._sound = False
        with guidance.explained(self._setup.grammar is not None):
            self._generator.generate_next_token()
        self._sound = True
        return self._setup.decode(int(self._generator.get_next_tokens()[0]))

    def close(self) -> None:
        """Release the job's memory, or leave it to the next."""
        generator, self._generator = self._generator, None
        setup = self._setup
        if generator is not None and setup.kept is not None and self._sound:
            computed = self._prompt[: self._computed]
            setup.kept.keep(generator, computed, setup.options, setup.schema)


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
