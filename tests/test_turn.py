"""A sweep begins when no other of its table is at work; for that it waits a while, no more."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from orphan_recovery import database, turn
from orphan_recovery.database import database_url, transaction
from orphan_recovery.lane import enter as enter_lane
from orphan_recovery.policy import RetryPlan
from orphan_recovery.recover import run_sweep
from orphan_recovery.report import SweepReport
from orphan_recovery.request import SweepRequest
from orphan_recovery.sweep import begin
from orphan_recovery.target import Target
from support import Database, database_of_its_own, ended_in_the_ledger, open_in_the_ledger, until

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


def questions(
    monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...] = ("_ask", "_free")
) -> list[float]:
    """When each question of those kinds was asked."""
    asked = list[float]()

    def noted(ask: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def note(*args: Any, **options: Any) -> Any:
            asked.append(time.monotonic())
            return await ask(*args, **options)

        return note

    for kind in kinds:
        monkeypatch.setattr(turn, kind, noted(getattr(turn, kind)))
    return asked


async def keeps_asking(
    sweeping: asyncio.Future[SweepReport], asked: list[float], times: int = 3
) -> None:
    """Return once it has asked so often again: the last but one of them has been answered."""
    enough = len(asked) + times
    await asyncio.to_thread(
        until, lambda: sweeping.done() or len(asked) >= enough, f"{times} questions more"
    )
    assert not sweeping.done(), "it waits for nobody"


async def told(caplog: pytest.LogCaptureFixture, event: str) -> None:
    """Return once the log has that event."""
    await asyncio.to_thread(until, lambda: event in caplog.messages, event)


def close_in_the_ledger(db: Database) -> None:
    """Every sweep that is open there ends."""
    db.do("UPDATE orphan_recovery.sweeps SET ended_at = now(), ended_as = 'completed'")


def number_of_sweeps(db: Database) -> int:
    """How many have looked."""
    return int(db.one("SELECT count(*) FROM orphan_recovery.sweeps"))


async def test_a_sweep_waits_for_another_and_looks_then(
    db: Database,
    other: Connection,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the other marked meanwhile it does not even see."""
    caplog.set_level("INFO", "orphan_recovery")
    asked = questions(monkeypatch)
    [orphan] = db.add_orphans(1)
    sweeping = asyncio.ensure_future(sweep())
    await keeps_asking(sweeping, asked)
    assert "sweep_waits_for_another" in caplog.messages
    assert number_of_sweeps(db) == 0
    db.do("UPDATE worker_runs SET status = 'crashed' WHERE id = %s", orphan)
    other.rollback()
    report = await asyncio.wait_for(sweeping, SOON)
    assert (report.error, report.detected, report.ended_well) == (None, 0, True)
    assert caplog.messages.count("sweep_waits_for_another") == 1


