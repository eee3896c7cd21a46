"""The world of the stateful test: a Postgres whose clock has hands, and who is connected to it.

Time is the database's, so it is the database that gets another clock: `statement_timestamp()` and
`pg_postmaster_start_time()` are found on the search path before Postgres' own, and read a table.
Time passes, jumps back, or the server "restarts" (open transactions are gone, its start is now)
without a row being touched, and every figure can be foretold. The hands point at the year 2130:
whatever takes its time from a client gives itself away.

A witness, a trigger of the test's own, keeps each row as it was at the moment it was written to,
under its lock: that is what a verdict is held against.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Self

from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from orphan_recovery import database
from orphan_recovery.target import Target
from support import Database

CLOCK: Final = """
CREATE SCHEMA clock;
CREATE TABLE clock.hands (now timestamptz NOT NULL, started timestamptz NOT NULL);
INSERT INTO clock.hands VALUES ('2130-01-01 00:00+00', '2129-01-01 00:00+00');
CREATE FUNCTION clock.statement_timestamp() RETURNS timestamptz LANGUAGE sql STABLE
AS 'SELECT now FROM clock.hands';
CREATE FUNCTION clock.pg_postmaster_start_time() RETURNS timestamptz LANGUAGE sql STABLE
AS 'SELECT started FROM clock.hands';

-- A naive column, which is to be read as UTC; the sessions' own TimeZone is far from it.
ALTER TABLE worker_runs ALTER created_at DROP DEFAULT,
ALTER created_at TYPE timestamp USING created_at AT TIME ZONE 'UTC';

CREATE TABLE clock.witness (
    n bigint GENERATED ALWAYS AS IDENTITY, id text, at timestamptz, old worker_runs, new worker_runs
);
CREATE FUNCTION clock.see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO clock.witness (id, at, old, new)
    VALUES (OLD.id, clock.statement_timestamp(), OLD, NEW);
    RETURN NULL;
END $$;
CREATE TRIGGER witness AFTER UPDATE OR DELETE ON worker_runs
FOR EACH ROW EXECUTE FUNCTION clock.see();
"""
SHORT, LONG = 5, 10_000
"""Milliseconds that a statement waits for a lock: where nobody will release it, where somebody
will. A time-out is an answer like any other: it is the actor who rolls back then."""
SESSIONS: Final = (
    "search_path = clock, pg_catalog, public; synchronous_commit = off;"
    f" lock_timeout = {SHORT}; TimeZone = 'Asia/Kathmandu'"
)
RULES: Final = {"quick": 10, "slow": 120, "nightly": None}
"""Minutes by task, in the target's rules; None for never. Any other task: what is asked for."""
BEAT: Final = timedelta(seconds=10)
LEAST_WORKERS, SHARE = 5, 0.5
"""A sweep of so many workers is held if more than that share of them look dead."""
TOML: Final = (
    f"[targets.default]\nheartbeat_seconds = {BEAT.seconds}\n"
    f"hold_least_workers = {LEAST_WORKERS}\nhold_share = {SHARE}\n"
) + "".join(
    f'[[targets.default.rules]]\nmatch.task = "{task}"\n'
    + (f"threshold_minutes = {minutes}\n" if minutes else "never = true\n")
    for task, minutes in RULES.items()
)
LONG_BEFORE: Final = datetime(2129, 1, 1, tzinfo=UTC)
BEGINNING: Final = datetime(2130, 1, 1, tzinfo=UTC)
LEDGER: Final = {
    "verdicts": ("sweep_id", "run_id"),
    "contests": ("sweep_id", "run_id"),
    "hold_runs": ("hold_id", "run_id"),
    "approvals": ("hold_id", "approved_at"),
    "holds": ("hold_id",),
    "sweeps": ("sweep_id",),
}
"""Its tables with their keys; what refers to a table comes before it."""
_TABLES = (*(f"orphan_recovery.{name}" for name in LEDGER), "worker_runs", "clock.witness")
EMPTY: Final = " ".join(
    (
        "BEGIN;",
        *(
            f"ALTER TABLE {table} DISABLE TRIGGER USER; DELETE FROM {table};"
            f" ALTER TABLE {table} ENABLE TRIGGER USER;"
            for table in _TABLES
        ),
        "COMMIT",
    )
)
"""Each example begins with nothing. It is the owner's privilege to switch the guards off."""

