"""Slices: thousands at a time, and each orphan looked at as carefully as one by itself."""

import asyncio
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import ColumnElement, Text, case, cast, func, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from alive.proxy import Proxy
from alive_support import COMMIT
from orphan_recovery import detect_orphaned_runs, judge, judge_pages, mark_run_as_crashed
from orphan_recovery.database import transaction
from orphan_recovery.hold import Decision
from orphan_recovery.lane import enter
from orphan_recovery.policy import RetryPlan, is_transient
from orphan_recovery.recover import run_sweep
from orphan_recovery.report import SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.runs import RunsTable
from orphan_recovery.slices import Position, Stretch, take_slice
from orphan_recovery.sweep import begin, tell_of
from orphan_recovery.targets import find_target
from orphan_recovery.verdict import Verdict
from support import Database, until
from tables_support import configure
from tables_support import sweep as sweep_of

LANE_0 = (
    "SELECT pg_advisory_xact_lock("
    "hashtextextended('orphan_recovery lane 0 of public.worker_runs', 0))"
)


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From now on slices have this size, and only so many runs of a sweep are shown one by one."""

    def of(size: int, *, show: int = 0, lanes: int = 2) -> None:
        monkeypatch.setattr(judge, "LANES", lanes)
        monkeypatch.setattr(judge, "Progress", partial(judge.Progress, size=size, show=show))
        monkeypatch.setattr(judge, "SHORT", 0.0)  # they do not grow

    return of


async def sweep(**asked: Any) -> SweepReport:
    return await run_sweep(SweepRequest(asked_by="test", **asked))


def told_of(db: Database, run: str) -> dict[str, Any]:
    """What a mark left in the row and in the ledger, but for what differs from mark to mark."""
    [row] = db.do("SELECT * FROM worker_runs WHERE id = %s", run)
    [verdict] = db.do("SELECT * FROM orphan_recovery.verdicts WHERE run_id = %s", run)
    assert verdict["judged_at"] == row["completed_at"]
    assert verdict["silence"] == verdict["judged_at"] - verdict["sign_of_life"]
    assert row["error"].endswith(f", sweep {verdict['sweep_id']}")
    for name in ("sweep_id", "run_id", "judged_at", "silence"):
        del verdict[name]
    for name in ("id", "completed_at"):
        del row[name]
    row["error"] = re.sub(r"silent for \S+,|sweep \S+$", "", row["error"])
    return {**row, **{f"verdict {name}": value for name, value in verdict.items()}}


async def test_a_mark_is_the_same_however_it_was_made(
    db: Database, session: Any, slices: Callable[..., None]
) -> None:
    """In a counted slice, in one whose runs are shown, page by page, and by itself."""
    ago = "SELECT now() - interval '3 hours' AS made, now() - interval '2 hours' AS beat"
    [times] = db.do(ago)

    def add(run: str) -> None:
        db.do(
            "INSERT INTO worker_runs (id, status, worker_id, tenant_id, task, created_at,"
            " started_at, heartbeat_at) VALUES (%s, 'running', 'w', 't', 'report', %s, %s, %s)",
            *(run, times["made"], times["made"], times["beat"]),
        )

    add("by itself")
    [run] = await detect_orphaned_runs(session)
    assert await mark_run_as_crashed(session, run)
    await session.commit()
    add("page")
    assert (await sweep(limit=1)).recovered == 1
    add("shown")
    assert (await sweep()).recovered == 1
    slices(10)
    add("counted")
    assert (await sweep()).recovered == 1
    expected = told_of(db, "by itself")
    assert expected["verdict evidence"] == "run heartbeat"
    for how in ("page", "shown", "counted"):
        assert told_of(db, how) == expected, how


async def test_a_lane_that_fails_keeps_the_other_from_waiting_for_it(
    db: Database, slices: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is the first lane's, which has ended: the second is not to wait for ever."""
    monkeypatch.setattr(RetryPlan, "delay", lambda _self, retry: 0.01 * retry)
    monkeypatch.setattr(judge, "MANY", 20)
    slices(2, show=5)
    orphans = db.add_orphans(20)
    db.do(
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'no space left on device' USING ERRCODE = '53100'; END $$"
    )
    db.do(
        "CREATE TRIGGER full_disk BEFORE UPDATE ON worker_runs FOR EACH ROW"
        " WHEN (OLD.id = 'run-000001') EXECUTE FUNCTION full_disk()"
    )
    report = await asyncio.wait_for(sweep(), 60)
    assert "no space left on device" in (report.error or "")
    assert db.status(orphans[0]) == "running"
    assert db.sweeps()[0]["ended_as"] == "failed"


