"""The cache of the last prompt, for the next prompt that begins alike."""

from __future__ import annotations

from typing import Any

_STEP = 64


class Prefix:
    """The Generator of the job before, whose cache begins with the tokens of its prompt.

    A fleet's requests begin with the same instructions, and a conversation with all that was said:
    what has been computed is not computed again. Only whole slices of a prompt are gone on from:
    with the same calls as without it every answer is the same, to the last bit. There is one, for
    it takes a job's memory; it is released before another is made. A cache of more than `most`
    tokens is not gone on from: a model may have computed it anew in another way.
    """

    def __init__(self, slice_tokens: int, most: int) -> None:
        self._slice, self._most = slice_tokens, most
        self._generator: Any = None
        self._tokens: Any = None
        self._options: dict[str, Any] = {}
        self._schema: str | None = None
        self.outgrown = False
        """The last one would have done, had its cache been longer: the next should be."""

    def take(
        self, prompt: Any, options: dict[str, Any], schema: str | None
    ) -> tuple[Any, int] | None:
        """A Generator with the first tokens of this prompt in its cache, and how many these are.

        None where what is kept is of no use for search `options`, for the schema that its answer is
        held to, or for the prompt; it is released then. At least one token of the prompt is left to
        be computed. `options` get the max_length that it was made with.
        """
        generator, had, tokens = self._generator, self._options, self._tokens
        alike = self._schema == schema and _alike(had, options)
        self.drop()
        if generator is None or not alike:
            return None
        count = _common(tokens, prompt) // self._slice * self._slice
        if not count:
            return None
        if had["max_length"] < options["max_length"]:
            self.outgrown = True
            return None
        try:
            generator.rewind_to(count)
        except RuntimeError:  # a model whose cache cannot be cut
            return None
        options["max_length"] = had["max_length"]
        return generator, count

    def keep(
        self, generator: Any, computed: Any, options: dict[str, Any], schema: str | None
    ) -> None:
        """Keep the Generator of a job that has ended without an error.

        `computed` are the tokens of its prompt that it has read, in slices from the first on.
        """
        if len(computed) < self._slice or generator.token_count() > self._most:
            return
        if "random_seed" not in options:  # the next would not draw as it was promised
            self._generator, self._tokens = generator, computed
            self._options, self._schema = options, schema

    def drop(self) -> None:
        """Release what is kept: its memory is wanted."""
        self._generator = self._tokens = None
        self._options, self._schema, self.outgrown = {}, None, False


def length(needed: int, most: int, *, grows: bool) -> int:
    """How long a cache is made that is to be kept: a little longer than a job needs.

    Requests of the same kind differ by a few tokens. A conversation grows: it is given as much
    again, so that it is seldom that it has to be read anew for a longer one.
    """
    room = max(needed, 16 * _STEP) if grows else 0
    return min(-(-(needed + room) // _STEP) * _STEP, most)


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return {**one, "max_length": 0} == {**other, "max_length": 0}


def _common(had: Any, prompt: Any) -> int:
    most = min(len(had), len(prompt) - 1)
    (differ,) = (had[:most] != prompt[:most]).nonzero()
    return int(differ[0]) if len(differ) else most