UNDISTURBED: Final = " ".join(
    f"ALTER TABLE {table} SET (autovacuum_enabled = off);" for table in _TABLES
)
"""Nobody but the actors locks anything."""

Row = dict[str, Any]


class Killed(BaseException):
    """A process died: no `except Exception` hears of it, and its transaction is gone."""


class World:
    """A database with a clock, an event loop, and how many examples it took to break it."""

    def __init__(
        self, db: Database, engine: AsyncEngine, target: Target, runner: asyncio.Runner
    ) -> None:
        self.db, self.engine, self.target, self.runner = db, engine, target, runner
        self.examples = 0
        self.violation: AssertionError | None = None
        self.stops_at_once = False
        """Whether a violation ends it all, without a second look by Hypothesis."""
        self.living: dict[str, str] = {}
        """Runs whose workers live, and beat as soon as they are given the time."""
        self._until: int | None = None

    def __enter__(self) -> Self:
        self._listening = (
            self.engine.sync_engine,
            "before_cursor_execute",
            self._before_a_statement,
        )
        event.listen(*self._listening)
        self.db.do(f"SET lock_timeout = {LONG}")
        return self

    def __exit__(self, *_: object) -> None:
        event.remove(*self._listening)

    def begin_anew(self) -> None:
        self.examples += 1
        self.living = {}
        self.db.do(EMPTY)
        self.db.do("UPDATE clock.hands SET now = %s, started = %s", BEGINNING, LONG_BEFORE)

    @property
    def hands(self) -> Row:
        return self.db.do("SELECT * FROM clock.hands")[0]

    def pass_time(self, span: timedelta) -> None:
        self.db.do("UPDATE clock.hands SET now = now + %s", span)

    def restart(self) -> None:
        """Whoever has a transaction open must have lost it."""
        self.db.do("UPDATE clock.hands SET started = now, now = now + interval '1 second'")

    async def wait(self, seconds: float) -> None:
        """How a sweep waits: time passes, and whoever lives beats."""
        self.pass_time(timedelta(seconds=seconds))
        for run, worker in self.living.items():
            self.db.do(
                "UPDATE worker_runs SET heartbeat_at = statement_timestamp() WHERE id = %s"
                " AND worker_id = %s AND status IN ('queued', 'running')",
                *(run, worker),
            )

    def wait_for_locks(self, patience: int) -> None:
        """How long the product's own transactions wait, in milliseconds."""
        database.LOCK_TIMEOUT_MS = patience  # type: ignore[misc]

    @contextmanager
    def interrupted(self, at: int, by: Callable[[], None]) -> Iterator[None]:
        """Before the statement of that number ``by`` happens; never, if there are not so many."""
        self._until, self._by = at, by
        try:
            yield
        finally:
            self._until = None

    def _before_a_statement(self, *_: object) -> None:
        if self._until is None:
            return
        self._until -= 1
        if self._until <= 0:
            self._until = None
            self._by()


class Actor:
    """A connection whose transaction may stay open from one step to the next."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.session: AsyncSession | None = None

    async def begin(self, patience: int) -> AsyncSession:
        self.session = self.session or AsyncSession(self._engine)
        await self.session.execute(text(f"SET LOCAL lock_timeout = {patience}"))
        return self.session

    async def end(self, *, commit: bool) -> None:
        if self.session is not None:
            await (self.session.commit() if commit else self.session.rollback())
            await self.session.close()
            self.session = None
