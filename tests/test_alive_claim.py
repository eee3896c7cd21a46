"""Alive: of any number of workers that claim a run, one gets it."""

import asyncio
from pathlib import Path

import pytest

from alive_support import complete, pause_at
from orphan_recovery import ConfigurationError
from orphan_recovery.alive import claim, claim_sync
from support import Database
from tables_support import configure

pytestmark = pytest.mark.usefixtures("no_beater_is_left", "the_minute_has_begun")


async def test_a_run_is_claimed_with_a_sign_of_life_and_only_if_nobody_holds_it(
    db: Database,
) -> None:
    db.add_run("free", status="queued", worker=None)
    db.add_run("mine", status="queued")
    db.add_run("held")
    db.add_run("promised", status="queued", worker="worker-2")
    db.add_run("ended")
    complete(db, "ended")
    before = db.do("SELECT t::text FROM worker_runs t WHERE id NOT IN ('free', 'mine') ORDER BY id")
    assert await claim("free", "worker-1") is True
    assert await asyncio.to_thread(claim_sync, "mine", "worker-1") is True
    for run in ("held", "promised", "ended", "no such run"):
        assert await claim(run, "worker-1") is False, run
    assert await claim("held", "worker-9") is False
    after = db.do("SELECT t::text FROM worker_runs t WHERE id NOT IN ('free', 'mine') ORDER BY id")
    assert after == before
    assert db.do(
        "SELECT id, status, worker_id, started_at > now() - interval '1 min' AS started,"
        " heartbeat_at = started_at AS beat FROM worker_runs WHERE id IN ('free', 'mine')"
        " ORDER BY id"
    ) == [
        {"id": r, "status": "running", "worker_id": "worker-1", "started": True, "beat": True}
        for r in ("free", "mine")
    ]


@pytest.mark.parametrize(("first", "second"), [("worker-1", "worker-2"), ("worker-2", "worker-1")])
async def test_of_two_claims_at_once_the_first_wins(db: Database, first: str, second: str) -> None:
    db.add_run("run", status="queued", worker=None)
    pause_at(db, f"NEW.worker_id = '{first}'")
    with db.connect(autocommit=True) as gate:
        gate.execute("SELECT pg_advisory_lock(1)")
        one = asyncio.ensure_future(claim("run", first))
        await asyncio.to_thread(db.await_lock_wait)
        other = asyncio.ensure_future(claim("run", second))
        await asyncio.to_thread(db.await_lock_wait, 2)
    assert (await one, await other) == (True, False)
    assert db.one("SELECT worker_id FROM worker_runs") == first


async def test_a_claim_that_is_cut_off_leaves_the_run_to_the_other(
    db: Database, impatient: None
) -> None:
    db.add_run("run", status="queued", worker=None)
    pause_at(db, "NEW.worker_id = 'worker-1'")
    with db.connect(autocommit=True) as gate:
        gate.execute("SELECT pg_advisory_lock(1)")
        cut_off = asyncio.ensure_future(claim("run", "worker-1"))
        await asyncio.to_thread(db.await_lock_wait)
        other = asyncio.ensure_future(claim("run", "worker-2"))
        await asyncio.to_thread(db.await_lock_wait, 2)
        assert db.do(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname ="
            " current_database() AND wait_event = 'advisory'"
        )
        assert (await cut_off, await other) == (False, True)


async def test_of_many_claims_at_once_one_wins(db: Database) -> None:
    for turn in range(10):
        run = db.add_run(f"run-{turn}", status="queued", worker=None)
        won = await asyncio.gather(*(claim(run, f"worker-{n}") for n in range(12)))
        assert won.count(True) == 1
        holder = db.one("SELECT worker_id FROM worker_runs WHERE id = %s", run)
        assert holder == f"worker-{won.index(True)}"


async def test_a_claim_that_cannot_be_told_or_meant_is_refused(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.add_run("run", status="queued", worker=None)
    with pytest.raises(ConfigurationError, match=r"status is 'busy', which .*in_flight"):
        await claim("run", "worker-1", status="busy")
    configure(
        tmp_path,
        monkeypatch,
        "[targets.several]\ntable = 'worker_runs'\nin_flight = ['queued', 'held']\n"
        "[targets.bare]\ntable = 'worker_runs'\ncolumns = { worker_id = false }\n",
        "bare",
    )
    with pytest.raises(ConfigurationError, match=r"several\.in_flight has several statuses"):
        await claim("run", "worker-1", target="several")
    with pytest.raises(ConfigurationError, match="has no column for worker_id"):
        await claim("run", "worker-1", target="bare")
