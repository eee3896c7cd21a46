"""Doubt: silence is not believed where a server that was away, or a sweeper, may be its cause.

On Postgres servers of this module's own, which it restarts, fails over and stops.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import Any, Self

import psycopg
import pytest
from sqlalchemy import make_url, select

from orphan_recovery import ConfigurationError, doubt, judge, judge_pages
from orphan_recovery.database import database_url, make_engine, server_started
from orphan_recovery.doctor.examine import examine
from orphan_recovery.doctor.finding import Level
from orphan_recovery.doubt import beat_of, look_at_circumstances
from orphan_recovery.recover import run_sweep
from orphan_recovery.report import SweepReport
from orphan_recovery.report_pages import as_markdown
from orphan_recovery.request import SweepRequest
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Rule, Target
from prefect_support import run
from server_support import Restarted, Server, own_server
from support import Database, database_of_its_own, until

BEAT = "ORPHAN_RECOVERY_TARGETS__DEFAULT__HEARTBEAT_SECONDS"
OFTEN = 1.0
"""Seconds between two beats, as the target says; so a second look after a restart comes in two."""


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """An embedded server of this module's own, whatever the others use."""
    with own_server() as server:
        yield server


@pytest.fixture(scope="module")
def own_template(own: Server) -> Iterator[str]:
    with database_of_its_own(own.url) as url:
        migrate(Target(), database_url(url))
        yield str(make_url(url).database)


@pytest.fixture
def db(own: Server, own_template: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Restarted]:
    """A database there with the schema and no rows; the environment names it, and the beat."""
    monkeypatch.setenv(BEAT, str(OFTEN))
    with database_of_its_own(own.url, own_template) as url, Restarted(url) as database:
        monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", url)
        yield database


class Worker(threading.Thread):
    """A worker that lives: it beats for its run, and comes back after its connection was lost.

    It tries at each interval and no oftener, so that one beat finds the connection broken and
    the next one is over a new one.
    """

    def __init__(self, db: Database, run_id: str, *, interval: float = OFTEN / 2) -> None:
        super().__init__(name=run_id, daemon=True)
        self.run_id, self._db, self._interval = run_id, db, interval
        self.beats, self.failures = 0, 0
        self._ending, self._may_beat = threading.Event(), threading.Event()
        self._may_beat.set()

    def __enter__(self) -> Self:
        self.start()
        until(lambda: self.beats > 0, f"the first beat of {self.run_id}")
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._may_beat.set()
        self.join()

    def freeze(self) -> None:
        """Stand still, connection and all, as a host does that sleeps."""
        self._may_beat.clear()

    def go_on(self) -> None:
        self._may_beat.set()

    def run(self) -> None:
        connection: psycopg.Connection[Any] | None = None
        while not self._ending.is_set():
            self._may_beat.wait()
            if self._ending.is_set():
                break
            try:
                connection = connection or self._db.connect(autocommit=True)
                connection.execute(
                    "UPDATE worker_runs SET heartbeat_at = now() WHERE id = %s", [self.run_id]
                )
                self.beats += 1
            except psycopg.OperationalError:
                self.failures += 1
                with suppress(Exception):
                    if connection is not None:
                        connection.close()
                connection = None
            self._ending.wait(self._interval)
        if connection is not None:
            connection.close()


async def sweep(**asked: Any) -> SweepReport:
    return await run_sweep(SweepRequest(asked_by="test", **asked))


def silence(db: Database, *run_ids: str, lasting: str = "2 hours") -> None:
    """As if they had last beaten so long ago."""
    db.do(
        "UPDATE worker_runs SET heartbeat_at = now() - %s::interval WHERE id = ANY (%s)",
        *(lasting, list(run_ids)),
    )


async def beat(db: Database, *run_ids: str) -> None:
    """In a thread: a sweep that has locked the row goes on in this one, and lets go of it."""
    alive = "UPDATE worker_runs SET heartbeat_at = now() WHERE id = ANY (%s)"
    await asyncio.to_thread(db.do, alive, list(run_ids))


