"""A sweep begins when no other of its table is at work; for that it waits a while, no more."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from orphan_recovery import turn
from orphan_recovery.recover import run_sweep
from orphan_recovery.report import SweepReport
from orphan_recovery.request import SweepRequest
from support import Database, until

Connection = psycopg.Connection[dict[str, Any]]
SOON = 5.0
"""Seconds in which whoever waits for nobody is through, on any machine."""


@pytest.fixture
def other(db: Database) -> Iterator[Connection]:
    """Another sweep, which is in the second lane."""
    with db.connect() as connection:
        enter(connection)
        yield connection


def enter(other: Connection) -> None:
    other.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended("
        "'orphan_recovery lane 1 of public.worker_runs', 0))"
    )


async def sweep(*, dry_run: bool = False) -> SweepReport:
    return await run_sweep(SweepRequest(asked_by="test", dry_run=dry_run))


def has_looked(db: Database) -> bool:
    return bool(db.do("SELECT sweep_id FROM orphan_recovery.sweeps"))


async def test_a_sweep_waits_for_another_and_looks_then(
    db: Database, other: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """What the other marked meanwhile it does not even see."""
    caplog.set_level("INFO", "orphan_recovery")
    [orphan] = db.add_orphans(1)
    sweeping = asyncio.ensure_future(sweep())
    await asyncio.to_thread(
        until, lambda: "sweep_waits_for_another" in caplog.messages, "it says that it waits"
    )
    await asyncio.sleep(0.5)
    assert not has_looked(db)
    db.do("UPDATE worker_runs SET status = 'crashed' WHERE id = %s", orphan)
    other.rollback()
    report = await asyncio.wait_for(sweeping, SOON)
    assert (report.error, report.detected, report.ended_well) == (None, 0, True)
    assert caplog.messages.count("sweep_waits_for_another") == 1


async def test_it_is_not_deceived_by_the_moment_between_two_slices(
    db: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn, "BETWEEN_SLICES_SECONDS", 0.6)
    sweeping = asyncio.ensure_future(sweep())
    await asyncio.sleep(0.5)
    other.rollback()
    await asyncio.sleep(0.2)  # in which it asks at least once
    enter(other)
    await asyncio.sleep(1.0)
    assert not has_looked(db)
    other.rollback()
    assert (await asyncio.wait_for(sweeping, SOON)).error is None


async def test_it_waits_for_a_while_and_no_longer(
    db: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other may have frozen; and a worker that starts cannot wait for ever."""
    monkeypatch.setattr(turn, "LONGEST_WAIT_SECONDS", 0.5)
    began = time.monotonic()
    report = await asyncio.wait_for(sweep(), SOON)
    assert (report.error, report.ended_well) == (None, True)
    assert time.monotonic() - began >= 0.5
    assert other.info.transaction_status.name == "INTRANS"


async def test_who_waits_holds_up_nobody(db: Database, other: Connection) -> None:
    """It holds nothing while it waits: no lane, and no snapshot that would hold back a vacuum."""
    sweeping = asyncio.ensure_future(sweep())
    await asyncio.sleep(0.5)
    held = db.do(
        "SELECT backend_xmin, (SELECT count(*) FROM pg_locks WHERE pg_locks.pid = activity.pid"
        " AND locktype = 'advisory') AS locks FROM pg_stat_activity AS activity"
        " WHERE application_name = 'orphan-recovery' AND state <> 'active'"
        " AND datname = current_database()"
    )
    assert {(row["backend_xmin"], row["locks"]) for row in held} == {(None, 0)}
    other.rollback()
    assert (await asyncio.wait_for(sweeping, SOON)).error is None


async def test_a_dry_run_waits_for_nobody(db: Database, other: Connection) -> None:
    [orphan] = db.add_orphans(1)
    report = await asyncio.wait_for(sweep(dry_run=True), SOON)
    assert [run["run_id"] for run in report.as_dict()["runs"]] == [orphan]
    assert other.info.transaction_status.name == "INTRANS"
