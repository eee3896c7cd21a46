"""Alive: a result is written once, by whoever holds the run, and a late one is contested."""

import asyncio
from pathlib import Path

import pytest

from alive.proxy import Proxy
from alive_support import (
    COMMIT,
    Beats,
    complete,
    contests,
    pause_at,
    row_of,
    sweep,
    terminate,
    waits,
)
from orphan_recovery import ConfigurationError
from orphan_recovery.alive import (
    LostBy,
    RunLost,
    claim,
    finish_run,
    finish_run_sync,
    keep_alive,
)
from support import Database, until

pytestmark = pytest.mark.usefixtures("no_beater_is_left", "the_minute_has_begun")


async def test_a_result_is_written_whole(db: Database) -> None:
    db.add_run("well")
    db.add_run("ill")
    db.add_run("sync")
    await finish_run("well", worker_id="worker-1", output={"rows": [1, 2]})
    await finish_run("ill", worker_id="worker-1", status="failed", error="no disk: 100% full")
    await asyncio.to_thread(finish_run_sync, "sync", output="text")
    names = ("status", "success", "output_json", "error")
    rows = {
        row["id"]: tuple(row[name] for name in names)
        for row in db.do("SELECT * FROM worker_runs WHERE completed_at > now() - interval '1 min'")
    }
    assert rows == {
        "well": ("completed", True, {"rows": [1, 2]}, None),
        "ill": ("failed", False, None, "no disk: 100% full"),
        "sync": ("completed", True, "text", None),
    }


async def test_a_run_that_failed_was_no_success_whatever_else_is_told(db: Database) -> None:
    db.add_run("run")
    await finish_run("run", status="failed")
    assert db.do("SELECT status, success FROM worker_runs") == [
        {"status": "failed", "success": False}
    ]


async def test_only_a_run_in_flight_of_its_own_is_finished(db: Database) -> None:
    db.add_run("mine")
    db.add_run("taken", worker="worker-2")
    db.add_run("nobodys", worker=None)
    db.add_run("ended")
    db.add_run("waiting", status="queued")
    complete(db, "ended")
    before = db.do("SELECT t::text FROM worker_runs t ORDER BY id")
    expected = {
        "taken": LostBy.CHANGED_HANDS,
        "nobodys": LostBy.CHANGED_HANDS,
        "ended": LostBy.FINISHED,
        "no such run": LostBy.VANISHED,
    }
    for run, by in expected.items():
        with pytest.raises(RunLost) as raised:
            await finish_run(run, worker_id="worker-1", output={})
        assert (raised.value.by, raised.value.contested) == (by, False)
    assert db.do("SELECT t::text FROM worker_runs t ORDER BY id") == before
    await finish_run("mine", worker_id="worker-1")
    await finish_run("taken")  # whoever holds it
    await finish_run("waiting", worker_id="worker-1")
    assert [db.status(run) for run in ("mine", "taken", "waiting")] == ["completed"] * 3


async def test_a_run_is_finished_once_and_a_second_report_of_the_same_worker_is_told(
    db: Database,
) -> None:
    db.add_run("run")
    await finish_run("run", worker_id="worker-1", output={"rows": 1})
    row = row_of(db, "run")
    with pytest.raises(RunLost) as raised:
        await finish_run("run", worker_id="worker-1", output={"rows": 2})
    assert raised.value.by is LostBy.FINISHED
    assert row_of(db, "run") == row


@pytest.mark.parametrize("status", ["running", "queued"])
async def test_a_status_that_ends_nothing_is_refused(db: Database, status: str) -> None:
    db.add_run("run")
    with pytest.raises(ConfigurationError, match=status):
        await finish_run("run", status=status)
    assert db.status("run") == "running"


async def test_a_result_whose_acknowledgement_was_lost_is_written_and_is_no_loss(
    db: Database, beats: Beats, proxy: Proxy, impatient: None
) -> None:
    db.add_run("run")
    proxy.lose_reply_to(COMMIT)
    await finish_run("run", worker_id="worker-1", output={"rows": 1})
    assert proxy.has_lost_a_reply.is_set()
    assert (db.status("run"), beats.of("run")) == ("completed", 1)


async def test_a_claim_whose_acknowledgement_was_lost_is_won(
    db: Database, beats: Beats, proxy: Proxy, impatient: None
) -> None:
    db.add_run("run", status="queued", worker=None)
    proxy.lose_reply_to(COMMIT)
    assert await claim("run", "worker-1") is True
    assert proxy.has_lost_a_reply.is_set()
    assert (db.status("run"), beats.of("run")) == ("running", 1)


async def test_a_retried_result_does_not_take_anothers_for_its_own(
    db: Database, proxy: Proxy, impatient: None
) -> None:
    """Its first try never arrived; until the second, another worker had the run, and ended it."""
    db.add_run("run")
    pause_at(db, "NEW.status = 'completed'")
    with db.connect(autocommit=True) as gate:
        gate.execute("SELECT pg_advisory_lock(1)")
        finishing = asyncio.ensure_future(finish_run("run", worker_id="worker-1"))
        await asyncio.to_thread(db.await_lock_wait)
        with db.connect() as other:
            taking = asyncio.ensure_future(
                asyncio.to_thread(
                    other.execute,
                    "UPDATE worker_runs SET worker_id = 'worker-2', status = 'failed'",
                )
            )
            await asyncio.to_thread(db.await_lock_wait, 2)
            terminate(db)
            await taking
            other.commit()
    with pytest.raises(RunLost) as raised:
        await finishing
    assert raised.value.by is LostBy.FINISHED
    assert raised.value.found["worker_id"] == "worker-2"


