"""One look answers for all who were asked the same before it; and for nobody else."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from orphan_recovery import request as request_module
from orphan_recovery import turn
from orphan_recovery.recover import run_sweep
from orphan_recovery.report import SweepReport
from orphan_recovery.report_pages import as_markdown
from orphan_recovery.request import SweepRequest
from orphan_recovery.target import Target
from support import Database, open_in_the_ledger, until

Connection = psycopg.Connection[dict[str, Any]]
SOON = 10.0
"""Seconds in which whoever waits for nobody is through, on any machine."""


@pytest.fixture
def at_work(db: Database) -> Iterator[Connection]:
    """Another sweep, which is in both lanes."""
    with db.connect() as connection:
        for lane in range(2):
            connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended("
                f"'orphan_recovery lane {lane} of public.worker_runs', 0))"
            )
        yield connection


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, a sweep that is open is at work."""
    monkeypatch.setattr(turn, "MOMENT_SECONDS", 60.0)
    monkeypatch.setattr(turn, "LONGEST_WAIT_SECONDS", 60.0)


async def waits(caplog: pytest.LogCaptureFixture, sweeps: int = 1) -> None:
    def all_wait() -> bool:
        return caplog.messages.count("sweep_waits_for_another") == sweeps

    await asyncio.to_thread(until, all_wait, "each says that it waits")


def looked(db: Database, request: SweepRequest, **differs: Any) -> str:
    """Another sweep that has just looked for the same, and ended; but for what differs."""
    row = {
        "sweep_id": uuid4(),
        "target": "default",
        "table_name": "worker_runs",
        "asked_by": "another",
        "reason": "test",
        "threshold": request.threshold,
        "scope": psycopg.types.json.Jsonb({}),
        "version": "0",
        "question": request.question and f"{request.question} public.worker_runs",
        "in_flight": 9,
        "exempt": 2,
        "undatable": 0,
        "ahead": 0,
        "ended_as": "completed",
        "detected": 4,
        "marked": 3,
        "missed": 1,
        "failed": 0,
        **differs,
    }
    ago = row.pop("ago", timedelta(0))
    db.do(
        f"INSERT INTO orphan_recovery.sweeps ({', '.join(row)}, opened_at, ended_at)"
        f" VALUES ({', '.join(['%s'] * len(row))}, clock_timestamp() - %s, clock_timestamp())",
        *(*row.values(), ago),
    )
    return str(row["sweep_id"])


async def sweep_while(
    db: Database,
    at_work: Connection,
    caplog: pytest.LogCaptureFixture,
    request: SweepRequest | None = None,
    **differs: Any,
) -> tuple[SweepReport, str]:
    """A sweep that comes while another is at work, which then ends, as said."""
    caplog.set_level("INFO", "orphan_recovery")
    request = request or SweepRequest(asked_by="test")
    sweeping = asyncio.ensure_future(run_sweep(request))
    await waits(caplog)
    other = looked(db, request, **differs)
    at_work.rollback()
    return await asyncio.wait_for(sweeping, SOON), other


