"""Marks of task runs that wait at the same time: one transaction, and each its own failure."""

import asyncio

import pytest
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from alive.proxy import Proxy
from alive_support import COMMIT
from orphan_recovery import waiting
from orphan_recovery.database import POOL_SIZE, database_url, make_engine, transaction
from orphan_recovery.detect import detect
from orphan_recovery.mark_together import SharedMarks
from orphan_recovery.policy import is_transient
from orphan_recovery.request import SweepRequest
from orphan_recovery.run import WorkerRun
from orphan_recovery.sweep import begin
from orphan_recovery.verdict import Outcome, Verdict
from orphan_recovery.waiting import HeldError
from support import Database, until


async def shared_marks(engine: AsyncEngine) -> SharedMarks:
    """Of a sweep that has begun and detected its orphans."""
    request = SweepRequest(asked_by="test")
    async with transaction(engine) as connection:
        await begin(connection, request)
        return SharedMarks(engine, request, await detect(connection, request))


async def mark_all(marks: SharedMarks) -> list[Verdict | BaseException]:
    """As the flow's task runs do, all at once."""
    asked = (marks.mark(run) for run in marks.runs.values())
    return await asyncio.gather(*asked, return_exceptions=True)


def transactions(db: Database) -> int:
    """How many of them wrote the verdicts that there are."""
    return int(db.one("SELECT count(DISTINCT xmin::text) FROM orphan_recovery.verdicts"))


async def test_who_waits_at_the_same_time_is_marked_in_one_transaction(
    db: Database, engine: AsyncEngine
) -> None:
    orphans = db.add_orphans(30)
    marks = await shared_marks(engine)
    verdicts = await mark_all(marks)
    assert [v.run.id for v in verdicts if isinstance(v, Verdict)] == list(marks.runs)
    assert {v.outcome for v in verdicts if isinstance(v, Verdict)} == {Outcome.MARKED}
    assert db.statuses() == dict.fromkeys(orphans, "crashed")
    assert transactions(db) == 1


async def test_all_of_a_transaction_go_on_in_one_round_of_the_event_loop(
    db: Database, engine: AsyncEngine
) -> None:
    """Between two rounds Prefect's threads have their turn, and a thousand of those are seconds."""
    db.add_orphans(30)
    marks = await shared_marks(engine)
    rounds, ended_in = 0, list[int]()

    async def count() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    async def one(run: WorkerRun) -> None:
        await marks.mark(run)
        ended_in.append(rounds)

    counting = asyncio.create_task(count())
    await asyncio.gather(*map(one, marks.runs.values()))
    counting.cancel()
    assert len(ended_in) == 30
    assert max(ended_in) - min(ended_in) <= 2


async def test_a_cancelled_mark_keeps_no_other_from_its_own(
    db: Database, engine: AsyncEngine
) -> None:
    """The one that was to mark for others too, while it waits for its turn."""
    orphans = db.add_orphans(7)
    marks = await shared_marks(engine)
    *first, leader, follower, third, fourth = (marks.runs[run] for run in orphans)
    with db.connect() as holder:
        holder.execute("LOCK TABLE worker_runs IN SHARE MODE")
        marking = [asyncio.create_task(marks.mark(run)) for run in first]
        await asyncio.to_thread(db.await_lock_wait)
        led, followed = (asyncio.create_task(marks.mark(run)) for run in (leader, follower))
        await asyncio.sleep(0.05)
        led.cancel()
        await asyncio.wait([led])
        later = [asyncio.create_task(marks.mark(run)) for run in (third, fourth)]
        await asyncio.sleep(0.05)
    assert led.cancelled()
    verdicts = await asyncio.wait_for(asyncio.gather(*marking, followed, *later), 10)
    assert {verdict.outcome for verdict in verdicts} == {Outcome.MARKED}
    assert db.outcomes() == dict.fromkeys(set(orphans) - {leader.id}, "marked")
    assert transactions(db) == 3  # the first, who lost its leader by itself, and the later


async def test_each_is_told_of_its_own_verdict(db: Database, engine: AsyncEngine) -> None:
    orphans = db.add_orphans(4)
    marks = await shared_marks(engine)
    db.do("UPDATE worker_runs SET status = 'completed' WHERE id = %s", orphans[1])
    db.do("UPDATE worker_runs SET heartbeat_at = now() WHERE id = %s", orphans[2])
    given = [v for v in await mark_all(marks) if isinstance(v, Verdict)]
    told = {verdict.run.id: verdict.outcome.value for verdict in given}
    expected = ["marked", "finished_first", "sign_of_life", "marked"]
    assert told == dict(zip(orphans, expected, strict=True)) == db.outcomes()


async def test_what_is_wrong_with_one_run_fails_that_one_only(
    db: Database, engine: AsyncEngine
) -> None:
    orphans = db.add_orphans(12)
    db.poison(orphans[5])
    marks = await shared_marks(engine)
    ends = dict(zip(marks.runs, await mark_all(marks), strict=True))
    error = ends.pop(orphans[5])
    assert isinstance(error, DBAPIError)
    assert f"poisoned row {orphans[5]}" in str(error.orig)
    assert {v.outcome for v in ends.values() if isinstance(v, Verdict)} == {Outcome.MARKED}
    assert len(ends) == 11
    assert db.outcomes() == dict.fromkeys(ends, "marked")


