"""Through a real PgBouncer: heartbeats and sweeps work as ever; locks need a session of their own.

Skipped where there is no PgBouncer, and only there.
"""

import asyncio
from pathlib import Path

import pytest

from alive_support import Beats, Workers, await_line
from lock_support import SHORT, await_locks, marked, sweep, with_locks
from orphan_recovery import recover_worker
from orphan_recovery.alive import claim, keep_alive
from orphan_recovery.doctor.examine import examine
from orphan_recovery.doctor.finding import Finding, Level
from orphan_recovery.target import Target
from orphan_recovery.targets import find_target
from pooler_support import pooler
from support import Database
from tables_support import configure

pytestmark = pytest.mark.usefixtures("no_beater_is_left")

URL = "ORPHAN_RECOVERY_DATABASE_URL"


async def about_locks(target: Target) -> Finding:
    [finding] = [finding for finding in await examine(target) if finding.about == "lock"]
    return finding


async def test_doctor_says_whose_locks_are_held_over_an_address_that_keeps_sessions(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A direct one, or one of a session-mode pooler."""
    target = with_locks(tmp_path, monkeypatch, "run")
    for run in ("held", "free"):
        db.add_run(run)
    with pooler(db.url, "session") as through:
        for url in (db.url, through):
            monkeypatch.setenv(URL, url)
            async with keep_alive("held", worker_id="worker-1"):
                await asyncio.to_thread(await_locks, db, 1)
                found = await about_locks(target)
            assert (found.level, found.told) == (
                Level.OK,
                "a run's lock is held for 1 run in flight",
            )
            await asyncio.to_thread(await_locks, db, 0)


@pytest.mark.parametrize("order", ["last in first out", "round robin"])
async def test_doctor_finds_out_a_pooler_that_shares_sessions(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    target = with_locks(tmp_path, monkeypatch, "worker")
    round_robin = f"server_round_robin = {int(order == 'round robin')}"
    with pooler(db.url, "transaction", round_robin) as through:
        monkeypatch.setenv(URL, through)
        found = await about_locks(target)
    assert found.level is Level.FAILURE
    assert "lock evidence goes through a pooler that shares sessions" in found.told
    assert found.way_out is not None
    assert "a direct address, or one of a session-mode pooler" in found.way_out


async def test_doctor_gives_no_clean_bill_where_all_clients_share_one_session(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its second connection waits for the first one's in vain, until the pooler says so."""
    target = with_locks(tmp_path, monkeypatch, "worker")
    settings = ("default_pool_size = 1", "query_wait_timeout = 1")
    with pooler(db.url, "transaction", *settings) as through:
        monkeypatch.setenv(URL, through)
        found = await about_locks(target)
    assert found.level is Level.FAILURE
    assert "query_wait_timeout" in found.told


async def test_where_no_locks_are_kept_doctor_does_not_mind_a_pooler(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pooler(db.url, "transaction") as through:
        monkeypatch.setenv(URL, through)
        findings = await examine(Target())
    assert "lock" not in [finding.about for finding in findings]
    assert [f for f in findings if f.level is Level.FAILURE] == []


async def test_heartbeats_and_sweeps_go_through_a_pooler_that_shares_sessions(
    db: Database,
    beats: Beats,
    workers: Workers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No statement is prepared, and nothing is set that outlasts a transaction."""
    described = f"[targets.default]\nthreshold_minutes = 30\nheartbeat_seconds = {SHORT}\n"
    configure(tmp_path, monkeypatch, described, "default")
    db.add_run("claimed", status="queued", worker=None)
    for run in ("dead", "well"):
        db.add_run(run)
    db.add_run("former", worker="worker-2", age="1 minute")
    with pooler(db.url, "transaction", "default_pool_size = 3") as through:
        monkeypatch.setenv(URL, through)
        assert await claim("claimed", "worker-1")
        child = workers.holding("hold_async", "well", "claimed")
        await asyncio.to_thread(beats.await_more, "well", 5)
        await sweep(find_target())
        assert marked(db) == ["dead"]
        report = await recover_worker("worker-2", settle_seconds=SHORT)
        assert (report["error"], report["recovered"]) == (None, 1)
        child.tell("finish claimed")
        await asyncio.to_thread(await_line, child, "finish claimed: well")
        await asyncio.to_thread(beats.await_more, "well", 2)
        child.tell("check well")
        await asyncio.to_thread(await_line, child, "check well: well")
        assert len(beats.pids("well")) <= 3
    assert db.statuses() == {
        "claimed": "completed",
        "dead": "crashed",
        "well": "running",
        "former": "crashed",
    }
    assert "beat_failed" not in child.log.read_text()