def plant_sweep(
    db: Database, opened: str, *, timeline: str | None = None, ended: bool = True
) -> None:
    """A sweep in the ledger that was opened so long ago; of this server, unless it says."""
    db.do(
        "INSERT INTO orphan_recovery.sweeps (sweep_id, target, table_name, asked_by, reason,"
        " threshold, scope, version, opened_at, in_flight, timeline, ended_at, ended_as) SELECT"
        " gen_random_uuid(), 'default', 'worker_runs', 'test', 'test', '30 minutes', '{}', '0',"
        " now() - %s::interval, 0,"
        " coalesce(%s, left(pg_walfile_name(pg_current_wal_lsn()), 8)),"
        " CASE WHEN %s THEN now() - %s::interval END, CASE WHEN %s THEN 'completed' END",
        *(opened, timeline, ended, opened, ended),
    )


def sweep_waits(db: Database) -> bool:
    """Whether a sweep is open that has looked once."""
    return bool(db.one("SELECT count(*) FROM orphan_recovery.sweeps WHERE ended_at IS NULL"))


def is_well_into(db: Database, sweeps: int = 1) -> bool:
    """Whether the last of so many sweeps has begun a while ago: one that believes has marked."""
    told = db.do(
        "SELECT ended_at IS NOT NULL OR statement_timestamp() - opened_at > '0.3 s' AS well_into"
        " FROM orphan_recovery.sweeps ORDER BY opened_at"
    )
    return len(told) == sweeps and bool(told[-1]["well_into"])


# A restart


async def test_after_a_restart_the_living_get_the_time_to_beat_and_the_dead_are_marked(
    own: Server, db: Restarted
) -> None:
    live = [db.add_run(f"live-{n}", worker=f"worker-{n}") for n in range(4)]
    dead = db.add_run("dead", worker="worker-9", beat="3 hours")
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(db, run)) for run in live]
        for worker in workers:
            worker.freeze()
        silence(db, *live)  # the server was away for so long
        own.restart()
        for worker in workers:
            worker.go_on()
        report = await sweep()
        assert all(worker.failures for worker in workers), "each had lost its connection"
    assert {run for run, status in db.statuses().items() if status == "crashed"} == {dead}
    assert (report.detected, report.recovered, report.ended_well) == (1, 1, True)
    assert report.looked_twice is not None
    assert report.looked_twice.startswith("the server was started ")
    assert f"- looked twice, because {report.looked_twice}" in as_markdown(report)
    assert report.as_dict()["looked_twice"] == report.looked_twice
    assert db.outcomes() == {dead: "marked"}
    assert db.sweeps()[-1]["looked_twice"] == report.looked_twice


async def test_what_shows_its_age_alone_is_not_waited_for(
    own: Server, db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BEAT, "30")
    db.add_run("never beat")
    db.add_run("beats", beat="1 minute")  # it is no orphan
    own.restart()
    began = time.monotonic()
    report = await sweep()
    assert time.monotonic() - began < 30
    assert (report.looked_twice, report.postponed, report.recovered) == (None, None, 1)
    assert db.sweeps()[-1]["looked_twice"] is None


async def test_a_server_that_has_been_up_for_two_beats_is_believed(
    own: Server, db: Restarted
) -> None:
    db.add_run("dead", beat="2 hours")
    own.await_age(timedelta(seconds=2 * OFTEN))
    report = await sweep()
    assert (report.looked_twice, report.recovered) == (None, 1)