async def test_of_many_that_wait_one_looks_and_marks(
    db: Database, at_work: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """It looks after all of them were called, so they could not find more than it did."""
    caplog.set_level("INFO", "orphan_recovery")
    db.add_orphans(3)
    sweeping = [
        asyncio.ensure_future(run_sweep(SweepRequest(asked_by=f"worker {n}"))) for n in range(6)
    ]
    await waits(caplog, sweeps=6)
    at_work.rollback()
    reports = await asyncio.wait_for(asyncio.gather(*sweeping), 2 * SOON)
    [one] = [report for report in reports if report.seen_by is None]
    others = [report for report in reports if report is not one]
    assert (one.recovered, set(db.statuses().values())) == (3, {"crashed"})
    assert {report.seen_by for report in others} == {one.request.sweep_id}
    assert all(report.ended_well and report.detected == 0 for report in others)
    told = {row["sweep_id"]: (row["seen_by"], row["ended_as"]) for row in db.sweeps()}
    assert told == {report.request.sweep_id: (report.seen_by, "completed") for report in reports}


async def test_what_another_saw_is_taken_over_and_told(
    db: Database, at_work: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """The run here stands for one that fell silent after the other had looked: it is for the next
    sweep, as it would be had it fallen silent after a look of this one's own."""
    [orphan] = db.add_orphans(1)
    report, other = await sweep_while(db, at_work, caplog)
    assert (report.error, report.detected, db.status(orphan)) == (None, 0, "running")
    told = report.as_dict()
    assert (told["seen_by"], told["in_flight"], told["exempt"]) == (other, 6, 2)
    assert f"6 in flight, 2 exempt by a rule, as sweep {other} left them" in report.headline()
    assert f"- sweep `{other}` looked in its place" in as_markdown(report)
    [event] = [r for r in caplog.records if r.message == "no_orphaned_runs_found"]
    assert event.__dict__["seen_by"] == other
    rows = {str(row["sweep_id"]): row for row in db.sweeps()}
    row = rows[str(report.request.sweep_id)]
    assert (str(row["seen_by"]), row["opened_at"]) == (other, rows[other]["opened_at"])
    assert (row["ended_as"], row["in_flight"], row["detected"], row["marked"]) == (
        *("completed", 6, 0, 0),
    )
    assert (await run_sweep(SweepRequest(asked_by="the next"))).recovered == 1


async def test_who_is_answered_asks_the_ledger_alone(
    db: Database, at_work: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Of fifty workers that start at once each is a guest on the server: it reads neither the runs
    nor what the catalogue has of their table."""
    sent = list[str]()

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        report, other = await sweep_while(db, at_work, caplog)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert str(report.seen_by) == other
    assert any("INSERT INTO orphan_recovery.sweeps" in one for one in sent)
    assert not [one for one in sent if "worker_runs" in one or "pg_attribute" in one]


async def test_who_is_answered_keeps_nobody_waiting_by_a_lane(
    db: Database, engine: AsyncEngine, at_work: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Others may just be asking whether the lanes are free."""
    caplog.set_level("INFO", "orphan_recovery")
    asked = SweepRequest(asked_by="test")

    async def look(_: AsyncConnection, answers: UUID | None) -> tuple[str, int]:
        locks = db.one(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database ="
            " (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        return str(answers), locks

    waiting = asyncio.ensure_future(turn.in_turn(engine, asked, look))
    await waits(caplog)
    other = looked(db, asked)
    at_work.rollback()
    assert await asyncio.wait_for(waiting, SOON) == (other, 0)


@pytest.mark.parametrize("is_open", [False, True], ids=["unknown", "open in the ledger"])
async def test_it_is_taken_over_though_a_third_is_at_work(
    db: Database, at_work: Connection, caplog: pytest.LogCaptureFixture, is_open: bool
) -> None:
    caplog.set_level("INFO", "orphan_recovery")
    asked = SweepRequest(asked_by="test")
    if is_open:
        open_in_the_ledger(db, age=1)
    sweeping = asyncio.ensure_future(run_sweep(asked))
    await waits(caplog)
    other = looked(db, asked)
    report = await asyncio.wait_for(sweeping, SOON)
    assert str(report.seen_by) == other
    assert at_work.info.transaction_status.name == "INTRANS"


@pytest.mark.parametrize(
    "differs",
    [
        pytest.param({"ago": timedelta(minutes=1)}, id="it looked before this one was called"),
        pytest.param({"ago": -timedelta(minutes=1)}, id="the clock was put back since it looked"),
        pytest.param({"question": "another"}, id="it looked for something else"),
        pytest.param({"question": None}, id="it had a limit"),
        pytest.param({"target": "another"}, id="it looked at another target"),
        pytest.param({"ended_as": "failed"}, id="it failed"),
        pytest.param({"ended_as": "held"}, id="it was held"),
        pytest.param({"ended_as": "direct"}, id="it was no sweep"),
        pytest.param({"looked_twice": "a doubt"}, id="it doubted"),
        pytest.param({"undatable": 1}, id="it could not judge a run"),
        pytest.param({"ahead": 1}, id="it saw a worker with a wrong clock"),
    ],
)
async def test_else_a_sweep_looks_itself(
    db: Database, at_work: Connection, caplog: pytest.LogCaptureFixture, differs: dict[str, Any]
) -> None:
    [orphan] = db.add_orphans(1)
    report, _ = await sweep_while(db, at_work, caplog, **differs)
    assert (report.seen_by, report.recovered, db.status(orphan)) == (None, 1, "crashed")


async def test_one_that_only_took_over_what_another_saw_answers_for_nobody(
    db: Database, at_work: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever is told to see there what was marked finds it."""
    db.add_orphans(1)
    looked_itself = looked(db, SweepRequest(asked_by="test"), ago=timedelta(hours=1))
    report, _ = await sweep_while(db, at_work, caplog, seen_by=looked_itself)
    assert (report.seen_by, report.recovered) == (None, 1)


async def test_a_look_at_a_table_of_the_same_name_in_another_schema_answers_nobody(
    db: Database, at_work: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """One file may mean another table on another search_path, beside the same ledger."""
    db.add_orphans(1)
    asked = SweepRequest(asked_by="test")
    elsewhere = f"{asked.question} tenant_2.worker_runs"
    report, _ = await sweep_while(db, at_work, caplog, asked, question=elsewhere)
    assert (report.seen_by, report.recovered) == (None, 1)


async def test_a_sweep_with_a_limit_looks_itself(
    db: Database, at_work: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """The other has left what was beyond its limit."""
    db.add_orphans(1)
    limited = SweepRequest(asked_by="test", limit=1)
    report, _ = await sweep_while(db, at_work, caplog, limited, question=None)
    assert (report.seen_by, report.recovered) == (None, 1)


async def test_a_hold_is_seen_to_by_each(
    db: Database, at_work: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have been opened while this one waited, or be closed by this look."""
    held = looked(db, SweepRequest(asked_by="test"), ago=timedelta(hours=1), ended_as="held")
    db.do(
        "INSERT INTO orphan_recovery.holds (hold_id, target, sweep_id, opened_at, evidence)"
        " VALUES (gen_random_uuid(), 'default', %s, now() - interval '1 hour', '{}')",
        held,
    )
    db.add_run("lives", beat="1 second")
    report, _ = await sweep_while(db, at_work, caplog)
    assert (report.seen_by, report.fleet and report.fleet.in_flight) == (None, 1)
    assert db.one("SELECT ended_as FROM orphan_recovery.holds") == "recovered"


def test_what_is_asked_is_the_same_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = SweepRequest(asked_by="test")
    assert asked.question == SweepRequest(asked_by="another", reason="a deploy").question
    target = Target(name="default", threshold_minutes=asked.minutes + 1)
    others = [
        SweepRequest(asked_by="test", limit=5),
        SweepRequest(asked_by="test", tenant="acme"),
        SweepRequest(asked_by="test", worker="acme"),
        SweepRequest(asked_by="test", worker="acme", returned=timedelta(seconds=5)),
        SweepRequest(asked_by="test", threshold_minutes=asked.minutes + 1),
        SweepRequest(asked_by="test", target=target),
    ]
    assert len({asked.question, *(other.question for other in others)}) == 7
    assert others[0].question is None
    before = asked.question
    monkeypatch.setattr(request_module, "own_version", lambda: "another")
    assert asked.question != before
