"""The start-up path: it recovers all it can, loses nothing to one bad row, and never raises."""

import asyncio
import itertools
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery import (
    ConfigurationError,
    attempt,
    judge,
    judge_pages,
    recover,
    recover_orphaned_runs,
    recover_target,
    waiting,
)
from orphan_recovery.database import POOL_SIZE, transaction
from orphan_recovery.policy import RetryPlan, RetryPolicy, retry_plan
from orphan_recovery.record import close_sweep
from orphan_recovery.request import SweepRequest
from support import Database, free_port

KEYS = {"enabled", "detected", "recovered", "skipped", "failed", "runs", "error"}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same retries, without the waiting between them."""
    monkeypatch.setattr(RetryPlan, "delay", lambda _self, retry: 0.01 * retry)


def counts(report: dict[str, Any]) -> tuple[int, ...]:
    """Detected, recovered, skipped, failed."""
    return tuple(report[name] for name in ("detected", "recovered", "skipped", "failed"))


async def test_every_orphan_is_marked_and_nothing_else(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (judge, judge_pages):
        monkeypatch.setattr(module, "PAGE", 4)
    orphans = db.add_orphans(11)
    db.add_run("alive", age="5 hours", beat="1 minute")
    report = await recover_orphaned_runs()
    assert set(report) >= KEYS
    assert (report["enabled"], report["error"]) == (True, None)
    assert counts(report) == (11, 11, 0, 0)
    assert [run["run_id"] for run in report["runs"]] == orphans
    assert db.statuses() == {**dict.fromkeys(orphans, "crashed"), "alive": "running"}
    [sweep] = db.sweeps()
    assert (sweep["ended_as"], sweep["detected"], sweep["marked"]) == ("completed", 11, 11)
    assert (sweep["in_flight"], sweep["missed"], sweep["failed"]) == (12, 0, 0)


async def test_a_second_recovery_finds_nothing_and_says_so(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    db.add_orphans(3)
    await recover_orphaned_runs()
    caplog.set_level(logging.INFO)
    report = await recover_orphaned_runs()
    assert counts(report) == (0, 0, 0, 0)
    assert report["message"].startswith("no orphaned run found")
    assert "no_orphaned_runs_found" in caplog.messages
    assert len(db.verdicts()) == 3


async def test_many_workers_that_start_at_once_mark_each_orphan_once(db: Database) -> None:
    orphans = db.add_orphans(60)
    reports = await asyncio.gather(*(recover_orphaned_runs() for _ in range(4)))
    assert [report["error"] for report in reports] == [None] * 4
    assert sum(report["failed"] for report in reports) == 0
    assert sum(report["recovered"] for report in reports) == 60
    marked = [v["run_id"] for v in db.verdicts() if v["outcome"] == "marked"]
    assert sorted(marked) == sorted(orphans)


@pytest.mark.parametrize("page", [500, 3, 1])
async def test_poisoned_rows_fail_alone(
    db: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, page: int
) -> None:
    for module in (judge, judge_pages):
        monkeypatch.setattr(module, "PAGE", page)
    orphans = db.add_orphans(20)
    bad = {orphans[0], orphans[9], orphans[19]}
    db.poison(*bad)
    report = await recover_orphaned_runs()
    assert counts(report) == (20, 17, 0, 3)
    assert {run for run, status in db.statuses().items() if status == "running"} == bad
    assert [run["run_id"] for run in report["runs"][:3]] == sorted(bad), "failures come first"
    assert "poisoned row" in report["runs"][0]["error"]
    failed = {v["run_id"]: v["error"] for v in db.verdicts() if v["outcome"] == "failed"}
    assert set(failed) == bad
    assert all("poisoned row" in error for error in failed.values())
    [sweep] = db.sweeps()
    assert (sweep["ended_as"], sweep["marked"], sweep["failed"]) == ("failed", 17, 3)
    assert caplog.messages.count("failed_to_mark_orphan_crashed") == 3


async def test_a_row_that_is_held_is_waited_for_and_delays_no_other(db: Database) -> None:
    orphans = db.add_orphans(5)
    with db.connect() as worker:
        worker.execute("SELECT 1 FROM worker_runs WHERE id = %s FOR UPDATE", [orphans[0]])
        recovery = asyncio.ensure_future(recover_orphaned_runs())
        await asyncio.to_thread(db.await_lock_wait)
        assert sorted(db.outcomes()) == orphans[1:], "the others are marked already"
        worker.execute("UPDATE worker_runs SET status = 'completed' WHERE id = %s", [orphans[0]])
        worker.commit()
    assert counts(await recovery) == (5, 4, 1, 0)
    assert db.outcomes()[orphans[0]] == "finished_first"


async def test_a_row_that_is_held_too_long_fails_alone_and_is_an_orphan_still(
    db: Database, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    monkeypatch.setattr("orphan_recovery.database.LOCK_TIMEOUT_MS", 50)
    orphans = db.add_orphans(5)
    with db.connect() as worker:
        worker.execute("SELECT 1 FROM worker_runs WHERE id = %s FOR UPDATE", [orphans[2]])
        report = await recover_orphaned_runs()
    assert counts(report) == (5, 4, 0, 1)
    assert "lock timeout" in report["runs"][0]["error"]
    assert counts(await recover_orphaned_runs()) == (1, 1, 0, 0)


async def test_many_rows_that_stay_locked_cost_a_sweep_no_more_than_its_bound(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock is tried for a minute here: who waited for one would be seen by that."""
    monkeypatch.setattr(waiting, "MOST_SECONDS", 0.0)
    monkeypatch.setattr("orphan_recovery.database.LOCK_TIMEOUT_MS", 60_000)
    monkeypatch.setattr(waiting, "HASTY_LOCK_TIMEOUT_MS", 60_000)
    orphans = db.add_orphans(3 * POOL_SIZE)
    held, free = orphans[:-2], orphans[-2:]
    with db.connect() as forgotten:
        forgotten.execute("SELECT FROM worker_runs WHERE id = ANY (%s) FOR UPDATE", [held])
        report = await asyncio.wait_for(recover_orphaned_runs(), 30)
    assert counts(report) == (len(orphans), len(free), 0, len(held))
    assert db.outcomes() == {**dict.fromkeys(held, "failed"), **dict.fromkeys(free, "marked")}
    errors = {v["run_id"]: v["error"] for v in db.verdicts() if v["outcome"] == "failed"}
    for run, error in errors.items():
        assert f"somebody holds the row of run '{run}', or a lock that its mark needs" in error
        assert "for all such locks; the next one tries again" in error
        assert "pg_blocking_pids()" in error
    assert counts(await recover_orphaned_runs()) == (len(held), len(held), 0, 0)


