"""Lock evidence: who holds its lock lives, who has lost it is dead, and nobody beats for that.

Real workers that are killed, frozen and cut off; a mark and a lock on two connections, in either
order.
"""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import event, literal, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from alive.proxy import Proxy
from alive_support import Beats, Workers, await_end, await_line, row_of
from lock_support import (
    BEAT,
    KINDS,
    SHORT,
    await_locks,
    key_of,
    marked,
    sessions,
    sweep,
    with_locks,
)
from orphan_recovery import ConfigurationError
from orphan_recovery.alive import LostBy, claim, keep_alive
from orphan_recovery.alive.lock import Locks
from orphan_recovery.catalog import Relation
from orphan_recovery.mark import mark_one
from orphan_recovery.record import note_direct_call
from orphan_recovery.request import SweepRequest
from orphan_recovery.runs import lock_key
from orphan_recovery.target import Target
from orphan_recovery.verdict import Outcome
from support import Database, database_of_its_own, until
from tables_support import configure, look, outcome_of, seen

pytestmark = pytest.mark.usefixtures("no_beater_is_left")


def asked(target: Target) -> SweepRequest:
    return SweepRequest(target=target, asked_by="test")


def session_of(db: Database) -> int:
    """The only one that holds locks."""
    [pid] = sessions(db)
    return pid


def await_looks(db: Database, count: int = 2) -> None:
    """Return once the only worker has looked at its locks so many times more."""
    pid = session_of(db)
    for _ in range(count):
        seen = db.one("SELECT clock_timestamp()")
        until(
            lambda at=seen: (
                db.one(  # type: ignore[misc]
                    "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND query_start > %s",
                    pid,
                    at,
                )
                > 0
            ),
            "a look of the worker",
            20,
        )


# Who lives, and who does not


