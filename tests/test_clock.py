"""Time is the database's: the clock of a client takes no part in a verdict."""

import json
import subprocess
import sys
import textwrap
import time

import pytest

from orphan_recovery.recover import run_sweep
from orphan_recovery.request import SweepRequest
from support import Database
from tables_support import set_for_all

SWEEP = textwrap.dedent(
    """
    import asyncio, json, sys, time, datetime
    import time_machine
    with time_machine.travel(datetime.timedelta(hours=int(sys.argv[1])), tick=True):
        assert abs(datetime.datetime.now().timestamp() - float(sys.argv[2])) > 3600
        from orphan_recovery import recover_orphaned_runs
        print(json.dumps(asyncio.run(recover_orphaned_runs())))
    """
)


@pytest.mark.parametrize("hours_off", [-9, 9])
def test_a_sweep_on_a_host_whose_clock_is_hours_off_gives_the_same_verdicts(
    db: Database, hours_off: int
) -> None:
    db.add_run("silent", age="5 hours", beat="31 minutes")
    db.add_run("alive", age="5 hours", beat="29 minutes")
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, str(hours_off), str(time.time())],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert [run["run_id"] for run in report["runs"]] == ["silent"]
    assert db.statuses() == {"silent": "crashed", "alive": "running"}
    assert db.one(
        "SELECT abs(extract(epoch FROM now() - completed_at)) < 60 FROM worker_runs"
        " WHERE id = 'silent'"
    )
    [verdict] = db.verdicts()
    assert 31 * 60 <= verdict["silence"].total_seconds() < 32 * 60


WORKER = textwrap.dedent(
    """
    import datetime, sys
    import psycopg, time_machine
    with time_machine.travel(datetime.timedelta(hours=int(sys.argv[2])), tick=True):
        with psycopg.connect(sys.argv[1]) as connection:
            connection.execute("UPDATE worker_runs SET heartbeat_at = now() WHERE id = 'beating'")
    """
)


@pytest.mark.parametrize("hours_off", [-9, 9])
def test_a_worker_whose_clock_is_hours_off_beats_in_database_time(
    db: Database, hours_off: int
) -> None:
    db.add_run("beating", age="5 hours")
    subprocess.run([sys.executable, "-c", WORKER, db.url, str(hours_off)], check=True)
    assert db.one("SELECT abs(extract(epoch FROM now() - heartbeat_at)) < 60 FROM worker_runs")


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York"])
async def test_a_day_is_24_hours_whatever_the_calendar_of_the_session(
    db: Database, zone: str
) -> None:
    """Between then and now the clocks of Berlin were put forward, or back."""
    [changed] = db.do(
        "SELECT n FROM generate_series(1, 300) AS n WHERE timezone('Europe/Berlin', now())"
        " - timezone('Europe/Berlin', now() - n * interval '24 hours') <> n * interval '24 hours'"
        " ORDER BY n LIMIT 1"
    )
    set_for_all(db, f"TimeZone = '{zone}'")
    for number in (changed["n"] - 1, changed["n"]):
        hours = 24 * number
        dead = db.add_run(f"dead {hours}", age=f"{hours} hours 10 minutes")
        live = db.add_run(f"live {hours}", age=f"{hours - 1} hours 50 minutes")
        report = await run_sweep(SweepRequest(asked_by="test", threshold_minutes=hours * 60))
        assert (report.error, report.recovered) == (None, 1)
        assert (db.status(dead), db.status(live)) == ("crashed", "running")
        db.do("DELETE FROM worker_runs WHERE status = 'running'")
