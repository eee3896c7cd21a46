"""A table that is changed while an engine lives on is read as it is, not as it was."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import LiteralString

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from alive_support import OFTEN
from lock_support import await_locks
from orphan_recovery import ConfigurationError, detect_orphaned_runs, mark_run_as_crashed
from orphan_recovery.alive import claim, finish_run, keep_alive
from orphan_recovery.alive.beat import beat
from orphan_recovery.database import database_url, make_engine, transaction
from orphan_recovery.describe import runs_table
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Target
from support import Database, until
from tables_support import configure, set_for_all, sweep

pytestmark = pytest.mark.usefixtures("no_beater_is_left", "the_minute_has_begun")

JOBS = "[targets.jobs]\ntable = 'jobs'\nthreshold_minutes = 30\n"
WORKERS = (
    "[targets.jobs.worker_heartbeat]\ntable = 'workers'\nkey = 'id'\nrun_key = 'worker_id'\n"
    "last_seen = 'seen'\n"
)


@pytest.fixture
async def callers(blank: Database) -> AsyncIterator[AsyncEngine]:
    """An engine as a service has it for weeks, in a zone far from UTC."""
    set_for_all(blank, "TimeZone = 'Asia/Tokyo'")
    engine = create_async_engine(database_url(blank.url))
    yield engine
    await engine.dispose()


def make(
    blank: Database, folder: Path, environment: pytest.MonkeyPatch, kind: str, more: str = ""
) -> Target:
    """A table whose times are of that type, without a heartbeat."""
    environment.setenv("ORPHAN_RECOVERY_TARGET", "jobs")
    target = configure(folder, environment, JOBS + more, "jobs")
    naive = "timestamp" if kind == "timestamp" else "timestamptz"
    blank.do(
        "CREATE TABLE jobs (id text PRIMARY KEY, status text NOT NULL, worker_id text,"
        " created_at " + naive + ")"
    )
    return target


async def found_by(engine: AsyncEngine) -> list[str]:
    async with AsyncSession(engine) as session:
        return [run.id for run in await detect_orphaned_runs(session)]


async def test_a_heartbeat_that_came_later_counts(
    blank: Database, callers: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate(make(blank, tmp_path, monkeypatch, "timestamptz"))
    assert await found_by(callers) == []
    blank.do("ALTER TABLE jobs ADD heartbeat_at timestamptz")
    blank.do("INSERT INTO jobs VALUES ('live', 'running', 'w', now() - interval '2 hours', now())")
    blank.do("INSERT INTO jobs VALUES ('dead', 'running', 'w', now() - interval '2 hours')")
    assert await found_by(callers) == ["dead"]


async def test_a_time_that_was_given_its_zone_later_is_read_with_it(
    blank: Database, callers: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate(make(blank, tmp_path, monkeypatch, "timestamp"))
    assert await found_by(callers) == []
    blank.do(
        "ALTER TABLE jobs ALTER created_at TYPE timestamptz USING created_at AT TIME ZONE 'UTC'"
    )
    blank.do("INSERT INTO jobs VALUES ('live', 'running', 'w', now() - interval '1 minute')")
    assert await found_by(callers) == []


async def test_each_session_has_the_table_of_its_search_path(
    blank: Database, callers: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(blank, tmp_path, monkeypatch, "timestamptz")
    blank.do("CREATE SCHEMA other; CREATE TABLE other.jobs (LIKE public.jobs INCLUDING ALL)")
    blank.do("ALTER TABLE other.jobs ADD heartbeat_at timestamptz")
    blank.do(
        "INSERT INTO other.jobs VALUES ('live', 'running', 'w', now() - interval '2 hours', now())"
    )
    assert await found_by(callers) == []
    async with AsyncSession(callers) as session:
        await session.execute(text("SET LOCAL search_path = other"))
        assert await detect_orphaned_runs(session) == []


async def test_a_session_that_would_read_another_table_is_refused(
    blank: Database, callers: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate(make(blank, tmp_path, monkeypatch, "timestamptz"))
    mapped = callers.execution_options(schema_translate_map={None: "other"})
    async with AsyncSession(mapped) as session:
        with pytest.raises(ConfigurationError, match="schema_translate_map"):
            await detect_orphaned_runs(session)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("DateStyle = 'German'", "DateStyle 'German, DMY'.*SET DateStyle = ISO"),
        ("IntervalStyle = 'postgres_verbose'", "IntervalStyle 'postgres_verbose'"),
    ],
)
async def test_a_session_whose_times_the_driver_cannot_read_is_refused(
    blank: Database,
    callers: AsyncEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: LiteralString,
    told: str,
) -> None:
    migrate(make(blank, tmp_path, monkeypatch, "timestamptz"))
    blank.do("INSERT INTO jobs VALUES ('dead', 'running', 'w', now() - interval '2 hours')")
    set_for_all(blank, setting)
    async with AsyncSession(callers) as session:
        with pytest.raises(ConfigurationError, match=told):
            await detect_orphaned_runs(session)
        await session.execute(text("SET LOCAL DateStyle = ISO; SET LOCAL IntervalStyle = postgres"))
        assert [run.id for run in await detect_orphaned_runs(session)] == ["dead"]


async def test_a_session_that_commits_each_statement_is_refused_where_a_lock_has_to_be_kept(
    blank: Database, callers: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make(blank, tmp_path, monkeypatch, "timestamptz", WORKERS)
    blank.do("CREATE TABLE workers (id text PRIMARY KEY, seen timestamptz)")
    migrate(target)
    blank.do("INSERT INTO jobs VALUES ('dead', 'running', 'w', now() - interval '2 hours')")
    async with AsyncSession(callers.execution_options(isolation_level="AUTOCOMMIT")) as session:
        [run] = await detect_orphaned_runs(session)
        with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
            await mark_run_as_crashed(session, run)
    assert blank.one("SELECT status FROM jobs") == "running"
    async with AsyncSession(callers) as session, session.begin():
        [run] = await detect_orphaned_runs(session)
        assert await mark_run_as_crashed(session, run)


@pytest.mark.parametrize("zone", ["TimeZone = 'Asia/Tokyo'", "TimeZone = 'EST5EDT'"])
async def test_a_worker_beats_on_right_while_its_column_is_given_a_zone(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zone: LiteralString
) -> None:
    set_for_all(blank, zone)
    target = make(blank, tmp_path, monkeypatch, "timestamp")
    blank.do("ALTER TABLE jobs ADD heartbeat_at timestamp")
    migrate(target)
    blank.do(
        "INSERT INTO jobs VALUES"
        " ('live', 'running', 'w', now() AT TIME ZONE 'UTC' - interval '20 hours')"
    )
    with keep_alive("live", worker_id="w", interval=OFTEN) as alive:
        until(lambda: blank.one("SELECT heartbeat_at IS NOT NULL FROM jobs"), "a beat", 20)
        blank.do(
            "ALTER TABLE jobs"
            " ALTER created_at TYPE timestamptz USING created_at AT TIME ZONE 'UTC',"
            " ALTER heartbeat_at TYPE timestamptz USING heartbeat_at AT TIME ZONE 'UTC'"
        )
        changed = blank.one("SELECT now()")
        fresh = "SELECT abs(extract(epoch FROM heartbeat_at - %s)) BETWEEN 0.1 AND 60 FROM jobs"
        until(lambda: blank.one(fresh, changed), "a beat that is right", 20)
        assert (await sweep(target)).detected == 0
        assert alive.lost is None


async def test_a_worker_beats_and_finishes_though_the_status_is_of_another_type_now(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make(blank, tmp_path, monkeypatch, "timestamptz")
    blank.do("ALTER TABLE jobs ADD heartbeat_at timestamptz")
    blank.do("INSERT INTO jobs VALUES ('live', 'queued', NULL, now())")
    assert await claim("live", "w")
    with keep_alive("live", worker_id="w", interval=OFTEN) as alive:
        blank.do("CREATE TYPE state AS ENUM ('queued', 'running', 'completed', 'crashed')")
        blank.do("ALTER TABLE jobs ALTER status TYPE state USING status::state")
        changed = blank.one("SELECT now()")
        fresh = "SELECT heartbeat_at > %s FROM jobs"
        until(lambda: blank.one(fresh, changed), "a beat since", 20)
        assert alive.lost is None
    await finish_run("live", worker_id="w")
    blank.do("INSERT INTO jobs VALUES ('next', 'queued', NULL, now())")
    assert await claim("next", "w")
    assert blank.one("SELECT status::text FROM jobs WHERE id = 'live'") == "completed"
    migrate(target)


async def test_a_beat_for_which_the_table_was_looked_up_before_is_written_in_utc(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_for_all(blank, "TimeZone = 'Asia/Tokyo'")
    target = make(blank, tmp_path, monkeypatch, "timestamp")
    blank.do("ALTER TABLE jobs ADD heartbeat_at timestamp")
    migrate(target)
    blank.do("INSERT INTO jobs VALUES ('live', 'running', 'w', timestamp '2020-01-01')")
    engine = make_engine(database_url(blank.url))
    async with transaction(engine) as db:
        table = await runs_table(db, target)
    blank.do(
        "ALTER TABLE jobs ALTER heartbeat_at TYPE timestamptz USING heartbeat_at AT TIME ZONE 'UTC'"
    )
    async with transaction(engine) as db:
        assert list((await beat(db, table, [("live", "w")])).thresholds) == [("live", "w")]
    await engine.dispose()
    assert blank.one("SELECT abs(extract(epoch FROM now() - heartbeat_at)) < 60 FROM jobs")


async def test_the_locks_of_a_table_that_was_moved_are_taken_by_its_new_name(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = "lock = 'run'\nheartbeat_seconds = 0.5\n"
    target = make(blank, tmp_path, monkeypatch, "timestamptz", more)
    migrate(target)
    blank.do("INSERT INTO jobs VALUES ('live', 'running', 'w', now() - interval '2 hours')")
    set_for_all(blank, "search_path = public, other")
    blank.do("CREATE SCHEMA other")
    with keep_alive("live", worker_id="w") as alive:
        await_locks(blank, 1)
        blank.do("ALTER TABLE jobs SET SCHEMA other")
        await_locks(blank, 2)
        assert (await sweep(target)).detected == 0
        assert alive.lost is None
