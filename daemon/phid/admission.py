"""Which requests are let in, by what the device can answer, has room for and allows."""

from __future__ import annotations

from phid import attachments
from phid.allowance import Allowance
from phid.backlog import Backlog
from phid.crew import Crew
from phid.errors import Code, Failure, Refused
from phid.gathering import Gathering
from phid.health import Health
from phid.intake import PartArrived, RequestArrived
from phid.outbox import Outbox
from phid.records import Records
from phid.settings import Settings

_DEFAULT_RETRY_MS = 1000


class Admission:
    """Refuses what cannot be taken now. Owner thread only; never waits.

    `closed` says why every new request is refused at present.
    """

    def __init__(
        self,
        settings: Settings,
        crew: Crew,
        backlog: Backlog,
        gathering: Gathering,
        records: Records,
        outbox: Outbox,
        health: Health,
    ) -> None:
        self.closed: Failure | None = None
        limits, most = settings.limits, settings.vision.max_images
        self._allowance = Allowance(limits.rate_per_client, limits.burst_per_client)
        # As many parts as a client's requests can name.
        self._parts = Allowance(limits.rate_per_client * most, limits.burst_per_client * most)
        self._crew = crew
        self._backlog = backlog
        self._gathering = gathering
        self._records = records
        self._outbox = outbox
        self._health = health

    def configure(self, settings: Settings) -> None:
        """Take over the limits of these settings for what comes from now on."""
        limits, most = settings.limits, settings.vision.max_images
        self._backlog.limit, self._backlog.per_client = limits.backlog, limits.per_client
        self._backlog.limit_bytes = limits.backlog_bytes
        self._allowance.rate_per_minute = limits.rate_per_client
        self._allowance.burst = limits.burst_per_client
        self._parts.rate_per_minute = limits.rate_per_client * most
        self._parts.burst = limits.burst_per_client * most

    @property
    def retry_after_ms(self) -> int:
        """How soon to ask again after a refusal for lack of room (milliseconds)."""
        return self._health.wait_ms(1) or _DEFAULT_RETRY_MS

    def check(self, arrived: RequestArrived, now: float) -> None:
        """Raises Refused for a request that is not to be taken, whatever its cameras show."""
        if self.closed is not None:
            failure = self.closed
            raise Refused(failure.code, failure.message, retry_after_ms=failure.retry_after_ms)
        if self._outbox.full:
            says = f"no room: {len(self._outbox)} answers wait for the broker to take them"
            raise Refused(Code.BUSY, says, retry_after_ms=self.retry_after_ms)
        self._crew.check(arrived.request.model, pictures=bool(arrived.images))
        if arrived.deadline_s <= 0:
            raise Refused(Code.EXPIRED, "its deadline passed before it arrived")
        if attachments.wanted(arrived.images) and len(self._gathering) >= self._backlog.limit:
            says = f"no room: {len(self._gathering)} requests wait for their parts"
            raise Refused(Code.BUSY, says, retry_after_ms=self.retry_after_ms)
        self._check_size(arrived)
        self._check_rate(self._allowance.wait_ms(arrived.client, now))

    def take(self, arrived: RequestArrived, now: float) -> None:
        """Count it against its client's rate. Raises Refused if it is too large or one too many."""
        self._check_size(arrived)
        # Last: a request refused for another reason does not count against its client's rate.
        self._check_rate(self._allowance.take(arrived.client, now))

    def check_part(self, arrived: PartArrived, now: float) -> None:
        """Raises Refused (busy) for a picture sent apart that is not to be kept."""
        if not isinstance(arrived.part, bytes):
            return
        self._records.check_room(arrived.qos, len(arrived.part))
        if (wait_ms := self._parts.take(arrived.client, now)) is not None:
            says = f"at most {self._parts.rate_per_minute:g} parts a minute from one client"
            raise Refused(Code.BUSY, says, retry_after_ms=wait_ms)

    def check_room(self, client: str, size_bytes: int) -> None:
        """Raises Refused (busy) when no more requests of this client can wait."""
        held = self._gathering
        self._backlog.check_room(
            client,
            size_bytes,
            self.retry_after_ms,
            held=held.share(client),
            held_bytes=held.size_bytes,
        )

    def _check_size(self, arrived: RequestArrived) -> None:
        self.check_room(arrived.client, arrived.size_bytes)
        self._records.check_room(arrived.inbound.qos, arrived.size_bytes)

    def _check_rate(self, wait_ms: int | None) -> None:
        if wait_ms is not None:
            says = f"at most {self._allowance.rate_per_minute:g} requests a minute from one client"
            raise Refused(Code.BUSY, says, retry_after_ms=wait_ms)
