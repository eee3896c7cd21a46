"""Time is the database's: the clock of a client takes no part in a verdict."""

import json
import subprocess
import sys
import textwrap
import time

import pytest

from support import Database

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
