"""The codes a requester can be told, and the exception that carries one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Code(StrEnum):
    """What went wrong, in one word of the wire; `status` is its HTTP equivalent."""

    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    NOT_FOUND = "not_found"
    ID_CONFLICT = "id_conflict"
    TOO_LARGE = "too_large"
    UNSUPPORTED = "unsupported"
    INCOMPLETE = "incomplete"
    BUSY = "busy"
    CANCELLED = "cancelled"
    INTERNAL = "internal"
    ENGINE_LOST = "engine_lost"
    LOADING = "loading"
    PAUSED = "paused"
    DRAINING = "draining"
    EXPIRED = "expired"
    NO_MEMORY = "no_memory"

    @property
    def status(self) -> int:
        """The HTTP status that corresponds to this code."""
        return _STATUS[self]


_STATUS = {
    Code.BAD_REQUEST: 400,
    Code.UNAUTHORIZED: 401,
    Code.NOT_FOUND: 404,
    Code.ID_CONFLICT: 409,
    Code.TOO_LARGE: 413,
    Code.UNSUPPORTED: 415,
    Code.INCOMPLETE: 424,
    Code.BUSY: 429,
    Code.CANCELLED: 499,
    Code.INTERNAL: 500,
    Code.ENGINE_LOST: 502,
    Code.LOADING: 503,
    Code.PAUSED: 503,
    Code.DRAINING: 503,
    Code.EXPIRED: 504,
    Code.NO_MEMORY: 507,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no result: what an `error` message says.

    `text` is what had been generated before a job failed; None where nothing was.
    """

    code: Code
    message: str
    field: str | None = None
    retry_after_ms: int | None = None
    text: str | None = None


class Refused(Exception):  # noqa: N818 - it is an answer, not a fault of ours
    """A request, job or command was refused; `failure` is what its sender is told."""

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        field: str | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self.failure = Failure(code, message, field=field, retry_after_ms=retry_after_ms)

    @classmethod
    def of(cls, failure: Failure) -> Refused:
        """The exception for a failure that is known already."""
        return cls(
            failure.code,
            failure.message,
            field=failure.field,
            retry_after_ms=failure.retry_after_ms,
        )
