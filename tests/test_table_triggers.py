"""Triggers of the table: what one takes back is no mark, and what one raises is about its row."""

import asyncio
from typing import LiteralString

import pytest
from psycopg import sql
from sqlalchemy.ext.asyncio import AsyncSession

from orphan_recovery import database, detect_orphaned_runs, lane, mark_run_as_crashed
from orphan_recovery.condemn import UndoneError
from orphan_recovery.mark import UndecidedError
from orphan_recovery.recover import run_sweep
from orphan_recovery.report import SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Target
from support import Database
from tables_support import do

pytestmark = pytest.mark.usefixtures("impatient")

RETURNS_OLD: LiteralString = "RETURN OLD;"
KEEPS_STATUS: LiteralString = "NEW.status := OLD.status; RETURN NEW;"
LEAVES_IT_OUT: LiteralString = "RETURN NULL;"


def add_trigger(db: Database, run: str, body: LiteralString, argument: str = "") -> None:
    """From now on that is done before each update of the run."""
    db.do(
        "CREATE FUNCTION interfere() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        + body
        + " END $$"
    )
    create = sql.SQL(
        "CREATE TRIGGER interfere BEFORE UPDATE ON worker_runs FOR EACH ROW"
        " WHEN (OLD.id = {}) EXECUTE FUNCTION interfere({})"
    )
    do(db, create.format(run, argument))


async def sweep(limit: int | None = None) -> SweepReport:
    return await run_sweep(SweepRequest(target=Target(), asked_by="test", limit=limit))


@pytest.mark.parametrize("limit", [None, 10], ids=["slices", "pages"])
@pytest.mark.parametrize("body", [RETURNS_OLD, KEEPS_STATUS, LEAVES_IT_OUT])
async def test_a_mark_that_a_trigger_takes_back_is_none(
    db: Database, body: LiteralString, limit: int | None
) -> None:
    """Neither in the ledger nor in the row, of which nothing else is written then either."""
    for run in ("a", "kept", "z"):
        db.add_run(run)
    add_trigger(db, "kept", body)
    before = db.do("SELECT * FROM worker_runs WHERE id = 'kept'")
    report = await sweep(limit)
    assert (report.detected, report.recovered, report.failed) == (3, 2, 1)
    assert db.outcomes() == {"a": "marked", "kept": "failed", "z": "marked"}
    assert db.do("SELECT * FROM worker_runs WHERE id = 'kept'") == before
    assert (db.sweeps()[0]["marked"], db.sweeps()[0]["ended_as"]) == (2, "failed")
    [told] = [verdict["error"] for verdict in db.verdicts() if verdict["run_id"] == "kept"]
    assert "a trigger of the table" in told


@pytest.mark.parametrize("limit", [None, 10], ids=["slices", "pages"])
async def test_a_mark_that_is_taken_back_after_it_was_written_is_none(
    blank: Database, limit: int | None
) -> None:
    """As by a queue that starts a run that crashed again, in its own row."""
    blank.do("CREATE TABLE jobs (id text PRIMARY KEY, status text, created_at timestamptz)")
    blank.do(
        "INSERT INTO jobs SELECT n, 'running', now() - interval '2 hours'"
        " FROM unnest('{a,k,z}'::text[]) AS n"
    )
    target = Target(name="jobs", table="jobs")
    migrate(target)
    blank.do(
        "CREATE FUNCTION start_again() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " UPDATE jobs SET status = 'running' WHERE id = NEW.id; RETURN NULL; END $$"
    )
    blank.do(
        "CREATE TRIGGER start_again AFTER UPDATE ON jobs FOR EACH ROW"
        " WHEN (NEW.id = 'k' AND NEW.status = 'crashed') EXECUTE FUNCTION start_again()"
    )
    report = await run_sweep(SweepRequest(target=target, asked_by="test", limit=limit))
    assert (report.detected, report.recovered, report.failed) == (3, 2, 1)
    assert blank.outcomes() == {"a": "marked", "k": "failed", "z": "marked"}
    [told] = [verdict["error"] for verdict in blank.verdicts() if verdict["run_id"] == "k"]
    assert "a trigger of the table put 'k' back in flight" in told


