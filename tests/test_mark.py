"""The mark: what it leaves alone, in both orders of the row lock, and what it writes."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import LiteralString

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from orphan_recovery import (
    ConfigurationError,
    RunStatus,
    WorkerRun,
    detect_orphaned_runs,
    mark_run_as_crashed,
)
from orphan_recovery.mark import mark
from orphan_recovery.policy import is_transient
from orphan_recovery.record import note_direct_call
from orphan_recovery.request import SweepRequest
from support import Database

# What a worker, or someone else, may do to its run; and the outcome that has to name it.
MOVES: dict[str, tuple[LiteralString, str]] = {
    "completes": (
        "UPDATE worker_runs SET status = 'completed', success = true, completed_at = now()",
        "finished_first",
    ),
    "fails": ("UPDATE worker_runs SET status = 'failed', error = 'own error'", "finished_first"),
    "crashes by hand": ("UPDATE worker_runs SET status = 'crashed'", "finished_first"),
    "beats": ("UPDATE worker_runs SET heartbeat_at = now()", "sign_of_life"),
    "beats, if long ago": (
        "UPDATE worker_runs SET heartbeat_at = now() - interval '50 minutes'",
        "sign_of_life",
    ),
    "is put back": ("UPDATE worker_runs SET status = 'queued'", "sign_of_life"),
    "changes hands": ("UPDATE worker_runs SET worker_id = 'worker-2'", "changed_hands"),
    "is given up": ("UPDATE worker_runs SET worker_id = NULL", "changed_hands"),
    "vanishes": ("DELETE FROM worker_runs", "vanished"),
}
every_move = pytest.mark.parametrize("move", MOVES)


@pytest.fixture
async def orphan(db: Database, session: AsyncSession) -> WorkerRun:
    db.add_run("run")
    [run] = await detect_orphaned_runs(session)
    await session.rollback()
    return run


Marking = Callable[[], Awaitable[bool]]


@pytest.fixture
def marking(engine: AsyncEngine, orphan: WorkerRun) -> Marking:
    """Mark the orphan in a transaction of its own, and commit."""

    async def mark() -> bool:
        async with AsyncSession(engine) as session, session.begin():
            return await mark_run_as_crashed(session, orphan)

    return mark


def request_of(run: WorkerRun) -> SweepRequest:
    return SweepRequest(threshold_minutes=30, asked_by="test", sweep_id=run.sweep_id)


async def test_an_orphan_is_marked_with_its_evidence(
    db: Database, orphan: WorkerRun, session: AsyncSession
) -> None:
    assert await mark_run_as_crashed(session, orphan, "node lost") is True
    assert db.status("run") == "running", "nothing stands before the caller commits"
    await session.commit()
    [row] = db.do("SELECT *, completed_at <= now() AS past FROM worker_runs")
    assert (row["status"], row["success"], row["past"]) == ("crashed", False, True)
    assert row["error"].startswith("node lost; last sign of life ")
    for part in ("(age)", "silent for 02:00:0", "threshold 00:30:00", str(orphan.sweep_id)):
        assert part in row["error"]
    [verdict] = db.verdicts()
    assert verdict["judged_at"] == row["completed_at"]
    assert verdict["silence"] == verdict["judged_at"] - verdict["sign_of_life"]
    assert verdict["sign_of_life"] == orphan.sign_of_life
    assert {k: str(verdict[k]) for k in ("outcome", "worker_id", "tenant_id", "task")} == {
        "outcome": "marked",
        "worker_id": "worker-1",
        "tenant_id": "tenant-1",
        "task": "report",
    }
    assert verdict["threshold"] == timedelta(minutes=30)
    assert (verdict["evidence"], verdict["rule"]) == ("age", "silence >= threshold")
    assert (verdict["reason"], verdict["status_seen"]) == ("node lost", "running")
    [sweep] = db.sweeps()
    assert (sweep["asked_by"], sweep["ended_as"]) == ("mark_run_as_crashed", "direct")


@every_move
async def test_what_happens_between_detect_and_mark_is_left_alone_and_named(
    db: Database, marking: Marking, move: str
) -> None:
    statement, outcome = MOVES[move]
    db.do(statement)
    before = db.do("SELECT * FROM worker_runs")
    assert await marking() is False
    assert db.do("SELECT * FROM worker_runs") == before
    [verdict] = db.verdicts()
    assert verdict["outcome"] == outcome
    if outcome != "vanished":
        assert verdict["found"]["status"] == before[0]["status"]
        assert verdict["found"]["worker_id"] == before[0]["worker_id"]


@every_move
async def test_the_worker_has_the_row_first_and_the_mark_waits_and_leaves_it_alone(
    db: Database, marking: Marking, move: str
) -> None:
    statement, outcome = MOVES[move]
    with db.connect() as worker:
        worker.execute(statement)
        mark = asyncio.ensure_future(marking())
        await asyncio.to_thread(db.await_lock_wait)
        worker.commit()
        assert await mark is False
    assert db.outcomes() == {"run": outcome}
    assert "crashed" not in db.statuses().values() or move == "crashes by hand"


async def test_the_worker_has_the_row_first_and_rolls_back_so_the_mark_stands(
    db: Database, marking: Marking
) -> None:
    with db.connect() as worker:
        worker.execute(MOVES["completes"][0])
        mark = asyncio.ensure_future(marking())
        await asyncio.to_thread(db.await_lock_wait)
        worker.rollback()
        assert await mark is True
    assert db.status("run") == "crashed"


@pytest.mark.parametrize("move", ["completes", "fails", "changes hands", "is put back", "vanishes"])
async def test_the_mark_has_the_row_first_and_the_late_worker_is_refused(
    db: Database, session: AsyncSession, orphan: WorkerRun, move: str
) -> None:
    assert await mark_run_as_crashed(session, orphan) is True

    def late_worker() -> str:
        with db.connect() as worker:
            try:
                worker.execute(MOVES[move][0])
            except psycopg.errors.RaiseException as error:
                return f"{error.sqlstate} {error}"
        return "went through"

    finishing = asyncio.ensure_future(asyncio.to_thread(late_worker))
    await asyncio.to_thread(db.await_lock_wait)
    await session.commit()
    assert (await finishing).startswith("P0001 TRUTH_VIOLATION")
    assert db.status("run") == "crashed"


async def test_the_mark_has_the_row_first_and_rolls_back_so_the_worker_finishes(
    db: Database, session: AsyncSession, orphan: WorkerRun
) -> None:
    assert await mark_run_as_crashed(session, orphan) is True

    def worker() -> None:
        with db.connect() as connection:
            connection.execute(MOVES["completes"][0])

    finishing = asyncio.ensure_future(asyncio.to_thread(worker))
    await asyncio.to_thread(db.await_lock_wait)
    await session.rollback()
    await finishing
    assert db.status("run") == "completed"
    assert db.verdicts() == [], "the evidence goes with the mark"


async def test_a_lost_acknowledgement_counts_as_marked_and_writes_no_second_row(
    db: Database, marking: Marking
) -> None:
    assert await marking() is True  # committed, but suppose that nobody heard
    before = db.do("SELECT * FROM worker_runs")
    assert await marking() is True
    assert db.do("SELECT * FROM worker_runs") == before
    assert len(db.verdicts()) == 1
    assert len(db.sweeps()) == 1


async def test_another_sweep_finds_it_already_marked(
    db: Database, orphan: WorkerRun, session: AsyncSession
) -> None:
    [seen_by_another] = await detect_orphaned_runs(session)
    await session.rollback()
    assert await mark_run_as_crashed(session, orphan) is True
    await session.commit()
    assert await mark_run_as_crashed(session, seen_by_another) is False
    await session.commit()
    outcomes = [(v["sweep_id"], v["outcome"]) for v in db.verdicts()]
    assert sorted(outcomes) == sorted(
        [(orphan.sweep_id, "marked"), (seen_by_another.sweep_id, "already_marked")]
    )


async def test_two_sweeps_at_once_mark_once(
    db: Database, engine: AsyncEngine, orphan: WorkerRun, session: AsyncSession
) -> None:
    async with AsyncSession(engine) as other:
        [seen_by_another] = await detect_orphaned_runs(other)
        assert await mark_run_as_crashed(session, orphan) is True
        second = asyncio.ensure_future(mark_run_as_crashed(other, seen_by_another))
        await asyncio.to_thread(db.await_lock_wait)
        await session.commit()
        assert await second is False
        await other.commit()
    assert sorted(v["outcome"] for v in db.verdicts()) == ["already_marked", "marked"]


async def test_two_sweeps_that_wait_for_the_same_rows_do_not_deadlock(
    db: Database, engine: AsyncEngine, session: AsyncSession
) -> None:
    """Both wait behind a third for the middle row, having come from opposite ends."""
    orphans = db.add_orphans(3)

    async def sweep_of(runs: list[WorkerRun]) -> list[str]:
        async with AsyncSession(engine) as own, own.begin():
            # As in a large table: row by row, in the order of the snapshots.
            for way in ("seqscan", "hashjoin", "mergejoin"):
                await own.execute(text(f"SET LOCAL enable_{way} = off"))
            await note_direct_call(own, request_of(runs[0]))
            marked = await mark(own, request_of(runs[0]), runs)
            return [verdict.outcome for verdict in marked if verdict is not None]

    first = await detect_orphaned_runs(session)
    second = await detect_orphaned_runs(session)
    with db.connect() as third:
        third.execute("SELECT 1 FROM worker_runs WHERE id = %s FOR UPDATE", [orphans[1]])
        one = asyncio.ensure_future(sweep_of(first))
        await asyncio.to_thread(db.await_lock_wait, 1)
        other = asyncio.ensure_future(sweep_of(second[::-1]))
        await asyncio.to_thread(db.await_lock_wait, 2)
    assert await one == ["marked"] * 3
    assert await other == ["already_marked"] * 3


async def test_the_first_verdict_of_a_sweep_stands(db: Database, marking: Marking) -> None:
    db.do(MOVES["changes hands"][0])
    assert await marking() is False  # committed, but suppose that nobody heard
    db.do("UPDATE worker_runs SET worker_id = 'worker-1'")  # and back again
    assert await marking() is False
    assert db.outcomes() == {"run": "changed_hands"}
    assert db.status("run") == "running"


async def test_a_snapshot_of_a_terminal_run_marks_nothing(
    db: Database, session: AsyncSession, orphan: WorkerRun
) -> None:
    db.do(MOVES["fails"][0])
    made_up = dataclasses.replace(orphan, status=RunStatus.FAILED)
    assert await mark_run_as_crashed(session, made_up) is False
    await session.commit()
    assert db.outcomes() == {"run": "finished_first"}


async def test_a_clock_that_went_backwards_marks_nothing(
    db: Database, session: AsyncSession, orphan: WorkerRun
) -> None:
    """After a failover the new primary's clock may be behind: silent then, not silent now."""
    sooner = dataclasses.replace(orphan, threshold=timedelta(hours=3))
    assert await mark_run_as_crashed(session, sooner) is False
    await session.commit()
    assert db.outcomes() == {"run": "sign_of_life"}
    assert db.status("run") == "running"


