"""Facts: what the database says, in the database's own time. The story believes nothing else.

What this can wrongly do is see what it wants to see; so these are plain reads, each named for what
it asks, and the only thing written is what a client of the runs table writes: a new, queued run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, LiteralString, Self
from uuid import UUID

import psycopg
from psycopg.rows import class_row, dict_row, scalar_row


@dataclass(frozen=True, slots=True)
class Run:
    """A run as its row stands."""

    id: str
    worker_id: str | None
    status: str
    error: str | None
    output_json: dict[str, Any] | None
    age: timedelta
    silence: timedelta
    sign_of_life: datetime
    has_beaten: bool
    """Since it was started."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict as the ledger has it, with what it says of its sweep."""

    run_id: str
    outcome: str
    worker_id: str | None
    evidence: str
    sign_of_life: datetime
    silence: timedelta
    threshold: timedelta
    rule: str
    reason: str
    judged_at: datetime
    sweep_id: UUID
    asked_by: str
    during_sweep: bool
    """Judged between the sweep's opening and its end, by the database's clock."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep as the ledger has it."""

    sweep_id: UUID
    asked_by: str
    ended_as: str | None
    detected: int | None


class Facts:
    """A connection of the demo's own, which commits each statement at once."""

    def __init__(self, url: str) -> None:
        self._db = psycopg.connect(url, autocommit=True, application_name="orphan-recovery demo")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._db.close()

    def submit(self, run_id: str, task: str, age: timedelta = timedelta(0)) -> None:
        """Queue a run that was created ``age`` ago."""
        self._db.execute(
            "INSERT INTO worker_runs (id, task, tenant_id, created_at)"
            " VALUES (%s, %s, 'acme', now() - %s)",
            (run_id, task, age),
        )

    def runs(self) -> dict[str, Run]:
        """Every run, by id."""
        with self._db.cursor(row_factory=class_row(Run)) as cursor:
            cursor.execute("""
                SELECT id, worker_id, status, error, output_json, now() - created_at AS age,
                       now() - greatest(created_at, started_at, heartbeat_at) AS silence,
                       greatest(created_at, started_at, heartbeat_at) AS sign_of_life,
                       coalesce(heartbeat_at > started_at, false) AS has_beaten
                FROM worker_runs ORDER BY created_at, id
            """)
            return {run.id: run for run in cursor}

    def verdicts(self) -> list[Judged]:
        """The whole ledger, oldest verdict first."""
        with self._db.cursor(row_factory=class_row(Judged)) as cursor:
            return cursor.execute("""
                SELECT run_id, outcome, worker_id, evidence, sign_of_life, silence, v.threshold,
                       rule, v.reason, judged_at, sweep_id, asked_by,
                       judged_at BETWEEN opened_at AND ended_at AS during_sweep
                FROM orphan_recovery.verdicts AS v JOIN orphan_recovery.sweeps USING (sweep_id)
                ORDER BY judged_at, run_id
            """).fetchall()

    def sweeps(self) -> list[Sweep]:
        """Every sweep, oldest first."""
        with self._db.cursor(row_factory=class_row(Sweep)) as cursor:
            return cursor.execute("""
                SELECT sweep_id, asked_by, ended_as, detected
                FROM orphan_recovery.sweeps ORDER BY opened_at
            """).fetchall()

    def last_heard_of(self, run_ids: Sequence[str]) -> Run:
        """That one of the runs which is silent for the shortest time."""
        runs = self.runs()
        return min((runs[run_id] for run_id in run_ids), key=lambda run: run.silence)

    def stalls_before_commit(self, worker: str) -> bool:
        """Whether the worker has written and, a second later, not yet committed."""
        return self._is_true(
            """
            SELECT EXISTS (
                SELECT FROM pg_stat_activity
                WHERE datname = current_database() AND application_name = %s
                  AND state = 'idle in transaction' AND backend_xid IS NOT NULL
                  AND clock_timestamp() - state_change > interval '1 second')
            """,
            worker,
        )

    def sweep_waits_for(self, worker: str) -> bool:
        """Whether a sweep's session waits for a lock that the worker's session holds."""
        return self._is_true(
            """
            SELECT EXISTS (
                SELECT FROM pg_stat_activity AS sweep
                JOIN pg_stat_activity AS holder ON holder.pid = ANY(pg_blocking_pids(sweep.pid))
                WHERE sweep.application_name = 'orphan-recovery'
                  AND sweep.wait_event_type = 'Lock' AND holder.application_name = %s)
            """,
            worker,
        )

    def refusal_of(self, statement: LiteralString) -> str | None:
        """Try a statement that ought to be refused. The refusal, or None if it was let through."""
        try:
            with self._db.transaction():
                self._db.execute(statement)
        except psycopg.errors.RaiseException as refusal:
            return refusal.diag.message_primary
        return None

    def server_version(self) -> str:
        """The version of the Postgres server."""
        with self._db.cursor(row_factory=scalar_row) as cursor:
            return str(cursor.execute("SHOW server_version").fetchone())

    def _is_true(self, question: LiteralString, *values: Any) -> bool:
        with self._db.cursor(row_factory=dict_row) as cursor:
            row = cursor.execute(question, values).fetchone()
        return bool(row and next(iter(row.values())))
