"""What the tests of lock evidence share: targets with locks, and who holds which."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import literal, select
from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery.describe import runs_table
from orphan_recovery.recover import run_sweep
from orphan_recovery.report import SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.target import Target
from support import Database, until
from tables_support import configure

BEAT = 1.0
"""Seconds between two looks of a worker at its locks: long enough for a machine under load."""
SHORT = 0.2
"""The same, where no worker takes part: a second look comes in two of them."""
KINDS = pytest.mark.parametrize("kind", ["run", "worker"])


def with_locks(
    folder: Path, environment: pytest.MonkeyPatch, kind: str, beat: float = BEAT, more: str = ""
) -> Target:
    """The default target with locks; whatever is started from now on has them too."""
    described = f'[targets.default]\nlock = "{kind}"\nheartbeat_seconds = {beat}\n{more}'
    return configure(folder, environment, described, "default")


async def sweep(target: Target, **asked: Any) -> SweepReport:
    report = await run_sweep(SweepRequest(target=target, asked_by="test", **asked))
    assert report.error is None
    return report


def sessions(db: Database) -> dict[int, int]:
    """The sessions that hold advisory locks in this database, and how many."""
    rows = db.do(
        "SELECT l.pid, count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
        " WHERE l.locktype = 'advisory' AND l.granted AND d.datname = current_database()"
        " GROUP BY l.pid"
    )
    return {row["pid"]: row["count"] for row in rows}


def await_locks(db: Database, count: int, seconds: float = 20) -> None:
    """Return once so many advisory locks are held."""
    held = f"{count} advisory lock(s) to be held"
    until(lambda: sum(sessions(db).values()) == count, held, seconds)


async def key_of(engine: AsyncEngine, target: Target, run: str) -> int:
    """The key of the lock that a run's worker is to hold."""
    async with engine.connect() as connection:
        table = await runs_table(connection, target)
        asked = select(table.lock_key).where(table.is_row(literal(run)))
        return int((await connection.execute(asked)).scalar_one())


def marked(db: Database) -> list[str]:
    """The runs that stand marked, by the ledger."""
    return sorted(run for run, outcome in db.outcomes().items() if outcome == "marked")
