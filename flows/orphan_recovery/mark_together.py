"""Mark together: the marks of task runs that wait at the same time, in one transaction.

The hazard is a thousand task runs that each pay for a transaction, or share one and with it each
other's failures. So whoever comes first takes along all who wait meanwhile, and passes over rows
that somebody holds; and whoever got no verdict that way marks by itself, in a transaction of its
own: what is wrong with one run fails its own task run, and no other.
"""

import asyncio

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery.database import POOL_SIZE, transaction
from orphan_recovery.mark import mark, mark_one
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import WorkerRun
from orphan_recovery.verdict import Verdict


class SharedMarks:
    """The marks of one sweep, asked for by many tasks of one event loop."""

    def __init__(self, engine: AsyncEngine, request: SweepRequest, runs: list[WorkerRun]) -> None:
        self._engine = engine
        self.request = request
        self.runs = {run.id: run for run in runs}
        self.verdicts: dict[str, Verdict] = {}
        """What the tasks told."""
        self._waiting: dict[str, WorkerRun] = {}
        self._given: dict[str, Verdict] = {}
        self._turn = asyncio.Lock()
        # One connection is left for those who mark together.
        self._alone = asyncio.Semaphore(POOL_SIZE - 1)

    async def mark(self, run: WorkerRun) -> Verdict:
        """Give and record the verdict on one run. Returns once it is committed.

        Raises:
            UndecidedError: no verdict could be given.
            sqlalchemy.exc.DBAPIError: any database error, a lock time-out among them. It was met
                in a transaction of this run's own.
        """
        self._waiting[run.id] = run
        async with self._turn:
            if run.id in self._waiting:
                await self._mark_waiting()
        verdict = self._given.pop(run.id, None)
        if verdict is None:
            async with self._alone, transaction(self._engine) as connection:
                verdict = await mark_one(connection, self.request, run)
        return verdict

    async def _mark_waiting(self) -> None:
        await asyncio.sleep(0)  # whoever is ready to ask does so before
        runs, self._waiting = list(self._waiting.values()), {}
        if len(runs) == 1:
            return
        try:
            async with transaction(self._engine) as connection:
                verdicts = await mark(connection, self.request, runs, skip_locked=True)
        except DBAPIError:
            return  # whose it is comes out when each tries by itself
        self._given |= {verdict.run.id: verdict for verdict in verdicts if verdict is not None}