async def test_a_restart_while_a_sweep_waits_makes_it_wait_anew(
    own: Server, db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that comes back in steps: who lives is given two beats from the last of them."""
    monkeypatch.setenv(BEAT, "2")
    live, dead = db.add_run("live", beat="2 hours"), db.add_run("dead", beat="2 hours")
    own.restart()
    sweeping = asyncio.ensure_future(sweep())
    await asyncio.to_thread(own.await_age, timedelta(seconds=2.5))
    assert sweep_waits(db)
    await asyncio.to_thread(own.restart)
    await asyncio.to_thread(own.await_age, timedelta(seconds=2))  # of the four that it is given
    await beat(db, live)
    report = await sweeping
    assert db.statuses() == {live: "running", dead: "crashed"}
    assert report.recovered == 1


async def test_a_server_that_lost_all_its_sessions_and_was_not_restarted_is_doubted_too(
    own: Server, db: Restarted
) -> None:
    """Where one of its processes is killed, for want of memory say, a server ends them all."""
    live, dead = db.add_run("live", beat="2 hours"), db.add_run("dead", beat="2 hours")
    own.await_age(timedelta(seconds=2 * OFTEN))
    up_since = db.one("SELECT pg_postmaster_start_time()")
    with own.coming_back(), db.connect() as victim:
        os.kill(victim.info.backend_pid, signal.SIGKILL)
    assert db.one("SELECT pg_postmaster_start_time()") == up_since
    sweeping = asyncio.ensure_future(sweep())
    await asyncio.to_thread(until, lambda: is_well_into(db), "the sweep's first look")
    await beat(db, live)
    await sweeping
    assert db.statuses() == {live: "running", dead: "crashed"}


async def test_every_role_sees_that_a_server_lost_all_its_sessions(
    own: Server, db: Restarted
) -> None:
    """Also one that may not see who is connected."""
    db.do("CREATE ROLE plain LOGIN")
    before = db.one("SELECT clock_timestamp()")
    with own.coming_back(), db.connect() as victim:
        os.kill(victim.info.backend_pid, signal.SIGKILL)
    engine = make_engine(database_url(db.url).set(username="plain"))
    async with engine.connect() as connection:
        since = (await connection.execute(select(server_started()))).scalar_one()
    await engine.dispose()
    assert db.one("SELECT pg_postmaster_start_time()") < before < since


async def test_a_restart_between_detect_and_mark_loses_nothing(own: Server, db: Restarted) -> None:
    """The mark is tried again, and repeats the whole check."""
    orphans = db.add_orphans(3)
    db.do(
        "CREATE FUNCTION wait_here() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NEW; END $$;"
        "CREATE TRIGGER wait_here BEFORE UPDATE OF status ON worker_runs"
        " FOR EACH ROW EXECUTE FUNCTION wait_here()"
    )
    gate = db.connect(autocommit=True)
    gate.execute("SELECT pg_advisory_lock(42)")
    sweeping = asyncio.ensure_future(sweep())
    await asyncio.to_thread(db.await_lock_wait)
    await asyncio.to_thread(own.restart)  # the gate is gone with it, and so is the half-made mark
    report = await sweeping
    assert (report.error, report.recovered, report.detected) == (None, 3, 3)
    assert set(db.statuses().values()) == {"crashed"}
    assert [(v["run_id"], v["outcome"]) for v in db.verdicts()] == [(o, "marked") for o in orphans]


async def test_who_fell_silent_while_a_sweep_stood_still_is_left_to_the_next_one(
    own: Server, db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was no orphan when the sweep looked; and then the server was away, which it never saw.

    The sweep stands still in the mark of its first page, and goes on after a restart.
    """
    for module in (judge, judge_pages):
        monkeypatch.setattr(module, "PAGE", 1)
    dead = db.add_run("dead", beat="3 hours")
    live = db.add_run("live", beat="55 seconds")
    own.await_age(timedelta(seconds=2 * OFTEN))
    with db.connect() as gate:
        gate.execute("LOCK TABLE orphan_recovery.verdicts IN SHARE MODE")
        sweeping = asyncio.ensure_future(sweep(threshold_minutes=1))
        await asyncio.to_thread(db.await_lock_wait)
        overdue = "SELECT heartbeat_at < now() - interval '1 minute' FROM worker_runs WHERE id = %s"
        await asyncio.to_thread(until, lambda: bool(db.one(overdue, live)), "its silence")
        await asyncio.to_thread(own.restart)
        gate.close()
    report = await sweeping
    assert (report.error, db.status(dead)) == (None, "crashed")
    assert db.status(live) == "running", "its server was away when it was to beat"


# A failover


@pytest.fixture
def failover(own: Server) -> Iterator[Callable[[], Server]]:
    """Makes a standby; stops it at the end."""
    made: list[Server] = []

    def make() -> Server:
        made.append(own.standby())
        return made[0]

    yield make
    for standby in made:
        standby.stop()


async def test_a_standby_is_refused_by_name_and_after_its_promotion_the_sweep_looks_twice(
    own: Server,
    db: Restarted,
    failover: Callable[[], Server],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own.await_age(timedelta(seconds=2 * OFTEN))
    assert (await sweep()).looked_twice is None  # the last sweep before the failover
    live = db.add_run("live", worker="worker-1", beat="2 hours")
    dead = db.add_run("dead", worker="worker-2", beat="3 hours")

    standby = await asyncio.to_thread(failover)
    url = make_url(standby.url).set(database=make_url(db.url).database)
    there = Restarted(url.render_as_string(hide_password=False))
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", there.url)
    with there:
        until(lambda: len(there.statuses()) == 2, "the standby to have it all")
        with pytest.raises(ConfigurationError, match="target 'default' is a standby"):
            await sweep()
        refused = await asyncio.to_thread(run, "orphan-recovery", "sweep")
        assert refused.returncode == 2
        assert "is a standby, where nothing can be marked" in refused.stderr
        assert set(there.statuses().values()) == {"running"}
        [told] = [f for f in await examine(Target()) if f.level is Level.FAILURE]
        assert (told.about, told.way_out) == (
            *("server", "name the primary in the target's database address"),
        )

        await asyncio.to_thread(standby.await_age, timedelta(seconds=3 * OFTEN))
        standby.control("promote")  # it has been up for long: nothing was started just now
        sweeping = asyncio.ensure_future(sweep())
        await asyncio.to_thread(until, lambda: sweep_waits(there), "a sweep that waits")
        await beat(there, live)
        report = await sweeping
        assert report.looked_twice == "the server has failed over"
        assert there.statuses() == {live: "running", dead: "crashed"}
        before, after = there.sweeps()
        assert (before["timeline"], after["timeline"]) == ("00000001", "00000002")
        silence(there, live)
        assert (await sweep()).looked_twice is None  # it has been known for long enough now


async def test_a_failover_that_a_sweep_could_not_wait_for_is_doubted_by_the_next_one_too(
    own: Server, db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BEAT, "45")  # two of them are more than a sweep waits
    own.await_age(timedelta(seconds=1))
    plant_sweep(db, "20 minutes", timeline="00000000")
    own_start = db.one("SELECT pg_postmaster_start_time()")
    beaten = db.add_run("has beaten", worker="worker-1", beat="2 hours")
    for _ in range(2):  # one right after the other
        report = await sweep()
        assert "the server has failed over" in (report.postponed or "")
        assert db.status(beaten) == "running"
    monkeypatch.setenv(BEAT, str(OFTEN))
    await asyncio.to_thread(own.await_age, timedelta(seconds=2 * OFTEN))
    assert db.one("SELECT pg_postmaster_start_time()") == own_start
    known = (
        "SELECT min(opened_at) < now() - interval '3 seconds' FROM orphan_recovery.sweeps"
        " WHERE timeline <> '00000000'"
    )
    await asyncio.to_thread(until, lambda: bool(db.one(known)), "two beats since it is known")
    report = await sweep()
    assert (report.looked_twice, report.postponed, report.recovered) == (None, None, 1)


async def test_a_server_that_does_not_tell_its_timeline_is_swept_all_the_same(
    db: Database,
) -> None:
    """Aurora refuses `pg_current_wal_lsn()` unless its wal_level is logical."""
    name = make_url(db.url).database
    db.do(f"ALTER DATABASE \"{name}\" SET rds.extensions = 'anything'")
    [orphan] = db.add_orphans(1)
    report = await sweep()
    assert (report.error, report.looked_twice, db.status(orphan)) == (None, None, "crashed")
    assert db.sweeps()[-1]["timeline"] is None


# A table that is locked against writes


async def test_while_somebody_locks_the_table_nobody_can_beat_and_nothing_is_believed(
    own: Server, db: Restarted, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor at once when the lock is gone: whoever lives is about to beat."""

    def doubts() -> int:
        return sum(record.message == "sweep_looks_twice" for record in caplog.records)

    own.await_age(timedelta(seconds=2 * OFTEN))
    live, dead = db.add_run("live", beat="2 hours"), db.add_run("dead", beat="2 hours")
    with psycopg.connect(db.url) as indexing:
        indexing.execute("LOCK TABLE worker_runs IN SHARE MODE")
        sweeping = asyncio.ensure_future(sweep())
        await asyncio.to_thread(until, lambda: doubts() == 1, "a sweep that waits")
    await asyncio.to_thread(until, lambda: doubts() == 2 or sweeping.done(), "the next wait")
    assert not sweeping.done()
    await beat(db, live)
    report = await sweeping
    told = "somebody locks the table against writes, so that nobody can beat"
    assert report.looked_twice == told
    assert db.statuses() == {live: "running", dead: "crashed"}


async def test_a_lock_that_a_sweep_cannot_wait_for_leaves_all_to_the_next_one(
    own: Server, db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubt, "GRACE_BEATS", 100)
    silent = db.add_run("silent", beat="2 hours")
    with psycopg.connect(db.url) as indexing:
        indexing.execute("LOCK TABLE worker_runs IN SHARE MODE")
        report = await sweep()
    assert "somebody locks the table against writes" in (report.postponed or "")
    assert db.status(silent) == "running"


async def test_a_lock_that_lets_others_write_is_no_doubt(own: Server, db: Restarted) -> None:
    own.await_age(timedelta(seconds=2 * OFTEN))
    db.add_run("dead", beat="2 hours")
    with psycopg.connect(db.url) as vacuuming:
        vacuuming.execute("LOCK TABLE worker_runs IN SHARE UPDATE EXCLUSIVE MODE")
        report = await sweep()
    assert (report.looked_twice, report.recovered) == (None, 1)


# A sweeper that slept


async def test_a_sweeper_that_slept_looks_twice_and_leaves_alone_who_beats_meanwhile(
    own: Server, db: Restarted
) -> None:
    live, dead = db.add_run("live", beat="2 hours"), db.add_run("dead", beat="2 hours")
    own.await_age(timedelta(seconds=2 * OFTEN))
    plant_sweep(db, "3 hours")
    sweeping = asyncio.ensure_future(sweep())
    await asyncio.to_thread(until, lambda: sweep_waits(db), "a sweep that waits")
    await beat(db, live)
    report = await sweeping
    assert report.looked_twice == "no sweep has looked for 3 h"
    assert db.statuses() == {live: "running", dead: "crashed"}
    assert db.outcomes() == {dead: "marked"}, "who was seen to live is not even detected"


async def test_a_sleep_that_is_longer_than_a_rules_threshold_is_one(
    own: Server, db: Restarted
) -> None:
    """Though it is shorter than the target's own."""
    live = db.add_run("live", beat="19 minutes")
    own.await_age(timedelta(seconds=2 * OFTEN))
    plant_sweep(db, "20 minutes")
    rule = Rule(match={"task": "report"}, threshold_minutes=3)
    sweeping = asyncio.ensure_future(sweep(target=Target(rules=(rule,), heartbeat_seconds=OFTEN)))
    await asyncio.to_thread(until, lambda: sweep_waits(db), "a sweep that waits")
    await beat(db, live)
    report = await sweeping
    assert report.looked_twice == "no sweep has looked for 20 min"
    assert db.status(live) == "running"


@pytest.mark.parametrize("opened", ["20 minutes", None])
async def test_a_sweeper_that_was_awake_believes_at_once_and_so_does_the_first_one_ever(
    own: Server, db: Restarted, opened: str | None
) -> None:
    db.add_run("dead", beat="2 hours")
    own.await_age(timedelta(seconds=2 * OFTEN))
    if opened:
        plant_sweep(db, opened)
    report = await sweep()
    assert (report.looked_twice, report.recovered) == (None, 1)


@pytest.mark.parametrize("cause", ["slept", "failed over"])
async def test_a_second_sweep_does_not_believe_because_a_first_one_waits(
    own: Server, db: Restarted, cause: str
) -> None:
    """Workers that start call for a sweep each: the first one has not judged yet."""
    live = db.add_run("live", beat="2 hours")
    own.await_age(timedelta(seconds=2 * OFTEN))
    opened, timeline = ("3 hours", None) if cause == "slept" else ("1 minute", "00000000")
    plant_sweep(db, opened, timeline=timeline)
    first = asyncio.ensure_future(sweep())
    await asyncio.to_thread(until, lambda: sweep_waits(db), "a sweep that waits")
    second = asyncio.ensure_future(sweep())
    await asyncio.to_thread(until, lambda: is_well_into(db, 3), "the second one")
    await beat(db, live)
    assert ((await first).recovered, (await second).recovered) == (0, 0)
    assert db.status(live) == "running"


# What would take too long


async def test_what_would_have_to_be_waited_for_too_long_is_left_to_a_later_sweep(
    own: Server, db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BEAT, "45")  # two of them are more than a sweep waits
    beaten = db.add_run("has beaten", worker="worker-1", beat="2 hours")
    aged = db.add_run("age alone", worker="worker-2")
    own.restart()
    report = await sweep()
    assert db.statuses() == {beaten: "running", aged: "crashed"}
    assert (report.ended_well, report.detected, report.recovered) == (True, 1, 1)
    assert report.postponed is not None
    assert report.postponed.startswith("the server was started ")
    told = f"1 orphaned run that has beaten is left to the next sweep, because {report.postponed}"
    assert report.headline().endswith(told)
    assert told[1:] in as_markdown(report)
    assert db.sweeps()[-1]["looked_twice"] == report.postponed
    monkeypatch.setenv(BEAT, str(OFTEN))
    await asyncio.to_thread(own.await_age, timedelta(seconds=2 * OFTEN))
    later = await sweep()
    assert (later.looked_twice, later.postponed, later.recovered) == (None, None, 1)
    assert db.status(beaten) == "crashed"


async def test_all_waits_of_a_sweep_together_are_bounded(
    own: Server, db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is restarted again and again does not keep a sweep for ever."""
    monkeypatch.setenv(BEAT, "2")
    monkeypatch.setattr("orphan_recovery.sweep.LONGEST_WAIT", timedelta(seconds=4))
    beaten = db.add_run("has beaten", beat="2 hours")
    own.restart()
    sweeping = asyncio.ensure_future(sweep())  # it waits for two beats
    await asyncio.to_thread(until, lambda: sweep_waits(db), "a sweep that waits")
    # It would have to wait for two more; later by more than it takes to find its connection gone.
    await asyncio.sleep(1.5)
    await asyncio.to_thread(own.restart)
    report = await sweeping
    assert report.looked_twice is not None
    assert (report.postponed or "").startswith("the server was started ")
    assert (report.error, db.status(beaten)) == (None, "running")


async def test_a_sweep_that_waits_for_nothing_marks_nothing_that_is_held(
    own: Server, db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What shows its age alone is marked at once after a restart; but not what a hold names."""
    aged = [db.add_run(f"aged-{n}", worker=f"worker-{n}") for n in range(12)]
    assert (await sweep()).is_held
    monkeypatch.setenv(BEAT, "45")
    db.add_run("has beaten", worker="worker-99", beat="2 hours")
    own.restart()
    report = await sweep()
    assert {db.status(run) for run in aged} == {"running"}
    assert report.is_held
    assert db.one("SELECT count(*) FROM orphan_recovery.holds") == 1


async def test_a_fleet_that_shows_its_age_alone_is_held_even_where_others_are_postponed(
    own: Server, db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    aged = [db.add_run(f"aged-{n}", worker=f"worker-{n}") for n in range(12)]
    monkeypatch.setenv(BEAT, "45")
    db.add_run("has beaten", worker="worker-99", beat="2 hours")
    own.restart()
    await sweep()
    assert {db.status(run) for run in aged} == {"running"}


# Too much of a fleet


async def test_a_fleet_of_which_too_much_is_silent_is_looked_at_twice_before_it_is_held(
    own: Server, db: Restarted
) -> None:
    """A fleet that beats late is no reason to wake a person."""
    runs = [db.add_run(f"run-{n}", worker=f"worker-{n}", beat="2 hours") for n in range(12)]
    own.await_age(timedelta(seconds=2 * OFTEN))
    sweeping = asyncio.ensure_future(sweep())
    await asyncio.to_thread(until, lambda: sweep_waits(db), "a sweep that waits")
    await beat(db, *runs[1:])
    report = await sweeping
    assert report.looked_twice == "12 of 12 workers look dead"
    assert (report.held, report.recovered) == (None, 1)
    assert db.one("SELECT count(*) FROM orphan_recovery.holds") == 0


# How often workers beat


async def _ask(db: Database, ask: Callable[[Any], Awaitable[Any]]) -> Any:
    engine = make_engine(database_url(db.url))
    try:
        async with engine.connect() as connection:
            return await ask(connection)
    finally:
        await engine.dispose()


async def measured(db: Database) -> tuple[timedelta | None, str]:
    request = SweepRequest(asked_by="test")
    found: tuple[timedelta | None, str] = await _ask(db, lambda c: beat_of(c, request))
    return found


async def test_the_beat_is_what_the_target_says_or_twice_the_median_silence(
    db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    for since in ("1 second", "10 seconds", "20 seconds", "25 seconds"):
        db.add_run(f"beats, {since} ago", worker=f"beats, {since} ago", beat=since)
    db.add_run("age alone", age="5 seconds")
    db.add_run("dead", beat="31 minutes")
    db.add_run("ahead", beat="-5 minutes")
    db.add_run("ended", status="completed", beat="1 second")
    assert await measured(db) == (timedelta(seconds=OFTEN), "as heartbeat_seconds says")
    monkeypatch.delenv(BEAT)
    assert await measured(db) == (None, "only 4 workers beat just now")
    db.add_run("beats with the last", worker="beats, 25 seconds ago", beat="25 seconds")
    assert await measured(db) == (None, "only 4 workers beat just now")
    db.add_run("beats seldom", worker="seldom", beat="29 minutes")
    beat, told = await measured(db)
    assert told == "estimated from 5 workers that beat"
    assert beat is not None
    assert timedelta(seconds=40) <= beat < timedelta(seconds=50)


async def test_the_measured_beat_is_what_a_second_look_waits_for(
    own: Server, db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The assumed ten seconds would be far too long here."""
    monkeypatch.delenv(BEAT)
    monkeypatch.setattr(doubt, "shortest", lambda _: timedelta(0))  # whoever was away is back
    for n in range(6):
        db.add_run(f"beats-{n}", worker=f"worker-{n}")
    for n in range(9):
        db.add_run(f"dead-{n}", worker=f"dead-{n}", beat="2 hours")
    # Younger than two beats, the server would be a reason of its own.
    own.await_age(timedelta(seconds=5))
    began = time.monotonic()
    db.do("UPDATE worker_runs SET heartbeat_at = now() - interval '0.3 s' WHERE id LIKE 'beats%'")
    report = await sweep()
    assert report.looked_twice == "9 of 15 workers look dead"
    assert time.monotonic() - began < 10


async def test_right_after_a_restart_the_beat_is_that_of_before(
    own: Server, db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who beats by then has only just come back; the others are given the time that they need."""
    monkeypatch.delenv(BEAT)
    away = timedelta(minutes=31)
    workers = range(12)
    for n in workers:
        beat = away + timedelta(seconds=10 * n)  # each in two minutes, one after the other
        db.add_run(f"run-{n}", worker=f"worker-{n}", beat=f"{beat.total_seconds()} s")
    db.add_run("dead for long", worker="dead", age="3 days", beat="2 days")
    own.restart()
    back = "UPDATE worker_runs SET heartbeat_at = now() WHERE id = ANY (%s)"
    db.do(back, [f"run-{n}" for n in range(5)])
    report = await sweep()
    assert report.postponed is not None
    assert report.postponed.startswith("the server was started")
    assert set(db.statuses().values()) == {"running"}
    request = SweepRequest(asked_by="test")
    started = db.one("SELECT pg_postmaster_start_time()")
    beat, _ = await _ask(db, lambda c: beat_of(c, request, started))
    assert timedelta(seconds=59) < beat < timedelta(seconds=61), "twice the median of the others"
    db.do("DELETE FROM worker_runs WHERE id <> ALL (%s)", [f"run-{n}" for n in range(5)])
    beat, _ = await _ask(db, lambda c: beat_of(c, request, started))
    assert beat == timedelta(seconds=10), "no less, though they beat a moment ago"
    db.do("UPDATE worker_runs SET heartbeat_at = now() WHERE id = 'run-1'")
    db.do("DELETE FROM worker_runs WHERE id = 'run-2'")
    assert (await _ask(db, lambda c: beat_of(c, request, started)))[0] is None


async def test_circumstances_are_the_databases_own(own: Server, db: Restarted) -> None:
    own.restart()
    plant_sweep(db, "3 hours", timeline="00000007")
    plant_sweep(db, "1 hour")
    request = SweepRequest(asked_by="test")
    found = await _ask(db, lambda c: look_at_circumstances(c, request))
    started = db.one("SELECT pg_postmaster_start_time()")
    # Its processes come up a moment later.
    assert timedelta(0) <= found.server_started_at - started < timedelta(seconds=5)
    assert (found.standby, found.timeline) == (False, "00000001")
    assert found.seen_at - found.last_sweep_at == pytest.approx(
        timedelta(hours=1), abs=timedelta(minutes=1)
    )
