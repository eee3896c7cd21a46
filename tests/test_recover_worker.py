"""A worker that is back under its old name recovers what it held before, and nothing else."""

import asyncio
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from alive_support import Workers, row_of
from lock_support import await_locks, key_of, marked, with_locks
from orphan_recovery import ConfigurationError, recover_worker
from support import Database, until
from tables_support import configure

pytestmark = pytest.mark.usefixtures("no_beater_is_left")

SETTLE = 1.0
"""Seconds: several beats of a twin."""
BACK = "its worker is back, and has not been heard of it since"


def with_beats(folder: Path, environment: pytest.MonkeyPatch, more: str = "") -> None:
    described = f"[targets.default]\nthreshold_minutes = 600\nheartbeat_seconds = 0.4\n{more}"
    configure(folder, environment, described, "default")


async def recover(worker: str = "worker-1", **asked: Any) -> dict[str, Any]:
    report = await recover_worker(worker, **{"settle_seconds": SETTLE, **asked})
    assert report["error"] is None, report
    return report


# What is recovered


async def test_what_it_held_is_recovered_at_once_whatever_threshold_and_rules_say(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_beats(
        tmp_path,
        monkeypatch,
        '[[targets.default.rules]]\nmatch = { task = "spared" }\nnever = true\n'
        '[[targets.default.rules]]\nmatch = { task = "long" }\nthreshold_minutes = 6000\n',
    )
    db.add_run("beat a moment ago", age="1 hour", beat="3 seconds")
    db.add_run("never beat", age="5 seconds")
    for task in ("spared", "long"):
        db.add_run(task, age="10 minutes", beat="1 minute")
        db.do("UPDATE worker_runs SET task = id WHERE id = %s", task)
    db.add_run("queued", status="queued")
    db.add_run("finished", status="completed")
    finished = row_of(db, "finished")
    report = await recover()
    assert (report["detected"], report["recovered"]) == (5, 5)
    assert marked(db) == ["beat a moment ago", "long", "never beat", "queued", "spared"]
    assert row_of(db, "finished") == finished
    [swept] = db.sweeps()
    assert swept["asked_by"].startswith("recover_worker on ")
    assert (swept["scope"], swept["ended_as"]) == ({"worker": "worker-1"}, "completed")
    for verdict in db.verdicts():
        assert (verdict["rule"], verdict["threshold"]) == (BACK, timedelta(seconds=SETTLE))


async def test_the_runs_of_other_workers_are_left_alone(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However dead they look: they are for a sweep, with all its doubts."""
    with_beats(tmp_path, monkeypatch)
    db.add_run("mine")
    others = [
        db.add_run("another's", worker="worker-2", age="900 hours"),
        db.add_run("one of a longer name", worker="worker-10", age="900 hours"),
        db.add_run("nobody's", status="queued", worker=None, age="900 hours"),
    ]
    before = [row_of(db, run) for run in others]
    assert (await recover())["recovered"] == 1
    assert marked(db) == ["mine"]
    assert [row_of(db, run) for run in others] == before


async def test_another_target_of_that_name_is_recovered_where_it_is_asked_for(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = '[targets.others]\ntable = "jobs"\nin_flight = ["busy"]\nheartbeat_seconds = 0.2\n'
    with_beats(tmp_path, monkeypatch, f"{more}columns = {{ worker_id = 'who' }}\n")
    db.do(
        "CREATE TABLE jobs (id int PRIMARY KEY, status text, who text, created_at timestamptz);"
        "INSERT INTO jobs VALUES (1, 'busy', 'worker-1', now() - interval '1 minute')"
    )
    db.add_run("run")
    assert (await recover(target="others"))["recovered"] == 1
    assert db.one("SELECT status FROM jobs") == "crashed"
    assert db.status("run") == "running"


# A twin


async def test_the_runs_of_a_twin_that_beats_are_left_alone(
    db: Database, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_beats(tmp_path, monkeypatch)
    db.add_run("former")
    db.add_run("twin's")
    child = workers.holding("hold", "twin's")
    until(lambda: db.one("SELECT bool_or(heartbeat_at IS NOT NULL) FROM worker_runs"), "a beat")
    assert (await recover())["recovered"] == 1
    assert marked(db) == ["former"]
    child.tell("check twin's")
    until(lambda: "check twin's: well" in child.output, "that it is well")


@pytest.mark.parametrize("beats", [False, True], ids=["before", "after"])
async def test_with_worker_heartbeats_it_has_to_come_before_the_first_beat(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beats: bool
) -> None:
    """Afterwards the name is alive, and nobody can tell it from a twin of that name."""
    more = "worker_heartbeat = { table = 'workers', key = 'id', run_key = 'worker_id', "
    with_beats(tmp_path, monkeypatch, f"{more}last_seen = 'seen' }}\n")
    db.do("CREATE TABLE workers (id text PRIMARY KEY, seen timestamptz)")
    db.do("INSERT INTO workers VALUES ('worker-1', now() - interval '1 minute')")
    db.add_run("former")

    async def beat() -> None:
        while beats:
            db.do("UPDATE workers SET seen = clock_timestamp()")
            await asyncio.sleep(SETTLE / 10)

    task = asyncio.create_task(beat())
    assert (await recover())["recovered"] == (0 if beats else 1)
    task.cancel()


async def test_a_twin_that_was_silent_until_now_has_the_settle_time_to_beat(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_beats(tmp_path, monkeypatch)
    db.add_run("former", beat="1 hour")
    db.add_run("twin's", beat="1 hour")
    beat = "UPDATE worker_runs SET heartbeat_at = clock_timestamp() WHERE id = %s"
    asyncio.get_running_loop().call_later(SETTLE / 2, db.do, beat, "twin's")
    assert (await recover())["recovered"] == 1
    assert marked(db) == ["former"]


async def test_the_runs_of_a_twin_that_holds_its_lock_are_left_alone(
    db: Database, engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = with_locks(tmp_path, monkeypatch, "run", 0.2)
    db.add_run("former")
    db.add_run("twin's")
    with db.connect(autocommit=True) as twin:
        twin.execute("SELECT pg_advisory_lock(%s)", [await key_of(engine, target, "twin's")])
        await asyncio.to_thread(await_locks, db, 1)
        assert (await recover(settle_seconds=0.2))["recovered"] == 1
    assert marked(db) == ["former"]
    [verdict] = db.verdicts()
    assert (verdict["evidence"], verdict["rule"]) == ("lock", BACK)


# How long it takes


async def test_without_a_settle_time_it_waits_for_two_beats_of_the_target(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_beats(tmp_path, monkeypatch)
    db.add_run("run")
    begun = time.monotonic()
    assert (await recover(settle_seconds=None))["recovered"] == 1
    assert 0.8 <= time.monotonic() - begun < 0.8 + 10
    [verdict] = db.verdicts()
    assert verdict["threshold"] == timedelta(seconds=0.8)


@pytest.mark.parametrize("worker", ["worker-1", "nobody ever heard of"])
async def test_where_nothing_is_held_there_is_nothing_to_wait_for(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str
) -> None:
    """As at every start of a worker that ended well, or is new."""
    with_beats(tmp_path, monkeypatch)
    db.add_run("ended", status="completed")
    db.add_run("another's", worker="worker-2")
    begun = time.monotonic()
    report = await recover(worker, settle_seconds=60)
    assert time.monotonic() - begun < 30
    assert (report["detected"], report["recovered"]) == (0, 0)
    assert db.verdicts() == []


async def test_that_no_sweep_looked_for_longer_than_the_settle_time_is_no_reason_to_look_twice(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep comes every few minutes; this one was awake for as long as it waited."""
    with_beats(tmp_path, monkeypatch)
    db.add_run("first", beat="10 minutes")
    await recover()
    db.do("ALTER TABLE orphan_recovery.sweeps DISABLE TRIGGER ALL")
    db.do(
        "UPDATE orphan_recovery.sweeps SET opened_at = opened_at - interval '5 minutes',"
        " ended_at = ended_at - interval '5 minutes'"
    )
    db.add_run("second", beat="10 minutes")
    report = await recover()
    assert (report["recovered"], report["looked_twice"]) == (1, None)


async def test_with_recovery_switched_off_it_neither_waits_nor_looks(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_beats(tmp_path, monkeypatch)
    monkeypatch.setenv("ORPHAN_RECOVERY_ENABLED", "false")
    db.add_run("run")
    begun = time.monotonic()
    report = await recover(settle_seconds=60)
    assert time.monotonic() - begun < 30
    assert (report["enabled"], db.status("run"), db.sweeps()) == (False, "running", [])


# What cannot be used


async def test_a_settle_time_that_is_none_is_refused(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below zero, a twin that beat a moment ago would count as dead."""
    with_beats(tmp_path, monkeypatch)
    db.add_run("run", beat="0 seconds")
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="settle_seconds is"):
            await recover_worker("worker-1", settle_seconds=seconds)
    assert db.status("run") == "running"


@pytest.mark.parametrize("worker", ["", "  "])
async def test_a_worker_without_a_name_is_refused(worker: str) -> None:
    with pytest.raises(ConfigurationError, match="worker is"):
        await recover_worker(worker, settle_seconds=SETTLE)


async def test_a_target_without_workers_is_told_by_name_and_nothing_is_marked(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = "[targets.bare]\ntable = 'worker_runs'\ncolumns = { worker_id = false }\n"
    with_beats(tmp_path, monkeypatch, more)
    db.add_run("run")
    report = await recover_worker("worker-1", target="bare", settle_seconds=0.1)
    assert "only worker_id 'worker-1' was asked for" in report["error"]
    assert "target 'bare' has no column for worker_id: name it under columns" in report["error"]
    assert (report["recovered"], db.status("run")) == (0, "running")


async def test_a_database_that_cannot_be_reached_stops_no_workers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    with_beats(tmp_path, monkeypatch)
    monkeypatch.setenv("ORPHAN_RECOVERY_DATABASE_URL", f"postgresql:///x?host={tmp_path}")
    report = await recover_worker("worker-1", settle_seconds=0.1)
    assert "OperationalError" in report["error"]
