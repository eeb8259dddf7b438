"""Who is let in: a request held against what the device can answer, has room for and allows."""

from __future__ import annotations

from phid.allowance import Allowance
from phid.backlog import Backlog
from phid.crew import Crew
from phid.errors import Code, Failure, Refused
from phid.gathering import Gathering
from phid.health import Health
from phid.intake import RequestArrived
from phid.records import Records
from phid.sections import Limits

_DEFAULT_RETRY_MS = 1000


class Admission:
    """Refuses what cannot be taken now. Owner thread only; never waits.

    `closed` says why every new request is refused at present.
    """

    def __init__(
        self,
        limits: Limits,
        crew: Crew,
        backlog: Backlog,
        gathering: Gathering,
        records: Records,
        health: Health,
    ) -> None:
        self.closed: Failure | None = None
        self._allowance = Allowance(limits.rate_per_client, limits.burst_per_client)
        self._crew = crew
        self._backlog = backlog
        self._gathering = gathering
        self._records = records
        self._health = health

    def configure(self, limits: Limits) -> None:
        """Take over these limits for what comes from now on."""
        self._backlog.limit, self._backlog.per_client = limits.backlog, limits.per_client
        self._backlog.limit_bytes = limits.backlog_bytes
        self._allowance.rate_per_minute = limits.rate_per_client
        self._allowance.burst = limits.burst_per_client

    @property
    def retry_after_ms(self) -> int:
        """When it is worth asking again, for one who is refused for lack of room."""
        return self._health.wait_ms(1) or _DEFAULT_RETRY_MS

    def check(self, arrived: RequestArrived, now: float) -> None:
        """Raises Refused for a request that is not to be taken."""
        if self.closed is not None:
            failure = self.closed
            raise Refused(failure.code, failure.message, retry_after_ms=failure.retry_after_ms)
        self._crew.check(arrived.request.model, pictures=bool(arrived.images))
        if arrived.deadline_s <= 0:
            raise Refused(Code.EXPIRED, "its deadline passed before it arrived")
        if len(self._gathering) >= self._backlog.limit:
            says = f"{len(self._gathering)} requests wait for their parts"
            raise Refused(Code.BUSY, says, retry_after_ms=self.retry_after_ms)
        self.check_room(arrived.client, arrived.size_bytes)
        self._records.check_room(arrived)
        # Last: who is refused for another reason has not used up its share.
        if (wait_ms := self._allowance.take(arrived.client, now)) is not None:
            says = f"{self._allowance.rate_per_minute:g} requests a minute of one client"
            raise Refused(Code.BUSY, says, retry_after_ms=wait_ms)

    def check_room(self, client: str, size_bytes: int) -> None:
        """Raises Refused (busy) when no more of this client's can wait."""
        self._backlog.check_room(client, size_bytes, self.retry_after_ms)
