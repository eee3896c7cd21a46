"""The flow's retries: what is transient is tried again, by the policy's plan, and nothing else."""

import asyncio
import logging
from typing import Any

import psycopg
import pytest
from prefect.client.schemas.objects import State
from psycopg import sql
from sqlalchemy import make_url

from orphan_recovery import waiting
from orphan_recovery.flow import TASKS_AT_ONCE
from orphan_recovery.policy import retry_plan
from orphan_recovery.waiting import HeldError
from prefect_support import Api, flow_run_of, marks, sweep
from support import Database, until


@pytest.fixture
def api(prefect: str) -> Api:
    return Api(prefect)


async def test_a_mark_whose_connection_was_cut_is_tried_again_and_marks_once(
    db: Database, api: Api
) -> None:
    [orphan] = db.add_orphans(1)
    with db.connect() as holder:
        holder.execute("SELECT FROM worker_runs FOR UPDATE")
        sweeping = asyncio.create_task(sweep(api))
        await asyncio.to_thread(await_waiting, db, 1)
        assert cut_connections(db) == 1
    state = await sweeping
    assert state.is_completed()
    by_run = marks(api.task_runs(flow_run_of(state)))
    assert by_run[orphan]["state_type"] == "COMPLETED"
    assert by_run[orphan]["run_count"] >= 2
    assert db.status(orphan) == "crashed"
    assert [(v["run_id"], v["outcome"]) for v in db.verdicts()] == [(orphan, "marked")]


async def test_a_missing_column_is_not_tried_again(db: Database, api: Api) -> None:
    [orphan] = db.add_orphans(1)
    db.do(
        "CREATE FUNCTION stale() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN PERFORM no_such_column FROM worker_runs; RETURN NEW; END $$"
    )
    db.do("CREATE TRIGGER stale BEFORE UPDATE ON worker_runs FOR EACH ROW EXECUTE FUNCTION stale()")
    state = await sweep(api)
    assert state.is_failed()
    by_run = marks(api.task_runs(flow_run_of(state)))
    assert by_run[orphan]["state_type"] == "FAILED"
    assert by_run[orphan]["run_count"] == 1
    [verdict] = db.verdicts()
    assert "SQLSTATE 42703" in verdict["error"]


async def test_a_row_that_stays_locked_is_not_tried_again_for_longer_than_a_sweep_waits(
    db: Database, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "MOST_SECONDS", 0.0)
    monkeypatch.setattr("orphan_recovery.database.LOCK_TIMEOUT_MS", 50)
    held, free = db.add_orphans(2)
    with db.connect() as forgotten:
        forgotten.execute("SELECT FROM worker_runs WHERE id = %s FOR UPDATE", [held])
        state = await sweep(api)
    assert state.is_failed()
    by_run = marks(api.task_runs(flow_run_of(state)))
    assert (by_run[held]["state_type"], by_run[held]["run_count"]) == ("FAILED", 1)
    assert db.outcomes() == {held: "failed", free: "marked"}
    [error] = [v["error"] for v in db.verdicts() if v["run_id"] == held]
    assert f"somebody holds the row of run '{held}'" in error


def test_a_lock_that_is_held_is_told_in_a_line_even_where_retries_are_exhausted() -> None:
    """Then Prefect logs the error with its traceback."""
    logger, held = logging.getLogger("prefect.task_runs"), HeldError("somebody holds it")
    about = (HeldError, held, None)
    record = logger.makeRecord("task", logging.ERROR, __file__, 1, "exhausted", (), about)
    assert logger.filter(record)
    assert record.exc_info is None


async def test_every_task_is_retried_by_the_plan_of_the_policy(db: Database, api: Api) -> None:
    db.add_orphans(1)
    state = await sweep(api)
    plan = retry_plan()
    assert plan.retries > 0
    task_runs = api.task_runs(flow_run_of(state))
    assert set(task_runs) >= {"open-sweep", "detect", "summarise"}
    for run in task_runs.values():
        policy = run["empirical_policy"]
        assert policy["retries"] == plan.retries
        assert policy["retry_delay"] == [plan.delay(n + 1) for n in range(plan.retries)]
        assert policy["retry_jitter_factor"] == plan.jitter
    # The flow as a whole is not retried: the next sweep is its retry.
    assert api.flow_run(flow_run_of(state))["empirical_policy"]["retries"] == 0