IN_PARTS: dict[str, tuple[LiteralString, LiteralString]] = {
    "a part's own": (
        "CREATE TABLE jobs (id text PRIMARY KEY, status text, created_at timestamptz)"
        " PARTITION BY LIST (id);"
        "CREATE TABLE some_jobs PARTITION OF jobs DEFAULT PARTITION BY LIST (id);"
        "CREATE TABLE more_jobs PARTITION OF some_jobs DEFAULT",
        "UPDATE ON more_jobs",
    ),
    "a child's": (
        "CREATE TABLE jobs (id text PRIMARY KEY, status text, created_at timestamptz);"
        "CREATE TABLE more_jobs () INHERITS (jobs)",
        "UPDATE ON more_jobs",
    ),
    "that of the part which a run leaves": (
        "CREATE TABLE jobs (id text, status text, created_at timestamptz,"
        " PRIMARY KEY (id, status)) PARTITION BY LIST (status);"
        "CREATE TABLE more_jobs PARTITION OF jobs FOR VALUES IN ('running');"
        "CREATE TABLE jobs_over PARTITION OF jobs DEFAULT",
        "DELETE ON more_jobs",
    ),
    "that of the part which a run comes to": (
        "CREATE TABLE jobs (id text, status text, created_at timestamptz,"
        " PRIMARY KEY (id, status)) PARTITION BY LIST (status);"
        "CREATE TABLE more_jobs PARTITION OF jobs FOR VALUES IN ('running');"
        "CREATE TABLE jobs_over PARTITION OF jobs DEFAULT",
        "INSERT ON jobs_over",
    ),
}


@pytest.mark.parametrize("limit", [None, 10], ids=["slices", "pages"])
@pytest.mark.parametrize("whose", IN_PARTS)
async def test_a_mark_that_a_trigger_below_the_table_takes_back_is_none(
    blank: Database, whose: str, limit: int | None
) -> None:
    """Where no trigger is to be seen on the table itself."""
    ddl, event = IN_PARTS[whose]
    blank.do(ddl)
    target = Target(name="jobs", table="jobs")
    migrate(target)
    blank.do(
        "INSERT INTO more_jobs SELECT n, 'running', now() - interval '2 hours'"
        " FROM unnest('{a,k,z}'::text[]) AS n"
    )
    blank.do(
        "CREATE FUNCTION start_again() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " UPDATE jobs SET status = 'running' WHERE id = 'k' AND status = 'crashed';"
        " RETURN NULL; END $$"
    )
    blank.do(
        "CREATE TRIGGER start_again AFTER " + event + " FOR EACH ROW EXECUTE FUNCTION start_again()"
    )
    report = await run_sweep(SweepRequest(target=target, asked_by="test", limit=limit))
    assert (report.error, report.recovered, report.failed) == (None, 2, 1)
    assert blank.outcomes() == {"a": "marked", "k": "failed", "z": "marked"}
    assert blank.one("SELECT status FROM jobs WHERE id = 'k'") == "running"
    [told] = [verdict["error"] for verdict in blank.verdicts() if verdict["run_id"] == "k"]
    assert "a trigger of the table put 'k' back in flight" in told


@pytest.mark.parametrize("code", ["08001", "P0001"])
@pytest.mark.parametrize("limit", [None, 10], ids=["slices", "pages"])
async def test_what_is_raised_at_the_commit_fails_its_run_alone(
    db: Database, code: LiteralString, limit: int | None
) -> None:
    for run in ("a", "bad", "z"):
        db.add_run(run)
    db.do(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = TG_ARGV[0]; END $$"
    )
    db.do(
        "CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON worker_runs DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW WHEN (NEW.id = 'bad') EXECUTE FUNCTION refuse('" + code + "')"
    )
    report = await sweep(limit)
    assert (report.error, report.recovered, report.failed) == (None, 2, 1)
    assert db.outcomes() == {"a": "marked", "bad": "failed", "z": "marked"}