async def test_a_finish_waits_for_a_row_that_is_held_and_tries_again(
    db: Database, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    monkeypatch.setattr("orphan_recovery.database.LOCK_TIMEOUT_MS", 300)
    db.add_run("run")
    with db.connect() as other:
        other.execute("SELECT 1 FROM worker_runs FOR UPDATE")
        finishing = asyncio.ensure_future(finish_run("run", worker_id="worker-1"))
        await asyncio.to_thread(db.await_lock_wait)
        await asyncio.to_thread(until, lambda: not waits(db), "the end of its patience")
        await asyncio.to_thread(db.await_lock_wait)
    await finishing
    assert db.status("run") == "completed"


async def test_a_finish_that_is_before_the_mark_stands(db: Database) -> None:
    db.add_run("run")
    pause_at(db, "NEW.status = 'completed'")
    with db.connect(autocommit=True) as gate:
        gate.execute("SELECT pg_advisory_lock(1)")
        finishing = asyncio.ensure_future(finish_run("run", worker_id="worker-1", output=1))
        await asyncio.to_thread(db.await_lock_wait)
        marking = asyncio.ensure_future(sweep())
        await asyncio.to_thread(db.await_lock_wait, 2)
    await finishing
    await marking
    assert (db.status("run"), db.outcomes()) == ("completed", {"run": "finished_first"})
    assert contests(db) == []


async def test_a_finish_that_is_behind_the_mark_contests_it(db: Database) -> None:
    db.add_run("run")
    pause_at(db, "NEW.status = 'crashed'")
    with db.connect(autocommit=True) as gate:
        gate.execute("SELECT pg_advisory_lock(1)")
        marking = asyncio.ensure_future(sweep())
        await asyncio.to_thread(db.await_lock_wait)
        finishing = asyncio.ensure_future(finish_run("run", worker_id="worker-1", output=1))
        await asyncio.to_thread(db.await_lock_wait, 2)
    await marking
    with pytest.raises(RunLost) as raised:
        await finishing
    assert (raised.value.by, raised.value.contested) == (LostBy.MARKED, True)
    assert (db.status("run"), db.outcomes()) == ("crashed", {"run": "marked"})
    assert [contest["run_id"] for contest in contests(db)] == ["run"]


async def test_a_run_that_a_person_ended_is_lost_and_contests_nothing(db: Database) -> None:
    db.add_run("run")
    db.do("UPDATE worker_runs SET status = 'crashed', error = 'ended by hand'")
    with pytest.raises(RunLost) as raised:
        await finish_run("run", worker_id="worker-1")
    assert (raised.value.by, raised.value.contested) == (LostBy.MARKED, False)
    assert raised.value.found["error"] == "ended by hand"


async def test_without_a_ledger_the_loss_is_told_all_the_same(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    db.add_run("run")
    db.do("UPDATE worker_runs SET status = 'crashed'")
    db.do("DROP SCHEMA orphan_recovery CASCADE")
    with pytest.raises(RunLost) as raised:
        await finish_run("run", worker_id="worker-1")
    assert (raised.value.by, raised.value.contested) == (LostBy.MARKED, False)
    assert "contest_not_recorded" in caplog.messages


async def test_a_finish_that_is_given_up_leaves_the_run_as_it_is(db: Database) -> None:
    db.add_run("run")
    with db.connect() as other:
        other.execute("SELECT 1 FROM worker_runs FOR UPDATE")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await finish_run("run", worker_id="worker-1")
    await asyncio.to_thread(until, lambda: not waits(db), "the end of its statement")
    assert db.status("run") == "running"


@pytest.mark.parametrize("sync", [False, True])
async def test_a_result_goes_where_the_beats_go_though_the_settings_are_another_by_now(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    """Such as a file of targets that lies in the folder which the work leaves."""
    db.add_run("1")
    db.do("CREATE TABLE jobs (id int PRIMARY KEY, status text, heartbeat_at timestamptz)")
    db.do("INSERT INTO jobs VALUES (1, 'running', now())")
    (tmp_path / "orphan-recovery.toml").write_text('[targets.default]\ntable = "jobs"\n')
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path)
    async with keep_alive("1") as alive:
        monkeypatch.chdir("scratch")
        if sync:
            await asyncio.to_thread(alive.finish_sync)
        else:
            await alive.finish()
    assert db.one("SELECT status FROM jobs") == "completed"
    assert db.statuses() == {"1": "running"}


async def test_a_result_needs_no_beat_that_fits(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block has an interval of its own; a claim and a result beat for nobody."""
    monkeypatch.setenv("ORPHAN_RECOVERY_TARGETS__DEFAULT__HEARTBEAT_SECONDS", "900")
    db.add_run("kept", status="queued", worker=None)
    db.add_run("alone")
    with pytest.raises(ConfigurationError, match="a beat every 900 seconds does not go with"):
        async with keep_alive("kept"):
            pass
    assert await claim("kept", "worker-1")
    async with keep_alive("kept", worker_id="worker-1", interval=5) as alive:
        await alive.finish(output=1)
    await finish_run("alone", output=1)
    assert db.statuses() == {"kept": "completed", "alone": "completed"}