async def test_a_lost_database_ends_the_sweep_loudly_and_the_next_one_goes_on(
    db: Database, api: Api, server: str
) -> None:
    orphans = db.add_orphans(80)
    with db.connect() as holder:
        holder.execute("SELECT FROM worker_runs FOR UPDATE")
        sweeping = asyncio.create_task(sweep(api))
        await asyncio.to_thread(await_waiting, db, 7)
        allow_connections(server, db, False)
        cut_connections(db)
        state = await sweeping
    allow_connections(server, db, True)
    assert state.is_failed()
    told = await asyncio.to_thread(log_of, api, state)
    assert [line for line in told if "Retry 1/4" in line]
    assert [line for line in told if "\n" in line or "Traceback" in line] == []
    assert "80 FAILED" in (state.message or "")
    assert "not currently accepting connections" in (state.message or "")
    tried = marks(api.task_runs(flow_run_of(state)))
    assert len(tried) == TASKS_AT_ONCE  # the rest is not tried against a database that is gone
    assert {run["run_count"] for run in tried.values()} == {1 + retry_plan().retries}
    assert set(db.statuses().values()) == {"running"}
    assert (await sweep(api)).is_completed()
    assert db.statuses() == dict.fromkeys(orphans, "crashed")


async def test_a_ledger_that_is_not_there_is_told_by_what_to_do_about_it(
    db: Database, api: Api
) -> None:
    """And not by the database's words for it, which are behind that."""
    db.add_orphans(1)
    db.do("ALTER SCHEMA orphan_recovery RENAME TO put_away")
    state = await sweep(api)
    assert state.is_failed()
    told = [state.message or "", *log_of(api, state)]
    told += [one["data"] for one in api.artifacts(flow_run_of(state)).values()]
    assert "orphan-recovery migrate" in told[0]
    assert [line for line in told if "UndefinedTable" in line or "Traceback" in line] == []


async def test_a_value_that_a_person_must_set_right_is_told_in_a_line(
    db: Database, api: Api
) -> None:
    state = await sweep(api, target="nobody's")
    assert "ConfigurationError" in (state.message or "")
    assert [line for line in log_of(api, state) if "\n" in line] == []


def log_of(api: Api, state: State[Any]) -> list[str]:
    """What a flow run and its task runs have logged, once all of it has arrived."""
    mine = {"flow_run_id": {"any_": [str(flow_run_of(state))]}}

    def told() -> list[str]:
        pages = [api.find("logs", logs=mine, limit=200, offset=n) for n in range(0, 1_000, 200)]
        return [log["message"] for page in pages for log in page]

    until(lambda: any(f"Failed({state.message!r})" in line for line in told()), "its log")
    return told()


_OURS_WAIT = (
    "datname = current_database() AND application_name = 'orphan-recovery'"
    " AND wait_event_type = 'Lock'"
)


def await_waiting(db: Database, count: int) -> None:
    """Return once so many connections of the sweep wait for a lock."""
    until(
        lambda: db.one(f"SELECT count(*) FROM pg_stat_activity WHERE {_OURS_WAIT}") == count,
        f"{count} connections of the sweep that wait for a lock",
    )


def allow_connections(server: str, db: Database, allowed: bool) -> None:
    """Whether the server lets anyone in to this database from now on."""
    url = make_url(server).set(drivername="postgresql").render_as_string(hide_password=False)
    name = sql.Identifier(make_url(db.url).database or "")
    statement = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format(name, allowed)
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(statement)


def cut_connections(db: Database) -> int:
    """Cut the sweep's connections that wait for a lock; how many there were."""
    found = db.one(
        f"SELECT count(*) FROM (SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        f" WHERE {_OURS_WAIT} OFFSET 0) AS cut"
    )
    return int(found)
