"""What is raised in one process may be caught in another: of a pool, or by an orchestrator."""

import asyncio
import pickle
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from orphan_recovery import ConfigurationError
from orphan_recovery.alive import LostBy, RunLost, finish_run_sync
from orphan_recovery.condemn import UndoneError
from orphan_recovery.detect import detect_orphaned_runs
from orphan_recovery.mark import UndecidedError
from support import Database

LOST = RunLost("run", LostBy.MARKED, {"at": datetime(2026, 1, 2, tzinfo=UTC)}, contested=True)


@pytest.mark.parametrize(
    "error", [LOST, UndoneError(["a", "b"]), ConfigurationError("threshold is 0: give another")]
)
def test_an_error_is_the_same_elsewhere(error: Exception) -> None:
    there = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert type(there) is type(error)
    assert (str(there), vars(there)) == (str(error), vars(error))


async def test_a_mark_that_cannot_be_decided_names_its_run_elsewhere(
    db: Database, session: AsyncSession
) -> None:
    db.add_run("run")
    [run] = await detect_orphaned_runs(session)
    there = pickle.loads(pickle.dumps(UndecidedError(run)))  # noqa: S301 - our own
    assert (there.run, str(there)) == (run, str(UndecidedError(run)))


async def test_a_pool_lives_on_when_its_work_has_lost_its_run(db: Database) -> None:
    with ProcessPoolExecutor(1) as pool:
        for _ in range(2):
            reported = asyncio.wrap_future(pool.submit(finish_run_sync, "no such run"))
            with pytest.raises(RunLost) as raised:
                await reported
            assert raised.value.by is LostBy.VANISHED
