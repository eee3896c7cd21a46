"""Mark together: the marks of task runs that wait at the same time, in one transaction.

The hazard is a thousand task runs that each pay for a transaction, or share one and with it each
other's failures. So whoever comes first takes along all who wait meanwhile, and passes over rows
that somebody holds; and whoever got no verdict that way marks by itself, in a transaction of its
own: what is wrong with one run fails its own task run, and no other. For the locks that others
hold all of them together wait no longer than :mod:`orphan_recovery.waiting` says.
"""

import asyncio
from dataclasses import dataclass, field

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery.condemn import UndoneError
from orphan_recovery.database import POOL_SIZE, transaction
from orphan_recovery.mark import mark
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import WorkerRun
from orphan_recovery.verdict import Verdict
from orphan_recovery.waiting import Waiting


@dataclass(slots=True)
class _Company:
    """Runs that are marked in one transaction."""

    runs: dict[str, WorkerRun] = field(default_factory=dict)
    given: dict[str, Verdict] = field(default_factory=dict)
    is_through: asyncio.Event = field(default_factory=asyncio.Event)
    """Wakes all of them in one round of the event loop. Each round lets Prefect's threads go
    first, for milliseconds: woken one by one, a thousand task runs take a tenth longer."""


class SharedMarks:
    """The marks of one sweep, asked for by many tasks of one event loop."""

    def __init__(self, engine: AsyncEngine, request: SweepRequest, runs: list[WorkerRun]) -> None:
        self._engine = engine
        self.request = request
        self.runs = {run.id: run for run in runs}
        self.verdicts: dict[str, Verdict] = {}
        """What the tasks told."""
        self._next = _Company()
        self._turn = asyncio.Lock()
        # One connection is left for those who mark together.
        self._alone = asyncio.Semaphore(POOL_SIZE - 1)
        self._waiting = Waiting()

    async def mark(self, run: WorkerRun) -> Verdict:
        """Give and record the verdict on one run. Returns once it is committed.

        Raises:
            UndecidedError: no verdict could be given.
            UndoneError: a trigger of the table took the mark back.
            HeldError: somebody holds its row, or a lock that its mark needs, and the sweep has
                waited for such locks for long enough.
            sqlalchemy.exc.DBAPIError: any database error, a lock time-out among them. It was met
                in a transaction of this run's own.
        """
        company = self._next
        company.runs[run.id] = run
        if len(company.runs) == 1:
            await self._lead(company)
        else:
            await company.is_through.wait()
        verdict = company.given.get(run.id)
        if verdict is None:
            async with self._alone, transaction(self._engine) as connection:
                verdict = await self._waiting.mark(connection, self.request, run)
        return verdict

    async def _lead(self, company: _Company) -> None:
        """Mark those who come until the company before is through."""
        try:
            async with self._turn:
                await asyncio.sleep(0)  # whoever is ready to come does so before
                self._next = _Company()
                await self._mark_all(company)
        finally:
            if self._next is company:  # cancelled: nobody else is to come
                self._next = _Company()
            company.is_through.set()

    async def _mark_all(self, company: _Company) -> None:
        runs = list(company.runs.values())
        if len(runs) == 1:
            return
        try:
            async with transaction(self._engine) as connection:
                verdicts = await mark(connection, self.request, runs, skip_locked=True)
        except (DBAPIError, UndoneError):
            return  # whose it is comes out when each tries by itself
        company.given = {verdict.run.id: verdict for verdict in verdicts if verdict is not None}
