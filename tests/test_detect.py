"""Detection: who is an orphan, by whose clock, and by which index."""

import json
import pickle
import re
from datetime import UTC, timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from orphan_recovery import ConfigurationError, Evidence, RunStatus, detect_orphaned_runs
from orphan_recovery.database import database_url, make_engine
from orphan_recovery.describe import runs_table
from orphan_recovery.detect import detect, look_at_fleet, orphans
from orphan_recovery.doctor.table import explain
from orphan_recovery.request import SweepRequest
from support import Database


async def ids(session: AsyncSession, threshold_minutes: int = 30) -> list[str]:
    return [run.id for run in await detect_orphaned_runs(session, threshold_minutes)]


async def test_only_what_is_in_flight_and_silent_is_an_orphan(
    db: Database, session: AsyncSession
) -> None:
    db.add_run("silent-running")
    db.add_run("silent-queued", status="queued", worker=None)
    db.add_run("young", age="29 minutes")
    db.add_run("old-but-beating", age="3 days", beat="1 minute")
    for status in ("completed", "failed", "crashed"):
        db.add_run(status, status=status)
    assert set(await ids(session)) == {"silent-running", "silent-queued"}


async def test_oldest_sign_of_life_comes_first_and_the_latest_sign_counts(
    db: Database, session: AsyncSession
) -> None:
    db.add_run("created-long-ago", age="5 hours", beat="40 minutes")
    db.add_run("b-never-beat", age="2 hours")
    db.add_run("beat-before-start", age="1 hour", beat="3 hours")
    assert await ids(session) == ["b-never-beat", "beat-before-start", "created-long-ago"]
    runs = {run.id: run for run in await detect_orphaned_runs(session)}
    assert runs["created-long-ago"].evidence is Evidence.RUN_HEARTBEAT
    assert runs["b-never-beat"].evidence is Evidence.AGE
    assert runs["beat-before-start"].evidence is Evidence.AGE


async def test_the_threshold_is_exact_in_database_time(db: Database, session: AsyncSession) -> None:
    db.add_run("run")
    db.do("UPDATE worker_runs SET created_at = now() - interval '30 minutes', started_at = NULL")
    assert await ids(session, 30) == ["run"]
    assert await ids(session, 31) == []


async def test_a_snapshot_carries_its_evidence_pickles_and_needs_no_session(
    db: Database, session: AsyncSession
) -> None:
    db.add_run("run", age="2 hours", beat="1 hour")
    [run] = await detect_orphaned_runs(session, 45)
    await session.close()
    again = pickle.loads(pickle.dumps(run))  # noqa: S301
    assert again == run
    assert (again.status, again.worker_id, again.tenant_id, again.task) == (
        RunStatus.RUNNING,
        "worker-1",
        "tenant-1",
        "report",
    )
    assert again.threshold == timedelta(minutes=45)
    assert timedelta(hours=1) <= again.silence < timedelta(hours=1, minutes=1)
    for time in (again.created_at, again.heartbeat_at, again.sign_of_life, again.seen_at):
        assert time is not None
        assert time.tzinfo is UTC


async def test_detection_takes_no_lock_writes_nothing_and_commits_nothing(
    db: Database, session: AsyncSession
) -> None:
    db.add_run("run")
    await session.execute(text("SET TRANSACTION READ ONLY"))
    assert await ids(session) == ["run"]
    assert session.in_transaction()
    with db.connect() as other:  # would wait for any row lock
        other.execute("SET lock_timeout = '1s'")
        other.execute("UPDATE worker_runs SET heartbeat_at = now() WHERE id = 'run'")


async def test_scope_narrows_and_never_widens(db: Database, engine: AsyncEngine) -> None:
    db.add_run("a", tenant="t1", worker="w1", age="5 hours")
    db.add_run("b", tenant="t1", worker="w2", age="4 hours")
    db.add_run("c", tenant="t2", worker="w1", age="3 hours")
    db.add_run("d", tenant=None, worker=None, age="2 hours")

    async def scoped(**scope: object) -> list[str]:
        request = SweepRequest(threshold_minutes=30, asked_by="test", **scope)  # type: ignore[arg-type]
        async with engine.connect() as connection:
            return [run.id for run in await detect(connection, request)]

    assert await scoped() == ["a", "b", "c", "d"]
    assert await scoped(tenant="t1") == ["a", "b"]
    assert await scoped(worker="w1") == ["a", "c"]
    assert await scoped(tenant="t1", worker="w1") == ["a"]
    assert await scoped(tenant="t1'; DROP TABLE worker_runs; --") == []
    assert await scoped(limit=2) == ["a", "b"]


async def test_pages_go_through_all_orphans_once_ties_included(
    db: Database, engine: AsyncEngine
) -> None:
    expected = db.add_orphans(7)
    db.do("UPDATE worker_runs SET created_at = (SELECT min(created_at) FROM worker_runs)")
    request = SweepRequest(threshold_minutes=30, asked_by="test")
    seen: list[str] = []
    async with engine.connect() as connection:
        page = await detect(connection, request, page=3)
        while page:
            seen += [run.id for run in page]
            page = await detect(connection, request, after=page[-1], page=3)
    assert seen == sorted(expected)