@KINDS
async def test_whose_lock_is_gone_is_dead_and_nobody_else(
    db: Database,
    workers: Workers,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Killed, cut off, or never seen; but neither frozen, nor at work."""
    target = with_locks(tmp_path, monkeypatch, kind)
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", db.url)  # the sweep's own way is open
    for run in ("killed", "cut", "never", "frozen", "well"):
        db.add_run(run, worker=f"its worker, {run}")
    children = {
        run: workers.work(
            "hold",
            run,
            worker=f"its worker, {run}",
            interval=BEAT,
            url=proxy.url if run == "cut" else db.url,
        )
        for run in ("killed", "cut", "frozen", "well")
    }
    for child in children.values():
        await_line(child, "holding")
    await_locks(db, 4)
    children["frozen"].send(signal.SIGSTOP)
    children["killed"].kill()
    proxy.swallow()
    await_line(children["cut"], "lost cut unproven", 10)
    await_locks(db, 3)  # the server has not missed the one that was cut off, but it gave up
    proxy.cut()
    await_locks(db, 2)
    report = await sweep(target)
    assert db.statuses() == {
        **dict.fromkeys(("killed", "cut", "never"), "crashed"),
        **dict.fromkeys(("frozen", "well"), "running"),
    }
    assert report.looked_twice == "a lock may be lost with a connection alone"
    for verdict in db.verdicts():
        told = {name: verdict[name] for name in ("outcome", "evidence", "rule")}
        rule = f"nobody holds the lock of its {kind}"
        assert told == {"outcome": "marked", "evidence": "lock", "rule": rule}
    children["well"].tell("check well")
    await_line(children["well"], "check well: well")
    children["frozen"].send(signal.SIGCONT)


@KINDS
def test_all_runs_of_a_process_have_their_locks_on_one_connection_and_none_beats(
    db: Database,
    beats: Beats,
    workers: Workers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    with_locks(tmp_path, monkeypatch, kind)
    runs = db.add_orphans(100)
    db.do("UPDATE worker_runs SET worker_id = 'worker-1'; TRUNCATE beats")
    before = db.do("SELECT xmin, t::text FROM worker_runs t ORDER BY id")
    child = workers.holding("hold", *runs, interval=BEAT)
    await_locks(db, 100 if kind == "run" else 1)
    assert len(sessions(db)) == 1
    await_looks(db)
    assert db.one(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = 'orphan-recovery'"
    ) == len(sessions(db))
    assert (beats.all(), db.do("SELECT xmin, t::text FROM worker_runs t ORDER BY id")) == (
        [],
        before,
    )
    child.tell(f"finish {runs[0]}")
    await_line(child, f"finish {runs[0]}: well")
    assert [beat["runs"] for beat in beats.all()] == [1], "the result, and nothing besides"
    child.tell("end")
    await_line(child, "released")
    await_locks(db, 0)


async def test_the_locks_of_all_runs_are_taken_by_one_statement(
    db: Database, engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, those of thousands would take longer than a beat, and so never be held."""
    target = with_locks(tmp_path, monkeypatch, "run")
    runs = db.add_orphans(2000)
    db.do("UPDATE worker_runs SET worker_id = 'worker-1'")
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    locks = Locks(target, target.beat)
    with listening(engine, note):
        told = await locks.prove(engine, [(run, "worker-1") for run in runs])
    assert (len(told.thresholds), sessions(db)) == (2000, {session_of(db): 2000})
    assert sum("pg_try_advisory_lock" in statement for statement in statements) == 1
    assert len(statements) < 20
    await locks.let_go()
    await asyncio.to_thread(await_locks, db, 0)


async def test_the_server_is_told_to_miss_a_host_that_has_vanished(
    db: Database, engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own settings it may keep a connection, and its locks, for hours."""
    target = with_locks(tmp_path, monkeypatch, "run")
    told: list[str] = []

    def note(_connection: Any, _cursor: Any, _statement: str, values: Any, *_: Any) -> None:
        told.extend(str(value) for value in dict(values).values())

    locks = Locks(target, target.beat)
    with listening(engine, note):
        await locks.prove(engine, [("run", "worker-1")])
    await locks.let_go()
    for name in ("idle", "interval", "count"):
        assert f"tcp_keepalives_{name}" in told
    assert "tcp_user_timeout" in told


@contextmanager
def listening(engine: AsyncEngine, note: Callable[..., None]) -> Iterator[None]:
    """Have every statement of an engine noted."""
    event.listen(engine.sync_engine, "before_cursor_execute", note)
    yield
    event.remove(engine.sync_engine, "before_cursor_execute", note)


async def test_a_death_is_known_at_the_next_sweep_which_looks_twice_two_beats_apart(
    db: Database, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before any threshold. A worker lives, and dies, for all of its runs."""
    target = with_locks(tmp_path, monkeypatch, "worker")
    for run in ("first", "second", "third"):
        db.add_run(run, age="10 seconds", beat="2 seconds")
    child = workers.holding("hold", "first", "second", interval=BEAT)
    await_locks(db, 1)
    child.tell("finish first")
    await_line(child, "finish first: well")
    assert (await sweep(target)).detected == 0
    child.kill()
    await_locks(db, 0)
    assert (await sweep(target)).recovered == 2
    assert (marked(db), db.status("first")) == (["second", "third"], "completed")
    first, second = db.sweeps()
    assert first["ended_at"] - first["opened_at"] < timedelta(seconds=BEAT)
    waited = second["ended_at"] - second["opened_at"]
    assert timedelta(seconds=2 * BEAT) <= waited < timedelta(seconds=2 * BEAT + 10)


# A connection that is lost alone


async def test_a_worker_that_loses_its_connection_alone_takes_its_lock_again_in_time(
    db: Database,
    workers: Workers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Frozen until the sweep has seen that the lock is gone, so that it surely has."""
    target = with_locks(tmp_path, monkeypatch, "run", 2.0)
    db.add_run("run")
    child = workers.holding("hold", "run", interval=2.0)
    await_locks(db, 1)
    lost = session_of(db)
    child.send(signal.SIGSTOP)
    db.do("SELECT pg_terminate_backend(%s)", lost)
    await_locks(db, 0)
    sweeping = asyncio.create_task(sweep(target))
    await asyncio.to_thread(until, lambda: "sweep_looks_twice" in caplog.messages, "its doubt")
    child.send(signal.SIGCONT)
    report = await sweeping
    assert (report.detected, db.status("run"), marked(db)) == (0, "running", [])
    assert lost not in sessions(db)
    await_locks(db, 1)
    child.tell("check run")
    await_line(child, "check run: well")


async def test_a_lock_that_is_lost_while_the_sweep_waits_is_left_to_the_next_sweep(
    db: Database,
    engine: AsyncEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It was looked at once only: its worker may be about to take it again."""
    target = with_locks(tmp_path, monkeypatch, "run", SHORT)
    db.add_run("dead")
    db.add_run("dropped")
    key = await key_of(engine, target, "dropped")
    with db.connect(autocommit=True) as worker:
        worker.execute("SELECT pg_advisory_lock(%s)", [key])
        sweeping = asyncio.create_task(sweep(target))
        await asyncio.to_thread(until, lambda: "sweep_looks_twice" in caplog.messages, "its doubt")
    await sweeping
    assert marked(db) == ["dead"]
    assert db.status("dropped") == "running"
    await sweep(target)
    assert marked(db) == ["dead", "dropped"]


async def test_a_worker_that_cannot_take_its_lock_gives_the_run_up(
    db: Database, engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else has it: a twin, or a session of its own that the server has not missed yet."""
    target = with_locks(tmp_path, monkeypatch, "run", 0.5)
    db.add_run("run")
    key = await key_of(engine, target, "run")
    with db.connect(autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s)", [key])
        async with keep_alive("run", worker_id="worker-1") as alive:
            assert await asyncio.to_thread(alive.is_lost.wait, 10)
            assert alive.lost is not None
            assert alive.lost.by is LostBy.UNPROVEN
        assert (await sweep(target)).detected == 0
    await asyncio.to_thread(await_locks, db, 0)


# The mark


@KINDS
async def test_a_lock_that_is_taken_between_detection_and_mark_is_a_sign_of_life(
    db: Database, engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    target = with_locks(tmp_path, monkeypatch, kind, SHORT)
    db.add_run("run")
    request = asked(target)
    [run] = await look(engine, request)
    before = row_of(db, "run")
    with db.connect(autocommit=True) as worker:
        worker.execute("SELECT pg_advisory_lock(%s)", [await key_of(engine, target, "run")])
        assert await outcome_of(engine, request, run) == "sign_of_life"
        assert row_of(db, "run") == before
        assert await look(engine, request) == []
    await asyncio.to_thread(await_locks, db, 0)
    request = asked(target)
    [run] = await look(engine, request)
    assert await outcome_of(engine, request, run) == "marked"


@KINDS
async def test_a_lock_that_is_taken_while_the_mark_waits_for_the_row_is_a_sign_of_life(
    db: Database, engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    target = with_locks(tmp_path, monkeypatch, kind, SHORT)
    db.add_run("run")
    request = asked(target)
    [run] = await look(engine, request)
    key = await key_of(engine, target, "run")
    with db.connect() as other, db.connect(autocommit=True) as worker:
        other.execute("SELECT 1 FROM worker_runs FOR UPDATE")
        marking = asyncio.create_task(outcome_of(engine, request, run))
        await asyncio.to_thread(db.await_lock_wait)
        worker.execute("SELECT pg_advisory_lock(%s)", [key])
        other.rollback()
        assert await marking == "sign_of_life"
    assert db.status("run") == "running"


async def test_a_worker_that_wakes_up_while_its_run_is_being_marked_does_not_get_the_lock(
    db: Database, engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the mark is there to be seen."""
    target = with_locks(tmp_path, monkeypatch, "run", SHORT)
    db.add_run("run")
    request = asked(target)
    [run] = await look(engine, request)
    key = await key_of(engine, target, "run")
    with db.connect(autocommit=True) as worker:

        def gets_it() -> bool:
            row = worker.execute("SELECT pg_try_advisory_lock(%s) AS got", [key]).fetchone()
            assert row is not None
            return bool(row["got"])

        async with AsyncSession(engine) as session, session.begin():
            await note_direct_call(session, request)
            assert (await mark_one(session, request, run)).outcome is Outcome.MARKED
            assert not gets_it()
        assert gets_it()
    assert db.status("run") == "crashed"


async def test_two_runs_of_a_dead_worker_are_marked_by_two_transactions_at_once(
    db: Database, engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the flow does it: one mark does not take the other for their worker."""
    target = with_locks(tmp_path, monkeypatch, "worker", SHORT)
    db.add_run("first", age="3 hours")
    db.add_run("second", age="2 hours")
    request = asked(target)
    first, second = await look(engine, request)
    async with AsyncSession(engine) as session, session.begin():
        await note_direct_call(session, request)
    async with AsyncSession(engine) as one, AsyncSession(engine) as other:
        assert (await mark_one(one, request, first)).outcome is Outcome.MARKED
        assert [run.id for run in await look(engine, request)] == ["first", "second"]
        assert (await mark_one(other, request, second)).outcome is Outcome.MARKED
        await one.commit()
        await other.commit()
    assert marked(db) == ["first", "second"]


async def test_a_sweep_that_comes_upon_anothers_mark_waits_for_what_becomes_of_it(
    db: Database, engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = with_locks(tmp_path, monkeypatch, "run", SHORT)
    db.add_run("run")
    request = asked(target)
    [run] = await look(engine, request)
    async with AsyncSession(engine) as session:
        await note_direct_call(session, request)
        assert (await mark_one(session, request, run)).outcome is Outcome.MARKED
        sweeping = asyncio.create_task(sweep(target))
        await asyncio.to_thread(db.await_lock_wait)
        await session.rollback()  # it fails after all
        assert (await sweeping).recovered == 1
    assert marked(db) == ["run"]


# Whose lock it is


async def test_a_lock_of_the_same_key_in_another_database_is_no_sign_of_life(
    server: str,
    db: Database,
    engine: AsyncEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = with_locks(tmp_path, monkeypatch, "worker", SHORT)
    db.add_run("run")
    key = await key_of(engine, target, "run")
    with database_of_its_own(server) as url, psycopg.connect(url, autocommit=True) as elsewhere:
        elsewhere.execute("SELECT pg_advisory_lock(%s)", [key])
        assert (await sweep(target)).recovered == 1
    assert marked(db) == ["run"]


async def test_a_lock_of_two_keys_is_another_lock(
    db: Database, engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same 64 bits: Postgres keeps the two apart, and so does a sweep."""
    target = with_locks(tmp_path, monkeypatch, "run", SHORT)
    db.add_run("run")
    key = await key_of(engine, target, "run")
    with db.connect(autocommit=True) as other:
        other.execute(
            "SELECT pg_advisory_lock((%s::bigint >> 32)::int, %s::bigint::bit(32)::int)", [key, key]
        )
        assert (await sweep(target)).recovered == 1


async def test_a_run_whose_key_a_worker_writes_in_another_way_is_alive(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database writes a uuid in one way, callers do in several."""
    blank.do(
        "CREATE TABLE jobs (id uuid PRIMARY KEY, status text, worker_id text,"
        " created_at timestamptz DEFAULT now() - interval '1 hour', completed_at timestamptz)"
    )
    described = f"""
        [targets.jobs]
        table = "jobs"
        lock = "run"
        heartbeat_seconds = {SHORT}
        in_flight = ["running"]
        """
    target = configure(tmp_path, monkeypatch, described, "jobs")
    ids = [uuid4() for _ in range(3)]
    for one in ids:
        blank.do("INSERT INTO jobs (id, status, worker_id) VALUES (%s, 'running', 'w')", one)
    written = [str(ids[0]), str(ids[1]).upper(), ids[2].hex]
    assert len(await seen(blank, target)) == 3
    async with (
        keep_alive(written[0], worker_id="w", target="jobs") as first,
        keep_alive(written[1], worker_id="w", target="jobs"),
        keep_alive(written[2], worker_id="w", target="jobs"),
    ):
        await asyncio.to_thread(await_locks, blank, 3)
        assert await seen(blank, target) == []
        first.check()
    await asyncio.to_thread(await_locks, blank, 0)


async def test_a_worker_and_a_sweep_may_describe_the_same_table_in_two_ways(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its schema and without: their configurations are two files."""
    described = "".join(
        f"[targets.{name}]\ntable = '{table}'\nlock = 'run'\nheartbeat_seconds = {SHORT}\n"
        for name, table in (("short", "worker_runs"), ("long", "public.worker_runs"))
    )
    target = configure(tmp_path, monkeypatch, described, "short")
    db.add_run("run")
    async with keep_alive("run", worker_id="worker-1", target="long"):
        await asyncio.to_thread(await_locks, db, 1)
        assert (await sweep(target)).detected == 0


# Runs that nobody holds


@KINDS
async def test_a_run_that_no_worker_holds_yet_is_judged_by_its_age(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Nobody could hold a lock for it: a queue that is long is not dead."""
    target = with_locks(
        tmp_path,
        monkeypatch,
        kind,
        SHORT,
        "threshold_minutes = 30\n[[targets.default.rules]]\n"
        'match = { task = "patient" }\nthreshold_minutes = 600\n',
    )
    db.add_run("waiting", status="queued", worker=None, age="20 minutes")
    db.add_run("patient", status="queued", worker=None, age="2 hours")
    db.do("UPDATE worker_runs SET task = 'patient' WHERE id = 'patient'")
    db.add_run("forgotten", status="queued", worker=None, age="40 minutes")
    db.add_run("dead", age="1 minute")
    report = await sweep(target)
    assert (report.detected, marked(db)) == (2, ["dead", "forgotten"])
    told = {v["run_id"]: (v["evidence"], v["rule"], v["threshold"]) for v in db.verdicts()}
    assert told["forgotten"] == ("age", "silence >= threshold", timedelta(minutes=30))
    assert told["dead"] == (
        "lock",
        f"nobody holds the lock of its {kind}",
        timedelta(seconds=SHORT),
    )


async def test_a_run_that_was_claimed_a_moment_ago_has_the_time_to_be_locked(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = with_locks(tmp_path, monkeypatch, "run")
    db.add_run("run", status="queued", worker=None)
    assert await claim("run", "worker-1")
    assert (await sweep(target)).detected == 0
    assert db.status("run") == "running"


async def test_thresholds_play_no_part_and_never_does(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = with_locks(
        tmp_path,
        monkeypatch,
        "run",
        SHORT,
        '[[targets.default.rules]]\nmatch = { task = "spared" }\nnever = true\n'
        '[[targets.default.rules]]\nmatch = { task = "long" }\nthreshold_minutes = 600\n',
    )
    for run in ("spared", "long", "report"):
        db.add_run(run, age="1 minute")
        db.do("UPDATE worker_runs SET task = id WHERE id = %s", run)
    report = await sweep(target)
    assert marked(db) == ["long", "report"]
    assert report.fleet is not None
    assert report.fleet.exempt == 1
    verdict = next(v for v in db.verdicts() if v["run_id"] == "long")
    assert verdict["rule"] == "nobody holds the lock of its run"


# Forks


def test_a_master_and_the_child_it_forked_each_hold_their_own(
    db: Database, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_locks(tmp_path, monkeypatch, "run")
    db.add_run("master")
    db.add_run("child")
    process = workers.holding("fork", "master", "child", interval=BEAT)
    await_locks(db, 1)
    masters = session_of(db)
    process.tell("fork")
    await_line(process, "child holding")
    await_locks(db, 2)
    assert len(sessions(db)) == 2
    process.tell("let the child end")
    await_line(process, "child ended with 0")
    await_locks(db, 1)
    assert session_of(db) == masters, "the child's end cost it nothing"
    await_looks(db, 1)
    process.tell("end")
    await_end(process)
    await_locks(db, 0)


async def test_a_child_that_outlives_its_master_keeps_no_lock_of_the_masters(
    db: Database, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has inherited the connection, which ends for the server only when all have closed it."""
    target = with_locks(tmp_path, monkeypatch, "run")
    db.add_run("run")
    process = workers.holding("outlive", "run", interval=BEAT)
    await_locks(db, 1)
    process.tell("fork")
    await_line(process, "child lives")
    process.kill()
    try:
        await_locks(db, 0)
        await sweep(target)
        assert marked(db) == ["run"]
        process.tell("end")
        until(lambda: "child ends" in process.output, "the child's end")
    finally:
        assert process.process.stdin is not None
        process.process.stdin.close()  # whereupon the child ends, if it has not


# What cannot be used


async def test_a_lock_for_each_worker_needs_to_know_the_worker(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused on entering, and the process's other runs keep their locks."""
    with_locks(tmp_path, monkeypatch, "worker")
    db.add_run("run")
    db.add_run("other")
    refusal = "'default' keeps a lock for each worker: name the worker"
    async with keep_alive("run", worker_id="worker-1") as alive:
        await asyncio.to_thread(await_locks, db, 1)
        with pytest.raises(ConfigurationError, match=refusal):
            async with keep_alive("other"):
                pass
        with pytest.raises(ConfigurationError, match=refusal), keep_alive("other"):
            pass
        await asyncio.to_thread(await_looks, db, 2)
        alive.check()


async def test_the_beat_of_locks_is_the_targets(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep waits two of those: a worker with another beat would come back too late."""
    with_locks(tmp_path, monkeypatch, "run", SHORT)
    db.add_run("run")
    refusal = rf"every {10 * SHORT:g} seconds .*heartbeat_seconds"
    with pytest.raises(ConfigurationError, match=refusal):
        async with keep_alive("run", interval=10 * SHORT):
            pass


def test_a_beat_of_locks_that_no_sweep_could_wait_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would leave the dead to the next one, for ever."""
    with_locks(tmp_path, monkeypatch, "run", 30)
    with pytest.raises(ConfigurationError, match=r"heartbeat_seconds .* at most 30"):
        with_locks(tmp_path, monkeypatch, "run", 30.5)


async def test_a_table_without_workers_has_locks_for_runs_only(
    blank: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank.do(
        "CREATE TABLE jobs (id int PRIMARY KEY, status text, created_at timestamptz DEFAULT now())"
    )
    described = '[targets.jobs]\ntable = "jobs"\nin_flight = ["running"]\nlock = "worker"\n'
    configure(tmp_path, monkeypatch, described, "jobs")
    with pytest.raises(ConfigurationError, match=r"no column for worker_id.*lock = \"run\""):
        async with keep_alive("1", worker_id="w", target="jobs"):
            pass


def test_the_key_of_a_lock_goes_by_the_bytes_of_a_name() -> None:
    """By a collation that takes two texts for one, such as ICU's, a hash would be another."""
    relation = Relation(0, "public", "jobs", "r", {}, (), {}, False)
    assert 'COLLATE "C"' in str(select(lock_key(relation, literal("w"))).compile())
