"""Alive: what its host does otherwise, by its logging, its names, its threads, stops no beat."""

import asyncio
import logging
import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from alive.proxy import Proxy
from alive_support import OFTEN, Beats, complete
from orphan_recovery import ConfigurationError
from orphan_recovery.alive import RunLost, claim, finish_run, keep_alive
from orphan_recovery.alive.beater import Beater
from orphan_recovery.alive.beaters import beater_at_hand, beater_of
from orphan_recovery.database import database_url
from orphan_recovery.log import logger
from orphan_recovery.targets import find_target
from support import Database, until

pytestmark = pytest.mark.usefixtures("no_beater_is_left", "the_minute_has_begun")


def run_script(folder: Path, code: str, **environment: str) -> str:
    """What a process of its own says."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Logging


class Refusing(logging.Filter):
    """A host's filter with a fault."""

    def filter(self, record: logging.LogRecord) -> bool:
        raise ZeroDivisionError(record.msg)


@pytest.fixture(params=["a factory of records with fields", "a filter that raises"])
def odd_logging(request: pytest.FixtureRequest) -> Iterator[str]:
    factory, refusing = logging.getLogRecordFactory(), Refusing()

    def with_fields(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = factory(*args, **kwargs)
        record.run_id = record.target = "its own"
        return record

    if "factory" in request.param:
        logging.setLogRecordFactory(with_fields)
    else:
        logger.addFilter(refusing)
    yield request.param
    logging.setLogRecordFactory(factory)
    logger.removeFilter(refusing)


async def test_whatever_logging_raises_the_beats_go_on(
    db: Database, beats: Beats, odd_logging: str, caplog: pytest.LogCaptureFixture
) -> None:
    db.add_run("run", age="1 second")
    db.add_run("lost", age="1 second")
    complete(db, "lost")
    with pytest.raises(RunLost):
        async with asyncio.timeout(10), keep_alive("lost", cancel=True, interval=OFTEN):
            await asyncio.Event().wait()
    async with keep_alive("run", interval=OFTEN):
        await asyncio.to_thread(beats.await_more, "run", 2)
    told = [vars(record)["run_id"] for record in caplog.records if record.msg == "run_lost"]
    assert told == (["lost"] if "factory" in odd_logging else [])


async def test_a_turn_that_raises_is_followed_by_the_next(
    db: Database, beats: Beats, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever raises it, in the beat's own turns as in those of who watches over it."""
    db.add_run("run", age="1 second")
    fence, raised = Beater._fence, list[str]()

    def raise_at_first(self: Beater) -> None:
        if raised.count(by := sys._getframe(1).f_code.co_name) < 2:
            raised.append(by)
            raise ZeroDivisionError
        fence(self)

    monkeypatch.setattr(Beater, "_fence", raise_at_first)
    async with keep_alive("run", interval=OFTEN):
        await asyncio.to_thread(beats.await_more, "run", 2)
        await asyncio.to_thread(until, lambda: len(raised) == 4, "two turns of each", 10)
    assert caplog.messages.count("beat_failed") >= 1


async def test_the_work_hears_of_a_loss_before_the_log_does(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log may be slow, such as one that is sent over the network."""
    order: list[str] = []
    db.add_run("run")
    complete(db, "run")
    told = asyncio.Event()
    loop = asyncio.get_running_loop()

    def note(record: logging.LogRecord) -> bool:
        if record.msg == "run_lost":
            order.append("log")
            loop.call_soon_threadsafe(told.set)
        return True

    logger.addFilter(note)
    try:
        beater = beater_of(find_target(), database_url(db.url), OFTEN)
        beater.keep("run", None, lambda _: order.append("work"))
        await asyncio.wait_for(told.wait(), 10)
    finally:
        logger.removeFilter(note)
    assert order == ["work", "log"]


def test_the_logger_is_what_it_was() -> None:
    assert isinstance(logger, logging.Logger)
    assert logger is logging.getLogger("orphan_recovery")


# Names


@pytest.mark.parametrize("worker", [4711, uuid4()])
async def test_a_worker_may_be_named_by_a_number_or_a_uuid(db: Database, worker: Any) -> None:
    db.add_run("run", status="queued", worker=None)
    assert await claim("run", worker)
    async with keep_alive("run", worker_id=worker, interval=OFTEN):
        found = beater_at_hand(find_target(), database_url(db.url), OFTEN)
        assert found is not None
        [held] = found.own_runs_of("run", None)
        begun = held.proven_at
        await asyncio.to_thread(until, lambda: held.proven_at > begun, "a beat that proves it", 10)
    await finish_run("run", worker_id=worker)
    assert db.one("SELECT worker_id FROM worker_runs") == str(worker)


@pytest.mark.parametrize("odd", [("job-\udcff", None), ("job", "host-\udcff")])
async def test_a_name_that_is_no_text_stops_no_other_beat(
    db: Database, beats: Beats, odd: tuple[str, str | None]
) -> None:
    """Such as a file's, of which a byte is no character."""
    db.add_run("run", age="1 second")
    run, worker = odd
    async with keep_alive("run", interval=OFTEN), keep_alive(run, worker_id=worker, interval=OFTEN):
        await asyncio.to_thread(beats.await_more, "run", 3)


# Blocks


async def test_a_block_that_would_stop_its_event_loop_is_refused(db: Database) -> None:
    db.add_run("run")
    with (
        pytest.raises(ConfigurationError, match=r"'run'.* use async with"),
        keep_alive("run", cancel=True),
    ):
        pytest.fail("the block was entered")


async def test_a_block_is_entered_once(db: Database) -> None:
    """Else the first of two that share it would go on beating for ever."""
    db.add_run("run")
    block = keep_alive("run")
    async with block:
        with pytest.raises(RuntimeError, match=r"'run'.* make one for each block"):
            block.__enter__()
    with pytest.raises(RuntimeError, match="make one for each block"):
        async with block:
            pass


async def test_a_result_that_is_reported_beside_the_block_is_no_loss(db: Database) -> None:
    db.add_run("run")
    async with keep_alive("run", worker_id="worker-1", cancel=True, interval=OFTEN) as alive:
        await finish_run("run", worker_id="worker-1")
        assert not await asyncio.to_thread(alive.is_lost.wait, 5 * OFTEN)
    db.add_run("other")
    async with keep_alive("other", worker_id="worker-1", interval=OFTEN) as alive:
        db.do("UPDATE worker_runs SET worker_id = 'worker-2' WHERE id = 'other'")
        await finish_run("other", worker_id="worker-2")
        assert await asyncio.to_thread(alive.is_lost.wait, 10), "another's result is one"


# What keeps it from starting


def test_a_beater_that_cannot_start_says_so_and_the_next_one_may(
    db: Database, tmp_path: Path
) -> None:
    """For want of a descriptor; nobody waits for it."""
    db.add_run("run", status="queued", worker=None)
    told = run_script(
        tmp_path,
        """
        import resource
        from orphan_recovery.alive import claim_sync
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        files = []
        try:
            while True: files.append(open("/dev/null"))
        except OSError:
            pass
        try:
            claim_sync("run", "worker-1")
        except OSError as error:
            print(error.strerror)
        for file in files: file.close()
        print(claim_sync("run", "worker-1"))
        """,
    )
    assert told.splitlines() == ["Too many open files", "True"]


async def test_an_option_of_the_address_that_cannot_be_used_is_refused(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = database_url(db.url).update_query_dict({"plugin": "nope"})
    monkeypatch.setenv(
        "ORPHAN_RECOVERY_DATABASE_URL", address.render_as_string(hide_password=False)
    )
    with pytest.raises(ConfigurationError, match=r"option that cannot be used .*nope"):
        await claim("run", "worker-1")


async def test_threads_that_gevent_has_patched_are_refused(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what gevent says of itself; it is not needed for this."""
    patched = types.SimpleNamespace(is_module_patched=lambda name: name == "threading")
    monkeypatch.setitem(sys.modules, "gevent.monkey", patched)
    with pytest.raises(ConfigurationError, match="gevent has patched threading"):
        await claim("run", "worker-1")


# Ends


@pytest.mark.parametrize("entered", ["before", "after"])
def test_a_result_is_reported_though_the_main_thread_has_ended(
    db: Database, proxy: Proxy, tmp_path: Path, entered: str
) -> None:
    """Over a new connection, to a host by its name, for which a loop has no threads any more."""
    db.add_run("run")
    told = run_script(
        tmp_path,
        f"""
        import asyncio, threading, time
        from orphan_recovery.alive import keep_alive

        async def drain():
            async with keep_alive("run", interval=20) as alive:
                entered.set()
                await asyncio.sleep(2 * ({entered!r} == "before"))
                await alive.finish()
                print("finished")

        def work():
            time.sleep(1 * ({entered!r} == "after"))
            asyncio.run(drain())

        entered = threading.Event()
        threading.Thread(target=work).start()
        if {entered!r} == "before": entered.wait()
        """,
        ORPHAN_RECOVERY_DATABASE_URL=proxy.url.replace("127.0.0.1", "localhost"),
    )
    assert (told, db.status("run")) == ("finished\n", "completed")


def test_a_result_that_is_reported_at_the_very_end_is_written(db: Database, tmp_path: Path) -> None:
    """By a handler that runs after the beater's own, where the interpreter starts threads still."""
    db.add_run("run")
    told = run_script(
        tmp_path,
        """
        import atexit

        def report():
            try:
                finish_run_sync("run", status="failed")
            except RuntimeError as error:
                print(error)

        atexit.register(report)
        from orphan_recovery.alive import finish_run_sync, keep_alive
        keep_alive("run").__enter__()
        """,
    )
    if sys.version_info < (3, 12):
        assert (told, db.status("run")) == ("", "failed")
    else:
        assert "thread" in told