async def test_runs_that_silence_cannot_judge_are_counted(
    db: Database, engine: AsyncEngine
) -> None:
    db.do("ALTER TABLE worker_runs ALTER created_at DROP NOT NULL")
    db.do("INSERT INTO worker_runs (id, status, created_at) VALUES ('undatable', 'running', NULL)")
    db.add_run("ahead", worker="fast-clock", beat="-3 hours")
    db.add_run("for-ever", worker="odd", age="1 hour")
    db.do("UPDATE worker_runs SET heartbeat_at = 'infinity' WHERE id = 'for-ever'")
    db.add_run("orphan")
    db.do("UPDATE worker_runs SET heartbeat_at = '-infinity' WHERE id = 'orphan'")
    request = SweepRequest(threshold_minutes=30, asked_by="test")
    async with engine.connect() as connection:
        fleet = await look_at_fleet(connection, request)
        assert [run.id for run in await detect(connection, request)] == ["orphan"]
    assert (fleet.in_flight, fleet.undatable, fleet.ahead) == (4, 1, 2)
    assert fleet.ahead_workers == ["fast-clock", "odd"]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/Los_Angeles"])
@pytest.mark.parametrize("kind", ["timestamptz", "timestamp"])
async def test_naive_times_are_utc_whatever_the_session_time_zone(
    db: Database, session: AsyncSession, kind: str, zone: str
) -> None:
    db.do("DROP INDEX worker_runs_in_flight, worker_runs_crashed")
    db.do("DROP TRIGGER prevent_worker_run_mutation ON worker_runs")
    if kind == "timestamp":
        db.do(
            "ALTER TABLE worker_runs"
            " ALTER created_at TYPE timestamp USING created_at AT TIME ZONE 'UTC',"
            " ALTER started_at TYPE timestamp USING started_at AT TIME ZONE 'UTC',"
            " ALTER heartbeat_at TYPE timestamp USING heartbeat_at AT TIME ZONE 'UTC',"
            " ALTER completed_at TYPE timestamp USING completed_at AT TIME ZONE 'UTC'"
        )
    db.do("SET TIME ZONE 'UTC'")  # the workers write UTC
    db.add_run("silent", age="5 hours", beat="31 minutes")
    db.add_run("alive", age="5 hours", beat="29 minutes")
    db.add_run("young", age="29 minutes")
    await session.execute(text(f"SET TIME ZONE '{zone}'"))
    [run] = await detect_orphaned_runs(session, 30)
    assert run.id == "silent"
    assert timedelta(minutes=31) <= run.silence < timedelta(minutes=32)
    assert run.sign_of_life.tzinfo is UTC


async def test_the_partial_index_serves_detection(db: Database, engine: AsyncEngine) -> None:
    db.do(
        "INSERT INTO worker_runs (id, status, created_at) SELECT 'done-' || n, 'completed',"
        " now() - interval '1 day' FROM generate_series(1, 20000) AS n"
    )
    db.do(
        "INSERT INTO worker_runs (id, status, created_at) SELECT 'young-' || n, 'running',"
        " now() - interval '1 minute' FROM generate_series(1, 5000) AS n"
    )
    db.add_orphans(20)
    db.do("ANALYZE worker_runs")
    request = SweepRequest(threshold_minutes=30, asked_by="test")
    async with engine.connect() as connection:
        table = await runs_table(connection, request.target)
        plan = json.dumps(await explain(connection, orphans(table, request)))
    assert '"Node Type": "Bitmap Index Scan"' in plan
    assert '"Index Name": "worker_runs_in_flight"' in plan
    assert '"Index Cond": "(created_at <= (statement_timestamp()' in plan, "young runs are read too"
    assert "Seq Scan" not in plan


async def test_a_callers_prepared_statements_go_on_using_the_index(db: Database) -> None:
    """A generic plan cannot know that the statuses are those of the index; the server has to see
    that a plan for the values at hand is the better one, again and again."""
    db.do(
        "INSERT INTO worker_runs (id, status, created_at) SELECT 'done-' || n, 'completed',"
        " now() - interval '1 day' FROM generate_series(1, 20000) AS n"
    )
    db.add_orphans(20)
    db.do("ANALYZE worker_runs")
    engine = create_async_engine(
        database_url(db.url), connect_args={"prepare_threshold": 0}, isolation_level="AUTOCOMMIT"
    )
    async with AsyncSession(engine) as session:
        for _ in range(12):
            assert len(await detect_orphaned_runs(session)) == 20
        [plans] = await session.execute(
            text(
                "SELECT generic_plans, custom_plans FROM pg_prepared_statements"
                " WHERE statement LIKE '%worker_runs%' AND statement NOT LIKE '%prepared%'"
            )
        )
    await engine.dispose()
    assert plans.custom_plans == 12
    assert plans.generic_plans == 0


@pytest.mark.parametrize("threshold", [0, -5, "abc", True, 1.5, 10**9])
async def test_a_bad_threshold_is_refused_by_name(session: AsyncSession, threshold: object) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"threshold_minutes is {threshold!r}")):
        await detect_orphaned_runs(session, threshold)  # type: ignore[arg-type]


async def test_a_missing_table_and_a_missing_column_name_the_way_out(blank: Database) -> None:
    engine = make_engine(database_url(blank.url))
    async with AsyncSession(engine) as session:
        with pytest.raises(ConfigurationError, match=r"worker_runs.*orphan-recovery migrate"):
            await detect_orphaned_runs(session)
        blank.do("CREATE TABLE worker_runs (id text, status text)")
        with pytest.raises(ConfigurationError, match=r"no column .*'worker_id'.*migrate"):
            await detect_orphaned_runs(session)
    await engine.dispose()


async def test_a_sign_of_life_that_is_no_timestamp_is_refused_by_name(
    db: Database, session: AsyncSession
) -> None:
    db.do("ALTER TABLE worker_runs ALTER heartbeat_at TYPE text")
    with pytest.raises(ConfigurationError, match=r"'heartbeat_at'.*timestamptz"):
        await detect_orphaned_runs(session)
