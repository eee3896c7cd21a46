"""Crash: a server that forgets, in mid-sweep, what it had marked a moment before.

Slices do not wait for the disk. On a Postgres server of this module's own, whose process is killed.
"""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orphan_recovery import judge, recover
from orphan_recovery.database import database_url
from orphan_recovery.recover import run_sweep
from orphan_recovery.request import SweepRequest
from orphan_recovery.schema.migrate import migrate
from orphan_recovery.target import Target
from server_support import Restarted, Server, own_server
from support import database_of_its_own


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    with own_server() as server:
        yield server


@pytest.fixture
def db(own: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Restarted]:
    """A database there, whose log reaches the disk when a commit waits for it, and not before."""
    with database_of_its_own(own.url) as url:
        migrate(Target(), database_url(url))
        monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", url)
        with Restarted(url) as database:
            database.do("ALTER SYSTEM SET wal_writer_delay = '10s'")
            database.do("ALTER SYSTEM SET bgwriter_delay = '10s'")
            database.do("SELECT pg_reload_conf()")
            yield database


def crash_before(
    patch: pytest.MonkeyPatch, module: Any, name: str, own: Server, db: Restarted
) -> Callable[[], int]:
    """The server crashes, once, when the sweep comes there. Gives how many it had marked then."""
    then, marked = getattr(module, name), list[int]()

    async def crash_and_go_on(*args: Any) -> Any:
        if not marked:
            marked.append(db.one("SELECT count(*) FROM orphan_recovery.verdicts"))
            with own.coming_back(), db.connect() as victim:
                os.kill(victim.info.backend_pid, signal.SIGKILL)
        return await then(*args)

    patch.setattr(module, name, crash_and_go_on)
    return lambda: marked[0]


async def test_what_a_crash_made_the_server_forget_is_marked_by_the_same_sweep(
    own: Server, db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphans = db.add_orphans(40)
    marked_then = crash_before(monkeypatch, judge, "judge_pages", own, db)
    report = await run_sweep(SweepRequest(asked_by="test"))
    assert marked_then() == 40
    assert (report.error, report.detected, report.recovered) == (None, 40, 40)
    assert db.outcomes() == dict.fromkeys(orphans, "marked")
    [told] = db.sweeps()
    assert (told["ended_as"], told["detected"], told["marked"]) == ("completed", 40, 40)


async def test_a_sweep_whose_marks_were_forgotten_at_its_end_says_so(
    own: Server, db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphans = db.add_orphans(40)
    marked_then = crash_before(monkeypatch, recover, "finish", own, db)
    report = await run_sweep(SweepRequest(asked_by="test"))
    assert marked_then() == 40
    left = [run for run, status in db.statuses().items() if status == "running"]
    assert left, "the server has forgotten nothing: this test shows nothing"
    assert f"{len(left)} of the orphans have no verdict" in (report.error or "")
    assert (report.detected, report.recovered) == (40, 40 - len(left))
    [told] = db.sweeps()
    assert (told["ended_as"], told["detected"], told["marked"]) == ("failed", 40, 40 - len(left))
    assert (await run_sweep(SweepRequest(asked_by="the next"))).recovered == len(left)
    assert db.outcomes() == dict.fromkeys(orphans, "marked")


async def test_what_a_limit_left_was_not_forgotten(
    own: Server, db: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.add_orphans(40)
    crash_before(monkeypatch, recover, "finish", own, db)
    report = await run_sweep(SweepRequest(asked_by="test", limit=5))
    assert (report.error, report.detected, report.recovered) == (None, 5, 5)