@pytest.mark.parametrize(
    "table", ["worker_runs", "public.worker_runs", '"Of the team"."Worker.runs"']
)
async def test_who_waits_and_who_works_mean_the_same_lane(
    db: Database, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    """However the table is named: in a schema, on the search path, in quotes."""
    asked = questions(monkeypatch)
    db.do('CREATE SCHEMA "Of the team"')
    db.do('CREATE TABLE "Of the team"."Worker.runs" (LIKE worker_runs INCLUDING ALL)')
    target = Target(name="of-the-team", table=table)
    async with transaction(engine) as at_work:
        await enter_lane(at_work, target, 1)
        sweeping = asyncio.ensure_future(run_sweep(SweepRequest(asked_by="test", target=target)))
        await keeps_asking(sweeping, asked)
        assert number_of_sweeps(db) == 0
    assert (await asyncio.wait_for(sweeping, SOON)).error is None


async def test_it_is_not_deceived_by_the_moment_between_two_slices(
    db: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger has the other as open, so its lanes have to stay free for longer."""
    monkeypatch.setattr(turn, "MOMENT_SECONDS", 1.0)
    monkeypatch.setattr(turn, "LONGEST_WAIT_SECONDS", 60.0)
    asked = questions(monkeypatch)
    open_in_the_ledger(db)
    sweeping = asyncio.ensure_future(sweep())
    await keeps_asking(sweeping, asked)
    began = time.monotonic()
    while time.monotonic() - began < 1.5:  # each time for less than a moment, together for more
        other.rollback()
        await keeps_asking(sweeping, asked, 2)  # and has seen all lanes free
        await asyncio.to_thread(enter, other)
        await keeps_asking(sweeping, asked, 2)  # and has seen that they are not
    assert number_of_sweeps(db) == 1, "the other alone"
    other.rollback()
    assert (await asyncio.wait_for(sweeping, SOON)).error is None


async def test_it_goes_on_as_soon_as_the_other_is_closed(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it came between the other's look and its first slice, and found the lanes free."""
    monkeypatch.setattr(turn, "MOMENT_SECONDS", 60.0)
    asked = questions(monkeypatch)
    open_in_the_ledger(db)
    sweeping = asyncio.ensure_future(sweep())
    await keeps_asking(sweeping, asked)
    assert number_of_sweeps(db) == 1, "the other alone"
    close_in_the_ledger(db)
    assert (await asyncio.wait_for(sweeping, SOON)).error is None


@pytest.mark.parametrize("other", [{"target": "another"}, {"age": 61}])
async def test_neither_a_sweep_of_another_target_nor_one_long_dead_is_waited_for(
    db: Database, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    monkeypatch.setattr(turn, "MOMENT_SECONDS", 60.0)
    open_in_the_ledger(db, **other)
    assert (await asyncio.wait_for(sweep(), SOON)).error is None


async def test_one_that_was_killed_is_waited_for_a_moment(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn, "MOMENT_SECONDS", 1.0)
    open_in_the_ledger(db)
    began = time.monotonic()
    assert (await asyncio.wait_for(sweep(), SOON)).error is None
    assert time.monotonic() - began >= 1.0


async def test_a_sweep_does_not_wait_for_itself(
    db: Database, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when it looks again, nor when the word that it is open was lost on its way."""
    monkeypatch.setattr(turn, "MOMENT_SECONDS", 60.0)
    db.add_orphans(1)
    request = SweepRequest(asked_by="test")
    await turn.in_turn(engine, request, lambda db, _: begin(db, request))
    assert not db.one("SELECT ended_at FROM orphan_recovery.sweeps")
    await asyncio.wait_for(turn.in_turn(engine, request, lambda db, _: begin(db, request)), SOON)


async def test_a_second_look_waits_for_its_turn_too(
    db: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another may have begun while it waited for whoever lives to beat."""
    caplog.set_level("INFO", "orphan_recovery")
    asked = questions(monkeypatch)
    dead = db.add_run("dead", beat="2 hours")
    ended_in_the_ledger(db, ago="3 hours")  # none has looked since, so it looks twice
    request = SweepRequest(asked_by="test", target=Target(name="default", heartbeat_seconds=2))
    sweeping = asyncio.ensure_future(run_sweep(request))
    with db.connect() as other:
        await told(caplog, "sweep_looks_twice")
        enter(other)
        await told(caplog, "sweep_waits_for_another")
        await keeps_asking(sweeping, asked)
        assert db.status(dead) == "running"
        other.rollback()
        report = await asyncio.wait_for(sweeping, SOON)
    assert report.looked_twice is not None
    assert (report.error, report.recovered) == (None, 1)


async def test_an_open_sweep_tells_how_many_it_found(db: Database, engine: AsyncEngine) -> None:
    """To whoever waits for it, and to an operator."""
    db.add_orphans(3)
    request = SweepRequest(asked_by="test")
    await turn.in_turn(engine, request, lambda db, _: begin(db, request))
    assert db.do("SELECT detected, ended_as FROM orphan_recovery.sweeps") == [
        {"detected": 3, "ended_as": None}
    ]


@pytest.mark.parametrize("what", ["in a lane", "open"])
async def test_it_looks_by_what_is_so_then_and_not_a_moment_before(
    db: Database, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Another that waited, too, may have been quicker."""

    async def over(*given: Any) -> tuple[Any, bool]:
        await asyncio.sleep(0.05)
        *_, seen, _ends = given
        return seen, False

    monkeypatch.setattr(turn, "_wait_for_others", over)
    asked = questions(monkeypatch)
    with db.connect() as other:
        if what == "open":
            open_in_the_ledger(db)
        else:
            enter(other)
        before = number_of_sweeps(db)
        sweeping = asyncio.ensure_future(sweep())
        await keeps_asking(sweeping, asked)
        assert number_of_sweeps(db) == before
        other.rollback()
        close_in_the_ledger(db)
        assert (await asyncio.wait_for(sweeping, SOON)).error is None


async def test_of_many_that_wait_each_asks_less_often(
    db: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that fifty leave the server to the one at work."""
    monkeypatch.setattr(turn, "PAUSE_EACH_SECONDS", 0.25)
    monkeypatch.setattr(turn, "SHARE_AT_THE_END", 1.0)
    asked = questions(monkeypatch)
    sweeping = [asyncio.ensure_future(sweep()) for _ in range(4)]
    # Twice each, and then they all know how many they are.
    await asyncio.to_thread(until, lambda: len(asked) > 8 + 12, "questions")
    assert asked[8 + 12] - asked[8] > 0.8  # about 1.5 s; as if each were alone, it would be 0.3
    other.rollback()
    reports = await asyncio.wait_for(asyncio.gather(*sweeping), 2 * SOON)
    assert [report.error for report in reports] == [None] * 4


def test_not_all_that_wait_ask_at_the_same_moment() -> None:
    pauses = [turn._pause(connections=1) for _ in range(200)]
    assert max(pauses) > 1.2 * turn.SHORTEST_PAUSE_SECONDS
    assert min(pauses) < 0.8 * turn.SHORTEST_PAUSE_SECONDS


async def test_however_many_connections_there_are_it_goes_on_soon(
    db: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that beat have connections of the same name, and hundreds of them wait for nobody."""
    monkeypatch.setattr(turn, "PAUSE_EACH_SECONDS", 60.0)
    asked = questions(monkeypatch)
    sweeping = asyncio.ensure_future(sweep())
    await keeps_asking(sweeping, asked)
    assert asked[-1] - asked[0] < SOON
    other.rollback()
    assert (await asyncio.wait_for(sweeping, SOON)).error is None


async def test_connections_to_other_databases_do_not_count(
    db: Database, engine: AsyncEngine, server: str
) -> None:
    """Those of this one do, whatever they are for."""
    about = turn._about(SweepRequest(asked_by="test"))
    with database_of_its_own(server) as elsewhere:
        for url, counted in ((elsewhere, 1), (db.url, 2)):
            address = database_url(url).set(drivername="postgresql")
            given = address.render_as_string(hide_password=False)
            with psycopg.connect(given, application_name="orphan-recovery"):
                async with transaction(engine) as connection:
                    seen = await turn._ask(connection, about, time.monotonic(), take=False)
            assert seen.connections == counted


async def test_nobody_asks_before_the_other_could_be_through(
    db: Database,
    other: Connection,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With what it has found, at the best rate."""
    caplog.set_level("INFO", "orphan_recovery")
    monkeypatch.setattr(turn, "FASTEST", 10)
    open_in_the_ledger(db, detected=20)
    asked = questions(monkeypatch)
    sweeping = asyncio.ensure_future(sweep())
    await told(caplog, "sweep_waits_for_another")
    other.rollback()
    close_in_the_ledger(db)
    assert (await asyncio.wait_for(sweeping, SOON)).error is None
    first, second, *_ = asked
    assert second - first >= 1.9


@pytest.mark.parametrize(
    "table", ["worker_runs", "public.worker_runs", '"Of the team"."Worker.runs"']
)
async def test_of_one_that_the_ledger_names_mostly_its_lanes_alone_are_asked_about(
    db: Database, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    """Which costs the server, and who is at work on it, much less than the ledger does."""
    db.do('CREATE SCHEMA "Of the team"')
    db.do('CREATE TABLE "Of the team"."Worker.runs" (LIKE worker_runs INCLUDING ALL)')
    monkeypatch.setattr(turn, "LONGEST_WAIT_SECONDS", 60.0)
    target = Target(name="of-the-team", table=table)
    open_in_the_ledger(db, target.name)
    of_the_ledger = questions(monkeypatch, ("_ask",))
    of_the_lanes = questions(monkeypatch, ("_free",))
    async with transaction(engine) as at_work:
        for lane in range(2):
            await enter_lane(at_work, target, lane)
        sweeping = asyncio.ensure_future(run_sweep(SweepRequest(asked_by="test", target=target)))
        await keeps_asking(sweeping, of_the_lanes, 12)
        lasted = of_the_lanes[-1] - of_the_ledger[0]
        assert len(of_the_ledger) <= 1 + lasted / turn.LEDGER_SECONDS
        close_in_the_ledger(db)
    assert (await asyncio.wait_for(sweeping, SOON)).error is None


async def test_what_the_other_has_found_is_learned_soon_after_its_look(
    db: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before that the ledger does not name it."""
    monkeypatch.setattr(turn, "FASTEST", 10)
    monkeypatch.setattr(turn, "LEDGER_SECONDS", 60.0)
    asked = questions(monkeypatch)
    sweeping = asyncio.ensure_future(sweep())
    await keeps_asking(sweeping, asked)
    open_in_the_ledger(db, detected=20)
    so_far = len(asked)
    await keeps_asking(sweeping, asked, 2)
    assert asked[so_far + 1] - asked[0] >= 1.9  # the one before it learned that
    other.rollback()
    close_in_the_ledger(db)
    assert (await asyncio.wait_for(sweeping, SOON)).error is None


async def test_that_all_lanes_are_free_is_seen_at_once(
    db: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However rarely the ledger is asked."""
    monkeypatch.setattr(turn, "LEDGER_SECONDS", 60.0)
    monkeypatch.setattr(turn, "MOMENT_SECONDS", 60.0)
    asked = questions(monkeypatch)
    open_in_the_ledger(db)
    sweeping = asyncio.ensure_future(sweep())
    await keeps_asking(sweeping, asked)
    close_in_the_ledger(db)
    other.rollback()
    assert (await asyncio.wait_for(sweeping, SOON)).error is None


async def test_however_much_the_other_has_found_it_does_not_wait_for_ever(
    db: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn, "LONGEST_WAIT_SECONDS", 0.5)
    open_in_the_ledger(db, detected=100 * turn.FASTEST)
    assert (await asyncio.wait_for(sweep(), SOON)).error is None


async def test_it_asks_more_often_while_the_other_leaves_its_lanes(
    db: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment: one that gives way to other work keeps to one lane, for minutes maybe."""
    monkeypatch.setattr(turn, "SHORTEST_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(turn, "LONGEST_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(turn, "SHARE_AT_THE_END", 0.05)
    monkeypatch.setattr(turn, "MOMENT_SECONDS", 1.0)
    asked = questions(monkeypatch)
    sweeping = asyncio.ensure_future(sweep())

    def afterwards() -> list[float]:
        """Half a second late, for the moment began when the first question was answered."""
        return [when for when in asked if when - asked[0] > 1.5]

    await asyncio.to_thread(until, lambda: len(afterwards()) >= 2, "questions after the moment")
    at_first = sum(when - asked[0] < 1.0 for when in asked)
    assert at_first > 6, asked
    assert min(later - when for when, later in pairwise(afterwards())) > 0.45, asked
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


async def test_a_ledger_that_somebody_locks_keeps_no_sweep_waiting_for_longer(
    db: Database,
    other: Connection,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as a VACUUM FULL: who waits asks by statements that no time-out of ours would end."""
    caplog.set_level("INFO", "orphan_recovery")
    monkeypatch.setattr(turn, "LONGEST_WAIT_SECONDS", 1.0)
    monkeypatch.setattr(database, "LOCK_TIMEOUT_MS", 100)
    monkeypatch.setattr(RetryPlan, "delay", lambda _self, retry: 0.01 * retry)
    sweeping = asyncio.ensure_future(sweep())
    await told(caplog, "sweep_waits_for_another")
    other.execute("LOCK TABLE orphan_recovery.sweeps IN ACCESS EXCLUSIVE MODE")
    report = await asyncio.wait_for(sweeping, 2 * SOON)
    assert "lock timeout" in (report.error or "")


async def test_who_waits_holds_up_nobody(
    db: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds nothing while it waits: no lane, and no snapshot that would hold back a vacuum."""
    asked = questions(monkeypatch)
    sweeping = asyncio.ensure_future(sweep())
    await keeps_asking(sweeping, asked)
    held = list[dict[str, Any]]()

    def seen_between_questions() -> bool:
        held.extend(
            db.do(
                "SELECT backend_xmin, (SELECT count(*) FROM pg_locks"
                " WHERE pg_locks.pid = activity.pid AND locktype = 'advisory') AS locks"
                " FROM pg_stat_activity AS activity"
                " WHERE application_name = 'orphan-recovery' AND state <> 'active'"
                " AND datname = current_database()"
            )
        )
        return len(held) >= 5

    await asyncio.to_thread(until, seen_between_questions, "its session to be idle")
    assert {(row["backend_xmin"], row["locks"]) for row in held} == {(None, 0)}
    other.rollback()
    assert (await asyncio.wait_for(sweeping, SOON)).error is None


async def test_no_two_that_wait_take_each_other_for_one_at_work(
    db: Database, engine: AsyncEngine
) -> None:
    """However many ask at the same moment."""
    about = turn._about(SweepRequest(asked_by="test"))
    now = time.monotonic()
    async with transaction(engine) as one, transaction(engine) as another:
        free = [(await turn._ask(db, about, now, take=False)).free for db in (one, another)]
        assert free == [2, 2]
        # One that takes its turn is at work.
        assert (await turn._ask(one, about, now, take=True)).free == 0
    async with transaction(engine) as one, transaction(engine) as another:
        taken = [(await turn._ask(db, about, now, take=True)).free for db in (one, another)]
        assert taken == [2, 0]


async def test_a_dry_run_waits_for_nobody(db: Database, other: Connection) -> None:
    [orphan] = db.add_orphans(1)
    report = await asyncio.wait_for(sweep(dry_run=True), SOON)
    assert [run["run_id"] for run in report.as_dict()["runs"]] == [orphan]
    assert other.info.transaction_status.name == "INTRANS"
