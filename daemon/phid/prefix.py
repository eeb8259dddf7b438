"""The cache of the last prompt, for the next prompt that begins alike."""

from __future__ import annotations

from typing import Any

_STEP = 64


class Prefix:
    """The last job's Generator, whose cache begins with the tokens of that job's prompt.

    A fleet's requests begin with the same instructions, and a conversation with all that was said:
    what has been computed is not computed again. Only whole slices of a prompt are reused: so the
    native calls are the same as without it, and every answer is the same to the last bit. Only one
    is kept, for it holds a job's memory; it is released before another is made. A cache of more
    than `most` tokens is not reused: the model may have computed it anew in another way.
    """

    def __init__(self, slice_tokens: int, most: int) -> None:
        self._slice, self._most = slice_tokens, most
        self._generator: Any = None
        self._tokens: Any = None
        self._options: dict[str, Any] = {}
        self._schema: str | None = None
        self.outgrown = False
        """The last cache was only too short to be reused: the next should be longer."""

    def take(
        self, prompt: Any, options: dict[str, Any], schema: str | None
    ) -> tuple[Any, int] | None:
        """A Generator with the first tokens of this prompt in its cache, and how many these are.

        None, and what is kept is released, where it does not suit the search `options`, the
        `schema` of the answer or the prompt. At least one token of the prompt is left to be
        computed. `options` get the max_length that the Generator was made with.
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
        if "random_seed" not in options:  # a used one would not draw as its seed promises
            self._generator, self._tokens = generator, computed
            self._options, self._schema = options, schema

    def drop(self) -> None:
        """Release what is kept: its memory is wanted."""
        self._generator = self._tokens = None
        self._options, self._schema, self.outgrown = {}, None, False


def length(needed: int, most: int, *, grows: bool) -> int:
    """How long to make a cache that is to be kept: a little longer than the job needs.

    Requests of the same kind differ by a few tokens. A conversation grows: its cache is made at
    least twice as long, so that it seldom has to be read anew into a longer one.
    """
    room = max(needed, 16 * _STEP) if grows else 0
    return min(-(-(needed + room) // _STEP) * _STEP, most)


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return {**one, "max_length": 0} == {**other, "max_length": 0}


def _common(had: Any, prompt: Any) -> int:
    most = min(len(had), len(prompt) - 1)
    (differ,) = (had[:most] != prompt[:most]).nonzero()
    return int(differ[0]) if len(differ) else most