async def test_a_database_error_is_raised_for_a_retry_policy_to_act_on(
    db: Database, session: AsyncSession, orphan: WorkerRun
) -> None:
    with db.connect() as worker:
        worker.execute("SELECT * FROM worker_runs FOR UPDATE")
        await session.execute(text("SET LOCAL lock_timeout = '50ms'"))
        with pytest.raises(DBAPIError) as raised:
            await mark_run_as_crashed(session, orphan)
    assert is_transient(raised.value)
    await session.rollback()
    db.poison("run")
    with pytest.raises(DBAPIError, match="poisoned row run") as raised:
        await mark_run_as_crashed(session, orphan)
    assert not is_transient(raised.value)


async def test_a_serializable_caller_gets_an_error_and_never_a_wrong_verdict(
    db: Database, engine: AsyncEngine, orphan: WorkerRun
) -> None:
    async with AsyncSession(engine) as session:
        await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        await session.execute(text("SELECT 1 FROM worker_runs"))  # its snapshot is taken
        db.do(MOVES["beats"][0])
        with pytest.raises(DBAPIError) as raised:
            await mark_run_as_crashed(session, orphan)
        assert is_transient(raised.value)
    assert db.status("run") == "running"


async def test_no_mark_without_a_ledger(
    db: Database, session: AsyncSession, orphan: WorkerRun
) -> None:
    db.do("DROP SCHEMA orphan_recovery CASCADE")
    with pytest.raises(ConfigurationError, match=r"ledger.*orphan-recovery migrate"):
        await mark_run_as_crashed(session, orphan)
    assert db.status("run") == "running"


