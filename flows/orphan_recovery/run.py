"""One run, as detection saw it: a frozen snapshot, with the evidence that condemned it."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID


class RunStatus(StrEnum):
    """The statuses of a run in the default table; another target may call them otherwise."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CRASHED = "crashed"


class Evidence(StrEnum):
    """Where the last sign of life came from."""

    AGE = "age"
    """The run was created, started, or left an event, and has not been heard of since."""
    RUN_HEARTBEAT = "run heartbeat"
    """The run's own heartbeat column."""
    LOCK = "lock"
    """A session-level advisory lock that its worker held: none is held now."""
    WORKER_HEARTBEAT = "worker heartbeat"
    """The row of its worker in a table of workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRun:
    """What detection saw of one run, and the evidence that condemned it.

    A snapshot, not a live row: it needs no session, it pickles, and marking compares the row as
    it stands then with it. All times are aware, in UTC, and the database's own. What the target's
    table does not have is None.
    """

    target: str
    """The target whose run it is."""
    id: str
    """The run's key, as text whatever its type; a key of several columns as a JSON array."""
    status: str
    """As the table calls it; in the default table a :class:`RunStatus`."""
    worker_id: str | None
    """Who held the run; None while it is queued for anyone."""
    tenant_id: str | None
    task: str | None
    attempt: int | None
    is_retry: bool | None
    parent_run_id: str | None
    created_at: datetime | None
    started_at: datetime | None
    heartbeat_at: datetime | None
    worker_seen_at: datetime | None
    """The last sign of life of its worker, where workers have a table of their own."""
    sign_of_life: datetime
    """The latest of the four times above, and of the run's own events where the target has
    ``run_events``."""
    evidence: Evidence
    """Where it came from."""
    seen_at: datetime
    """The database's time when it was seen."""
    threshold: timedelta
    """The silence that made it an orphan."""
    rule: str
    """The rule that condemned it, in words."""
    rule_reason: str | None = None
    """What that rule has the error text begin with."""
    sweep_id: UUID
    """The sweep that saw it. A second mark for the same sweep finds the first one's verdict."""

    @property
    def silence(self) -> timedelta:
        """How long the run had not been heard of when it was seen."""
        return self.seen_at - self.sign_of_life
