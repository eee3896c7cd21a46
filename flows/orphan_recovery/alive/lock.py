"""Lock: proof of life by a session-level advisory lock, which the server drops with the connection.

What it can wrongly do is lose the lock with a connection alone, while the worker lives. So the
sweep looks twice, two beats apart, and this side takes the lock again within that time or gives
the run up. And a transaction-mode pooler hands the session to others: lock evidence needs a
connection of the worker's own.
"""

import os
import threading
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import Select, Text, column, func, literal, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery.alive.beat import (
    REFUSALS,
    Beaten,
    Run,
    found,
    look,
    lost_by,
    one_by_one_at_worst,
)
from orphan_recovery.alive.lost import RunLost
from orphan_recovery.database import describe
from orphan_recovery.describe import runs_table
from orphan_recovery.policy import is_outage
from orphan_recovery.runs import RunsTable, lock_key
from orphan_recovery.target import GRACE_BEATS, Target

NOTICE: Final = {
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
"""What the server is told, so that it drops within about half a minute the connection of a host
that is gone: of that nobody tells it, and by its own settings it may wait for hours."""


class _Forks:
    """Tells whether a fork of this process may have come in between. Needs no lock: each step is
    one that no other thread can divide."""

    def __init__(self) -> None:
        self.latest = object()
        self._under_way = set[int]()

    def begin(self) -> None:
        self._under_way.add(threading.get_ident())
        self.latest = object()

    def end(self) -> None:
        self._under_way.discard(threading.get_ident())

    def forget(self) -> None:
        self._under_way.clear()

    def none_since(self, latest: object) -> bool:
        """Whether none has begun since then, and none that had begun was under way still."""
        return self.latest is latest and not self._under_way


_forks = _Forks()
os.register_at_fork(before=_forks.begin, after_in_parent=_forks.end, after_in_child=_forks.forget)


class Locks:
    """The locks of one process on one connection. Used in the beater's thread only."""

    def __init__(self, target: Target, beat: timedelta) -> None:
        self.target = target
        self.lost_after = GRACE_BEATS * beat  # as long as a sweep waits between its two looks
        self._connection: AsyncConnection | None = None
        self._socket: int | None = None
        self._held: set[str] = set()
        """Whose locks that connection holds: runs, or workers."""
        self._whose: dict[Run, str | None] = {}
        """Whose lock proves that a run is alive, as the database writes the run's key, or its
        worker: a sweep knows them by that."""
        self._table: tuple[str, str] | None = None
        """The schema and name by which those locks go."""

    @property
    def any_held(self) -> bool:
        return bool(self._held)

    async def prove(self, engine: AsyncEngine, runs: Sequence[Run]) -> Beaten:
        """Hold a lock for each of ``runs``, or their workers, and for nobody else.

        Returns:
            What is proven: its lock is held, and its row is still the worker's; and what is lost,
            or was refused. Runs whose lock somebody else holds are in none.

        Raises:
            sqlalchemy.exc.DBAPIError: as the database raised it; then no lock is held any more.
        """
        try:
            connection = await self._open(engine)
            table = await runs_table(connection, self.target, anew=True)
            if self._table != (named := (table.relation.schema, table.relation.name)):
                self._table = named  # it was renamed: what is held goes by what it was
                self._held.clear()
            refused = await self._learn(connection, table, runs)
            wanted = {whose for run in runs if (whose := self._whose.get(run)) is not None}
            if stale := self._held - wanted:
                await connection.execute(_each(table, stale, func.pg_advisory_unlock))
            self._held &= wanted
            if missing := wanted - self._held:
                tried = await connection.execute(_each(table, missing, func.pg_try_advisory_lock))
                self._held |= {row.whose for row in tried if row.done}
            asked = [run for run in runs if run not in refused]
            proven, lost = await self._see(connection, table, asked)
            return Beaten(proven, lost, refused)
        except BaseException:
            await self.let_go()
            raise

    async def let_go(self) -> None:
        """Close the connection, and so drop every lock."""
        connection, self._connection, self._socket = self._connection, None, None
        self._held.clear()
        if connection is not None:
            await connection.invalidate()
            await connection.close()

    def leave_to_parent(self) -> None:
        """In the child of a fork: close its copy of the connection, and tell the server nothing.

        The server sees the end of a connection only when every process has closed it: with a
        copy in a child that lives on, a parent's death would never be known.
        """
        if self._socket is not None:
            os.close(self._socket)

    async def _open(self, engine: AsyncEngine) -> AsyncConnection:
        while self._connection is None:
            forks = _forks.latest
            connection = await engine.connect()
            self._connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
            self._held.clear()
            raw = (await connection.get_raw_connection()).driver_connection
            assert raw is not None  # noqa: S101 - it is open
            self._socket = raw.fileno()
            if not _forks.none_since(forks):  # a child may have a copy that it knows nothing of
                await self.let_go()
                continue
            told = (func.set_config(name, value, False) for name, value in NOTICE.items())
            await connection.execute(select(*told))
        return self._connection

    async def _learn(
        self, connection: AsyncConnection, table: RunsTable, runs: Sequence[Run]
    ) -> dict[Run, str]:
        """Whose lock each run has. Returns the runs that were refused, and why."""
        given = set(runs)
        self._whose = {run: whose for run, whose in self._whose.items() if run in given}
        name = "key" if self.target.lock == "run" else "held_as"

        async def learn(some: Sequence[Run]) -> None:
            for row in (await connection.execute(look(table, some))).mappings():
                if not row["vanished"]:
                    self._whose[row["run_id"], row["held_by"]] = row[name]

        refused: dict[Run, str] = {}
        if new := [run for run in runs if run not in self._whose]:
            try:
                await one_by_one_at_worst(learn, new, refused)
            except REFUSALS as error:
                if is_outage(error):
                    raise
                refused = dict.fromkeys(new, describe(error))
        return refused

    async def _see(
        self, connection: AsyncConnection, table: RunsTable, runs: Sequence[Run]
    ) -> tuple[dict[Run, timedelta | None], dict[Run, RunLost]]:
        proven: dict[Run, timedelta | None] = {}
        lost: dict[Run, RunLost] = {}
        if not runs:
            return proven, lost
        rows = (await connection.execute(look(table, runs))).mappings()
        by_run = {(row["run_id"], row["held_by"]): row for row in rows}
        for run in runs:
            row = by_run[run]
            by = lost_by(row)
            if by is not None:
                lost[run] = RunLost(run[0], by, found(row))
            elif self._whose.get(run) in self._held:
                proven[run] = self.lost_after
        return proven, lost


def _each(table: RunsTable, whose: Collection[str], do: Any) -> Select[Any]:
    """Take, or give back, the locks of all in one statement."""
    names = literal(sorted(whose), ARRAY(Text()))
    each = func.unnest(names).table_valued(column("whose", Text()), name="orphan_recovery_whose")
    name = each.render_derived().c.whose
    return select(name, do(lock_key(table.relation, name)).label("done"))