@pytest.mark.parametrize("reason", ["", "  ", "nul \x00", "x" * 1001])
async def test_a_bad_reason_is_refused(
    session: AsyncSession, orphan: WorkerRun, reason: str
) -> None:
    with pytest.raises(ConfigurationError, match="reason is"):
        await mark_run_as_crashed(session, orphan, reason)


async def test_a_reason_is_a_value_and_never_sql(
    db: Database, session: AsyncSession, orphan: WorkerRun
) -> None:
    reason = "'); DROP TABLE worker_runs; -- 100% %s :x {y} \N{SNOWMAN}"
    assert await mark_run_as_crashed(session, orphan, reason) is True
    await session.commit()
    assert db.one("SELECT error FROM worker_runs").startswith(reason)


@pytest.mark.parametrize("kind", ["uuid", "integer"])
async def test_keys_and_owners_of_other_types_are_marked_alike(
    db: Database, session: AsyncSession, kind: str
) -> None:
    key = {"uuid": "7a3e1f0e-5f50-4c3c-9b8e-6a6f6f1f2d3c", "integer": "42"}[kind]
    db.do("ALTER TABLE worker_runs ALTER id DROP DEFAULT")
    db.do(
        "ALTER TABLE worker_runs ALTER id TYPE uuid USING id::uuid"
        if kind == "uuid"
        else "ALTER TABLE worker_runs ALTER id TYPE integer USING id::integer"
    )
    db.do("ALTER TABLE worker_runs ALTER worker_id TYPE uuid USING worker_id::uuid")
    db.add_run(key, worker="0b0e7a53-6d3c-4a51-8d8e-0d6f6f1f2d3c")
    [run] = await detect_orphaned_runs(session)
    assert run.id == key
    assert await mark_run_as_crashed(session, run) is True
    await session.commit()
    assert db.outcomes() == {key: "marked"}