async def test_a_row_that_somebody_holds_is_passed_over_and_waited_for_by_itself(
    db: Database, engine: AsyncEngine
) -> None:
    held, *free = db.add_orphans(8)
    marks = await shared_marks(engine)
    with db.connect() as holder:
        holder.execute("SELECT FROM worker_runs WHERE id = %s FOR UPDATE", [held])
        marking = asyncio.create_task(mark_all(marks))
        await asyncio.to_thread(until, lambda: len(db.verdicts()) == len(free), "other verdicts")
        assert db.outcomes() == dict.fromkeys(free, "marked")
        assert transactions(db) == 1
        await asyncio.to_thread(db.await_lock_wait)
    assert all(isinstance(end, Verdict) for end in await marking)
    assert db.outcomes() == dict.fromkeys([held, *free], "marked")


async def test_rows_that_somebody_holds_delay_no_other(db: Database, engine: AsyncEngine) -> None:
    """Not even where more of them are waited for than there are connections."""
    orphans = db.add_orphans(POOL_SIZE + 12)
    held, free = orphans[: POOL_SIZE + 2], orphans[POOL_SIZE + 2 :]
    marks = await shared_marks(engine)
    with db.connect() as holder:
        holder.execute("SELECT FROM worker_runs WHERE id = ANY (%s) FOR UPDATE", [held])
        waiting = [asyncio.create_task(marks.mark(marks.runs[run])) for run in held]
        await asyncio.to_thread(db.await_lock_wait, POOL_SIZE - 1)
        await asyncio.gather(*(marks.mark(marks.runs[run]) for run in free))
        assert db.outcomes() == dict.fromkeys(free, "marked")
    assert {verdict.outcome for verdict in await asyncio.gather(*waiting)} == {Outcome.MARKED}
    assert db.outcomes() == dict.fromkeys(orphans, "marked")


async def test_for_all_rows_that_stay_locked_no_longer_is_waited_than_the_bound(
    db: Database, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits behind that is told who may hold its row, and what is free is marked."""
    monkeypatch.setattr(waiting, "MOST_SECONDS", 0.0)
    monkeypatch.setattr("orphan_recovery.database.LOCK_TIMEOUT_MS", 50)
    orphans = db.add_orphans(3 * POOL_SIZE)
    held, [alone, *free] = orphans[:-3], orphans[-3:]
    marks = await shared_marks(engine)
    with db.connect() as forgotten:
        forgotten.execute("SELECT FROM worker_runs WHERE id = ANY (%s) FOR UPDATE", [held])
        with pytest.raises(HeldError):
            await marks.mark(marks.runs[held[0]])
        monkeypatch.setattr("orphan_recovery.database.LOCK_TIMEOUT_MS", 60_000)
        others = asyncio.gather(
            *(marks.mark(marks.runs[run]) for run in [*held, *free]), return_exceptions=True
        )
        ends = await asyncio.wait_for(others, 30)
        assert {type(end) for end in ends[: len(held)]} == {HeldError}
        assert all("pg_blocking_pids()" in str(end) for end in ends[: len(held)])
        await marks.mark(marks.runs[alone])
    assert db.outcomes() == dict.fromkeys([alone, *free], "marked")


async def test_a_lock_time_out_before_the_bound_may_be_tried_again(
    db: Database, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orphan_recovery.database.LOCK_TIMEOUT_MS", 50)
    [held] = db.add_orphans(1)
    marks = await shared_marks(engine)
    with db.connect() as holder:
        holder.execute("SELECT FROM worker_runs FOR UPDATE")
        with pytest.raises(DBAPIError) as raised:
            await marks.mark(marks.runs[held])
    assert is_transient(raised.value)
    assert (await marks.mark(marks.runs[held])).outcome is Outcome.MARKED


async def test_a_lost_acknowledgement_is_no_second_mark(db: Database, proxy: Proxy) -> None:
    orphans = db.add_orphans(6)
    engine = make_engine(database_url(proxy.url))
    marks = await shared_marks(engine)
    proxy.lose_reply_to(COMMIT, after=b"orphan_recovery_recorded")
    ends = await mark_all(marks)
    await engine.dispose()
    assert proxy.has_lost_a_reply.is_set()
    assert {v.outcome for v in ends if isinstance(v, Verdict)} == {Outcome.MARKED}
    assert len(ends) == 6
    assert sorted(v["run_id"] for v in db.verdicts()) == orphans
    assert transactions(db) == 1


async def test_a_lost_database_fails_each_by_itself(db: Database, engine: AsyncEngine) -> None:
    db.add_orphans(5)
    marks = await shared_marks(engine)
    lost = make_engine(database_url("postgresql://nobody@127.0.0.1:1/none"))
    ends = await mark_all(SharedMarks(lost, marks.request, list(marks.runs.values())))
    assert [type(end).__name__ for end in ends] == ["OperationalError"] * 5
    assert len({id(end) for end in ends}) == 5