async def test_rows_that_stay_locked_are_not_looked_at_anew_for_longer_than_that(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = list[float]()
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(waiting, "MOST_SECONDS", 0.0)
    db.add_orphans(POOL_SIZE + 1)
    with db.connect() as forgotten:
        forgotten.execute("SELECT FROM worker_runs FOR UPDATE")
        monkeypatch.setattr("orphan_recovery.judge_pages.asyncio.sleep", noted)
        assert (await recover_orphaned_runs())["failed"] == POOL_SIZE + 1
    assert not any(pauses)


async def test_what_is_let_go_of_is_marked_even_where_the_sweep_waits_no_longer(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And behind more that are held than a page has."""
    monkeypatch.setattr(waiting, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(judge_pages, "PAGE", 5)
    orphans = db.add_orphans(3 * POOL_SIZE)
    held, free = orphans[:-2], orphans[-2:]
    with db.connect() as forgotten, db.connect() as worker:
        forgotten.execute("SELECT FROM worker_runs WHERE id = ANY (%s) FOR UPDATE", [held])
        worker.execute("SELECT FROM worker_runs WHERE id = ANY (%s) FOR UPDATE", [free])
        begin = waiting.Waiting.begin

        def let_go(self: waiting.Waiting) -> None:
            worker.rollback()
            begin(self)

        monkeypatch.setattr(waiting.Waiting, "begin", let_go)
        report = await recover_orphaned_runs()
    assert counts(report) == (len(orphans), len(free), 0, len(held))
    assert db.outcomes() == {**dict.fromkeys(held, "failed"), **dict.fromkeys(free, "marked")}


async def test_no_row_is_tried_again_once_the_sweep_has_waited_long_enough(
    db: Database, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    """Its five tries take longer than that here."""
    monkeypatch.setattr("orphan_recovery.database.LOCK_TIMEOUT_MS", 100)
    monkeypatch.setattr(waiting, "MOST_SECONDS", 0.25)
    [orphan] = db.add_orphans(1)
    with db.connect() as forgotten:
        forgotten.execute("SELECT FROM worker_runs FOR UPDATE")
        report = await recover_orphaned_runs()
    assert counts(report) == (1, 0, 0, 1)
    assert f"somebody holds the row of run '{orphan}'" in report["runs"][0]["error"]


async def test_a_stricter_default_isolation_costs_no_retry(
    db: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under SERIALIZABLE a mark that waited for its row could only fail and be tried again."""
    no_retries = RetryPlan(retries=0, backoff_factor=0, jitter=0)
    monkeypatch.setattr("orphan_recovery.policy.retry_plan", lambda: no_retries)
    db.do(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation"
        " = serializable', current_database()); END $$"
    )
    [orphan] = db.add_orphans(1)
    with db.connect() as worker:
        worker.execute("UPDATE worker_runs SET heartbeat_at = now() WHERE id = %s", [orphan])
        recovery = asyncio.ensure_future(recover_orphaned_runs())
        await asyncio.to_thread(db.await_lock_wait)
        worker.commit()
    assert counts(await recovery) == (1, 0, 1, 0)
    assert db.outcomes() == {orphan: "sign_of_life"}
    assert "failed_to_mark_orphan_crashed" not in caplog.messages


async def test_a_connection_that_is_terminated_in_mid_mark_is_retried(
    db: Database, impatient: None
) -> None:
    [orphan] = db.add_orphans(1)
    with db.connect() as worker:
        worker.execute("SELECT 1 FROM worker_runs WHERE id = %s FOR UPDATE", [orphan])
        recovery = asyncio.ensure_future(recover_orphaned_runs())
        await asyncio.to_thread(db.await_lock_wait)
        assert db.one(
            "SELECT bool_and(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'orphan-recovery'"
        )
    report = await recovery
    assert (report["error"], counts(report)) == (None, (1, 1, 0, 0))
    assert db.outcomes() == {orphan: "marked"}


async def test_a_sweep_killed_in_mid_mark_loses_nothing_and_marks_nothing_twice(
    db: Database,
) -> None:
    orphans = db.add_orphans(5)
    with db.connect() as worker:
        worker.execute("SELECT 1 FROM worker_runs WHERE id = %s FOR UPDATE", [orphans[0]])
        code = (
            "import asyncio, orphan_recovery; asyncio.run(orphan_recovery.recover_orphaned_runs())"
        )
        sweep = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
        await asyncio.to_thread(db.await_lock_wait)
        sweep.kill()
        assert await sweep.wait() == -signal.SIGKILL
    assert db.status(orphans[0]) == "running"
    report = await recover_orphaned_runs()
    assert (report["error"], counts(report)) == (None, (1, 1, 0, 0))
    assert [verdict["outcome"] for verdict in db.verdicts()] == ["marked"] * 5
    assert sorted(db.outcomes()) == orphans
    assert [sweep["ended_as"] for sweep in db.sweeps()] == [None, "completed"]


async def test_a_permanent_error_is_not_retried(db: Database) -> None:
    db.add_orphans(1)
    db.do(
        "CREATE SEQUENCE tries;"
        "CREATE FUNCTION count_tries() RETURNS trigger LANGUAGE plpgsql AS $$"
        " DECLARE nothing int; BEGIN PERFORM nextval('tries');"
        " SELECT no_such_column INTO nothing FROM worker_runs; RETURN NEW; END $$;"
        "CREATE TRIGGER count_tries BEFORE UPDATE ON worker_runs"
        " FOR EACH ROW EXECUTE FUNCTION count_tries()"
    )
    report = await recover_orphaned_runs()
    assert counts(report) == (1, 0, 0, 1)
    assert "no_such_column" in report["runs"][0]["error"]
    assert "42703" in report["runs"][0]["error"]
    assert db.one("SELECT last_value FROM tries") == 2, "once in its slice, and once by itself"


async def test_an_outage_ends_the_sweep_with_an_error_and_the_next_one_goes_on(
    db: Database, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    monkeypatch.setattr(judge, "Progress", partial(judge.Progress, size=2))
    orphans = db.add_orphans(4)
    # From the third row on, whoever marks is cut off at once, each time anew.
    db.do(
        "CREATE FUNCTION cut_off() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$"
    )
    db.do(
        "CREATE TRIGGER cut_off BEFORE UPDATE ON worker_runs"
        " FOR EACH ROW WHEN (OLD.id >= 'run-000003') EXECUTE FUNCTION cut_off()"
    )
    report = await recover_orphaned_runs()
    assert "terminating connection" in report["error"]
    assert report["message"].startswith("stopped before its end")
    assert report["recovered"] == 2
    assert db.outcomes() == dict.fromkeys(orphans[:2], "marked")
    [sweep] = db.sweeps()
    assert sweep["ended_as"] == "failed"
    assert "terminating connection" in sweep["error"]
    db.do("DROP TRIGGER cut_off ON worker_runs")
    assert counts(await recover_orphaned_runs()) == (2, 2, 0, 0)


async def test_no_database_gives_an_error_and_raises_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, impatient: None
) -> None:
    url = f"postgresql://someone:S3cret!@127.0.0.1:{free_port()}/nowhere"
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", url)
    report = await recover_orphaned_runs()
    assert "connection" in report["error"].lower()
    assert counts(report) == (0, 0, 0, 0)
    assert "orphan_recovery_failed" in caplog.messages
    assert "S3cret" not in repr(report) + caplog.text + repr([vars(r) for r in caplog.records])


async def test_no_address_and_no_table_give_an_error_that_names_the_way_out(
    blank: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "orphan-recovery migrate" in (await recover_orphaned_runs())["error"]
    monkeypatch.delenv("ORPHAN_RECOVERY_DATABASE_URL")
    monkeypatch.delenv("DATABASE_URL", raising=False)
    assert "ORPHAN_RECOVERY_DATABASE_URL" in (await recover_orphaned_runs())["error"]


async def test_switched_off_it_touches_nothing_and_says_so(
    db: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    db.add_run("run")
    monkeypatch.setenv("ORPHAN_RECOVERY_ENABLED", "false")
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", "postgresql://127.0.0.1:1/unreachable")
    report = await recover_orphaned_runs()
    assert (report["enabled"], report["error"], report["detected"]) == (False, None, 0)
    assert "switched off" in report["message"]
    assert "orphan_recovery_disabled" in caplog.messages
    assert (db.status("run"), db.sweeps()) == ("running", [])


@pytest.mark.parametrize("threshold", [0, -5, "abc"])
async def test_a_bad_threshold_is_refused_by_name(db: Database, threshold: Any) -> None:
    db.add_run("run", age="1 second")
    with pytest.raises(ConfigurationError, match="threshold_minutes is"):
        await recover_orphaned_runs(threshold)
    assert db.sweeps() == []


async def test_a_dry_run_writes_nothing_at_all(db: Database) -> None:
    orphans = db.add_orphans(3)
    db.do("DROP SCHEMA orphan_recovery CASCADE")  # not even a ledger is needed
    request = SweepRequest(threshold_minutes=30, asked_by="test", dry_run=True)
    report = await recover.run_sweep(request)
    assert report.ended_well
    assert [run["run_id"] for run in report.as_dict()["runs"]] == orphans
    assert "dry run: 3 orphaned runs would be judged" in report.headline()
    assert set(db.statuses().values()) == {"running"}


async def test_a_limit_bounds_the_sweep(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (judge, judge_pages):
        monkeypatch.setattr(module, "PAGE", 2)
    orphans = db.add_orphans(7)
    request = SweepRequest(threshold_minutes=30, asked_by="test", limit=5)
    report = await recover.run_sweep(request)
    assert (report.detected, report.recovered) == (5, 5)
    assert sorted(db.outcomes()) == orphans[:5], "longest silence first"


async def test_runs_that_cannot_be_judged_are_told_loudly(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    db.add_run("ahead", worker="fast-clock", beat="-2 hours")
    report = await recover_orphaned_runs()
    assert report["ahead"] == 1
    assert "fast-clock" in report["message"]
    assert "runs_ahead_of_database_clock" in caplog.messages


async def test_a_sweep_that_was_killed_is_closed_by_a_later_one(db: Database) -> None:
    """But not one that began lately, nor one that still gives verdicts."""
    db.add_run("run")
    opened_ago = {"1" * 32: "3 hours", "2" * 32: "2 hours", "3" * 32: "10 minutes"}
    for sweep_id, opened in opened_ago.items():
        db.do(
            "INSERT INTO orphan_recovery.sweeps (sweep_id, target, table_name, asked_by, reason,"
            " threshold, scope, version, opened_at) VALUES (%s, 'default', 'worker_runs', 'test',"
            " 'test', '30 minutes', '{}', '0', now() - %s::interval)",
            *(sweep_id, opened),
        )
    db.do(
        "INSERT INTO orphan_recovery.verdicts (sweep_id, run_id, target, outcome, status_seen,"
        " sign_of_life, evidence, silence, threshold, rule, reason, judged_at) VALUES (%s, 'x',"
        " 'default', 'marked', 'running', now(), 'age', '1 h', '1 h', 'r', 'r', now())",
        "2" * 32,
    )
    await recover_orphaned_runs()
    assert [sweep["ended_as"] for sweep in db.sweeps()] == ["died", None, None, "completed"]


async def test_a_sweep_that_is_closed_again_stays_as_it_was(
    db: Database, engine: AsyncEngine
) -> None:
    """The acknowledgement of its end was lost, and the end is tried again."""
    db.add_orphans(2)
    request = SweepRequest(asked_by="test")
    await recover.run_sweep(request)
    [before] = db.sweeps()
    async with transaction(engine) as connection:
        closed = await close_sweep(connection, request, detected=9, error="too late")
    assert (closed.marked, closed.detected) == (2, 2)
    assert db.sweeps() == [before]


async def test_the_events_of_a_recovery_carry_their_fields(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    [orphan] = db.add_orphans(1)
    report = await recover_orphaned_runs()
    assert caplog.messages == [
        "orphan_recovery_starting",
        "orphaned_runs_detected",
        "orphan_run_marked_crashed",
        "orphan_recovery_complete",
    ]
    fields = [vars(record) for record in caplog.records]
    assert {(each["target"], each["sweep_id"]) for each in fields} == {
        ("default", report["sweep_id"])
    }
    assert fields[1]["run_ids"] == [orphan]
    assert fields[2]["run_id"] == orphan
    assert fields[3]["recovered"] == 1


async def test_an_orphan_whose_row_is_held_is_among_those_detected(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    orphans = db.add_orphans(3)
    with db.connect() as holder:
        holder.execute("SELECT FROM worker_runs WHERE id = %s FOR UPDATE", [orphans[1]])
        recovering = asyncio.create_task(recover_orphaned_runs())
        while not db.one(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ):
            assert not recovering.done()
            await asyncio.sleep(0.02)
    assert counts(await recovering) == (3, 3, 0, 0)
    named = [vars(r)["run_ids"] for r in caplog.records if r.message == "orphaned_runs_detected"]
    assert sorted(itertools.chain.from_iterable(named)) == sorted(orphans)


async def test_a_dry_run_names_the_first_orphans_that_it_detects(
    db: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(judge_pages, "SHOWN", 3)
    monkeypatch.setattr(judge_pages, "PAGE", 2)
    orphans = db.add_orphans(7)
    report = await recover.run_sweep(SweepRequest(asked_by="test", dry_run=True))
    assert report.detected == 7
    named = [vars(r)["run_ids"] for r in caplog.records if r.message == "orphaned_runs_detected"]
    assert named == [orphans[:2], orphans[2:3]]


async def test_a_sweep_that_begins_and_cannot_go_on_logs_its_end(
    blank: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ConfigurationError):
        await recover.run_sweep(SweepRequest(asked_by="test"))
    report = await recover_orphaned_runs()
    assert caplog.messages == ["orphan_recovery_starting", "orphan_recovery_failed"] * 2
    assert vars(caplog.records[3])["error"] == report["error"]


@pytest.mark.parametrize("called", [recover_orphaned_runs, partial(recover_target, "default")])
async def test_the_ledger_says_which_function_was_called(
    db: Database, called: Callable[[], Awaitable[dict[str, Any]]]
) -> None:
    await called()
    [sweep] = db.sweeps()
    assert sweep["asked_by"].startswith(f"{getattr(called, 'func', called).__name__} on ")


async def test_the_retries_of_the_start_up_path_are_those_of_the_policy(
    engine: AsyncEngine, impatient: None
) -> None:
    plan, tries = retry_plan(), 0

    async def never_reached(_: object) -> None:
        nonlocal tries
        tries += 1
        raise ConnectionError("refused")

    with pytest.raises(ConnectionError):
        await attempt.in_transaction(engine, never_reached)
    assert tries == 1 + plan.retries == 5
    assert retry_plan(RetryPolicy.NEVER).retries == 0