@pytest.mark.parametrize("lanes", [1, 2, 5])
@pytest.mark.parametrize("show", [0, 5, 1_000])
@pytest.mark.parametrize("size", [1, 2, 100])
async def test_each_orphan_is_marked_once_whatever_the_size(
    db: Database, slices: Callable[..., None], size: int, show: int, lanes: int
) -> None:
    """Also where many were created at the same instant."""
    slices(size, show=show, lanes=lanes)
    orphans = db.add_orphans(8)
    for number in range(9):
        db.add_run(f"alike-{number}")
    db.do("UPDATE worker_runs SET created_at = now() - interval '3 hours' WHERE id LIKE 'alike%'")
    live = [db.add_run(f"live-{n}", age="5 hours", beat="1 minute") for n in range(3)]
    report = await sweep()
    assert (report.detected, report.recovered, report.failed) == (17, 17, 0)
    assert len(report.verdicts) == min(show, 17)
    assert {run for run, s in db.statuses().items() if s == "running"} == set(live)
    assert {*orphans} < set(db.outcomes())
    assert [v["outcome"] for v in db.verdicts()] == ["marked"] * 17
    [told] = db.sweeps()
    assert (told["detected"], told["marked"], told["ended_as"]) == (17, 17, "completed")


@pytest.mark.parametrize("lanes", [1, 2, 5])
async def test_each_orphan_is_marked_once_also_where_all_lanes_begin_together(
    db: Database, slices: Callable[..., None], monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    """And what is shown are the oldest, for nobody but the first lane shows any."""
    monkeypatch.setattr(judge, "MANY", 100)
    slices(2, show=5, lanes=lanes)
    orphans = db.add_orphans(100)
    report = await sweep()
    assert (report.detected, report.recovered, report.failed) == (100, 100, 0)
    assert [v.run.id for v in report.verdicts] == orphans[:5]
    assert db.outcomes() == dict.fromkeys(orphans, "marked")


@pytest.mark.parametrize("count", [39, 40])
async def test_of_many_orphans_the_other_lane_does_not_wait_until_the_first_has_shown_some(
    db: Database, slices: Callable[..., None], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Where there are few it does, else it might leave none to be shown; so it stops half way."""
    monkeypatch.setattr(judge, "MANY", 40)
    told = list[bool]()
    is_spared = vars(judge.Progress)["is_spared"]

    def noted(progress: judge.Progress) -> bool:
        told.append(is_spared.fget(progress))
        return told[-1]

    monkeypatch.setattr(judge.Progress, "is_spared", property(noted))
    slices(2, show=5)
    orphans = db.add_orphans(count)
    with db.connect() as other:
        other.execute(LANE_0)
        sweeping = asyncio.ensure_future(sweep())
        await asyncio.to_thread(db.await_lock_wait)
        if count == 40:
            stopped = "the other lane to have been told to stop, and again"
            await asyncio.to_thread(until, lambda: told[-2:] == [True, True], stopped)
        else:
            await asyncio.sleep(0.5)  # nothing tells of a lane that does not begin
        taken = len(db.verdicts())
        other.rollback()
    report = await sweeping
    assert taken in ({21, 22, 23, 24} if count == 40 else {0})
    assert report.recovered == count
    assert [v.run.id for v in report.verdicts] == orphans[:5]
    assert sorted(v["run_id"] for v in db.verdicts()) == orphans


async def test_slices_become_smaller_towards_the_end(
    db: Database, slices: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that one lane is not through for long before the other is."""
    monkeypatch.setattr(judge, "SHOWN", 1)
    slices(10)
    db.add_orphans(40)
    assert (await sweep()).recovered == 40
    taken = [row["n"] for row in sizes(db)]
    assert max(taken) == 10
    assert taken.count(1) >= 2


def test_what_is_handed_over_is_no_longer_to_come() -> None:
    """A flow's next stretch of slices goes by what is left: it may be too few for two lanes."""
    report = SweepReport(SweepRequest(asked_by="test"))
    progress = judge.Progress(orphans=100)
    for detected, left in ((30, 70), (80, 0)):  # in the end more than the look had counted
        progress.detected = progress.marked = detected
        progress.hand_over_to(report)
        assert (progress.orphans, progress.detected, progress.marked) == (left, 0, 0)
    assert (report.detected, report.recovered) == (110, 110)


async def test_a_run_that_beats_after_the_statement_began_is_left_alone(
    db: Database, slices: Callable[..., None]
) -> None:
    """Each row is judged as it stands under its lock, not as the statement first saw it."""
    slices(10, lanes=1)  # the other might mark it before it beats
    first, second, third = db.add_orphans(3)
    db.do(
        "CREATE FUNCTION wait_here() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NEW; END $$"
    )
    db.do(
        "CREATE TRIGGER wait_here BEFORE UPDATE OF status ON worker_runs FOR EACH ROW"
        " WHEN (OLD.id = 'run-000001' AND NEW.status = 'crashed') EXECUTE FUNCTION wait_here()"
    )
    with db.connect() as gate:
        gate.execute("SELECT pg_advisory_xact_lock(42)")
        sweeping = asyncio.ensure_future(sweep())
        await asyncio.to_thread(db.await_lock_wait)
        db.do("UPDATE worker_runs SET heartbeat_at = now() WHERE id = %s", second)
        gate.commit()
    report = await sweeping
    assert (report.error, report.recovered) == (None, 2)
    assert db.statuses() == {first: "crashed", second: "running", third: "crashed"}
    assert second not in db.outcomes()


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("backwards", [True, False])
async def test_a_stretch_is_taken_from_either_end(
    db: Database, engine: AsyncEngine, backwards: bool, shown: bool
) -> None:
    orphans = db.add_orphans(10)
    request = SweepRequest(asked_by="test")
    take = partial(take_slice, request=request, size=3, among=None, shown=shown)
    async with transaction(engine) as connection:
        await begin(connection, request)
        first = await take(connection, stretch=Stretch(backwards=backwards))
        second = await take(connection, stretch=beyond(first.last, backwards))
        nothing = await take(connection, stretch=Stretch(second.last, second.last, backwards))
    order = orphans[::-1] if backwards else orphans
    assert [one.last and one.last.run_id for one in (first, second)] == [order[2], order[5]]
    assert (first.marked, second.marked, nothing.taken) == (3, 3, 0)
    assert db.outcomes() == dict.fromkeys(order[:6], "marked")


def beyond(last: Position | None, backwards: bool) -> Stretch:
    return Stretch(before=last, backwards=True) if backwards else Stretch(behind=last)


async def test_what_others_hold_is_passed_over_and_comes_up_again(
    db: Database, slices: Callable[..., None]
) -> None:
    """Another sweep's slice, say: it is not waited for row by row."""
    slices(10)
    orphans = db.add_orphans(40)
    with db.connect() as other:
        other.execute("UPDATE worker_runs SET status = 'crashed' WHERE id <= 'run-000020'")
        sweeping = asyncio.ensure_future(sweep())
        marked = "SELECT count(*) >= 20 FROM orphan_recovery.verdicts"
        await asyncio.to_thread(until, lambda: bool(db.one(marked)), "the others to be marked")
        for _ in range(10):
            assert not db.one("SELECT count(*) FROM pg_locks WHERE NOT granted"), "it waits"
            await asyncio.sleep(0.02)
        other.commit()
    report = await sweeping
    assert (report.error, report.recovered, report.failed) == (None, 20, 0)
    assert [run for run, as_ in sorted(db.outcomes().items()) if as_ == "marked"] == orphans[20:]


@pytest.mark.parametrize("show", [0, 100])
@pytest.mark.parametrize("size", [1, 3, 100])
async def test_a_poisoned_row_fails_alone_and_once(
    db: Database, slices: Callable[..., None], size: int, show: int
) -> None:
    slices(size, show=show)
    orphans = db.add_orphans(20)
    bad = {orphans[0], orphans[9], orphans[19]}
    db.poison(*bad)
    report = await sweep()
    assert (report.detected, report.recovered, report.failed) == (20, 17, 3)
    assert {run for run, status in db.statuses().items() if status == "running"} == bad
    assert {v["run_id"] for v in db.verdicts() if v["outcome"] == "failed"} == bad
    assert {v.run.id for v in report.verdicts[:3]} == bad
    assert len(db.verdicts()) == 20


async def test_a_run_that_changed_hands_beside_a_poisoned_row_is_counted_once(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as silent as before, and so an orphan still: the next sweep's."""
    first, bad, *others, moved = db.add_orphans(5)
    db.poison(bad)
    mark_page = judge_pages.mark_page

    async def moved_first(*asked: Any) -> Any:
        db.do("UPDATE worker_runs SET worker_id = 'another' WHERE id = %s", moved)
        return await mark_page(*asked)

    monkeypatch.setattr(judge, "mark_page", moved_first)
    report = await sweep()
    assert (report.detected, report.recovered, report.skipped, report.failed) == (5, 3, 1, 1)
    assert [v.run.id for v in report.verdicts].count(moved) == 1
    assert db.outcomes() == {
        **dict.fromkeys([first, *others], "marked"),
        bad: "failed",
        moved: "changed_hands",
    }
    report = await sweep()
    assert (report.detected, report.recovered, report.failed) == (2, 1, 1)


async def test_times_before_all_times_are_not_forgotten(
    db: Database, slices: Callable[..., None]
) -> None:
    """They have no place in the order of slices, and are marked behind them."""
    slices(2)
    orphans = db.add_orphans(3)
    odd = db.add_run("odd", beat="2 hours")
    db.do("UPDATE worker_runs SET created_at = '-infinity' WHERE id = %s", odd)
    report = await sweep()
    assert report.recovered == 4
    assert db.outcomes() == dict.fromkeys([*orphans, odd], "marked")


async def test_naive_times_and_keys_of_several_columns(
    db: Database,
    slices: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slices(2)
    db.do(
        "CREATE TABLE jobs (tenant int, job uuid DEFAULT gen_random_uuid(), state text,"
        " made timestamp, lane text, PRIMARY KEY (tenant, job))"
    )
    db.do(
        "INSERT INTO jobs SELECT n % 3, gen_random_uuid(), 'busy',"
        " (now() AT TIME ZONE 'UTC') - (n / 4) * interval '1 hour', 'lane ' || n % 2"
        " FROM generate_series(0, 15) n"
    )
    target = configure(
        tmp_path,
        monkeypatch,
        '[targets.jobs]\ntable = "jobs"\nin_flight = ["busy"]\ncrashed = "lost"\n'
        '[targets.jobs.columns]\nid = ["tenant", "job"]\nstatus = "state"\n'
        'created_at = "made"\ntask = "lane"\n'
        '[[targets.jobs.rules]]\nmatch = { task = "lane 1" }\nthreshold_minutes = 150\n'
        'reason = "the slow lane is dead"\n',
        "jobs",
    )
    report = await sweep_of(target)
    # lane 0 by thirty minutes: made an hour ago or more; lane 1 by 150: made three hours ago
    assert (report.error, report.recovered) == (None, 6 + 2)
    told = {(v["rule"], v["reason"], v["threshold"].total_seconds() / 60) for v in db.verdicts()}
    assert told == {
        ("silence >= threshold", "orphaned: no sign of life from its worker", 30),
        ("silence >= threshold of rule 1 (task = lane 1)", "the slow lane is dead", 150),
    }
    assert db.one("SELECT count(*) FROM jobs WHERE state = 'lost'") == 8


async def test_a_sweep_tells_of_its_first_runs_one_by_one_and_counts_the_rest(
    db: Database, slices: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    slices(4, show=5, lanes=1)
    orphans = db.add_orphans(12)
    report = await sweep()
    assert [run["run_id"] for run in report.as_dict()["runs"]] == orphans[:5]
    assert report.recovered == 12
    events = [(r.message, getattr(r, "count", None)) for r in caplog.records]
    assert events == [
        ("orphan_recovery_starting", None),
        ("orphaned_runs_detected", 4),
        *[("orphan_run_marked_crashed", None)] * 4,
        ("orphaned_runs_detected", 1),
        ("orphan_run_marked_crashed", None),
        ("orphan_runs_marked_crashed", 4),
        ("orphan_runs_marked_crashed", 3),
        ("orphan_recovery_complete", None),
    ]
    assert len(db.verdicts()) == 12


async def test_slices_grow_while_they_are_quick_and_shrink_when_they_are_slow(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no row is locked for long, however slow the disk."""
    db.add_orphans(3_000)
    monkeypatch.setattr(judge, "LANES", 1)
    monkeypatch.setattr(judge, "Progress", partial(judge.Progress, size=1_000, show=0))
    monkeypatch.setattr(judge, "LONG", 0.0)
    assert (await sweep()).recovered == 3_000
    slow = [c["n"] for c in sizes(db)]
    assert slow == [500, 500, 500, 500, 1_000]
    monkeypatch.setattr(judge, "LONG", 60.0)
    monkeypatch.setattr(judge, "SHORT", 60.0)
    db.do(
        "INSERT INTO worker_runs (id, status, created_at) SELECT 'more-' || n, 'queued',"
        " now() - interval '1 day' FROM generate_series(1, 7_000) n"
    )
    assert (await sweep()).recovered == 7_000
    assert [c["n"] for c in sizes(db)][-3:] == [1_000, 2_000, 4_000]


def sizes(db: Database) -> list[dict[str, Any]]:
    """How many runs each slice marked, the smallest first."""
    return db.do(
        "SELECT count(*) AS n FROM orphan_recovery.verdicts GROUP BY sweep_id, judged_at ORDER BY n"
    )


async def test_all_sweeps_of_a_table_share_its_lanes(
    db: Database, slices: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty workers that start at once are no heavier for the server than one; and for its lane a
    sweep waits for longer than for a row."""
    monkeypatch.setattr("orphan_recovery.database.LOCK_TIMEOUT_MS", 50)
    monkeypatch.setattr("orphan_recovery.policy.retry_plan", lambda: RetryPlan(0, 0, 0))
    slices(10, lanes=1)
    orphans = db.add_orphans(30)
    with db.connect() as other:
        other.execute(LANE_0)
        sweeping = [asyncio.ensure_future(sweep()) for _ in range(3)]
        longer = (
            "SELECT count(*) = 3 FROM pg_locks"
            " WHERE NOT granted AND clock_timestamp() - waitstart > interval '0.3 seconds'"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        await asyncio.to_thread(until, lambda: bool(db.one(longer)), "three that wait for long")
        assert db.verdicts() == []
        monkeypatch.setattr("orphan_recovery.database.LOCK_TIMEOUT_MS", 5_000)
        other.rollback()
    reports = await asyncio.gather(*sweeping)
    assert [report.error for report in reports] == [None] * 3
    assert sum(report.recovered for report in reports) == 30
    assert sorted(v["run_id"] for v in db.verdicts()) == orphans


async def test_a_sweep_that_froze_in_its_lane_holds_up_no_other(
    db: Database,
    engine: AsyncEngine,
    slices: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server ends its session, and with that its locks."""
    slices(10, lanes=1)
    orphans = db.add_orphans(15)
    monkeypatch.setattr("orphan_recovery.database.IDLE_TIMEOUT_MS", 1_000)

    async def freeze() -> None:
        async with transaction(engine) as connection:
            await enter(connection, find_target(None), 0)
            assert (await sweep()).recovered == 15  # while this transaction does nothing
            await connection.execute(text("SELECT 1"))

    with pytest.raises(DBAPIError) as lost:
        await freeze()
    assert is_transient(lost.value)
    assert db.outcomes() == dict.fromkeys(orphans, "marked")


async def test_what_slices_pass_over_is_waited_for_however_many_they_marked(
    db: Database, engine: AsyncEngine
) -> None:
    """The look saw fewer: a second one is later, and so are the slices."""
    db.add_run("held", age="5 hours")
    report = SweepReport(SweepRequest(asked_by="test"))
    async with transaction(engine) as connection:
        tell_of(await begin(connection, report.request), report)
    more = db.add_orphans(3)
    with db.connect() as other:
        other.execute("SELECT FROM worker_runs WHERE id = 'held' FOR UPDATE")
        failed = list[Verdict]()
        everything = Decision(None, None)
        judging = asyncio.ensure_future(judge.judge_all(engine, report, everything, failed))
        marked = "SELECT count(*) >= 3 FROM orphan_recovery.verdicts"
        await asyncio.to_thread(until, lambda: bool(db.one(marked)), "the others to be marked")
        other.rollback()
    await judging
    assert db.outcomes() == dict.fromkeys([*more, "held"], "marked")
    assert (failed, report.detected, report.recovered) == ([], 4, 4)


async def test_a_row_that_somebody_writes_to_while_a_slice_comes_to_it_is_judged_as_it_is_then(
    db: Database, engine: AsyncEngine
) -> None:
    """What is no sign of life makes it another version of the row, at another place."""
    first, *others = db.add_orphans(5)
    report = SweepReport(SweepRequest(asked_by="test"))
    async with transaction(engine) as connection:
        tell_of(await begin(connection, report.request), report)

    def slowly(table: RunsTable) -> ColumnElement[bool]:
        lasts = case((table.run_id == first, 1.0), else_=0.0)
        return cast(func.pg_sleep(lasts), Text).is_not(None)

    judging = asyncio.ensure_future(
        judge.judge_all(engine, report, Decision(None, slowly), list[Verdict]())
    )
    sleeps = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    await asyncio.to_thread(until, lambda: bool(db.one(sleeps)), "the slice to come to the first")
    db.do("UPDATE worker_runs SET task = 'other' WHERE id = ANY (%s)", others[:2])
    db.do("UPDATE worker_runs SET heartbeat_at = now() WHERE id = %s", others[2])
    db.do("UPDATE worker_runs SET status = 'completed' WHERE id = %s", others[3])
    await judging
    assert db.outcomes() == dict.fromkeys([first, *others[:2]], "marked")
    assert {v["run_id"]: v["task"] for v in db.verdicts()} == {
        first: None,
        **dict.fromkeys(others[:2], "other"),
    }
    assert (db.status(others[2]), db.status(others[3])) == ("running", "completed")
    assert (report.detected, report.recovered) == (3, 3)


@pytest.mark.parametrize("first", ["nothing", "orphans"])
async def test_a_look_whose_acknowledgement_was_lost_is_ended_as_the_ledger_has_it(
    db: Database, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """It is tried again, and may then see something else than what is written down."""

    def then(_plan: RetryPlan, _retry: int) -> float:
        if first == "nothing":
            db.add_orphans(3)
        else:
            db.do("UPDATE worker_runs SET status = 'completed'")
        return 0.01

    monkeypatch.setattr(RetryPlan, "delay", then)
    if first == "orphans":
        db.add_orphans(3)
    proxy.lose_reply_to(COMMIT, after=b"INSERT INTO orphan_recovery.sweeps")
    report = await sweep()
    assert proxy.has_lost_a_reply.is_set()
    assert (report.error, report.detected, report.recovered) == (None, 0, 0)
    assert report.headline().startswith("no orphaned run found")
    [told] = db.sweeps()
    assert (told["ended_as"], told["detected"], told["marked"]) == ("completed", 0, 0)
    if first == "nothing":
        assert (await sweep()).recovered == 3


@pytest.mark.parametrize("show", [0, 100])
async def test_a_slice_whose_acknowledgement_was_lost_is_counted_by_the_ledger(
    db: Database,
    slices: Callable[..., None],
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    show: int,
) -> None:
    """It is tried again, finds nothing of what it has marked, and marks the rest."""
    monkeypatch.setattr(RetryPlan, "delay", lambda _self, retry: 0.01 * retry)
    slices(5, show=show, lanes=1)
    orphans = db.add_orphans(12)
    proxy.lose_reply_to(COMMIT, after=b"orphan_recovery_taken")
    report = await sweep()
    assert proxy.has_lost_a_reply.is_set()
    assert (report.error, report.detected, report.recovered) == (None, 12, 12)
    assert db.outcomes() == dict.fromkeys(orphans, "marked")
    [told] = db.sweeps()
    assert (told["detected"], told["marked"], told["ended_as"]) == (12, 12, "completed")
