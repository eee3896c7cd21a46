"""Waiting: for the locks that others hold, and no longer than so for all of a sweep together.

The hazard is a transaction that somebody forgot, with the locks of a thousand rows: were each of
them waited for by itself, it would keep a sweep, and so a worker's start-up, at it for hours. So
once the time is up no further one is waited for; but each is tried, for its lock may be free.
"""

import time
from dataclasses import dataclass
from typing import Final

from sqlalchemy.exc import DBAPIError

from orphan_recovery.database import Executor, set_lock_timeout
from orphan_recovery.mark import mark_one
from orphan_recovery.policy import is_lock_timeout
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import WorkerRun
from orphan_recovery.verdict import Verdict
from orphan_recovery.words import counted

MOST_SECONDS: Final = 60.0
"""Of a sweep that waits for locks: without a bound over all of them, each row that stays locked
costs it half a minute, and a thousand of them more than an hour. What others hold for longer is
for the next sweep."""
HASTY_LOCK_TIMEOUT_MS: Final = 100
"""Of whoever hardly waits: long enough for locks that come and go."""


class HeldError(RuntimeError):
    """Somebody held a lock for as long as the sweep waits for all of them. It is no transient
    error: to try again at once would be to wait for longer."""


@dataclass(slots=True)
class Waiting:
    """For the locks of one sweep."""

    began: float | None = None
    """None while there was nothing to wait for."""

    def begin(self) -> None:
        """Count from now on, unless it does already."""
        if self.began is None:
            self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        return 0.0 if self.began is None else time.monotonic() - self.began

    @property
    def is_over(self) -> bool:
        return self.began is not None and self.seconds >= MOST_SECONDS

    def in_vain_for(self, run: WorkerRun) -> HeldError:
        """For a run whose lock was not to be had, once it is over."""
        return HeldError(
            f"somebody holds the row of run {run.id!r}, or a lock that its mark needs, and the "
            f"sweep has waited {counted(round(self.seconds), 'second')} for all such locks; the "
            "next one tries again. Who it is: of the sessions that pg_locks has on the table, "
            "mostly that with the oldest xact_start in pg_stat_activity; while a sweep waits for "
            "it, pg_blocking_pids() of the sweep's pid"
        )

    async def mark(self, db: Executor, request: SweepRequest, run: WorkerRun) -> Verdict:
        """As :func:`orphan_recovery.mark.mark_one`; once it is over, it hardly waits for a lock.

        Args:
            db: an open transaction of our own; the sweep must be in the ledger.
            request: the sweep that detected the run.
            run: a detected orphan of that sweep.

        Returns:
            The verdict. Does not commit.

        Raises:
            HeldError: a lock was not to be had, and it is over.
            Exception: as there; a lock time-out, which may be tried again, while it is not over.
        """
        if self.is_over:
            await set_lock_timeout(db, HASTY_LOCK_TIMEOUT_MS)
        try:
            return await mark_one(db, request, run)
        except DBAPIError as error:
            if not is_lock_timeout(error):
                raise
            self.begin()
            if self.is_over:
                raise self.in_vain_for(run) from None
            raise
