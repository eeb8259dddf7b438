"""Holds an answer to a JSON Schema: the runtime's constrained decoding, its refusals in words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from phid.errors import Code, Refused
from phid.native import og

BYTES = 64 << 20
"""Memory that the first schema takes for good (measured: 38 MiB, most of it the vocabulary as a
trie), and that the remembered schemas take."""

# no_forcing: forced tokens can end inside a UTF-8 character, and llguidance fails on the half. No
# white space between values: a small model would go on with it for ever.
_HEAD = '%llguidance {"no_forcing": true}\nstart: %json '
_COMPACT = {"x-guidance": {"whitespace_flexible": False}}

# The runtime's messages in our words: its own can quote the schema, or the answer so far.
_WORDS = (
    (r"Unimplemented keys", "it has a keyword that is not supported"),
    (r"Unknown format", "it has a format that is not known"),
    (r"Unsatisfiable|unsatisfiable", "nothing satisfies it"),
    (r"[Ii]nvalid type|type must be", "it has a type that there is not"),
    (r"Resource|Pointer|Definition not found", "a $ref or $schema leads nowhere: #/$defs/... does"),
    (r"range|minimum|maximum", "the range of a number is too wide or too narrow"),
    (r"too |fuel|panic|max is|exceeded", "it asks too much of the runtime: make it simpler"),
)


def grammar(model: Any, schema: str) -> str:
    """The schema as the runtime's grammar, tried once. Raises Refused where it is not taken.

    The runtime remembers it: it is not compiled a second time for the job's own Generator.
    """
    text = _HEAD + json.dumps(json.loads(schema) | _COMPACT) + "\n"
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=1, num_beams=1)
    guide(params, text)
    with explained(guided=True):
        og.Generator(model, params)
    return text


def guide(params: Any, text: str) -> None:
    """Have a Generator of these parameters generate what the grammar allows, and nothing else."""
    params.set_guidance("lark_grammar", text)


@contextmanager
def explained(guided: bool) -> Iterator[None]:
    """What the runtime raises for a grammar's sake becomes Refused, with a reason in our words."""
    try:
        yield
    except RuntimeError as error:
        says = str(error)
        if not guided or not re.match("Error (creating grammar|computing mask|committing)", says):
            raise
        why = next((words for hint, words in _WORDS if re.search(hint, says)), "it is not taken")
        says = f"response_format: the schema cannot be held to: {why}"
        raise Refused(Code.BAD_REQUEST, says, field="response_format") from None
