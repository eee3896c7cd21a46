"""Alive: a beat has a way of its own, whatever else the process or its database is busy with."""

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from alive.proxy import Proxy
from alive_support import OFTEN, Beats, heartbeat
from orphan_recovery import attempt
from orphan_recovery.alive import beater, claim, finish_run, keep_alive, write
from orphan_recovery.alive.beat import Beaten, beat_for
from orphan_recovery.alive.beater import Beater
from orphan_recovery.alive.beaters import beater_at_hand, beater_of
from orphan_recovery.alive.lost import LostBy
from orphan_recovery.attempt import in_transaction
from orphan_recovery.database import POOL_SIZE, database_url, make_engine
from orphan_recovery.targets import find_target
from support import Database, until
from tables_support import configure

pytestmark = pytest.mark.usefixtures("no_beater_is_left", "the_minute_has_begun")


def connections(db: Database) -> int:
    return int(
        db.one(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'orphan-recovery'"
        )
    )


async def test_results_that_wait_for_their_rows_keep_no_run_from_beating(
    db: Database, beats: Beats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many: they have all the connections there are for results, and more wait for one."""
    monkeypatch.setattr("orphan_recovery.database.LOCK_TIMEOUT_MS", 60_000)
    monkeypatch.setenv("ORPHAN_RECOVERY_TARGETS__DEFAULT__HEARTBEAT_SECONDS", str(OFTEN))
    locked = [db.add_run(f"locked-{n}", age="1 second") for n in range(2 * POOL_SIZE)]
    db.add_run("free", age="1 second")
    async with keep_alive("free") as alive:
        with db.connect() as other:
            other.execute("SELECT 1 FROM worker_runs WHERE id <> 'free' FOR UPDATE")
            finishing = [asyncio.ensure_future(finish_run(run)) for run in locked]
            await asyncio.to_thread(db.await_lock_wait, POOL_SIZE)
            await asyncio.to_thread(beats.await_more, "free", 4)
            assert not any(task.done() for task in finishing)
        await asyncio.gather(*finishing)
        alive.check()


async def test_connections_that_nobody_uses_are_given_back(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beater, "IDLE_SECONDS", 0.5)
    db.add_run("run", age="1 second")
    async with keep_alive("run", interval=OFTEN):
        await asyncio.gather(*(claim(f"no such run {n}", "w") for n in range(POOL_SIZE)))
        await asyncio.to_thread(until, lambda: connections(db) == 1, "the beat's own alone", 10)
    await asyncio.to_thread(until, lambda: connections(db) == 0, "none", 10)
    async with keep_alive("run", interval=OFTEN) as alive:  # and taken again
        await alive.finish()
    assert db.status("run") == "completed"


async def test_an_address_that_is_renewed_leaves_no_beater_behind(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orphan_recovery.alive.beaters.IDLE_SECONDS", 0.1)
    target, url = find_target(), database_url(db.url)

    def asked_with(token: str) -> Beater:
        return beater_of(target, url.set(password=token), 5)

    first, held = asked_with("first"), asked_with("held")
    held.keep("run", None, lambda _: None)
    await asyncio.sleep(0.2)
    second = asked_with("second")
    await asyncio.to_thread(until, lambda: not first.lives, "the end of the first", 5)
    assert (held.lives, second.lives) == (True, True)
    assert asked_with("first").lives, "if it is asked for again"


async def test_a_block_is_entered_while_all_threads_of_the_loop_work(db: Database) -> None:
    db.add_run("run", age="1 second")
    over, begun = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def work() -> None:
        loop.call_soon_threadsafe(begun.set)
        over.wait(20)

    with ThreadPoolExecutor(1) as threads:
        loop.set_default_executor(threads)
        working = asyncio.ensure_future(asyncio.to_thread(work))
        await begun.wait()
        try:
            async with asyncio.timeout(10):
                for _ in range(2):  # also once its beater is there
                    async with keep_alive("run", interval=OFTEN) as alive:
                        alive.check()
            assert not working.done()
        finally:
            over.set()
            await working


async def test_a_beat_that_needs_longer_than_its_interval_is_given_the_time(
    db: Database, beats: Beats
) -> None:
    """Up to a third of the threshold, as a slow disk may need."""
    db.add_run("run", age="1 second")
    db.do(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(0.8); RETURN NEW; END $$;"
        "CREATE TRIGGER slow BEFORE UPDATE ON worker_runs FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    async with keep_alive("run", interval=OFTEN):
        await asyncio.to_thread(beats.await_more, "run", 2)


async def test_what_came_through_before_the_time_was_up_counts(db: Database) -> None:
    """All at once is refused, the first half is written, and the second takes too long."""
    db.add_run("first", age="1 second")
    db.add_run("second", age="1 second")
    db.do(
        "CREATE FUNCTION check_beat() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " CASE (SELECT string_agg(id, ' ' ORDER BY id) FROM written)"
        " WHEN 'first second' THEN RAISE EXCEPTION 'all at once';"
        " WHEN 'second' THEN PERFORM pg_sleep(20); ELSE END CASE; RETURN NULL; END $$;"
        "CREATE TRIGGER check_beat AFTER UPDATE ON worker_runs REFERENCING NEW TABLE AS written"
        " FOR EACH STATEMENT EXECUTE FUNCTION check_beat()"
    )
    engine, beaten = make_engine(database_url(db.url), connections=1), Beaten({}, {}, {})
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2):
            await beat_for(engine, find_target(), [("first", None), ("second", None)], beaten)
    await engine.dispose()
    assert list(beaten.thresholds) == [("first", None)]
    target = find_target()
    async with keep_alive("first", interval=1), keep_alive("second", interval=1):
        found = beater_at_hand(target, database_url(db.url), 1)
        assert found is not None
        [first], [second] = (found.own_runs_of(run, None) for run in ("first", "second"))
        proven = first.proven_at, second.proven_at
        await asyncio.to_thread(until, lambda: first.proven_at > proven[0], "its proof", 10)
        assert second.proven_at == proven[1]


WORKERS = """
[targets.default]
threshold_minutes = 1
columns = { heartbeat_at = false }
[targets.default.worker_heartbeat]
table = "workers"
key = "id"
run_key = "worker_id"
last_seen = "seen_at"
"""


async def test_a_worker_whose_row_somebody_holds_keeps_no_other_from_beating(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(tmp_path, monkeypatch, WORKERS, "default")
    db.do("CREATE TABLE workers (id text PRIMARY KEY, seen_at timestamptz)")
    db.do("INSERT INTO workers VALUES ('w1', now()), ('w2', now())")
    db.add_run("held", worker="w1", age="1 second")
    db.add_run("free", worker="w2", age="1 second")

    def await_beats(worker: str) -> None:
        for _ in range(2):
            before = db.one("SELECT seen_at FROM workers WHERE id = %s", worker)
            until(
                lambda at=before: db.one("SELECT seen_at FROM workers WHERE id = %s", worker) > at,  # type: ignore[misc]
                f"a beat of {worker}",
                4,
            )

    async with (
        keep_alive("held", worker_id="w1", interval=OFTEN),
        keep_alive("free", worker_id="w2", interval=OFTEN),
    ):
        await asyncio.to_thread(await_beats, "w1")
        with db.connect() as other:
            other.execute("SELECT 1 FROM workers WHERE id = 'w1' FOR UPDATE")
            await asyncio.to_thread(await_beats, "w2")
        await asyncio.to_thread(await_beats, "w1")


async def test_connections_that_hang_are_given_up_in_time_and_all_at_once(
    db: Database, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    """Accepted by something in between, and never answered: the server's own time-outs are no help.

    The driver takes five seconds more to give each up.
    """
    monkeypatch.setattr(write, "LONGEST_TRY_SECONDS", 1)
    monkeypatch.setattr(attempt, "LONGEST_TRY_SECONDS", 1)
    db.add_run("run", age="1 second")
    db.add_run("beats", age="1 second")
    engine = make_engine(database_url(proxy.url))

    async def ask(connection: AsyncConnection) -> int:
        return int((await connection.execute(text("SELECT 42"))).scalar_one())

    assert await in_transaction(engine, ask) == 42
    async with keep_alive("beats", interval=1):
        await asyncio.gather(*(claim(f"no such run {n}", "w") for n in range(4)))
        await asyncio.to_thread(until, lambda: heartbeat(db, "beats") is not None, "a beat", 10)
        proxy.swallow_open()
        before, begun = heartbeat(db, "beats"), time.monotonic()
        told = await asyncio.gather(finish_run("run"), in_transaction(engine, ask))
        assert told[1] == 42
        await asyncio.to_thread(until, lambda: heartbeat(db, "beats") > before, "a beat", 10)
    assert db.status("run") == "completed"
    assert time.monotonic() - begun < 11, "one of them each"
    await engine.dispose()


async def test_a_connection_that_is_lost_while_a_column_is_asked_says_nothing_of_the_column(
    db: Database, proxy: Proxy, impatient: None
) -> None:
    db.add_run("run", status="queued", worker=None)
    proxy.lose_reply_to(b"AS probe")
    assert await claim("run", "worker-1")
    assert proxy.has_lost_a_reply.is_set()


def test_no_lock_is_held_by_somebody_else_in_the_child_of_a_fork(db: Database) -> None:
    """Whoever held it has stayed behind; the child leaves the block by its own end."""
    db.add_run("run", age="1 second")
    held, over = threading.Event(), threading.Event()
    target, url = find_target(), database_url(db.url)

    def hold() -> None:
        with beater_of(target, url, 5)._lock, block._lock:
            held.set()
            over.wait(20)

    block = keep_alive("run", interval=5)
    alive = block.__enter__()
    thread = threading.Thread(target=hold)  # as the beater's own does, many times a second
    thread.start()
    held.wait(20)
    try:
        child = os.fork()
        if child == 0:
            block.__exit__(None, None, None)
            with alive._beater.finishing(alive._own):
                pass
            os._exit(7)
        ended: list[int] = []

        def has_ended() -> bool:
            pid, status = os.waitpid(child, os.WNOHANG)
            ended[:] = [os.waitstatus_to_exitcode(status)] if pid else []
            return bool(ended)

        try:
            until(has_ended, "the end of the child", 10)
        except AssertionError:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise
        assert ended == [7]
    finally:
        over.set()
        thread.join()
        block.__exit__(None, None, None)


async def test_until_a_beat_has_come_through_the_shortest_threshold_holds(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule may give the run less than the target does, and a sweep goes by the rule."""
    configured = tmp_path / "orphan-recovery.toml"
    configured.write_text(
        "[targets.default]\nthreshold_minutes = 30\n"
        "[[targets.default.rules]]\nmatch = { task = 'report' }\nthreshold_minutes = 1\n"
    )
    monkeypatch.setenv("ORPHAN_RECOVERY_CONFIG", str(configured))
    db.add_run("short", age="1 second")
    with db.connect() as holder:
        holder.execute("SELECT FROM worker_runs FOR UPDATE")
        async with keep_alive("short", interval=1):
            found = beater_at_hand(find_target(), database_url(db.url), 1)
            assert found is not None
            [own] = found.own_runs_of("short", None)
            assert own.lost_after == 60


async def test_a_host_that_was_suspended_for_a_threshold_has_lost_the_run(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its monotonic clock stood still meanwhile; the database's did not."""
    db.add_run("run", age="1 second")
    with db.connect() as holder:  # so that no beat comes through first
        holder.execute("SELECT FROM worker_runs FOR UPDATE")
        async with keep_alive("run", interval=OFTEN) as alive:
            before = beater.host_seconds
            monkeypatch.setattr(beater, "host_seconds", lambda: before() + 31 * 60)
            await asyncio.to_thread(until, lambda: alive.lost is not None, "its loss", 20)
    assert alive.lost is not None
    assert alive.lost.by is LostBy.UNPROVEN
