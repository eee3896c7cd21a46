"""Alive: whoever lost a run is told how, and writes nothing to it any more."""

import asyncio
import signal
from typing import Any

import pytest

from alive.proxy import Proxy
from alive_support import (
    COMMIT,
    OFTEN,
    Beats,
    Workers,
    await_line,
    complete,
    contests,
    heartbeat,
    row_of,
    silence,
    sweep,
)
from orphan_recovery.alive import LostBy, RunLost, keep_alive
from support import Database, until

pytestmark = pytest.mark.usefixtures("no_beater_is_left", "the_minute_has_begun")


def test_each_way_to_lose_a_run_is_told_and_the_run_beats_no_more(
    db: Database, beats: Beats, workers: Workers
) -> None:
    ways = {"gone": "vanished", "ended": "finished", "taken": "changed_hands", "dead": "marked"}
    for run in (*ways, "kept"):
        db.add_run(run)
    child = workers.holding("hold", *ways, "kept")
    beats.await_more("kept", 2)
    complete(db, "ended")
    db.do("UPDATE worker_runs SET worker_id = 'worker-2' WHERE id = 'taken'")
    db.do("UPDATE worker_runs SET status = 'crashed' WHERE id = 'dead'")  # by a person
    db.do("DELETE FROM worker_runs WHERE id = 'gone'")
    for run, by in ways.items():
        await_line(child, f"lost {run} {by} ")
        child.tell(f"check {run}")
        await_line(child, f"check {run}: lost by {by}")
    rows = [row_of(db, run) for run in ("ended", "taken", "dead")]
    beats.await_more("kept")
    assert [row_of(db, run) for run in ("ended", "taken", "dead")] == rows
    child.tell("check kept")
    await_line(child, "check kept: well")
    for run, by in ways.items():
        child.tell(f"finish {run}")
        await_line(child, f"finish {run}: lost by {by}, contested False")
    assert [row_of(db, run) for run in ("ended", "taken", "dead")] == rows
    child.tell("finish kept")
    await_line(child, "finish kept: well")
    assert (db.status("kept"), contests(db)) == ("completed", [])


async def test_a_worker_that_was_frozen_while_a_sweep_marked_its_run_is_told_and_contests_it_once(
    db: Database, beats: Beats, workers: Workers
) -> None:
    db.add_run("run")
    child = workers.holding("hold_async", "run")
    await asyncio.to_thread(beats.await_more, "run", 1)
    child.send(signal.SIGSTOP)
    silence(db, "run")
    await sweep()
    assert db.outcomes() == {"run": "marked"}
    marked = row_of(db, "run")
    child.tell("check run")
    child.send(signal.SIGCONT)
    await asyncio.to_thread(await_line, child, "lost run marked")
    for _ in range(2):
        child.tell("finish run")
    await asyncio.to_thread(
        until, lambda: child.output.count(MARKED_AND_CONTESTED) == 2, "two refusals"
    )
    [contest] = contests(db)
    assert contest["sweep_id"] == db.verdicts()[0]["sweep_id"]
    told = {name: contest[name] for name in ("target", "worker_id", "reported_status")}
    assert told == {"target": "default", "worker_id": "worker-1", "reported_status": "completed"}
    assert row_of(db, "run") == marked
    assert "verdict_contested" in child.log.read_text()


MARKED_AND_CONTESTED = "finish run: lost by marked, contested True"


async def test_what_is_lost_says_what_was_found_instead(db: Database) -> None:
    db.add_run("run")
    complete(db, "run")
    async with keep_alive("run", worker_id="worker-1", interval=OFTEN) as alive:
        await asyncio.to_thread(alive.is_lost.wait, 10)
        assert alive.lost is not None
        assert (alive.run_id, alive.lost.run_id, alive.lost.by) == ("run", "run", LostBy.FINISHED)
        assert alive.lost.found["status"] == "completed"
        assert "run run is lost (finished): status completed" in str(alive.lost)
        with pytest.raises(RunLost) as raised:
            alive.check()
        assert raised.value is alive.lost


async def test_without_a_worker_a_run_that_changes_hands_is_not_lost(db: Database) -> None:
    db.add_run("run")
    async with keep_alive("run", interval=OFTEN) as alive:
        db.do("UPDATE worker_runs SET worker_id = 'worker-2'")
        before = db.one("SELECT now()")
        await asyncio.to_thread(
            until, lambda: (heartbeat(db, "run") or before) > before, "a beat after it"
        )
        alive.check()


async def test_two_workers_of_one_process_lose_a_run_to_each_other(
    db: Database, beats: Beats
) -> None:
    """Though one statement beats for both."""
    db.add_run("run", worker="worker-1")
    async with keep_alive("run", worker_id="worker-1", interval=2) as first:
        await asyncio.to_thread(beats.await_more, "run", 1)
        db.do("UPDATE worker_runs SET worker_id = 'worker-2'")
        async with keep_alive("run", worker_id="worker-2", interval=2) as second:
            assert await asyncio.to_thread(first.is_lost.wait, 5), "the first was never told"
            assert first.lost is not None
            assert (first.lost.by, second.lost) == (LostBy.CHANGED_HANDS, None)


async def test_a_run_that_the_block_itself_has_finished_is_not_lost(
    db: Database, beats: Beats
) -> None:
    """What follows its finish, such as cleaning up, is not stopped."""
    db.add_run("run")
    db.add_run("other")
    asked: dict[str, Any] = {"worker_id": "worker-1", "interval": OFTEN}
    async with keep_alive("other", **asked), keep_alive("run", cancel=True, **asked) as alive:
        await alive.finish(output={"rows": 1})
        await asyncio.to_thread(beats.await_more, "other")
        assert alive.lost is None
    assert db.status("run") == "completed"


async def test_its_own_result_whose_acknowledgement_is_late_is_no_loss_of_the_block(
    db: Database, beats: Beats, proxy: Proxy
) -> None:
    """It stands written while it is tried again, and the block goes on beating meanwhile."""
    db.add_run("run")
    db.add_run("other")
    asked: dict[str, Any] = {"worker_id": "worker-1", "interval": OFTEN}
    async with keep_alive("other", **asked), keep_alive("run", cancel=True, **asked) as alive:
        await asyncio.to_thread(beats.await_more, "other", 1)
        proxy.lose_reply_to(COMMIT, after=b"output_json")
        await alive.finish(output={"rows": 1})
        assert proxy.has_lost_a_reply.is_set()
        await asyncio.to_thread(beats.await_more, "other", 2)
        assert alive.lost is None
    assert db.status("run") == "completed"


async def test_a_loop_that_was_closed_under_its_block_costs_the_other_runs_no_beat(
    db: Database, beats: Beats
) -> None:
    db.add_run("abandoned")
    db.add_run("run")
    complete(db, "abandoned")
    async with keep_alive("run", interval=OFTEN):

        def abandon() -> None:
            loop = asyncio.new_event_loop()
            block = keep_alive("abandoned", interval=OFTEN)
            loop.run_until_complete(block.__aenter__())
            loop.close()

        await asyncio.to_thread(abandon)
        await asyncio.to_thread(beats.await_more, "run", 5)