async def test_many_slices_go_on_behind_what_a_trigger_takes_back(db: Database) -> None:
    orphans = db.add_orphans(3_000)
    add_trigger(db, orphans[1_500], KEEPS_STATUS)
    report = await sweep()
    assert (report.recovered, report.failed) == (2_999, 1)
    assert db.status(orphans[1_500]) == "running"
    assert sum(row["outcome"] == "marked" for row in db.verdicts()) == 2_999


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (RETURNS_OLD, UndoneError),
        (KEEPS_STATUS, UndoneError),
        (LEAVES_IT_OUT, UndecidedError),
    ],
)
async def test_a_callers_mark_that_is_taken_back_is_raised(
    db: Database, session: AsyncSession, body: LiteralString, error: type[Exception]
) -> None:
    db.add_run("kept")
    add_trigger(db, "kept", body)
    [run] = await detect_orphaned_runs(session)
    with pytest.raises(error, match="'kept'"):
        await mark_run_as_crashed(session, run)
    await session.rollback()
    assert db.verdicts() == []


async def test_a_trigger_that_gives_a_crash_another_end_is_let(db: Database) -> None:
    db.add_run("moved")
    add_trigger(db, "moved", "NEW.status := 'failed'; RETURN NEW;")
    assert (await sweep()).recovered == 1
    assert db.status("moved") == "failed"


@pytest.mark.parametrize("code", ["08001", "53400", "57P01"])
@pytest.mark.parametrize("limit", [None, 10], ids=["slices", "pages"])
async def test_what_a_trigger_raises_of_another_server_fails_its_run_alone(
    db: Database, code: str, limit: int | None
) -> None:
    for run in ("a", "bad", "z"):
        db.add_run(run)
    add_trigger(db, "bad", "RAISE EXCEPTION 'no connection' USING ERRCODE = TG_ARGV[0];", code)
    report = await sweep(limit)
    assert (report.error, report.recovered, report.failed) == (None, 2, 1)
    assert db.outcomes() == {"a": "marked", "bad": "failed", "z": "marked"}


@pytest.mark.parametrize("limit", [None, 20], ids=["slices", "pages"])
async def test_a_mark_that_waits_for_a_lock_of_a_trigger_delays_no_other(
    db: Database, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """As by a trigger that counts the runs of each tenant, while somebody holds a tenant's row."""
    for module in (database, lane):
        monkeypatch.setattr(module, "LOCK_TIMEOUT_MS", 300)
    waiting = [db.add_run(f"a-{n}", age="3 hours") for n in range(3)]
    free = [db.add_run(f"b-{n}", worker=f"worker-{n}") for n in range(9)]
    db.do("CREATE TABLE counters (counts text PRIMARY KEY, n int)")
    db.do("INSERT INTO counters VALUES ('crashes', 0)")
    db.do(
        "CREATE FUNCTION count_crash() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN UPDATE counters SET n = n + 1; RETURN NEW; END $$"
    )
    db.do(
        "CREATE TRIGGER count_crash BEFORE UPDATE ON worker_runs FOR EACH ROW"
        " WHEN (OLD.id LIKE 'a-%%') EXECUTE FUNCTION count_crash()"
    )
    with db.connect() as holder:
        holder.execute("UPDATE counters SET n = 100")
        sweeping = asyncio.create_task(sweep(limit))
        marked = "SELECT count(*) FROM worker_runs WHERE id LIKE 'b-%%' AND status = 'crashed'"
        while db.one(marked) < len(free):
            assert not sweeping.done()
            await asyncio.sleep(0.02)
        holder.commit()
    report = await sweeping
    assert (report.error, report.recovered, report.failed) == (None, 12, 0)
    assert db.one("SELECT n FROM counters") == 100 + len(waiting)
