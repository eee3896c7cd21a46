"""Alive over more than a threshold: what is told to whoever was away for that long.

The scene began with the first module of alive that ran, so that most of the minute it takes has
passed meanwhile; this module is the last of them by its name.
"""

import asyncio
import re
import signal
from collections.abc import Iterator
from statistics import median, quantiles

import pytest

from alive_support import THRESHOLD, Minute, await_end, await_line, contests, row_of, sweep
from support import until

pytestmark = pytest.mark.usefixtures("no_beater_is_left", "the_minute_has_begun")


@pytest.fixture(scope="module", autouse=True)
def _the_minute_ends_here(the_minute: Minute) -> Iterator[None]:
    yield
    the_minute.end()


def test_quick_blocks_that_are_lost_at_their_end_leave_nothing_behind(minute: Minute) -> None:
    for mode in ("quick", "quick_async"):
        told = await_line(minute.children[mode], "quick ", 120)
        counts = {name: int(number) for name, number in re.findall(r"'(\w+)': (\d+)", told)}
        assert counts["lost"] > 100, told
        assert counts["well"] > 100, told
        strays = [line for line in minute.children[mode].output if line.startswith("stray ")]
        assert counts["stray"] == 0, (mode, told, strays[:5])
        await_end(minute.children[mode])


def test_all_runs_of_a_process_share_a_connection_and_a_statement_a_beat(minute: Minute) -> None:
    db = minute.db
    until(lambda: minute.beats.of("fleet-1") >= 30, "thirty beats of the fleet", 60)
    rows = db.do(
        "SELECT pid, cardinality(runs) AS runs, extract(epoch FROM at - lag(at) OVER (ORDER BY"
        " at))::float AS pause FROM beats WHERE 'fleet-1' = ANY (runs) AND at > %s ORDER BY at",
        minute.held_at,
    )
    # A beat passes over rows that somebody holds, so a busy machine may see one with fewer.
    assert median(row["runs"] for row in rows) == 300
    [pid] = {row["pid"] for row in rows}
    others = db.do(
        "SELECT pid, runs FROM beats WHERE runs && %s AND pid <> %s", ["fleet-2", "fleet-300"], pid
    )
    assert others == [], "no other statement beats for any of them"
    # Quartiles, for a busy machine delays one or the other; beats that are spread by a tenth to
    # either side lie a tenth apart there.
    early, _, late = quantiles([row["pause"] for row in rows[1:]], n=4)
    assert early >= 0.9
    assert late - early > 0.04, "some come early, and some late"
    connections = db.do(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = 'orphan-recovery' AND query_start > now() - interval '3 seconds'"
    )
    # The fleet's, and that of the worker whose connection once hung.
    assert pid in {row["pid"] for row in connections}
    assert len(connections) == 2, connections


def test_a_connection_that_hangs_is_given_up_and_beats_go_on_over_another(minute: Minute) -> None:
    db = minute.db
    until(
        lambda: db.one(
            "SELECT heartbeat_at > now() - interval '3 seconds' FROM worker_runs WHERE id = 'hung'"
        ),
        "a beat over a new connection",
        20,
    )
    minute.children["hung"].tell("check hung")
    await_line(minute.children["hung"], "check hung: well")


def test_a_worker_whose_beats_do_not_come_through_is_told_within_the_threshold(
    minute: Minute,
) -> None:
    """Though its statement hangs, and whatever it does; by then it may have been marked."""
    lines = [
        await_line(minute.children["swallowed"], "lost swallowed unproven", THRESHOLD + 20),
        await_line(minute.children["cancelled"], "stopped cancelled unproven", 20),
        await_line(minute.children["stopped"], "stopped stopped unproven", 20),
    ]
    for line in lines:
        told_at = float(line.rpartition(" ")[2])
        assert minute.begun_at + THRESHOLD < told_at < minute.swallowed_at + THRESHOLD + 2, line
    for name in ("cancelled", "stopped"):
        await_line(minute.children[name], "went on after True")
    child = minute.children["swallowed"]
    for run, by in (("swallowed", "lost by unproven"), ("never", "well")):
        child.tell(f"check {run}")
        await_line(child, f"check {run}: {by}")
    for line in child.output:  # a rule gives this one two minutes, which may be over by now
        if line.startswith("lost longer unproven"):
            assert float(line.rpartition(" ")[2]) > minute.begun_at + 2 * THRESHOLD


def test_an_interpreter_ends_though_its_beat_hangs(minute: Minute) -> None:
    for name in ("cancelled", "stopped"):
        await_end(minute.children[name])
    child = minute.children["swallowed"]
    child.tell("end")
    await_line(child, "released")
    child.tell("end")
    await_end(child, 12)


async def test_a_worker_that_was_frozen_for_a_threshold_is_told_before_its_finish(
    minute: Minute,
) -> None:
    db, frozen, spared = minute.db, minute.children["frozen"], minute.children["spared"]
    await asyncio.to_thread(minute.await_silence)
    await sweep(minute.fenced_target)
    assert db.outcomes()["frozen"] == "marked"
    assert "spared" not in db.outcomes()
    rows = {run: row_of(db, run) for run in ("frozen", "spared")}
    frozen.send(signal.SIGCONT)
    spared.send(signal.SIGCONT)
    await asyncio.to_thread(await_line, frozen, "lost frozen ", 5)
    await asyncio.to_thread(await_line, spared, "lost spared unproven", 5)
    for _ in range(2):
        frozen.tell("finish frozen")
    refusal = "finish frozen: lost by marked, contested True"
    await asyncio.to_thread(until, lambda: frozen.output.count(refusal) == 2, "two refusals")
    assert [contest["run_id"] for contest in contests(db)] == ["frozen"]
    assert {run: row_of(db, run) for run in rows} == rows, "no beat revived what is lost"
    for child in (frozen, spared):
        child.tell("end")
        child.tell("end")
        await asyncio.to_thread(await_end, child)
