"""Lock: proof of life by a session-level advisory lock, which the server drops with the connection.

What it can wrongly do is lose the lock with a connection alone, while the worker lives. So the
sweep looks twice, two beats apart, and this side takes the lock again within that time or gives
the run up. And a transaction-mode pooler hands the session to others: lock evidence needs a
connection of the worker's own.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from sqlalchemy import Text, func, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery.alive.beat import Beaten, found, look, lost_by
from orphan_recovery.alive.lost import RunLost
from orphan_recovery.runs import lock_key, runs_table
from orphan_recovery.settings import ConfigurationError
from orphan_recovery.targets import Target

LOST_AFTER_BEATS: Final = 2
"""As long as a sweep waits between its two looks."""


class Locks:
    """The locks of one process on one connection. Used in the beater's thread only."""

    def __init__(self, target: Target, beat: timedelta) -> None:
        self.target = target
        self.lost_after = LOST_AFTER_BEATS * beat
        self._connection: AsyncConnection | None = None
        self._held: set[str] = set()
        """Whose locks that connection holds: runs, or workers."""

    @property
    def any_held(self) -> bool:
        return bool(self._held)

    async def prove(self, engine: AsyncEngine, runs: Sequence[tuple[str, str | None]]) -> Beaten:
        """Hold a lock for each of ``runs``, or their workers, and for nobody else.

        Returns:
            What is proven: its lock is held, and its row is still the worker's. Runs whose lock
            somebody else holds are in neither.

        Raises:
            sqlalchemy.exc.DBAPIError: as the database raised it; then no lock is held any more.
        """
        try:
            connection = await self._open(engine)
            wanted = {self._whose(run) for run in runs}
            for whose in self._held - wanted:
                await connection.execute(select(func.pg_advisory_unlock(self._key(whose))))
            self._held &= wanted
            for whose in wanted - self._held:
                taken = select(func.pg_try_advisory_lock(self._key(whose)))
                if (await connection.execute(taken)).scalar_one():
                    self._held.add(whose)
            return await self._see(connection, runs)
        except BaseException:
            await self.let_go()
            raise

    async def let_go(self) -> None:
        """Close the connection, and so drop every lock."""
        connection, self._connection = self._connection, None
        self._held.clear()
        if connection is not None:
            await connection.invalidate()
            await connection.close()

    async def _open(self, engine: AsyncEngine) -> AsyncConnection:
        if self._connection is None:
            connection = await engine.connect()
            self._connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
            self._held.clear()
        return self._connection

    async def _see(
        self, connection: AsyncConnection, runs: Sequence[tuple[str, str | None]]
    ) -> Beaten:
        if not runs:
            return Beaten({}, {})
        proven: dict[tuple[str, str | None], timedelta | None] = {}
        lost: dict[tuple[str, str | None], RunLost] = {}
        table = await runs_table(connection, self.target)
        rows = (await connection.execute(look(table, runs))).mappings()
        by_run = {(row["run_id"], row["held_by"]): row for row in rows}
        for run in runs:
            row = by_run[run]
            by = lost_by(self.target, row)
            if by is not None:
                lost[run] = RunLost(run[0], by, found(row))
            elif self._whose(run) in self._held:
                proven[run] = self.lost_after
        return Beaten(proven, lost)

    def _whose(self, run: tuple[str, str | None]) -> str:
        run_id, worker_id = run
        if self.target.lock == "run":
            return run_id
        if worker_id is None:
            raise ConfigurationError(
                f"target {self.target.name!r} keeps a lock for each worker: name the worker that "
                f"holds run {run_id!r}"
            )
        return worker_id

    def _key(self, whose: str):  # type: ignore[no-untyped-def]
        return lock_key(self.target, literal(whose, Text))
